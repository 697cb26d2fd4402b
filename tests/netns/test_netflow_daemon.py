"""The collector's life: stops, kills, restarts, refusals and clients that misbehave."""

import os
import re
import signal
import socket
import time
from contextlib import closing
from pathlib import Path

import askersbed
import pytest
from netflowbed import (
    NETFLOW,
    accounting,
    answers,
    as_uid,
    collector,
    connmark,
    counted,
    launch,
    sums,
)
from vnet.testing.apps import start
from vnet.testing.net import HERE
from vnet.testing.poll import until

from netflow import server, wire

pytestmark = pytest.mark.netns

A = 256
NOBODY = 64999  # a uid and gid that nobody has


@pytest.fixture
def node(ns):
    """A namespace whose connections are counted, owned by A."""
    accounting(ns, lasting=600)
    connmark(ns, A)
    return ns


def log(base):
    return (base / "collector.log").read_text()


def datagrams(ns, count, port, size=100, to_port=9):
    """Send from a fixed port, so that it is always the same connection."""
    options = {"to": "127.0.0.1", "port": to_port, "from_port": port}
    with start(ns, "udp-send", count=count, size=size, **options) as sender:
        sender.result()


@pytest.fixture
def sink(node):
    """Somebody who takes datagrams at port 9, so that no ICMP errors come back."""
    with start(node, "udp-recv", bind="127.0.0.1", port=9) as receiver:
        yield receiver


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_loses_nothing_and_a_restart_counts_nothing_twice(node, sink, tmp_path, number):
    with collector(node, tmp_path) as flows:
        datagrams(node, 5, 4000)
        assert flows.stop(number) == 0
    datagrams(node, 3, 4000)
    datagrams(node, 2, 4001)
    with collector(node, tmp_path) as flows:
        datagrams(node, 4, 4000)
        records, gaps = flows.ask()
        assert sums(records) == counted(node)
        assert sums([r for r in records if r["sport"] == 4000])[0] == 12
        assert len({r["flow_id"] for r in records}) == 2
        assert [gap.what for gap in gaps] == ["not-running"]
        assert flows.stop() == 0
    with collector(node, tmp_path) as flows:
        assert sums(flows.records()) == counted(node)


def test_a_kill_records_nothing_twice_and_leaves_a_gap(node, sink, tmp_path):
    with collector(node, tmp_path) as flows:
        datagrams(node, 5, 4000)
        assert sums(flows.records())[0] == 5
        datagrams(node, 6, 4000)
        flows.stop(signal.SIGKILL)
    datagrams(node, 7, 4001)
    with collector(node, tmp_path) as flows:
        records, gaps = flows.ask()
        assert sums(records) == counted(node)
        assert sums([r for r in records if r["sport"] == 4000])[0] == 11
        assert [gap.what for gap in gaps] == ["not-running"]
        [gap] = gaps
        began = max(r["start"] for r in records)
        assert gap.since < gap.until
        assert flows.ask(until=gap.since - 1)[1] == []
        assert flows.ask(since=gap.until + 1)[1] == []
        said = flows.cli("query").stderr
        assert "1 gap touches this period" in said
        assert "no collector ran" in said
        assert began


def test_connections_that_are_older_than_the_collector_are_whole(node, sink, tmp_path):
    datagrams(node, 9, 4000)
    with collector(node, tmp_path) as flows:
        [record] = flows.records()
        assert sums([record]) == counted(node)


def test_an_entry_that_is_removed_while_no_collector_runs_is_in_a_gap(node, sink, tmp_path):
    with collector(node, tmp_path) as flows:
        datagrams(node, 5, 4000)
        flows.stop()
    datagrams(node, 3, 4000)
    node.run("conntrack", "-F")
    with collector(node, tmp_path) as flows:
        records, gaps = flows.ask()
        assert sums(records)[0] == 5
        assert [gap.what for gap in gaps] == ["not-running"]


def test_an_active_query_and_the_next_do_not_count_twice(node, sink, tmp_path):
    with collector(node, tmp_path) as flows:
        for n in range(1, 4):
            datagrams(node, 2, 4000)
            assert sums(flows.records())[0] == 2 * n
            assert sums(flows.records())[0] == 2 * n


