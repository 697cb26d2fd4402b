"""Answers to questions, as rows of plain values, from the store and the registry."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_ntop
from typing import TYPE_CHECKING, Any

from netflow import names, store
from netflow.filters import where
from netflow.wire import Filter, Flows, Gap, Header, Top, Trailer

if TYPE_CHECKING:
    import duckdb

_STEP = 1000

FLOW_COLUMNS = {
    "flow_start": "epoch_ns(flow_start)",
    "start": "epoch_ns(start_time)",
    "end": "epoch_ns(end_time)",
    "src": "src",
    "dst": "dst",
    "nsrc": "nsrc",
    "ndst": "ndst",
    "flow_id": "flow_id",
    "zone": "zone",
    "proto": "proto",
    "reason": "reason",
    "tcp_state": "tcp_state",
    "sport": "sport",
    "dport": "dport",
    "nsport": "nsport",
    "ndport": "ndport",
    "opackets": "opackets",
    "obytes": "obytes",
    "rpackets": "rpackets",
    "rbytes": "rbytes",
    "oxid": "oxid",
    "oslice": "o.slice",
    "rxid": "rxid",
    "rslice": "r.slice",
}
"""What a row of a flows answer holds. Times are ns UTC, addresses text."""

_ADDRESSES = slice(3, 7)

TOP_COLUMNS = ["slice", "xid", "out_bytes", "in_bytes", "out_packets", "in_packets", "flows"]


@dataclass(frozen=True)
class Period:
    """What a question is about, and how far the collector has come (ns UTC)."""

    since: int
    until: int
    as_of: int
    gaps: list[Gap]


Put = Callable[[Any], None]


def period(con: duckdb.DuckDBPyConnection, asked: Filter, now: int, as_of: int) -> Period:
    """The period asked for, with the gaps that touch it; it ends at the time of asking at last."""
    until = now if asked.until is None else min(asked.until, now)
    since = asked.since
    if since is None:
        # All there is: that collecting began some time is no gap in it.
        since = store.first_run(con)
    return Period(since, until, as_of, store.gaps(con, since, until, now))


def flows(
    con: duckdb.DuckDBPyConnection, ask: Flows, known: names.Names, p: Period, put: Put
) -> None:
    """Answer with records: header, rows, trailer. Raises ValueError, StoreError."""
    condition, params = where(ask.filter)
    columns = ", ".join(f'{sql} AS "{name}"' for name, sql in FLOW_COLUMNS.items())
    # Columns, joins and condition are ours; all values are parameters.
    sql = (
        f"WITH {names.CTE} SELECT {columns} FROM flows"  # noqa: S608
        f" {names.join('o', 'o')} {names.join('r', 'r')} WHERE {condition}"
    )
    if ask.limit:
        # One more than asked for shows whether some were left out.
        newest = f"end_time DESC, start_time DESC LIMIT {_limit(ask.limit) + 1}"
        sql = f"SELECT *, count(*) OVER () AS matched FROM ({sql} ORDER BY {newest})"  # noqa: S608
    sql += ' ORDER BY "start", "end", "flow_start", "flow_id"'
    chunks = store.select(con, sql, {**params, **names.tenures(known, p.as_of)}, _STEP)
    put(Header(columns=[*FLOW_COLUMNS], since=p.since, until=p.until, as_of=p.as_of, gaps=p.gaps))
    rows, more = 0, False
    for chunk in chunks:
        if ask.limit and not rows and chunk[0][-1] > ask.limit:
            more = True
            del chunk[0]
        for row in chunk:
            put((*row[:3], *map(address, row[_ADDRESSES]), *row[7 : len(FLOW_COLUMNS)]))
        rows += len(chunk)
    put(Trailer(rows=rows, more=more))


# One pass over the records: sums by pair of owners, and over all of them.
_TOP = """
WITH {cte} SELECT grouping(oxid) AS is_total, oxid, o.slice, rxid, r.slice,
    epoch_ns(max(end_time)),
    sum(obytes)::UBIGINT, sum(rbytes)::UBIGINT, sum(opackets)::UBIGINT, sum(rpackets)::UBIGINT,
    count(DISTINCT hash(flow_start, flow_id))
FROM flows {joins} WHERE {condition}
GROUP BY GROUPING SETS ((oxid, o.slice, rxid, r.slice), ())
"""


def top(con: duckdb.DuckDBPyConnection, ask: Top, known: names.Names, p: Period, put: Put) -> None:
    """Answer with sums by slice, the largest first. Raises ValueError, StoreError.

    What a slice sent is "out", whichever side of the connection it was on. A
    flow between two slices counts for both, and once in the total. Flows that
    no slice owns an end of are the row of xid 0; there, "out" is what the
    originator sent.
    """
    condition, params = where(ask.filter)
    joins = f"{names.join('o', 'o')} {names.join('r', 'r')}"
    sql = _TOP.format(cte=names.CTE, joins=joins, condition=condition)
    sums: defaultdict[tuple[str | None, int], list[int]] = defaultdict(lambda: [0] * 6)
    total = [0] * 5
    for chunk in store.select(con, sql, {**params, **names.tenures(known, p.as_of)}, _STEP):
        for is_total, oxid, oslice, rxid, rslice, last, ob, rb, op, rp, count in chunk:
            if is_total:
                total = [n or 0 for n in (ob, rb, op, rp, count)]
                continue
            out, back = (ob, rb, op, rp), (rb, ob, rp, op)
            sides = [(oxid, oslice, out), (rxid, rslice, back)]
            owned = [side for side in sides if side[0]] or [(0, None, out)]
            for place, (xid, name, counts) in enumerate(owned):
                # One name is one row, whichever xids it has held.
                row = sums[name, 0 if name else xid]
                same = place == 1 and owned[0][:2] == owned[1][:2]
                for i, n in enumerate(counts):
                    row[i] += n
                row[4] += 0 if same else count
                row[5] = max(row[5], last << 16 | xid)
    rows: list[tuple[Any, ...]] = [
        (name, last_xid & 0xFFFF, *counts) for (name, _), (*counts, last_xid) in sums.items()
    ]
    keys: dict[str, Callable[[Any], int]] = {
        "bytes": lambda row: row[2] + row[3],
        "packets": lambda row: row[4] + row[5],
        "flows": lambda row: row[6],
    }
    rows.sort(key=keys[ask.by], reverse=True)
    shown = rows[: _limit(ask.limit)] if ask.limit else rows
    put(Header(columns=TOP_COLUMNS, since=p.since, until=p.until, as_of=p.as_of, gaps=p.gaps))
    for one in shown:
        put(one)
    put(
        Trailer(
            rows=len(shown),
            more=len(shown) < len(rows),
            total={"bytes": total[0] + total[1], "packets": total[2] + total[3], "flows": total[4]},
        )
    )


def _limit(limit: int) -> int:
    if not 0 <= limit <= 1 << 40:
        raise ValueError("a limit is 0 (none) or more")
    return limit


@lru_cache(16384)
def address(number: int) -> str:
    """An address as text; ::ffff:a.b.c.d is written as IPv4."""
    if number >> 32 == 0xFFFF:
        return inet_ntop(AF_INET, (number & 0xFFFFFFFF).to_bytes(4, "big"))
    return inet_ntop(AF_INET6, number.to_bytes(16, "big"))
