"""The answer to somebody who follows the records: a line that describes columns, and columns.

Not rows of JSON: a follower takes every record there is, and writing them out
as text would cost the collector more than collecting them.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import time_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from netflow import names
from netflow.history import reading
from netflow.history.after import Found
from netflow.history.after import after as read
from netflow.wire import After, Chunk, encode

if TYPE_CHECKING:
    import duckdb


def after(con: duckdb.DuckDBPyConnection, asked: After, known: names.Names) -> Iterator[bytes]:
    """The parts of the answer. Raises ValueError and StoreError before the first."""
    with reading(con):
        found = read(con, asked)
    columns = {
        name: np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("<"))
        for name, column in found.columns.items()
    }
    chunk = Chunk(
        position=found.position,
        node=found.node,
        domain=found.domain,
        rows=found.rows,
        columns=[(name, f"<{c.dtype.kind}{c.dtype.itemsize}") for name, c in columns.items()],
        names=_names(found, names.tenures(known, time_ns())),
        skipped=found.skipped,
        again=found.again,
    )
    yield encode(chunk)
    for column in columns.values():
        yield column.tobytes()


def _names(found: Found, tenures: dict[str, list[Any]]) -> list[tuple[int, str, int, int, int]]:
    """The tenures that may name one of the records."""
    if not found.rows:
        return []
    there = {int(xid) for side in ("oxid", "rxid") for xid in np.unique(found.columns[side])}
    first, last = int(found.columns["start_time"].min()), int(found.columns["end_time"].max())
    return [
        (xid, name, before, since, until)
        for xid, name, before, since, until in zip(*tenures.values(), strict=True)
        if xid in there and until > first and since <= last
    ]
