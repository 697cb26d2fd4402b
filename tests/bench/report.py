"""Write the measured figures into docs/benchmarks.md, between its markers.

Input is what the measuring programs wrote into build/bench: guest.py (packets-*.json, one per
kernel), guard_cost.py (guard.json), peers_cost.py (peers.json), bench_dump.py (dump.json),
bench_ingest.py (ingest.json), bench_export.py (export.json) and bench_start.py (start.json);
output is Markdown. Only what is between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is
replaced. The goals are printed too.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs/benchmarks.md"

NONE, EMPTY, BARE = "", "empty table", "a rule without a target"
SET_MARK, COPY_XID = "MARK --set-mark", "MARK --copy-xid"
INSTALLED = "as vnet up installs it"
CGROUP, NFT_MAP = "-m cgroup --path", "nft socket cgroupv2 map"

OUT, IN, BOTH = ("POSTROUTING",), ("INPUT",), ("INPUT", "POSTROUTING")

# The path udp-out from sixteen slices of the 10,000: the mean, and the dearest.
SENDERS, WORST_SENDER = "udp-out-senders", "udp-out-worst-sender"

# path: its hook, and its title
PATHS = {
    "udp-out": (OUT, "Out: UDP, later packets"),
    "udp-out-new": (OUT, "Out: UDP, a connection's first packet"),
    "tcp-in": (IN, "In: TCP, established"),
    "udp-in": (IN, "In: connected UDP, later packets"),
    "udp-in-wild": (IN, "In: UDP socket that only receives, later packets"),
    "udp-in-new": (IN, "In: connected UDP, a connection's first packet"),
    "udp-in-wild-new": (IN, "In: UDP socket that only receives, first packets"),
    "tcp-in-new": (IN, "In: TCP handshake (SYN and ACK come in; per handshake)"),
}

BOTH_PATHS = {
    "udp-out": "UDP out",
    "tcp-in": "TCP, one packet in and one out",
    "udp-in": "connected UDP in",
    "tcp-lo": "TCP between two slices on loopback, one packet each way",
    "udp-lo": "connected UDP between two slices on loopback",
}


@dataclass(frozen=True)
class Figures:
    """One boot's figures: the cheapest round of every case and path, in instructions."""

    machine: dict[str, str]
    cost: dict[tuple[bool, str, tuple[str, ...], str, int, str], float]

    def get(
        self, home: str, hooks: tuple[str, ...], rules: str, n: int, path: str, tracked: bool = True
    ) -> float | None:
        return self.cost.get((tracked, home, hooks, rules, n, path))

    def none(self, path: str, tracked: bool = False) -> float:
        return self.cost[tracked, "none", (), NONE, 0, path]


