"""Measure what the eBPF data path and the guard cost, in time, on the kernel that runs this.

Run as root by tools/bench. Every set of rules and programs has a place of its own (guard_bed.py),
and all of them are measured in every round, a fraction of a millisecond each (netcost.c). Writes
one JSON object: per case the least of all rounds in ns per packet, and the quartiles of its ratio
to "no rule" of the same round; and how long 10,000 slices take to apply.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "vnet/py")]

from bench.guard_bed import Place, Variant, bpffs, configure, place, run, timed  # noqa: E402
from testbed import cgroup as cgroups  # noqa: E402
from testbed.net import namespace  # noqa: E402

NONE, AGAIN = "no rule", "no rule, once more"
MANY = 10_000

#: a rule in a chain that nothing leads to: it switches connection tracking on, and costs nothing
TRACK = (":unused - [0:0]", "-A unused -m conntrack --ctstate NEW")
#: what gives sockets their marks, and keeps them when some `vnet up` of this machine asks all
#: sockets there are for the marks that they have; neither runs for a packet
MARKS = ("vnet_sock_create", "vnet_setsockopt")


@dataclass(frozen=True)
class Case:
    """One set of rules and programs."""

    name: str
    setup: Callable[[Place], None]
    slices: int = 2


def nothing(_place: Place) -> None:
    """No rule."""


def tracked(acct: int) -> Callable[[Place], None]:
    """Connection tracking."""

    def setup(here: Place) -> None:
        here.ns.sysctl(net__netfilter__nf_conntrack_acct=acct)
        here.restore("nft", "mangle", *TRACK)
        # the table's own base chains are not there: nothing but conntrack has a hook

    return setup


def up(variant: Variant, raw: str = "deny") -> Callable[[Place], None]:
    """All of it, as ``vnet up`` installs it."""

    def setup(here: Place) -> None:
        configure(here, raw)
        here.vnet("up", "--datapath", "bpf", "--variant", variant)

    return setup


def part(tables: tuple[str, ...], links: tuple[str, ...] | None) -> Callable[[Place], None]:
    """``vnet up``, and then all taken down but these tables and links (None: all links stay)."""

    def setup(here: Place) -> None:
        up("nft")(here)
        pinned = [path.name for path in (here.instance() / "links").iterdir()]
        here.strip(tables, pinned if links is None else links)

    return setup


def cgroup_rules(here: Place) -> None:
    """One rule for each slice."""
    top = here.root.relative_to(cgroups.root())
    here.restore(
        "nft",
        "mangle",
        *(
            f"-A POSTROUTING -m cgroup --path {top}/s{i} -j MARK --set-xmark {i:#x}/0xffff"
            for i in range(1, here.slices + 1)
        ),
    )


def cgroup_map(here: Place) -> None:
    """One look-up in nft's map of cgroups; it has no socket expression in POSTROUTING."""
    top = here.root.relative_to(cgroups.root())
    level = len(top.parts) + 1
    pairs = ", ".join(f'"{top}/s{i}" : {i}' for i in range(1, here.slices + 1))
    text = (
        "table ip bench {\n chain out {\n  type filter hook output priority mangle\n"
        f"  meta mark set socket cgroupv2 level {level} map {{ {pairs} }}\n }}\n}}\n"
    )
    # nft looks for cgroups below /sys/fs/cgroup, and nowhere else
    run(
        "unshare", "-m", "--propagation", "private", "sh", "-c",
        'mount --bind "$0" /sys/fs/cgroup; exec "$@"', cgroups.root(),
        "nsenter", f"--net=/run/netns/{here.ns.name}", "--", "nft", "-f", "-",
        text=text,
    )  # fmt: skip


def stock_mark(variant: Variant) -> Callable[[Place], None]:
    """One rule that sets a constant."""

    def setup(here: Place) -> None:
        here.restore(variant, "mangle", "-A POSTROUTING -j MARK --set-xmark 0x7/0xffff")

    return setup


def cases() -> Iterator[Case]:
    """All that is measured, "no rule" first."""
    yield Case(NONE, nothing)
    yield Case(AGAIN, nothing)
    yield Case("conntrack", tracked(0))
    yield Case("conntrack, counting", tracked(1))
    yield Case("marks of sockets alone", part((), MARKS))
    yield Case("the gate (raw OUTPUT)", part(("raw",), MARKS))
    yield Case("the guard's hooks of cgroups", part((), None))
    yield Case("the guard, without the data path", part(("raw",), None))
    yield Case("the data path, without the guard", part(("mangle",), MARKS))
    for n in (1, 100, 1_000, MANY):
        yield Case(f"everything on, {slices(n)}", up("nft"), n)
    yield Case("everything on, with raw = own", up("nft", "own"), 2)
    yield Case("everything on, legacy tables", up("legacy"), 2)
    yield Case("stock MARK", stock_mark("nft"))
    yield Case("stock MARK, legacy tables", stock_mark("legacy"))
    for n in (1, 100, 1_000):
        yield Case(f"-m cgroup --path, {slices(n)}", cgroup_rules, n)
    for n in (1, 100, 1_000):
        yield Case(f"nft socket cgroupv2 map, {slices(n)}", cgroup_map, n)


