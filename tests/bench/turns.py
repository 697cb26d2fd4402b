"""Sets of rules and programs, each in a place of its own (guard_bed.py), measured by turns.

A round asks netcost (netcost.c) for a fraction of a millisecond of each, and begins with another
one every time: a moment in which the machine is fast or slow falls on all alike. So what counts is
a figure's ratio to the first one's of the same round.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from bench.guard_bed import Place, Variant, bpffs, configure, place, run
from vnet.testing import cgroup as cgroups
from vnet.testing.net import namespace

NONE, AGAIN = "no rule", "no rule, once more"
OUT, BOTH = ("POSTROUTING",), ("POSTROUTING", "INPUT")

#: a rule in a chain that nothing leads to: it switches connection tracking on, and costs nothing
TRACK = (":unused - [0:0]", "-A unused -m conntrack --ctstate NEW")
#: what gives sockets their marks, and keeps them when some `vnet up` of this machine asks all
#: sockets there are for the marks that they have; neither runs for a packet
MARKS = ("vnet_sock_create", "vnet_setsockopt")

#: Puts a set of rules into a place; what it returns is ended when all has been measured.
Setup = Callable[[Place], AbstractContextManager[None] | None]


@dataclass(frozen=True)
class Case:
    """One set of rules and programs, and for how many slices."""

    name: str
    setup: Setup
    slices: int = 2

    @property
    def key(self) -> str:
        return f"{self.name}|{self.slices}"


def slices(n: int) -> str:
    return f"{n:,} slice{'s' if n > 1 else ''}"


# -- sets of rules -------------------------------------------------------------------------


def nothing(_place: Place) -> None:
    """No rule."""


def tracked(acct: int) -> Setup:
    """Connection tracking."""

    def setup(here: Place) -> None:
        here.ns.sysctl(net__netfilter__nf_conntrack_acct=acct)
        here.restore("nft", "mangle", *TRACK)
        # the table's own base chains are not there: nothing but conntrack has a hook

    return setup


def up(variant: Variant, raw: str = "deny") -> Setup:
    """All of it, as ``vnet up`` installs it."""

    def setup(here: Place) -> None:
        configure(here, raw)
        here.vnet("up", "--datapath", "bpf", "--variant", variant)

    return setup


def part(tables: tuple[str, ...], links: tuple[str, ...] | None) -> Setup:
    """``vnet up``, and then all taken down but these tables and links (None: all links stay)."""

    def setup(here: Place) -> None:
        up("nft")(here)
        pinned = [path.name for path in (here.instance() / "links").iterdir()]
        here.strip(tables, pinned if links is None else links)

    return setup


def stock_mark(variant: Variant, hooks: tuple[str, ...]) -> Setup:
    """One rule in each hook that sets a constant."""

    def setup(here: Place) -> None:
        rules = (f"-A {hook} -j MARK --set-xmark 0x7/0xffff" for hook in hooks)
        here.restore(variant, "mangle", *rules)

    return setup


def cgroup_rules(hooks: tuple[str, ...]) -> Setup:
    """One rule for each slice in each hook."""

    def setup(here: Place) -> None:
        top = here.root.relative_to(cgroups.root())
        rules = (
            f"-A {hook} -m cgroup --path {top}/s{i} -j MARK --set-xmark {i:#x}/0xffff"
            for hook in hooks
            for i in range(1, here.slices + 1)
        )
        here.restore("nft", "mangle", *rules)

    return setup


def cgroup_map(hooks: tuple[str, ...]) -> Setup:
    """One look-up in nft's map of cgroups in each hook.

    It has no socket expression in POSTROUTING: OUTPUT stands for that.
    """

    def setup(here: Place) -> None:
        top = here.root.relative_to(cgroups.root())
        level = len(top.parts) + 1
        pairs = ", ".join(f'"{top}/s{i}" : {i}' for i in range(1, here.slices + 1))
        text = "".join(
            f"table ip bench_{hook} {{\n chain c {{\n  type filter hook {hook} priority mangle\n"
            f"  meta mark set socket cgroupv2 level {level} map {{ {pairs} }}\n }}\n}}\n"
            for hook in ("output" if hook == "POSTROUTING" else hook.lower() for hook in hooks)
        )
        # nft looks for cgroups below /sys/fs/cgroup, and nowhere else
        run(
            "unshare", "-m", "--propagation", "private", "sh", "-c",
            'mount --bind "$0" /sys/fs/cgroup; exec "$@"', cgroups.root(),
            "nsenter", f"--net=/run/netns/{here.ns.name}", "--", "nft", "-f", "-",
            text=text,
        )  # fmt: skip

    return setup


# -- measuring them ------------------------------------------------------------------------


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

    def rounds(self, command: str, names: Sequence[str], rounds: int) -> list[list[float]]:
        """Every round's figure of every pair of sockets, each round beginning with another one."""
        found = []
        for n in range(rounds):
            # Where a round begins is where the machine's short fast moments would otherwise fall.
            at = n * 7 % len(names)
            order = [*range(at, len(names)), *range(at)]
            numbers = self.ask(f"{command} " + " ".join(names[i] for i in order))
            row = [0.0] * len(names)
            for i, number in zip(order, numbers, strict=True):
                row[i] = float(number)
            found.append(row)
        return found

    def close(self) -> None:
        """End it: its sockets keep cgroups from going away."""
        self._process.communicate()


