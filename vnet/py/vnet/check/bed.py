"""Canaries: slices of the checker's own beside those of the node, and a peer to talk to.

    holder, own, deny, full, node --- the node --- veth --- peer

Nothing that is somebody else's is touched. What is made carries the checker's
process id in its name (vnet.testing.names); what a killed checker left is found
by that and by the name of the canaries' file, and taken away by the next one.
"""

import errno
import fcntl
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from vnet import bpf, config, node, policy, status
from vnet import state as states
from vnet.check import spare
from vnet.check.facts import ROLES, SLICES
from vnet.check.sandbox import whole
from vnet.errors import NodeError, VnetError
from vnet.paths import Paths
from vnet.testing import agents, cgroup, net, nflog
from vnet.testing.agents import Agent
from vnet.testing.net import HERE, Namespace
from vnet.testing.packets import World
from vnet.testing.poll import until

CANARY = "vnet-check-"
"""How the canaries' names begin."""
FILE = "vnet-check.toml"
AGAIN = "again"
"""A slice whose cgroup is removed and made again."""
UPPER = 0x40000
"""A bit of the mark that is somebody else's."""
SINK = 4999
"""A port of the peer at which nobody answers anybody."""
_PORTS = range(10_000, 50_000)
"""Ports of the peer for what does take part (World.dport)."""


@dataclass(frozen=True)
class Before:
    """What was not as it should be before the canaries came, and is again when a slice comes:
    they do not see it."""

    policy: list[str]
    """Of what the files say."""
    interfaces: list[str]
    """Of the filters on the interfaces of the slices' containers."""
    reserved: list[str]
    """Of the ports that the kernel picks for nobody."""
    hearing: list[str]
    """Of the program between raw sockets and what they hear."""


@dataclass
class Bed:
    """See the drawing above."""

    paths: Paths
    instance: Path
    datapath: str
    peer: Namespace
    link: net.Link
    ports: spare.Ports
    slices: dict[str, cgroup.Cgroup]
    xids: dict[str, int]
    agents: dict[str, Agent]
    near: nflog.Capture
    """What the node's hooks saw of the canaries' packets, with the marks."""
    far: nflog.Capture
    """What came out at the peer."""
    has: frozenset[str]
    before: Before
    mine: dict[int, str]
    nowhere: dict[int, str]
    box: net.Link | None
    """A container's, whose host end is a; None where the node's slices have none."""
    count: int = field(default_factory=lambda: secrets.randbelow(40_000))
    patience: float = 4.0
    """Seconds, times vnet.testing.poll.PATIENCE, to wait for what takes milliseconds when all
    is well (Trial.in_vain)."""

    def world(self, family: int) -> World:
        """Addresses, and a token and a port that no other attempt uses."""
        self.count += 1
        here, there = (self.link.a4, self.link.b4) if family == 4 else (self.link.a6, self.link.b6)
        return World(
            *(family, here, there, self.mine[family], self.nowhere[family], self.link.a_if),
            *(os.urandom(8), _PORTS[self.count % len(_PORTS)], SINK),
        )

    def port(self) -> int:
        """A port of the node that is nobody's, another one than the last time."""
        self.count += 1
        return self.ports.nth(self.count)


def what_it_has(state: states.State) -> frozenset[str]:
    """What this node and kernel have of what not all have. Loads no module."""
    found = set()
    if state.packet_sockets == "guarded":
        found.add("lsm")
    if Path("/proc/net/sctp").exists():
        found.add("sctp")
    if os.uname().machine == "x86_64" and Path("/proc/sys/abi/vsyscall32").exists():
        found.add("ia32")
    if Path("/sys/module/smc").exists():
        found.add("smc")
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262):
        found.add("mptcp")
    low, high = Path("/proc/sys/net/ipv4/ping_group_range").read_text().split()
    if int(low) <= os.getegid() <= int(high):
        found.add("ping")
    for family, switch in ((4, "ipv4/ip_forward"), (6, "ipv6/conf/all/forwarding")):
        path = Path("/proc/sys/net", switch)
        if path.exists() and path.read_text().strip() != "0":
            found |= {"forwarding", f"forwarding{family}"}
    if state.interfaces:
        found.add("containers")
    return frozenset(found)


