"""The store of flow records: hot ones in DuckDB, closed ones as Parquet beside it.

A directory: ``flows.duckdb`` and ``history/`` (netflow.history). One process
at a time can have the database open, so the collector answers all questions.

Hot records are in segments, a table each, made when an hour begins or when the
one before is full. Only the newest is written to; an older one becomes a file
and is dropped whole, in the transaction that lists the file. Nothing is ever
deleted row by row, which in DuckDB costs time and leaves the space in use.

database   the open database; transactions
opening    its schema, and where writing goes on
segments   the tables of hot records
records    writing records
room       whether the disk has any
runs       collectors' lives and losses
live       what is stored of connections that live
gaps       where records may be missing
"""

from netflow.store.database import (
    DATABASE,
    Columns,
    DamagedError,
    Segment,
    Store,
    StoreError,
    close,
    patiently,
    select,
    size,
    transaction,
)
from netflow.store.gaps import facts, gaps
from netflow.store.live import (
    ENDED,
    KEY,
    SHARES,
    add_live,
    begin_live,
    end_live,
    recorded,
    unfinished,
)
from netflow.store.opening import SCHEMA_VERSION, open_store
from netflow.store.records import commit
from netflow.store.room import ROOM, FullError, bound_spilling, free, has_room, is_full, spilt
from netflow.store.runs import (
    Mark,
    Run,
    begin_run,
    close_loss,
    end_run,
    first_run,
    last_run,
    note_loss,
    open_loss,
)
from netflow.store.segments import hot_segments, roll, segment_for

__all__ = [
    "DATABASE",
    "ENDED",
    "KEY",
    "ROOM",
    "SCHEMA_VERSION",
    "SHARES",
    "Columns",
    "DamagedError",
    "FullError",
    "Mark",
    "Run",
    "Segment",
    "Store",
    "StoreError",
    "add_live",
    "begin_live",
    "begin_run",
    "bound_spilling",
    "close",
    "close_loss",
    "commit",
    "end_live",
    "end_run",
    "facts",
    "first_run",
    "free",
    "gaps",
    "has_room",
    "hot_segments",
    "is_full",
    "last_run",
    "note_loss",
    "open_loss",
    "open_store",
    "patiently",
    "recorded",
    "roll",
    "segment_for",
    "select",
    "size",
    "spilt",
    "transaction",
    "unfinished",
]
