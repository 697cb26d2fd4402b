"""Files of closed records, by a collector that runs: made, asked, imported."""

import shutil
import signal

import askersbed
import pytest
from netflowbed import (
    NETFLOW,
    accounting,
    as_uid,
    collector,
    connmark,
    counted,
    loads,
    spread,
    sums,
)
from storebed import T0, flow, put
from vnet.testing.apps import start
from vnet.testing.net import HERE
from vnet.testing.poll import until

from netflow import history, store
from netflow.history import archive
from netflow.node import Node

pytestmark = pytest.mark.netns

A = 256


@pytest.fixture
def node(ns, monkeypatch):
    """A namespace whose connections are counted; a collector there soon makes files."""
    accounting(ns, lasting=600)
    connmark(ns, A)
    monkeypatch.setenv("NETFLOW_SEGMENT_ROWS", "100")
    return ns


def files(flows):
    return loads(flows.cli("history", "-o", "json").stdout)["files"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_records_that_went_to_files_are_asked_for_like_others_and_counted_once(
    node, tmp_path, number
):
    with (
        collector(node, tmp_path, "--node", "alpha", "--active-timeout", "1s") as flows,
        start(node, "udp-recv", bind="127.0.0.1") as sink,
    ):
        options = {"to": "127.0.0.1", "port": sink.port, "from_port": 4000}
        with start(node, "udp-send", count=5, **options) as sender:
            sender.result()
        assert sums(flows.records(sport=[4000]))[0] == 5
        spread(node, 300)
        first = until(lambda: files(flows))
        assert first[0]["node"] == "alpha"
        records = flows.records()
        assert sums(records) == counted(node)
        assert {r["node"] for r in records} == {"alpha"}
        flows.stop(number)
        with start(node, "udp-send", count=7, **options) as sender:
            sender.result()
        sink.result(stop=True)
    with collector(node, tmp_path, "--node", "alpha") as flows:
        assert sums(flows.records()) == counted(node)
        assert sums(flows.records(sport=[4000]))[0] == 12

        def steady():
            """What is there, unless a file was made in between."""
            before, status = files(flows), flows.status()
            table = flows.cli("history").stdout.splitlines()
            return (before, status, table) if files(flows) == before else None

        found, status, table = until(steady)
        assert status["records"] == status["hot"] + sum(f["records"] for f in found)
        assert len(table) == len(found) + 2
        assert "alpha" in table[1]


def test_a_full_disk_of_files_keeps_records_in_the_database_until_there_is_room(node, tmp_path):
    where = tmp_path / "history"
    where.mkdir()
    HERE.run("mount", "-t", "tmpfs", "-o", "size=4k", "small", str(where))
    try:
        with collector(node, tmp_path, "--keep-free", "0") as flows:
            spread(node, 300)
            log = tmp_path / "collector.log"
            flows.records()
            until(lambda: "cannot write history" in log.read_text())
            assert files(flows) == []
            assert sums(flows.records()) == counted(node)
            assert not [p for p in where.rglob("*") if p.is_file()]
            HERE.run("mount", "-o", "remount,size=20m", str(where))
            until(lambda: files(flows))
            assert sums(flows.records()) == counted(node)
            assert "Traceback" not in log.read_text()
    finally:
        HERE.run("umount", "-l", str(where))


def other_nodes_file(base):
    kept = history.open_store(base, Node("beta", 2))
    store.begin_run(kept, store.Mark(T0))
    put(kept, *(flow(sport=n, start=n, end=n + 1) for n in range(5)), caught_up=T0)
    store.roll(kept, 2 * T0)
    archiver = archive.Archiver(kept, kept.con.cursor(), history.Keeping(), base / "registry.db")
    archive.close_segments(archiver)
    archiver.con.close()
    kept.con.close()
    [path] = base.glob("history/*/*.parquet")
    return path


def test_import_takes_files_once_and_refuses_what_is_none(node, tmp_path):
    path = other_nodes_file(tmp_path / "beta")
    broken = path.with_name("broken.parquet")
    broken.write_bytes(path.read_bytes()[:-50])
    with collector(node, tmp_path, "--node", "alpha", "--keep", "0") as flows:
        done = flows.cli("import", str(path))
        assert "5 records of beta" in done.stdout
        again = flows.cli("import", str(path.parent), check=False)
        assert again.returncode == 1
        assert "here already" in again.stdout
        assert "broken.parquet: refused" in again.stderr
        assert len(again.stderr.splitlines()) == 1
        found = flows.records(nodes=["beta"])
        assert [r["sport"] for r in found] == [0, 1, 2, 3, 4]
        assert loads(flows.cli("query", "--node", "beta", "-o", "json").stdout)["records"] == found
        assert [f["node"] for f in files(flows)] == ["beta"]
        assert loads(flows.cli("history", "--node", "alpha", "-o", "json").stdout)["files"] == []
        said = flows.cli("query", "--node", "beta", "--last", "1h").stderr
        assert "beta: after" in said
        none = tmp_path / "none"
        none.mkdir()
        assert flows.cli("import", str(none), check=False).returncode == 1
        assert flows.cli("import", str(tmp_path / "nothing"), check=False).returncode == 2


@pytest.fixture
def open_way():
    with askersbed.open_way() as base:
        yield base


def test_members_of_the_group_may_ask_but_not_import(node, open_way):
    base = open_way
    path = base / "file.parquet"
    shutil.copy(other_nodes_file(base / "beta"), path)
    path.chmod(0o644)
    with collector(node, base, "--group", "games") as flows:
        for words, code in ((["history"], 0), (["import", str(path)], 1)):
            argv = as_uid(64999, *NETFLOW, *words, "--socket", flows.socket, group=askersbed.GAMES)
            done = HERE.run(*argv, check=False, env={"PYTHONDONTWRITEBYTECODE": "1"})
            assert done.returncode == code, done.stderr
        assert "only root may" in done.stderr
        assert flows.records(nodes=["beta"]) == []
