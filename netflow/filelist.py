"""``netflow history`` and ``netflow import``: files of closed records, for people."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from netflow.client import Answer, ClientError, Refused, give
from netflow.output import amount, new_table, print_table
from netflow.when import iso

_SHOWN = ("name", "node", "own", "hour", "since", "until", "records", "bytes", "sha256")


def show_files(answer: Answer, output: str) -> None:
    """Write the list to stdout."""
    made = (told(dict(zip(answer.header.columns, row, strict=True))) for row in answer)
    if output == "json":
        print(json.dumps({"files": list(made)}, indent=1))
        return
    if output == "csv":
        writer = csv.DictWriter(sys.stdout, [*_SHOWN, "bytes_per_record"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(made)
        return
    table = new_table()
    for title in ("HOUR", "NODE", "FILE"):
        table.add_column(title, no_wrap=True)
    for title in ("RECORDS", "BYTES", "PER RECORD"):
        table.add_column(title, justify="right", no_wrap=True)
    records = size = 0
    for file in made:
        records, size = records + file["records"], size + file["bytes"]
        hour = file["hour"][:13].replace("T", " ") + " UTC"
        counts = (str(file["records"]), amount(file["bytes"]), str(file["bytes_per_record"]))
        table.add_row(hour, file["node"], file["name"], *counts)
    each = f"{size / records:.1f}" if records else ""
    table.add_row("all", "", "", str(records), amount(size), each, style="bold")
    print_table(table)


def told(file: dict[str, Any]) -> dict[str, Any]:
    """A file as users see it: times as ISO 8601."""
    times = {key: iso(file[key]) for key in ("hour", "since", "until")}
    each = round(file["bytes"] / file["records"], 1) if file["records"] else None
    return {**file, **times, "bytes_per_record": each}


def take_in(paths: tuple[Path, ...], socket: Path) -> int:
    """Give each file to the collector and say what became of it; returns the exit code."""
    found = failed = 0
    for path in _files(paths):
        found += 1
        try:
            with path.open("rb") as file:
                told = give(socket, file.fileno())
        except OSError as error:
            failed += 1
            print(f"netflow: {path}: {error.strerror}", file=sys.stderr)
        except Refused as error:
            failed += 1
            print(f"netflow: {path}: refused: {error}", file=sys.stderr)
        except ClientError as error:
            print(f"netflow: {error}", file=sys.stderr)
            return 1
        else:
            span = f"{iso(told['start'], 0)} to {iso(told['end'], 0)}"
            what = f"{told['records']} records of {told['node']}, {span}"
            print(f"{path}: {what}" if told["new"] else f"{path}: here already: {told['name']}")
    if not found:
        print("netflow: there is no .parquet file there", file=sys.stderr)
    return 1 if failed or not found else 0


def _files(paths: tuple[Path, ...]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*.parquet") if not p.name.startswith("."))
        else:
            yield path
