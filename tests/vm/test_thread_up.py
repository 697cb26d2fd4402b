"""From ``vnet up`` to an answer: each packet, each record has its owner.

Everything here is the product's: the module, the rules that ``vnet up``
writes, and the records of ``netflow collect``. Only the traffic and the
look at the packets' marks are the tests' own.
"""

import json

import pytest
import rawpkt
from netflowbed import owners, sums
from testbed import apps, nflog
from testbed.net import HERE
from testbed.poll import until
from thread_bed import A, B, Thread, closed, losing, of_port, resent, thread, totals, xids

pytestmark = pytest.mark.vm
FAMILIES = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture(scope="module", params=["nft", "legacy"])
def bed(request, tmp_path_factory):
    with thread(tmp_path_factory.mktemp("thread"), ("--variant", request.param)) as made:
        yield made


@FAMILIES
def test_every_packet_of_a_slices_connection_is_its_own_even_those_sent_again(bed: Thread, family):
    with (
        nflog.capture(HERE) as log,
        apps.start(bed.peer, "tcp-server", bind=bed.there(family), reply=50_000) as server,
        losing(bed.peer, server.port),
        apps.start(
            HERE, "tcp-client", bed.a, to=bed.there(family), port=server.port, send=200_000
        ) as client,
    ):
        assert client.result(120)["received"] == 50_000
        seen = closed(log, server.port)
    assert [p.tcp_flags for p in seen if p.prefix == "postrouting"][:2] == ["S", "S"]
    assert resent(seen) > 0
    assert xids(seen) == {"postrouting": {A}, "input": {A}}
    record = bed.record(dport=[server.port])
    assert owners(record) == (A, 0)
    assert record["originator"]["slice"] == "a"


@FAMILIES
def test_a_record_holds_exactly_the_packets_that_were_seen(bed: Thread, family):
    with (
        nflog.capture(HERE) as log,
        apps.start(bed.peer, "tcp-server", bind=bed.there(family), reply=50_000) as server,
        apps.start(
            HERE, "tcp-client", bed.a, to=bed.there(family), port=server.port, send=70_000
        ) as client,
    ):
        client.result()
        closed(log, server.port)
        record = bed.record(dport=[server.port])
        assert sums([record]) == totals(of_port(log, server.port))


@FAMILIES
def test_every_packet_of_a_slices_server_is_its_own_from_the_first_syn(bed: Thread, family):
    with (
        nflog.capture(HERE) as log,
        apps.start(HERE, "tcp-server", bed.b, bind=bed.here(family), reply=5000) as server,
        apps.start(
            bed.peer, "tcp-client", to=bed.here(family), port=server.port, send=5000
        ) as client,
    ):
        client.result()
        seen = closed(log, server.port)
    assert (seen[0].prefix, seen[0].tcp_flags) == ("input", "S")
    assert xids(seen) == {"input": {B}, "postrouting": {B}}
    record = bed.record(dport=[server.port])
    assert owners(record) == (0, B)
    assert record["responder"]["slice"] == "b"


@FAMILIES
def test_a_socket_that_only_receives_owns_what_it_receives(bed: Thread, family):
    with nflog.capture(HERE) as log:
        with (
            apps.start(HERE, "udp-recv", bed.b, bind=bed.here(family), count=5) as receiver,
            apps.start(
                bed.peer, "udp-send", to=bed.here(family), port=receiver.port, count=5, size=200
            ) as sender,
        ):
            sender.result()
            assert receiver.result()["received"] == 1000
        seen = of_port(log, receiver.port)
    assert xids(seen) == {"input": {B}}
    assert len(seen) == 5
    record = bed.record(dport=[receiver.port])
    assert owners(record) == (0, B)
    assert sums([record]) == (5, 5 * (228 if family == 4 else 248), 0, 0)


@FAMILIES
def test_a_port_unreachable_from_outside_belongs_to_the_slice_that_asked(bed: Thread, family):
    with (
        nflog.capture(HERE) as log,
        apps.start(HERE, "udp-send", bed.a, to=bed.there(family), port=9, refusals=1) as sender,
    ):
        done = sender.result()
        assert done["refused"] == 1
        errors = [p for p in log.seen() if p.dport == (0x0303 if family == 4 else 0x0104)]
    assert xids(errors) == {"input": {A}}
    record = bed.record(sport=[done["local"][1]], proto=[17])
    assert owners(record) == (A, 0)


@FAMILIES
def test_the_kernels_own_port_unreachable_is_sent_in_the_name_of_who_was_there(bed: Thread, family):
    options = {"to": bed.here(family), "from_port": 7300 + family}
    with nflog.capture(HERE) as log:
        with (
            apps.start(HERE, "udp-recv", bed.b, bind=bed.here(family), count=1) as receiver,
            apps.start(bed.peer, "udp-send", port=receiver.port, **options) as sender,
        ):
            sender.result()
            receiver.result()
            receiver.process.wait(10)
        with apps.start(bed.peer, "udp-send", port=receiver.port, refusals=1, **options) as sender:
            assert sender.result()["refused"] == 1
        errors = [p for p in log.seen() if p.dport == (0x0303 if family == 4 else 0x0104)]
    assert xids(errors) == {"postrouting": {B}}


