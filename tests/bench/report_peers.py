"""The sections of docs/benchmarks.md that set whole nodes beside their peers; see report.py.

Instructions come from guest.py's file of a kernel, times and rates from peers_cost.py's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import (
    BOTH,
    CGROUP,
    COPY_XID,
    IN,
    NFT_MAP,
    OUT,
    SET_MARK,
    Figures,
    number,
    slices,
    table,
    verdict,
)

SKB_MARK = "BPF cgroup_skb mark"
UP_MODULE, UP_BPF = "vnet up --datapath module", "vnet up --datapath bpf"
BPF_MARKS = "vnet up --datapath bpf, marks of sockets alone"
COUNTS = (1, 10, 100, 1_000, 10_000)

#: what is compared: title, in the guest (hooks of a direction, rules), in peers.json
OURS = (
    ("module: `MARK --copy-xid` alone", "one hook", COPY_XID, ""),
    ("module: `vnet up`, everything on", "both", UP_MODULE, ""),
    ("eBPF: `vnet up`, everything on", "both", UP_BPF, "eBPF, everything on"),
    ("eBPF: marks of sockets alone", "both", BPF_MARKS, "eBPF, marks of sockets alone"),
)
PEERS = (
    ("`-m cgroup --path`, a rule each", "one hook", CGROUP, "-m cgroup --path"),
    ("nft `socket cgroupv2` map", "native", NFT_MAP, "nft socket cgroupv2 map"),
    ("BPF `cgroup_skb` mark", "none", SKB_MARK, "BPF cgroup_skb mark"),
    ("plain `MARK --set-mark`", "one hook", SET_MARK, "MARK --set-mark"),
)
#: these do not know of slices: measured once
CONSTANT = {BPF_MARKS: 2, SET_MARK: 1}
DIRECTIONS = {
    "udp-out": (OUT, "UDP out"),
    "udp-in": (IN, "connected UDP in"),
    "tcp-in": (IN, "TCP, one packet in and one out"),
}


def cost(figures: Figures, where: str, rules: str, n: int, path: str) -> float | None:
    """Instructions of a packet of this path, under rules in nft tables, conntrack on."""
    hooks = DIRECTIONS[path][0]
    home = "none" if where == "none" else "nft"
    if where == "native":
        hooks = ("OUTPUT",) if hooks == OUT else hooks
    elif where != "one hook":
        hooks = BOTH if where == "both" else ()
    return figures.get(home, hooks, rules, n, path)


def packets(figures: Figures, series: str) -> str:
    """Instructions over conntrack, for every number of slices; and the goals."""
    parts = [f"`tools/bench --packets --kernel {series}`, kernel {figures.machine['kernel']}\n"]
    rows = []
    for path, (_, title) in DIRECTIONS.items():
        base = figures.none(path, tracked=True)
        rows.append([f"**{title}**: no rule {number(figures.none(path))}, "
                     f"with conntrack {number(base)}", *[""] * len(COUNTS)])  # fmt: skip
        for name, where, rules, _ in (*OURS, *PEERS):
            cells = []
            for n in COUNTS:
                whole = cost(figures, where, rules, CONSTANT.get(rules, n), path)
                cells.append("" if whole is None else number(whole - base, plus=True))
            if any(cells):
                rows.append([name, *_once(rules, cells)])
    parts.append(table(["instructions over conntrack", *map(slices, COUNTS)], rows))
    parts += ["#### Goals\n", goals(lambda *asked: over(figures, *asked), tuple(DIRECTIONS))]
    return "\n".join(parts)


def _once(rules: str, cells: list[str]) -> list[str]:
    """What knows nothing of slices was measured once."""
    return [cells[0], *["the same"] * (len(cells) - 1)] if rules in CONSTANT else cells


def over(figures: Figures, path: str, item: tuple[str, str, str, str], n: int) -> float | None:
    """What rules cost over conntrack, in instructions."""
    _, where, rules, _ = item
    whole = cost(figures, where, rules, CONSTANT.get(rules, n), path)
    return None if whole is None else whole - figures.none(path, tracked=True)


def timed(data: dict[str, Any], path: str, item: tuple[str, str, str, str], n: int) -> float | None:
    """What rules cost, in shares of a packet without rules."""
    way = data["ways"][{"udp-out": "out", "udp-in": "in"}.get(path, path)]
    name = item[3]
    found = way.get(f"{name}|{2 if item[2] in CONSTANT else n}")
    return None if found is None else found["ratio"] - 1


Lookup = Callable[[str, tuple[str, str, str, str], int], float | None]


def goals(found: Lookup, ways: tuple[str, ...], unit: str = "") -> str:
    """Below every peer from which number of slices on, and how flat."""
    rows = []
    for path in ways:
        title = DIRECTIONS[path][1] if path in DIRECTIONS else TIMES[path]
        for ours in OURS:
            cells = []
            for peer in PEERS[:3]:
                cells.append(_crossing(found, path, ours, peer))
            least, most = found(path, ours, 1), found(path, ours, COUNTS[-1])
            if least is None or most is None:
                continue
            spread = [v for n in COUNTS if (v := found(path, ours, n)) is not None]
            growth = max(spread) - min(spread)
            cells.append(f"{growth:,.3f}" if unit else number(growth))
            rows.append([f"{title}; {ours[0]}", *cells])
    head = ["below the peer from which number of slices on?", *(peer[0] for peer in PEERS[:3])]
    return table([*head, "the most that the number of slices makes"], rows)


def _crossing(
    found: Lookup, path: str, ours: tuple[str, str, str, str], peer: tuple[str, str, str, str]
) -> str:
    """The least number of slices from which on ours costs less.

    Between two numbers that were measured on a straight line, which rules one after the
    other make.
    """
    both = [
        (n, theirs - mine)
        for n in COUNTS
        if (mine := found(path, ours, n)) is not None
        and (theirs := found(path, peer, n)) is not None
    ]
    above = [place for place, (_, less) in enumerate(both) if less <= 0]
    if not both:
        return ""
    if not above:
        return f"always, {verdict(True)}"
    if above[-1] == len(both) - 1:
        return f"never, {verdict(False)}"
    (n, less), (more, then) = both[above[-1]], both[above[-1] + 1]
    first = n + int(-less * (more - n) / (then - less)) + 1
    return f"{first:,}, {verdict(first <= 2)}"


TIMES = {"out": "UDP out", "in": "UDP in", "udp": "UDP on loopback", "tcp": "TCP on loopback"}


def times(data: dict[str, Any]) -> str:
    """Ratios to no rule on the host, for every number of slices."""
    rows = []
    for way, title in TIMES.items():
        found = data["ways"][way]
        same, track = found["no rule, once more|2"]["ratio"], found["conntrack|2"]["ratio"]
        rows.append([f"**{title}**: no rule once more {same:.3f}, conntrack {track:.3f}",
                     *[""] * len(COUNTS)])  # fmt: skip
        for item in (*OURS[2:], *PEERS):
            values = [timed(data, way, item, n) for n in COUNTS]
            cells = ["" if v is None else f"{1 + v:.3f}" for v in values]
            rows.append([item[0], *_once(item[2], cells)])
    low, high = data["load"]
    return "\n".join(
        [
            f"`tools/bench --peers`, kernel {data['kernel']}, {data['rounds']:,} interleaved"
            f" rounds; load average {low:.1f} before, {high:.1f} after\n",
            table(["ratio to no rule", *map(slices, COUNTS)], rows),
            goals(lambda *asked: timed(data, *asked), tuple(TIMES), unit="ratio"),
        ]
    )


FLOODS = {
    "udp-out": ("UDP out, 64 bytes", 1e3, "kpackets/s"),
    "udp-in": ("UDP in, 64 bytes", 1e3, "kpackets/s"),
    "tcp-out": ("4 TCP streams out", 1e6, "MB/s"),
    "tcp-in": ("4 TCP streams in", 1e6, "MB/s"),
}


def throughput(data: dict[str, Any]) -> str:
    """The largest rates, as shares of those with nothing on."""
    rows = []
    for key, (title, scale, unit) in FLOODS.items():
        none, again, on = data["rates"][key].values()
        rows.append([
            title,
            f"{none['most'] / scale:,.0f} {unit}",
            f"{on['most'] / scale:,.0f} {unit}",
            f"{on['of_most']:.2f}",
            f"{on['share']:.2f} ({on['low']:.2f} to {on['high']:.2f})",
            f"{again['share']:.2f} ({again['low']:.2f} to {again['high']:.2f})",
        ])  # fmt: skip
    head = ["", "nothing on", "everything on, 10,000 slices", "share of the largest",
            "share in one round: median (quartiles)", "the same of nothing on, twice"]  # fmt: skip
    return (
        f"`tools/bench --peers`, kernel {data['kernel']}, {data['rounds'] // 2} interleaved"
        f" rounds\n\n{table(head, rows)}"
    )


def load(path: Path) -> dict[str, Any]:
    """Read what peers_cost.py wrote."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
    return data
