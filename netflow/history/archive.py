"""The thread that makes files of closed segments, and keeps retention.

It has a cursor of its own: the collector's commits go on beside it. What it
does in the database is one transaction for each file, so that a record is
either hot or listed, whenever the process ends.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time_ns

import duckdb

from netflow import names, store
from netflow.history import after, files, manifest, retain
from netflow.history.schema import VERSION, Told
from netflow.node import Node
from netflow.store import ENDED, KEY, SHARES, Store, segments
from netflow.when import HOUR

EVERY = 10.0
"""Seconds between looks for something to do; a segment that is closed is seen within one."""

TIDY = 60.0
"""Seconds at least between checkpoints: each may hold up the collector's commits for its length."""

_log = logging.getLogger("netflow")

_SIDES = "oxid, rxid, nsrc_hi, nsrc_lo, ndst_hi, ndst_lo, nsport, ndport"
LATEST = ", ".join(f"arg_max({c}, end_time) AS {c}" for c in (*_SIDES.split(", "), "reason"))
SUMS = ", ".join(f"sum({c})::UBIGINT AS {c}" for c in ("opackets", "obytes", "rpackets", "rbytes"))
# Only connections that the segment has something of: what else is carried stays.
_TOUCHED = f"""
CREATE OR REPLACE TEMP TABLE touched AS
SELECT flow_start, {KEY} FROM {{segment}} WHERE reason NOT IN {ENDED}
UNION SELECT flow_start, {KEY} FROM {{segment}} SEMI JOIN carried USING (flow_start, {KEY})
"""  # noqa: S608 - names of ours, here and below
_CARRYING = f"""
CREATE OR REPLACE TEMP TABLE carrying AS
WITH share AS (SELECT {SHARES} FROM {{segment}} SEMI JOIN touched USING (flow_start, {KEY})
    UNION ALL SELECT {SHARES} FROM carried SEMI JOIN touched USING (flow_start, {KEY}))
SELECT flow_start, {KEY}, {LATEST}, {SUMS}, max(end_time) AS end_time
FROM share GROUP BY flow_start, {KEY} HAVING NOT bool_or(reason IN {ENDED})
"""  # noqa: S608
_UNCARRY = "DELETE FROM carried USING touched t WHERE " + " AND ".join(  # noqa: S608
    f"carried.{c} = t.{c}" for c in ("flow_start", *KEY.split(", "))
)


@dataclass
class Archiver:
    """A running archiver."""

    store: Store
    con: duckdb.DuckDBPyConnection
    keeping: retain.Keeping
    registry: Path
    stopping: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None


def start(kept: Store, keeping: retain.Keeping, registry: Path) -> Archiver:
    """Begin to archive; from now on it alone touches segments that are closed."""
    archiver = Archiver(kept, kept.con.cursor(), keeping, registry)
    archiver.thread = threading.Thread(target=_run, args=(archiver,), name="archive", daemon=True)
    archiver.thread.start()
    return archiver


def stop(archiver: Archiver) -> None:
    """End it; a file that is being made is given up and made again next time."""
    archiver.stopping.set()
    archiver.con.interrupt()
    if archiver.thread:
        archiver.thread.join()
    archiver.con.close()


def _run(archiver: Archiver) -> None:
    clock = retain.Clock()
    failed, floor, due = "", 0, monotonic()
    closed, tidied = 0, -TIDY
    while not archiver.stopping.wait(1.0):
        if archiver.store.floor == floor and monotonic() < due:
            continue
        floor, due = archiver.store.floor, monotonic() + EVERY
        try:
            store.bound_spilling(archiver.con, archiver.store.path)
            closed += close_segments(archiver)
            if closed and monotonic() - tidied >= TIDY and tidy(archiver):
                closed, tidied = 0, monotonic()
            root = files.directory(archiver.store.path)
            retain.keep(archiver.con, root, archiver.keeping, retain.tick(clock, time_ns()))
            failed = ""
        except Exception as error:  # whatever it is, collecting goes on
            said = str(error).splitlines()[0] if str(error) else repr(error)
            if not archiver.stopping.is_set() and said != failed:
                failed = said
                _log.warning("cannot write history, its records stay in the database: %s", said)


