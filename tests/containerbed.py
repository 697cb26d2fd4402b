"""Two slices in containers, one on the host, and somebody outside.

    a, b --- veth, or br0 --- node (slice s, rules, tc programs) --- veth --- out

Routed: the node has an address on each container's veth. Bridged: the host ends
are ports of br0, which has the node's addresses, and what leaves towards
``out`` is masqueraded, as lxc and docker do it.
"""

import os
import re
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import bpfbed
import vnetbed
from vnet.datapath import DataPath
from vnet.testing import cgroup, names, net, nflog
from vnet.testing.net import Link, Namespace

from vnet import bpf, containers

A, B, S = 512, 65535, 777
"""The xids of the containers a and b, and of the slice s."""

PROTOCOLS = {"tcp": (6,), "udp": (17,), "icmp": (1, 58)}
HOOKS = ("input", "forward", "postrouting")
LAYOUTS = ("routed", "bridged")


@dataclass(frozen=True)
class Bed:
    """See the drawing above."""

    up: vnetbed.Node
    node: Namespace
    out: Namespace
    a: Namespace
    b: Namespace
    outside: Link
    link_a: Link
    link_b: Link
    s: cgroup.Cgroup
    instance: Path
    kind: DataPath
    layout: str

    @property
    def wanted(self) -> dict[str, int]:
        """The host ends, as slice files name them."""
        return {self.link_a.a_if: A, self.link_b.a_if: B}

    def address(self, of: str, family: int) -> str:
        """Of a, b, out; or the node's: towards out (node), or as a's gateway (gateway)."""
        link, end = {
            "a": (self.link_a, "b"),
            "b": (self.link_b, "b"),
            "out": (self.outside, "b"),
            "node": (self.outside, "a"),
            "gateway": (self.link_a, "a"),
        }[of]
        return str(getattr(link, f"{end}{family}"))

    def apply(self, wanted: Mapping[str, int] | None = None) -> list[str]:
        """``containers.apply`` in the node."""
        want = self.wanted if wanted is None else dict(wanted)
        return list(bpfbed.inside(None, lambda: containers.apply(self.instance, want), self.node))

    def healthy(self, wanted: Mapping[str, int] | None = None) -> list[str]:
        """``containers.healthy`` in the node."""
        want = self.wanted if wanted is None else dict(wanted)
        return list(bpfbed.inside(None, lambda: containers.healthy(self.instance, want), self.node))

    def halves(self, proto: str, family: int, *which: str) -> list[tuple[int, int]]:
        """(originator's, responder's) xid of the connections of that protocol."""
        names = {"icmp": {4: "icmp", 6: "icmpv6"}[family]}
        listed = self.node.run(
            "conntrack", "-L", "-f", f"ipv{family}", "-p", names.get(proto, proto), *which
        ).stdout
        marks = [int(found) for found in re.findall(r"mark=(\d+)", listed)]
        return [(mark & 0xFFFF, mark >> 16) for mark in marks]


_SLICES = """
[[slice]]
name = "a"
cgroups = ["/{name}-a"]
xid = {A}
interfaces = ["{a}"]
[[slice]]
name = "b"
cgroups = ["/{name}-b"]
xid = {B}
interfaces = ["{b}"]
[[slice]]
name = "s"
cgroups = ["{s}"]
xid = {S}
"""


@contextmanager
def bed(base: Path, kind: DataPath, layout: str, node: Namespace | None = None) -> Iterator[Bed]:
    """A node that ``vnet up`` has brought up. The module wants it to be the guest itself."""
    with ExitStack() as stack:
        if node is None:
            node = stack.enter_context(net.namespace("node"))
        out, a, b = (stack.enter_context(net.namespace(name)) for name in ("out", "a", "b"))
        outside = stack.enter_context(net.veth(node, out))
        link_a = stack.enter_context(net.veth(node, a))
        link_b = stack.enter_context(net.veth(node, b))
        s = stack.enter_context(cgroup.cgroup())
        _connect(stack, node, out, outside, {a: link_a, b: link_b}, layout)
        up = stack.enter_context(vnetbed.bpf_node(node, base))
        facts = {"name": names.fresh("no"), "a": link_a.a_if, "b": link_b.a_if, "s": s.rel}
        (base / "config" / "slices.toml").write_text(_SLICES.format(A=A, B=B, S=S, **facts))
        up.vnet("up", "--datapath", kind)
        instance = bpf.instances(up.bpf_dir)[0]
        yield Bed(up, node, out, a, b, outside, link_a, link_b, s, instance, kind, layout)