@dataclass(frozen=True)
class Nodes:
    """Each case in its place, a peer of them all, and netcost."""

    cases: list[Case]
    places: list[Place]
    peer: str
    sender: Sender

    def open(self, title: str, way: str, here: Place, connections: int = 1) -> str:
        """Open pairs of sockets, all under one name."""
        name = f"{title}-{here.ns.name}"
        for _ in range(connections):
            self.sender.ask(f"open {name} {_ends(way, here, self.peer)}")
        return name

    def times(self, way: str, rounds: int) -> list[list[float]]:
        """Every round's ns per packet of every place.

        Exits if a whole node has not named the owners of its connection: the figures would be
        of something else.
        """
        names = [self.open(way, way, here) for here in self.places]
        print(f"bench: {rounds} rounds of {len(names)} cases, {way}", flush=True)
        found = self.sender.rounds("round 1", names, rounds)
        for case, here in zip(self.cases, self.places, strict=True):
            if "everything on" in case.name:
                _check(here, way)
        return found


@contextmanager
def nodes(cases: list[Case], netcost: Path) -> Iterator[Nodes]:
    """Make a place for each case, and put its rules there."""
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vnet-bench-")))
        pins = stack.enter_context(bpffs(base))
        peer = stack.enter_context(namespace("peer"))
        places = []
        for case in cases:
            print(f"bench: making: {case.key}", flush=True)
            here = stack.enter_context(place(base, pins, peer, case.slices))
            stack.enter_context(case.setup(here) or nullcontext())
            places.append(here)
        sender = Sender(netcost)
        stack.callback(sender.close)
        yield Nodes(cases, places, peer.name, sender)


#: the ways of a packet, and whether TCP: with turns, a request and a response
WAYS = {"udp": False, "out": False, "in": False, "tcp": True, "tcp-out": True, "tcp-in": True}


def _ends(way: str, here: Place, peer: str) -> str:
    """The words by which netcost opens a pair: on loopback, or through the veth pair."""
    far = f"{peer} {here.far} {cgroups.root()}"
    near = "127.0.0.1" if way in ("udp", "tcp") else here.near
    sends, receives = (f"{here.ns.name} {near} {who}" for who in (here.sender, here.receiver))
    if way.endswith("out"):
        receives = far
    if way.endswith("in"):
        sends = far
    return f"{'tcp' if WAYS[way] else 'udp'} {sends} {receives}"


def _check(here: Place, way: str) -> None:
    halves = (way != "in") | (0 if way == "out" else min(2, here.slices) << 16)
    found = here.inside("conntrack", "-L", "-p", "tcp" if WAYS[way] else "udp", "-m", f"{halves}")
    if "src=" not in found:
        everything = here.inside("conntrack", "-L")
        sys.exit(f"{here.ns.name}: no connection has mark {halves:#x}: {everything}")


def of_first(names: list[str], found: list[list[float]]) -> dict[str, dict[str, float]]:
    """Of each name: the quartiles of its ratio to the first one's figure of the same round."""
    result = {}
    for i, name in enumerate(names):
        low, middle, high = statistics.quantiles((row[i] / row[0] for row in found), n=4)
        result[name] = {"low": low, "ratio": middle, "high": high}
    return result


def costs(names: list[str], found: list[list[float]]) -> dict[str, dict[str, float]]:
    """``of_first``, the least of all rounds ("ns"), and its ratio to that of the first."""
    least = dict(zip(names, map(min, zip(*found, strict=True)), strict=True))
    return {
        name: {"ns": least[name], "least": least[name] / least[names[0]]} | ratio
        for name, ratio in of_first(names, found).items()
    }
