"""Retention: how long files are kept, and how much of the disk is left free.

Whole files go, the oldest first; what went is counted and is a gap from then on.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from time import CLOCK_BOOTTIME, clock_gettime_ns
from typing import TYPE_CHECKING

from netflow import store
from netflow.when import HOUR, SECOND

if TYPE_CHECKING:
    import duckdb

GRACE = 660 * SECOND
"""ns between a file's leaving the list and its leaving the disk: a question that began before
may still read it (netflow.server gives none longer)."""
STEADY = HOUR
"""ns the clock must have gone on evenly before it may say that records are old: a clock that
is set wrong for a while must not cost them."""
_STEP = 60 * SECOND

_log = logging.getLogger("netflow")


@dataclass(frozen=True)
class Keeping:
    """age: files whose newest record is older go (ns; 0: never). free: bytes of the disk that
    must stay free; free_part: the same as a part of it, 0 to 1. The larger counts."""

    age: int = 0
    free: int = 0
    free_part: float = 0.0


@dataclass
class Clock:
    """Whether the wall clock has lately gone on evenly. offset: wall less boot time, ns."""

    ticks: int = 0
    offset: int = 0
    steady_since: int = 0
    now: int = 0


def tick(clock: Clock, now: int) -> Clock:
    """Look at the clock again."""
    boot = clock_gettime_ns(CLOCK_BOOTTIME)
    if not clock.ticks or abs(now - boot - clock.offset) > _STEP:
        clock.steady_since = boot
    clock.ticks, clock.offset, clock.now = clock.ticks + 1, now - boot, now
    return clock


def steady(clock: Clock) -> bool:
    """The clock may be believed."""
    return clock_gettime_ns(CLOCK_BOOTTIME) - clock.steady_since >= STEADY


def keep(con: duckdb.DuckDBPyConnection, root: Path, keeping: Keeping, clock: Clock) -> None:
    """Drop what is too old or too much, and remove what was dropped a while ago."""
    if not root.exists():
        return
    if keeping.age and steady(clock):
        by_age(con, clock.now - keeping.age, clock.now)
    short = _short(con, root, keeping)
    if short > 0:
        by_size(con, short, clock.now)
    sweep(con, root, clock.now - GRACE)


def by_age(con: duckdb.DuckDBPyConnection, before: int, now: int) -> int:
    """Drop the files whose records all ended before a time (ns); returns how many."""
    rows = con.execute(
        "SELECT name FROM files WHERE max_end < make_timestamp_ns(?) ORDER BY max_end",
        [max(0, before)],
    ).fetchall()
    _drop(con, [name for (name,) in rows], now, "older than they are kept")
    return len(rows)


def by_size(con: duckdb.DuckDBPyConnection, short: int, now: int) -> int:
    """Drop the oldest files until so many bytes are freed; returns how many."""
    names = []
    for name, size in con.execute("SELECT name, bytes FROM files ORDER BY max_end").fetchall():
        if short <= 0:
            break
        names.append(name)
        short -= size
    _drop(con, names, now, "the disk was too full")
    return len(names)


def _short(con: duckdb.DuckDBPyConnection, root: Path, keeping: Keeping) -> int:
    """Bytes that must be freed, besides those of files that are on their way out.

    What a question has spilt is free again when it ends. That may be now, and
    it may spill more: history must go for neither. Nor for what others than root
    write for a moment: what is kept from them (ext4's reserve, as large) is free.
    """
    spilt = store.spilt(con)
    free = store.free(root)
    spilt = max(spilt, store.spilt(con))
    disk = os.statvfs(root)
    floor = max(keeping.free, int(keeping.free_part * disk.f_blocks * disk.f_frsize))
    leaving = 0
    for (name,) in con.execute("SELECT name FROM doomed").fetchall():
        path = root / name
        leaving += path.stat().st_size if path.exists() else 0
    return floor - free - leaving - spilt


def _drop(con: duckdb.DuckDBPyConnection, names: list[str], now: int, why: str) -> None:
    if not names:
        return
    with store.transaction(con):
        con.execute(
            "CREATE OR REPLACE TEMP TABLE retiring AS SELECT * FROM files"
            " WHERE list_contains($1::VARCHAR[], name)",
            [names],
        )
        con.execute(
            "CREATE OR REPLACE TEMP TABLE summed AS SELECT node, min(since) AS since,"
            " max(until) AS until, sum(records)::UBIGINT AS records, sum(bytes)::UBIGINT AS bytes,"
            " sum(files)::UINTEGER AS files, make_timestamp_ns($1) AS last, $2 AS why FROM ("
            "SELECT node, min_start AS since, max_end AS until, records, bytes, 1 AS files"
            " FROM retiring UNION ALL SELECT node, since, until, records, bytes, files FROM retired"
            " WHERE node IN (SELECT node FROM retiring)) GROUP BY node",
            [now, why],
        )
        con.execute("DELETE FROM retired WHERE node IN (SELECT node FROM retiring)")
        con.execute("INSERT INTO retired SELECT * FROM summed")
        con.execute("INSERT INTO doomed SELECT name, $1 FROM retiring", [now])
        con.execute("DELETE FROM files WHERE name IN (SELECT name FROM retiring)")
    _log.info("history: dropped %d files: %s", len(names), why)


def sweep(con: duckdb.DuckDBPyConnection, root: Path, before: int) -> None:
    """Remove from the disk the files that were dropped before a time (ns)."""
    rows = con.execute("SELECT name FROM doomed WHERE since <= ?", [before]).fetchall()
    for (name,) in rows:
        path = root / name
        path.unlink(missing_ok=True)
        if path.parent.exists() and not any(path.parent.iterdir()):
            path.parent.rmdir()
        con.execute("DELETE FROM doomed WHERE name = ?", [name])
