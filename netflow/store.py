"""The store of flow records: the only module that knows DuckDB.

One process at a time can have the file open, so the collector answers all
questions. ``flows`` holds one row per record; ``losses`` the spans in which
events were lost; ``runs`` when a collector was there at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from netflow.wire import Gap

SCHEMA_VERSION = 1

Columns = Mapping[str, NDArray[Any]]

_SCHEMA = """
CREATE TABLE meta (key VARCHAR NOT NULL, value VARCHAR NOT NULL);
CREATE TABLE flows (
    flow_start TIMESTAMP_NS NOT NULL, start_time TIMESTAMP_NS NOT NULL,
    end_time TIMESTAMP_NS NOT NULL, flow_id UINTEGER NOT NULL, zone USMALLINT NOT NULL,
    proto UTINYINT NOT NULL, reason UTINYINT NOT NULL, tcp_state UTINYINT NOT NULL,
    src UHUGEINT NOT NULL, dst UHUGEINT NOT NULL,
    sport USMALLINT NOT NULL, dport USMALLINT NOT NULL,
    nsrc UHUGEINT NOT NULL, ndst UHUGEINT NOT NULL,
    nsport USMALLINT NOT NULL, ndport USMALLINT NOT NULL,
    opackets UBIGINT NOT NULL, obytes UBIGINT NOT NULL,
    rpackets UBIGINT NOT NULL, rbytes UBIGINT NOT NULL,
    oxid USMALLINT NOT NULL, rxid USMALLINT NOT NULL);
CREATE TABLE losses (
    id UINTEGER NOT NULL, run UINTEGER NOT NULL, since TIMESTAMP_NS NOT NULL,
    until TIMESTAMP_NS, what VARCHAR NOT NULL, events UBIGINT NOT NULL);
CREATE TABLE runs (
    id UINTEGER NOT NULL, since TIMESTAMP_NS NOT NULL, until TIMESTAMP_NS NOT NULL);
"""

# Transparent to readers: DuckDB has no unsigned 128 bit arrays to hand over.
_INSERT = """
INSERT INTO flows SELECT
    flow_start, start, "end", flow_id, zone, proto, reason, tcp_state,
    (src_hi::UHUGEINT << 64) | src_lo, (dst_hi::UHUGEINT << 64) | dst_lo, sport, dport,
    (nsrc_hi::UHUGEINT << 64) | nsrc_lo, (ndst_hi::UHUGEINT << 64) | ndst_lo, nsport, ndport,
    opackets, obytes, rpackets, rbytes, oxid, rxid
FROM batch
"""

# What identifies a connection for its whole life, together with flow_start.
_KEY = "flow_id, zone, proto, src, dst, sport, dport"

_LIVE_TABLE = f"CREATE OR REPLACE TEMP TABLE live AS SELECT flow_start, {_KEY} FROM flows LIMIT 0"  # noqa: S608
_LIVE = """
INSERT INTO live SELECT
    start, id, zone, proto,
    (src_hi::UHUGEINT << 64) | src_lo, (dst_hi::UHUGEINT << 64) | dst_lo, sport, dport
FROM batch WHERE start < make_timestamp_ns($before)
"""
# A connection that is older than the kernel's timestamps has a start of 0 in
# a dump; stored is when it was first seen.
_RECORDED = f"""
SELECT epoch_ns(f.flow_start)::UBIGINT AS flow_start, flow_id, zone, proto,
    (src >> 64)::UBIGINT AS src_hi, (src & 18446744073709551615::UHUGEINT)::UBIGINT AS src_lo,
    (dst >> 64)::UBIGINT AS dst_hi, (dst & 18446744073709551615::UHUGEINT)::UBIGINT AS dst_lo,
    sport, dport,
    sum(opackets)::UBIGINT AS opackets, sum(obytes)::UBIGINT AS obytes,
    sum(rpackets)::UBIGINT AS rpackets, sum(rbytes)::UBIGINT AS rbytes,
    epoch_ns(max(end_time))::UBIGINT AS "end"
