"""The numbers that metrics are made of, as the collector knows them; netflow.metrics names them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from time import process_time
from typing import TYPE_CHECKING, Any

from netflow import sums

if TYPE_CHECKING:
    import duckdb

    from netflow.state import State

_CONNTRACK = Path("/proc/sys/net/netfilter")


def figures(state: State, con: duckdb.DuckDBPyConnection, status: dict[str, Any]) -> dict[str, Any]:
    """A status, and what only metrics want. Times in ns UTC; what counts begins with this run."""
    return {
        **status,
        "slices": sums.by_slice(state.sums),
        "reasons": sums.by_reason(state.sums),
        "losses": _losses(con, state.store.run),
        "waiting": len(state.buffers.flows),
        "writing": state.buffers.spare.empty(),
        "cpu": process_time(),
        "conntrack": _conntrack(),
    }


def _losses(con: duckdb.DuckDBPyConnection, run: int) -> list[list[Any]]:
    """Of this run: what, how many, events lost, records thought missing, nanoseconds."""
    rows = con.execute(
        "SELECT what, count(*), coalesce(sum(events), 0)::UBIGINT,"
        " coalesce(sum(estimate), 0)::UBIGINT,"
        " coalesce(sum(epoch_ns(until) - epoch_ns(since)), 0)::BIGINT"
        " FROM losses WHERE run = ? GROUP BY what ORDER BY what",
        [run],
    ).fetchall()
    return [list(row) for row in rows]


def _conntrack() -> dict[str, int]:
    """How full the kernel's table of connections is; nothing where it cannot be read."""
    found = {}
    for key, name in (("entries", "nf_conntrack_count"), ("limit", "nf_conntrack_max")):
        with suppress(OSError, ValueError):
            found[key] = int((_CONNTRACK / name).read_text())
    return found
