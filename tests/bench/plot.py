"""Draw what rules cost over the number of slices, as docs/cost-*.svg and .png.

Reads the same files as report.py, and needs matplotlib (``pip install '.[bench]'``).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import matplotlib

matplotlib.use("Agg")

import report_peers as rp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter
from report import ROOT, load

# Okabe and Ito's colours, which stay apart for the colour-blind; ours are thick, peers thin.
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#000000", "#D55E00", "#CC79A7", "#E69F00", "#555555")
SHAPES = "osD^vPX."
ITEMS = (*rp.OURS, *rp.PEERS)
Found = Callable[[tuple[str, str, str, str], int], float | None]


def spread(heights: list[float], least: float) -> list[float]:
    """Move labels' heights apart to at least this distance, in their order."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + least)
    return placed


def panel(axes: Axes, title: str, found: Found, least: float) -> None:
    """One direction: a line for each way, labelled where it ends; none for less than ``least``."""
    ends = []
    missing = []
    for item, colour, shape in zip(ITEMS, COLOURS, SHAPES, strict=True):
        points = [(n, v) for n in rp.COUNTS if (v := found(item, n)) is not None]
        if points and max(v for _, v in points) < least:
            missing.append(item[0].replace("`", ""))
        points = [(n, v) for n, v in points if v >= least]
        if not points:
            continue
        ours = item in rp.OURS
        axes.plot(
            *zip(*points, strict=True), color=colour, marker=shape, markersize=5 if ours else 4,
            linewidth=2.4 if ours else 1.3, linestyle="--" if item[2] in rp.CONSTANT else "-",
        )  # fmt: skip
        ends.append((item[0].replace("`", ""), colour, ours, *points[-1]))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.8, 12_000)
    axes.set_xticks(rp.COUNTS, [f"{n:,}" for n in rp.COUNTS])
    axes.minorticks_off()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("slices")
    if least < 1:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    else:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if missing:
        bound = f"{least:.0%}" if least < 1 else f"{least:.0f}"
        said = f"not drawn, below {bound}:\n{', '.join(missing)}"
        axes.text(1.03, -0.1, said, transform=axes.transAxes, fontsize=9)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [to_axes.transform((n, v))[1] for *_, n, v in ends]
    for (name, colour, ours, n, v), height in zip(ends, spread(heights, 0.06), strict=True):
        axes.annotate(
            name, xy=(n, v), xytext=(1.03, height), textcoords="axes fraction", color=colour,
            fontsize=9, va="center", fontweight="bold" if ours else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6},
        )  # fmt: skip


def draw(
    name: str, title: str, unit: str, least: float, panels: Iterable[tuple[str, Found]]
) -> None:
    """Both directions, one below the other; into docs/cost-NAME."""
    figure = Figure(figsize=(9, 9), layout="constrained")
    both = list(panels)
    for axes, (direction, found) in zip(figure.subplots(len(both), 1), both, strict=True):
        panel(axes, direction, found, least)
        axes.set_ylabel(unit)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    for kind in ("svg", "png"):
        path = ROOT / f"docs/cost-{name}.{kind}"
        figure.savefig(path, dpi=110, metadata={"Date": None} if kind == "svg" else None)
        if kind == "svg":
            # matplotlib leaves blanks at the ends of lines
            text = path.read_text(encoding="utf-8")
            path.write_text("\n".join(map(str.rstrip, text.splitlines())) + "\n", encoding="utf-8")


def main() -> None:
    """See the module's text."""
    matplotlib.rcParams["svg.hashsalt"] = "vnet"  # the same figures make the same file
    for series in ("6.1", "6.12"):
        source = ROOT / f"build/bench/packets-{series}.json"
        if not source.exists():
            continue
        figures = load(source)
        draw(
            series,
            f"What rules add to a packet, Linux {series}, connection tracking on",
            "instructions",
            5,
            [
                (title, lambda item, n, path=path, f=figures: rp.over(f, path, item, n))
                for path, title in (("udp-out", "UDP out"), ("udp-in", "connected UDP in"))
            ],
        )
    source = ROOT / "build/bench/peers.json"
    if source.exists():
        data = rp.load(source)
        series = ".".join(data["kernel"].split(".")[:2])
        draw(
            series,
            f"What rules add to a packet, Linux {series}, over no rule at all",
            "of a packet's time",
            0.01,
            [
                (title, lambda item, n, way=way: rp.timed(data, way, item, n))
                for way, title in (("out", "UDP out"), ("in", "UDP in"))
            ],
        )


if __name__ == "__main__":
    main()
