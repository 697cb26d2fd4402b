"""The figures of bench_export.py as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOAL = 250_000


def export(source: Path, table: Any) -> str:
    """How many records a second are encoded and arrive, and what a million cost."""
    data: dict[str, Any] = json.loads(source.read_text(encoding="ascii"))
    names = {
        "encode 1400": "encoding only, messages of 1400 bytes",
        "encode 65535": "encoding only, messages of 65535 bytes",
        "tcp, hot": "collector to receiver over TCP, hot records",
        "tcp, from files": "collector to receiver over TCP, from files",
        "udp, to nfcapd": "collector to nfcapd over UDP, with the default --rate",
    }
    rows = []
    for way in data["ways"]:
        million = 1e6 / way["records"]
        rows.append(
            [
                names[way["way"]],
                f"{way['rate']:,.0f}",
                f"{way['exporter'] * million:.2f}",
                f"{way['collector'] * million:.2f}" if "collector" in way else "",
                f"{way['megabytes']:.0f} MB" if "megabytes" in way else "",
                f"{way['stored']:,} of {way['records']:,}" if "stored" in way else "all",
            ]
        )
    slowest = min(way["rate"] for way in data["ways"] if way["way"].startswith("encode"))
    verdict = "reached" if slowest >= GOAL else "not reached"
    columns = ["", "records/s", "CPU s a million", "of the collector", "memory", "arrived"]
    return "\n".join(
        [
            f"`tools/bench --export`, {data['records']:,} records of the benchmark mix\n",
            table(columns, rows),
            table(
                ["", "measured", "goal", ""],
                [["records encoded in a second", f"{slowest:,.0f}", f"{GOAL:,}", verdict]],
            ),
        ]
    )