@contextmanager
def canaries(paths: Paths) -> Iterator[Bed]:
    """Canaries on the node that is up in this network namespace.

    Raises NodeError if it is not up, and whatever making a slice raises.
    """
    state = states.load(paths.state)
    if state is None:
        raise NodeError("vnet check --live: the node is down", "vnet up")
    if not state.instance:
        raise NodeError("an older vnet brought the node up, without the guard", "vnet up")
    with _alone(paths), ExitStack() as end, ExitStack() as stack:
        sweep(paths)
        before = look_before(paths, Path(state.instance))
        enter = stack.enter_context
        groups = {role: enter(cgroup.cgroup(role)) for role in (*ROLES, AGAIN, "box")}
        peer = enter(net.namespace("peer"))
        link, nowhere, box = spare.addresses()
        enter(net.veth(HERE, peer, link))
        if not state.interfaces:
            box = None  # the first interface of a slice would change the node's rules
        inside = _container(enter, peer, link, box) if box else None
        mine = {4: spare.second(link.a4), 6: spare.second(link.a6)}
        # preferred_lft 0, or the kernel picks it as everybody's source (RFC 6724, rule 3)
        HERE.run(
            *("ip", "-batch", "-"),
            input=f"addr add {mine[4]}/24 dev {link.a_if}\n"
            f"addr add {mine[6]}/64 dev {link.a_if} nodad preferred_lft 0\n",
        )
        peer.sysctl(net__ipv4__icmp_ratelimit=0, net__ipv6__icmp__ratelimit=0)
        # None of the ports that World.dport gives, or one may still be in TIME_WAIT.
        peer.sysctl(net__ipv4__ip_local_port_range=f"{_PORTS.stop} 60999")
        ports = spare.free_ports()
        near, far = enter(_capture(HERE, link, nowhere, box)), enter(_capture(peer))
        # Last, since it is what others see; and taken away first.
        xids = enter(_registered(paths, groups, ports, link, mine, box))
        begun = {role: enter(agents.begin(role, HERE, groups[role])) for role in ROLES}
        begun["peer"] = enter(agents.begin("peer", peer))
        if inside:
            begun["box"] = enter(agents.begin("box", inside))
        for agent in begun.values():
            agent.answer(0)
        bed = Bed(
            *(paths, Path(state.instance), state.datapath, peer, link, ports, groups, xids),
            *(begun, near, far, what_it_has(state), before, mine, nowhere, box),
        )
        enter(begun["peer"].holding([["socket", "AF_INET6", "SOCK_DGRAM"],
                                     ["bind", "::", SINK], ["hold"]]))  # fmt: skip
        enter(begun["peer"].holding([["socket", "AF_INET6", "SOCK_STREAM"],
                                     ["bind", "::", SINK], ["listen"], ["hold"]]))  # fmt: skip
        # From then on nobody stops us: what is half taken away would stay.
        stack.callback(lambda: end.enter_context(whole()))
        yield bed


def look_before(paths: Paths, instance: Path) -> Before:
    """What canaries would mend by coming."""
    hearing = [line for line in bpf.healthy(instance) if bpf.HEARING in line]
    return Before(**status.policy_differences(paths), hearing=hearing)


