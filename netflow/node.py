"""Which node recorded: its name, and the number that stands for it in IPFIX.

Both go with every record (RFC 7011 section 3.1: the observation domain), so
that records of several nodes can lie beside one another.
"""

from __future__ import annotations

import re
import socket
import zlib
from dataclasses import dataclass

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Node:
    """A node's name, and its observation domain (32 bits)."""

    name: str
    domain: int


def this_node(name: str | None = None, domain: int | None = None) -> Node:
    """This node: by default the host's name, and a number made of the name.

    Raises ValueError, with a message for people, for a name that cannot be
    part of a file's name and for a number beyond 32 bits.
    """
    name = name or socket.gethostname()
    if not valid(name):
        raise ValueError(
            f"{name!r} cannot be a node's name: letters, digits, dots, dashes and underscores, "
            "64 at most; give one with --node"
        )
    if domain is None:
        domain = zlib.crc32(name.encode())
    if not 0 <= domain < 1 << 32:
        raise ValueError(f"{domain} is not an observation domain: 0 to {(1 << 32) - 1}")
    return Node(name, domain)


def valid(name: str) -> bool:
    """A node's name: it becomes a part of file names."""
    return bool(_NAME.fullmatch(name))
