"""What raw senders may and may not do to connections."""

import socket

import pytest
import rawpkt
from module_bed import XID_A, XID_B, Bed, counted, marks
from vnet.testing import apps, nflog
from vnet.testing.poll import until

pytest_plugins = ["module_fixtures"]
pytestmark = pytest.mark.vm
TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP


def test_a_forged_packet_is_its_sender_s_and_the_connection_stays_its_owner_s(bed: Bed, family):
    with (
        nflog.capture(bed.node) as log,
        counted(bed) as gained,
        apps.start(bed.peer, "udp-recv", bind=bed.there(family)) as receiver,
        apps.start(
            bed.node, "udp-send", bed.a, to=bed.there(family), port=receiver.port,
            bind=bed.here(family),
        ) as sender,
    ):  # fmt: skip
        sender.result()
        forged = rawpkt.udp(bed.here(family), sender.port, bed.there(family), receiver.port)
        rawpkt.send(bed.node, forged, slice=bed.b)
        seen = log.seen()
    assert marks(seen, "postrouting", proto=UDP) == [XID_A, XID_B]
    assert bed.halves("-p", "udp") == [(XID_A, 0)]
    assert (gained["intrusion"], gained["filled"]) == (1, 1)
    assert "conflict" not in gained


def test_a_raw_answer_in_the_name_of_an_ordinary_socket_takes_nothing(bed: Bed, family):
    """The half is empty, since the node's own server has it, but it is not free."""
    with (
        nflog.capture(bed.node) as log,
        counted(bed) as gained,
        apps.start(bed.node, "udp-recv", bind=bed.here(family)) as server,
        apps.start(
            bed.peer, "udp-send", to=bed.here(family), port=server.port, bind=bed.there(family)
        ) as client,
    ):
        client.result()
        until(lambda: marks(log.seen(), "input", proto=UDP), what="the question")
        forged = rawpkt.udp(bed.here(family), server.port, bed.there(family), client.port)
        rawpkt.send(bed.node, forged, slice=bed.b)
        seen = log.seen()
    assert marks(seen, "postrouting", proto=UDP) == [XID_B]
    assert bed.halves("-p", "udp") == [(0, 0)]
    assert gained["intrusion"] == 1


def test_a_raw_answer_where_nobody_else_is_owns_its_end(bed: Bed, family):
    """A server of its own over raw sockets."""
    with nflog.capture(bed.node) as log, counted(bed) as gained:
        with apps.start(
            bed.peer, "udp-send", to=bed.here(family), port=4000, bind=bed.there(family)
        ) as sender:
            sender.result()
            answer = rawpkt.udp(bed.here(family), 4000, bed.there(family), sender.port)
            rawpkt.send(bed.node, answer, slice=bed.a)
        seen = log.seen()
    assert XID_A in marks(seen, "postrouting", proto=UDP)
    assert bed.halves("-p", "udp") == [(0, XID_A)]
    assert "intrusion" not in gained


def test_tcp_spoken_over_a_raw_socket_is_its_speaker_s_and_so_is_the_kernel_s_rst(bed: Bed, family):
    with (
        nflog.capture(bed.node) as log,
        apps.start(bed.peer, "tcp-server", bind=bed.there(family)) as server,
    ):
        syn = rawpkt.tcp(bed.here(family), 4001, bed.there(family), server.port, rawpkt.SYN)
        rawpkt.send(bed.node, syn, slice=bed.b)
        seen = until(lambda: [s for s in log.seen() if s.proto == TCP][2:] and log.seen())
    assert [(s.prefix, s.tcp_flags, s.xid) for s in seen if s.proto == TCP][:3] == [
        ("postrouting", "S", XID_B),
        ("input", "SA", XID_B),
        ("postrouting", "R", XID_B),
    ]
    assert bed.halves("-p", "tcp") == [(XID_B, 0)]


def test_a_forged_error_takes_nothing(bed: Bed):
    with (
        counted(bed) as gained,
        apps.start(bed.node, "udp-recv", bind=bed.here(4)) as receiver,
        apps.start(
            bed.peer, "udp-send", to=bed.here(4), port=receiver.port, bind=bed.there(4)
        ) as sender,
    ):
        sender.result()
        receiver.stop()
        receiver.process.wait(20)
        quoted = rawpkt.udp(bed.there(4), sender.port, bed.here(4), receiver.port)
        forged = rawpkt.unreachable(bed.here(4), bed.there(4), quoted)
        rawpkt.send(bed.node, forged, slice=bed.b)
    assert bed.halves("-p", "udp") == [(0, 0)]
    assert gained["intrusion"] == 1
