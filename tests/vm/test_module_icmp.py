"""Pings, and ICMP errors that belong to somebody's connection."""

import socket

import pytest
import rawpkt
from module_bed import XID_A, XID_B, Bed, counted, marks, python
from vnet.testing import apps, nflog
from vnet.testing.poll import until

pytest_plugins = ["module_fixtures"]
pytestmark = pytest.mark.vm
ICMP = {4: socket.IPPROTO_ICMP, 6: socket.IPPROTO_ICMPV6}
ECHO = {4: (8 << 8, 0), 6: (128 << 8, 129 << 8)}
UNREACHABLE = {4: 3 << 8 | 3, 6: 1 << 8 | 4}


@pytest.mark.parametrize("kind", ["ping socket", "raw socket"])
def test_a_ping_and_its_replies_are_the_pinger_s(bed: Bed, family, kind):
    bed.node.sysctl(net__ipv4__ping_group_range="0 2147483647" if kind == "ping socket" else "1 0")
    with nflog.capture(bed.node) as log:
        for slice, ident in ((bed.a, "1"), (bed.b, "2")):
            ping = ("ping", "-nq", "-c", "2", "-i", "0.002", "-e", ident, bed.there(family))
            bed.node.run(*ping, cgroup=slice)
        seen = log.seen()
    ask, answer = ECHO[family]
    owners = [XID_A, XID_A, XID_B, XID_B]
    assert marks(seen, "postrouting", proto=ICMP[family], dport=ask) == owners
    assert marks(seen, "input", proto=ICMP[family], dport=answer) == owners
    assert sorted(bed.halves("-p", {4: "icmp", 6: "icmpv6"}[family], "-f", f"ipv{family}")) == [
        (XID_A, 0),
        (XID_B, 0),
    ]


def test_the_node_s_replies_to_a_ping_are_nobody_s(bed: Bed, family):
    with nflog.capture(bed.node) as log, counted(bed) as gained:
        bed.peer.run("ping", "-nq", "-c", "1", bed.here(family))
        seen = log.seen()
    ask, answer = ECHO[family]
    assert marks(seen, "input", proto=ICMP[family], dport=ask) == [0]
    assert marks(seen, "postrouting", proto=ICMP[family], dport=answer) == [0]
    assert gained["no-socket"] >= 2


def test_an_error_about_a_slice_s_packet_comes_in_as_the_slice_s(bed: Bed, family):
    with (
        nflog.capture(bed.node) as log,
        apps.start(bed.node, "udp-send", bed.a, to=bed.there(family), port=9, refusals=1) as sender,
    ):
        assert sender.result()["refused"] == 1
        seen = log.seen()
    errors = marks(seen, "input", proto=ICMP[family], dport=UNREACHABLE[family])
    assert errors == [XID_A]
    assert bed.halves("-p", "udp") == [(XID_A, 0)]


def test_an_error_about_a_former_receiver_goes_out_as_the_receiver_s(bed: Bed, family):
    to = {"to": bed.here(family), "bind": bed.there(family), "from_port": 5555}
    with nflog.capture(bed.node) as log, counted(bed) as gained:
        with (
            apps.start(bed.node, "udp-recv", bed.b, bind=bed.here(family), count=1) as receiver,
            apps.start(bed.peer, "udp-send", port=receiver.port, **to),
        ):
            receiver.result()
            port = receiver.port
            receiver.process.wait(20)
        with apps.start(bed.peer, "udp-send", port=port, refusals=1, **to) as sender:
            assert sender.result()["refused"] == 1
        seen = log.seen()
    errors = marks(seen, "postrouting", proto=ICMP[family], dport=UNREACHABLE[family])
    assert errors == [XID_B]
    assert bed.halves("-p", "udp") == [(0, XID_B)]
    assert gained["out-conn"] >= 1


def test_an_error_about_a_tcp_connection_is_its_owner_s(bed: Bed, family):
    with (
        nflog.capture(bed.node) as log,
        apps.start(bed.peer, "tcp-server", bind=bed.there(family)) as server,
        apps.start(
            bed.node, "tcp-client", bed.a, to=bed.there(family), port=server.port, send=10,
            hold="sent",
        ) as client,
    ):  # fmt: skip
        client.event("sent")
        ours = until(lambda: [s for s in log.seen() if s.tcp_flags == "PA"])[0].payload
        error = rawpkt.unreachable(bed.there(family), bed.here(family), ours[:68])
        rawpkt.send(bed.peer, error)
        errors = until(
            lambda: marks(log.seen(), "input", proto=ICMP[family], dport=UNREACHABLE[family])
        )
    assert errors == [XID_A]


_RAW_PING = """
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
s.sendto(bytes.fromhex("0800f7fe00010000"), (sys.argv[1], 0))
"""


def test_two_raw_pings_with_one_id_are_one_connection_and_an_intrusion(bed: Bed):
    """The packet is the second sender's, the connection stays the first one's."""
    with nflog.capture(bed.node) as log, counted(bed) as gained:
        for slice in (bed.a, bed.b):
            python(bed.node, _RAW_PING, bed.there(4), slice=slice)
        seen = log.seen()
    assert marks(seen, "postrouting", proto=1, sport=1) == [XID_A, XID_B]
    assert bed.halves("-p", "icmp") == [(XID_A, 0)]
    assert (gained["filled"], gained["intrusion"]) == (1, 1)
