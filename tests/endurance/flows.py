"""Makers of short flows and their servers: churn.c, driven."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vnet.testing.cgroup import Cgroup
from vnet.testing.net import Namespace

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("churn.c")
KINDS = "csrxuv"
"""See churn.c."""


def built() -> Path:
    """The program, compiled where that has not been done yet."""
    program = ROOT / "build/endurance/churn"
    if not program.exists() or program.stat().st_mtime < SOURCE.stat().st_mtime:
        program.parent.mkdir(parents=True, exist_ok=True)
        fresh = program.with_name("churn.new")
        subprocess.run(["cc", "-O2", "-Wall", "-Werror", "-o", fresh, SOURCE], check=True)
        fresh.rename(program)
    return program


@dataclass
class Done:
    """What makers say they have done."""

    flows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    again: int = 0
    """Datagrams sent once more for want of an answer."""
    busy: int = 0
    """Pairs of ports left out."""
    failed: int = 0
    errno: int = 0
    """Of the last that failed."""

    def __add__(self, other: "Done") -> "Done":
        return Done(
            {kind: self.flows[kind] + other.flows[kind] for kind in KINDS},
            self.again + other.again,
            self.busy + other.busy,
            self.failed + other.failed,
            other.errno or self.errno,
        )

    @property
    def tcp(self) -> int:
        """TCP flows, those that were refused among them."""
        return sum(self.flows[kind] for kind in "csrx")

    @property
    def udp(self) -> int:
        """UDP flows."""
        return sum(self.flows[kind] for kind in "uv")

    @property
    def all(self) -> int:
        """Flows."""
        return self.tcp + self.udp


@dataclass
class Maker:
    """A process that makes flows, and whose they are."""

    name: str
    process: subprocess.Popen[str]
    client: int | None
    """The xid that owns the client's end; None: that is not on the node."""
    server: int | None
    total: Done = field(default_factory=Done)

    def say(self, command: str) -> None:
        """A number of flows, "on", or "0" to end that."""
        assert self.process.stdin
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def answer(self) -> Done:
        """What it did at the last command but this."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"{self.name} has died"
        numbers = list(map(int, line.split()))
        done = Done(dict(zip(KINDS, numbers, strict=False)), *numbers[len(KINDS) :])
        self.total += done
        return done

    def ends(self, done: Done) -> int:
        """Ends of these flows that are a slice's, one for each half to be filled."""
        return done.all * bool(self.client) + (done.all - done.flows["x"]) * bool(self.server)


def _ready(process: subprocess.Popen[str], what: str) -> None:
    assert process.stdout
    assert process.stdout.readline() == "ready\n", f"{what} does not start"


@contextmanager
def _started(ns: Namespace, cgroup: Cgroup | None, *argv: str) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # They take what is left of the CPU: or else what goes on among them would
    # take minutes in a guest that has one.
    with ns.popen("nice", "-n", "15", built(), *argv, cgroup=cgroup, **pipes) as process:
        try:
            _ready(process, " ".join(argv))
            yield process
        finally:
            process.kill()


@dataclass(frozen=True)
class Route:
    """Flows from where to where; see Maker."""

    name: str
    ns: Namespace
    cgroup: Cgroup | None
    local: str
    remote: str
    first: int
    """Their first local port."""
    client: int | None
    server: int | None


PORTS = 4000
"""Local ports of one maker: 32,000 pairs, more than it makes flows in a minute."""


@contextmanager
def making(routes: list[Route]) -> Iterator[list[Maker]]:
    """A maker for each."""
    with ExitStack() as stack:
        makers = []
        for number, route in enumerate(routes):
            # Each begins with another kind: they would go in step otherwise.
            kinds = KINDS[number % len(KINDS) :] + KINDS[: number % len(KINDS)]
            where = (route.local, route.remote, str(route.first), str(PORTS), kinds)
            process = stack.enter_context(_started(route.ns, route.cgroup, "make", *where))
            makers.append(Maker(route.name, process, route.client, route.server))
        yield makers


@contextmanager
def serving(ns: Namespace, cgroup: Cgroup | None, *addresses: str) -> Iterator[None]:
    """A server at these addresses."""
    with _started(ns, cgroup, "serve", *addresses):
        yield


def make(makers: list[Maker], flows: int) -> list[Done]:
    """Have each make so many flows, side by side."""
    for maker in makers:
        maker.say(str(flows))
    return [maker.answer() for maker in makers]


@contextmanager
def storm(makers: list[Maker]) -> Iterator[list[Done]]:
    """Flows for the length of the block; the list is filled at its end."""
    done: list[Done] = []
    for maker in makers:
        maker.say("on")
    yield done
    for maker in makers:
        maker.say("0")
    for maker in makers:
        done.append(maker.answer())
        assert maker.answer().all == 0
