"""``netflow top``: sums by slice, once or again and again."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netflow.client import asking
from netflow.output import amount, gaps_json, new_table, print_table, say_gaps
from netflow.when import SECOND, iso
from netflow.wire import Filter, Header, Top, Trailer

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = ["slice", "xid", "out_bytes", "in_bytes", "out_packets", "in_packets", "flows"]


def show(
    socket: Path,
    filter_now: Callable[[], Filter],
    by: Any,
    number: int,
    follow: int | None,
    output: str,
) -> None:
    """Ask and show; with follow (ns) again after that time, until interrupted.

    Raises ClientError.
    """
    live: Callable[[Table], None] = print_table
    if follow is not None and output == "table" and sys.stdout.isatty():
        from rich.live import Live

        with Live(auto_refresh=False, screen=False) as screen:
            _repeat(
                socket,
                filter_now,
                by,
                number,
                follow,
                output,
                lambda t: screen.update(t, refresh=True),
            )
        return
    _repeat(socket, filter_now, by, number, follow, output, live)


def _repeat(
    socket: Path,
    filter_now: Callable[[], Filter],
    by: Any,
    number: int,
    follow: int | None,
    output: str,
    put: Callable[[Table], None],
) -> None:
    told: list[Any] = []
    while True:
        with asking(socket, Top(filter=filter_now(), by=by, limit=number)) as answer:
            rows = [dict(zip(answer.header.columns, row, strict=True)) for row in answer]
        if output == "json":
            print(json.dumps(_as_json(answer.header, rows, answer.trailer)), flush=True)
        elif output == "csv":
            writer = csv.DictWriter(sys.stdout, _SHOWN, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        else:
            put(_table(answer.header, rows, answer.trailer))
        # While following, a gap is news once; the hour's edge moves on by itself.
        gaps = [(g.what, g.since > answer.header.since and g.since) for g in answer.header.gaps]
        if output != "json" and (follow is None or gaps != told):
            say_gaps(answer.header)
        told = gaps
        if follow is None:
            return
        time.sleep(follow / SECOND)


def _as_json(header: Header, rows: list[dict[str, Any]], trailer: Trailer) -> dict[str, Any]:
    return {
        **gaps_json(header),
        "slices": rows,
        "total": trailer.total,
        "more": trailer.more,
    }


def _table(header: Header, rows: list[dict[str, Any]], trailer: Trailer) -> Table:
    table = new_table()
    table.title = f"{iso(header.since, 0, True)} to {iso(header.until, 0, True)}"
    table.title_justify = "left"
    table.add_column("SLICE", no_wrap=True)
    table.add_column("XID", justify="right")
    for title in ("OUT", "IN", "PACKETS OUT", "PACKETS IN", "FLOWS"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["slice"] or (f"xid {row['xid']}" if row["xid"] else "(node)"),
            str(row["xid"]),
            amount(row["out_bytes"]),
            amount(row["in_bytes"]),
            str(row["out_packets"]),
            str(row["in_packets"]),
            str(row["flows"]),
        )
    total = trailer.total
    table.add_row(
        "all, each flow once",
        "",
        amount(total["bytes"]),
        "",
        str(total["packets"]),
        "",
        str(total["flows"]),
        style="bold",
    )
    return table
