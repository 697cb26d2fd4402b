"""Scenes of UDP, and of packet sockets."""

import socket
import struct

import rawpkt

from truth.bed import Agent
from truth.play import Play, Way
from truth.tcp import LARGEST

FRAGMENT = 44
GROUP = {4: "239.1.2.3", 6: "ff15::123"}
ANY = {4: "0.0.0.0", 6: "::"}


def connected(play: Play) -> None:
    """Both ends know each other."""
    for way in play.ways():
        own = way.orig.udp("c", way.src)
        port = way.resp.udp("s", way.dst, 0, way.src, own)
        way.orig.udp("c", way.src, own, way.dst, port)
        way.orig.tell("c")
        way.resp.hear("s")
        way.resp.tell("s")
        way.orig.hear("c")
        way.orig.tell("c")
        way.resp.hear("s")
        flows, seen = way.flows(dport=port), way.of_port(port)
        sent = [p for p in seen if p.dport == port]
        way.saw("connected", sent[: way.hooks], flows)
        way.saw("answer of a connected socket", [p for p in seen if p.sport == port], flows)


def unconnected(play: Play) -> None:
    """Neither end is connected, and who is asked is bound to no address."""
    for way in play.ways():
        own = way.orig.udp("c", ANY[play.family])
        port = way.resp.udp("s", ANY[play.family])
        way.orig.tell("c", way.dst, port)
        way.resp.hear("s")
        way.resp.tell("s", way.src, own)
        way.orig.hear("c")
        flows, seen = way.flows(dport=port), way.of_port(port)
        sent = [p for p in seen if p.dport == port]
        way.saw("unconnected, to a wildcard socket", sent, flows)
        way.saw("answer of a wildcard socket", [p for p in seen if p.sport == port], flows)


def unanswered(way: Way, orig: Agent, resp: Agent, row: str) -> None:
    """One datagram, by whose sockets it may be: nobody answers."""
    port = resp.udp("s", way.dst)
    orig.udp("c", way.src)
    orig.tell("c", way.dst, port)
    resp.hear("s")
    way.saw(row, way.of_port(port), way.flows(dport=port))


def receive_only(play: Play) -> None:
    """The receiver never sends."""
    for way in play.ways():
        unanswered(way, way.orig, way.resp, "to who only receives")


def changing_hands(play: Play) -> None:
    """b has the port that a had, while the connection lasts."""
    a, b, peer = play.agent("a"), play.agent("b"), play.agent("peer")
    for name in ("out", "in"):
        near, far = (play.here, play.there)
        port = a.udp("h", near)
        a.close("h")
        other = peer.udp("f", far)
        parts = []
        # b twice: what brings the change may be counted to either.
        for each in (a, b, b):
            way = play.way(name)
            each.udp("h", near, port)
            if name == "out":
                each.tell("h", far, other)
                peer.hear("f")
            else:
                peer.tell("f", near, port)
                each.hear("h")
            each.close("h")
            parts.append((way, way.of_port(port)))
            # An answer is newer than its question: what follows is not in that share.
            # With the rule in table nat nothing follows.
            if play.bed.rules == "mangle":
                play.bed.records(play.began)
        sport, dport = (port, other) if name == "out" else (other, port)
        (way, before), (_, after), (_, more) = parts
        flows = way.flows(sport=sport, dport=dport)
        way.saw("of a port that changes hands: before", before, flows)
        way.saw("after", after + more, flows)
        peer.close("f")


def node_between(play: Play) -> None:
    """The node sends on a slice's connection."""
    a, node, peer = play.agent("a"), play.agent("node"), play.agent("peer")
    other = peer.udp("f", play.there)
    port = a.udp("h", play.here)
    a.tell("h", play.there, other)
    a.close("h")
    way = play.way("out")
    node.udp("h", play.here, port)
    node.tell("h", play.there, other)
    node.close("h")
    peer.hear("f", 20)
    seen = way.of_port(port)
    way.saw("of the node, on a slice's connection", seen, way.flows(dport=other))


