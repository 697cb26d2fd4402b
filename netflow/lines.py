"""The lines of an answer that are not rows; netflow.wire says how they go over the socket.

Plain classes: a command that asks reads a few of them, and is through before
msgspec would be imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

VERSION = 1


@dataclass(kw_only=True, frozen=True)
class Gap:
    """A span of time whose records may be missing, and why.

    events: messages of the kernel that were lost. estimate: records thought
    missing, None where nothing can be said. node: whose; "" is this one.
    """

    since: int
    until: int
    what: str
    events: int = 0
    estimate: int | None = None
    note: str = ""
    node: str = ""


@dataclass(kw_only=True)
class Header:
    """The first line of an answer. as_of: live connections are in it up to then."""

    version: int = VERSION
    columns: list[str]
    since: int
    until: int
    as_of: int
    gaps: list[Gap]


@dataclass(kw_only=True)
class Trailer:
    """The last line. more: the limit left some out. total: over all rows. notes: for people."""

    end: Literal[True] = True
    rows: int
    more: bool = False
    total: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: str = ""