def load(path: Path) -> Figures:
    """Read what guest.py wrote."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
    cost = {}
    for result in data["results"]:
        case = result["case"]
        key = (
            case["conntrack"],
            case["home"],
            tuple(case["hooks"]),
            case["rules"],
            case["n"],
            result["path"],
        )
        rounds: list[float] = result["rounds"]
        cost[key] = min(rounds)
        if result["path"] == SENDERS:
            cost[key] = sum(rounds) / len(rounds)
            cost[*key[:-1], WORST_SENDER] = max(rounds)
    return Figures(data["machine"], cost)


def number(value: float | None, plus: bool = False) -> str:
    if value is None:
        return ""
    return f"{value:+,.0f}" if plus else f"{value:,.0f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column left-aligned, the others right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def one_path(figures: Figures, path: str, hooks: tuple[str, ...]) -> str:
    """Every rule set on one path, legacy and nft side by side."""
    rows = [
        ["no rule", number(figures.none(path)), "0", "", "", "", "", "", ""],
        [
            "no rule, conntrack on",
            number(figures.none(path, tracked=True)),
            number(figures.none(path, tracked=True) - figures.none(path), plus=True),
            *[""] * 6,
        ],
    ]

    def row(title: str, rules: str, n: int, tracked: bool = True, at: str = path) -> None:
        cells = []
        for home in ("legacy", "nft"):
            # Native nft has no socket expression in POSTROUTING.
            hook = ("OUTPUT",) if rules == NFT_MAP and hooks == OUT else hooks
            whole = figures.get(home, hook, rules, n, at, tracked)
            empty = figures.get(home, hook, EMPTY, 0, path, tracked)
            bare = figures.get(home, hook, BARE, 1, path, tracked)
            if whole is None:
                cells += [""] * 4
                continue
            cells += [number(whole), number(whole - figures.none(path), plus=True)]
            cells.append(number(whole - empty, plus=True) if empty is not None else "")
            cells.append(number(whole - bare, plus=True) if bare is not None else "")
        if any(cells):
            rows.append([title, *cells])

    row("empty table, no conntrack", EMPTY, 0, tracked=False)
    row(f"`{SET_MARK}`, no conntrack", SET_MARK, 1, tracked=False)
    row("empty table", EMPTY, 0)
    row("one rule without a target", BARE, 1)
    row(f"`{SET_MARK}`", SET_MARK, 1)
    row(f"`{COPY_XID}`, the node's own socket", COPY_XID, 0)
    for n in (1, 10, 100, 1_000, 10_000):
        row(f"**`{COPY_XID}`, {slices(n)}**", COPY_XID, n)
    if path == "udp-out":
        for title, column in (("the mean", SENDERS), ("the dearest", WORST_SENDER)):
            row(f"`{COPY_XID}`, 10,000 slices, {title} of 16 senders", COPY_XID, 10_000, at=column)
    for n in (1, 10, 100, 1_000):
        row(f"`{CGROUP}`, {n:,} rule{'s' if n > 1 else ''}", CGROUP, n)
    for n in (1, 10, 100, 1_000, 10_000):
        row(f"nft `socket cgroupv2` map, {slices(n)}", NFT_MAP, n)
    head = [""]
    for home in ("legacy", "nft"):
        head += [f"{home}: whole", "over no rule", "over empty", "over a bare rule"]
    return table(head, rows)


def slices(n: int) -> str:
    return f"{n:,} slice{'s' if n > 1 else ''}"


def both_hooks(figures: Figures) -> str:
    """What a node pays: rules in INPUT and POSTROUTING at once."""
    rows = []
    for path, title in BOTH_PATHS.items():
        for home in ("legacy", "nft"):
            empty = figures.get(home, BOTH, EMPTY, 0, path)
            cells = [
                number(figures.none(path)),
                number(figures.none(path, tracked=True)),
                number(empty),
            ]
            for rules, n in ((SET_MARK, 1), (COPY_XID, 10_000), (INSTALLED, 10_000)):
                whole = figures.get(home, BOTH, rules, n, path)
                more = "" if whole is None or empty is None else number(whole - empty, plus=True)
                cells.append(f"{number(whole)} ({more})" if more else "")
            rows.append([f"{title}, {home}", *cells])
    return table(
        ["", "no rule", "conntrack on", "empty tables", "`--set-mark`", "`--copy-xid`", INSTALLED],
        rows,
    )


@dataclass(frozen=True)
class Goal:
    """A bound, and what was measured over each of the baselines."""

    what: str
    bound: float
    over: dict[str, float]
    unit: str = ""

    def verdict(self, baseline: str) -> str:
        if baseline not in self.over:
            return ""
        value = self.over[baseline]
        word = "reached" if value <= self.bound else "**not reached**"
        return f"{value:.1f}{self.unit}, {word}" if self.unit else f"{value:,.0f}, {word}"


FIRST = "over the empty table"
BASELINES = {
    FIRST: (EMPTY, 0),
    "over a rule without a target": (BARE, 1),
    "over stock MARK": (SET_MARK, 1),
}


def goals(figures: Figures) -> Iterator[Goal]:
    """The goals, each over every baseline: the first of them is what was asked for."""
    for home in ("legacy", "nft"):
        for title, path, hooks, bound in (
            ("out, UDP", "udp-out", OUT, 100),
            ("in, TCP established", "tcp-in", IN, 60),
            ("in, connected UDP", "udp-in", IN, 60),
        ):
            whole = figures.get(home, hooks, COPY_XID, 10_000, path)
            over = {}
            for baseline, (rules, n) in BASELINES.items():
                base = figures.get(home, hooks, rules, n, path)
                if whole is not None and base is not None:
                    over[baseline] = whole - base
            if over:
                yield Goal(f"{home}: {title}", bound, over)
        least = figures.get(home, OUT, COPY_XID, 1, "udp-out")
        most = figures.get(home, OUT, COPY_XID, 10_000, SENDERS)
        empty = figures.get(home, OUT, EMPTY, 0, "udp-out")
        if least and most and empty:
            growth = 100 * abs(most - least) / (least - empty)
            yield Goal(f"{home}: out, from 1 to 10,000 slices", 2, {FIRST: growth}, " %")


def goal_table(found: list[Goal]) -> str:
    rows = [
        [goal.what, f"{goal.bound:,.0f}{goal.unit}", *(goal.verdict(b) for b in BASELINES)]
        for goal in found
    ]
    return table(["`--copy-xid`", "at most", *BASELINES], rows)


def packets(figures: Figures, series: str) -> str:
    """The whole section of one kernel."""
    parts = [
        f"`tools/bench --kernel {series}`, kernel {figures.machine['kernel']}"
        f" ({figures.machine['version']}); spectre_v2: {figures.machine['spectre_v2']}\n",
        "#### Goals\n",
        goal_table(list(goals(figures))),
        "#### Both hooks, as on a node\n",
        both_hooks(figures),
    ]
    for path, (hooks, title) in PATHS.items():
        parts += [f"#### {title}\n", one_path(figures, path, hooks)]
    return "\n".join(parts)


def dump(source: Path) -> str:
    """The dump's rates, as measured on the kernel that ran make bench."""
    data: dict[str, Any] = json.loads(source.read_text(encoding="ascii"))
    rates: dict[str, float] = data["entries_per_s"]
    wall: dict[str, float] = data["entries_per_s_by_the_wall"]
    bare, tool = rates["bare recv, nothing decoded"], rates["conntrack -L -o extended"]
    ours = rates["ours, all columns at once"]
    rows = [
        [name, number(rate), f"{rate / bare:.2f}", f"{rate / tool:.1f}", number(wall[name])]
        for name, rate in rates.items()
    ]
    verdicts = [
        [
            "ours to columns, of the bare rate",
            f"{ours / bare:.2f}",
            "at least 0.9",
            ours / bare >= 0.9,
        ],
        [
            "ours to columns, times `conntrack -L`",
            f"{ours / tool:.1f}",
            "at least 3",
            ours / tool >= 3,
        ],
    ]
    return "\n".join(
        [
            f"`tools/bench --dump`, {data['entries']:,} entries, best of {data['rounds']}"
            " interleaved rounds, entries a second of processor time\n",
            table(["", "entries/s", "of bare", "times conntrack -L", "by the wall"], rows),
            table(
                ["", "measured", "goal", ""],
                [[*map(str, v[:3]), "reached" if v[3] else "not reached"] for v in verdicts],
            ),
        ]
    )