def close_segments(archiver: Archiver) -> int:
    """Make files of the segments that are written to no more; returns how many."""
    done = 0
    for number, hour, node, domain in store.hot_segments(archiver.con):
        if archiver.stopping.is_set():
            break
        if number < archiver.store.floor:
            _close(archiver, number, hour, Node(node, domain))
            done += 1
    return done


def tidy(archiver: Archiver) -> bool:
    """Have the space of dropped segments used again, which only a checkpoint allows.

    DuckDB makes one when its log is full, but large commits go past the log:
    the database would grow by every hour of a busy node. False: not now, since
    somebody's transaction is open or the disk has no room.
    """
    if not store.has_room(archiver.store):
        return False
    try:
        archiver.con.execute("CHECKPOINT")
    except duckdb.TransactionException:
        return False
    return True


def _close(archiver: Archiver, number: int, hour: int, node: Node) -> None:
    con, root = archiver.con, files.directory(archiver.store.path)
    told = _tell(archiver, number, hour, node)
    listed = {row[0] for row in con.execute("SELECT name FROM files").fetchall()}
    # Another file of that name can only be of another store: it was imported.
    name = files.free_name(root, told, listed)
    segment = f"flows_{number}"
    after.keep_order(con, archiver.store.path, number)
    try:
        digest = files.write(con, root, number, told, name)
        size = (root / name).stat().st_size
        con.execute(_TOUCHED.format(segment=segment))
        con.execute(_CARRYING.format(segment=segment))
        with store.transaction(con):
            con.execute(_UNCARRY)
            con.execute("INSERT INTO carried BY NAME SELECT * FROM carrying")
            manifest.add(con, name, told, size, digest, archiver.store.node.name)
            # Its file goes one day, but its number is never another segment's.
            con.execute("DELETE FROM meta WHERE key = 'segment'")
            con.execute("INSERT INTO meta VALUES ('segment', ?)", [str(number)])
            con.execute("DELETE FROM segments WHERE id = ?", [number])
            con.execute(f"DROP TABLE {segment}")
    except BaseException:
        # Its records are still hot: it will be made again.
        if not con.execute("SELECT 1 FROM files WHERE name = ?", [name]).fetchall():
            (root / name).unlink(missing_ok=True)
        raise
    con.execute("DROP TABLE carrying; DROP TABLE touched")
    _log.debug("history: %s, %d records in %d bytes", name, told.records, size)


def _tell(archiver: Archiver, number: int, hour: int, node: Node) -> Told:
    """What the file of a segment will say of itself."""
    con = archiver.con
    records, start, end = con.execute(
        "SELECT count(*), epoch_ns(least(min(start_time), min(end_time))) // 1000000 * 1000000,"  # noqa: S608
        " epoch_ns(greatest(max(start_time), max(end_time))) // 1000000 * 1000000"
        f" FROM flows_{number}"
    ).fetchall()[0]
    if not records:
        start = end = hour * HOUR
    until = end if records >= segments.SEGMENT_ROWS else max(end, (hour + 1) * HOUR - 1)
    # Files that were made while the clock was ahead are not before this one.
    before = con.execute(
        "SELECT epoch_ns(max(covers_until)) FROM files"
        " WHERE store = ? AND covers_until <= make_timestamp_ns(?)",
        [archiver.store.id, until],
    ).fetchall()[0][0]
    since = before or store.first_run(con) or start
    since = since if since <= until else start
    xids = con.execute(
        f"SELECT oxid FROM flows_{number} UNION SELECT rxid FROM flows_{number}"  # noqa: S608
    ).fetchall()
    held = names.held_by(archiver.registry, {xid for (xid,) in xids}, start, end)
    return Told(
        schema=VERSION,
        node=node.name,
        domain=node.domain,
        store=archiver.store.id,
        segment=number,
        hour=hour,
        records=records,
        start=start,
        end=end,
        covers=(since, until),
        gaps=store.gaps(con, since, until, time_ns()),
        names=held,
    )
