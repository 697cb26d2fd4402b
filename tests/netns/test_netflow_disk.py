"""A full disk: nothing is recorded, all who ask are told, and collecting goes on with room."""

import re
from contextlib import contextmanager
from pathlib import Path

import pytest
from netflowbed import accounting, collector, connmark, counted, destroy, spread, sums
from vnet.testing.apps import start
from vnet.testing.poll import until

pytestmark = pytest.mark.netns

DISK = "8m"
TMPFS = f'mount -t tmpfs -o size={DISK} small "$0" && exec "$@"'


@pytest.fixture
def node(ns):
    """A namespace whose connections are counted and last, and somebody takes datagrams there."""
    accounting(ns, lasting=600)
    connmark(ns, 256)
    with start(ns, "udp-recv", bind="127.0.0.1", port=9):
        yield ns


def datagrams(ns, count, port):
    options = {"to": "127.0.0.1", "port": 9, "from_port": port}
    with start(ns, "udp-send", count=count, size=100, **options) as sender:
        sender.result()


@contextmanager
def on_small_disk(node, base):
    """A collector whose store is on a disk of its own, which only it has mounted."""
    store = base / "store"
    store.mkdir()
    under = ("unshare", "--mount", "sh", "-c", TMPFS, str(store))
    with collector(node, base, "--store", str(store), under=under) as flows:
        flows.disk = Path(f"/proc/{flows.process.pid}/root{store}")
        yield flows


def fill(disk):
    """Leave no byte free."""
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        try:
            while ballast.write(bytes(4096)):
                pass
        except OSError:
            pass


def log(base):
    return (base / "collector.log").read_text()


def test_a_full_disk_is_a_gap_and_what_goes_on_is_counted_whole_once_there_is_room(node, tmp_path):
    with on_small_disk(node, tmp_path) as flows:
        datagrams(node, 5, 4000)
        datagrams(node, 5, 4001)
        assert sums(flows.records())[0] == 10
        fill(flows.disk)
        until(lambda: flows.status()["full_since"], what="it sees that the disk is full")
        datagrams(node, 3, 4000)
        node.run("conntrack", "-D", "-p", "udp", "--orig-port-src", "4001")
        records, gaps = flows.ask()
        assert sums(records)[0] == 10  # what was stored can be asked
        assert [gap.what for gap in gaps] == ["disk-full"]
        assert gaps[0].since == flows.status()["full_since"]
        told = re.search(
            r"^netflow_store_full_since_seconds (\S+)", flows.cli("metrics").stdout, re.M
        )
        assert float(told[1]) == pytest.approx(gaps[0].since / 1e9)
        assert flows.ask(until=gaps[0].since - 1)[1] == []
        assert "full: nothing is recorded since" in flows.cli("status").stdout
        assert "the disk was full" in flows.cli("query").stderr
        assert "is full: nothing is recorded" in log(tmp_path)

        (flows.disk / "ballast").unlink()
        until(lambda: not flows.status()["full_since"], what="it collects again")
        datagrams(node, 1, 4000)
        assert sums(flows.records(sport=[4000])) == counted(
            node, "-p", "udp", "--orig-port-src", "4000"
        )
        [*_, last] = flows.records(sport=[4001])
        assert last["reason"] == "cut"
        assert [gap.what for gap in flows.ask()[1]] == ["disk-full"]
        assert "there is room again" in log(tmp_path)
        assert flows.stop() == 0
        assert "Traceback" not in log(tmp_path)


def test_while_the_disk_is_full_neither_collector_nor_kernel_keeps_what_ends(node, tmp_path):
    with on_small_disk(node, tmp_path) as flows:
        fill(flows.disk)
        until(lambda: flows.status()["full_since"], what="it sees that the disk is full")
        before = flows.memory("VmRSS")
        for _ in range(3):
            spread(node, 20_000)
            assert int(node.run("conntrack", "-C").stdout) > 15_000
            destroy(node)
        assert flows.status()["live"] == 0
        assert flows.memory("VmRSS") - before < 4096
        assert int(node.run("conntrack", "-C").stdout) < 100


def test_a_stop_while_the_disk_is_full_says_what_is_missing(node, tmp_path):
    with on_small_disk(node, tmp_path) as flows:
        fill(flows.disk)
        until(lambda: flows.status()["full_since"], what="it sees that the disk is full")
        assert flows.stop() == 1
        assert "stopped while the disk" in log(tmp_path)
        assert "Traceback" not in log(tmp_path)
