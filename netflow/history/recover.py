"""Opening a store with its history: what a crash left behind, and what is damaged.

A file that the database does not list is either the making of one that was
cut short (its records are still hot: it goes), or one that the database has
lost: it is listed again from its own description. A database that cannot be
read is set aside, never deleted; what it alone knew is a gap.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from time import time_ns

import duckdb

from netflow import store, systemd
from netflow.history import files, manifest
from netflow.history.archive import LATEST, SUMS
from netflow.history.schema import READ
from netflow.node import Node
from netflow.store import DATABASE, ENDED, KEY, DamagedError, Store
from netflow.when import SECOND

_log = logging.getLogger("netflow")


def open_store(path: Path, node: Node | None = None, memory: str = "96MB") -> Store:
    """Open a store, or make it, and settle its files. Raises StoreError with the cure."""
    lost = ""
    try:
        kept = store.open_store(path, node, memory)
    except DamagedError as error:
        lost = _set_aside(path)
        _log.error("%s: set aside as %s; its hot records are a gap now", error, lost)
        kept = store.open_store(path, node, memory)
    try:
        if lost:
            kept.con.execute("UPDATE meta SET value = ? WHERE key = 'recovering'", [lost])
        settle(kept)
        # A new database has this mark until it knows all it can, however often it is killed.
        if mark := kept.con.execute("SELECT value FROM meta WHERE key = 'recovering'").fetchall():
            _begin_anew(kept, mark[0][0])
    except BaseException:
        kept.con.close()
        raise
    return kept


def _set_aside(path: Path) -> str:
    stamp = datetime.fromtimestamp(time_ns() // SECOND, UTC).strftime("%Y%m%dT%H%M%SZ")
    name = f"{DATABASE}.damaged-{stamp}"
    number = 0
    while (path / name).exists():
        number += 1
        name = f"{DATABASE}.damaged-{stamp}-{number}"
    (path / DATABASE).rename(path / name)
    log = path / f"{DATABASE}.wal"
    if log.exists():
        log.rename(path / f"{name}.wal")
    files.sync(path)
    return name


def settle(kept: Store) -> None:
    """Make files and list agree."""
    con, root = kept.con, files.directory(kept.path)
    for draft in list(files.drafts(root)):
        draft.unlink()
    there = files.present(root)
    doomed = {row[0] for row in con.execute("SELECT name FROM doomed").fetchall()}
    for name in doomed & set(there):
        (root / name).unlink()
        del there[name]
    con.execute("DELETE FROM doomed")
    listed = dict(con.execute("SELECT name, bytes FROM files").fetchall())
    for name in sorted(listed):
        if there.get(name) == listed[name]:
            continue
        why = f"{name} is gone"
        if name in there:
            why = f"{name} is damaged"
            _set_file_aside(root / name)
            del there[name]
        _log.error("history: %s: its records are a gap now", why)
        with store.transaction(con):
            manifest.miss(con, name, why)
    hot = {number for number, *_ in store.hot_segments(con)}
    unlisted = sorted(set(there) - set(listed))
    for number, name in enumerate(unlisted, 1):
        systemd.notify(f"STATUS=listing closed records again: file {number} of {len(unlisted)}")
        _adopt(kept, hot, name, there[name])


def _adopt(kept: Store, hot: set[int], name: str, size: int) -> None:
    root = files.directory(kept.path)
    try:
        told = files.describe(kept.con, root / name)
    except files.FileError as error:
        _log.error("history: %s is set aside: %s", name, error)
        _set_file_aside(root / name)
        return
    if told.store == kept.id and told.segment in hot:
        (root / name).unlink()
        return
    digest = files.digest_of(root / name)
    if kept.con.execute("SELECT 1 FROM files WHERE sha256 = ?", [digest]).fetchall():
        _log.warning("history: %s is a copy of a listed file: it is set aside", name)
        _set_file_aside(root / name)
        return
    with store.transaction(kept.con):
        manifest.add(kept.con, name, told, size, digest, kept.node.name)
        manifest.hear(kept.con, told)


def _set_file_aside(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}.damaged"))


def _begin_anew(kept: Store, lost: str) -> None:
    """A database that is new, beside files perhaps that are not: what can be known again.

    lost: the name of the one before, if it was set aside.
    """
    con, now = kept.con, time_ns()
    count = con.execute("SELECT count(*) FROM files").fetchall()[0][0]
    before = count or any(kept.path.glob(f"{DATABASE}.damaged-*"))
    spans = con.execute(
        "SELECT epoch_ns(covers_since), epoch_ns(covers_until) FROM files WHERE own ORDER BY 1, 2"
    ).fetchall()
    since = min((a for a, _ in spans), default=now)
    until = max((b for _, b in spans), default=0)
    note = f"its database is now {lost}" if lost else "its database was gone"
    with store.transaction(con):
        con.execute("DELETE FROM meta WHERE key = 'recovering'")
        if not before:
            return
        if spans:
            # So that the next run reads back what is recorded of connections that live.
            con.execute(
                "INSERT INTO runs VALUES (1, make_timestamp_ns($1), make_timestamp_ns($2), '', 0,"
                " false, 0, 1, 0)",
                [since, now],
            )
        for (_, ended), (began, _) in pairwise(_merged(spans)):
            store.note_loss(kept, ended, began, "file-lost", note="no file tells of it")
        store.note_loss(kept, min(until, now), now, "store-lost", note=note)
        _carry_again(con)
    _log.warning("history: %d files listed again; after the last a gap", count)


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Overlapping spans as one, in order of time."""
    merged: list[tuple[int, int]] = []
    for a, b in spans:
        if merged and a <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(b, merged[-1][1])
        else:
            merged.append((a, b))
    return merged


_CARRIED = f"""
INSERT INTO carried BY NAME
WITH f AS (
    SELECT flow_start, {KEY}, oxid, rxid, coalesce(nsrc_hi, src_hi) AS nsrc_hi,
        coalesce(nsrc_lo, src_lo) AS nsrc_lo, coalesce(ndst_hi, dst_hi) AS ndst_hi,
        coalesce(ndst_lo, dst_lo) AS ndst_lo, coalesce(nsport, sport) AS nsport,
        coalesce(ndport, dport) AS ndport, opackets, obytes, rpackets, rbytes, end_time, reason
    FROM ({{records}}) WHERE flow_id IS NOT NULL)
SELECT flow_start, {KEY}, {{latest}}, {{sums}}, max(end_time) AS end_time
FROM f GROUP BY flow_start, {KEY} HAVING NOT bool_or(reason IN {ENDED})
"""  # noqa: S608 - names of ours


def _carry_again(con: duckdb.DuckDBPyConnection) -> None:
    """What files hold of connections that may go on; only records that are not all of one."""
    root = con.execute("SELECT value FROM meta WHERE key = 'history'").fetchall()[0][0]
    for version in READ:
        names = con.execute(
            "SELECT $root || '/' || name FROM files WHERE own AND schema = $version",
            {"root": root, "version": version},
        ).fetchall()
        if names:
            records = READ[version].format(files="$files::VARCHAR[]")
            con.execute(
                _CARRIED.format(records=records, latest=LATEST, sums=SUMS),
                {"files": [name for (name,) in names]},
            )
