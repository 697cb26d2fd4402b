"""Play the mix: ``python -m mix.play --packets 1000000 --datapath bpf --seed 7``.

From tests/ (or with it on PYTHONPATH), as root. The node is a network namespace; with
--here it is the namespace that the command runs in, which is right in a guest only.
"""

import argparse
import json
import secrets
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vnet.testing import net
from vnet.testing.net import HERE

from mix import acts_life, acts_raw, acts_tcp, acts_udp
from mix.records import Records, compare_records
from mix.sock import WrongError
from mix.stage import world
from mix.world import World

ALLOWED = 1e-4
"""The share of slices' packets that may be nobody's, for a reason with a name."""
FEW = 10
"""So many may be, of however few: what one action has done."""
#: What is needed of everything for a run to be worth its name.
MUST = ("UDP", "TCP", "ICMPv4", "ICMPv6", "fragment", "GRE", "SCTP")


@dataclass
class Outcome:
    """What came of a run."""

    seed: int
    datapath: str
    packets: int = 0
    """Compared: on the wire, on loopback, in."""
    owned: int = 0
    """Of these, a slice's."""
    wrong: list[str] = field(default_factory=list)
    unattributed: Counter[str] = field(default_factory=Counter)
    """Slices' packets that nobody was said to own, by reason."""
    late_numbers: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    acts: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    records: Records = field(default_factory=Records)
    seconds: float = 0.0

    def problems(self) -> list[str]:
        """Why this run is not as it must be; nothing: it is."""
        found = list(self.wrong)
        if self.unattributed.total() > max(FEW, self.owned * ALLOWED):
            found.append(
                f"{self.unattributed.total()} of {self.owned} packets of slices are nobody's, "
                f"more than {ALLOWED:.2%} and than {FEW}: {dict(self.unattributed)}"
            )
        return found + self.records.problems()

    def text(self) -> str:
        """For people."""
        lines = [
            f"data path {self.datapath}, seed {self.seed}: {self.packets} packets compared in "
            f"{self.seconds:.0f} s, {self.owned} of slices",
            f"  wrong owners, packets that were not to be, packets that are missing: "
            f"{len(self.wrong)}",
            f"  unattributed: {self.unattributed.total()}",
            *(f"    {count} {why}" for why, count in self.unattributed.most_common()),
            f"  refused: {self.refused.total()}, none of them seen anywhere",
            *(f"    {count} {why}" for why, count in self.refused.most_common()),
            "  packets by kind:",
            *(f"    {count:8} {kind}" for kind, count in sorted(self.kinds.items())),
            f"  {self.records.records} records of {self.connections} connections, "
            f"{self.records.packets} packets: {json.dumps(asdict(self.records))}",
        ]
        return "\n".join(lines)


def play(w: World, count: int, lives: int, only: str = "") -> None:
    """Act until that many packets have been seen; change slices so often meanwhile."""
    chosen = [
        act
        for act in (*acts_udp.ACTS, *acts_raw.ACTS, *acts_tcp.ACTS)
        if not only or act.do.__name__ in only.split(",")
    ]
    weights = [act.weight for act in chosen]
    number = changed = 0
    while w.kinds.total() < count or changed < lives:
        number += 1
        [act] = w.rng.choices(chosen, weights)
        do = act.do
        if w.kinds.total() * (lives + 1) > count * (changed + 1):
            do = acts_life.ACTS[changed % len(acts_life.ACTS)]
            changed += 1
        w.act = w.truth.act = f"act {number} ({do.__name__})"
        w.acts[do.__name__] += 1
        do(w)
        w.settle()
        if number % 64 == 0:
            w.peer_reads()
            w.tap.check()


def run(
    base: Path,
    ns: net.Namespace,
    datapath: str,
    packets: int,
    seed: int,
    lives: int = 5,
    only: str = "",
    variant: str = "auto",
) -> Outcome:
    """Bring a node up, play, compare."""
    outcome = Outcome(seed, datapath)
    with world(base, ns, datapath, seed, variant) as w:
        began = time.monotonic()
        try:
            play(w, packets, lives, only)
            outcome.records = compare_records(w)
        except WrongError:
            pass  # there are enough of them
        except Exception as e:
            e.add_note(f"{w.act}, seed {seed}; wrong so far: {w.wrong}")
            raise
        outcome.packets, outcome.owned = w.kinds.total(), w.owned
        outcome.wrong, outcome.unattributed, outcome.refused = w.wrong, w.unsaid, w.refusals
        outcome.kinds, outcome.acts = w.kinds, w.acts
        outcome.connections = len(w.truth.past)
        outcome.seconds = time.monotonic() - began
    return outcome


def replay(outcome: Outcome, packets: int, lives: int) -> str:
    """How to see it again."""
    return (
        f"python -m mix.play --datapath {outcome.datapath} --packets {packets} --lives {lives} "
        f"--seed {outcome.seed}"
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m mix.play", description=__doc__)
    parser.add_argument("--packets", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    parser.add_argument("--datapath", choices=["module", "bpf"], default="bpf")
    parser.add_argument("--variant", choices=["auto", "nft", "legacy"], default="auto")
    parser.add_argument("--here", action="store_true", help="the node is this namespace")
    parser.add_argument("--lives", type=int, default=5, help="how often slices change")
    parser.add_argument("--only", default="", help="these acts alone, by name and comma")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vnt-mix-")))
        ns = HERE if given.here else stack.enter_context(net.namespace("mix"))
        outcome = run(
            *(base, ns, given.datapath, given.packets, given.seed),
            *(given.lives, given.only, given.variant),
        )
    problems = outcome.problems()
    print(json.dumps(asdict(outcome), indent=1) if given.json else outcome.text())
    for problem in problems:
        print(problem)
    if problems:
        print("again:", replay(outcome, given.packets, given.lives))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
