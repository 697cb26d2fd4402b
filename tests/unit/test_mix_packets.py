"""The mix's packets are those that scapy builds, and are read back as they were meant."""

import json

import pytest
from mix import packets, templates
from mix.packets import ACK, DIRECT, ERROR, ICMP, ICMPV6, PSH, REPLY, TCP, UDP, Flow, packed

pytestmark = pytest.mark.unit

FOUR = Flow(UDP, packed("10.1.2.3"), 4001, packed("10.1.2.4"), 53)
SIX = Flow(UDP, packed("fd00::1"), 4001, packed("fd00::2"), 53)
BOTH = pytest.mark.parametrize("flow", [FOUR, SIX], ids=["IPv4", "IPv6"])


def test_the_templates_are_scapys():
    assert json.loads(templates.FILE.read_text()) == templates.build()


@BOTH
def test_checksums_are_those_of_scapy(flow):
    from scapy.all import IP, IPv6, raw

    echoes = flow._replace(proto=ICMP if flow is FOUR else ICMPV6)
    tcp = flow._replace(proto=TCP)
    echo = packets.echo(echoes, 3, 99)
    for packet in (
        packets.udp(flow, 77, 120),
        packets.tcp(tcp, PSH | ACK, 1 << 31, 5, 78),
        packets.ip(echoes.proto, echoes.src, echoes.dst, echo),
        packets.unreachable(flow.dst, flow.src, packets.udp(flow, 79)),
    ):
        built = (IP if flow is FOUR else IPv6)(packet)
        for layer in (built, built.payload):
            for name in ("chksum", "cksum"):
                if name in layer.fields:
                    delattr(layer, name)
        assert raw(built) == packet


@BOTH
def test_a_packet_is_read_back(flow):
    seen = packets.parse(packets.udp(flow, 77))
    assert (seen.flow, seen.tag, seen.kind, seen.length) == (
        flow,
        77,
        DIRECT,
        28 + 12 if flow is FOUR else 48 + 12,
    )
    error = packets.parse(packets.unreachable(flow.dst, flow.src, packets.udp(flow, 79)))
    assert (error.kind, error.tag, error.quoted) == (ERROR, 79, flow)
    echoes = flow._replace(proto=ICMP if flow is FOUR else ICMPV6, dport=0)
    reply = packets.ip(
        echoes.proto, flow.dst, flow.src, packets.echo(echoes.back, 1, 80, reply=True)
    )
    seen = packets.parse(reply)
    assert (seen.kind, seen.tag, seen.flow) == (REPLY, 80, echoes.back)


def test_every_fragment_says_its_tag():
    whole = packets.udp(FOUR, 81, 480)[20:]
    first = packets.parse(packets.ip(UDP, FOUR.src, FOUR.dst, whole[:248], 7, 0x2000))
    later = packets.parse(packets.ip(UDP, FOUR.src, FOUR.dst, whole[248:], 7, 31))
    assert (first.tag, first.later, later.tag, later.later) == (81, False, 81, True)
