"""What goes over the query socket: one JSON request line, then JSON lines.

The answer is a header (an object that names the columns, and says which gaps
touch the period), one array per row, and a trailer. An answer without its
trailer was cut short. A refusal is one object with the keys ``error`` and ``why``.
"""

from typing import Any, Literal

import msgspec

from netflow.lines import VERSION, Gap, Header, Trailer

__all__ = [
    "MAX_REQUEST", "VERSION", "After", "Asked", "Chunk", "Coverage", "Files", "Filter", "Flows",
    "For", "Gap", "Header", "Import", "Metrics", "Position", "Question", "Request", "Scans",
    "Series", "Spoofed", "Status", "Top", "Trailer", "Who", "Why", "encode",
]  # fmt: skip
MAX_REQUEST = 64 * 1024
"""Bytes; a request that is longer is refused."""


class Filter(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which records: within a field any may match, and all fields must.

    Times are nanoseconds UTC; a record matches a period it overlaps. An
    expression is text of the filter language (netflow.language).
    """

    nodes: list[str] = []
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
    expression: str = ""
    since: int | None = None
    until: int | None = None


class Flows(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="flows"):
    """Ask for records, in order of time; with a limit, the newest ones."""

    filter: Filter
    limit: int = 0


class Top(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="top"):
    """Ask for sums, the largest first, and the total.

    inside: networks that are ours; then a row says whether its peers are inside
    or outside, and only leaves one of them out.
    """

    filter: Filter
    of: Literal["slice", "peer", "port", "proto", "node"] = "slice"
    by: Literal["bytes", "packets", "flows"] = "bytes"
    inside: list[str] = []
    only: Literal["all", "inside", "outside"] = "all"
    limit: int = 10


class Who(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="who"):
    """Ask which of ours had to do with a peer at a time; what fits best comes first.

    peer, own: an address or a network, also after translation; own may be "".
    filter has the period, at -+ skew. at: ns UTC, where None all of the period
    is as good. near: how far from the period to look where nothing is in it (ns).
    """

    filter: Filter
    peer: str
    peer_port: int | None = None
    own: str = ""
    own_port: int | None = None
    at: int | None = None
    near: int = 3600 * 1_000_000_000
    limit: int = 100


class Series(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="series"):
    """Ask for sums by time. step: ns; 0: one that suits the period."""

    filter: Filter
    step: int = 0


class Scans(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="scans"):
    """Ask which slices tried many hosts, or many ports of one, within a window (ns).

    A flow is a try if nothing came back, or if it was TCP with at most so many
    packets each way.
    """

    filter: Filter
    hosts: int = 50
    ports: int = 50
    packets: int = 3
    window: int = 600 * 1_000_000_000
    limit: int = 100


class Spoofed(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="spoofed"):
    """Ask who sent, or tried to send, as somebody else."""

    filter: Filter
    limit: int = 100


class Coverage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="coverage"):
    """Ask what share is attributed, and why the rest is not. step: ns; 0: one that suits."""

    filter: Filter
    step: int = 0


class Status(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="status"):
    """Ask how the collector is."""


class Metrics(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="metrics"):
    """Ask for the numbers that netflow.metrics makes metrics of."""


class Files(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="files"):
    """Ask for the list of files that hold closed records."""

    nodes: list[str] = []


class Import(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="import"):
    """Give a file of records: its descriptor comes with the line (SCM_RIGHTS)."""


class Position(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """How far somebody has followed the records: netflow.history.after says what it means.

    by: what row counts, records as committed or as they are in the file.
    """

    store: str = ""
    segment: int = 0
    row: int = 0
    by: Literal["commit", "file"] = "commit"


class After(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="after"):
    """Ask for the records after a position, in the order they were committed.

    name: of who follows. begin: where, if the position names no store. The
    answer is a Chunk, then its columns as they are in memory, one after another.
    """

    name: str
    position: Position = Position()
    begin: Literal["now", "oldest"] = "now"
    limit: int = 16_384


class Chunk(msgspec.Struct, kw_only=True):
    """Records of one node and the position after them.

    columns: name and type (as numpy writes it, little endian) of each column of
    ``rows`` values. names: xid, slice, after, since and until (ns UTC) of
    tenures that may name them. skipped, again: see netflow.history.after.
    """

    position: Position
    node: str
    domain: int
    rows: int
    columns: list[tuple[str, str]] = []
    names: list[tuple[int, str, int, int, int]] = []
    skipped: int = 0
    again: int = 0


Question = Flows | Top | Who | Series | Scans | Spoofed | Coverage
Asked = Question | Status | Metrics | Files


class For(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag="for"):
    """Pass on somebody's question: only from who may do all, root. It is answered as to him."""

    uid: int
    gid: int
    groups: list[int] = []
    ask: Asked


Request = Asked | For | Import | After

Why = Literal["bad", "denied", "busy", "failed"]
"""Why a question was refused: for a program. The words are for people."""


def encode(line: Any) -> bytes:
    """One line, its newline included."""
    return msgspec.json.encode(line) + b"\n"
