"""Records in the order they were committed, for those who follow them: what comes after a position.

A position is a store, a segment of it, and how many of its records are behind.
Hot records are counted as they were committed (DuckDB's rowid: nothing is
deleted from a segment). A file has them sorted, so for a segment that somebody
may have read a part of, the archiver keeps their order: ``export/N.order``
beside the history, a Parquet file of the rowid of each row of the file. Where
none can be read, a file is followed by its own row numbers, from its beginning.

So a follower gets each record once, but for one case: it has read a part of a
segment, and the order of that is gone. Then it gets the segment once more, and
is told how many records that are.

Followers are known by a file each in ``export/`` that says at which segment
they are: it says which orders are kept, and nothing else depends on it.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from netflow.history import files
from netflow.history.schema import READ
from netflow.store import StoreError, hot_segments
from netflow.wire import After, Position

if TYPE_CHECKING:
    import duckdb

LIMIT = 65_536
"""The most records of an answer: it bounds memory, and how long the collector's lock is held."""

_log = logging.getLogger("netflow")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_COLUMNS = """
epoch_ns(start_time) AS start_time, epoch_ns(end_time) AS end_time,
coalesce(flow_id, 0)::UINTEGER AS flow_id, proto, reason, src_hi, src_lo, dst_hi, dst_lo,
sport, dport, coalesce(nsrc_hi, src_hi) AS nsrc_hi, coalesce(nsrc_lo, src_lo) AS nsrc_lo,
coalesce(ndst_hi, dst_hi) AS ndst_hi, coalesce(ndst_lo, dst_lo) AS ndst_lo,
coalesce(nsport, sport) AS nsport, coalesce(ndport, dport) AS ndport,
opackets, obytes, rpackets, rbytes, oxid, rxid
"""
_HOT = f"SELECT {_COLUMNS} FROM {{segment}} WHERE rowid >= $first AND rowid < $last"  # noqa: S608
_ORDER = """
COPY (SELECT number::UINTEGER AS number FROM (
    SELECT rowid AS number, dst_hi, dst_lo, dport, epoch_ns(end_time) // 1000000 AS end_ms
    FROM {segment}) ORDER BY dst_hi, dst_lo, dport, end_ms, number)
TO $file (FORMAT parquet, COMPRESSION zstd)
"""
_ORDERED = (
    "file_row_number IN (SELECT file_row_number FROM"
    " read_parquet($order::VARCHAR, file_row_number = true)"
    " WHERE number >= $first AND number < $last)"
)
_HOLDS = "SELECT count(*) FROM read_parquet(?) WHERE number >= ? AND number < ?"
_NUMBERED = "file_row_number >= $first AND file_row_number < $last"


@dataclass(frozen=True)
class Found:
    """Records of one node, and the position after them.

    skipped: segments that were gone before they were read, or are not what was
    read, since the store was set back to an earlier state. again:
    records that came before and come once more.
    """

    position: Position
    node: str = ""
    domain: int = 0
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    skipped: int = 0
    again: int = 0

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values()), ()))


@dataclass(frozen=True)
class _Part:
    """A segment: hot (file is "") or closed."""

    node: str
    domain: int
    records: int
    file: str = ""
    schema: int = 0


def after(con: duckdb.DuckDBPyConnection, asked: After) -> Found:
    """The next records after a position, none if there are none yet. Call it inside reading().

    Raises ValueError for a follower's name that cannot be one, and StoreError.
    """
    if not _NAME.fullmatch(asked.name):
        raise ValueError(f"{asked.name!r} cannot be a follower's name: letters, digits, '._-'")
    here = _meta(con, "store")
    home = Path(_meta(con, "history")).parent / "export"
    stores = _stores(con, here)
    found = Found(asked.position)
    if not found.position.store:
        found = Found(_begin(con, here, stores, asked.begin))
    elif found.position.store not in stores:
        found = Found(Position(store=stores[0]), skipped=1)
    while True:
        parts = _parts(con, found.position.store, here)
        found, advanced = _step(con, home, parts, found, max(1, min(asked.limit, LIMIT)))
        if not advanced and not found.rows and found.position.store != here:
            later = stores[stores.index(found.position.store) + 1]
            gone = found.skipped + (found.position.segment not in parts)
            found, advanced = replace(found, position=Position(store=later), skipped=gone), True
        if found.rows or not advanced:
            _note(home, asked.name, found.position)
            return found


