"""The node, brought up, and the peer.

slices a b (raw full) c (raw own) d (raw deny) and the node -- [vnet up] -- veth -- peer
"""

import random
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from guardbed import inside
from netflowbed import collector
from vnet.testing import cgroup, net
from vnet.testing.poll import until
from vnetbed import Node, bpffs

from mix import actors, packets, wire
from mix.packets import TCP, UDP
from mix.sock import LISTENERS, RAW, RESERVED, SINKS, SLICES, XIDS
from mix.truth import Policy, Truth
from mix.world import World

WEEK = 604_800
"""s"""


@contextmanager
def world(
    base: Path, ns: net.Namespace, datapath: str, seed: int, variant: str = "auto"
) -> Iterator[World]:
    """A node that is up, and all that is needed to play."""
    with ExitStack() as stack:
        enter = stack.enter_context
        groups = {name: enter(cgroup.cgroup()) for name in SLICES}
        peer = enter(net.namespace("peer"))
        link = enter(net.veth(ns, peer))
        # A guest's own namespace is there for the next test, too.
        enter(as_before(ns, "icmp_", "icmp.", "ping_group", "tcp_invalid"))
        _patience(ns, peer)
        enter(bpffs(base))
        node = Node(ns, base)
        node.settings('[guard]\npacket_sockets = "unguarded"\n')
        write_slices(base, groups, XIDS)
        node.vnet("up", "--datapath", datapath, "--variant", variant)
        stack.callback(node.vnet, "down")
        enter(as_before(ns, "_timeout"))
        flows = enter(collector(ns, base / "state", "--active-timeout", "60s", wait=120))
        tap = enter(wire.capture(ns, peer, link.a_if, link.b_if, base))
        local = {packets.packed(a) for a in (link.a4, link.a6, "127.0.0.1", "::1")}
        ports = {(p, n): who for who, found in RESERVED.items() for n in found for p in (TCP, UDP)}
        truth = Truth(datapath, Policy(RAW, ports), local, dict(XIDS))
        people: dict[tuple[str, str], actors.Actor] = {}
        made = World(
            node,
            peer,
            link,
            random.Random(seed),
            truth,
            flows,
            tap,
            groups,
            people,
            variant=variant,
            homes={name: made.id for name, made in groups.items()},
        )
        stack.callback(lambda: [a.end() for a in people.values()])
        stack.callback(lambda: [sock.close() for sock in made.raw.values()])
        with inside(peer):
            for family, domain in ((4, socket.AF_INET), (6, socket.AF_INET6)):
                made.peers[family] = {}
                for port in (*SINKS, *LISTENERS):
                    kind = socket.SOCK_DGRAM if port in SINKS else socket.SOCK_STREAM
                    sock = enter(socket.socket(domain, kind))
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    sock.bind((made.there(family), port))
                    if port in LISTENERS:
                        sock.listen(64)
                    made.peers[family][port] = sock
                raw = enter(socket.socket(domain, socket.SOCK_RAW, 255))
                made.peers[family][0] = raw
        _meet(made)
        yield made


def write_slices(base: Path, groups: dict[str, cgroup.Cgroup], xids: dict[str, int]) -> None:
    """slices.toml."""
    text = ""
    for name, made in groups.items():
        if name not in xids:
            continue
        ports = [f'"{p}/{n}"' for p in ("tcp", "udp") for n in RESERVED.get(name, ())]
        text += (
            f'[[slice]]\nname = "{name}"\ncgroups = ["{made.rel}"]\nxid = {xids[name]}\n'
            f'[slice.grants]\nraw = "{RAW[name]}"\nports = [{", ".join(ports)}]\n'
        )
    (base / "config" / "slices.toml").write_text(text)


@contextmanager
def as_before(ns: net.Namespace, *parts: str) -> Iterator[None]:
    """Settings with one of these in their names have their values again afterwards."""
    names = ns.run("sysctl", "-aN").stdout.split()
    mine = [name for name in names if any(part in name for part in parts)]
    before = _values(ns, mine)
    try:
        yield
    finally:
        after = _values(ns, mine)
        changed = [f"{name}={before[name]}" for name in mine if after[name] != before[name]]
        if changed:
            ns.run("sysctl", "-qw", *changed)


def _values(ns: net.Namespace, names: list[str]) -> dict[str, str]:
    told = ns.run("sysctl", "-n", *names).stdout.splitlines()
    return dict(zip(names, told, strict=True))


def _patience(ns: net.Namespace, peer: net.Namespace) -> None:
    """Connections live as long as the run, and each bad packet is answered."""
    for where in (ns, peer):
        where.sysctl(
            net__ipv4__icmp_ratelimit=0,
            net__ipv6__icmp__ratelimit=0,
            net__ipv4__ping_group_range="0 2147483647",
            net__ipv4__tcp_invalid_ratelimit=0,
        )
        with suppress(AssertionError):  # not in every kernel, or not in a namespace
            where.sysctl(net__ipv4__icmp_msgs_per_sec=1000000, net__ipv4__icmp_msgs_burst=1000000)


def be_patient(ns: net.Namespace) -> None:
    """The same for connection tracking, which is there once the node is up.

    A week: 10^6 packets take a slow guest five hours, and what is forgotten in the middle
    of a run is somebody else's afterwards, which the truth knows nothing of.
    """
    names = [
        "udp_timeout",
        "udp_timeout_stream",
        "icmp_timeout",
        "icmpv6_timeout",
        "generic_timeout",
        "tcp_timeout_time_wait",
        "tcp_timeout_close",
        "tcp_timeout_fin_wait",
        "tcp_timeout_last_ack",
        "tcp_timeout_syn_sent",
        "tcp_timeout_syn_recv",
        "tcp_timeout_close_wait",
    ]
    ns.run("sysctl", "-qw", *(f"net.netfilter.nf_conntrack_{name}={WEEK}" for name in names))
    more = ("gre_timeout", "gre_timeout_stream", "sctp_timeout_closed", "sctp_timeout_cookie_wait")
    for name in more:  # not in every kernel
        with suppress(AssertionError):
            ns.run("sysctl", "-qw", f"net.netfilter.nf_conntrack_{name}={WEEK}")


def _meet(w: World) -> None:
    """The neighbours know each other, so that nothing waits for that later."""
    for family in (4, 6):
        w.node.ns.run("ping", "-c1", "-W5", w.there(family))
    be_patient(w.node.ns)
    w.node.ns.run("conntrack", "-F")
    until(lambda: not list(w.tap.drain()), what="silence")
    w.since = time.time_ns()
