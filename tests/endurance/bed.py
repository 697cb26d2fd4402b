"""A node, its slices, a peer, and flows between all of them that are counted three times.

    slice a --------> node =veth= peer's server
    slice a --------> slice b's server
    the node itself-> node =veth= peer's server
    slice b's server  node =veth= <-------- peer

Flows that are made while nothing changes (``calm``) must add up: what the
makers say, what rules of our own count, and what the data path counts. While
everything changes (``storm``), no flow may fail and no packet be another
slice's.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import vnetbed
from vnet.testing import cgroup, net
from vnet.testing.poll import until

from endurance import flows, slabs, tally
from vnet import copyxid

A, B = 512, 65535
CHURNED = 7000
"""The first of the ids by which the node's namespace knows those that come and go."""
REASONS = copyxid.COUNTERS[: copyxid.COUNTERS.index("filled")]
"""Of these each packet counts for exactly one."""

TIMEOUTS = {
    # Connections are gone soon after they end, so that millions fit. Nothing
    # that comes late may make one anew.
    "tcp_timeout_time_wait": 10,
    "tcp_timeout_close": 10,
    "udp_timeout": 10,
    "udp_timeout_stream": 10,
    "tcp_loose": 0,
}


@dataclass
class Bed:
    """See the drawing above."""

    node: vnetbed.Node
    peer: net.Namespace
    link: net.Link
    a: cgroup.Cgroup
    b: cgroup.Cgroup
    counters: Callable[[], dict[str, int]]
    """The data path's counters by reason."""
    reopens: bool = False
    """A SYN over a TIME_WAIT may come in as nobody's (vnet.datapath.DIFFERENCES)."""
    makers: list[flows.Maker] = field(default_factory=list)
    laps: dict[str, float] = field(default_factory=dict)
    """Seconds, by what was done."""

    @contextmanager
    def lap(self, what: str) -> Iterator[None]:
        """Take the time of a block."""
        began = time.monotonic()
        yield
        spent = self.laps.get(what, 0.0) + time.monotonic() - began
        self.laps[what] = round(spent, 1)

    @property
    def ns(self) -> net.Namespace:
        """The node's namespace."""
        return self.node.ns

    @property
    def made(self) -> flows.Done:
        """All flows so far."""
        return sum((maker.total for maker in self.makers), flows.Done())

    def hasten(self, stack: ExitStack) -> None:
        """Set the timeouts until the end: conntrack is there once the node is up."""
        names = [f"net.netfilter.nf_conntrack_{name}" for name in TIMEOUTS]
        before = self.ns.run("sysctl", "-n", *names).stdout.split()
        keys = [name.replace(".", "__") for name in names]
        stack.callback(self.ns.sysctl, **dict(zip(keys, before, strict=True)))
        self.ns.sysctl(**dict(zip(keys, TIMEOUTS.values(), strict=True)))

    def state(self) -> tuple[dict[str, int], dict[str, int]]:
        """The data path's counters and our own, once no packet is on its way any more."""
        last: list[object] = [None]

        def same() -> bool:
            now = (self.counters(), tally.read(self.ns))
            last.insert(0, now)
            return now == last[1]

        until(same, 60, "no more packets")
        return last[0]  # type: ignore[return-value]

    def waiting(self) -> int:
        """Sockets in TIME_WAIT, at either end."""
        return slabs.accounted()[0]

    def drained(self) -> None:
        """No connection is left."""
        slabs.drain(self.ns)


@contextmanager
def bed(
    node: vnetbed.Node,
    a: cgroup.Cgroup,
    b: cgroup.Cgroup,
    up: Callable[[], object],
    counters: Callable[[], dict[str, int]],
    reopens: bool = False,
) -> Iterator[Bed]:
    """Bring the node up, start servers and makers, and count."""
    with ExitStack() as stack:
        peer = stack.enter_context(net.namespace("peer"))
        link = stack.enter_context(net.veth(node.ns, peer))
        node.slices(a=(a.rel, A), b=(b.rel, B))
        up()
        made = Bed(node, peer, link, a, b, counters, reopens)
        made.hasten(stack)
        stack.enter_context(flows.serving(peer, None, link.b4, link.b6))
        stack.enter_context(flows.serving(node.ns, b, link.a4, link.a6))
        here, far = (link.a4, link.a6), (link.b4, link.b6)
        routes = [
            *(
                flows.Route(f"a to peer, {h}", node.ns, a, h, f, tally.FIRST_A, A, None)
                for h, f in zip(here, far, strict=True)
            ),
            *(
                flows.Route(f"peer to b, {h}", peer, None, f, h, tally.FIRST_A, None, B)
                for h, f in zip(here, far, strict=True)
            ),
            flows.Route("a to b", node.ns, a, here[0], here[0], tally.FIRST_A + flows.PORTS, A, B),
            flows.Route("node to peer", node.ns, None, here[1], far[1], tally.FIRST_NODE, 0, None),
        ]
        made.makers = stack.enter_context(flows.making(routes))
        tally.lay(node.ns, A, B)
        stack.callback(tally.lift, node.ns)
        yield made


def _gained(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before.get(name, 0) for name in after}


