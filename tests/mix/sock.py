"""Who plays, with which ports, and what is kept of a socket and of a packet."""

import socket
from dataclasses import dataclass

XIDS = {"a": 512, "b": 65535, "c": 300, "d": 7}
RAW = {"a": "full", "b": "full", "c": "own", "d": "deny"}
#: Reserved to a and c, for TCP and UDP.
RESERVED = {"a": range(4000, 4004), "c": range(4100, 4104)}
SLICES = tuple(XIDS)
SINKS = range(7001, 7009)
"""The peer's UDP sockets."""
LISTENERS = range(7101, 7105)
"""The peer's TCP listeners."""
CLOSED = range(7901, 7921)
"""Nobody's ports, at the peer and at the node."""
HALF = "by its connection"
"""Why: nobody's socket is there."""
POOL = range(5000, 5040)
"""Local ports from which slices choose, one after another."""


class WrongError(Exception):
    """A packet is not what it must be."""


@dataclass(eq=False)
class Sock:
    """A socket, and where it was made."""

    sock: socket.socket
    who: str
    home: int
    """The cgroup's incarnation."""
    address: bytes = b""
    port: int = 0

    def close(self) -> None:
        self.sock.close()


@dataclass
class Pending:
    """What must be seen of a packet, or may be."""

    xid: int
    act: str
    why: str
    must: bool = True
    many: bool = False