@FAMILIES
def test_time_wait_answers_in_the_name_of_its_former_slice(bed: Thread, family):
    with (
        nflog.capture(HERE) as log,
        apps.start(bed.peer, "tcp-server", bind=bed.there(family)) as server,
        apps.start(
            HERE, "tcp-client", bed.a, to=bed.there(family), port=server.port, send=10
        ) as client,
    ):
        client.result()
        client.process.wait(10)
        seen = closed(log, server.port)
        fin = next(p for p in seen if p.prefix == "input" and "F" in p.tcp_flags)
        sport, dport, seq, ack = rawpkt.segment(fin.payload)
        again = rawpkt.tcp(
            bed.there(family), sport, bed.here(family), dport, rawpkt.FIN | rawpkt.ACK, seq, ack
        )
        rawpkt.send(bed.peer, again)
        answer = until(
            lambda: [p for p in of_port(log, server.port)[len(seen) :] if p.prefix != "input"],
            what="TIME_WAIT's ACK",
        )
    assert [(p.tcp_flags, p.xid) for p in answer] == [("A", A)]


def test_a_reset_is_the_slices_and_one_from_no_socket_is_nobodys(bed: Thread):
    with (
        nflog.capture(HERE) as log,
        apps.start(bed.peer, "tcp-server", bind=bed.link.b4, request=10, reply=10) as server,
        apps.start(
            *(HERE, "tcp-client", bed.a),
            to=bed.link.b4,
            port=server.port,
            send=10,
            receive=10,
            close="rst",
        ) as client,
    ):
        client.result()
        server.event("flow")
        bed.peer.run("bash", "-c", f": </dev/tcp/{bed.link.a4}/7399", check=False)
        seen = until(lambda: [p for p in log.seen() if "R" in p.tcp_flags][1:] and log.seen())
    resets = {(p.sport == 7399, p.xid) for p in seen if "R" in p.tcp_flags}
    assert resets == {(False, A), (True, 0)}
    assert xids([p for p in seen if server.port in (p.sport, p.dport)]) == {
        "postrouting": {A},
        "input": {A},
    }


@FAMILIES
def test_two_slices_ping_one_host_and_each_has_its_own_replies(bed: Thread, family):
    with nflog.capture(HERE) as log:
        for slice_ in (bed.a, bed.b):
            HERE.run("ping", "-q", "-c2", "-i0.2", "-W10", bed.there(family), cgroup=slice_)
        echo = [p for p in log.seen() if p.proto in (1, 58) and p.sport]
    assert [(p.prefix, p.xid) for p in echo] == [
        (hook, owner) for owner in (A, A, B, B) for hook in ("postrouting", "input")
    ]
    asked = {p.sport for p in echo}
    records = [
        r
        for r in bed.flows.records(dst=[bed.there(family)], proto=[1, 58])
        if r["icmp"]["id"] in asked
    ]
    assert sorted(owners(r) for r in records) == [(A, 0), (B, 0)]
    assert {(r["originator"]["packets"], r["responder"]["packets"]) for r in records} == {(2, 2)}


def test_a_port_that_changes_hands_splits_the_record(bed: Thread):
    options = {"to": bed.link.b4, "from_port": 7400, "size": 100}
    with apps.start(bed.peer, "udp-recv", bind=bed.link.b4) as receiver:
        for slice_, count in ((bed.a, 3), (bed.b, 1), (bed.b, 4)):
            with apps.start(
                HERE, "udp-send", slice_, port=receiver.port, count=count, **options
            ) as sender:
                sender.result()
                sender.process.wait(10)
            # An answer is never older than the question: what follows is after it.
            records = bed.flows.records(dport=[receiver.port])
    shares = {owner: [r for r in records if owners(r) == (owner, 0)] for owner in (A, B)}
    assert len(shares[A]) + len(shares[B]) == len(records)
    assert [r["reason"] for r in shares[A]][-1] == "owner"
    assert len({(r["flow_id"], r["flow_start"]) for r in records}) == 1
    assert sums(records) == (8, 8 * 128, 0, 0)
    # The packet that brings the change is counted before it: it may be in either share.
    assert sums(shares[A])[0] in (3, 4)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_connection_between_two_slices_has_both_owners(bed: Thread, address):
    with (
        nflog.capture(HERE) as log,
        apps.start(HERE, "tcp-server", bed.b, bind=address, reply=5000) as server,
        apps.start(HERE, "tcp-client", bed.a, to=address, port=server.port, send=5000) as client,
    ):
        client.result()
        seen = closed(log, server.port)
    to_b = [p for p in seen if p.dport == server.port]
    to_a = [p for p in seen if p.sport == server.port]
    assert xids(to_b) == {"postrouting": {A}, "input": {B}}
    assert xids(to_a) == {"postrouting": {B}, "input": {A}}
    assert owners(bed.record(dport=[server.port])) == (A, B)


def test_a_process_outside_every_slice_is_nobodys(bed: Thread):
    with (
        nflog.capture(HERE) as log,
        apps.start(bed.peer, "tcp-server", bind=bed.link.b4) as server,
        apps.start(HERE, "tcp-client", to=bed.link.b4, port=server.port, send=10) as client,
    ):
        client.result()
        seen = closed(log, server.port)
    assert xids(seen) == {"postrouting": {0}, "input": {0}}
    assert owners(bed.record(dport=[server.port])) == (0, 0)


def test_the_commands_answer_by_name(bed: Thread):
    with (
        apps.start(bed.peer, "udp-recv", bind=bed.link.b4) as receiver,
        apps.start(HERE, "udp-send", bed.a, to=bed.link.b4, port=receiver.port, count=3) as sender,
    ):
        sender.result()
        port = str(receiver.port)
        [said] = json.loads(
            bed.flows.cli("query", "--slice", "a", "--dport", port, "-o", "json").stdout
        )["records"]
        other = bed.flows.cli("query", "--slice", "b", "--dport", port, "-o", "json").stdout
        assert json.loads(other)["records"] == []
    assert said["originator"] == {"xid": A, "slice": "a", "packets": 3, "bytes": 3 * 128}
    assert {"a", "b"} <= set(bed.flows.top()[0])
    status = bed.node.json("status")
    assert status["whole"], status
