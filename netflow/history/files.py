"""Files of closed records on disk: their names, how one is made whole, what it says of itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netflow.history.schema import (
    KEY,
    LAST,
    OPTIONS,
    READ,
    WRITE,
    Told,
    columns_differ,
    decode,
    encode,
)
from netflow.when import HOUR, SECOND

if TYPE_CHECKING:
    import duckdb

DRAFT = ".new-"
"""How names of files begin that are not whole yet."""
_CHUNK = 1 << 20


class FileError(Exception):
    """A file cannot be taken for records; the message says why."""


def directory(store: Path) -> Path:
    """Where a store's files are."""
    return store / "history"


def name_of(told: Told, number: int) -> str:
    """``2026-03-01/03-node-17.parquet``, relative to the history directory; the hour is UTC."""
    hour = datetime.fromtimestamp(told.hour * HOUR // SECOND, UTC)
    return f"{hour:%Y-%m-%d}/{hour:%H}-{told.node}-{number}.parquet"


def free_name(root: Path, told: Told, taken: set[str]) -> str:
    """A name for the file that no file has."""
    number = told.segment
    while (name := name_of(told, number)) in taken or (root / name).exists():
        number += 1
    return name


def drafts(root: Path) -> Iterator[Path]:
    """Files whose making was cut short."""
    return root.rglob(f"{DRAFT}*")


def present(root: Path) -> dict[str, int]:
    """Name and bytes of each file that is there, whole as far as its name says."""
    return {
        str(path.relative_to(root)): path.stat().st_size
        for path in sorted(root.glob("*/*.parquet"))
        if not path.name.startswith(DRAFT)
    }


def write(con: duckdb.DuckDBPyConnection, root: Path, segment: int, told: Told, name: str) -> str:
    """Write a segment's records into a file, durable on return; returns its SHA-256.

    Raises OSError and duckdb.Error; then there is no file of that name.
    """
    path = root / name
    draft = path.with_name(DRAFT + path.name)
    _make_directory(path.parent, root)
    try:
        con.execute(
            f"COPY ({WRITE.format(segment=f'flows_{segment}')}) TO $file"
            f" ({OPTIONS}, KV_METADATA {{{KEY}: $told}})",
            {"file": str(draft), "told": encode(told), "node": told.node, "domain": told.domain},
        )
        digest = put(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return digest


def put(draft: Path, path: Path) -> str:
    """Make a written draft durable under its name; returns its SHA-256."""
    digest = hashlib.sha256()
    with draft.open("rb") as file:
        os.fchmod(file.fileno(), 0o640)
        while part := file.read(_CHUNK):
            digest.update(part)
        os.fsync(file.fileno())
    draft.rename(path)
    sync(path.parent)
    return digest.hexdigest()


def sync(where: Path) -> None:
    """Make a directory's entries durable."""
    handle = os.open(where, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_directory(where: Path, root: Path) -> None:
    for path in (root, where):
        if not path.exists():
            path.mkdir(mode=0o750, exist_ok=True)
            sync(path.parent)


def copy_in(source: int, root: Path) -> tuple[Path, str, int]:
    """Copy an open file into a draft; returns it, its SHA-256 and its bytes. Raises OSError."""
    _make_directory(root, root)
    draft = root / f"{DRAFT}import-{os.getpid()}-{source}-{os.urandom(4).hex()}"
    digest, size = hashlib.sha256(), 0
    try:
        with draft.open("wb") as out:
            while part := os.pread(source, _CHUNK, size):
                out.write(part)
                digest.update(part)
                size += len(part)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return draft, digest.hexdigest(), size


def move_in(draft: Path, root: Path, name: str) -> None:
    """Put a copied draft in its place, durable on return."""
    path = root / name
    _make_directory(path.parent, root)
    put(draft, path)


def digest_of(path: Path) -> str:
    """A file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(con: duckdb.DuckDBPyConnection, path: Path) -> Told:
    """What a file says of itself, and that its columns and count are as it says.

    Reads no records. Raises FileError.
    """
    import duckdb

    try:
        keys: list[Any] = con.execute(
            "SELECT value FROM parquet_kv_metadata(?) WHERE key = ?", [str(path), KEY.encode()]
        ).fetchall()
        if not keys:
            raise FileError("it is Parquet, but not written by netflow: its description is missing")
        told = decode(keys[0][0])
        columns = con.execute("DESCRIBE SELECT * FROM read_parquet(?)", [str(path)]).fetchall()
        if why := columns_differ(told.schema, columns):
            raise FileError(why)
        rows = con.execute("SELECT num_rows FROM parquet_file_metadata(?)", [str(path)]).fetchall()
    except duckdb.Error as error:
        raise FileError(str(error).splitlines()[0]) from None
    except ValueError as error:
        raise FileError(str(error)) from None
    if rows[0][0] != told.records:
        raise FileError(f"it has {rows[0][0]} records, and says {told.records}")
    return told


MOST = 1 << 56
"""Packets or bytes each way of a whole file: more than a link of 100 Tbit/s carries in an hour.
So the sums of 256 files fit 64 bits."""
_TIMES = ("flow_start", "start_time", "end_time")
_COUNTERS = ("opackets", "obytes", "rpackets", "rbytes")
_ALWAYS = (
    "node", "domain", *_TIMES, "proto", "reason", "tcp_state", "src_hi", "src_lo", "dst_hi",
    "dst_lo", "sport", "dport", *_COUNTERS, "oxid", "rxid",
)  # fmt: skip
# Everything that a question may compute of a record is computed here: what cannot be
# fails now, and not whoever asks about the period later.
_CHECK = f"""
SELECT count(*), least({", ".join(f"count({c})" for c in _ALWAYS)}),
    coalesce(bool_and(node = $node AND domain = $domain), true),
    epoch_ns(least(min(start_time), min(end_time))) // 1000000,
    epoch_ns(greatest(max(start_time), max(end_time))) // 1000000,
    coalesce(least({", ".join(f"epoch_ns(min({c}))" for c in _TIMES)}) >= 0
        AND greatest({", ".join(f"epoch_ns(max({c}))" for c in _TIMES)}) < {LAST}, true),
    coalesce(greatest({", ".join(f"sum({c})" for c in _COUNTERS)}) < {MOST}, true),
    bit_xor(hash(f))
FROM ({{records}}) f
"""  # noqa: S608 - names of ours


def check(con: duckdb.DuckDBPyConnection, path: Path, told: Told) -> None:
    """Read all of a file, and that its records are as it says. Raises FileError."""
    import duckdb

    asked = {"file": str(path), "node": told.node, "domain": told.domain}
    records = READ[told.schema].format(files="$file::VARCHAR")
    try:
        [(count, filled, ours, start, end, timely, counted, _)] = con.execute(
            _CHECK.format(records=records), asked
        ).fetchall()
    except duckdb.Error as error:
        raise FileError(f"its records cannot be read: {str(error).splitlines()[0]}") from None
    if filled != count:
        raise FileError("it has records without a value where there always is one")
    if not ours:
        raise FileError(f"it has records that are not of node {told.node}")
    if count and (start, end) != (told.start // 1_000_000, told.end // 1_000_000):
        raise FileError("its records are not of the time that it says")
    if not timely:
        raise FileError("it has records of a time that cannot be")
    if not counted:
        raise FileError("its records count more than any link carries")
