"""``netflow top -f``: sums again and again."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from netflow.client import asking
from netflow.output import gaps_json, print_table, say_gaps
from netflow.shapes import Shape
from netflow.when import SECOND

if TYPE_CHECKING:
    from rich.table import Table

    from netflow.client import Plain


def show(socket: Path, ask: Callable[[], Plain], shape: Shape, follow: int, output: str) -> None:
    """Ask and show, again after that time (ns), until interrupted. Raises ClientError."""
    if output == "table" and sys.stdout.isatty():
        from rich.live import Live

        with Live(auto_refresh=False, screen=False) as screen:
            _repeat(socket, ask, shape, follow, output, lambda t: screen.update(t, refresh=True))
        return
    _repeat(socket, ask, shape, follow, output, print_table)


def _repeat(
    socket: Path,
    ask: Callable[[], Plain],
    shape: Shape,
    follow: int,
    output: str,
    put: Callable[[Table], None],
) -> None:
    told: set[tuple[str, int]] = set()
    while True:
        with asking(socket, ask()) as answer:
            rows = [shape.made(answer.header.columns, row) for row in answer]
        if output == "json":
            whole = {
                **gaps_json(answer.header),
                shape.key: rows,
                "more": answer.trailer.more,
                "total": answer.trailer.total,
            }
            print(json.dumps(whole), flush=True)
        else:
            put(shape.table(answer.header, rows, answer.trailer))
        # While following, a gap is news once; the hour's edge moves on by itself.
        began = answer.header.since
        gaps = {(g.what, g.since if g.since > began else 0): g for g in answer.header.gaps}
        if output != "json" and (news := [g for key, g in gaps.items() if key not in told]):
            say_gaps(replace(answer.header, gaps=news))
        told |= gaps.keys()
        time.sleep(follow / SECOND)
