"""The exporter beside a collector that runs: what arrives, whatever happens on the way."""

import json
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time_ns

import pytest
import servebed
from ipfixbed import expected, facts, leave, number, receiver, some_rows
from netflowbed import NETFLOW, accounting, as_uid, collector, connmark, spread, sums, unread
from storebed import T0, put
from vnet.testing.apps import start
from vnet.testing.net import HERE
from vnet.testing.poll import until

from netflow import history, store
from netflow.node import Node
from vnet import registry

pytestmark = pytest.mark.netns

A, B = 256, 300
NODE = ("--node", "alpha", "--domain", "7", "--keep", "0")


@pytest.fixture
def node(ns):
    accounting(ns, lasting=600)
    connmark(ns, A)
    return ns


def filled(base, count):
    """A store with so many records, all of which are over; the records."""
    rows = some_rows(count, reasons=(1, 2))
    kept = history.open_store(base, Node("alpha", 7))
    store.begin_run(kept, store.Mark(T0))
    put(kept, *rows, caught_up=time_ns())  # in the segment that goes on
    store.end_run(kept)
    store.close(kept)
    return rows


def command(flows, port, *options):
    return [
        *NETFLOW, "export", "--to", f"127.0.0.1:{port}", "--socket", str(flows.socket),
        "--position", str(flows.base / "position"), *options,
    ]  # fmt: skip


