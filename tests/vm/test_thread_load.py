"""A thousand connections from each of two slices at once, none misattributed."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from netflowbed import owners, sums
from thread_bed import A, B, Thread, thread
from vnet.testing import apps
from vnet.testing.net import HERE, Namespace

pytestmark = pytest.mark.vm

EACH = 1000
SEND, VARY, REPLY = 3000, 9, 2000


HOW = {"6.1": ("legacy", 6), "6.12": ("nft", 4)}
"""The variant and the family in each kernel: it takes long."""


@pytest.fixture(scope="module")
def bed(kernel, tmp_path_factory):
    variant, family = HOW.get(kernel, ("nft", 4))
    with thread(tmp_path_factory.mktemp("load"), ("--variant", variant)) as made:
        yield made, family


@pytest.fixture
def plain_tcp(bed: tuple[Thread, int]) -> Iterator[tuple[Thread, int]]:
    """TCP without options but the MSS, and nothing lost or sent again on the way.

    Then every header has a known size, and bytes can be compared to the byte.
    """
    # A busy CPU puts packets off; by default it drops those after the first 1,000.
    HERE.sysctl(net__core__netdev_max_backlog=100_000)
    made, family = bed
    names = ("timestamps", "sack", "window_scaling")
    before = {f"net__ipv4__tcp_{name}": 1 for name in names}
    link = made.link
    net4, net6 = link.a4[:-1] + "0/24", link.a6[:-1] + "/64"
    for ns, dev, here in ((HERE, link.a_if, link.a4), (made.peer, link.b_if, link.b4)):
        ns.sysctl(**dict.fromkeys(before, 0))
        ns.run(*f"ip route replace {net4} dev {dev} scope link src {here} rto_min 20s".split())
        ns.run(*f"ip route replace {net6} dev {dev} metric 256 rto_min 20s".split())
    yield made, family
    HERE.sysctl(net__core__netdev_max_backlog=1000, **before)


def resent(ns: Namespace) -> int:
    """TCP segments a namespace has sent again since it was made."""
    lines = re.findall(r"^Tcp: (.*)$", ns.run("cat", "/proc/net/snmp").stdout, re.M)
    names, values = (line.split() for line in lines)
    return int(dict(zip(names, values, strict=True))["RetransSegs"])


def exchange(bed: Thread, to: str) -> tuple[dict[int, apps.App], list[dict[str, Any]]]:
    """A thousand connections of each slice: who made them, and their records."""
    with ExitStack() as stack:
        server = stack.enter_context(
            apps.start(bed.peer, "tcp-server", bind=to, reply=REPLY, connections=2 * EACH)
        )
        options = {"to": to, "port": server.port, "connections": EACH, "send": SEND, "vary": VARY}
        clients = {
            xid: stack.enter_context(
                apps.start(HERE, "tcp-client", slice_, hold="connected", **options)
            )
            for xid, slice_ in ((A, bed.a), (B, bed.b))
        }
        # All 2,000 stand before the first byte is sent.
        for client in clients.values():
            client.go()
        for client in clients.values():
            client.result(300)
        counted = server.result(120)
        assert counted["flows"] == 2 * EACH
        return clients, bed.flows.records(dport=[server.port])


@pytest.mark.limit(1200)
def test_two_slices_thousand_connections_are_each_their_own(plain_tcp: tuple[Thread, int]):
    bed, family = plain_tcp
    for _ in range(3):  # a SYN that waits for a second on a busy machine is sent again
        before = resent(HERE) + resent(bed.peer)
        clients, records = exchange(bed, bed.there(family))
        if resent(HERE) + resent(bed.peer) == before:
            break
    else:
        pytest.fail("each time TCP sent something again: sizes are not known")
    told = {
        flow["local"][1]: (xid, flow["sent"], flow["received"])
        for xid, client in clients.items()
        for flow in client.flows()
    }
    assert len(told) == 2 * EACH
    # A connection that lasts over a minute is recorded in shares.
    shares: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        shares.setdefault(record["sport"], []).append(record)
    assert set(shares) == set(told)
    head = 40 if family == 4 else 60
    for port, (xid, sent, received) in told.items():
        assert {owners(share) for share in shares[port]} == {(xid, 0)}
        packets, size, back, back_size = sums(shares[port])
        # Headers, and 4 bytes of MSS option in the SYN and in the SYN-ACK.
        assert (size - packets * head - 4, back_size - back * head - 4) == (sent, received)
    for xid in (A, B):
        packets, size, back, back_size = sums([r for r in records if owners(r) == (xid, 0)])
        sent, received = (sum(t[i] for t in told.values() if t[0] == xid) for i in (1, 2))
        assert size - packets * head - 4 * EACH == sent
        assert back_size - back * head - 4 * EACH == received
        assert sent == sum(SEND + i % (VARY + 1) for i in range(EACH))
        assert received == EACH * REPLY
