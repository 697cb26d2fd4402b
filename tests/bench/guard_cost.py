"""Measure what the eBPF data path and the guard cost, in time, on the kernel that runs this.

Run as root by tools/bench. All sets of rules and programs are measured by turns (turns.py). Writes
one JSON object: per case the least of all rounds in ns per packet, and the quartiles of its ratio
to "no rule" of the same round; and how long 10,000 slices take to apply.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "vnet/py")]

from bench import turns  # noqa: E402
from bench.guard_bed import Place, timed  # noqa: E402
from bench.turns import MARKS, OUT, Case, slices  # noqa: E402

MANY = 10_000
WAYS = ("udp", "out", "in", "tcp")


def cases() -> Iterator[Case]:
    """All that is measured, "no rule" first."""
    yield Case(turns.NONE, turns.nothing)
    yield Case(turns.AGAIN, turns.nothing)
    yield Case("conntrack", turns.tracked(0))
    yield Case("conntrack, counting", turns.tracked(1))
    yield Case("marks of sockets alone", turns.part((), MARKS))
    yield Case("the gate (raw OUTPUT)", turns.part(("raw",), MARKS))
    yield Case("the guard's hooks of cgroups", turns.part((), None))
    yield Case("the guard, without the data path", turns.part(("raw",), None))
    yield Case("the data path, without the guard", turns.part(("mangle",), MARKS))
    for n in (1, 100, 1_000, MANY):
        yield Case(f"everything on, {slices(n)}", turns.up("nft"), n)
    yield Case("everything on, with raw = own", turns.up("nft", "own"))
    yield Case("everything on, legacy tables", turns.up("legacy"))
    yield Case("stock MARK", turns.stock_mark("nft", OUT))
    yield Case("stock MARK, legacy tables", turns.stock_mark("legacy", OUT))
    for n in (1, 100, 1_000):
        yield Case(f"-m cgroup --path, {slices(n)}", turns.cgroup_rules(OUT), n)
    for n in (1, 100, 1_000):
        yield Case(f"nft socket cgroupv2 map, {slices(n)}", turns.cgroup_map(OUT), n)


def apply(here: Place) -> dict[str, float]:
    """Seconds to apply 10,000 slices with 10,000 ports, when the node is up already.

    Of the policy alone by the clock; of whole commands, which read files and rules besides,
    processor time.
    """
    again = ("up", "--datapath", "bpf")
    took = {"`vnet up`, nothing to do": min(timed(here, *again) for _ in range(3))}
    # A changed file: every slice and port goes into the other generation.
    path = here.base / "etc/slices.d/slices.toml"
    text = path.read_text(encoding="ascii")
    path.write_text(text.replace("udp/", "tcp/"), encoding="ascii")
    took["`vnet up`, all ports changed"] = timed(here, *again)
    script = (
        "import sys, time; from pathlib import Path; from vnet import policy;"
        "i = Path(sys.argv[1]); p = policy.read(i); t = time.monotonic();"
        "policy.write(i, p); print(len(p.slices), len(p.ports), time.monotonic() - t)"
    )
    words = [here.python("-c", script, str(here.instance())).split() for _ in range(5)]
    assert [int(word) for word in words[0][:2]] == [MANY, MANY], words
    took["the policy, from the facts to being in force"] = min(float(word[2]) for word in words)
    return took


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--netcost", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--only", default="", help="cases with this in their name, and no rule")
    given = parser.parse_args()
    chosen = [c for c in cases() if given.only in c.name or c.name == turns.NONE]
    data: dict[str, Any] = {
        "kernel": platform.release(), "machine": platform.machine(), "rounds": given.rounds,
    }  # fmt: skip
    names = [case.name for case in chosen]
    with turns.nodes(chosen, given.netcost) as made:
        for way in WAYS:
            data[way] = turns.costs(names, made.times(way, given.rounds))
        made.sender.close()
        for case, here in zip(chosen, made.places, strict=True):
            if case.name == f"everything on, {slices(MANY)}":
                data["apply"] = apply(here)
    given.out.write_text(json.dumps(data, indent=1), encoding="ascii")


if __name__ == "__main__":
    main()
