"""Where records may be missing: of this node, of others, and by retention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from netflow import store
from netflow.when import HOUR
from netflow.wire import Gap

if TYPE_CHECKING:
    import duckdb


def gaps(
    con: duckdb.DuckDBPyConnection,
    since: int,
    until: int,
    now: int,
    nodes: Sequence[str] | None = None,
) -> list[Gap]:
    """The gaps that touch since..until (ns UTC), of some nodes or all, in order of time.

    now is how far the running collector has come.
    """
    rows = con.execute("SELECT value FROM meta WHERE key = 'node'").fetchall()
    here = rows[0][0] if rows else ""
    found: list[Gap] = []
    if nodes is None or here in nodes:
        found += store.gaps(con, since, until, now)
    for node, a, b, what, events, estimate, note in con.execute(
        "SELECT node, epoch_ns(since), epoch_ns(until), what, events, estimate, note FROM told_gaps"
        " UNION ALL SELECT node, epoch_ns(since), epoch_ns(until), 'retired', 0, records,"
        " why FROM retired"
        # What is known of a node that only files tell of.
        " UNION ALL SELECT node, 0, min(epoch_ns(covers_since)), 'before-first', 0, NULL, ''"
        " FROM files WHERE NOT own GROUP BY node"
        # A file made while its clock was ahead says nothing of what was imported.
        " UNION ALL SELECT node, coalesce(max(epoch_ns(covers_until))"
        " FILTER (covers_until <= make_timestamp_ns($ahead)), 0), $now, 'not-imported', 0, NULL, ''"
        " FROM files WHERE NOT own GROUP BY node",
        {"now": max(now, until), "ahead": now + HOUR},
    ).fetchall():
        if a <= until and b >= since and a < b and (nodes is None or node in nodes):
            found.append(
                Gap(since=a, until=b, what=what, events=events, estimate=estimate, note=note,
                    node="" if node == here else node)
            )  # fmt: skip
    return sorted(found, key=lambda gap: (gap.since, gap.node))


def first(con: duckdb.DuckDBPyConnection) -> int:
    """When recording began, here or on a node whose files are here (ns UTC); 0: not at all."""
    files = con.execute("SELECT epoch_ns(min(covers_since)) FROM files").fetchall()[0][0]
    begun = [at for at in (store.first_run(con), files) if at]
    return min(begun, default=0)


def facts(con: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Counts for a status: records hot and closed, what was dropped, losses, oldest time (ns)."""
    known = store.facts(con)
    files, closed, size, oldest = con.execute(
        "SELECT count(*), coalesce(sum(records), 0)::UBIGINT, coalesce(sum(bytes), 0)::UBIGINT,"
        " coalesce(epoch_ns(min(min_start)), 0) FROM files"
    ).fetchall()[0]
    dropped = con.execute("SELECT coalesce(sum(records), 0)::UBIGINT FROM retired").fetchall()[0][0]
    return {
        "records": known["hot"] + closed,
        **known,
        "closed": closed,
        "files": files,
        "files_bytes": size,
        "oldest": oldest or store.first_run(con),
        "retired": dropped,
    }
