"""What an attempt of one slice on another is: who makes it, from which port, and by which steps.

a     raw = "own", holds tcp, udp and sctp port 7000, 7010-7012, 7020 on one
      address only, and an address of its own
b     raw = "own", holds 7100
c     raw = "deny", holds nothing
f     raw = "full", holds nothing
node  root, outside every slice
user  an ordinary user, outside every slice
"""

import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from vnet.testing.packets import SCTP, TCP, UDP, World, ip, pton, udp
from vnet.testing.steps import Steps

A, B, C, F = 512, 65535, 7, 8
"""The slices' xids."""
XIDS = {"a": A, "b": B, "c": C, "f": F, "node": 0, "user": 0}
PORT, RANGE, ON_ADDRESS, PORT_B, FREE = 7000, (7010, 7012), 7020, 7100, 8100
"""Ports: a's, a's, a's on one address, b's, and one that nobody holds."""
CONNECTION = 8300
"""The local port of a connection of a, which it does not hold by a grant."""
SINK = 4999
"""A port of the peer at which nobody answers anybody."""
UNSEEN = "unseen"
"""Refused so: the packet does not come out at the other end of the wire."""
SLICES, OTHERS = ("a", "b", "c", "f"), ("b", "f", "node")
NAMES = {TCP: "tcp", UDP: "udp", SCTP: "sctp", -SCTP: "sctp one-to-many"}


@dataclass(frozen=True)
class Case:
    """One attempt. Who is in neither list is not asked."""

    name: str
    steps: Callable[[World], Steps]
    refused: tuple[str, ...]
    allowed: tuple[str, ...]
    how: str = UNSEEN
    """UNSEEN, or the errno of the step ``at``."""
    at: str = ""
    families: tuple[int, ...] = (4, 6)
    needs: str = ""
    """sctp, lsm, uring-bind: what not every kernel has."""
    before: tuple[str, Callable[[World], Steps]] | None = None
    """Who does what first, and holds on to it."""
    tracked: bool = True
    """False: the refused packet must not have reached conntrack either."""


def unspec_bind(w: World) -> Steps:
    """inet_bind() takes AF_UNSPEC for AF_INET where the address is 0.0.0.0."""
    sockaddr = struct.pack("=H", 0) + struct.pack(">H", PORT) + bytes(12)
    return [["socket", w.af, "SOCK_DGRAM", 0], ["bindbytes", sockaddr.hex()]]


def uring_datagram(value: int, punt: int):
    """A datagram with a cmsg SO_MARK, sent by io_uring."""
    return lambda w: [
        ["socket", w.af, "SOCK_DGRAM", 0],
        ["uring", "send", f"={w.token.hex()}", w.there, SINK, value, punt],
    ]


def uring_raw(port: int, punt: int):
    """A raw packet, the socket and the sending by io_uring."""

    def steps(w: World) -> Steps:
        family = socket.AF_INET if w.family == 4 else socket.AF_INET6
        packet = ip(w, UDP, udp(w, port)).hex()
        return [
            ["uring", "open", family, 3, 255, punt],
            ["uring", "send", f"={packet}", w.there, 0, -1, punt],
        ]

    return steps


def loopback(w: World) -> str:
    """An address that is not the one packets to the peer leave from."""
    return "127.0.0.1" if w.family == 4 else "::1"


def group(w: World) -> str:
    """A multicast group, which a socket may be bound to and cannot send from."""
    return "224.0.0.251" if w.family == 4 else "ff0e::fb"


def mapped_from_here(w: World) -> Steps:
    """An IPv6 socket, bound to IPv4's loopback, sends from the node's own address."""
    source = (pton(f"::ffff:{w.here}") + struct.pack("=i", 0)).hex()
    return [
        ["socket", "AF_INET6", "SOCK_DGRAM", 0],
        ["bind", f"::ffff:{loopback(w)}", 0],
        ["send", w.token.hex(), f"::ffff:{w.there}", w.sink, [[41, 50, source]]],
    ]
