"""A node whose packets are to be marked, two slices in it, and a peer.

    agents a, b (in the slices), node -- the node's namespace -- veth -- agent peer

``rules`` says what marks: "mangle" is all that ``vnet up`` installs, with
``netflow collect`` beside it; "nat" one rule alone, ``-t nat -A POSTROUTING -j
MARK --copy-xid``. Without the module that rule is of stock parts: the programs
give each socket its mark, CONNMARK writes it into the connection.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from netflowbed import Collector, accounting, collector
from testbed import vm
from thread_bed import A, B, thread
from vnet.policy import Policy
from vnet.testing import cgroup, net, nflog
from vnet.testing.cgroup import Cgroup
from vnet.testing.net import HERE, Namespace
from vnetbed import Node, bpffs

from vnet import bpf, copyxid, iptables, policy

Rules = Literal["mangle", "nat"]
Parts = tuple[Namespace, net.Link, tuple[Cgroup, Cgroup], Collector, Node | None]

_MODULES = ("nf_conntrack_netlink", "nfnetlink_log", "veth", "xt_copyxid")
_COPY = "-j MARK --copy-xid"
_SAVE = "-j CONNMARK --save-mark --nfmask 0xffff --ctmask 0xffff"


class Refused(Exception):
    """The kernel has refused what an agent was told; the error's name is its text."""


@dataclass
class Agent:
    """A process at one place: its functions are those of truth.agent."""

    process: subprocess.Popen[str]

    def __getattr__(self, what: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            return self._ask([what, *arguments], named)

        return call

    def _ask(self, words: list[Any], named: dict[str, Any]) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([words, named]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the agent has ended at {words}"
        verdict, value = json.loads(line)
        if verdict != "ok":
            raise Refused(value)
        return value


@dataclass(frozen=True)
class Bed:
    """See the drawing above."""

    datapath: str
    rules: Rules
    ns: Namespace
    far: Namespace
    link: net.Link
    cgroups: tuple[Cgroup, Cgroup]
    log: nflog.Capture
    agents: dict[str, Agent]
    collector: Collector
    node: Node | None = None
    """With rules "mangle": one that is up."""
    lacking: frozenset[str] = frozenset()
    """What this kernel does not have (truth.table.Row.needs)."""
    observed: dict[str, str] = field(default_factory=dict)
    """What was seen of each cell, by its key."""
    played: set[str] = field(default_factory=set)
    """Scenes."""

    @property
    def kernel(self) -> str:
        """Whose kernel this is: a series of Debian's, or the host's."""
        return vm.running_series() if vm.IN_GUEST else "host"

    @property
    def name(self) -> str:
        """Of the block that this bed fills."""
        return f"{self.datapath} {self.rules}"

    def here(self, family: int) -> str:
        """The node's address."""
        return self.link.a4 if family == 4 else self.link.a6

    def there(self, family: int) -> str:
        """The peer's address."""
        return self.link.b4 if family == 4 else self.link.b6

    def records(self, since: int) -> list[dict[str, Any]]:
        """The flow records from a time on (nanoseconds), the oldest first."""
        records = self.collector.records(since=since)
        records.sort(key=lambda record: (record["start"], record["end"]))
        return records


@contextmanager
def bed(base: Path, datapath: str, rules: Rules, variant: str = "nft") -> Iterator[Bed]:
    """A bed; in a guest its node is the guest itself, on the host a namespace."""
    with ExitStack() as stack:
        ns = HERE if vm.IN_GUEST else stack.enter_context(net.namespace("node"))
        if rules == "mangle":
            how = ("--datapath", datapath, "--variant", variant)
            made = stack.enter_context(thread(base, how, ns))
            assert made.datapath == datapath
            parts: Parts = (made.peer, made.link, (made.a, made.b), made.flows, made.node)
        else:
            groups = stack.enter_context(cgroup.cgroup()), stack.enter_context(cgroup.cgroup())
            far = stack.enter_context(net.namespace("peer"))
            link = stack.enter_context(net.veth(ns, far))
            accounting(ns)
            stack.enter_context(_module(ns, groups) if datapath == "module" else
                                _stock(ns, base, groups))  # fmt: skip
            flows = stack.enter_context(collector(ns, base, wait=120))
            parts = (far, link, groups, flows, None)
        far, link, groups, flows, node = parts
        log = stack.enter_context(nflog.capture(ns))
        places = {
            "a": (ns, groups[0]),
            "b": (ns, groups[1]),
            "node": (ns, None),
            "peer": (far, None),
        }
        agents = {
            name: stack.enter_context(agent(where, group))
            for name, (where, group) in places.items()
        }
        # Loopback with small packets, so that there is what does not fit.
        ns.run("ip", "link", "set", "lo", "mtu", "1500")
        stack.callback(ns.run, "ip", "link", "set", "lo", "mtu", "65536")
        for name in ("node", "peer"):
            agents[name].sysctl("net.ipv4.ping_group_range", "0 2147483647")
        yield Bed(datapath, rules, ns, far, link, groups, log, agents, flows, node, lacking(far))


def lacking(ns: Namespace) -> frozenset[str]:
    """What this kernel does not have, of what some scenes need."""
    found = set()
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP).close()
    except OSError:
        found.add("sctp")
    if ns.run("ip", "link", "add", "vntg", "type", "gre", "key", "1", check=False).returncode:
        found.add("gre")
    else:
        ns.run("ip", "link", "del", "vntg")
    return frozenset(found)


@contextmanager
def agent(ns: Namespace, group: Cgroup | None) -> Iterator[Agent]:
    """An agent at a place, in a cgroup."""
    program = [sys.executable, "-I", "-S", str(Path(__file__).with_name("agent.py"))]
    pipe = subprocess.PIPE
    with ns.popen(*program, cgroup=group, stdin=pipe, stdout=pipe) as process:
        try:
            yield Agent(process)
        finally:
            process.kill()


@contextmanager
def _module(ns: Namespace, groups: tuple[Cgroup, Cgroup]) -> Iterator[None]:
    """The module, and its rule in table nat."""
    subprocess.run(["modprobe", "-a", *_MODULES], check=True)
    with copyxid.connect() as module, _rule(ns, _COPY):
        module.set_many({groups[0].id: A, groups[1].id: B})
        try:
            yield
        finally:
            module.flush()


@contextmanager
def _stock(ns: Namespace, base: Path, groups: tuple[Cgroup, Cgroup]) -> Iterator[None]:
    """The programs that mark sockets, and a stock rule in table nat."""
    with bpffs(base) as where:
        instance = bpf.load(where / "vnet", lsm=False)
        try:
            slices = {groups[0].id: A, groups[1].id: B}
            policy.write(instance, Policy(slices=slices, grants={A: "full", B: "full"}))
            with _rule(ns, _SAVE):
                yield
        finally:
            bpf.remove(instance)


@contextmanager
def _rule(ns: Namespace, rule: str) -> Iterator[None]:
    """One rule in table nat, POSTROUTING, for both families."""
    variant = "legacy" if vm.IN_GUEST else "nft"
    found = iptables.environment()
    env = {name: found[name] for name in ("XTABLES_LIBDIR",) if name in found}
    with ExitStack() as stack:
        for tool in (f"iptables-{variant}", f"ip6tables-{variant}"):
            words = ("-t", "nat", "{}", "POSTROUTING", *rule.split())
            ns.run(tool, "-w", *(w.format("-A") for w in words), env=env)
            stack.callback(ns.run, tool, "-w", *(w.format("-D") for w in words), env=env)
        yield