def test_it_needs_no_capability_but_net_admin(node, sink, tmp_path):
    words = ("setpriv", "--bounding-set=-all,+net_admin", "--inh-caps=-all", "--")
    flows = launch(node, tmp_path, "--group", "games", under=words)
    try:
        until(lambda: answers(flows))
        status = Path(f"/proc/{flows.process.pid}/status").read_text()
        assert re.search(r"^CapEff:\s+0*1000$", status, re.M)
        datagrams(node, 5, 4000)
        assert sums(flows.records())[0] == 5
        assert flows.stop() == 0
    finally:
        flows.process.kill()
        flows.process.wait()


def test_without_net_admin_it_says_so(node, tmp_path):
    words = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--")
    refused = launch(node, tmp_path, under=words)
    assert refused.process.wait(60) == 1
    assert "CAP_NET_ADMIN is needed" in log(tmp_path)


@pytest.mark.parametrize("setting", ["acct", "timestamp", "events"])
def test_a_collector_that_could_not_count_says_which_setting_to_change(node, tmp_path, setting):
    node.sysctl(**{f"net__netfilter__nf_conntrack_{setting}": 0})
    refused = launch(node, tmp_path)
    assert refused.process.wait(60) == 1
    assert f"sysctl -w net.netfilter.nf_conntrack_{setting}=1" in log(tmp_path)
    assert "Traceback" not in log(tmp_path)
    assert not (tmp_path / "flows.duckdb").exists()


def test_a_second_collector_on_a_store_is_refused_and_the_first_goes_on(node, tmp_path):
    with collector(node, tmp_path) as flows:
        second = launch(node, tmp_path)
        assert second.process.wait(60) == 1
        assert "in use by another collector" in log(tmp_path)
        assert flows.status()["pid"]


def test_without_a_collector_every_question_says_so_and_fails(tmp_path):
    for words in (["query"], ["top"], ["status"]):
        socket_option = ["--socket", str(tmp_path / "none")]
        done = HERE.run(*NETFLOW, *words, *socket_option, check=False)
        assert done.returncode == 1
        assert done.stdout == ""
        assert "no collector answers" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_dead_collectors_socket_is_replaced(node, tmp_path):
    with collector(node, tmp_path) as flows:
        flows.stop(signal.SIGKILL)
        assert (tmp_path / "query.sock").exists()
    with collector(node, tmp_path) as flows:
        assert flows.status()["records"] == 0
        flows.stop()
        assert not (tmp_path / "query.sock").exists()


@pytest.fixture
def open_way():
    with askersbed.open_way() as base:
        yield base


def query_as(flows, uid, group=None):
    words = as_uid(uid, *NETFLOW, "query", "--socket", flows.socket, group=group)
    return HERE.run(*words, check=False, env={"PYTHONDONTWRITEBYTECODE": "1"})


def test_a_user_of_no_slice_is_refused(node, open_way):
    with collector(node, open_way) as flows:
        refused = query_as(flows, NOBODY)
        assert refused.returncode == 1
        assert f"uid {NOBODY} may not ask" in refused.stderr
        assert refused.stdout == ""
        assert query_as(flows, 0).returncode == 0


def test_members_of_the_group_may_ask_and_others_may_not(node, open_way):
    with collector(node, open_way, "--group", "games") as flows:
        assert query_as(flows, NOBODY, askersbed.GAMES).returncode == 0
        refused = query_as(flows, NOBODY)
        assert refused.returncode == 1
        assert "members of group games" in refused.stderr


