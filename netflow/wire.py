"""What goes over the query socket: one JSON request line, then JSON lines.

The answer is a header (an object that names the columns, and says which gaps
touch the period), one array per row, and a trailer. An answer without its
trailer was cut short. A refusal is one object with the key ``error``.
"""

from typing import Any, Literal

import msgspec

VERSION = 1
MAX_REQUEST = 64 * 1024
"""Bytes; a request that is longer is refused."""


class Filter(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which records: within a field any may match, and all fields must.

    Times are nanoseconds UTC; a record matches a period it overlaps.
    """

    slices: list[str] = []
    xids: list[int] = []
    side: Literal["any", "originator", "responder"] = "any"
    src: list[str] = []
    dst: list[str] = []
    addr: list[str] = []
    sport: list[int] = []
    dport: list[int] = []
    port: list[int] = []
    proto: list[int] = []
    since: int | None = None
    until: int | None = None


class Flows(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="flows"):
    """Ask for records, in order of time; with a limit, the newest ones."""

    filter: Filter
    limit: int = 0


class Top(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="top"):
    """Ask for sums by slice, the largest first, and the total."""

    filter: Filter
    by: Literal["bytes", "packets", "flows"] = "bytes"
    limit: int = 10


class Status(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="status"):
    """Ask how the collector is."""


Request = Flows | Top | Status


class Gap(msgspec.Struct, kw_only=True, frozen=True):
    """A span of time whose records may be missing, and why."""

    since: int
    until: int
    what: Literal["not-running", "before-first", "overrun", "unreadable"]
    events: int = 0


class Header(msgspec.Struct, kw_only=True):
    """The first line of an answer. as_of: live connections are in it up to then."""

    version: int = VERSION
    columns: list[str]
    since: int
    until: int
    as_of: int
    gaps: list[Gap]


class Trailer(msgspec.Struct, kw_only=True):
    """The last line. more: the limit left some out. total: of a Top."""

    end: Literal[True] = True
    rows: int
    more: bool = False
    total: dict[str, int] = {}
    error: str = ""


def encode(line: Any) -> bytes:
    """One line, its newline included."""
    return msgspec.json.encode(line) + b"\n"