WAYS = {
    "udp": "UDP, loopback: out and in",
    "out": "UDP out",
    "in": "UDP in",
    "tcp": "TCP, loopback: request, response",
}


def guard(source: Path) -> str:
    """What the eBPF data path and the guard cost in time, as measured on the kernel here."""
    data: dict[str, Any] = json.loads(source.read_text(encoding="ascii"))
    names = list(data["udp"])
    rows = [
        [name, *(f"{data[way][name]['ratio']:.3f}" for way in WAYS), *_nanoseconds(data, name)]
        for name in names
    ]
    spread = {
        way: statistics.median(v["high"] - v["low"] for v in data[way].values()) for way in WAYS
    }
    same = {way: data[way]["no rule, once more"]["ratio"] for way in WAYS}
    rows.append(["half of the rounds lie within (median of all rows)", *_plain(spread), "", ""])
    parts = [
        f"`tools/bench --guard`, kernel {data['kernel']}, {data['rounds']:,} interleaved rounds\n",
        "#### Goals\n",
        table(["", "measured", "at most", ""], list(guard_goals(data))),
        "#### Ratio to no rule\n",
        table(["", *WAYS.values(), "least ns, UDP on loopback", "and its ratio"], rows),
        f"No rule, measured once more under another name: {', '.join(_plain(same))}.\n",
    ]
    return "\n".join(parts)


