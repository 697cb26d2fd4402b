"""The whole thread: slices, ``vnet up``, a collector, and a peer to talk to.

    cgroup a, b -- the node (vnet, netflow collect) -- veth -- peer

In a guest the node is the guest itself, in its initial network namespace as on
a real node, and either data path will do; on the host it is a namespace, and
the kernel the host's, without the module.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netflowbed import Collector, collector
from vnet.testing import cgroup, net, nflog
from vnet.testing.net import HERE
from vnet.testing.poll import until
from vnetbed import UNGUARDED, Node, bpffs

from vnet import node as nodes
from vnet import state as states

A, B = 512, 65535
"""The xids of the slices a and b: 65535 is the greatest there is."""

OWN_PORT = 4000
"""The UDP port that is reserved to slice a."""


@dataclass(frozen=True)
class Thread:
    """See the drawing above."""

    node: Node
    peer: net.Namespace
    link: net.Link
    a: cgroup.Cgroup
    b: cgroup.Cgroup
    flows: Collector
    datapath: str = "module"
    """As ``vnet status`` says."""
    log: nflog.Capture | None = None
    """Every packet from the beginning, for ``watching``."""

    @property
    def ns(self) -> net.Namespace:
        """The node's namespace."""
        return self.node.ns

    def here(self, family: int) -> str:
        """The node's address."""
        return self.link.a4 if family == 4 else self.link.a6

    def there(self, family: int) -> str:
        """The peer's address."""
        return self.link.b4 if family == 4 else self.link.b6

    def record(self, **which: Any) -> dict[str, Any]:
        """The one record that matches: AssertionError if there are more or none."""
        records = self.flows.records(**which)
        assert len(records) == 1, records
        return records[0]


@contextmanager
def thread(
    base: Path,
    bring_up: tuple[str, ...] = (),
    ns: net.Namespace = HERE,
    capture: bool = False,
    more: str = "",
) -> Iterator[Thread]:
    """Two slices in a node that is up (with these options of ``vnet up``), and a collector.

    Both may do with raw sockets what they like, short of what is another's.
    ``capture``: every packet, for ``watching``. ``more``: other slices' TOML.
    """
    with (
        cgroup.cgroup() as a,
        cgroup.cgroup() as b,
        net.namespace("peer") as peer,
        net.veth(ns, peer) as link,
        bpffs(base),
    ):
        node = Node(ns, base)
        node.settings(UNGUARDED)
        slices = (("a", a, A, f'ports = ["udp/{OWN_PORT}"]'), ("b", b, B, ""))
        (base / "config" / "slices.toml").write_text(
            "".join(
                f'[[slice]]\nname = "{name}"\ncgroups = ["{made.rel}"]\nxid = {xid}\n'
                f'[slice.grants]\nraw = "full"\n{grants}\n'
                for name, made, xid, grants in slices
            )
            + more
        )
        _up(node, bring_up)
        try:
            datapath = states.load(node.paths.state).datapath
            with collector(ns, base / "state", wait=120) as flows, ExitStack() as stack:
                log = stack.enter_context(nflog.capture(ns)) if capture else None
                yield Thread(node, peer, link, a, b, flows, datapath, log)
        finally:
            _down(node)


def _up(node: Node, options: tuple[str, ...]) -> None:
    """``vnet up``. In a guest by its own function: there a new Python takes seconds to begin."""
    if node.ns is not HERE:
        node.vnet("up", *options, timeout=240)
        return
    asked = dict(zip(options[::2], options[1::2], strict=True))
    variant, datapath = asked.pop("--variant", None), asked.pop("--datapath", None)
    assert not asked
    nodes.up(node.paths, variant, datapath=datapath)


def _down(node: Node) -> None:
    """``vnet down``, likewise."""
    if node.ns is not HERE:
        node.vnet("down", timeout=240)
    else:
        nodes.down(node.paths)


class Since(nflog.Capture):
    """What a capture has seen from now on."""

    def __init__(self, log: nflog.Capture) -> None:
        self._log, self._first = log, len(log.seen())

    def seen(self) -> list[nflog.Seen]:
        """All packets up to now, in the order of the hooks."""
        return self._log.seen()[self._first :]


@contextmanager
def watching(bed: Thread) -> Iterator[nflog.Capture]:
    """The packets from here on. One capture serves all: to make one takes long in a guest."""
    assert bed.log
    yield Since(bed.log)


def xids(seen: list[nflog.Seen], whole: bool = False) -> dict[str, set[int]]:
    """The xids (or whole marks) at each hook."""
    found: dict[str, set[int]] = {}
    for packet in seen:
        found.setdefault(packet.prefix, set()).add(packet.mark if whole else packet.xid)
    return found


def of_port(log: nflog.Capture, port: int) -> list[nflog.Seen]:
    """The packets to or from a port; ICMP has none, though its type and code are read as one."""
    seen = (packet for packet in log.seen() if packet.proto not in nflog.ICMP)
    return [packet for packet in seen if port in (packet.sport, packet.dport)]


def closed(log: nflog.Capture, port: int) -> list[nflog.Seen]:
    """All packets of a TCP connection, once each side's FIN is acknowledged."""

    def over() -> list[nflog.Seen]:
        seen = of_port(log, port)
        first: dict[int, int] = {}
        for at, packet in enumerate(seen):
            if "F" in packet.tcp_flags:
                first.setdefault(packet.sport, at)
        # Not the last packet: a FIN that is sent again late may get no answer.
        last = max(first.values(), default=0)
        answers = [p for p in seen[last:] if p.sport != seen[last].sport and "A" in p.tcp_flags]
        return seen if len(first) == 2 and answers else []

    return until(over, what=f"the connection of port {port} is closed")


def totals(seen: list[nflog.Seen]) -> tuple[int, int, int, int]:
    """Packets and bytes out, then in: what a record of the node's own connection has."""
    out = [packet.length for packet in seen if packet.prefix == "postrouting"]
    back = [packet.length for packet in seen if packet.prefix == "input"]
    return len(out), sum(out), len(back), sum(back)


def resent(seen: list[nflog.Seen]) -> int:
    """TCP segments with data that went out more than once."""
    starts = [
        packet.payload[20 + (packet.family == 6) * 20 :][4:8]
        for packet in seen
        if packet.prefix == "postrouting" and packet.length > 100
    ]
    return len(starts) - len(set(starts))


@contextmanager
def losing(ns: net.Namespace, port: int) -> Iterator[None]:
    """Lose some of the first packets to and from a port, the SYN and the SYN-ACK among them.

    The SYN, too: if the SYN-ACK alone is lost, both sides' timers run out together,
    and either may be the first to send again.
    """
    ns.run(
        *("nft", "-f", "-"),
        input=f"""table inet losing {{
            chain i {{ type filter hook input priority 0
                tcp dport {port} numgen inc mod 1000 {{ 0, 3, 6, 10 }} drop
            }}
            chain o {{ type filter hook output priority 0
                tcp sport {port} numgen inc mod 1000 {{ 0, 3, 6 }} drop
            }}
        }}
        """,
    )
    try:
        yield
    finally:
        ns.run("nft", "delete", "table", "inet", "losing")