def _owned(bed: Bed, seen: dict[str, int]) -> None:
    assert (seen["wrong"], seen["carried"], seen["bare"]) == (0, 0, 0), seen
    assert bed.reopens or seen["reopened"] == 0, seen


def resent(*namespaces: net.Namespace) -> int:
    """TCP segments sent again."""
    total = 0
    for ns in namespaces:
        names, values = (
            line.split()
            for line in ns.run("cat", "/proc/net/snmp").stdout.splitlines()
            if line.startswith("Tcp:")
        )
        total += int(dict(zip(names, values, strict=True))["RetransSegs"])
    return total


def calm(bed: Bed, each: int) -> flows.Done:
    """Flows while nothing changes, and every sum of them."""
    why, seen = bed.state()
    sent_again = resent(bed.ns, bed.peer)
    dones = flows.make(bed.makers, each)
    done = sum(dones, flows.Done())
    why_after, seen_after = bed.state()
    why, seen = _gained(why_after, why), _gained(seen_after, seen)
    sent_again = resent(bed.ns, bed.peer) - sent_again

    assert done.failed == 0, done
    # Pairs of ports may still be in TIME_WAIT after a storm.
    assert done.all + done.busy == each * len(bed.makers), done
    # Applications against rules: connections and datagrams.
    assert done.tcp <= seen["syn"] <= done.tcp + sent_again
    assert seen["asked"] == done.udp + done.again
    assert done.udp <= seen["answered"] <= done.udp + done.again
    # Every packet of a slice's is known to be its.
    _owned(bed, seen)
    # The data path against rules: each packet has exactly one reason.
    assert sum(why.get(name, 0) for name in REASONS) == seen["out"] + seen["in"], (why, seen)
    # The data path against applications: each slice's end of each flow, once.
    ends = sum(map(flows.Maker.ends, bed.makers, dones))
    assert (why["filled"], why["conflict"], why["intrusion"]) == (ends, 0, 0), why
    return done


@contextmanager
def storm(bed: Bed) -> Iterator[None]:
    """Flows for the length of the block, none of which fails or is another's."""
    before = tally.read(bed.ns)["wrong"]
    with flows.storm(bed.makers) as dones:
        yield
    done = sum(dones, flows.Done())
    assert done.failed == 0, [(m.name, d) for m, d in zip(bed.makers, dones, strict=True)]
    assert all(one.all for one in dones)
    assert tally.read(bed.ns)["wrong"] == before


@contextmanager
def unbroken(bed: Bed) -> Iterator[None]:
    """In a storm: a block that leaves no packet without its owner."""
    before = tally.read(bed.ns)
    yield
    gained = _gained(tally.read(bed.ns), before)
    assert gained["out"] > 0
    _owned(bed, gained)


@contextmanager
def many_cgroups(parent: cgroup.Cgroup, count: int) -> Iterator[list[int]]:
    """So many cgroups' ids."""
    with cgroup.cgroup(parent=parent) as above:
        paths = [above.path / f"n{number}" for number in range(count)]
        for path in paths:
            path.mkdir()
        try:
            yield [path.stat().st_ino for path in paths]
        finally:
            for path in paths:
                path.rmdir()


def rewritten(count: int, ids: list[int], turn: int) -> dict[int, int]:
    """A table of so many slices, every one another number than at the last turn.

    None is one of the two that have the traffic.
    """
    free = [xid for xid in range(1, 65535) if xid != A]
    return {number: free[(place + turn * 7919) % len(free)] for place, number in enumerate(ids)}


def churn_namespace(bed: Bed, rules: Callable[[net.Namespace], None], number: int) -> None:
    """A namespace with a slice's flows in it, deleted while they are made."""
    with net.namespace(f"c{number}") as ns:
        know(bed.ns, ns, number)
        rules(ns)
        with (
            flows.serving(ns, bed.b, "127.0.0.1"),
            flows.making(
                [flows.Route("within", ns, bed.a, "127.0.0.1", "127.0.0.1", 20_000, A, B)]
            ) as makers,
        ):
            (done,) = flows.make(makers, 30)
            assert (done.failed, done.all) == (0, 30), done
            makers[0].say("on")
            net.delete(ns)


def know(here: net.Namespace, ns: net.Namespace, number: int) -> None:
    """Give a namespace an id in another: it has it until it is no more, whatever its name."""
    here.run("ip", "netns", "set", ns.name, str(CHURNED + number))


def gone(here: net.Namespace, seconds: float = 60) -> None:
    """None of the namespaces that were deleted lives on. Raises AssertionError.

    One that something still refers to keeps its id; the kernel takes it back as it takes the
    namespace down (unhash_nsid() in net/core/net_namespace.c).
    """

    def kept() -> list[int]:
        listed = here.run("ip", "netns", "list-id").stdout
        ids = map(int, re.findall(r"^nsid (\d+)", listed, re.M))
        return [number for number in ids if number >= CHURNED]

    until(lambda: not kept(), seconds, f"no deleted namespace; there were {kept()}")


def report(path: Path, **facts: object) -> None:
    """Add a run's facts to a file, for docs/testing.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        for name, value in facts.items():
            out.write(f"{name}: {value}\n")
