"""Flow records of real connections on the host kernel, marked by ordinary rules."""

import signal
import socket
import subprocess

import pytest
from netflowbed import (
    NETFLOW,
    accounting,
    collector,
    connmark,
    counted,
    loads,
    owners,
    set_mark,
    sums,
)
from vnet.testing.apps import start
from vnet.testing.net import HERE
from vnet.testing.poll import until

from vnet import registry

pytestmark = pytest.mark.netns

A, B = 256, 257
A_TO_B = B << 16 | A


@pytest.fixture
def node(ns):
    """A namespace whose connections are counted."""
    accounting(ns, lasting=600)
    return ns


@pytest.fixture
def both(peers):
    """A node that counts, and a peer."""
    accounting(peers.node, lasting=600)
    return peers


@pytest.mark.parametrize(("address", "tool"), [("127.0.0.1", "iptables"), ("::1", "ip6tables")])
def test_a_tcp_connection_has_both_owners_and_the_kernels_counts(node, tmp_path, address, tool):
    connmark(node, A_TO_B, "-p", "tcp", tool=tool)
    with (
        collector(node, tmp_path) as flows,
        start(node, "tcp-server", bind=address, reply=5000) as server,
        start(node, "tcp-client", to=address, port=server.port, send=100_000) as client,
    ):
        client.result()
        family = "ipv6" if ":" in address else "ipv4"
        # Loopback may be late with the last ACK; it is there when the state says so.
        until(lambda: "TIME_WAIT" in node.run("conntrack", "-L", "-f", family).stdout)
        [record] = flows.records()
        assert (record["src"], record["dst"]) == (address, address)
        assert (record["sport"], record["dport"]) == (client.port, server.port)
        assert owners(record) == (A, B)
        assert record["nat"] is None
        assert sums([record]) == counted(node, "-f", family)
        assert record["originator"]["bytes"] > 100_000
        assert record["responder"]["bytes"] > 5000
        assert record["start"] < record["end"]
        assert record["flow_start"] == record["start"][:-7] + "000000Z"  # whole milliseconds


@pytest.mark.parametrize(("address", "tool"), [("127.0.0.1", "iptables"), ("::1", "ip6tables")])
def test_udp_with_and_without_answers(node, tmp_path, address, tool):
    connmark(node, A, "-p", "udp", tool=tool)
    with (
        collector(node, tmp_path) as flows,
        start(node, "udp-recv", bind=address, reply=1) as echo,
        start(node, "udp-recv", bind=address) as silent,
    ):
        for target, expect in ((echo, 3), (silent, 0)):
            options = {"to": address, "port": target.port, "count": 3, "size": 50}
            with start(node, "udp-send", expect=expect, **options) as sender:
                sender.result()
        header = 48 if ":" in address else 28
        for target, back in ((echo, 3), (silent, 0)):
            [record] = flows.records(dport=[target.port])
            assert sums([record]) == (3, 3 * (50 + header), back, back * (50 + header))
            assert owners(record) == (A, 0)
            assert record["proto"] == "udp"
            assert record["tcp_state"] is None


@pytest.mark.parametrize(
    ("address", "proto", "kind"), [("127.0.0.1", "icmp", 8), ("::1", "icmp6", 128)]
)
def test_a_ping_has_type_code_and_id_and_no_ports(node, tmp_path, address, proto, kind):
    connmark(node, A, tool="ip6tables" if ":" in address else "iptables")
    with collector(node, tmp_path) as flows:
        node.run("ping", "-q", "-e", "4711", "-c", "2", "-i", "0.2", address)
        [record] = flows.records()
        assert record["proto"] == proto
        assert (record["icmp"]["type"], record["icmp"]["code"]) == (kind, 0)
        assert record["icmp"]["id"] == 4711
        assert "sport" not in record
        assert sums([record])[0] == sums([record])[2] == 2
        assert owners(record) == (A, 0)
        assert not flows.records(port=[kind << 8])


