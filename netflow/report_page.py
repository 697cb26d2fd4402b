"""A report as one HTML page: everything is in it, and it may load nothing."""

from __future__ import annotations

from html import escape
from time import time_ns

from netflow.output import amount, gap_text
from netflow.report import MOST, Facts, Part
from netflow.report_plot import rates
from netflow.when import iso, parse_time

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --warn: #c0303022; }}
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }}
th {{ font-weight: 600; font-size: .8rem; }}
.n {{ text-align: right; }}
.wide {{ overflow-x: auto; }}
.gaps {{ background: var(--warn); padding: .6rem 1rem; }}
svg {{ max-width: 100%; height: auto; }}
footer {{ margin-top: 3rem; font-size: .85rem; opacity: .7; }}
</style>
</head>
<body>
"""

_WHAT = {
    "slice": "a slice's, by name",
    "unnamed": "a slice's whose xid nobody held by the registry",
    "node": "the node's own",
    "forwarded": "passing through",
    "before-slices": "before a slice was registered",
    "other-node": "of other nodes, of no slice",
    "gap": "time in which records may be missing",
}


def page(facts: Facts) -> str:
    """The page. Names and texts come from outside: all are escaped. Raises PlotError."""
    header, parts = facts.header, facts.parts
    title = f"Slice {facts.slice}"
    span = f"{iso(header.since, 0, True)} to {iso(header.until, 0, True)}"
    rows = [{**row, "start": parse_time(row["start"], 0)} for row in parts["series"].rows]
    plot = rates(
        rows,
        parts["series"].trailer.total["step"],
        header.since,
        header.until,
        header.gaps,
        True,
    )
    found = [
        _HEAD.format(title=escape(title)),
        f"<h1>{escape(title)}</h1>\n<p>{escape(span)}</p>\n",
        _gaps(facts),
        _sums(facts),
        "<h2>Traffic</h2>\n<p>Up: sent. Down: received. Times are this page's zone, as above.</p>\n"
        f"<figure>{plot}</figure>\n",
        _table("Peers", parts["peers"]),
        _table("Ports", parts["ports"]),
        _table(
            "Scans",
            parts["scans"],
            "Many hosts or many ports tried within ten minutes, with little or no answer.",
        ),
        _table(
            "As somebody else",
            parts["spoofed"],
            "What the guard refused or saw, and flows from addresses that are not the node's.",
        ),
        _coverage(parts["coverage"]),
        f"<footer>Made by netflow at {escape(iso(time_ns(), 0, True))}. Bytes count from the IP "
        "header on; 1k is 1000.</footer>\n</body>\n</html>\n",
    ]
    return "".join(found)


def _gaps(facts: Facts) -> str:
    gaps = [*facts.header.gaps]
    gaps += [gap for gap in facts.parts["spoofed"].header.gaps if gap.what == "no-events"]
    if not gaps:
        return "<p>No gap touches this period: nothing is known to be missing.</p>\n"
    items = "".join(f"<li>{escape(gap_text(gap))}</li>" for gap in gaps)
    return f'<div class="gaps"><strong>Records may be missing.</strong><ul>{items}</ul></div>\n'


def _sums(facts: Facts) -> str:
    its = next((row for row in facts.parts["sums"].rows if row["slice"] == facts.slice), None)
    if its is None:
        return "<p>There is no record of this slice in this period.</p>\n"
    return (
        f"<p>xid {its['xid']}. Sent {amount(its['out_bytes'])}B in {its['out_packets']} packets, "
        f"received {amount(its['in_bytes'])}B in {its['in_packets']} packets, "
        f"{its['flows']} flows.</p>\n"
    )


def _table(title: str, part: Part, about: str = "") -> str:
    made = [f"<h2>{escape(title)}</h2>\n"]
    if about:
        made.append(f"<p>{escape(about)}</p>\n")
    if not part.rows:
        made.append("<p>None.</p>\n")
        return "".join(made)
    heads, numbers = [], []
    for head in part.shape.heads:
        numbers.append(' class="n"' if head.startswith(">") else "")
        heads.append(f"<th{numbers[-1]}>{escape(head.removeprefix('>'))}</th>")
    made.append(f'<div class="wide"><table>\n<tr>{"".join(heads)}</tr>\n')
    for row in part.rows:
        cells = zip(part.shape.cells(row), numbers, strict=True)
        made.append(
            "<tr>" + "".join(f"<td{n}>{escape(cell)}</td>" for cell, n in cells) + "</tr>\n"
        )
    made.append("</table></div>\n")
    if part.trailer.more:
        made.append(f"<p>The first {MOST}; there are more.</p>\n")
    return "".join(made)


def _coverage(part: Part) -> str:
    """Over the whole period, of everything that the collector shows to whoever asked."""
    sums: dict[str, list[float]] = {}
    for row in part.rows:
        one = sums.setdefault(row["what"], [0, 0, 0, 0])
        for n, key in enumerate(("begun", "packets", "bytes", "seconds")):
            one[n] += row[key]
    total = part.trailer.total
    share = total["attributed_bytes"] / total["bytes"] if total["bytes"] else 0
    lines = []
    for what, (begun, packets, size, seconds) in sums.items():
        cells = (
            ["", "", f"{seconds:.0f} s"]
            if what == "gap"
            else [f"{begun:.0f}", f"{packets:.0f}", amount(int(size))]
        )
        numbers = "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells)
        lines.append(f"<tr><td>{escape(_WHAT.get(what, what))}</td>{numbers}</tr>\n")
    return (
        "<h2>Coverage</h2>\n<p>Of all traffic of this period, not of this slice alone: "
        f"{share:.1%} of the bytes have an owner.</p>\n"
        '<div class="wide"><table>\n<tr><th>WHAT</th><th class="n">FLOWS BEGUN</th>'
        f'<th class="n">PACKETS</th><th class="n">BYTES</th></tr>\n{"".join(lines)}'
        "</table></div>\n"
    )
