"""Opening a store: the database, its schema, and where writing goes on."""

from __future__ import annotations

from pathlib import Path

import duckdb

from netflow import migrate
from netflow.node import Node, this_node
from netflow.store.database import DATABASE, DamagedError, Store, StoreError, transaction
from netflow.store.room import bound_spilling
from netflow.store.segments import find_segment

SCHEMA_VERSION = 2

# What DuckDB says of a database that it may not read or cannot now, and of one that it has
# opened and cannot.
_REFUSED = (
    "Permission denied",
    "version number",
    "No space left",
    "quota exceeded",
    "Too many open files",
    "Cannot allocate memory",
)
_DAMAGE = "Corrupt database file", "Could not read"


def open_store(path: Path, node: Node | None = None, memory: str = "96MB") -> Store:
    """Open the store in a directory, or make it. Raises StoreError with the cure.

    memory bounds DuckDB's buffers; what does not fit goes to files beside the
    database. Raises DamagedError for a database that cannot be read, any block
    of it: met later, by a question or a commit, it could only be given up.
    """
    node = node or this_node()
    try:
        path.mkdir(mode=0o750, parents=True, exist_ok=True)
    except FileExistsError:
        raise StoreError(f"{path} is a file: a store is a directory, give that") from None
    except OSError as error:
        raise StoreError(f"cannot make {path}: {error.strerror}") from None
    con = _connect(path / DATABASE, memory)
    store = Store(con, path, node)
    try:
        _check_schema(store)
        _note_place(store)
        find_segment(store)
        _read_all(con)
    except BaseException as error:
        con.close()
        text = str(error)
        if isinstance(error, duckdb.Error) and any(word in text for word in _DAMAGE):
            raise _damaged(path / DATABASE, text) from None
        raise
    (path / DATABASE).chmod(0o640)
    return store


def _connect(database: Path, memory: str) -> duckdb.DuckDBPyConnection:
    try:
        con = duckdb.connect(str(database), config={"threads": 2, "memory_limit": memory})
    except (duckdb.Error, RuntimeError) as error:
        text = str(error).splitlines()[0]
        if "Could not set lock" in text:
            raise StoreError(f"{database} is in use by another collector: {text}") from None
        if any(word in text for word in _REFUSED):
            raise StoreError(f"cannot open the store {database}: {text}") from None
        raise _damaged(database, text) from None
    # A checkpoint holds up the collector for its length, and batches pass the
    # log by where they are large.
    con.execute("SET checkpoint_threshold = '64MB'")
    con.execute("SET preserve_insertion_order = false")
    con.execute("SET parquet_metadata_cache = true")
    bound_spilling(con, database.parent)
    return con


def _damaged(database: Path, text: str) -> DamagedError:
    return DamagedError(f"cannot read the store {database}: {text.splitlines()[0]}")


def _read_all(con: duckdb.DuckDBPyConnection) -> None:
    """Have DuckDB compare every block with its checksum; half a second for 2,000,000 records."""
    for (table,) in con.execute("SHOW TABLES").fetchall():
        con.execute(f"SELECT bit_xor(hash(t)) FROM {table} t").fetchall()  # noqa: S608


def _check_schema(store: Store) -> None:
    tables = {row[0] for row in store.con.execute("SHOW TABLES").fetchall()}
    if not tables:
        migrate.create(store.con, SCHEMA_VERSION)
        return
    database = store.path / DATABASE
    if "meta" not in tables:
        raise StoreError(f"{database} is a DuckDB file, but not a store of flow records")
    rows = store.con.execute("SELECT value FROM meta WHERE key = 'schema'").fetchall()
    found = rows[0][0] if rows else "none"
    if found == "1":
        migrate.from_1(store.con, store.node.name, store.node.domain)
    elif found != str(SCHEMA_VERSION):
        raise StoreError(
            f"{database} has schema version {found}, this netflow writes {SCHEMA_VERSION}: "
            "give another --store, or use the netflow that wrote it"
        )


def _note_place(store: Store) -> None:
    """Keep who and where we are beside the records: questions know nothing but the database."""
    facts = {"node": store.node.name, "history": str((store.path / "history").absolute())}
    with transaction(store.con):
        for key, value in facts.items():
            store.con.execute("DELETE FROM meta WHERE key = ?", [key])
            store.con.execute("INSERT INTO meta VALUES (?, ?)", [key, value])
    store.id = store.con.execute("SELECT value FROM meta WHERE key = 'store'").fetchall()[0][0]
