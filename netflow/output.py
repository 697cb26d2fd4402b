"""Answers as tables, JSON and CSV. Gaps are always said: on stderr, or in the JSON."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

from netflow.client import Answer
from netflow.protocols import ICMP, ICMPV6, name, tcp_state
from netflow.when import SECOND, iso
from netflow.wire import Gap, Header

if TYPE_CHECKING:
    from rich.table import Table

REASONS = {1: "idle", 2: "closed", 3: "active", 4: "owner", 5: "lost"}
_SAID = 5


def record(columns: list[str], row: list[Any]) -> dict[str, Any]:
    """One row as the record that users see."""
    r = dict(zip(columns, row, strict=True))
    made: dict[str, Any] = {
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


def owner(slice_name: str | None, xid: int) -> str:
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


def gap_text(gap: Gap) -> str:
    """One gap for people, in this machine's zone."""
    if gap.what == "before-first":
        return f"before {iso(gap.until, 0, True)} nothing was collected yet"
    span = f"{iso(gap.since, 0, True)} to {iso(gap.until, 0, True)}"
    if gap.what == "not-running":
        return f"{span} no collector ran"
    return f"{span} about {gap.events} events lost"


def say_gaps(header: Header, more: bool = False) -> None:
    """On stderr, which gaps touch the period, and what else is not shown."""
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
        print("netflow: only the newest are shown: --limit 0 shows all", file=sys.stderr)


def gaps_json(header: Header) -> dict[str, Any]:
    """The header's part of a JSON answer."""
    gaps = [
        {"since": iso(g.since), "until": iso(g.until), "what": g.what, "events": g.events}
        for g in header.gaps
    ]
    return {
        "since": iso(header.since),
        "until": iso(header.until),
        "as_of": iso(header.as_of),
        "gaps": gaps,
    }


def show_flows(answer: Answer, output: str) -> None:
    """Write a flows answer to stdout."""
    records = (record(answer.header.columns, row) for row in answer)
    if output == "json":
        _flows_json(answer, records, sys.stdout)
        return
    if output == "csv":
        _flows_csv(records, sys.stdout)
    else:
        print_table(_flows_table(records))
    say_gaps(answer.header, answer.trailer.more)


def _flows_json(answer: Answer, records: Iterable[dict[str, Any]], out: TextIO) -> None:
    # One object, written as the records come: it may be long.
    head = json.dumps(gaps_json(answer.header))
    out.write(f'{head[:-1]}, "records": [')
    separator = "\n"
    for made in records:
        out.write(separator + json.dumps(made))
        separator = ",\n"
    out.write(f'\n], "more": {json.dumps(answer.trailer.more)}}}\n')


_CSV = (  # noqa: SIM905 - a list of so many words reads worse
    "start,end,flow_start,proto,src,sport,dst,dport,icmp_type,icmp_code,icmp_id,"
    "nat_src,nat_sport,nat_dst,nat_dport,"
    "originator_xid,originator_slice,originator_packets,originator_bytes,"
    "responder_xid,responder_slice,responder_packets,responder_bytes,"
    "reason,tcp_state,flow_id,zone"
).split(",")


def _flows_csv(records: Iterable[dict[str, Any]], out: TextIO) -> None:
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_CSV)
    for made in records:
        flat = dict(made)
        for outer in ("icmp", "nat", "originator", "responder"):
            inner = made.get(outer) or {}
            flat |= {f"{outer}_{key}": value for key, value in inner.items()}
        writer.writerow(["" if flat.get(key) is None else flat[key] for key in _CSV])


def _end(address: str, port: Any) -> str:
    if port is None:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _flows_table(records: Iterable[dict[str, Any]]) -> Table:
    table = new_table()
    for title in ("START", "SECONDS", "PROTO", "ORIGINATOR", "RESPONDER"):
        table.add_column(title, justify="right" if title == "SECONDS" else "left", no_wrap=True)
    for title in ("FROM SLICE", "TO SLICE"):
        table.add_column(title, no_wrap=True)
    for title in ("PACKETS", "BYTES"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("REASON", no_wrap=True)
    for made in records:
        table.add_row(*_flow_cells(made))
    return table


def _flow_cells(made: dict[str, Any]) -> list[str]:
    from datetime import datetime

    start, end = (datetime.fromisoformat(made[key][:26] + "Z") for key in ("start", "end"))
    src, dst = _end(made["src"], made.get("sport")), _end(made["dst"], made.get("dport"))
    if nat := made["nat"]:
        nsrc, ndst = _end(nat["src"], nat.get("sport")), _end(nat["dst"], nat.get("dport"))
        src += f" as {nsrc}" if nsrc != src else ""
        dst += f" as {ndst}" if ndst != dst else ""
    if icmp := made.get("icmp"):
        dst += f" type {icmp['type']}/{icmp['code']} id {icmp['id']}"
    o, r = made["originator"], made["responder"]
    return [
        start.astimezone().isoformat(sep=" ", timespec="seconds"),
        f"{(end - start).total_seconds():.1f}",
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


def print_table(table: Table) -> None:
    """As wide as it needs: a cut address is no answer, a wrapped line is one."""
    from rich.console import Console

    Console(markup=False, highlight=False, emoji=False, width=10_000).print(table)


def show_status(status: dict[str, Any], as_json: bool) -> None:
    """Write the collector's status to stdout."""
    if as_json:
        print(json.dumps({**status, "since": iso(status["since"]), "as_of": iso(status["as_of"])}))
        return
    up = (status["now"] - status["since"]) // SECOND
    losses = status["losses"]
    lost = f"{losses} ({status['events_lost']} events)" if losses else "none"
    rows = {
        "collector": f"pid {status['pid']}, up {_span(up)}",
        "live": f"{status['live']} connections",
        "records": f"{status['records']} stored",
        "losses": lost,
        "events": f"{status['events']} since it started",
        "store": f"{status['store']} ({amount(status['store_bytes'])})",
        "socket": status["socket"],
        "memory": amount(status["memory"]),
    }
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
