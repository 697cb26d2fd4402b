"""From ``vnet up`` to an answer: each packet, each record has its owner.

Everything here is the product's: the module, the rules that ``vnet up``
writes, and the records of ``netflow collect``. Only the traffic and the
look at the packets' marks are the tests' own. Whose each kind of packet is
says docs/truth.md; here is what the records hold of them.
"""

import json

import pytest
from netflowbed import owners, sums
from thread_bed import A, B, Thread, closed, losing, of_port, resent, thread, totals, xids
from vnet.testing import apps, nflog
from vnet.testing.net import HERE

pytestmark = pytest.mark.vm
FAMILIES = pytest.mark.parametrize("family", [4, 6])


VARIANTS = {"6.1": "nft", "6.12": "legacy"}
"""By turns, and the other way round than in test_thread_load.py: a guest is slow."""


@pytest.fixture(scope="module")
def bed(kernel, tmp_path_factory):
    variant = VARIANTS.get(kernel, "nft")
    with thread(tmp_path_factory.mktemp("thread"), ("--variant", variant)) as made:
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


def test_the_commands_answer_by_name(bed: Thread):
    with (
        apps.start(bed.peer, "udp-recv", bind=bed.link.b4) as receiver,
        apps.start(HERE, "udp-send", bed.a, to=bed.link.b4, port=receiver.port, count=3) as sender,
    ):
        sender.result()
        port = str(receiver.port)
        bed.record(dport=[receiver.port])  # asked until it is there; a command asks once
        [said] = json.loads(
            bed.flows.cli("query", "--slice", "a", "--dport", port, "-o", "json").stdout
        )["records"]
        other = bed.flows.cli("query", "--slice", "b", "--dport", port, "-o", "json").stdout
        assert json.loads(other)["records"] == []
    assert said["originator"] == {"xid": A, "slice": "a", "packets": 3, "bytes": 3 * 128}
    assert {"a", "b"} <= set(bed.flows.top()[0])
    status = bed.node.json("status")
    assert status["whole"], status