@contextmanager
def exporter(flows, port, *options):
    """``netflow export`` while the block runs; killed at its end if it still runs."""
    with (flows.base / "export.log").open("a") as log:
        process = subprocess.Popen(command(flows, port, *options), stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def once(flows, port, *options, check=True):
    return HERE.run(*command(flows, port, "--begin", "oldest", "--once", *options), check=check)


def progress(flows):
    path = flows.base / "position"
    return json.loads(path.read_text()) if path.exists() else {"position": {"segment": 0, "row": 0}}


def at(flows):
    """(segment, row) up to which all is sent, as it is saved."""
    position = progress(flows)["position"]
    return position["segment"], position["row"]


def test_slices_traffic_arrives_as_it_is_recorded_with_owners_and_names(node, tmp_path):
    for tool in ("iptables", "ip6tables"):
        node.run(tool, "-t", "mangle", "-F")
        connmark(node, A | B << 16, tool=tool)
    requests = [registry.Request("codeen", A), registry.Request("coral", B)]
    registry.assign(tmp_path / "registry.db", requests, now_ns=1)
    taker = receiver()
    with (
        collector(node, tmp_path, *NODE, "--active-timeout", "1s") as flows,
        exporter(flows, taker.port, "--transport", "tcp", "--begin", "oldest", "--vrf"),
    ):
        for to in ("127.0.0.1", "::1"):
            with start(node, "udp-recv", bind=to) as sink:
                with start(node, "udp-send", to=to, port=sink.port, count=50) as sender:
                    sender.result()
                sink.result(stop=True)
        node.run("ping", "-c", "3", "-i", "0.2", "127.0.0.1")
        spread(node, 200)
        wanted = sums(flows.records())

        def arrived():
            with taker.lock:
                found = [facts(r)["counts"] for s in taker.sessions for _, _, r in s.data]
            return tuple(map(sum, zip(*found, strict=True))) == sums(flows.records())

        until(arrived, what="all that is recorded has arrived")
        assert wanted[0] >= 303
        assert taker.wrong() == []
        [session] = taker.sessions
        found = [facts(record) for _, _, record in session.data]
        assert {fact["xids"] for fact in found} == {(A, B)}
        assert {fact["src"] for fact in found} >= {"127.0.0.1", "::1"}
        assert {fact["proto"] for fact in found} == {1, 17}
        assert session.told[7, A] == session.told[7, "vrf", A] == "codeen"
        assert session.told[7, B] == "coral"
        assert session.nodes == {7: "alpha"}
        by_flow = Counter()
        for fact in found:
            by_flow[fact["flow_id"]] += fact["counts"][0]
        recorded = Counter()
        for record in flows.records():
            recorded[record["flow_id"]] += record["originator"]["packets"]
        assert by_flow == recorded
    leave(taker)


def test_a_kill_loses_nothing_and_repeats_only_what_was_not_settled(node, tmp_path):
    rows = filled(tmp_path, 8_000)
    taker = receiver()
    # It takes a quarter of a minute at this rate: it is killed in the middle.
    options = ("--transport", "tcp", "--begin", "oldest", "--rate", "500")
    with collector(node, tmp_path, *NODE) as flows:
        with exporter(flows, taker.port, *options) as process:
            # It has saved a position that is behind.
            until(lambda: progress(flows)["position"]["row"] > 0, what="a position")
            process.send_signal(signal.SIGKILL)
            process.wait()
        behind = progress(flows)["position"]["row"]
        assert behind < 8_000
        with exporter(flows, taker.port, "--transport", "tcp", "--rate", "0") as process:
            until(lambda: len(taker.counts()) == len(rows), what="all records")
            until(lambda: progress(flows)["position"]["row"] == 8_000, what="it is saved")
        first, second = (len(session.data) for session in taker.sessions)
        assert second == 8_000 - behind
        assert sum(taker.counts().values()) == first + second
        assert set(taker.counts().values()) <= {1, 2}
        assert taker.wrong() == []
        found = {}
        for session in taker.sessions:
            found |= {number(r, 0, 2): facts(r) | {"flow_id": 0} for _, _, r in session.data}
        assert found == {row["opackets"]: expected(row) | {"flow_id": 0} for row in rows}
    leave(taker)


def test_stopping_and_starting_repeats_nothing(node, tmp_path):
    filled(tmp_path, 4_000)
    taker = receiver()
    options = ("--transport", "tcp", "--begin", "oldest")
    with collector(node, tmp_path, *NODE) as flows:
        for _ in range(3):
            before = sum(taker.counts().values())
            with exporter(flows, taker.port, *options, "--rate", "500") as process:
                until(lambda was=before: sum(taker.counts().values()) > was, what="some")
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
            # Acknowledged by the kernel is not read: the next round counts from here.
            until(lambda: sum(taker.counts().values()) == progress(flows)["records"], what="it")
        once(flows, taker.port, *options[:2])
        until(lambda: len(taker.counts()) == 4_000, what="all records")
        assert set(taker.counts().values()) == {1}
        assert progress(flows)["again"] == 0
        spread(node, 20)
        flows.records()
        once(flows, taker.port, *options[:2])
        until(lambda: taker.counts()[1] >= 20, what="what came meanwhile")
    leave(taker)


def test_a_receiver_that_was_away_gets_what_it_missed(node, tmp_path):
    filled(tmp_path, 1_000)
    taker = receiver()
    port = taker.port
    with (
        collector(node, tmp_path, *NODE) as flows,
        exporter(flows, port, "--transport", "tcp", "--begin", "oldest", "--rate", "250"),
    ):
        until(lambda: len(taker.counts()) > 100, what="some records")
        leave(taker)
        log = tmp_path / "export.log"
        until(lambda: "trying again" in log.read_text(), what="it is missed")
        spread(node, 20)
        flows.records()
        back = receiver(port)
        until(lambda: len(taker.counts() + back.counts()) >= 1_000, what="all of them")
        until(lambda: at(flows) >= (1, 1_000), what="it is saved")
        counts = taker.counts() + back.counts()
        counts.pop(1, None)  # the twenty: they all have one packet
        assert sum(counts.values()) - len(counts) <= progress(flows)["again"]
        assert taker.wrong() == back.wrong() == []
        # Once it had gone it was told so once, however often that was tried.
        assert log.read_text().count("trying again") <= 2
        assert flows.status()["live"] >= 0
    leave(back)


def test_all_since_the_start_is_followed_while_segments_become_files(node, tmp_path, monkeypatch):
    """Also what came while the receiver was not there yet."""
    monkeypatch.setenv("NETFLOW_SEGMENT_ROWS", "100")
    taker = receiver()
    port = taker.port
    leave(taker)
    with (
        collector(node, tmp_path, *NODE, "--active-timeout", "1s") as flows,
        exporter(flows, port, "--transport", "tcp", "--rate", "1000"),
    ):
        until(lambda: (tmp_path / "position").exists(), what="it has begun")
        for first in range(0, 1500, 300):
            spread(node, 300, first)
            flows.records()
        taker = receiver(port)
        until(lambda: flows.status()["files"] >= 3, what="some files")

        def same():
            with taker.lock:
                found = sum(len(session.data) for session in taker.sessions)
            return found == flows.status()["records"]

        until(same, what="each record once")
        assert progress(flows).get("lost", 0) == progress(flows).get("again", 0) == 0
    leave(taker)


def free_port():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def daemon(base, port, *argv):
    """A receiver over UDP, once its port is bound."""
    with (base / f"{argv[0]}.log").open("a") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)

    def bound():
        assert process.poll() is None, (base / f"{argv[0]}.log").read_text()
        return unread(port)[0] >= 0

    try:
        until(bound, what=f"{argv[0]} listens")
        yield process
    finally:
        process.kill()
        process.wait()


def nfdump_says(where):
    said = HERE.run("nfdump", "-R", str(where), "-I").stdout
    figures = dict(line.split(": ") for line in said.splitlines() if ": " in line)
    return {key: int(figures[key]) for key in ("Flows", "Packets", "Bytes", "Sequence failures")}


