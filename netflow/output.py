"""Records, gaps and the collector's status as people see them."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

from netflow.protocols import ICMP, ICMPV6, REASONS, name, tcp_state
from netflow.when import SECOND, iso

if TYPE_CHECKING:
    from rich.table import Table

    from netflow.lines import Gap, Header

_SAID = 5
_GAPS = {
    "not-running": "no collector ran",
    "rebooted": "no collector ran, and the machine began anew",
    "overrun": "about {} events lost",
    "unreadable": "{} messages of the kernel could not be read",
    "clock-step": "the clock was set",
    "store-lost": "the database was lost",
    "file-lost": "a file of records was lost",
    "disk-full": "the disk was full",
}


def record(columns: list[str], row: list[Any]) -> dict[str, Any]:
    """One row as the record that users see."""
    r = dict(zip(columns, row, strict=True))
    made: dict[str, Any] = {
        "node": r["node"],
        "start": iso(r["start"]),
        "end": iso(r["end"]),
        "flow_start": iso(r["flow_start"]),
        "proto": name(r["proto"]),
        "src": r["src"],
        "dst": r["dst"],
    }
    icmp = r["proto"] in (ICMP, ICMPV6)
    if icmp:
        made["icmp"] = {"type": r["dport"] >> 8, "code": r["dport"] & 0xFF, "id": r["sport"]}
    else:
        made |= {"sport": r["sport"], "dport": r["dport"]}
    before = (r["src"], r["sport"], r["dst"], r["dport"])
    after = (r["nsrc"], r["nsport"], r["ndst"], r["ndport"])
    made["nat"] = None
    if before[::2] != after[::2] or (not icmp and before != after):
        made["nat"] = {"src": r["nsrc"], "dst": r["ndst"]}
        if not icmp:
            made["nat"] |= {"sport": r["nsport"], "dport": r["ndport"]}
    for side, key in (("originator", "o"), ("responder", "r")):
        made[side] = {
            "xid": r[key + "xid"],
            "slice": r[key + "slice"],
            "packets": r[key + "packets"],
            "bytes": r[key + "bytes"],
        }
    made["reason"] = REASONS.get(r["reason"], str(r["reason"]))
    made["tcp_state"] = tcp_state(r["tcp_state"]) if r["proto"] == 6 else None
    made["flow_id"] = r["flow_id"]
    made["zone"] = r["zone"]
    return made


def owner(slice_name: str | None, xid: int | None) -> str:
    """A side's owner for people: its name, else its number, else nobody local."""
    return slice_name or (f"xid {xid}" if xid else "-")


def amount(count: int) -> str:
    """Bytes for people: 1.2M."""
    if count < 1000:
        return str(count)
    value = float(count)
    for unit in "kMGTPE":
        value /= 1000
        if value < 999.5:
            return f"{value:.{1 if value < 99.95 else 0}f}{unit}"
    return f"{value:.0f}E"


def printable(text: str) -> str:
    """What a terminal may be given: names come with other nodes' files, too, and could hold its
    control sequences.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def gap_text(gap: Gap) -> str:
    """One gap for people, in this machine's zone."""
    return printable(_gap_text(gap))


def _gap_text(gap: Gap) -> str:
    of = f"{gap.node}: " if gap.node else ""
    if gap.what == "before-first":
        return f"{of}before {iso(gap.until, 0, True)} nothing was collected yet"
    if gap.what == "not-imported":
        return f"{of}after {iso(gap.since, 0, True)} nothing was imported yet"
    span = f"{of}{iso(gap.since, 0, True)} to {iso(gap.until, 0, True)}"
    if gap.what == "no-events":
        return f"{span} the guard's log tells nothing ({gap.note})"
    if gap.what == "retired":
        return f"{span} {gap.estimate} records were dropped ({gap.note})"
    text = _GAPS.get(gap.what, gap.what).format(gap.events)
    if gap.estimate is not None:
        text += f", about {gap.estimate} records"
    return f"{span} {text}" + (f" ({gap.note})" if gap.note else "")


def say_gaps(header: Header, more: str = "") -> None:
    """On stderr, which gaps touch the period, and what else is not shown (more says it)."""
    gaps = header.gaps
    if gaps:
        touch = "1 gap touches" if len(gaps) == 1 else f"{len(gaps)} gaps touch"
        said = "; ".join(map(gap_text, gaps[:_SAID]))
        rest = f"; and {len(gaps) - _SAID} more (-o json lists all)" if gaps[_SAID:] else ""
        print(f"netflow: {touch} this period: {said}{rest}", file=sys.stderr)
    if header.as_of < header.until:
        as_of = iso(header.as_of, 0, True)
        print(f"netflow: what still goes on is counted up to {as_of} only", file=sys.stderr)
    if more:
        print(f"netflow: {more}", file=sys.stderr)


