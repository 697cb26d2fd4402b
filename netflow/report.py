"""``netflow report``: what a slice did in a period, as one page without network requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from netflow import shapes
from netflow.client import asking
from netflow.shapes import Shape
from netflow.wire import (
    Coverage,
    Filter,
    Header,
    Question,
    Scans,
    Series,
    Spoofed,
    Top,
    Trailer,
)

MOST = 20
"""Lines of a table."""


@dataclass(frozen=True)
class Part:
    """One question's answer, rows as users see them."""

    shape: Shape
    header: Header
    rows: list[dict[str, Any]]
    trailer: Trailer


@dataclass(frozen=True)
class Facts:
    """What a report says. parts by name; spoofed has the guard's events, too."""

    slice: str
    header: Header
    parts: dict[str, Part] = field(default_factory=dict)


def gather(socket: Path, name: str, asked: Filter) -> Facts:
    """Ask all that a report of a slice needs. Raises ClientError."""
    its = msgspec.structs.replace(asked, slices=[name])
    questions: dict[str, tuple[Question, Shape]] = {
        "series": (Series(filter=its), shapes.SERIES),
        "sums": (Top(filter=its, limit=0), shapes.top("slice", False)),
        "peers": (Top(filter=its, of="peer", limit=MOST), shapes.top("peer", False)),
        "ports": (Top(filter=its, of="port", limit=MOST), shapes.top("port", False)),
        "scans": (Scans(filter=its, limit=MOST), shapes.SCANS),
        "spoofed": (Spoofed(filter=its, limit=MOST), shapes.SPOOFED),
        "coverage": (Coverage(filter=asked), shapes.COVERAGE),
    }
    parts = {}
    for key, (question, shape) in questions.items():
        with asking(socket, question) as answer:
            rows = [shape.made(answer.header.columns, row) for row in answer]
        parts[key] = Part(shape, answer.header, rows, answer.trailer)
    return Facts(name, parts["series"].header, parts)
