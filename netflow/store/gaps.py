"""Where records of this node may be missing, and what a status counts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import duckdb

from netflow.store.segments import hot_segments
from netflow.wire import Gap


def gaps(con: duckdb.DuckDBPyConnection, since: int, until: int, now: int) -> list[Gap]:
    """The spans in since..until whose records of this node may be missing, in order of time.

    now is how far the running collector has come. See netflow.history.gaps
    for those of other nodes, and for what retention dropped.
    """
    losses = [
        Gap(since=a, until=max(a, b), what=what, events=n, estimate=estimate, note=note)
        for a, b, what, n, estimate, note in con.execute(
            "SELECT epoch_ns(since), coalesce(epoch_ns(until), ?), what, events, estimate, note"
            " FROM losses",
            [now],
        ).fetchall()
    ]
    found = list(losses)
    runs = con.execute("SELECT epoch_ns(since), epoch_ns(until) FROM runs ORDER BY id").fetchall()
    if runs and since < runs[0][0]:
        found.append(Gap(since=since, until=runs[0][0], what="before-first"))
    for (_, ended), (began, _) in pairwise(runs):
        # As a rule a run notes for itself what it missed; not if it was killed before it could.
        told = any(loss.since <= ended and loss.until >= began for loss in losses)
        if ended < began and not told:
            found.append(Gap(since=ended, until=began, what="not-running"))
    touching = [gap for gap in found if gap.since <= until and gap.until >= since]
    return sorted(touching, key=lambda gap: gap.since)


def facts(con: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Counts for a status: hot records, losses and their events."""
    hot = sum(
        con.execute(f"SELECT count(*) FROM flows_{number}").fetchall()[0][0]  # noqa: S608
        for number, *_ in hot_segments(con)
    )
    losses, events = con.execute(
        "SELECT count(*), coalesce(sum(events), 0)::UBIGINT FROM losses"
    ).fetchall()[0]
    return {"hot": hot, "losses": losses, "events_lost": events}
