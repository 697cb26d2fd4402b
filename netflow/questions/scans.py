"""Who tried many hosts, or many ports of one host, and got little back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from netflow import access, names
from netflow.questions.common import Period, Put, address, bounded, chosen, header, select
from netflow.wire import Scans, Trailer

if TYPE_CHECKING:
    import duckdb

SCAN_COLUMNS = [
    "node",
    "slice",
    "xid",
    "kind",
    "proto",
    "port",
    "host",
    "first",
    "last",
    "windows",
    "most",
    "tries",
    "answered",
]

# One line for each (slice, window, protocol, port, host) tried; DuckDB keeps
# what does not fit into its memory on disk. Many hosts at one port are a scan
# of hosts, many ports at one host one of ports.
_SQL = """
WITH {cte}, tried AS MATERIALIZED (
    SELECT f.node, oxid AS xid, o.slice, epoch_ns(start_time) // $window AS w, proto,
        CASE WHEN proto IN (1, 58) THEN 0 ELSE dport END AS port, dst,
        min(start_time) AS first, max(end_time) AS last, count(*) AS tries,
        count(*) FILTER (WHERE rpackets > 0) AS answered
    {records} AND oxid <> 0 AND begins AND (rpackets = 0
        OR (proto = 6 AND opackets <= $packets AND rpackets <= $packets))
    GROUP BY ALL),
found AS (
    SELECT node, xid, slice, 'hosts' AS kind, proto, port, NULL::UHUGEINT AS dst, w,
        min(first) AS first, max(last) AS last, count(*) AS n, sum(tries) AS tries,
        sum(answered) AS answered
    FROM tried GROUP BY node, xid, slice, proto, port, w HAVING count(*) >= $hosts
    UNION ALL
    SELECT node, xid, slice, 'ports', NULL, NULL, dst, w, min(first), max(last), count(*),
        sum(tries), sum(answered)
    FROM tried WHERE proto NOT IN (1, 58) GROUP BY node, xid, slice, dst, w
    HAVING count(*) >= $ports)
SELECT node, slice, xid, kind, proto, port, dst, epoch_ns(min(first)), epoch_ns(max(last)),
    count(*), max(n), sum(tries)::UBIGINT, sum(answered)::UBIGINT
FROM found GROUP BY ALL ORDER BY max(n) DESC, min(first), kind, port, dst {limit}
"""


def scans(
    con: duckdb.DuckDBPyConnection,
    ask: Scans,
    known: names.Names,
    p: Period,
    scope: access.Scope,
    put: Put,
) -> None:
    """Answer with scans, the widest first. Raises ValueError, StoreError.

    A row is one slice at one port (kind hosts) or one host (kind ports): from
    when to when, in how many windows, the most hosts or ports in one of them,
    how many flows it took and how many of them were answered at all.
    """
    for value, what in ((ask.hosts, "hosts"), (ask.ports, "ports"), (ask.window, "window")):
        if not 1 <= value < 1 << 62:
            raise ValueError(f"{what}: 1 or more")
    if not 0 <= ask.packets < 1 << 62:
        raise ValueError("packets: 0 or more")
    records = chosen(con, ask.filter, known, p, scope)
    # One more than asked for shows whether some were left out.
    limit = f"LIMIT {bounded(ask.limit) + 1}"
    params = {key: getattr(ask, key) for key in ("hosts", "ports", "packets", "window")}
    rows: list[tuple[Any, ...]] = []
    sql = _SQL.format(cte=names.CTE, records=records.sql, limit=limit)
    for chunk in select(con, sql, records.params | params):
        for row in chunk:
            host = None if row[6] is None else address(row[6])
            rows.append((*row[:6], host, *row[7:]))
    shown = rows[: bounded(ask.limit)]
    put(header(SCAN_COLUMNS, p))
    for row in shown:
        put(row)
    put(Trailer(rows=len(shown), more=len(shown) < len(rows)))