def test_a_translated_connection_is_found_by_each_of_its_addresses(both, tmp_path):
    node, link = both.node, both.link
    to_peer = ("-p", "tcp", "-d", "198.51.100.1", "--dport", "81")
    node.run("ip", "route", "add", "198.51.100.1", "via", link.b4)
    nat = ("iptables", "-t", "nat", "-A")
    node.run(*nat, "OUTPUT", *to_peer, "-j", "DNAT", "--to", f"{link.b4}:80")
    node.run("ip", "addr", "add", "10.99.0.1/32", "dev", "lo")
    node.run(
        *nat, "POSTROUTING", "-p", "tcp", "-d", link.b4, "-j", "SNAT", "--to", f"{link.a4}:5555"
    )
    connmark(node, A)
    with (
        collector(node, tmp_path) as flows,
        start(both.peer, "tcp-server", bind=link.b4, port=80) as server,
        start(
            node, "tcp-client", to="198.51.100.1", port=81, bind="10.99.0.1", send=1000
        ) as client,
    ):
        client.result()
        server.result(stop=True)
        for which in (
            {"dst": ["198.51.100.1"], "dport": [81]},
            {"dst": [link.b4], "dport": [80]},
            {"src": ["10.99.0.1"], "sport": [client.port]},
            {"src": [link.a4], "sport": [5555]},
            {"addr": [f"{link.b4}/32"], "port": [5555]},
        ):
            [record] = flows.records(**which)
            assert (record["src"], record["dst"]) == ("10.99.0.1", "198.51.100.1")
            assert record["nat"] == {
                "src": link.a4, "dst": link.b4, "sport": 5555, "dport": 80
            }  # fmt: skip
        assert not flows.records(src=[link.b4])


def test_an_ended_connection_says_how_it_ended(node, tmp_path):
    node.sysctl(net__netfilter__nf_conntrack_tcp_timeout_close=1)
    node.sysctl(net__netfilter__nf_conntrack_udp_timeout=1)
    connmark(node, A)
    with (
        collector(node, tmp_path) as flows,
        start(node, "tcp-server", bind="127.0.0.1", close="rst", request=1) as server,
        start(node, "tcp-client", to="127.0.0.1", port=server.port, send=1),
        start(node, "udp-send", to="127.0.0.1", port=9) as sender,
    ):
        sender.result()

        def ends(proto, reason):
            # Expired entries go when something looks at them, or a minute later.
            node.run("conntrack", "-L")
            return [r for r in flows.records(proto=[proto]) if r["reason"] == reason]

        [closed] = until(lambda: ends(6, "closed"))
        assert closed["tcp_state"] == "close"
        assert until(lambda: ends(17, "idle"))
        assert not counted(node)[0]


def test_a_connection_that_changes_hands_is_split_and_its_shares_add_up(node, tmp_path):
    connmark(node, A, "-m", "connmark", "--mark", "0")
    with (
        collector(node, tmp_path) as flows,
        start(node, "udp-recv", bind="127.0.0.1") as receiver,
    ):
        out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        options = {"to": "127.0.0.1", "port": receiver.port, "from_port": 4000}
        with out, start(node, "udp-send", count=5, size=100, **options) as first:
            first.result()
        until(lambda: sums(flows.records())[0] == 5)
        set_mark(node, ("127.0.0.1", 4000), ("127.0.0.1", receiver.port), B)
        flows.records()  # up to now: the change has been heard of
        with start(node, "udp-send", count=7, size=10, **options) as second:
            second.result()
        records = flows.records()
        assert {owners(r) for r in records} == {(A, 0), (B, 0)}
        old, new = ([r for r in records if owners(r) == (xid, 0)] for xid in (A, B))
        assert sums(old) == (5, 5 * 128, 0, 0)
        assert sums(new) == (7, 7 * 38, 0, 0)
        assert sums(records) == counted(node)
        assert len({(r["flow_start"], r["flow_id"]) for r in records}) == 1
        assert max(r["end"] for r in old) <= min(r["start"] for r in new)


def test_a_change_of_hands_between_dumps_is_told_by_its_event(node, tmp_path):
    connmark(node, A, "-m", "connmark", "--mark", "0")
    with (
        collector(node, tmp_path) as flows,
        start(node, "udp-recv", bind="127.0.0.1") as receiver,
    ):
        options = {"to": "127.0.0.1", "port": receiver.port, "from_port": 4000}
        events = flows.status()["events"]
        with start(node, "udp-send", count=5, **options) as first:
            first.result()
        until(lambda: flows.status()["events"] > events)
        set_mark(node, ("127.0.0.1", 4000), ("127.0.0.1", receiver.port), B)
        until(lambda: flows.status()["records"] == 1)
        with start(node, "udp-send", count=7, **options) as second:
            second.result()
        by_owner = {owners(r): (r["reason"], sums([r])[0]) for r in flows.records()}
        assert by_owner == {(A, 0): ("owner", 5), (B, 0): ("active", 7)}


