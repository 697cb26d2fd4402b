"""A guarded node, somebody in each slice of tests/guard_attempts.py, and a peer.

    a, b, c, f, node, user --- node [vnet up] --- veth --- peer (listens to all)

On the host the node is a namespace, in a guest the guest itself.
"""

import ctypes
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import guard_attempts as attempts
import pytest
from guard_attempts import UNSEEN, Case
from vnet.testing import cgroup, net, nflog
from vnet.testing.agents import Agent, begin
from vnet.testing.packets import World
from vnet.testing.poll import until
from vnet.testing.steps import Steps
from vnetbed import Node

from vnet import bpf, refusals

_SENDS = ("send", "uring", "connect", "sendif")


@dataclass
class Guarded:
    """See the drawing above."""

    node: Node
    peer: net.Namespace
    link: net.Link
    datapath: str
    slices: dict[str, cgroup.Cgroup]
    agents: dict[str, Agent]
    log: nflog.Capture
    last: dict[int, socket.socket]
    """By family: what sends the packet after which no other will come."""
    has: frozenset[str]
    """What this kernel has: sctp, lsm, uring-bind."""
    dports: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def world(self, family: int) -> World:
        """Addresses, and a token nobody has used."""
        four = family == 4
        here = self.link.a4 if four else self.link.a6
        return World(
            family,
            here,
            self.link.b4 if four else self.link.b6,
            _second(here),
            "192.0.2.77" if four else "2001:db8::77",
            self.link.a_if,
            os.urandom(8),
            20_000 + next(self.dports) % 10_000,
        )

    def seen(self, token: bytes, family: int = 4) -> list[nflog.Seen]:
        """What has come out at the peer with this token in it."""
        last = self.world(family)
        # Sent after it through the same queues: each CPU has its own, and agents are on one.
        cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cpus)})
        try:
            self.last[family].sendto(last.token, (last.there, attempts.SINK))
        finally:
            os.sched_setaffinity(0, cpus)

        def arrived() -> bool:
            return any(last.token in packet.payload for packet in self.log.seen())

        until(arrived, what="the packet after it")
        return self.came(token)

    def came(self, token: bytes) -> list[nflog.Seen]:
        """What has come out up to now with this token in it."""
        return [packet for packet in self.log.seen() if token in packet.payload]

    def tracked(self, *fields: str) -> list[str]:
        """The lines of connection tracking that hold all these words."""
        listed = "".join(
            self.node.ns.run("conntrack", "-L", "-f", family).stdout for family in ("ipv4", "ipv6")
        )
        return [line for line in listed.splitlines() if set(fields) <= set(line.split())]

    def refusals(self) -> dict[int, int]:
        """How often the guard has refused, or would have refused, each xid something."""
        [instance] = bpf.instances(Path(self.node.env["VNET_BPF_DIR"]))
        found: dict[int, int] = {}
        for count in refusals.read(instance):
            found[count.xid] = found.get(count.xid, 0) + count.refused + count.observed
        return found

    def check(self, case: Case, family: int) -> None:
        """Each who is refused is, and it is counted; each who is allowed succeeds."""
        if case.needs and case.needs not in self.has:
            pytest.skip(f"this kernel has no {case.needs}")
        counted = self.refusals()
        for role in case.refused:
            world, said, seen = self.attempt(case, family, role)
            before, counted = counted, self.refusals()
            xid = attempts.XIDS[role]
            if case.how == UNSEEN:
                asked = said.get("errno") == "EACCES" and said["at"] == "bind"
                assert said["ok"] or said["at"] in _SENDS or asked, (role, said)
                assert seen == [], (role, said)
                if not case.tracked:
                    assert self.tracked(f"src={world.here}", f"dport={world.dport}") == []
            else:
                found = (said["ok"], said.get("at"), said.get("errno"))
                assert found == (False, case.at, case.how), (role, said)
            assert counted.get(xid, 0) > before.get(xid, 0), (role, said, "not counted")
        for role in case.allowed:
            self.succeeds(case, family, role)

    def succeeds(self, case: Case, family: int, role: str) -> None:
        """The attempt of somebody succeeds."""
        world, said, _ = self.attempt(case, family, role)
        assert said["ok"], (role, said)
        if case.how == UNSEEN:  # a kernel thread may have sent it, on another CPU
            until(lambda: self.came(world.token), what=f"{role}: what was sent comes out")

    def check_observed(self, case: Case, family: int) -> None:
        """In observe mode: who would be refused succeeds, and is counted."""
        for role in case.refused[:1]:
            before, xid = self.refusals(), attempts.XIDS[role]
            self.succeeds(case, family, role)
            assert self.refusals().get(xid, 0) > before.get(xid, 0), (role, "not counted")

    def attempt(
        self, case: Case, family: int, role: str
    ) -> tuple[World, dict[str, Any], list[nflog.Seen]]:
        """Let somebody try: the answer, and what came out at the peer."""
        world = self.world(family)
        with ExitStack() as stack:
            if case.before:
                who, steps = case.before
                stack.enter_context(self.agents[who].holding(steps(world)))
            said = self.agents[role].tries(case.steps(world))
            seen = self.seen(world.token, family) if case.how == UNSEEN else []
        return world, said, seen


def _second(address: str) -> str:
    """Another address of the same subnet: a's own."""
    head, last = address.rsplit(":" if ":" in address else ".", 1)
    return f"{head}:50" if ":" in address else f"{head}.{int(last) + 49}"


