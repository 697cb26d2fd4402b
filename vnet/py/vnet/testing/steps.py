"""Attempts, as vnet.testing.attempts takes them: lists of steps, or functions that make them."""

import struct
from collections.abc import Callable
from typing import Any

from vnet.testing.packets import SCTP, TCP, UDP, World, echo, pton

Step = list[Any]
Steps = list[Step]
Maker = Callable[[World], Steps]


def binds(kind: int, port: int, where: str = "", *options: Step, v6: bool = False) -> Maker:
    """Bind to a port; ``where``: an attribute of the world, an address, or the wildcard."""

    def steps(w: World) -> Steps:
        address = getattr(w, where, where) or w.wild
        family = "AF_INET6" if v6 else w.af
        if v6:
            address = "::" if not where else f"::ffff:{address}"
        made = ["socket", family, *KINDS[kind]]
        return [made, *([*o[:1], *_option(w, o)] for o in options), ["bind", address, port]]

    return steps


KINDS = {
    TCP: ("SOCK_STREAM", 0),
    UDP: ("SOCK_DGRAM", 0),
    SCTP: ("SOCK_STREAM", SCTP),
    # one-to-many, which has a bind of its own
    -SCTP: ("SOCK_SEQPACKET", SCTP),
}
FREEBIND, TRANSPARENT = {4: (0, 15), 6: (41, 78)}, {4: (0, 19), 6: (41, 75)}


def _option(w: World, option: Step) -> Step:
    return [*option[1][w.family], 1] if isinstance(option[1], dict) else option[1:]


def raw(packet: Callable[[World], bytes], proto: int = 255, *options: Step) -> Maker:
    """Send a whole packet (proto 255: with its header), or what follows the IP header."""

    def steps(w: World) -> Steps:
        made = ["socket", w.af, "SOCK_RAW", proto]
        return [made, *map(list, options), ["send", packet(w).hex(), w.there, 0]]

    return steps


def sends(
    *options: Step | Callable[[World], Step],
    kind: int = UDP,
    cmsg: Callable[[World], list[Step]] = lambda w: [],
) -> Maker:
    """An ordinary datagram, or an echo request from a ping socket."""

    def steps(w: World) -> Steps:
        if kind == UDP:
            made, data, port = ["socket", w.af, "SOCK_DGRAM", 0], w.token, w.sink
        else:
            made, data, port = ["socket", w.af, "SOCK_DGRAM", w.icmp], echo(w), 0
        before = [o(w) if callable(o) else list(o) for o in options]
        return [made, *before, ["send", data.hex(), w.there, port, cmsg(w)]]

    return steps


def pktinfo(w: World, source: str = "") -> list[Step]:
    """A cmsg that names the source, of itself the granted address."""
    at = pton(source or w.mine)
    if w.family == 4:
        return [[0, 8, (struct.pack("=i", 0) + at + bytes(4)).hex()]]
    return [[41, 50, (at + struct.pack("=i", 0)).hex()]]


def mark(value: int) -> Callable[[World], list[Step]]:
    """A cmsg SO_MARK."""
    return lambda w: [["SOL_SOCKET", "SO_MARK", struct.pack("=I", value).hex()]]


def mapped_pktinfo(w: World) -> Steps:
    """From an IPv6 socket to an IPv4 peer, a's address as the source."""
    at = pton(f"::ffff:{w.mine}")
    cmsg = [41, 50, (at + struct.pack("=i", 0)).hex()]
    there = f"::ffff:{w.there}"
    return [
        ["socket", "AF_INET6", "SOCK_DGRAM", 0],
        ["send", w.token.hex(), there, w.sink, [cmsg]],
    ]


def its_connection(kind: int, port: int) -> Maker:
    """A connection of whoever asks, from this port, and hold on to it."""

    def steps(w: World) -> Steps:
        made = ["socket", w.af, *KINDS[kind]]
        first = [["send", b"first".hex(), "", 0]] if kind == UDP else []
        start = [["bind", w.here, port], ["connect", w.there, w.sink]]
        # ended by a reset: no TIME_WAIT is in the next one's way
        abort = ["set", "SOL_SOCKET", "SO_LINGER", struct.pack("=ii", 1, 0).hex()]
        return [made, abort, *start, *first, ["hold"]]

    return steps


def packet_socket(family: int | str, kind: int | str, proto: int) -> Maker:
    """A socket that sees and sends frames."""
    return lambda w: [["socket", family, kind, proto]]
