"""The section of docs/benchmarks.md about questions over a month of records; see report.py.

Input is bench_history.py's file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from report import table

WHO, SERIES = "who --to ADDR:PORT --at T", "series of a slice, a day by the minute"


def history(source: Path) -> str:
    """How long questions take, and what they take of memory, beside nfdump."""
    data: dict[str, Any] = json.loads(source.read_text(encoding="ascii"))
    ours: dict[str, dict[str, float]] = data["ours"]
    columns = ["the command, from start to end", "median", "least", "processor time", "rows"]
    goals = [
        [f"`{WHO}`", _ms(ours[WHO]["wall"]), "below 100 ms", ours[WHO]["wall"] < 0.1],
        [SERIES, _ms(ours[SERIES]["wall"]), "below 500 ms", ours[SERIES]["wall"] < 0.5],
        ["the collector's memory, all questions", f"{data['peak_mb']:.0f} MB", "below 512 MB",
         data["peak_mb"] < 512],
    ]  # fmt: skip
    commits = data["commits"]
    parts = [
        f"`tools/bench --history`, {data['records']:,} records of {data['days']:.0f} days in"
        f" {data['files']} files, {data['bytes_a_record']:.1f} bytes each; on two processors with"
        f" a load of {data['load']:.1f}\n",
        table(
            ["", "measured", "goal", ""],
            [[*map(str, g[:3]), "reached" if g[3] else "not reached"] for g in goals],
        ),
        table(columns, _rows(ours)),
        f"Commits of 16,384 records: {_ms(commits['alone'])} while nobody asks,"
        f" {_ms(commits['beside'])} while a question reads a third of all files (median of"
        f" {commits['commits']}; the longest {_ms(commits['longest'])}).\n",
    ]
    if "theirs" in data:
        parts += [
            f"nfdump, {data['peer_records']:,} of the same records, IPv4 only:\n",
            table(columns, _rows(data["theirs"])),
        ]
    return "\n".join(parts)


def _rows(questions: dict[str, dict[str, float]]) -> list[list[str]]:
    return [
        [name, _ms(took["wall"]), _ms(took["least"]), _ms(took["cpu"]), f"{took['rows']:,.0f}"]
        for name, took in questions.items()
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"