def multicast(play: Play) -> None:
    """To a group of which the other is a member."""
    port = 7770 + play.family
    ends = play.bed.link.a_if, play.bed.link.b_if
    for way in play.ways():
        from_if, to_if = {"out": ends, "in": ends[::-1], "local": (ends[0], ends[0])}[way.name]
        way.resp.member("m", GROUP[play.family], port, to_if)
        loop = int(way.name == "local")
        way.orig.address_all("g", GROUP[play.family], port, from_if, loop)
        way.resp.hear("m")
        way.saw("multicast", way.of_port(port), way.flows(dport=port))
        way.resp.close("m")
        way.orig.close("g")
        port += 2


def fragments(play: Play) -> None:
    """A datagram that does not fit; all of it looks like the ports of another socket."""
    for way in play.ways():
        port = way.resp.udp("s", way.dst)
        own = way.orig.udp("c", way.src)
        # Whoever took a later fragment for a datagram would find the sender to be its receiver.
        way.orig.tell("c", way.dst, port, 4000, fill=own, label=own)
        way.resp.hear("s", 4000)
        # Whole, before they are cut and after they are put together; but not in IPv6 on
        # loopback, where they have their connection already and are not put together for it.
        seen = [p for p in way.seen() if p.proto in (FRAGMENT, socket.IPPROTO_UDP)]
        assert seen[0].length > LARGEST
        way.saw("fragments", seen, way.flows(dport=port, sport=own))


def segments(play: Play) -> None:
    """One packet through the stack, many datagrams for the applications."""
    for way in play.ways():
        port = way.resp.udp("s", way.dst)
        way.orig.udp("c", way.src)
        way.orig.tell("c", way.dst, port, 8000, 1000)
        way.resp.hear("s", 8000)
        seen = way.of_port(port)
        assert seen[0].length > LARGEST
        way.saw("GSO/GRO packet (UDP_SEGMENT)", seen, way.flows(dport=port))


def packet_sockets(play: Play) -> None:
    """A frame from a packet socket, and another slice taps."""
    row, link = "a packet socket's frame", play.bed.link
    for way in play.ways():
        # What comes by lo without a route must not come from this host.
        src, dst = (play.there, play.here) if way.name == "local" else (way.src, way.dst)
        port = way.resp.udp("s", dst)
        packet = rawpkt.udp(src, 5500 + play.family, dst, port)
        if play.family == 4:  # no kernel fills this in for a packet socket
            packet = packet[:10] + struct.pack(">H", rawpkt.checksum(packet[:20])) + packet[12:]
        interface = {"out": link.a_if, "in": link.b_if, "local": "lo"}[way.name]
        tapped = {"out": link.a_if, "in": link.a_if, "local": "lo"}[way.name]
        frame = _ethernet(play, way.name) + packet
        play.agent("b").tap("t", tapped)
        way.orig.frame(interface, frame.hex())
        way.resp.hear("s", 1)
        play.agent("b").taps("t", packet[-9:].hex())
        seen = way.of_port(port)
        way.saw(row, seen, way.flows(dport=port))
        play.agent("b").close("t")


def _ethernet(play: Play, name: str) -> bytes:
    """The header of a frame of this way."""
    kind = {4: b"\x08\x00", 6: b"\x86\xdd"}[play.family]
    if name == "local":
        return bytes(12) + kind
    link = play.bed.link
    at = [(play.bed.far, link.b_if), (play.bed.ns, link.a_if)]
    to, of = at if name == "out" else at[::-1]
    return _mac(*to) + _mac(*of) + kind


def _mac(ns: object, interface: str) -> bytes:
    words = ns.run("ip", "-o", "link", "show", interface).stdout.split()  # type: ignore[attr-defined]
    return bytes.fromhex(words[words.index("link/ether") + 1].replace(":", ""))


SCENES = (connected, unconnected, receive_only, changing_hands, node_between, multicast,
          fragments, segments, packet_sockets)  # fmt: skip