def _step(
    con: duckdb.DuckDBPyConnection, home: Path, parts: dict[int, _Part], found: Found, limit: int
) -> tuple[Found, bool]:
    """Read of the segment of a position, or go to the next one; whether either could be done."""
    at = found.position
    if (told := parts.get(at.segment)) and told.file and not Path(told.file).exists():
        del parts[at.segment]  # somebody has removed it: what comes after it can be had
    part = parts.get(at.segment)
    if part and at.row > part.records:
        # The store was set back, from a copy: what it has now is not what was read.
        back = Position(store=at.store, segment=at.segment, row=part.records, by=at.by)
        return replace(found, position=back, skipped=found.skipped + 1), True
    if part is None or at.row >= part.records:
        later = min((number for number in parts if number > at.segment), default=0)
        if not later:
            return found, False
        # Segments are numbered without gaps; before the first is none.
        gone = later - at.segment - (part is not None) if at.segment else 0
        began = Position(store=at.store, segment=later)
        return replace(found, position=began, skipped=found.skipped + gone), True
    order = home / f"{at.segment}.order"
    by, row, again = at.by, at.row, 0
    if part.file and by == "commit" and not _holds(con, order, row, min(row + limit, part.records)):
        by, row, again = "file", 0, row
    params: dict[str, Any] = {"first": row, "last": row + limit}
    if not part.file:
        sql = _HOT.format(segment=f"flows_{at.segment}")
    else:
        which = _NUMBERED if by == "file" else _ORDERED
        read = READ[part.schema].format(files="$file::VARCHAR, file_row_number = true")
        sql = f"SELECT {_COLUMNS} FROM ({read} WHERE {which})"  # noqa: S608
        params["file"] = part.file
        if by == "commit":
            params["order"] = str(order)
    columns = _fetch(con, sql, params)
    rows = len(columns["proto"])
    if rows != min(limit, part.records - row):
        raise StoreError(f"segment {at.segment} has lost records: {rows} after the first {row}")
    position = Position(store=at.store, segment=at.segment, row=row + rows, by=by)
    return Found(position, part.node, part.domain, columns, found.skipped, again), True


def _begin(con: duckdb.DuckDBPyConnection, here: str, stores: list[str], begin: str) -> Position:
    """Where somebody begins who has no position."""
    if begin == "oldest":
        return Position(store=stores[0])
    parts = _parts(con, here, here)
    newest = max(parts, default=0)
    return Position(store=here, segment=newest, row=parts[newest].records if parts else 0)


def _stores(con: duckdb.DuckDBPyConnection, here: str) -> list[str]:
    """Stores that this node's records are of: those that were lost, oldest first, and this one."""
    rows = con.execute(
        "SELECT store FROM files WHERE own AND store <> ? GROUP BY store ORDER BY min(hour), store",
        [here],
    ).fetchall()
    return [*(store for (store,) in rows), here]


def _parts(con: duckdb.DuckDBPyConnection, store: str, here: str) -> dict[int, _Part]:
    """The segments of a store by number, hot and closed."""
    parts = {}
    root = _meta(con, "history")
    for number, node, domain, records, name, schema in con.execute(
        "SELECT segment, node, domain, records, name, schema FROM files WHERE store = ?", [store]
    ).fetchall():
        parts[number] = _Part(node, domain, records, f"{root}/{name}", schema)
    for number, _, node, domain in hot_segments(con) if store == here else ():
        count = con.execute(f"SELECT count(*) FROM flows_{number}").fetchall()[0][0]  # noqa: S608
        parts[number] = _Part(node, domain, count)
    return parts


def _meta(con: duckdb.DuckDBPyConnection, key: str) -> str:
    value: str = con.execute("SELECT value FROM meta WHERE key = ?", [key]).fetchall()[0][0]
    return value


def _holds(con: duckdb.DuckDBPyConnection, order: Path, first: int, last: int) -> bool:
    """An order is there and tells of all these records."""
    import duckdb

    if not order.exists():
        return False
    try:
        with closing(con.cursor()) as own:  # the transaction of con would end with an error
            [(count,)] = own.execute(_HOLDS, [str(order), first, last]).fetchall()
    except duckdb.Error as error:
        _log.warning("%s cannot be read: %s", order, str(error).splitlines()[0])
        return False
    return bool(count == last - first)


def _fetch(
    con: duckdb.DuckDBPyConnection, sql: str, params: dict[str, Any]
) -> dict[str, NDArray[Any]]:
    import duckdb

    try:
        return {name: np.asarray(c) for name, c in con.execute(sql, params).fetchnumpy().items()}
    except duckdb.Error as error:
        raise StoreError(str(error).splitlines()[0]) from None


# -- the orders that are kept ------------------------------------------------------------


def _note(home: Path, name: str, at: Position) -> None:
    """Keep at which segment a follower is. A crash that forgets it costs no record."""
    note, text = home / f"{name}.at", str(at.segment)
    try:
        if note.exists() and note.read_text() == text:
            return
        home.mkdir(mode=0o750, exist_ok=True)
        new = home / f".new-{name}-{os.getpid()}"
        new.write_text(text)
        new.rename(note)
    except OSError as error:
        raise StoreError(f"cannot note a follower in {home}: {error.strerror}") from None


def keep_order(con: duckdb.DuckDBPyConnection, store: Path, number: int) -> None:
    """Keep in which order a segment's records were committed, if anybody follows them.

    The archiver calls it before a segment becomes a file; with that, other
    orders that nobody is in the middle of go. It never fails: where it cannot
    be kept, a follower in the middle of the segment gets that again.
    """
    import duckdb

    home = store / "export"
    if not home.exists():
        return
    try:
        at = {note.read_text() for note in home.glob("*.at")}
        # Who was just told of a segment may not yet be done with the one before.
        at |= {str(int(number) - 1) for number in at if number.isdecimal()}
        for order in home.glob("*.order"):
            if order.stem not in at:
                order.unlink()
        if at:
            draft = home / f".new-{number}.order"
            con.execute(_ORDER.format(segment=f"flows_{number}"), {"file": str(draft)})
            files.put(draft, home / f"{number}.order")
    except (OSError, duckdb.Error) as error:
        _log.warning("cannot keep the order of segment %d: %s", number, error)