def test_nfcapd_and_nfacctd_count_the_same(node, tmp_path):
    rows = filled(tmp_path, 500)  # so few that a receiver's buffer holds all, read or not
    both = sum(r["opackets"] + r["rpackets"] for r in rows)
    octets = sum(r["obytes"] + r["rbytes"] for r in rows)
    answered = sum(r["rpackets"] > 0 for r in rows)
    with collector(node, tmp_path, *NODE) as flows:
        for options, records in (((), 500), (("--uniflow", "--vrf"), 500 + answered)):
            files, port = tmp_path / f"nfcapd{len(options)}", free_port()
            files.mkdir()
            words = ("nfcapd", "-w", str(files), "-b", "127.0.0.1", "-p", str(port))
            with daemon(tmp_path, port, *words, "-t", "3600") as nfcapd:
                place = str(tmp_path / f"at-nfcapd{len(options)}")
                once(flows, port, "--position", place, *options)
                until(lambda port=port: unread(port)[0] == 0, what="nfcapd has read all")
                log = tmp_path / "nfcapd.log"
                nfcapd.terminate()
                nfcapd.wait(60)
            assert nfdump_says(files) == {
                "Flows": records, "Packets": both, "Bytes": octets, "Sequence failures": 0,
            }, log.read_text()  # fmt: skip
        port, out = free_port(), tmp_path / "nfacctd.csv"
        conf = tmp_path / "nfacctd.conf"
        conf.write_text(
            "daemonize: false\nplugins: print\nprint_output: csv\nprint_refresh_time: 1\n"
            f"print_output_file: {out}\nprint_output_file_append: true\nnfacctd_time_new: true\n"
            "aggregate: src_host,dst_host,src_port,dst_port,proto,originator_xid,responder_xid\n"
            f"aggregate_primitives: {tmp_path / 'primitives.lst'}\n"
            f"nfacctd_ip: 127.0.0.1\nnfacctd_port: {port}\n"
        )
        (tmp_path / "primitives.lst").write_text(
            "name=originator_xid field_type=32473:1 len=2 semantics=u_int\n"
            "name=responder_xid field_type=32473:2 len=2 semantics=u_int\n"
        )
        with daemon(tmp_path, port, "nfacctd", "-f", str(conf)):
            once(flows, port, "--position", str(tmp_path / "at-nfacctd"), "--uniflow")

            def counted():
                text = out.read_text() if out.exists() else ""
                lines = text[: text.rfind("\n") + 1].splitlines()
                values = [line.split(",")[-2:] for line in lines if line[:1] not in ("S", "")]
                return tuple(sum(int(v[n]) for v in values) for n in (0, 1))

            until(lambda: counted() == (both, octets), what="nfacctd has counted all")
            xids = {tuple(line.split(",")[5:7]) for line in out.read_text().splitlines()[1:]}
            assert {(str(r["oxid"]), str(r["rxid"])) for r in rows} <= xids
        once(flows, free_port())  # where nobody listens
        told = progress(flows)
        assert told["records"] == told["position"]["row"] == 500
        assert told["refused"] > 0


@pytest.fixture
def reachable():
    """A directory that other users can reach; pytest's own are not."""
    with TemporaryDirectory() as base:
        Path(base).chmod(0o755)
        yield Path(base)


FOLLOW = """
import sys; from pathlib import Path; from netflow import client, wire
client.after(Path(sys.argv[1]), wire.After(name='me'))
"""


def test_what_cannot_be_is_refused_before_anything_is_sent(node, reachable):
    tmp_path = reachable
    requests = [registry.Request("codeen", A, users=("nobody",))]
    registry.assign(tmp_path / "registry.db", requests, now_ns=1)
    with collector(node, tmp_path, *NODE) as flows:
        words = as_uid(65534, sys.executable, "-c", FOLLOW, flows.socket)
        said = subprocess.run(words, capture_output=True, text=True, check=False)
        assert "may not follow the records of all" in said.stderr
        taker = receiver()
        with exporter(flows, taker.port, "--transport", "tcp"):
            until(lambda: (tmp_path / "position").exists(), what="it has begun")
            said = once(flows, taker.port, check=False)
            assert (said.returncode, said.stderr.count("\n")) == (1, 1)
            assert "another netflow export has" in said.stderr
        leave(taker)
        broken = tmp_path / "broken"
        broken.write_text("{")
        (tmp_path / "store").write_text("")
        for place, why in ((broken, "cannot read"), (tmp_path / "store" / "x", "cannot")):
            said = once(flows, 9, "--position", str(place), check=False)
            assert (said.returncode, said.stderr.count("\n")) == (1, 1)
            assert why in said.stderr
        said = once(flows, servebed.free_port(), "--transport", "tcp", check=False)
        assert said.returncode == 1
        assert "cannot connect" in said.stderr
    said = HERE.run(*NETFLOW, "export", "--to", "host:99999", check=False)
    assert said.returncode == 2
