"""The node of tests/behaviours.py: the whole thread, three slices more, and a host behind the peer.

a, b  raw = "full"   (thread_bed)
o, p  raw = "own", each with a port of its own
u     holds no grant
the node (vnet up, netflow collect) -- veth -- peer, which forwards -- veth -- beyond
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netflowbed import owners
from thread_bed import A, B, Thread, thread, watching
from vnet.testing import cgroup, net, nflog
from vnet.testing.apps import App
from vnet.testing.net import HERE
from vnet.testing.nflog import Seen

ANY = {4: "0.0.0.0", 6: "::"}
ECHO = {4: (8 << 8, 0), 6: (128 << 8, 129 << 8)}
UNREACHABLE = {4: 3 << 8 | 3, 6: 1 << 8 | 4}

__all__ = ["ANY", "ECHO", "UNREACHABLE", "A", "B", "Bed", "O", "P", "U"]

O, P, U = 601, 602, 603  # noqa: E741
"""The xids of o, p and u."""
GONE, GONE_BELOW = 604, "gone"
"""The xid of a slice whose cgroup, of this name below u's, is removed under it."""
PORT_O, PORT_P = 4100, 4200
"""The TCP and UDP ports that are reserved to o and p."""


@dataclass
class Bed:
    """See the drawing above."""

    thread: Thread
    o: cgroup.Cgroup
    p: cgroup.Cgroup
    u: cgroup.Cgroup
    beyond: net.Namespace
    back: net.Link
    """From the peer (end a) to the host behind it (end b)."""
    began: str = ""
    """When the behaviour at hand did: ports come again, and older records are not meant."""

    @property
    def ns(self) -> net.Namespace:
        """The node's namespace."""
        return self.thread.ns

    @property
    def peer(self) -> net.Namespace:
        """The neighbour's namespace."""
        return self.thread.peer

    def here(self, family: int) -> str:
        """The node's address."""
        return self.thread.here(family)

    def there(self, family: int) -> str:
        """The peer's address."""
        return self.thread.there(family)

    def far(self, family: int) -> str:
        """The address of the host behind the peer."""
        return self.back.b4 if family == 4 else self.back.b6

    @contextmanager
    def watching(self) -> Iterator[nflog.Capture]:
        """The node's packets from here on."""
        with watching(self.thread) as log:
            yield log

    def records(self, **which: Any) -> list[dict[str, Any]]:
        """The flow records that match, by time."""
        found = [r for r in self.thread.flows.records(**which) if r["flow_start"] >= self.began]
        return sorted(found, key=lambda record: (record["start"], record["end"]))

    def owners(self, **which: Any) -> list[tuple[int, int]]:
        """(originator's, responder's) xid of the records that match, by time."""
        return [owners(record) for record in self.records(**which)]


@contextmanager
def bed(base: Path, how: tuple[str, ...], ns: net.Namespace = HERE) -> Iterator[Bed]:
    """All of it, up."""
    with ExitStack() as stack:
        enter = stack.enter_context
        o, p, u = (enter(cgroup.cgroup()) for _ in range(3))
        more = "".join(
            f'[[slice]]\nname = "{name}"\ncgroups = ["{made.rel}"]\nxid = {xid}\n{grants}'
            for name, made, xid, grants in (
                ("o", o, O, _own(PORT_O)),
                ("p", p, P, _own(PORT_P)),
                ("u", u, U, ""),
                # whose cgroups come and go
                ("gone", cgroup.Cgroup(u.path / GONE_BELOW), GONE, ""),
                ("idle", cgroup.Cgroup(u.path / "idle"), GONE + 1, ""),
            )
        )
        made = enter(thread(base, how, ns, capture=True, more=more))
        beyond = enter(net.namespace("beyond"))
        back = enter(net.veth(made.peer, beyond))
        for space in (ns, made.peer, beyond):
            # Errors are limited to six at once for each host, and one more a second.
            space.sysctl(net__ipv4__icmp_ratelimit=0, net__ipv6__icmp__ratelimit=0)
        made.peer.sysctl(net__ipv4__ip_forward=1, net__ipv6__conf__all__forwarding=1)
        # Who forwards asks for its neighbours from a link-local address (ndisc_send_ns).
        for space, dev in (
            (ns, made.link.a_if),
            (made.peer, made.link.b_if),
            (made.peer, back.a_if),
        ):
            end = 1 + (dev == made.link.b_if)
            space.run("ip", "addr", "add", f"fe80::{end}/64", "dev", dev, "nodad")
        _route(ns, 4, f"{back.a4}/24", made.link.b4, made.link.a_if)
        _route(ns, 6, f"{back.a6}/64", made.link.b6, made.link.a_if)
        _route(beyond, 4, "default", back.a4, back.b_if)
        _route(beyond, 6, "default", back.a6, back.b_if)
        yield Bed(made, o, p, u, beyond, back)


def _own(port: int) -> str:
    return f'[slice.grants]\nraw = "own"\nports = ["udp/{port}", "tcp/{port}"]\n'


def _route(ns: net.Namespace, family: int, to: str, via: str, dev: str) -> None:
    if to != "default":
        import ipaddress

        to = str(ipaddress.ip_interface(to).network)
    ns.run("ip", f"-{family}", "route", "add", to, "via", via, "dev", dev)


# -- programs of a few lines ---------------------------------------------------------------

_HEAD = """
import json, os, select, socket, struct, sys, time
def say(event, **facts):
    print(json.dumps({"event": event, **facts}), flush=True)
def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET
def wait():
    sys.stdin.readline()
"""


@contextmanager
def script(
    ns: net.Namespace, code: str, *argv: object, slice: cgroup.Cgroup | None = None
) -> Iterator[App]:
    """Run a program that says "ready" when it is, wherever ``slice`` and ``ns`` are."""
    with ns.popen(
        *(sys.executable, "-I", "-S", "-c", _HEAD + code),
        *map(str, argv),
        cgroup=slice,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        app = App("a script", process)
        try:
            app.event("ready")
            yield app
        finally:
            process.kill()
            app.reader.join()


# -- what was seen -------------------------------------------------------------------------


def at(seen: list[Seen], hook: str) -> list[int]:
    """The xids at a hook, in order."""
    return [packet.xid for packet in seen if packet.prefix == hook]


def marks(seen: list[Seen]) -> dict[str, set[int]]:
    """The xids at each hook."""
    return {hook: set(at(seen, hook)) for hook in {packet.prefix for packet in seen}}
