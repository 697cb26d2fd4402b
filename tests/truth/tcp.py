"""Scenes of TCP."""

import errno

import rawpkt
from vnet.testing.nflog import Seen
from vnet.testing.poll import until

from truth.play import Play, Refused, Way

MANY = 50_000
"""Bytes: more than one packet, and less than waits on the way to a reader who is late."""
LARGEST = 1500
"""Of a packet on the wire, or on loopback as truth.bed sets it up."""
MPTCP = 262
CLOSED = 7600
"""A port that nobody has, plus 4 or 6: none that the kernel may give the client itself."""


def connection(play: Play) -> None:
    """From SYN to last ACK: who began sends, asks for the end, and gets it."""
    for way in play.ways():
        seen, port = _talk(way)
        flows = way.flows(dport=port)
        sent = [p for p in seen if p.dport == port]
        back = [p for p in seen if p.sport == port]
        way.saw("SYN", _flags(sent, "S"), flows)
        way.saw("SYN-ACK", _flags(back, "SA"), flows)
        fin = next(i for i, p in enumerate(seen) if p in back and "F" in p.tcp_flags)
        last = [p for p in seen[fin:] if p in sent and p.tcp_flags == "A"]
        plain = [p for p in sent if not set(p.tcp_flags) & set("SF") and p not in last]
        way.saw("data and ACKs of who began", plain, flows)
        way.saw("data and ACKs of the other", _flags(back, "A", "PA"), flows)
        way.saw("GSO/GRO packet", [p for p in plain if p.length > LARGEST], flows)
        way.saw("FIN of who began", [p for p in sent if "F" in p.tcp_flags], flows)
        way.saw("FIN of the other", [p for p in back if "F" in p.tcp_flags], flows)
        way.saw("last ACK", last, flows)


def wildcard(play: Play) -> None:
    """A server that is bound to nothing; over IPv4 its socket is one of IPv6."""
    for way in play.ways():
        seen, port = _talk(way, "::")
        flows = way.flows(dport=port)
        way.saw("SYN to a wildcard IPv6 socket", _flags(seen, "S"), flows)
        way.saw("its SYN-ACK", _flags(seen, "SA"), flows)


def cookies(play: Play) -> None:
    """Servers that keep nothing of a SYN."""
    servers = play.agent("node"), play.agent("peer")
    for each in servers:
        each.sysctl("net.ipv4.tcp_syncookies", "2")
    try:
        for way in play.ways():
            seen, port = _talk(way)
            flows = way.flows(dport=port)
            acks = [p for p in seen if p.dport == port and p.tcp_flags == "A"]
            way.saw("SYN-ACK that is a cookie", _flags(seen, "SA"), flows)
            way.saw("ACK that brings the cookie", acks[: way.hooks], flows)
    finally:
        for each in servers:
            each.sysctl("net.ipv4.tcp_syncookies", "1")


def reset(play: Play) -> None:
    """Who began resets."""
    for way in play.ways():
        port, _ = _begin(way)
        way.orig.reset("c")
        seen = way.wait(lambda p, port=port: p.dport == port and "R" in p.tcp_flags, "RST")
        way.saw("RST by the application", seen, way.flows(dport=port))
        way.resp.close("s", "l")


def closed_port(play: Play) -> None:
    """Nobody listens."""
    for way in play.ways():
        port = CLOSED + play.family
        _refused(way, way.dst, port)
        flows = way.flows(dport=port)
        way.saw("SYN to a closed port", _flags(way.of_port(port), "S"), flows)
        way.saw("RST of the closed port", _flags(way.of_port(port), "RA"), flows)


def time_wait(play: Play) -> None:
    """The other's FIN again, when only TIME_WAIT is left of who closed first."""
    for way in play.ways():
        seen, port = _talk(way)
        fin = next(p for p in seen if p.sport == port and "F" in p.tcp_flags)
        sport, dport, seq, ack = rawpkt.segment(fin.payload)
        again = rawpkt.tcp(way.dst, sport, way.src, dport, rawpkt.FIN | rawpkt.ACK, seq, ack)
        before = len(way.seen())
        way.resp_root.raw(again.hex())
        answer = until(lambda: way.last(_of(way.seen()[before:], port)), what="TIME_WAIT's ACK")  # noqa: B023
        answer = _of(way.seen()[before:], port)
        assert {p.tcp_flags for p in answer} == {"A"}
        way.saw("ACK out of TIME_WAIT", answer, way.flows(dport=port))


def late_reset(play: Play) -> None:
    """A segment for a socket that is gone."""
    for way in play.ways():
        port, _ = _begin(way)
        data = way.wait(lambda p, port=port: p.dport == port and p.tcp_flags == "PA", "data")
        way.orig.reset("c")
        way.wait(lambda p, port=port: p.dport == port and "R" in p.tcp_flags, "RST")
        sport, dport, seq, ack = rawpkt.segment(data[-1].payload)
        before = len(way.seen())
        late = rawpkt.tcp(way.dst, dport, way.src, sport, rawpkt.ACK, ack, seq + 10)
        way.resp_root.raw(late.hex())
        until(lambda: way.last(_of(way.seen()[before:], port)), what="RST")  # noqa: B023
        answer = _of(way.seen()[before:], port)
        assert {p.tcp_flags for p in answer} == {"R"}
        way.saw("RST after the socket is gone", answer, way.flows(dport=port))
        way.resp.close("s", "l")