def slices_toml(link: net.Link, slices: dict[str, cgroup.Cgroup]) -> str:
    """The slices and their grants."""
    ports = []
    for proto in ("tcp", "udp", "sctp"):
        ports += [f"{proto}/{attempts.PORT}", f"{proto}/{attempts.RANGE[0]}-{attempts.RANGE[1]}"]
        ports += [f"{proto}/{link.a4}:{attempts.ON_ADDRESS}"]
        ports += [f"{proto}/[{link.a6}]:{attempts.ON_ADDRESS}"]
    grants = {
        "a": {
            "raw": "own",
            "ports": ports,
            "addresses": [_second(link.a4), _second(link.a6)],
        },
        "b": {"raw": "own", "ports": [f"{p}/{attempts.PORT_B}" for p in ("tcp", "udp")]},
        "c": {},
        "f": {"raw": "full"},
    }
    text = ""
    for name, made in slices.items():
        text += (
            f'[[slice]]\nname = "{name}"\ncgroups = ["{made.rel}"]\nxid = {attempts.XIDS[name]}\n'
        )
        if grants.get(name):
            text += "[slice.grants]\n"
            text += "".join(f"{key} = {json.dumps(v)}\n" for key, v in grants[name].items())
    return text


@contextmanager
def agents(
    ns: net.Namespace, peer: net.Namespace, slices: dict[str, cgroup.Cgroup]
) -> Iterator[dict[str, Agent]]:
    """Somebody in each slice, two outside, and one at the peer."""
    with ExitStack() as stack:
        begun = {role: stack.enter_context(begin(role, ns, slices[role])) for role in slices}
        begun["node"] = stack.enter_context(begin("node", ns))
        begun["user"] = stack.enter_context(begin("user", ns, uid=65534))
        begun["peer"] = stack.enter_context(begin("peer", peer))
        for agent in begun.values():
            agent.answer(0)
        yield begun


@contextmanager
def inside(ns: net.Namespace) -> Iterator[None]:
    """This thread is in a namespace (os.setns exists from Python 3.12 on)."""
    if not ns.name:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{ns.name}", os.O_RDONLY)
    try:
        assert libc.setns(there, 0) == 0
        yield
    finally:
        assert libc.setns(home, 0) == 0
        os.close(home)
        os.close(there)


@contextmanager
def bpffs(at: Path) -> Iterator[Path]:
    """A bpffs of our own."""
    at.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "bpf", "bpf", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def what_it_has(ns: net.Namespace) -> frozenset[str]:
    """What this kernel has of what not every kernel has."""
    found = set()
    for name, words in {
        "sctp": "socket.socket(2, 1, 132)",
        "mptcp": "socket.socket(2, 1, 262)",
    }.items():
        with suppress(AssertionError):
            ns.run(sys.executable, "-I", "-S", "-c", f"import socket; {words}")
            found.add(name)
    major, minor = map(int, os.uname().release.split(".")[:2])
    if (major, minor) >= (6, 11):
        found.add("uring-bind")
    if not bpf.lsm_lacking():
        found.add("lsm")
    return frozenset(found)


@contextmanager
def guarded(base: Path, ns: net.Namespace, datapath: str = "bpf") -> Iterator[Guarded]:
    """A node that is up with this data path."""
    with ExitStack() as stack:
        enter = stack.enter_context
        made = {role: enter(cgroup.cgroup()) for role in attempts.SLICES}
        peer = enter(net.namespace("peer"))
        link = enter(net.veth(ns, peer))
        four, six = _second(link.a4), _second(link.a6)
        # preferred_lft 0, or the kernel picks it as everybody's source (RFC 6724, rule 3)
        ns.run(
            *("ip", "-batch", "-"),
            input=f"addr add {four}/24 dev {link.a_if}\n"
            f"addr add {six}/64 dev {link.a_if} nodad preferred_lft 0\n",
        )
        with suppress(AssertionError):  # a guest may have had it already
            ns.sysctl(net__ipv4__ping_group_range="0 2147483647")
        has = what_it_has(ns)
        node = Node(ns, base)
        node.env["VNET_BPF_DIR"] = str(enter(bpffs(base / "bpf")))
        (base / "config" / "slices.toml").write_text(slices_toml(link, made))
        packet = "guarded" if "lsm" in has else "unguarded"
        (base / "vnet.toml").write_text(f'[guard]\npacket_sockets = "{packet}"\n')
        node.vnet("up", "--datapath", datapath)
        stack.callback(node.vnet, "down")
        log = enter(nflog.capture(peer, hooks=("prerouting",)))
        found = enter(agents(ns, peer, made))
        enter(found["peer"].holding(_sink("SOCK_DGRAM")))
        enter(found["peer"].holding([*_sink("SOCK_STREAM")[:-1], ["listen"], ["hold"]]))
        with inside(ns):
            last = {
                family: enter(socket.socket(af, socket.SOCK_DGRAM))
                for family, af in ((4, socket.AF_INET), (6, socket.AF_INET6))
            }
        bed = Guarded(node, peer, link, datapath, made, found, log, last, has)
        for family in (4, 6):  # the neighbours know each other from here on
            bed.seen(b"", family)
        yield bed


def _sink(kind: str) -> Steps:
    return [["socket", "AF_INET6", kind], ["bind", "::", attempts.SINK], ["hold"]]