def _plain(values: dict[str, float]) -> list[str]:
    return [f"{value:.3f}" for value in values.values()]


def _nanoseconds(data: dict[str, Any], name: str) -> list[str]:
    return [number(data["udp"][name]["ns"]), f"{data['udp'][name]['least']:.3f}"]


def guard_goals(data: dict[str, Any]) -> Iterator[list[str]]:
    """What was asked for, and what is; a time is in seconds."""
    marks, everything = "marks of sockets alone", "everything on, 10,000 slices"
    for way, title in WAYS.items():
        for what, bound in ((marks, 1.02), (everything, 1.35)):
            ratio: float = data[way][what]["ratio"]
            yield [f"{what}; {title}", f"{ratio:.3f}", f"{bound}", verdict(ratio <= bound)]
    least, most = (
        data["udp"][f"everything on, {n}"]["ratio"] for n in ("1 slice", "10,000 slices")
    )
    growth = 100 * (most - least) / least
    yield ["from 1 to 10,000 slices; UDP on loopback", f"{growth:+.1f} %", "flat", ""]
    for what, seconds in data["apply"].items():
        cells = ["", ""] if "vnet up" in what else ["1 s", verdict(seconds <= 1)]
        yield [f"10,000 slices with 10,000 ports: {what}", f"{seconds:.2f} s", *cells]


def verdict(reached: bool) -> str:
    return "reached" if reached else "**not reached**"


def put(page: str, name: str, text: str) -> str:
    """Replace what is between the markers of ``name``."""
    pattern = re.compile(
        rf"(<!-- begin {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.S
    )
    if not pattern.search(page):
        sys.exit(f"{PAGE}: no markers for {name}")
    return pattern.sub(lambda m: f"{m[1]}\n{text}\n{m[2]}", page)


def main() -> None:
    """See the module's text."""
    import report_export
    import report_history
    import report_ingest
    import report_peers
    import report_start

    page = PAGE.read_text(encoding="utf-8")
    for series in ("6.1", "6.12"):
        source = ROOT / f"build/bench/packets-{series}.json"
        if source.exists():
            figures = load(source)
            page = put(page, f"packets {series}", packets(figures, series))
            page = put(page, f"peers {series}", report_peers.packets(figures, series))
            print(f"{figures.machine['kernel']}:")
            for goal in goals(figures):
                for baseline in goal.over:
                    print(f"  {goal.what}, {baseline}: {goal.verdict(baseline)}, of {goal.bound}")
    source = ROOT / "build/bench/guard.json"
    if source.exists():
        page = put(page, "guard", guard(source))
    source = ROOT / "build/bench/peers.json"
    if source.exists():
        data = report_peers.load(source)
        page = put(page, "peers time", report_peers.times(data))
        page = put(page, "throughput", report_peers.throughput(data))
    source = ROOT / "build/bench/dump.json"
    if source.exists():
        page = put(page, "dump", dump(source))
    source = ROOT / "build/bench/ingest.json"
    if source.exists():
        page = put(page, "ingest", report_ingest.ingest(source, table, number))
    source = ROOT / "build/bench/export.json"
    if source.exists():
        page = put(page, "export", report_export.export(source, table))
    source = ROOT / "build/bench/start.json"
    if source.exists():
        page = put(page, "start", report_start.start(source, table))
    source = ROOT / "build/bench/history.json"
    if source.exists():
        page = put(page, "history", report_history.history(source))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