#: the ways that are measured, and whether TCP: with turns, a request and a response
WAYS = {"udp": False, "out": False, "in": False, "tcp": True}


def opened(way: str, here: Place, peer: str) -> str:
    """The words by which netcost opens a pair."""
    sends, receives = (
        f"{here.ns.name} 127.0.0.1 {here.sender}",
        f"{here.ns.name} 127.0.0.1 {here.receiver}",
    )
    far = f"{peer} {here.far} {cgroups.root()}"
    if way == "out":
        sends, receives = f"{here.ns.name} {here.near} {here.sender}", far
    if way == "in":
        sends, receives = far, f"{here.ns.name} {here.near} {here.receiver}"
    return f"{'tcp' if WAYS[way] else 'udp'} {sends} {receives}"


def slices(n: int) -> str:
    return f"{n:,} slice{'s' if n > 1 else ''}"


class Sender:
    """netcost, and what is asked of it."""

    def __init__(self, binary: Path) -> None:
        self._process = subprocess.Popen(
            [binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, line: str) -> list[str]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer.endswith("\n"):
            sys.exit(f"netcost ended at: {line}")
        return answer.split()

    def close(self) -> None:
        """End it: its sockets keep cgroups from going away."""
        self._process.communicate()


@contextmanager
def sender(binary: Path) -> Iterator[Sender]:
    made = Sender(binary)
    try:
        yield made
    finally:
        made.close()


def measure(asked: Sender, pairs: list[str], rounds: int) -> list[list[float]]:
    """Every round's ns per packet of every pair, each round beginning with another one."""
    found = []
    for n in range(rounds):
        # Where a round begins is where the machine's short fast moments would otherwise fall.
        at = n * 7 % len(pairs)
        order = [*range(at, len(pairs)), *range(at)]
        numbers = asked.ask("round 1 " + " ".join(pairs[i] for i in order))
        row = [0.0] * len(pairs)
        for i, number in zip(order, numbers, strict=True):
            row[i] = float(number)
        found.append(row)
    return found


def summary(names: list[str], found: list[list[float]]) -> dict[str, dict[str, float]]:
    """Of each: the least, its ratio to the least of the first, the quartiles of the ratio."""
    result = {}
    first = min(row[0] for row in found)
    for i, name in enumerate(names):
        least = min(row[i] for row in found)
        low, middle, high = statistics.quantiles((row[i] / row[0] for row in found), n=4)
        result[name] = {
            "ns": least, "least": least / first, "low": low, "ratio": middle, "high": high,
        }  # fmt: skip
    return result


def check(here: Place, way: str) -> None:
    """See that a connection got its owners: the figures would be of something else."""
    halves = (way != "in") | (0 if way == "out" else min(2, here.slices) << 16)
    found = here.inside("conntrack", "-L", "-p", "tcp" if WAYS[way] else "udp", "-m", f"{halves}")
    if "src=" not in found:
        everything = here.inside("conntrack", "-L")
        sys.exit(f"{here.ns.name}: no connection has mark {halves:#x}: {everything}")


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
    count, ports = map(int, words[0][:2])
    assert count > MANY and ports >= MANY, words
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
    chosen = [c for c in cases() if given.only in c.name or c.name == NONE]
    data: dict[str, Any] = {
        "kernel": platform.release(), "machine": platform.machine(), "rounds": given.rounds,
    }  # fmt: skip
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vnet-bench-")))
        pins = stack.enter_context(bpffs(base))
        peer = stack.enter_context(namespace("peer"))
        places = []
        for case in chosen:
            print(f"bench: making: {case.name}", flush=True)
            here = stack.enter_context(place(base, pins, peer, case.slices))
            case.setup(here)
            places.append(here)
        asked = stack.enter_context(sender(given.netcost))
        names = [case.name for case in chosen]
        for way in WAYS:
            pairs = []
            for here in places:
                pairs.append(f"{way}-{here.ns.name}")
                asked.ask(f"open {pairs[-1]} {opened(way, here, peer.name)}")
            print(f"bench: {given.rounds} rounds of {len(pairs)} cases, {way}", flush=True)
            data[way] = summary(names, measure(asked, pairs, given.rounds))
            for case, here in zip(chosen, places, strict=True):
                if case.name.startswith("everything"):
                    check(here, way)
        asked.close()
        for case, here in zip(chosen, places, strict=True):
            if case.name == f"everything on, {slices(MANY)}":
                data["apply"] = apply(here)
    given.out.write_text(json.dumps(data, indent=1), encoding="ascii")


if __name__ == "__main__":
    main()