def _connect(
    stack: ExitStack,
    node: Namespace,
    out: Namespace,
    outside: Link,
    inside: Mapping[Namespace, Link],
    layout: str,
) -> None:
    node.sysctl(net__ipv4__ip_forward=1, net__ipv6__conf__all__forwarding=1)
    node.sysctl(net__ipv4__conf__all__send_redirects=0)
    for ns in (node, out, *inside):
        ns.sysctl(net__ipv4__ping_group_range="0 2147483647")
    lines = [f"addr add fe80::1/64 dev {outside.a_if} nodad"]
    if layout == "bridged":
        stack.callback(node.run, "ip", "link", "del", "br0", check=False)
        lines += ["link add br0 type bridge", "link set br0 addrgenmode none up"]
    for link in inside.values():
        dev = link.a_if
        if layout == "bridged":
            lines += [f"addr flush dev {dev}", f"link set {dev} master br0"]
            dev = "br0"
            lines += [f"addr add {link.a4}/24 dev br0", f"addr add {link.a6}/64 dev br0 nodad"]
        # a router asks for neighbours from its link-local address, and not without one
        lines.append(f"addr replace fe80::1/64 dev {dev} nodad")
    node.run("ip", "-batch", "-", input="\n".join(lines) + "\n")
    node.sysctl(**{"net__ipv4__conf__" + link.a_if + "__send_redirects": 0
                   for link in inside.values()})  # fmt: skip
    if layout == "bridged":
        node.sysctl(net__ipv4__conf__br0__send_redirects=0)
        for tool in ("iptables", "ip6tables"):
            rule = ("POSTROUTING", "-o", outside.a_if, "-j", "MASQUERADE")
            node.run(tool, "-t", "nat", "-A", *rule)
            stack.callback(node.run, tool, "-t", "nat", "-D", *rule, check=False)
    for ns, link in inside.items():
        # On one bridge the node would tell them to go round it; IPv6 has no send_redirects.
        ns.sysctl(**{f"net__ipv6__conf__{link.b_if}__accept_redirects": 0})
    for ns, link in [(out, Link(outside.a4, "", outside.a6, "", "", "")), *inside.items()]:
        for family, via in ((4, link.a4), (6, link.a6)):
            ns.run("ip", f"-{family}", "route", "add", "default", "via", via)


@dataclass(frozen=True)
class Who:
    """Somebody who has sockets: in a namespace, and perhaps in a slice of the host."""

    ns: Namespace
    slice: cgroup.Cgroup | None = None

    def socket(self, family: int, kind: int, proto: int = 0) -> socket.socket:
        """A new socket of theirs, with a patience of a minute."""
        with _inside(self.slice), _entered(self.ns):
            made = socket.socket({4: socket.AF_INET, 6: socket.AF_INET6}[family], kind, proto)
        made.settimeout(60)
        return made


@contextmanager
def _entered(ns: Namespace) -> Iterator[None]:
    """This thread, in a namespace: a socket stays in the one in which it was made."""
    if not ns.name:
        yield
        return
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        bpfbed.enter(ns)
        try:
            yield
        finally:
            bpfbed.enter(Namespace(f"/proc/self/fd/{home}"))  # an absolute path is its own
    finally:
        os.close(home)


@contextmanager
def _inside(slice_: cgroup.Cgroup | None) -> Iterator[None]:
    """This process, in a cgroup: a socket stays with the one in which it was made."""
    if slice_ is None:
        yield
        return
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    home = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
    (slice_.path / "cgroup.procs").write_text("0")
    try:
        yield
    finally:
        (cgroup.root() / home.lstrip("/") / "cgroup.procs").write_text("0")


TCP, UDP, CLIENT = 8001, 8002, 8003
"""The server's ports, and the client's."""


def xids(seen: list[nflog.Seen], proto: str, hook: str) -> tuple[list[int], list[int]]:
    """Of the packets to the server at a hook, and of its answers, in order."""
    there: list[int] = []
    back: list[int] = []
    for packet in seen:
        if packet.prefix != hook or packet.proto not in PROTOCOLS[proto]:
            continue
        if proto == "icmp":
            kind = packet.dport >> 8
            (there if kind in (8, 128) else back if kind in (0, 129) else []).append(packet.xid)
        elif packet.dport in (TCP, UDP):
            there.append(packet.xid)
        elif packet.sport in (TCP, UDP):
            back.append(packet.xid)
    return there, back


def talk(bed: Bed, client: Who, server: Who, to: str, bind: str | None = None) -> list[nflog.Seen]:
    """Let a client talk to ``to``, where a server listens on ``bind`` (the same address).

    TCP, UDP (two datagrams) and two pings, all answered. What the node saw of it.
    """
    bed.node.run("conntrack", "-F")
    family = 6 if ":" in to else 4
    with ExitStack() as stack:
        log = stack.enter_context(nflog.capture(bed.node, hooks=HOOKS))

        def of(who: Who, kind: int, proto: int = 0) -> socket.socket:
            return stack.enter_context(who.socket(family, kind, proto))

        listener, receiver = of(server, socket.SOCK_STREAM), of(server, socket.SOCK_DGRAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((bind or to, TCP))
        listener.listen()
        receiver.bind((bind or to, UDP))
        with of(client, socket.SOCK_STREAM) as caller:
            caller.connect((to, TCP))
            with listener.accept()[0] as accepted:
                accepted.settimeout(60)
                _echo(caller, accepted)
        sender = of(client, socket.SOCK_DGRAM)
        sender.bind(("::" if family == 6 else "0.0.0.0", CLIENT))
        sender.connect((to, UDP))
        for _ in range(2):
            sender.send(b"question")
            data, address = receiver.recvfrom(100)
            receiver.sendto(data, address)
            assert sender.recv(100) == b"question"
        proto, request = {4: (1, 8), 6: (58, 128)}[family]
        pinger = of(client, socket.SOCK_DGRAM, proto)
        for number in range(2):
            # the kernel fills in id and checksum
            pinger.sendto(struct.pack(">BBHHH", request, 0, 0, 0, number), (to, 0))
            assert pinger.recv(100)
        return log.seen()


def _echo(one: socket.socket, other: socket.socket) -> None:
    one.sendall(b"question")
    assert other.recv(100) == b"question"
    other.sendall(b"answer")
    assert one.recv(100) == b"answer"
    one.shutdown(socket.SHUT_WR)
    assert other.recv(100) == b""
    other.shutdown(socket.SHUT_WR)
    assert one.recv(100) == b""