def raw(flows, data):
    """Send bytes as they are; what comes back."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as link:
        link.settimeout(60)
        link.connect(str(flows.socket))
        try:
            link.sendall(data)
            link.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = b""
        try:
            while part := link.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        return answer


BAD = [
    (b"", "has no end"),
    (b"{}", "has no end"),
    (b"{}\n", "cannot be read"),
    (b"\xff\xfe\n", "cannot be read"),
    (b"[1,2]\n", "cannot be read"),
    (b'{"type":"drop"}\n', "cannot be read"),
    (b'{"type":"flows","filter":{},"sql":"x"}\n', "cannot be read"),
    (b'{"type":"flows","filter":{"port":["80; DROP TABLE flows"]}}\n', "cannot be read"),
    (b'{"type":"flows","filter":{"port":[65536]}}\n', "not a port"),
    (b'{"type":"flows","filter":{"addr":["%"]}}\n', "not an address"),
    (b'{"type":"flows","filter":{"since":2,"until":1}}\n', "ends before it begins"),
    (b'{"type":"flows","filter":{},"limit":-1}\n', "a limit is"),
    (b"x" * (wire.MAX_REQUEST + 1), "longer than"),
]


def test_each_bad_request_gets_one_message_and_the_collector_goes_on(node, tmp_path):
    with collector(node, tmp_path) as flows:
        for request, message in BAD:
            answer = raw(flows, request)
            assert answer.startswith(b'{"error":'), (request[:60], answer)
            assert message in answer.decode(), (request[:60], answer)
            assert answer.count(b"\n") == 1
        assert flows.records() == []
        assert "Traceback" not in log(tmp_path)


def test_clients_that_never_read_stop_neither_the_collector_nor_others(node, sink, tmp_path):
    with collector(node, tmp_path) as flows:
        for port in range(4000, 4010):
            datagrams(node, 1, port)
        assert len(flows.records()) == 10
        request = wire.encode(wire.Flows(filter=wire.Filter()))
        idle = []
        for words in (b"", request[:5], request) * 4:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            link.connect(str(flows.socket))
            link.sendall(words)
            idle.append(link)
        datagrams(node, 3, 4000)
        assert sums(flows.records())[0] == 13
        began = time.monotonic()
        assert flows.stop() == 0
        assert time.monotonic() - began < server.PATIENCE, "it did not wait for them"
        for link in idle:
            link.close()


def test_a_client_too_many_is_told_to_come_again(node, tmp_path):
    with collector(node, tmp_path) as flows:
        idle = []

        def full():
            if b"ask again" in raw(flows, b'{"type":"status"}\n'):
                return True
            idle.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            idle[-1].connect(str(flows.socket))
            return False

        until(full, 15)  # in 20 s those who say nothing are sent away
        assert len(idle) <= 16
        for link in idle:
            link.close()
        until(lambda: b"pid" in raw(flows, b'{"type":"status"}\n'))


def test_the_service_manager_is_told_when_it_is_ready_and_that_it_lives(node, tmp_path):
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        os.environ["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        os.environ["WATCHDOG_USEC"] = "200000"
        try:
            flows = launch(node, tmp_path)
        finally:
            del os.environ["NOTIFY_SOCKET"], os.environ["WATCHDOG_USEC"]
        assert manager.recv(1000).startswith(b"READY=1")
        assert flows.status()["pid"] == flows.process.pid
        assert [manager.recv(1000) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        # It waits for us who do not read: a socket holds few datagrams (max_dgram_qlen).
        flows.process.send_signal(signal.SIGTERM)
        words = b""
        while b"STOPPING=1" not in words:
            words = manager.recv(1000)
        assert flows.process.wait(60) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["query", "--src", "10.0.0.0/33"],
        ["query", "--proto", "tpc"],
        ["query", "--port", "70000"],
        ["query", "--last", "2"],
        ["query", "--since", "yesterday"],
        ["query", "--since", "12:00", "--last", "2h"],
        ["query", "--at", "12:00", "--until", "13:00"],
        ["query", "--skew", "2m"],
        ["query", "--side", "originator"],
        ["query", "--since", "2026-02-02", "--until", "2026-02-01"],
        ["query", "-o", "xml"],
        ["top", "--by", "name"],
        ["top", "--follow", "1s", "-o", "csv"],
        ["collect", "--active-timeout", "10"],
        ["collect", "--receive-buffer", "1"],
    ],
)
def test_words_that_cannot_be_meant_are_refused_before_anything_is_asked(words, tmp_path):
    done = HERE.run(*NETFLOW, *words, "--socket", str(tmp_path / "none"), check=False)
    assert done.returncode == 2, done.stderr
    assert "Error:" in done.stderr
    assert "no collector" not in done.stderr
