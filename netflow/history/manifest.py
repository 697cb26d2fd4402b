"""The list of files in the database, and what the files tell besides their records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netflow.history.schema import Told
from netflow.when import HOUR

if TYPE_CHECKING:
    import duckdb

_FOREVER = 1 << 62


def add(
    con: duckdb.DuckDBPyConnection, name: str, told: Told, size: int, digest: str, here: str
) -> None:
    """List a file. Within the caller's transaction.

    It speaks for no time beyond its hour and its records, whatever it says.
    """
    until = min(told.covers[1], max(told.end, (told.hour + 1) * HOUR - 1))
    covers = min(told.covers[0], until), until
    con.execute(
        "INSERT INTO files VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, make_timestamp_ns($10),"
        " make_timestamp_ns($11), make_timestamp_ns($12), make_timestamp_ns($13), $14, $15)",
        [name, told.node, told.domain, told.node == here, told.store, told.segment, told.hour,
         told.records, size, told.start, told.end, *covers, told.schema, digest],
    )  # fmt: skip


def hear(con: duckdb.DuckDBPyConnection, told: Told) -> None:
    """Keep what a file tells that this database does not know: gaps and names.

    Within the caller's transaction. Of a gap or a tenure that several files
    tell of, the longest version is kept.
    """
    for gap in told.gaps:
        con.execute(
            "DELETE FROM told_gaps WHERE node = $1 AND since = make_timestamp_ns($2) AND what = $3"
            " AND until <= make_timestamp_ns($4)",
            [told.node, gap.since, gap.what, gap.until],
        )
        con.execute(
            "INSERT INTO told_gaps SELECT $1, make_timestamp_ns($2), make_timestamp_ns($3), $4, $5,"
            " $6, $7 WHERE NOT EXISTS (SELECT 1 FROM told_gaps WHERE node = $1"
            " AND since = make_timestamp_ns($2) AND what = $4)",
            [told.node, gap.since, gap.until, gap.what, gap.events, gap.estimate, gap.note],
        )
    for xid, slice_name, since, until in told.names:
        con.execute(
            "DELETE FROM told_names WHERE node = $1 AND xid = $2 AND slice = $3"
            " AND since = make_timestamp_ns($4)"
            # A tenure that is over was told of later than one that goes on.
            " AND ($5 OR until = make_timestamp_ns($6))",
            [told.node, xid, slice_name, since, until is not None, _FOREVER],
        )
        con.execute(
            "INSERT INTO told_names SELECT $1, $2, $3, make_timestamp_ns($4), make_timestamp_ns($5)"
            " WHERE NOT EXISTS (SELECT 1 FROM told_names WHERE node = $1 AND xid = $2"
            " AND slice = $3 AND since = make_timestamp_ns($4))",
            [told.node, xid, slice_name, since, _FOREVER if until is None else until],
        )


def miss(con: duckdb.DuckDBPyConnection, name: str, why: str) -> None:
    """A listed file is gone or damaged: strike it off, and note the gap that it leaves."""
    con.execute(
        "INSERT INTO told_gaps SELECT node, min_start, max_end, 'file-lost', 0, records, $2"
        " FROM files WHERE name = $1",
        [name, why],
    )
    con.execute("DELETE FROM files WHERE name = ?", [name])
