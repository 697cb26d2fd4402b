"""The figures of bench_ingest.py as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def ingest(source: Path, table: Any, number: Any) -> str:
    """How many records become durable, beside nfcapd, as measured on the kernel here."""
    data: dict[str, Any] = json.loads(source.read_text(encoding="ascii"))
    ways: dict[str, dict[str, Any]] = data["ways"]
    peer = ways["nfcapd"]
    names = {
        "decoded": "netflow, from decoded events",
        "decoded, followed": "the same, while `netflow export` follows",
        "paced, followed": "the same, at 250,000 a second",
        "events": "netflow, from the socket",
        "events, followed": "the same, while `netflow export` follows",
        "nfcapd": "nfcapd, NetFlow 9",
    }
    rows = [
        [
            names[key],
            number(way["rate"]),
            f"{way['rate'] / peer['rate']:.2f}",
            f"{way['cpu_a_million']:.2f}",
            f"{way['cpu_a_million'] / peer['cpu_a_million']:.1f}",
            f"{way['megabytes']:.0f} MB",
        ]
        for key, way in ways.items()
    ]
    rate, followed = ways["decoded"]["rate"], ways["decoded, followed"]["rate"]
    memory = max(way["megabytes"] for key, way in ways.items() if key != "nfcapd")
    goals = [
        ["from decoded events to durable", number(rate), "250,000", rate >= 250_000],
        ["while an exporter follows", number(followed), "250,000", followed >= 250_000],
        ["memory", f"{memory:.0f} MB", "below 400 MB", memory < 400],
    ]
    followed_ways = {
        "decoded, followed": ("decoded", "from decoded events"),
        "paced, followed": ("decoded", "from decoded events, at 250,000 a second"),
        "events, followed": ("events", "from the socket"),
    }
    exports = []
    for key, (alone, name) in followed_ways.items():
        way, export = ways[key], ways[key]["export"]
        exports.append(
            [
                name,
                f"{way['rate'] / ways[alone]['rate']:.2f}",
                f"{export['behind'] / way['rate']:.1f} s",
                f"{export['after']:.1f} s",
                f"{export['cpu'] / way['records'] * 1e6:.2f}",
            ]
        )
    columns = ["", "records/s", "of nfcapd", "CPU s a million", "of nfcapd", "memory"]
    return "\n".join(
        [
            f"`tools/bench --ingest`, {data['flows']:,} connections, on two processors that the"
            " senders share\n",
            table(columns, rows),
            table(
                [
                    "while `netflow export` follows",
                    "of the rate without",
                    "behind at the end",
                    "all has arrived after",
                    "its CPU s a million",
                ],
                exports,
            ),
            table(
                ["", "measured", "goal", ""],
                [[*map(str, g[:3]), "reached" if g[3] else "not reached"] for g in goals],
            ),
        ]
    )