def over_time_wait(play: Play) -> None:
    """A server of a's ends; b's gets a connection from the same port of the same peer."""
    way, a, b, peer = play.way("in"), play.agent("a"), play.agent("b"), play.agent("peer")
    port = a.listen("l", play.here)
    sport = peer.connect("c", play.here, port, play.there)
    a.accept("s", "l")
    a.close("s", "l")  # closes first, so that TIME_WAIT is here
    peer.end("c")
    peer.close("c")
    _closed(way, port)
    again = play.way("in")
    b.listen("l", play.here, port)
    peer.connect("c", play.here, port, play.there, sport)
    b.accept("s", "l")
    peer.send("c")
    b.read("s")
    b.send("s")
    peer.read("c")
    flows, seen = way.flows(dport=port), again.of_port(port)
    again.saw("SYN over a TIME_WAIT, to b", _flags(seen, "S"), flows)
    at = next(i for i, p in enumerate(seen) if p.tcp_flags == "S")
    again.saw("b's answers to it", [p for p in seen[at:] if p.sport == port], flows)
    assert {p.xid for p in seen[at + 1 :]} <= {p.xid for p in seen[at:] if p.sport == port} | {0}
    peer.close("c")
    b.close("s", "l")


def raw(play: Play) -> None:
    """A raw socket begins; the kernel behind it, which knows nothing of it, resets."""
    for number, way in enumerate(play.ways()):
        port, sport = way.resp.listen("l", way.dst), 4100 + 10 * number + play.family
        way.orig.raw(rawpkt.tcp(way.src, sport, way.dst, port, rawpkt.SYN).hex())
        way.wait(lambda p, sport=sport: p.sport == sport and p.tcp_flags == "R", "RST")
        seen, flows = way.of_port(sport), way.flows(dport=port)
        way.saw("SYN over a raw socket", _flags(seen, "S"), flows)
        way.saw("SYN-ACK to it", _flags(seen, "SA"), flows)
        way.saw("the kernel's RST about it", _flags(seen, "R"), flows)
        way.resp.close("l")


def mptcp(play: Play) -> None:
    """Who began speaks MPTCP; the other need not."""
    for way in play.ways():
        port = way.resp.listen("l", way.dst)
        try:
            way.orig.connect("c", way.dst, port, way.src, proto=MPTCP)
        except Refused as e:
            assert str(e) == errno.errorcode[errno.EPROTONOSUPPORT]
            play.put("MPTCP (SYN)", way.name, "g")
            continue
        way.saw("MPTCP (SYN)", _flags(way.of_port(port), "S"), way.flows(dport=port))
        way.orig.close("c")
        way.resp.close("l")


# -- parts ---------------------------------------------------------------------------------


def _begin(way: Way, bind: str = "") -> tuple[int, int]:
    """A connection "c" to "s", with a few bytes from who began; both ports."""
    port = way.resp.listen("l", bind or way.dst)
    own = way.orig.connect("c", way.dst, port, way.src)
    way.resp.accept("s", "l")
    way.orig.send("c")
    way.resp.read("s")
    return port, own


def _talk(way: Way, bind: str = "") -> tuple[list[Seen], int]:
    """A whole connection: its packets, and the port of who was asked."""
    port, _ = _begin(way, bind)
    for _ in range(4):
        way.orig.send("c", MANY)
        way.resp.read("s", MANY)
    way.resp.send("s")
    way.orig.read("c")
    way.orig.shut("c")
    way.resp.end("s")
    way.resp.close("s", "l")
    way.orig.end("c")
    way.orig.close("c")
    return _closed(way, port), port


def _closed(way: Way, port: int) -> list[Seen]:
    """All packets of a connection once both FINs are acknowledged."""

    def over() -> list[Seen]:
        seen = way.of_port(port)
        fins: dict[int, int] = {}
        for at, packet in enumerate(seen):
            if "F" in packet.tcp_flags:
                fins.setdefault(packet.sport, at)
        if len(fins) < 2:
            return []
        last = max(fins.values())
        rest = [p for p in seen[last:] if p.sport != seen[last].sport and "A" in p.tcp_flags]
        return seen if way.last(rest) else []

    return until(over, what=f"the connection to port {port} is over")


def _refused(way: Way, to: str, port: int) -> None:
    try:
        way.orig.connect("c", to, port, way.src)
    except Refused as e:
        assert str(e) == "ECONNREFUSED"
    else:
        raise AssertionError("the port was not closed")
    way.wait(lambda p: p.sport == port and "R" in p.tcp_flags)


def _of(packets: list[Seen], port: int) -> list[Seen]:
    """To that port, what no root sends: the injected packet comes from it."""
    return [p for p in packets if p.dport == port]


def _flags(packets: list[Seen], *flags: str) -> list[Seen]:
    return [p for p in packets if p.tcp_flags in flags]


SCENES = (connection, wildcard, cookies, reset, closed_port, time_wait, late_reset,
          over_time_wait, raw, mptcp)  # fmt: skip
