"""Answers to stdout or a file: tables, JSON, JSON lines, CSV, Parquet.

Gaps are always said: in the JSON and in Parquet's metadata, else on stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from netflow.client import Answer, asking
from netflow.output import gaps_json, print_table, say_gaps
from netflow.shapes import KINDS, Shape

if TYPE_CHECKING:
    from netflow.client import Plain

_TYPES = {
    "time": "TIMESTAMP_NS", "int": "UINTEGER", "count": "UBIGINT", "real": "DOUBLE",
    "bool": "BOOLEAN", "text": "VARCHAR",
}  # fmt: skip


@dataclass(frozen=True)
class How:
    """How an answer is wanted: the form, the file it goes to (None: stdout), and whether a long
    table may go through a pager.
    """

    output: str = "table"
    file: Path | None = None
    pager: bool = True


class ShowError(Exception):
    """The answer cannot be written as asked; the message says what to do."""


def show(socket: Path, request: Plain, shape: Shape, how: How) -> None:
    """Ask, and write the answer. Raises ClientError, ShowError, OSError for the file."""
    if how.output == "parquet" and how.file is None and sys.stdout.isatty():
        raise ShowError("Parquet is not for terminals: give a file with -O, or redirect")
    with patience() as through, asking(socket, request) as answer:
        rows = (shape.made(answer.header.columns, row) for row in answer)
        if how.output == "table":
            made = list(rows)
            through()
            with written(how.file) as out:
                _table(answer, made, shape, how, out)
            return
        first = next(rows, None)
        through()
        all_rows = iter(()) if first is None else _chain(first, rows)
        with written(how.file) as out:
            _WRITERS[how.output](answer, all_rows, shape, out)
        if how.output != "json":
            say(answer, shape)


def _chain(first: dict[str, Any], rest: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from rest


def say(answer: Answer, shape: Shape) -> None:
    """On stderr: gaps, notes, and that there is more."""
    more = "only the newest are shown: --limit 0 shows all"
    if shape.key != "records":
        more = "there are more: -n 0 shows all"
    say_gaps(answer.header, more if answer.trailer.more else "")
    for note in answer.trailer.notes:
        print(f"netflow: {note}", file=sys.stderr)


# -- forms -----------------------------------------------------------------------------------


def _table(answer: Answer, made: list[dict[str, Any]], shape: Shape, how: How, out: TextIO) -> None:
    table = shape.table(answer.header, made, answer.trailer)
    if made or shape.key == "records" or shape.total:
        print_table(table, out, how.pager and how.file is None)
    else:
        print("netflow: nothing matches", file=sys.stderr)
    say(answer, shape)


def _json(answer: Answer, rows: Iterator[dict[str, Any]], shape: Shape, out: TextIO) -> None:
    # One object, written as the rows come: it may be long.
    head = json.dumps(gaps_json(answer.header))
    out.write(f'{head[:-1]}, "{shape.key}": [')
    separator = "\n"
    for made in rows:
        out.write(separator + json.dumps(made))
        separator = ",\n"
    rest = {"more": answer.trailer.more}
    out.write(f"\n], {json.dumps(rest | extras(answer))[1:]}\n")


def extras(answer: Answer) -> dict[str, Any]:
    """What an answer has besides rows: only what there is."""
    trailer = answer.trailer
    found = {"total": trailer.total, "notes": trailer.notes}
    return {key: value for key, value in found.items() if value}


def _ndjson(_answer: Answer, rows: Iterator[dict[str, Any]], _shape: Shape, out: TextIO) -> None:
    for made in rows:
        out.write(json.dumps(made) + "\n")


def _csv(_answer: Answer, rows: Iterator[dict[str, Any]], shape: Shape, out: TextIO) -> None:
    import csv

    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(shape.columns)
    for made in rows:
        flat = shape.flat(made)
        cells = (flat.get(key) for key in shape.columns)
        writer.writerow(["" if cell is None else cell for cell in cells])


def _parquet(answer: Answer, rows: Iterator[dict[str, Any]], shape: Shape, out: TextIO) -> None:
    """By DuckDB, which reads the rows as JSON lines: it takes any number of them."""
    from tempfile import TemporaryDirectory

    import duckdb

    kinds = {key: KINDS.get(key, "text") for key in shape.columns}
    read = {key: "VARCHAR" if k == "time" else _TYPES[k] for key, k in kinds.items()}
    with TemporaryDirectory(prefix="netflow-") as place:
        lines, made = Path(place, "rows.ndjson"), Path(place, "rows.parquet")
        with lines.open("w") as file:
            for row in rows:
                flat = shape.flat(row)
                json.dump({key: _untimed(flat.get(key), kinds[key]) for key in kinds}, file)
                file.write("\n")
        columns = ", ".join(f'"{key}"::{_TYPES[k]} AS "{key}"' for key, k in kinds.items())
        with duckdb.connect() as con:
            types = ", ".join(f"'{key}': '{kind}'" for key, kind in read.items())
            source = f"read_json($lines, format='newline_delimited', columns={{{types}}})"
            if not lines.stat().st_size:
                nothing = ", ".join(f'NULL::{_TYPES[k]} AS "{key}"' for key, k in kinds.items())
                query = f"SELECT {nothing} WHERE $lines IS NULL"
            else:
                query = f"SELECT {columns} FROM {source}"  # noqa: S608 - columns are ours
            con.execute(
                f"COPY ({query}) TO $made (FORMAT parquet, COMPRESSION zstd,"
                " KV_METADATA {netflow: $about})",
                {
                    "lines": str(lines),
                    "made": str(made),
                    "about": json.dumps({**gaps_json(answer.header), **extras(answer)}),
                },
            )
        out.flush()
        with made.open("rb") as file:
            while part := file.read(1 << 20):
                out.buffer.write(part)


def _untimed(value: Any, kind: str) -> Any:
    return value.rstrip("Z") if kind == "time" and value is not None else value


_WRITERS = {"json": _json, "ndjson": _ndjson, "csv": _csv, "parquet": _parquet}


# -- where to ------------------------------------------------------------------------------


@contextmanager
def written(file: Path | None) -> Iterator[TextIO]:
    """stdout, or a file that is there whole or not at all: of the mode it had, or nobody's but
    its owner's and group's, since flows are not for everybody.
    """
    if file is None:
        yield sys.stdout
        return
    # A device or a pipe is written to as it is.
    if file.exists() and not file.is_file():
        with file.open("w") as out:
            yield out
        return
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640), "w") as out:
            if file.exists():
                draft.chmod(file.stat().st_mode & 0o777)
            yield out
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def patience(seconds: float = 2.0) -> Iterator[Any]:
    """On a terminal, say that an answer is being made if it takes longer. Gives a function to
    call once it is there.
    """
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from threading import Event, Thread

    here = Event()

    def wait() -> None:
        if here.wait(seconds):
            return
        from rich.console import Console

        with Console(stderr=True).status("the collector is looking through the records ..."):
            here.wait()

    thread = Thread(target=wait, daemon=True)
    thread.start()

    def through() -> None:
        here.set()
        thread.join()

    try:
        yield through
    finally:
        through()
