"""The database of an open store, and how work in it is all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypeVar

import duckdb
import numpy as np
from numpy.typing import NDArray

from netflow.node import Node

PATIENCE = 30.0
"""Seconds the writer waits for memory that questions use. Such a question fails as soon as there
is none left, so that in truth it is a moment."""
# How DuckDB says so at COMMIT, whose errors have a class of their own.
_NO_MEMORY = (
    "could not allocate block of size",
    "failed to allocate data of size",
    "failed to offload data block of size",
    "failed to pin block of size",
    "failed to reserve memory data of size",
)
DATABASE = "flows.duckdb"

Columns = Mapping[str, NDArray[Any]]
T = TypeVar("T")


class StoreError(Exception):
    """The store cannot be used; the message says what to do."""


class DamagedError(StoreError):
    """The database is not one that DuckDB can read."""


@dataclass
class Segment:
    """The table that is written to. rows: how many it has."""

    id: int
    hour: int
    rows: int


@dataclass
class Store:
    """An open store and the run of the collector that writes to it.

    Segments with a number below ``floor`` are written to no more.
    """

    con: duckdb.DuckDBPyConnection
    path: Path
    node: Node
    id: str = ""
    run: int = 0
    losses: int = 0
    segment: Segment | None = None
    floor: int = 1


def patiently(job: Callable[[], T]) -> T:
    """Do something in the store; once more while questions have all memory, PATIENCE s at most.

    They have theirs from the same pool. What is done has to be all or nothing, or to begin anew.
    """
    deadline = monotonic() + PATIENCE
    while True:
        try:
            return job()
        except (duckdb.OutOfMemoryException, duckdb.TransactionException) as error:
            if not _lacks_memory(error) or monotonic() > deadline:
                raise
            sleep(0.05)


def _lacks_memory(error: duckdb.Error) -> bool:
    return isinstance(error, duckdb.OutOfMemoryException) or any(
        words in str(error) for words in _NO_MEMORY
    )


@contextmanager
def transaction(con: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """All or nothing, durable at the end."""
    con.execute("BEGIN")
    try:
        yield
        con.execute("COMMIT")
    except BaseException:
        _rollback(con)
        raise


def _rollback(con: duckdb.DuckDBPyConnection) -> None:
    """End a transaction that failed; even this may have to wait for memory."""
    deadline = monotonic() + PATIENCE
    while True:
        try:
            con.execute("ROLLBACK")
            return
        except duckdb.OutOfMemoryException:
            if monotonic() > deadline:
                return
            sleep(0.01)
        except duckdb.Error:
            return  # DuckDB has ended the transaction itself


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
    except duckdb.OutOfMemoryException:
        raise StoreError(
            "the answer takes more memory than questions are given: ask about a shorter time, or "
            "for fewer rows (--limit, -n)"
        ) from None
    except duckdb.Error as error:
        raise StoreError(str(error).splitlines()[0]) from None


def close(store: Store) -> None:
    """Write everything into the one file and close it."""
    store.con.execute("CHECKPOINT")
    store.con.close()


def size(store: Store) -> int:
    """Bytes on disk of the database, the write-ahead log included."""
    found = 0
    for file in (store.path / DATABASE, store.path / f"{DATABASE}.wal"):
        with suppress(FileNotFoundError):  # a checkpoint takes the log away
            found += file.stat().st_size
    return found


def fetch(store: Store, sql: str) -> Columns:
    """The rows of a question to the store, by columns."""
    found: Columns = store.con.execute(sql).fetchnumpy()
    return {name: np.asarray(column) for name, column in found.items()}


def as_times(columns: Columns, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The columns, with those of the names as DuckDB's times."""
    times = {name: columns[name].view("datetime64[ns]") for name in names}
    return {**columns, **times}
