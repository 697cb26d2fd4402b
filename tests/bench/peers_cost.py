"""Measure whole nodes under the eBPF data path beside their peers, in time, and their throughput.

Run as root by tools/bench, by turns (turns.py); here are the peers, each in both directions, for 1
to 10,000 slices. Afterwards comes the largest rate of packets and of bytes through a veth pair.
Writes one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "vnet/py")]

from bench import peers, turns  # noqa: E402
from bench.guard_bed import Place  # noqa: E402
from bench.turns import AGAIN, BOTH, NONE, Case  # noqa: E402

COUNTS = (1, 10, 100, 1_000, 10_000)
WAYS = ("out", "in", "udp", "tcp")
EVERYTHING = "eBPF, everything on"

STREAMS = 4  #: TCP connections at once
#: what is flooded: title (also of the way, after "udp-"), streams
FLOODS = {"udp-out": 1, "udp-in": 1, "tcp-out": STREAMS, "tcp-in": STREAMS}
FLOODED = ((NONE, 2), (AGAIN, 2), (EVERYTHING, 10_000))


def skb_mark(here: Place) -> AbstractContextManager[None]:
    ids = {(here.root / f"s{i}").stat().st_ino: i for i in range(1, here.slices + 1)}
    return peers.cgroup_skb(here.root, ids)


def cases() -> Iterator[Case]:
    """All that is measured, "no rule" first."""
    yield Case(NONE, turns.nothing)
    yield Case(AGAIN, turns.nothing)
    yield Case("conntrack", turns.tracked(0))
    yield Case("MARK --set-mark", turns.stock_mark("nft", BOTH))
    yield Case("eBPF, marks of sockets alone", turns.part((), turns.MARKS))
    for n in COUNTS:
        yield Case(EVERYTHING, turns.up("nft"), n)
    for n in COUNTS:
        yield Case("BPF cgroup_skb mark", skb_mark, n)
    for n in COUNTS:
        yield Case("nft socket cgroupv2 map", turns.cgroup_map(BOTH), n)
    for n in COUNTS[:-1]:
        yield Case("-m cgroup --path", turns.cgroup_rules(BOTH), n)


def rates(names: list[str], found: list[list[float]]) -> dict[str, dict[str, float]]:
    """Each name's largest rate, and the quartiles of its share of the first's in its round."""
    most = dict(zip(names, map(max, zip(*found, strict=True)), strict=True))
    return {
        name: {
            "most": most[name], "of_most": most[name] / most[names[0]],
            "share": ratio["ratio"], "low": ratio["low"], "high": ratio["high"],
        }
        for name, ratio in turns.of_first(names, found).items()
    }  # fmt: skip


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--netcost", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--most", type=int, default=10_000, help="cases up to so many slices")
    given = parser.parse_args()
    chosen = [case for case in cases() if case.slices <= given.most]
    data: dict[str, Any] = {
        "kernel": platform.release(), "rounds": given.rounds, "ways": {}, "rates": {},
        "load": [os.getloadavg()[0]],
    }  # fmt: skip
    keys = [case.key for case in chosen]
    with turns.nodes(chosen, given.netcost) as made:
        for way in WAYS:
            data["ways"][way] = turns.costs(keys, made.times(way, given.rounds))
        flooded = [f"{name}|{min(n, given.most)}" for name, n in FLOODED]
        for title, streams in FLOODS.items():
            way = title.removeprefix("udp-")
            places = (made.places[keys.index(key)] for key in flooded)
            names = [made.open(title, way, here, streams) for here in places]
            print(f"bench: {given.rounds // 2} rounds of the largest rate, {title}", flush=True)
            found = made.sender.rounds("flood 2", names, given.rounds // 2)
            data["rates"][title] = rates(flooded, found)
    data["load"].append(os.getloadavg()[0])
    given.out.write_text(json.dumps(data, indent=1), encoding="ascii")


if __name__ == "__main__":
    main()
