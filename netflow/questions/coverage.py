"""What share of the traffic is attributed, and why the rest is not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from netflow import access, names
from netflow.questions import local
from netflow.questions.common import Period, Put, chosen, header, select, step_of
from netflow.wire import Coverage, Gap, Trailer

if TYPE_CHECKING:
    import duckdb

COVERAGE_COLUMNS = [
    "start", "what", "begun", "packets", "bytes", "share_begun", "share_packets", "share_bytes",
    "seconds",
]  # fmt: skip
"""share_*: of all of the step, 0 to 1. seconds: of a gap."""

_SQL = f"""
WITH {names.CTE}, {local.CTE},
first AS (SELECT node, min(since) AS since FROM tenure GROUP BY node)
SELECT $since + (epoch_ns(end_time) - $since) // $step * $step AS cell,
    CASE WHEN coalesce(oxid, 0) <> 0 OR coalesce(rxid, 0) <> 0 THEN
            CASE WHEN o.slice IS NULL AND r.slice IS NULL THEN 'unnamed' ELSE 'slice' END
        WHEN coalesce(end_time < (SELECT since FROM first WHERE first.node = f.node), true)
            THEN 'before-slices'
        WHEN f.node NOT IN (SELECT node FROM here) THEN 'other-node'
        WHEN {local.is_local("src")} OR {local.is_local("dst")}
            OR {local.is_local("nsrc")} OR {local.is_local("ndst")} THEN 'node'
        ELSE 'forwarded' END AS what,
    count(*) FILTER (WHERE begins),
    sum(opackets + rpackets)::UBIGINT, sum(obytes + rbytes)::UBIGINT
{{records}} GROUP BY cell, what ORDER BY cell, what
"""  # noqa: S608


def coverage(
    con: duckdb.DuckDBPyConnection,
    ask: Coverage,
    known: names.Names,
    p: Period,
    scope: access.Scope,
    put: Put,
) -> None:
    """Answer with what each step holds, by what is known of its owners. Raises ValueError,
    StoreError.

    slice: a slice owned an end. unnamed: an xid that nobody held then.
    before-slices: no slice of that node was registered yet. node: an end is an
    address of this node, now. forwarded: none is. other-node: imported, and
    nobody here knows that node's addresses. gap: seconds in which records may
    be missing. Without a step the whole period is one.
    """
    if ask.step:
        step = step_of(ask.step, p)
        since = p.since // step * step
    else:
        since, step = p.since, max(1, p.until - p.since + 1)
    records = chosen(con, ask.filter, known, p, scope)
    params = {
        **records.params,
        **local.params(local.addresses()),
        "step": step,
        "since": since,
    }
    found: dict[int, list[tuple[str, tuple[int, ...]]]] = defaultdict(list)
    for chunk in select(con, _SQL.format(records=records.sql), params):
        for cell, what, *counts in chunk:
            # A record that began in the period and ended after it is of its last step.
            cell = min(max(cell, since), since + (p.until - since) // step * step)
            found[cell].append((what, tuple(counts)))
    rows: list[tuple[Any, ...]] = []
    for cell, parts in found.items():
        rows += _shares(cell, parts)
    rows += [
        (cell, "gap", 0, 0, 0, None, None, None, round(ns / 1e9, 3))
        for cell, ns in gap_time(p, step, since)
    ]
    rows.sort(key=lambda row: (row[0], row[1] == "gap", row[1] != "slice", row[1]))
    put(header(COVERAGE_COLUMNS, p))
    total = dict.fromkeys(("begun", "packets", "bytes", *_OWN), 0)
    for row in rows:
        put(row)
        for key, value in zip(("begun", "packets", "bytes"), row[2:5], strict=True):
            total[key] += value
            total[f"attributed_{key}"] += value if row[1] in ("slice", "unnamed") else 0
    put(Trailer(rows=len(rows), total=total))


_OWN = ("attributed_begun", "attributed_packets", "attributed_bytes")


def _shares(cell: int, parts: list[tuple[str, tuple[int, ...]]]) -> Iterator[tuple[Any, ...]]:
    """A step's rows, each with its share of the step; one for each what."""
    sums: dict[str, list[int]] = {}
    for what, counts in parts:
        one = sums.setdefault(what, [0, 0, 0])
        for n, count in enumerate(counts):
            one[n] += count
    whole = [sum(one[n] for one in sums.values()) for n in range(3)]
    for what, one in sums.items():
        shares = (a / b if b else 0.0 for a, b in zip(one, whole, strict=True))
        yield (cell, what, *one, *shares, 0)


def gap_time(p: Period, step: int, first: int = 0) -> list[tuple[int, int]]:
    """Each step that a gap touches, and how much of it (ns), within the period."""
    spans = sorted(
        (max(gap.since, p.since), min(gap.until, p.until)) for gap in p.gaps if _loses(gap)
    )
    found: dict[int, int] = {}
    done = p.since
    for a, b in spans:
        at = max(a, done)
        while at < b:
            cell = first + (at - first) // step * step
            end = min(b, cell + step)
            found[cell] = found.get(cell, 0) + end - at
            at = end
        done = max(done, b)
    return sorted(found.items())


def _loses(gap: Gap) -> bool:
    return gap.what != "clock-step"
