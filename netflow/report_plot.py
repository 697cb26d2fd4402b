"""A report's plots: SVG to be put into a page, by matplotlib."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime
from typing import Any

from netflow.when import SECOND
from netflow.wire import Gap

# Readable on a light and on a dark page: the page's colours are not known here.
_GREY, _OUT, _IN, _GAP = "#808080", "#d9822b", "#2b7bd9", "#c03030"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "netflow",
    "font.family": "sans-serif",
    "text.color": _GREY,
    "axes.labelcolor": _GREY,
    "axes.edgecolor": _GREY,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
}


class PlotError(Exception):
    """There is nothing to draw with; the message says what to do."""


def rates(
    rows: list[dict[str, Any]], step: int, since: int, until: int, gaps: list[Gap], local: bool
) -> str:
    """Bits per second sent (up) and received (down), and flows begun in each step, as SVG.

    rows are of a series with times in ns; step, since and until ns. A step
    without a row is 0. Raises PlotError.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotError(
            "a report needs matplotlib: install it (pip install 'vnet[report]', or the "
            "distribution's python3-matplotlib)"
        ) from None
    by_cell = {row["start"]: row for row in rows}
    cells = list(range(since // step * step, until, step)) or [since]
    seconds = step / SECOND
    sent = [by_cell.get(at, {}).get("out_bytes", 0) * 8 / seconds for at in cells]
    got = [-by_cell.get(at, {}).get("in_bytes", 0) * 8 / seconds for at in cells]
    begun = [by_cell.get(at, {}).get("begun", 0) for at in cells]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.5, 5), layout="constrained")
        figure.patch.set_alpha(0)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        times = [_when(at, local) for at in cells]
        edges = [*times, _when(cells[-1] + step, local)]
        above.stairs(sent, edges, fill=True, color=_OUT, label="sent")
        above.stairs(got, edges, fill=True, color=_IN, label="received")
        above.axhline(0, color=_GREY, linewidth=0.6)
        above.set_ylabel("bit/s")
        above.yaxis.set_major_formatter(lambda value, _: _engineering(abs(value)))
        below.stairs(begun, edges, fill=True, color=_GREY)
        below.set_ylabel("flows begun")
        _shade(above, gaps, since, until, local)
        _shade(below, gaps, since, until, local)
        above.set_xlim(edges[0], edges[-1])
        figure.legend(loc="outside upper right", frameon=False, ncols=3)
        for axes in (above, below):
            axes.patch.set_alpha(0)
            axes.spines[["top", "right"]].set_visible(False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    # What is left of the document around the drawing has no place inside a page.
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    return text[text.index("<svg") :]


def _shade(axes: Any, gaps: list[Gap], since: int, until: int, local: bool) -> None:
    label = "records may be missing"
    for gap in gaps:
        if gap.what == "clock-step":
            continue
        a, b = max(gap.since, since), min(gap.until, until)
        axes.axvspan(_when(a, local), _when(b, local), color=_GAP, alpha=0.2, label=label)
        label = "_"


def _when(at: int, local: bool) -> datetime:
    made = datetime.fromtimestamp(at / SECOND, UTC)
    # Naive, since matplotlib writes zones as UTC: the page says which zone it is.
    return (made.astimezone() if local else made).replace(tzinfo=None)


def _engineering(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:g}{unit}"
        value /= 1000
    return f"{value:g}T"
