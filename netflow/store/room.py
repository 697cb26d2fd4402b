"""Whether the disk has room for what is to be written.

DuckDB takes a commit back that the disk has no room for, and goes on. A
checkpoint that fails makes it refuse all, so one must never be begun that
might: there has to be as much room as the log takes.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import duckdb

from netflow.store.database import DATABASE, Store, StoreError

ROOM = 4 << 20
"""Bytes that must be free before writing goes on after the disk was full."""

_LEAST = 1 << 20
_RECORD = 300  # bytes of the log that a record takes at most


class FullError(StoreError):
    """The disk is full. wanted: bytes that would have had to be free."""

    def __init__(self, message: str, wanted: int = 0) -> None:
        super().__init__(message)
        self.wanted = wanted


def free(path: Path) -> int:
    """Bytes that the disk has left for us: what is reserved for root, too, if we are."""
    disk = os.statvfs(path)
    return (disk.f_bavail if os.geteuid() else disk.f_bfree) * disk.f_frsize


def has_room(store: Store, size: int = _LEAST) -> bool:
    """So many bytes are free, and as many as the next checkpoint may take."""
    log = store.path / f"{DATABASE}.wal"
    try:
        pending = log.stat().st_size
    except FileNotFoundError:
        pending = 0
    return free(store.path) >= size + pending


def check_room(store: Store, records: int) -> None:
    """Raise FullError if so many records might not fit."""
    wanted = _LEAST + records * _RECORD
    if not has_room(store, wanted):
        raise FullError(f"the disk of {store.path} is full", wanted)


def spilt(con: duckdb.DuckDBPyConnection) -> int:
    """Bytes that questions have put beside the database, and that are free when they end."""
    sql = "SELECT coalesce(sum(size), 0)::BIGINT FROM duckdb_temporary_files()"
    size: int = con.execute(sql).fetchall()[0][0]
    return size


def bound_spilling(con: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Leave a quarter of what is free now to the collector, however much questions spill.

    DuckDB's own bound is of what was free when it began.
    """
    disk, used = os.statvfs(path), spilt(con)
    bound = max(used, (disk.f_bavail * disk.f_frsize + used) // 4 * 3)
    with suppress(duckdb.OutOfMemoryException):  # more than that has been spilt just now
        con.execute(f"SET max_temp_directory_size = '{bound}B'")


def is_full(error: BaseException) -> bool:
    """This failed for want of room on the disk, and the store can be used."""
    if isinstance(error, duckdb.Error):
        text = str(error)
        short = "No space left" in text or "quota exceeded" in text
        return short and not isinstance(error, duckdb.FatalException)
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, FullError)
