"""What the module's own tests share: a node with the rules, two slices, a peer.

    slice a, b --- node [mangle INPUT, POSTROUTING: MARK --copy-xid] --- veth --- peer

For use in a guest only: it loads the kernel module. The fixtures are in
module_fixtures.py.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vnet.testing import cgroup, net, nflog

from vnet import copyxid

ROOT = Path(__file__).resolve().parents[2]
XID_A, XID_B = 512, 0xFFFF
COPY = "-j MARK --copy-xid"
_MODULES = (
    *("ip_tables", "iptable_mangle", "iptable_nat", "iptable_raw"),
    *("ip6_tables", "ip6table_mangle", "ip6table_nat", "ip6table_raw"),
    *("nf_conntrack_netlink", "nf_socket_ipv4", "nf_socket_ipv6", "nft_compat"),
    *("nfnetlink_log", "veth", "br_netfilter", "xt_copyxid"),
)


def load() -> None:
    """Load the module, and what the tests need beside it."""
    missing = [name for name in _MODULES if not Path("/sys/module", name).exists()]
    if missing:
        subprocess.run(["modprobe", "-a", *missing], check=True)


@cache
def xtables_libdir() -> str:
    """Our plugin first, then the system's."""
    system = subprocess.check_output(["pkg-config", "--variable=xtlibdir", "xtables"], text=True)
    return f"{ROOT / 'vnet' / 'ext' / 'iptables'}:{system.strip()}"


def iptables(
    ns: net.Namespace,
    rule: str,
    tool: str = "iptables-legacy",
    check: bool = True,
    stock: bool = False,
):
    """Run one iptables command with our plugin, or with the system's alone."""
    plugins = xtables_libdir().split(":", 1)[1] if stock else xtables_libdir()
    return ns.run(tool, "-w", *rule.split(), env={"XTABLES_LIBDIR": plugins}, check=check)


def both(ns: net.Namespace, rule: str) -> None:
    """The same command for IPv4 and IPv6."""
    iptables(ns, rule)
    iptables(ns, rule, "ip6tables-legacy")


def python(ns: net.Namespace, code: str, *argv: str, slice: cgroup.Cgroup | None = None):
    """Run a few lines of Python (with socket, sys and bytes.fromhex at hand) to their end."""
    return ns.run(
        sys.executable, "-I", "-S", "-c", "import socket, sys\n" + code, *argv, cgroup=slice
    )


@dataclass(frozen=True)
class Stage:
    """What takes long to set up."""

    node: net.Namespace
    peer: net.Namespace
    link: net.Link


@dataclass(frozen=True)
class Bed:
    """See the drawing above."""

    node: net.Namespace
    peer: net.Namespace
    link: net.Link
    a: cgroup.Cgroup
    b: cgroup.Cgroup
    module: copyxid.Module

    def here(self, family: int) -> str:
        """The node's address."""
        return self.link.a4 if family == 4 else self.link.a6

    def there(self, family: int) -> str:
        """The peer's address."""
        return self.link.b4 if family == 4 else self.link.b6

    def counters(self, ns: net.Namespace | None = None) -> dict[str, int]:
        """What the target has counted in a namespace (the node)."""
        inum = Path("/run/netns", (ns or self.node).name).stat().st_ino
        return next(s.counters for s in self.module.stats() if s.netns == inum)

    def halves(self, *which: str) -> list[tuple[int, int]]:
        """(originator's, responder's) xid of every connection conntrack -L lists."""
        listed = self.node.run("conntrack", "-L", *which).stdout
        marks = [int(found) for found in re.findall(r"mark=(\d+)", listed)]
        return [(mark & 0xFFFF, mark >> 16) for mark in marks]


@contextmanager
def counted(bed: Bed, ns: net.Namespace | None = None) -> Iterator[dict[str, int]]:
    """What the counters gained within the block, those that did not left out."""
    gained: dict[str, int] = {}
    before = bed.counters(ns)
    yield gained
    after = bed.counters(ns)
    gained.update({k: after[k] - before[k] for k in after if after[k] != before[k]})


def marks(seen: list[nflog.Seen], hook: str, **want: object) -> list[int]:
    """The xids of the packets at a hook whose fields are as wanted, in order."""
    return [
        s.xid for s in seen if s.prefix == hook and all(getattr(s, k) == v for k, v in want.items())
    ]
