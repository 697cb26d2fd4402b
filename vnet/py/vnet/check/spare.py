"""What this node has no use for: addresses and ports for canaries."""

import itertools
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from vnet import sysctls
from vnet.errors import NodeError
from vnet.testing import net
from vnet.testing.net import HERE

#: of IPv4, RFC 5737; of IPv6, RFC 3849
_RANGES = ("192.0.2.", "198.51.100.", "203.0.113.")
_BLOCK = 24
_BESIDE = 5


@dataclass(frozen=True)
class Ports:
    """Ports of the node that nobody else uses."""

    base: int
    """The first of a row of those that the kernel picks from."""
    other: int
    """The first of a row of others, if there are any: nobody gets one without asking."""

    @property
    def reserved(self) -> int:
        """The holder's, on every address."""
        return self.base

    @property
    def row(self) -> tuple[int, int]:
        """The holder's, too."""
        return self.base + 1, self.base + 2

    @property
    def beside(self) -> tuple[int, ...]:
        """Beside the range: nobody's."""
        return tuple(range(self.base + 3, self.base + 3 + _BESIDE))

    @property
    def on_address(self) -> int:
        """The holder's, on one address."""
        return self.other

    @property
    def own(self) -> int:
        """Of the slice ``own``."""
        return self.other + 1

    @property
    def free(self) -> int:
        """Nobody's."""
        return self.other + 2

    @property
    def connection(self) -> int:
        """Nobody's by a grant: the holder connects from there."""
        return self.other + 3

    @property
    def granted(self) -> frozenset[int]:
        """All that canaries hold."""
        return frozenset((self.reserved, *self.row, self.on_address, self.own))

    def nth(self, n: int) -> int:
        """Others that are nobody's, round and round."""
        return self.other + 4 + n % (_BLOCK - 4)


def addresses() -> tuple[net.Link, dict[int, str], net.Link | None]:
    """Documentation ranges that this node has no use for: of the link, of nobody, of a box."""
    used = HERE.run("ip", "route", "show", "table", "all").stdout
    free = [range_ for range_ in _RANGES if range_ not in used]
    if len(free) < 2:
        raise NodeError(
            "all documentation ranges (RFC 5737) are in use on this node",
            "`ip route show table all` says by whom; the canaries need two of them",
        )
    # Others than the last time: connection tracking still has its connections.
    n, host = secrets.randbelow(0xFFFF), 1 + secrets.randbelow(150)
    link = net.Link(
        *(
            f"{free[0]}{host}",
            f"{free[0]}{host + 1}",
            f"2001:db8:{n:x}:1::1",
            f"2001:db8:{n:x}:1::2",
        ),
        *(f"vnt{os.getpid()}c0"[-15:], f"vnt{os.getpid()}c1"[-15:]),
    )
    nowhere = {4: f"{free[1]}77", 6: f"2001:db8:{n:x}:2::77"}
    if len(free) < 3:
        return link, nowhere, None
    box = net.Link(
        *(
            f"{free[2]}{host}",
            f"{free[2]}{host + 1}",
            f"2001:db8:{n:x}:3::1",
            f"2001:db8:{n:x}:3::2",
        ),
        *(f"vnt{os.getpid()}d0"[-15:], f"vnt{os.getpid()}d1"[-15:]),
    )
    return link, nowhere, box


def second(address: str) -> str:
    """Another address of the same subnet."""
    return str(ip_address(address) + 100)


def free_ports() -> Ports:
    """A row of ports that nobody uses or reserves. Raises NodeError."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    taken = sysctls.reserved_ports()
    for name in ("tcp", "tcp6", "udp", "udp6"):
        with suppress(FileNotFoundError):
            lines = Path("/proc/net", name).read_text().splitlines()[1:]
            taken |= {int(line.split()[1].rsplit(":", 1)[1], 16) for line in lines}

    def row(length: int, *where: range) -> int:
        for base in itertools.chain(*where):
            if not taken & set(range(base, base + length)):
                taken.update(range(base, base + length))
                return base
        raise NodeError(f"no {length} ports in a row are free on this node")

    base = row(3 + _BESIDE, range((low + high) // 2, high), range(low, high))
    below, above = range(10_000, low - _BLOCK), range(high + 1, 65_535 - _BLOCK)
    return Ports(base, row(_BLOCK, below, above, range(low, high)))
