"""What the kernel holds of sockets and connections."""

import re
import subprocess
from pathlib import Path

from vnet.testing.net import Namespace
from vnet.testing.poll import until

CACHES = (
    *("TCP", "TCPv6", "UDP", "UDPv6", "RAW", "RAWv6"),
    *("request_sock_TCP", "request_sock_TCPv6", "tw_sock_TCP", "tw_sock_TCPv6"),
    *("nf_conntrack", "sock_inode_cache", "net_namespace"),
)
SLACK = 24
"""Objects more that are no growth: what the machine's own processes come and go by."""


_COUNT = """
for ns in /proc/self/ns/net /run/netns/*; do
  nsenter --net=$ns cat /proc/net/sockstat /proc/sys/net/netfilter/nf_conntrack_count
done 2>/dev/null
"""


def accounted() -> tuple[int, int]:
    """Sockets in TIME_WAIT, and connections, of this namespace and all that have a name."""
    text = subprocess.run(["sh", "-c", _COUNT], capture_output=True, text=True).stdout
    waiting = sum(map(int, re.findall(r" tw (\d+)", text)))
    return waiting, sum(map(int, re.findall(r"^(\d+)$", text, re.M)))


def processes() -> int:
    """All there are, kernel threads and zombies, too."""
    return sum(path.name.isdigit() for path in Path("/proc").iterdir())


def objects() -> dict[str, int]:
    """Objects in use in each cache, exactly. Raises OSError where the kernel has no such cache.

    Of connections and of sockets in TIME_WAIT only what no namespace accounts
    for. In /sys, not in /proc/slabinfo: there a cache that shares its slabs
    with others of one size has no line of its own, here it has the figure of
    all of them. UDP has, on 6.1, the size of what each process has one of
    (signal_cache), of which a worker of the kernel's that has nothing to do
    lives on for five minutes. A CPU's slab counts as full until it
    is given back, which is what shrinking does (mm/slub.c, __kmem_cache_shrink).
    """
    found = {}
    shared = Path("/sys/kernel/slab/signal_cache").resolve()
    for name in CACHES:
        cache = Path("/sys/kernel/slab", name)
        (cache / "shrink").write_text("1")
        found[name] = int((cache / "objects").read_text().split()[0])
        if cache.resolve() == shared:
            found[name] -= processes()
    waiting, connections = accounted()
    found["nf_conntrack"] -= connections
    found["tw_sock_TCP"] += found.pop("tw_sock_TCPv6") - waiting
    return found


def settled(before: dict[str, int], slack: int = SLACK, seconds: float = 60) -> dict[str, int]:
    """The caches, once none holds more than before. Raises AssertionError."""
    now: dict[str, int] = {}

    def growth() -> dict[str, int]:
        now.update(objects())
        more = {name: now[name] - before.get(name, 0) for name in now}
        return {name: count for name, count in more.items() if count > slack}

    until(lambda: not growth(), seconds, f"no growth; there was {growth()} more than in {before}")
    return now


def conntrack(ns: Namespace) -> int:
    """Connections that are tracked in a namespace."""
    done = ns.run("cat", "/proc/sys/net/netfilter/nf_conntrack_count", check=False)
    return int(done.stdout or 0)


def drain(ns: Namespace) -> None:
    """Forget every connection of a namespace, and wait for that."""
    for family in ("ipv4", "ipv6"):
        ns.run("conntrack", "-F", "-f", family)
    until(lambda: conntrack(ns) == 0, what="no connection left")
