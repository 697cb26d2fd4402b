"""Which addresses are a node's own: what tells its own flows from those that pass through.

Records do not say it. Known are this node's addresses now, as the kernel has
them (/proc/net/fib_trie, /proc/net/if_inet6, of the collector's namespace).
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

_LEAF = re.compile(r"\|-- (\S+)")
_V4 = 0xFFFF << 32
_LOW = (1 << 64) - 1


def addresses(proc: Path = Path("/proc/thread-self/net")) -> list[int]:
    """This node's addresses now, IPv4 as ::ffff:a.b.c.d; broadcast ones count as its, too."""
    found = set()
    leaf = ""
    try:
        for line in (proc / "fib_trie").read_text().splitlines():
            # A leaf's address, then its prefixes: "/32 host LOCAL" is one of ours.
            if match := _LEAF.search(line):
                leaf = match[1]
            elif "/32 host LOCAL" in line or "/32 link BROADCAST" in line:
                found.add(_V4 | int(IPv4Address(leaf)))
    except OSError:
        pass  # a kernel without it names none
    try:
        for line in (proc / "if_inet6").read_text().splitlines():
            found.add(int(line.split()[0], 16))
    except OSError:
        pass
    return sorted(found)


def params(known: list[int]) -> dict[str, Any]:
    """CTE's parameters."""
    return {"l_hi": [a >> 64 for a in known], "l_lo": [a & _LOW for a in known]}


CTE = "local AS (SELECT unnest($l_hi::UBIGINT[]) AS hi, unnest($l_lo::UBIGINT[]) AS lo)"
"""For netflow.names.CTE to be before it."""

_LOOPBACK = f"({{0}}_hi = 0 AND {{0}}_lo BETWEEN {_V4 | 127 << 24} AND {_V4 | (128 << 24) - 1})"


def is_loopback(number: int) -> bool:
    """An address of 127.0.0.0/8, whole."""
    return _V4 | 127 << 24 <= number < _V4 | 128 << 24


def is_local(column: str) -> str:
    """SQL: a record's address (src, dst, nsrc, ndst) is the node's own now."""
    return (
        f"coalesce(({column}_hi, {column}_lo) IN (SELECT (hi, lo) FROM local)"  # noqa: S608
        f" OR {_LOOPBACK.format(column)}, false)"
    )