def gaps_json(header: Header) -> dict[str, Any]:
    """The header's part of a JSON answer."""
    gaps = [
        {
            "node": g.node or None,
            "since": iso(g.since),
            "until": iso(g.until),
            "what": g.what,
            "events": g.events,
            "estimate": g.estimate,
            "note": g.note,
        }
        for g in header.gaps
    ]
    return {
        "since": iso(header.since),
        "until": iso(header.until),
        "as_of": iso(header.as_of),
        "gaps": gaps,
    }


FLAT = (
    "node", "start", "end", "flow_start", "proto", "src", "sport", "dst", "dport",
    "icmp_type", "icmp_code", "icmp_id", "nat_src", "nat_sport", "nat_dst", "nat_dport",
    "originator_xid", "originator_slice", "originator_packets", "originator_bytes",
    "responder_xid", "responder_slice", "responder_packets", "responder_bytes",
    "reason", "tcp_state", "flow_id", "zone",
)  # fmt: skip
"""A record's columns where nothing nests: CSV and Parquet."""


def flattened(made: dict[str, Any]) -> dict[str, Any]:
    """A record with FLAT's columns; what it has not is missing."""
    flat = dict(made)
    for outer in ("icmp", "nat", "originator", "responder"):
        inner = flat.pop(outer, None) or {}
        flat |= {f"{outer}_{key}": value for key, value in inner.items()}
    return flat


def end(address: str, port: Any) -> str:
    """An address and a port, where there is one."""
    if port is None:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def flow_cells(made: dict[str, Any]) -> list[str]:
    """A record's line in a table."""
    from datetime import datetime

    start, until = (datetime.fromisoformat(made[key][:26] + "Z") for key in ("start", "end"))
    src, dst = end(made["src"], made.get("sport")), end(made["dst"], made.get("dport"))
    if nat := made["nat"]:
        nsrc, ndst = end(nat["src"], nat.get("sport")), end(nat["dst"], nat.get("dport"))
        src += f" as {nsrc}" if nsrc != src else ""
        dst += f" as {ndst}" if ndst != dst else ""
    if icmp := made.get("icmp"):
        dst += f" type {icmp['type']}/{icmp['code']} id {icmp['id']}"
    o, r = made["originator"], made["responder"]
    return [
        start.astimezone().isoformat(sep=" ", timespec="seconds"),
        f"{(until - start).total_seconds():.1f}",
        made["proto"],
        src,
        dst,
        owner(o["slice"], o["xid"]),
        owner(r["slice"], r["xid"]),
        f"{o['packets']}/{r['packets']}",
        f"{amount(o['bytes'])}/{amount(r['bytes'])}",
        made["reason"] + (f" ({made['tcp_state']})" if made["tcp_state"] else ""),
    ]


def new_table() -> Table:
    """An empty table in the house's style."""
    from rich.table import Table

    return Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))


def print_table(table: Table, out: TextIO | None = None, pager: bool = False) -> None:
    """As wide as it needs: a cut address is no answer, a wrapped line is one.

    pager: one that is longer than the terminal goes through $PAGER, if stdout is one.
    """
    from rich.console import Console

    console = Console(file=out, markup=False, highlight=False, emoji=False, width=10_000)
    if not (pager and console.is_terminal and table.row_count > _terminal_lines()):
        console.print(table)
        return
    import click

    with console.capture() as capture:
        console.print(table)
    click.echo_via_pager(capture.get(), color=not console.no_color)


def _terminal_lines() -> int:
    # A terminal that does not say how large it is has 0.
    return (os.get_terminal_size(sys.stdout.fileno()).lines or 24) - 2


def show_status(status: dict[str, Any], as_json: bool) -> None:
    """Write the collector's status to stdout."""
    if as_json:
        times = {key: iso(status[key]) for key in ("since", "as_of")}
        full = iso(status["full_since"]) if status["full_since"] else None
        print(json.dumps({**status, **times, "full_since": full}))
        return
    up = (status["now"] - status["since"]) // SECOND
    losses = status["losses"]
    lost = f"{losses} ({status['events_lost']} events)" if losses else "none"
    rows = {
        "collector": f"pid {status['pid']}, up {_span(up)}",
        "live": f"{status['live']} connections",
        "node": status["node"],
        "records": f"{status['records']} stored, {status['hot']} of them hot",
        "history": f"{status['files']} files ({amount(status['files_bytes'])})",
        "dropped": f"{status['retired']} records" if status["retired"] else "none",
        "losses": lost,
        "events": f"{status['events']} since it started",
        "store": f"{status['store']} ({amount(status['store_bytes'])})",
        "socket": status["socket"],
        "memory": amount(status["memory"]),
    }
    if status["full_since"]:
        rows["disk"] = f"full: nothing is recorded since {iso(status['full_since'])}"
    table = new_table()
    table.show_header = False
    for key, value in rows.items():
        table.add_row(key, str(value))
    print_table(table)


def _span(seconds: int) -> str:
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if seconds >= length or (unit == "s" and not parts):
            parts.append(f"{seconds // length}{unit}")
            seconds %= length
    return " ".join(parts[:2])