@contextmanager
def _alone(paths: Paths) -> Iterator[None]:
    """One checker at a time on a node. Raises NodeError."""
    paths.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    fd = os.open(paths.run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise NodeError("another `vnet check` is at work on this node", "wait for it") from error
    finally:
        os.close(fd)


def sweep(paths: Paths) -> None:
    """Take away what killed checkers have left on this node."""
    file = paths.config_dir / FILE
    if file.exists():
        node.remove_file(paths, file)
    cgroup.sweep()
    net.sweep()
    for family, name in re.findall(
        r"^table (\S+) (vnt_nflog_\S+)", HERE.run("nft", "list", "tables").stdout, re.MULTILINE
    ):
        group = int(name.rsplit("_", 1)[1])
        if group >= _FIRST_GROUP and not _listened_to(group):
            HERE.run("nft", "delete", "table", family, name)


_FIRST_GROUP = 0x7600


def _listened_to(group: int) -> bool:
    """Whether somebody listens to an NFLOG group (the first column of this file)."""
    listed = Path("/proc/self/net/netfilter/nfnetlink_log")
    with suppress(OSError):
        return str(group) in {line.split()[0] for line in listed.read_text().splitlines()}
    return False


@contextmanager
def _capture(
    ns: Namespace,
    link: net.Link | None = None,
    nowhere: dict[int, str] | None = None,
    box: net.Link | None = None,
) -> Iterator[nflog.Capture]:
    """Of the node, what goes over the canaries' link or between their addresses only."""
    if link is None or nowhere is None:
        with nflog.capture(ns, hooks=("prerouting",)) as log:
            yield log
        return
    subnet4, subnet6 = link.a4.rsplit(".", 1)[0] + ".0/24", link.a6.rsplit("::", 1)[0] + "::/64"
    places = {"ip": [subnet4, nowhere[4]], "ip6": [subnet6, nowhere[6]]}
    if box:
        places["ip"] += [box.a4, box.b4]
        places["ip6"] += [box.a6, box.b6]
    only = tuple(f"{ip} daddr {{ {', '.join(at)} }}" for ip, at in places.items())
    # Somebody else's bit on what comes in, at ports and addresses that stand for it.
    more = (
        "chain others { type filter hook prerouting priority mangle;\n"
        f'iifname "{link.a_if}" th sport {MARKED} meta mark set meta mark or {UPPER:#x}\n'
        f'iifname "{link.a_if}" tcp sport {MARKED} tcp flags == syn | ack meta mark set 0x7\n'
        f'iifname "{link.a_if}" ip daddr {nowhere[4]} meta mark set 0x7\n'
        f'iifname "{link.a_if}" ip6 daddr {nowhere[6]} meta mark set 0x7\n}}\n'
        "chain resets { type filter hook output priority mangle;\n"
        f'oifname "{link.a_if}" tcp dport {MARKED} tcp flags rst meta mark set 0x7\n}}\n'
    )
    with ExitStack() as stack:
        yield _first_free(stack, ns, only, more)


def _first_free(stack: ExitStack, ns: Namespace, only: tuple[str, ...], more: str) -> nflog.Capture:
    """A capture by a group that nobody else listens to. Raises NodeError."""
    for group in range(_FIRST_GROUP, _FIRST_GROUP + 100):
        try:
            return stack.enter_context(
                nflog.capture(ns, group, (*nflog.HOOKS, "forward"), only, more)
            )
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
    raise NodeError("somebody listens to every NFLOG group that the checker would take")


MARKED = 4998
"""A port of the peer: what comes from there has somebody else's bit in its mark."""


def _container(
    enter: Callable[[AbstractContextManager[Any]], Any],
    peer: Namespace,
    link: net.Link,
    box: net.Link,
) -> Namespace:
    """A container behind a veth of its own; the peer knows the way to it."""
    made: Namespace = enter(net.namespace("box"))
    enter(net.veth(HERE, made, box))
    # a router asks for neighbours from its link-local address, and not without one
    for at in (box, link):
        HERE.run("ip", "addr", "add", "fe80::1/64", "dev", at.a_if, "nodad")
    for family, via, there, near in (
        (4, box.a4, box.b4, link.a4),
        (6, box.a6, box.b6, link.a6),
    ):
        made.run("ip", f"-{family}", "route", "add", "default", "via", via)
        peer.run("ip", f"-{family}", "route", "add", there, "via", near)
    return made


@contextmanager
def _registered(
    paths: Paths,
    groups: dict[str, cgroup.Cgroup],
    ports: spare.Ports,
    link: net.Link,
    mine: dict[int, str],
    box: net.Link | None,
) -> Iterator[dict[str, int]]:
    """The canaries as slices of this node: {role: xid}."""
    file = paths.config_dir / FILE
    grants = dict.fromkeys((*SLICES, AGAIN), config.Grants()) | {
        "holder": config.Grants("own", tuple(_holders(ports, link)),
                                (ip_address(mine[4]), ip_address(mine[6]))),
        "own": config.Grants("own", tuple(
            config.Port(p, ports.own, ports.own) for p in ("tcp", "udp"))),
        "full": config.Grants("full"),
    }  # fmt: skip
    if box:
        grants["box"] = config.Grants()
    new = [
        config.Slice(
            *(f"{CANARY}{role}", (groups[role].rel,), None, grants[role], file, 1),
            (box.a_if,) if box and role == "box" else (),
        )
        for role in grants
    ]
    try:
        with whole():
            given, _ = node.add_slices(paths, new)
        yield {role: given[f"{CANARY}{role}"] for role in grants} | {"node": 0}
    finally:
        with whole():
            _take_away(paths, file)


def _take_away(paths: Paths, file: Path) -> None:
    """Others may hold the lock for a while; and a slice is never left because of that."""
    until_ = time.monotonic() + 120
    while file.exists():
        try:
            node.remove_file(paths, file)
            return
        except FileNotFoundError:  # somebody else has
            return
        except VnetError:
            if time.monotonic() > until_:
                raise


def _holders(ports: spare.Ports, link: net.Link) -> Iterator[config.Port]:
    for proto in ("tcp", "udp", "sctp"):
        yield config.Port(proto, ports.reserved, ports.row[1])
        for address in (link.a4, link.a6):
            yield config.Port(
                proto,
                ports.on_address,
                ports.on_address,
                ip_address(address),
            )


def in_table(bed: Bed, number: int, timeout: float) -> bool:
    """Whether a cgroup's id comes into the table within so many seconds."""
    with suppress(AssertionError):
        until(lambda: number in policy.read(bed.instance).slices, timeout, "the new cgroup")
        return True
    return False
