"""Segments: the tables that hot records are in, and when the next one begins."""

from __future__ import annotations

import os

import duckdb

from netflow import migrate
from netflow.store.database import Segment, Store
from netflow.when import HOUR

SEGMENT_ROWS = int(os.environ.get("NETFLOW_SEGMENT_ROWS", 2_000_000))
"""A fuller segment is closed before its hour is over: it bounds what closing one takes."""


def find_segment(store: Store) -> None:
    """Go on with the newest segment, if this node made it."""
    newest = store.con.execute(
        "SELECT id, hour, node FROM segments ORDER BY id DESC LIMIT 1"
    ).fetchall()
    past = store.con.execute(
        "SELECT coalesce(max(segment), 0) FROM (SELECT segment FROM files WHERE store = ?"
        " UNION ALL SELECT value::UINTEGER FROM meta WHERE key = 'segment')",
        [store.id],
    ).fetchall()
    store.floor = max(past[0][0], newest[0][0] if newest else 0) + 1
    if newest and newest[0][2] == store.node.name:
        number, hour, _ = newest[0]
        rows = store.con.execute(f"SELECT count(*) FROM flows_{number}").fetchall()[0][0]  # noqa: S608
        store.segment, store.floor = Segment(number, hour, rows), number


def hot_segments(con: duckdb.DuckDBPyConnection) -> list[tuple[int, int, str, int]]:
    """Number, hour, node and domain of each segment, oldest first."""
    return con.execute("SELECT id, hour, node, domain FROM segments ORDER BY id").fetchall()


def segment_for(store: Store, now: int, rows: int) -> int:
    """The number of the segment that rows written at this time (ns) go to.

    Called within the transaction that writes them; it may make the segment.
    """
    roll(store, now)
    if store.segment is None:
        number = store.floor
        store.con.execute(migrate.SEGMENT.format(id=number))
        store.con.execute(
            "INSERT INTO segments VALUES (?, ?, ?, ?)",
            [number, now // HOUR, store.node.name, store.node.domain],
        )
        store.segment = Segment(number, now // HOUR, 0)
    store.segment.rows += rows
    return store.segment.id


def roll(store: Store, now: int) -> None:
    """Write no more to a segment that is full or whose hour is over; then it can become a file."""
    current = store.segment
    if current and (current.hour != now // HOUR or current.rows >= SEGMENT_ROWS):
        store.segment, store.floor = None, current.id + 1