FROM flows f JOIN live l USING ({_KEY})
WHERE l.flow_start = f.flow_start OR epoch_ns(l.flow_start) = 0
GROUP BY f.flow_start, {_KEY}
QUALIFY row_number() OVER (PARTITION BY {_KEY} ORDER BY f.flow_start DESC) = 1
"""  # noqa: S608 - the key is ours


class StoreError(Exception):
    """The store cannot be used; the message says what to do."""


@dataclass
class Store:
    """An open store and the run of the collector that writes to it."""

    con: duckdb.DuckDBPyConnection
    path: Path
    run: int = 0
    losses: int = 0


def open_store(path: Path, memory: str = "64MB") -> Store:
    """Open the store, or make it. Raises StoreError with the cure.

    memory bounds DuckDB's buffers; what does not fit goes to files beside the
    store.
    """
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        con = duckdb.connect(str(path), config={"threads": 2, "memory_limit": memory})
    except duckdb.IOException as error:
        text = str(error).splitlines()[0]
        if "lock" in text:
            raise StoreError(f"{path} is in use by another collector: {text}") from None
        raise StoreError(f"cannot open the store {path}: {text}") from None
    except OSError as error:
        raise StoreError(f"cannot make {path.parent}: {error.strerror}") from None
    # Small steps: a checkpoint holds up the collector for its length.
    con.execute("SET checkpoint_threshold = '8MB'")
    con.execute("SET preserve_insertion_order = false")
    store = Store(con, path)
    try:
        _check_schema(store)
    except (StoreError, duckdb.Error):
        con.close()
        raise
    path.chmod(0o640)
    return store


def _check_schema(store: Store) -> None:
    tables = {row[0] for row in store.con.execute("SHOW TABLES").fetchall()}
    if not tables:
        store.con.execute(f"BEGIN; {_SCHEMA}")
        store.con.execute("INSERT INTO meta VALUES ('schema', ?)", [str(SCHEMA_VERSION)])
        store.con.execute("COMMIT")
        return
    if "meta" not in tables:
        raise StoreError(f"{store.path} is a DuckDB file, but not a store of flow records")
    rows = store.con.execute("SELECT value FROM meta WHERE key = 'schema'").fetchall()
    found = rows[0][0] if rows else "none"
    if found != str(SCHEMA_VERSION):
        raise StoreError(
            f"{store.path} has schema version {found}, this netflow writes {SCHEMA_VERSION}: "
            "give another --store, or use the netflow that wrote it"
        )


def begin_run(store: Store, now: int) -> int:
    """Note that a collector runs from now (ns); returns when the last one ended, or 0.

    A loss the last run left open ended, at the latest, with that run.
    """
    run, last = store.con.execute(
        "SELECT coalesce(max(id), 0) + 1, coalesce(epoch_ns(max(until)), 0) FROM runs"
    ).fetchall()[0]
    losses = store.con.execute("SELECT coalesce(max(id), 0) FROM losses").fetchall()[0][0]
    store.con.execute("BEGIN")
    store.con.execute(
        "UPDATE losses SET until = greatest(since, make_timestamp_ns(?)) WHERE until IS NULL",
        [last],
    )
    store.con.execute(
        "INSERT INTO runs VALUES ($1, make_timestamp_ns($2), make_timestamp_ns($2))", [run, now]
    )
    store.con.execute("COMMIT")
    store.run, store.losses = run, losses
    return int(last)


def commit(store: Store, flows: Columns | None, caught_up: int) -> None:
    """Write records, and that none is missing up to caught_up (ns). Durable on return."""
    store.con.execute("BEGIN")
    if flows is not None:
        store.con.register("batch", _as_times(flows, ("flow_start", "start", "end")))
        store.con.execute(_INSERT)
        store.con.unregister("batch")
    store.con.execute(
        "UPDATE runs SET until = greatest(until, make_timestamp_ns(?)) WHERE id = ?",
        [caught_up, store.run],
    )
    store.con.execute("COMMIT")


def open_loss(store: Store, since: int, what: str, events: int) -> int:
    """Note a loss that goes on; returns its id."""
    store.losses += 1
    store.con.execute(
        "INSERT INTO losses VALUES (?, ?, make_timestamp_ns(?), NULL, ?, ?)",
        [store.losses, store.run, since, what, events],
    )
    return store.losses


def close_loss(store: Store, loss: int, until: int, events: int) -> None:
    """Note that a loss is over, and how many events it cost."""
    store.con.execute(
        "UPDATE losses SET until = make_timestamp_ns(?), events = ? WHERE id = ?",
        [until, events, loss],
    )


def begin_live(store: Store) -> None:
    """Start the list of connections that live now, for recorded()."""
    store.con.execute(_LIVE_TABLE)


def add_live(store: Store, entries: Columns, before: int) -> None:
    """Add to that list those of a dump's entries that began before a time (ns)."""
    store.con.register("batch", _as_times(entries, ("start",)))
    store.con.execute(_LIVE, {"before": before})
    store.con.unregister("batch")


