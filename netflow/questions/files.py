"""The list of files that hold closed records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netflow.questions.common import Put
from netflow.wire import Files, Header, Trailer

if TYPE_CHECKING:
    import duckdb

FILE_COLUMNS = ["name", "node", "own", "hour", "since", "until", "records", "bytes", "sha256"]


def files(con: duckdb.DuckDBPyConnection, ask: Files, put: Put) -> None:
    """Answer with the files that hold closed records, oldest first. Times in ns UTC."""
    rows = con.execute(
        "SELECT name, node, own, hour * 3600000000000, epoch_ns(min_start), epoch_ns(max_end),"
        " records, bytes, sha256 FROM files"
        " WHERE len($1) = 0 OR list_contains($1::VARCHAR[], node) ORDER BY hour, name",
        [ask.nodes],
    ).fetchall()
    put(Header(columns=FILE_COLUMNS, since=0, until=0, as_of=0, gaps=[]))
    for row in rows:
        put(row)
    put(Trailer(rows=len(rows)))
