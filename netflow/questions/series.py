"""Sums by time: what a slice, or whatever is asked for, sent and got in each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from netflow import access, names
from netflow.questions.common import Period, Put, chosen, header, select, sides, step_of
from netflow.wire import Series, Trailer

if TYPE_CHECKING:
    import duckdb

SERIES_COLUMNS = ["start", "out_bytes", "in_bytes", "out_packets", "in_packets", "begun"]

# A flow between two sides that are asked for is traffic of both. What a record
# counts is of the step in which it ended: a share lasts no longer than the
# active timeout.
_SQL = """
WITH {cte} SELECT epoch_ns(end_time) // $step * $step AS cell,
    sum({o}::INT * obytes + {r}::INT * rbytes)::UBIGINT,
    sum({o}::INT * rbytes + {r}::INT * obytes)::UBIGINT,
    sum({o}::INT * opackets + {r}::INT * rpackets)::UBIGINT,
    sum({o}::INT * rpackets + {r}::INT * opackets)::UBIGINT,
    count(*) FILTER (WHERE begins)
{records} GROUP BY cell ORDER BY cell
"""


def series(
    con: duckdb.DuckDBPyConnection,
    ask: Series,
    known: names.Names,
    p: Period,
    scope: access.Scope,
    put: Put,
) -> None:
    """Answer with a row for each step in which something ended. Raises ValueError, StoreError."""
    params: dict[str, Any] = {"step": step_of(ask.step, p)}
    o, r = sides(ask.filter, params)
    records = chosen(con, ask.filter, known, p, scope, uses=f"{o} {r}")
    sql = _SQL.format(cte=names.CTE, records=records.sql, o=o, r=r)
    put(header(SERIES_COLUMNS, p))
    rows, total = 0, 0
    for chunk in select(con, sql, records.params | params):
        for row in chunk:
            put(row)
            total += row[1] + row[2]
        rows += len(chunk)
    put(Trailer(rows=rows, total={"bytes": total, "step": params["step"]}))
