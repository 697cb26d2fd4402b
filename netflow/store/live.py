"""What is stored of connections that live, for a collector that begins."""

from __future__ import annotations

from contextlib import suppress

import duckdb

from netflow.store.database import Columns, Store, as_times, fetch
from netflow.store.segments import hot_segments

# What identifies a connection for its whole life, together with flow_start.
KEY = "flow_id, zone, proto, src_hi, src_lo, dst_hi, dst_lo, sport, dport"
_SIDES = "oxid, rxid, nsrc_hi, nsrc_lo, ndst_hi, ndst_lo, nsport, ndport"
_SUMS = ("opackets", "obytes", "rpackets", "rbytes")
ENDED = "(1, 2, 6)"
"""Reasons after which nothing more comes of a connection: idle, closed, cut. A lost one may
turn out to live."""

SHARES = f"flow_start, {KEY}, {_SIDES}, {', '.join(_SUMS)}, end_time, reason"
_TOTALS = ", ".join(f"sum({c})::UBIGINT AS {c}" for c in _SUMS)


def _key(table: str) -> str:
    return ", ".join(f"{table}.{c}" for c in KEY.split(", "))


_LIVE = """
INSERT INTO live SELECT start, id, zone, proto, src_hi, src_lo, dst_hi, dst_lo, sport, dport
FROM batch WHERE start < make_timestamp_ns($before)
"""
# A connection that is older than the kernel's timestamps has a start of 0 in a
# dump; stored is when it was first seen. One that was read back from Parquet
# has lost what is below a millisecond.
_SAME = """(l.flow_start = f.flow_start OR epoch_ns(l.flow_start) = 0
    OR epoch_ns(l.flow_start) // 1000000 * 1000000 = epoch_ns(f.flow_start))"""
_RESTORE = f"""
UPDATE carried AS f SET flow_start = l.flow_start FROM live l
WHERE ({_key("l")}) = ({_key("f")}) AND l.flow_start <> f.flow_start
    AND epoch_ns(l.flow_start) // 1000000 * 1000000 = epoch_ns(f.flow_start)
"""  # noqa: S608
_RECORDED = f"""
SELECT epoch_ns(CASE WHEN epoch_ns(any_value(l.flow_start)) = 0 THEN f.flow_start
        ELSE any_value(l.flow_start) END)::UBIGINT AS flow_start,
    {KEY}, {_TOTALS}, epoch_ns(max(end_time))::UBIGINT AS "end",
    arg_max(reason, end_time) AS reason
FROM ({{shares}}) f JOIN (SELECT DISTINCT * FROM live) l USING ({KEY})
WHERE {_SAME}
GROUP BY f.flow_start, {KEY}
QUALIFY row_number() OVER (PARTITION BY {KEY} ORDER BY f.flow_start DESC) = 1
"""  # noqa: S608
_LAST_SIDES = ", ".join(f"arg_max({c}, end_time) AS {c}" for c in _SIDES.split(", "))
_UNFINISHED = f"""
WITH share AS MATERIALIZED (
    SELECT * FROM ({{shares}}) s
    WHERE (flow_start, {KEY}) IN (SELECT (flow_start, {KEY}) FROM ({{shares}}) WHERE reason IN (3, 4)))
SELECT epoch_ns(f.flow_start)::UBIGINT AS flow_start, {KEY}, {_LAST_SIDES}, {_TOTALS},
    epoch_ns(max(end_time))::UBIGINT AS "end"
FROM share f
WHERE NOT EXISTS (SELECT 1 FROM live l WHERE {_SAME} AND
    ({_key("l")}) = ({_key("f")}))
GROUP BY f.flow_start, {KEY}
HAVING NOT bool_or(reason IN {ENDED}) AND arg_max(reason, end_time) <> 5
"""  # noqa: S608,E501


def begin_live(store: Store) -> None:
    """Start the list of connections that live now, for recorded() and unfinished().

    end_live() ends it.
    """
    store.con.execute(
        f"CREATE OR REPLACE TEMP TABLE live AS SELECT flow_start, {KEY} FROM carried LIMIT 0"  # noqa: S608
    )


def add_live(store: Store, entries: Columns, before: int) -> None:
    """Add to that list those of a dump's entries that began before a time (ns)."""
    store.con.register("batch", as_times(entries, ("start",)))
    store.con.execute(_LIVE, {"before": before})
    store.con.unregister("batch")


def unfinished(store: Store) -> Columns:
    """Connections of which more was to come, and that are not in the list.

    Their keys, latest owners and translation, sums, and newest end. Lost ones
    are not among them: their end is recorded.
    """
    return fetch(store, _UNFINISHED.format(shares=_shares(store.con)))


def recorded(store: Store) -> Columns:
    """What is stored of the listed connections: sums, newest end and its reason.

    Those read back from Parquet get their whole start again: by that alone, what will be
    recorded of them is known as theirs. Where the archiver is at the same ones, next time.
    """
    with suppress(duckdb.TransactionException):
        store.con.execute(_RESTORE)
    return fetch(store, _RECORDED.format(shares=_shares(store.con)))


def end_live(store: Store, whole: bool = False) -> None:
    """Drop the list.

    whole: it has all that live, and that the others have ended is stored, so what is
    carried of those can go. Not before: nothing else may tell that they ever were open.
    """
    if whole:
        # Where the archiver is at the same ones they stay until the next time.
        with suppress(duckdb.TransactionException):
            store.con.execute(
                f"DELETE FROM carried AS f WHERE NOT EXISTS (SELECT 1 FROM live l WHERE {_SAME} AND"  # noqa: S608
                " l.flow_id = f.flow_id AND l.src_lo = f.src_lo AND l.dst_lo = f.dst_lo"
                " AND l.sport = f.sport AND l.dport = f.dport)"
            )
    store.con.execute("DROP TABLE live")


def _shares(con: duckdb.DuckDBPyConnection) -> str:
    hot = "".join(
        f" UNION ALL SELECT {SHARES} FROM flows_{number}"  # noqa: S608
        for number, *_ in hot_segments(con)
    )
    return f"SELECT {SHARES} FROM carried{hot}"  # noqa: S608