def test_a_connection_that_goes_on_is_recorded_at_each_active_timeout(node, tmp_path):
    connmark(node, A)
    with (
        collector(node, tmp_path, "--active-timeout", "1s") as flows,
        start(node, "tcp-server", bind="127.0.0.1") as server,
        start(node, "tcp-client", to="127.0.0.1", port=server.port, send=10, hold="sent") as client,
    ):
        until(lambda: flows.status()["records"])
        before = flows.status()["records"]
        client.go()
        client.result()
        until(lambda: "TIME_WAIT" in node.run("conntrack", "-L").stdout)
        until(lambda: flows.status()["records"] > before)
        # Two; or more, where what is done at once takes longer than the timeout.
        records = sorted(flows.records(), key=lambda r: r["start"])
        assert {r["reason"] for r in records} == {"active"}
        assert [r["start"] for r in records[1:]] == [r["end"] for r in records[:-1]]
        assert sums(records) == counted(node)


def test_names_come_from_the_registry_even_if_it_appears_later(node, tmp_path):
    connmark(node, A_TO_B)
    with collector(node, tmp_path) as flows:
        node.run("ping", "-q", "-c", "1", "127.0.0.1")
        [record] = flows.records()
        assert record["originator"] == record["responder"] | {"xid": A}
        assert record["originator"]["slice"] is None
        assert not flows.records(slices=["codeen"])
        requests = [registry.Request("codeen", A), registry.Request("coral", B)]
        registry.assign(tmp_path / "registry.db", requests, now_ns=1)
        [record] = flows.records(slices=["codeen"], side="originator")
        assert record["originator"]["slice"] == "codeen"
        assert record["responder"]["slice"] == "coral"
        assert not flows.records(slices=["codeen"], side="responder")
        assert flows.records(slices=["coral"]) == [record]
        rows, total = flows.top()
        assert rows["codeen"]["out_bytes"] == rows["coral"]["in_bytes"] == 84
        assert total == {"bytes": 168, "packets": 2, "flows": 1}


def test_top_can_be_followed_and_tells_a_gap_once(node, tmp_path):
    connmark(node, A_TO_B)
    with collector(node, tmp_path) as flows:
        words = [*NETFLOW, "top", "--follow", "1s", "--socket", str(flows.socket)]
        with HERE.popen(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as following:
            node.run("ping", "-q", "-c", "1", "127.0.0.1")
            lines = iter(following.stdout.readline, "")
            assert next(line for line in lines if line.startswith("xid 256"))
            assert next(line for line in lines if line.startswith("xid 256"))
            following.send_signal(signal.SIGINT)
            assert following.wait(60) == 0
            assert following.stderr.read().count("nothing was collected yet") == 1


def test_the_commands_print_what_was_asked_in_each_form(node, tmp_path):
    connmark(node, A_TO_B)
    with collector(node, tmp_path) as flows:
        node.run("ping", "-q", "-c", "1", "127.0.0.1")
        flows.records()  # asks until it is there
        table = flows.cli("query", "--xid", str(A)).stdout.splitlines()
        assert len(table) == 2
        assert "127.0.0.1" in table[1]
        assert "xid 256" in table[1]
        answer = loads(flows.cli("query", "-o", "json").stdout)
        assert [r["proto"] for r in answer["records"]] == ["icmp"]
        assert answer["gaps"] == []
        header, line = flows.cli("query", "-o", "csv").stdout.splitlines()
        values = dict(zip(header.split(","), line.split(","), strict=True))
        assert (values["icmp_type"], values["responder_xid"]) == ("8", str(B))
        assert loads(flows.cli("top", "-o", "json").stdout)["total"]["packets"] == 2
        assert "xid 257" in flows.cli("top", "--last", "1m").stdout
        assert flows.cli("top", "-o", "csv").stdout.startswith("slice,xid,out_bytes")
        assert loads(flows.cli("status", "--json").stdout)["live"] == 1
        at = answer["records"][0]["start"]
        assert len(flows.cli("query", "--at", at, "--skew", "0s").stdout.splitlines()) == 2
        early = flows.cli("query", "--since", "2001-01-01", "--until", "2001-01-02")
        assert len(early.stdout.splitlines()) == 1
        assert "1 gap touches this period: before" in early.stderr
