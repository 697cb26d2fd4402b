"""Answers as people see them: for each question, its rows' columns, their kinds, and a table.

A row of JSON has the columns of a row of CSV and Parquet, but for records of
flows, which nest theirs in JSON (netflow.output.record).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from netflow.output import (
    FLAT,
    amount,
    end,
    flattened,
    flow_cells,
    new_table,
    owner,
    printable,
    record,
)
from netflow.protocols import name
from netflow.when import iso

if TYPE_CHECKING:
    from rich.table import Table

    from netflow.lines import Header, Trailer

_KINDS = {
    "time": "since until start end flow_start first last",
    "int": "xid own_port own_seen_port peer_port peer_seen_port peer_xid port windows sport dport"
    " icmp_type icmp_code icmp_id nat_sport nat_dport originator_xid responder_xid flow_id zone",
    "count": "sent_packets sent_bytes got_packets got_bytes out_bytes in_bytes out_packets"
    " in_packets flows begun packets bytes most tries answered count originator_packets"
    " originator_bytes responder_packets responder_bytes",
    "real": "away seconds share_begun share_packets share_bytes",
    "bool": "refused",
}
KINDS = {column: kind for kind, columns in _KINDS.items() for column in columns.split()}
"""By column; all others are text."""


def _plain(columns: list[str], row: list[Any]) -> dict[str, Any]:
    """A row with its times as ISO 8601, and protocols by name."""
    made = dict(zip(columns, row, strict=True))
    for column, value in made.items():
        if value is None:
            continue
        if KINDS.get(column) == "time":
            made[column] = iso(value)
        elif column == "proto":
            made[column] = name(value)
        elif column == "away":
            made[column] = value / 1e9
    return made


@dataclass(frozen=True)
class Shape:
    """How a question's answer looks. key: of the list in JSON. heads: a table's titles, ">"
    before those of numbers. flat: a record's columns for CSV and Parquet. total: whether a table
    ends with sums over all.
    """

    key: str
    columns: tuple[str, ...]
    heads: tuple[str, ...]
    cells: Callable[[dict[str, Any]], list[str]]
    made: Callable[[list[str], list[Any]], dict[str, Any]] = _plain
    flat: Callable[[dict[str, Any]], dict[str, Any]] = lambda made: made
    total: bool = False

    def table(self, header: Header, rows: list[dict[str, Any]], trailer: Trailer) -> Table:
        """For people; with the period above and the total below where sums are shown."""
        made = new_table()
        if self.total:
            made.title = f"{iso(header.since, 0, True)} to {iso(header.until, 0, True)}"
            made.title_justify = "left"
        for head in self.heads:
            title = head.removeprefix(">")
            made.add_column(title, no_wrap=True, justify="left" if title == head else "right")
        for row in rows:
            made.add_row(*map(printable, self.cells(row)))
        if self.total:
            total = trailer.total
            sums = (amount(total["bytes"]), "", str(total["packets"]), "", str(total["flows"]))
            before = [""] * (len(self.heads) - len(sums) - 1)
            made.add_row("all, each flow once", *before, *sums, style="bold")
        return made


def when(text: str | None, now: str = "now") -> str:
    """A time for people, in this machine's zone, to the second."""
    if text is None:
        return now
    at = datetime.fromisoformat(text[:26].rstrip("Z") + "Z")
    return at.astimezone().isoformat(sep=" ", timespec="seconds")


FLOWS = Shape(
    key="records",
    columns=FLAT,
    heads=("START", ">SECONDS", "PROTO", "ORIGINATOR", "RESPONDER", "FROM SLICE", "TO SLICE",
           ">PACKETS", ">BYTES", "REASON"),
    cells=flow_cells,
    made=record,
    flat=flattened,
)  # fmt: skip


def _seen(row: dict[str, Any], side: str) -> str:
    text = end(row[side], row[f"{side}_port"])
    if row.get("icmp_type") is not None and (side == "peer") == (row["side"] == "originator"):
        text += f" type {row['icmp_type']}/{row['icmp_code']} id {row['icmp_id']}"
    if row[f"{side}_seen"] is not None:
        text += f" as {end(row[f'{side}_seen'], row[f'{side}_seen_port'])}"
    return text


def _who_cells(row: dict[str, Any]) -> list[str]:
    arrow = "->" if row["side"] == "originator" else "<-"
    held = f"{when(row['since'], '?')} to {when(row['until'])}" if row["since"] else "-"
    return [
        owner(row["slice"], row["xid"] or 0),
        str(row["xid"]) if row["xid"] else "-",
        row["confidence"],
        held,
        when(row["start"]),
        when(row["end"]),
        row["proto"],
        f"{_seen(row, 'own')} {arrow} {_seen(row, 'peer')}",
        f"{row['sent_packets']}/{row['got_packets']}",
        f"{amount(row['sent_bytes'])}/{amount(row['got_bytes'])}",
        row["why"],
    ]


