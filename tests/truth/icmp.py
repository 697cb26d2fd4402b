"""Scenes of ICMP."""

import socket

import rawpkt

from truth.play import Play

REQUEST = {4: 8 << 8, 6: 128 << 8}
REPLY = {4: 0, 6: 129 << 8}
UNREACHABLE = {4: 3 << 8 | 3, 6: 1 << 8 | 4}
TOO_BIG = {4: 3 << 8 | 4, 6: 2 << 8}


def echo(play: Play) -> None:
    """Questions of ping sockets and raw ones, the kernel's answers."""
    ident = 100 * play.family
    kinds = (("ping", socket.SOCK_DGRAM, "it"), ("raw", socket.SOCK_RAW, "a raw socket"))
    for kind, number, whom in kinds:
        for way in play.ways():
            ident += 1
            way.orig.ping(way.dst, ident, int(number))
            seen = [p for p in way.seen() if p.sport == ident]
            flows = way.flows(ident=ident)
            asked = [p for p in seen if p.dport == REQUEST[play.family]]
            answered = [p for p in seen if p.dport == REPLY[play.family]]
            way.saw(f"echo request of a {kind} socket", asked, flows)
            way.saw(f"the kernel's echo reply to {whom}", answered, flows)


def unreachable(play: Play) -> None:
    """A port that is closed: its owner has gone, or there never was one."""
    rows = {
        True: "port unreachable, of a port that was a slice's",
        False: "port unreachable, of a port that nobody had",
    }
    for had, row in rows.items():
        for way in play.ways():
            own = way.orig.udp("c", way.src)  # before s may have given its port back
            port = way.resp.udp("s", way.dst)
            if not had:
                way.resp.close("s")
            if had:
                way.orig.tell("c", way.dst, port)
                way.resp.hear("s")
                way.resp.close("s")
            way.orig.tell("c", way.dst, port)
            way.orig.refused("c")
            errors = [p for p in way.seen() if p.dport == UNREACHABLE[play.family]]
            way.saw(row, errors, way.flows(dport=port, sport=own))


def about_tcp(play: Play) -> None:
    """The peer says that a packet of a TCP connection found no port."""
    way = play.way("out")
    port = way.resp.listen("l", way.dst)
    way.orig.connect("c", way.dst, port, way.src)
    way.resp.accept("s", "l")
    way.orig.send("c")
    data = way.wait(lambda p: p.dport == port and p.tcp_flags == "PA", "data")
    error = rawpkt.unreachable(way.dst, way.src, data[0].payload[:68])
    way.resp_root.raw(error.hex())
    seen = way.wait(lambda p: p.dport == UNREACHABLE[play.family], "the error")
    way.saw("error about a TCP connection", seen, way.flows(dport=port))
    way.orig.close("c")
    way.resp.close("s", "l")


def too_big(play: Play) -> None:
    """A router beyond the peer wants smaller packets of a slice's connection."""
    way = play.way("out")
    port = way.resp.udp("s", way.dst)
    way.orig.udp("c", way.src)
    way.orig.tell("c", way.dst, port, 1000)
    way.resp.hear("s", 1000)
    quoted = way.of_port(port)[0].payload[:68]
    way.resp_root.raw(rawpkt.too_big(way.dst, way.src, quoted, 1400).hex())
    seen = way.wait(lambda p: p.dport == TOO_BIG[play.family], "the error")
    way.saw("packet too big (PMTU)", seen, way.flows(dport=port))


SCENES = (echo, unreachable, about_tcp, too_big)
