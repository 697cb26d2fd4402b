"""Taking in a file of another node, or one's own back."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from netflow import store
from netflow.history import files, manifest
from netflow.history.schema import Told
from netflow.store import Store

if TYPE_CHECKING:
    import duckdb

_one_at_a_time = threading.Lock()


def take(kept: Store, con: duckdb.DuckDBPyConnection, source: int) -> dict[str, Any]:
    """Copy an open file into the history and list it; con is the caller's own cursor.

    The same file again changes nothing (``"new": False``). Raises FileError
    for what is no file of records, or contradicts one that is here, and
    StoreError where the store cannot take it; then nothing is changed.
    """
    root = files.directory(kept.path)
    with _one_at_a_time:
        try:
            draft, digest, size = files.copy_in(source, root)
        except OSError as error:
            raise store.StoreError(f"cannot copy it into {root}: {error.strerror}") from None
        try:
            told = files.describe(con, draft)
            fact = {"node": told.node, "records": told.records, "start": told.start,
                    "end": told.end, "bytes": size}  # fmt: skip
            here = con.execute("SELECT name FROM files WHERE sha256 = ?", [digest]).fetchall()
            if here:
                return {**fact, "name": here[0][0], "new": False}
            _contradicts(kept, con, told)
            files.check(con, draft, told)
            listed = {row[0] for row in con.execute("SELECT name FROM files").fetchall()}
            name = files.free_name(root, told, listed)
            files.move_in(draft, root, name)
            try:
                with store.transaction(con):
                    manifest.add(con, name, told, size, digest, kept.node.name)
                    manifest.hear(con, told)
            except BaseException:
                (root / name).unlink()
                raise
            return {**fact, "name": name, "new": True}
        except OSError as error:
            raise store.StoreError(f"cannot take it into {root}: {error.strerror}") from None
        finally:
            draft.unlink(missing_ok=True)


def _contradicts(kept: Store, con: duckdb.DuckDBPyConnection, told: Told) -> None:
    same = con.execute(
        "SELECT name FROM files WHERE store = ? AND segment = ?", [told.store, told.segment]
    ).fetchall()
    if same:
        raise files.FileError(f"{same[0][0]} holds the same records, and is another file")
    if told.store == kept.id:
        hot = {number for number, *_ in store.hot_segments(con)}
        if told.segment in hot:
            raise files.FileError("its records are in the database already")
