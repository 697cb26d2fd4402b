"""The figures of bench_start.py as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOAL = 150


def start(source: Path, table: Any) -> str:
    """How long each command takes, and its ratio to Python's own start."""
    ways: list[dict[str, Any]] = json.loads(source.read_text(encoding="ascii"))
    rows = [[f"`{way['way']}`", f"{way['ms']:.0f} ms", f"{way['ratio']:.2f}"] for way in ways]
    [vnet] = [way["ms"] for way in ways if way["way"] == "vnet --help"]
    verdict = "reached" if vnet < GOAL else "**not reached**"
    return "\n".join(
        [
            table(["", "median", "ratio"], rows),
            table(
                ["", "measured", "goal", ""],
                [["`vnet --help`", f"{vnet:.0f} ms", f"{GOAL} ms", verdict]],
            ),
        ]
    )