WHO = Shape(
    key="flows",
    columns=(
        "slice", "xid", "confidence", "why", "since", "until", "node", "side", "start", "end",
        "flow_start", "proto", "own", "own_port", "own_seen", "own_seen_port", "peer", "peer_port",
        "peer_seen", "peer_seen_port", "sent_packets", "sent_bytes", "got_packets", "got_bytes",
        "peer_slice", "peer_xid", "away", "icmp_type", "icmp_code", "icmp_id",
    ),
    heads=("SLICE", ">XID", "OWNER BY", "XID HELD", "START", "END", "PROTO", "OURS, PEER",
           ">PACKETS", ">BYTES", "WHY"),
    cells=_who_cells,
)  # fmt: skip

_SUMS = ("out_bytes", "in_bytes", "out_packets", "in_packets", "flows")
_SUM_HEADS = (">OUT", ">IN", ">PACKETS OUT", ">PACKETS IN", ">FLOWS")


def _sum_cells(row: dict[str, Any]) -> list[str]:
    counts = [str(row[key]) for key in _SUMS[2:]]
    return [amount(row["out_bytes"]), amount(row["in_bytes"]), *counts]


def _top_made(columns: list[str], row: list[Any]) -> dict[str, Any]:
    made = _plain(columns, row)
    if made["place"] is None:
        del made["place"]
    return made


def top(of: str, placed: bool) -> Shape:
    """Of ``netflow top --of``; placed: with a column that says inside or outside."""
    keys = {"slice": ("slice", "xid"), "port": ("proto", "port")}.get(of, (of,))

    def cells(row: dict[str, Any]) -> list[str]:
        if of == "slice":
            xid = row["xid"]
            first = [row["slice"] or (f"xid {xid}" if xid else "(node)"), str(xid)]
        elif of == "port":
            first = [row["proto"], "-" if row["port"] is None else str(row["port"])]
        else:
            first = [str(row[of])]
        return [*first, *([row["place"]] if placed else []), *_sum_cells(row)]

    heads = [(">" if key in ("xid", "port") else "") + key.upper() for key in keys]
    place = ("place",) if placed else ()
    return Shape(
        key={"slice": "slices", "peer": "peers", "port": "ports", "proto": "protocols"}.get(
            of, "nodes"
        ),
        columns=(*keys, *place, *_SUMS),
        heads=(*heads, *(key.upper() for key in place), *_SUM_HEADS),
        cells=cells,
        made=_top_made,
        total=True,
    )


SERIES = Shape(
    key="steps",
    columns=("start", *_SUMS[:4], "begun"),
    heads=("START", *_SUM_HEADS[:4], ">FLOWS BEGUN"),
    cells=lambda row: [
        when(row["start"]), amount(row["out_bytes"]), amount(row["in_bytes"]),
        str(row["out_packets"]), str(row["in_packets"]), str(row["begun"]),
    ],
)  # fmt: skip


def scan_text(row: dict[str, Any]) -> str:
    """What made it a scan."""
    if row["kind"] == "hosts":
        port = "" if row["port"] is None or row["proto"] in ("icmp", "icmp6") else f"/{row['port']}"
        return f"{row['most']} hosts at {row['proto']}{port}"
    return f"{row['most']} ports of {row['host']}"


SCANS = Shape(
    key="scans",
    columns=("node", "slice", "xid", "kind", "proto", "port", "host", "first", "last", "windows",
             "most", "tries", "answered"),
    heads=("SLICE", ">XID", "TRIED IN A WINDOW", "FIRST", "LAST", ">WINDOWS", ">TRIES",
           ">ANSWERED"),
    cells=lambda row: [
        row["slice"] or f"xid {row['xid']}", str(row["xid"]), scan_text(row), when(row["first"]),
        when(row["last"]), str(row["windows"]), str(row["tries"]), str(row["answered"]),
    ],
)  # fmt: skip

SPOOFED = Shape(
    key="spoofed",
    columns=("what", "refused", "slice", "xid", "src", "owner", "first", "last", "count",
             "packets", "bytes", "dst", "node"),
    heads=("WHAT", "SLICE", "SOURCE", "OWNER", "FIRST", "LAST", ">TIMES", "LAST TO", "REFUSED"),
    cells=lambda row: [
        row["what"], owner(row["slice"], row["xid"] or 0), row["src"] or "-", row["owner"] or "-",
        when(row["first"]), when(row["last"]), str(row["count"]), row["dst"] or "-",
        "yes" if row["refused"] else "no",
    ],
)  # fmt: skip


def _coverage_cells(row: dict[str, Any]) -> list[str]:
    if row["what"] == "gap":
        return [when(row["start"]), "gap", *[""] * 6, f"{row['seconds']:g}"]
    counts = (str(row["begun"]), str(row["packets"]), amount(row["bytes"]))
    shares = (f"{row[f'share_{key}']:.1%}" for key in ("begun", "packets", "bytes"))
    each = [cell for pair in zip(counts, shares, strict=True) for cell in pair]
    return [when(row["start"]), row["what"], *each, ""]


COVERAGE = Shape(
    key="steps",
    columns=("start", "what", "begun", "packets", "bytes", "share_begun", "share_packets",
             "share_bytes", "seconds"),
    heads=("START", "WHAT", ">FLOWS BEGUN", ">", ">PACKETS", ">", ">BYTES", ">", ">SECONDS"),
    cells=_coverage_cells,
)  # fmt: skip
