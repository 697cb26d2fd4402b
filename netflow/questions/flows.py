"""Records, as rows of plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netflow import access, names
from netflow.questions.common import Period, Put, address, checked_limit, chosen, header, select
from netflow.wire import Flows, Trailer

if TYPE_CHECKING:
    import duckdb

FLOW_COLUMNS = {
    "node": "f.node",
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
    "nsport": "coalesce(nsport, sport)",
    "ndport": "coalesce(ndport, dport)",
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

_ADDRESSES = slice(4, 8)


def flows(
    con: duckdb.DuckDBPyConnection,
    ask: Flows,
    known: names.Names,
    p: Period,
    scope: access.Scope,
    put: Put,
) -> None:
    """Answer with records: header, rows, trailer. Raises ValueError, StoreError."""
    records = chosen(con, ask.filter, known, p, scope)
    columns = ", ".join(f'{sql} AS "{name}"' for name, sql in FLOW_COLUMNS.items())
    # Columns, joins and condition are ours; all values are parameters.
    sql = f"WITH {names.CTE} SELECT {columns} {records.sql}"
    if ask.limit:
        # One more than asked for shows whether some were left out.
        newest = f"end_time DESC, start_time DESC LIMIT {checked_limit(ask.limit) + 1}"
        sql = f"SELECT *, count(*) OVER () AS matched FROM ({sql} ORDER BY {newest})"  # noqa: S608
    sql += ' ORDER BY "start", "end", "flow_start", "flow_id"'
    chunks = select(con, sql, records.params)
    put(header([*FLOW_COLUMNS], p))
    rows, more = 0, False
    for chunk in chunks:
        if ask.limit and not rows and chunk[0][-1] > ask.limit:
            more = True
            del chunk[0]
        for row in chunk:
            put((*row[:4], *map(address, row[_ADDRESSES]), *row[8 : len(FLOW_COLUMNS)]))
        rows += len(chunk)
    put(Trailer(rows=rows, more=more))