def recorded(store: Store) -> Columns:
    """What is stored of the listed connections: their sums and newest end. Drops the list."""
    sums: Columns = store.con.execute(_RECORDED).fetchnumpy()
    store.con.execute("DROP TABLE live")
    return {name: np.asarray(column) for name, column in sums.items()}


def first_run(con: duckdb.DuckDBPyConnection) -> int:
    """When the first collector began to write here (ns), 0 if none did."""
    sql = "SELECT coalesce(epoch_ns(min(since)), 0) FROM runs"
    return int(con.execute(sql).fetchall()[0][0])


def gaps(con: duckdb.DuckDBPyConnection, since: int, until: int, now: int) -> list[Gap]:
    """The spans in since..until whose records may be missing, in order of time.

    now is how far the running collector has come.
    """
    found: list[Gap] = []
    runs = con.execute("SELECT epoch_ns(since), epoch_ns(until) FROM runs ORDER BY id").fetchall()
    if runs:
        if since < runs[0][0]:
            found.append(Gap(since=since, until=runs[0][0], what="before-first"))
        for (_, ended), (began, _) in pairwise(runs):
            if ended < began:
                found.append(Gap(since=ended, until=began, what="not-running"))
    losses = con.execute(
        "SELECT epoch_ns(since), coalesce(epoch_ns(until), ?), what, events FROM losses", [now]
    ).fetchall()
    found += [Gap(since=a, until=max(a, b), what=what, events=n) for a, b, what, n in losses]
    touching = [gap for gap in found if gap.since <= until and gap.until >= since]
    return sorted(touching, key=lambda gap: gap.since)


def facts(con: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Counts for a status: records, losses and their events, oldest record's time (ns)."""
    records, oldest = con.execute(
        "SELECT count(*), coalesce(epoch_ns(min(start_time)), 0) FROM flows"
    ).fetchall()[0]
    losses, events = con.execute(
        "SELECT count(*), coalesce(sum(events), 0)::UBIGINT FROM losses"
    ).fetchall()[0]
    return {"records": records, "oldest": oldest, "losses": losses, "events_lost": events}


def size(store: Store) -> int:
    """Bytes on disk, the write-ahead log included."""
    files = (store.path, store.path.with_name(store.path.name + ".wal"))
    return sum(file.stat().st_size for file in files if file.exists())


def select(
    con: duckdb.DuckDBPyConnection, sql: str, params: Mapping[str, Any] | Sequence[Any], step: int
) -> Iterator[list[tuple[Any, ...]]]:
    """Run one question on a cursor; its rows in lists of at most step.

    Raises StoreError when DuckDB gives up, for want of memory say.
    """
    try:
        answer = con.execute(sql, params)
        while rows := answer.fetchmany(step):
            yield rows
    except duckdb.Error as error:
        raise StoreError(str(error).splitlines()[0]) from None


def close(store: Store) -> None:
    """Write everything into the one file and close it."""
    store.con.execute("CHECKPOINT")
    store.con.close()


def _as_times(columns: Columns, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    times = {name: columns[name].view("datetime64[ns]") for name in names}
    return {**columns, **times}
