"""Network namespaces and links between them."""

import itertools
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vnet.testing import names
from vnet.testing.cgroup import Cgroup
from vnet.testing.launch import command
from vnet.testing.poll import PATIENCE, until

_subnets = itertools.count(1)


@dataclass(frozen=True)
class Namespace:
    """A network namespace by its ``ip netns`` name; "" is the caller's own."""

    name: str

    def popen(
        self,
        *argv: str | os.PathLike[str],
        cgroup: Cgroup | None = None,
        env: dict[str, str] | None = None,
        **kw: Any,
    ) -> subprocess.Popen[str]:
        """Start a program here. env is added to this process's environment.

        Text mode.
        """
        return subprocess.Popen(
            command([str(a) for a in argv], self.name, str(cgroup.path) if cgroup else ""),
            env={**os.environ, **(env or {})},
            **{"text": True, **kw},
        )

    def run(
        self,
        *argv: str | os.PathLike[str],
        check: bool = True,
        cgroup: Cgroup | None = None,
        timeout: float = 60,
        env: dict[str, str] | None = None,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program here to its end, its output captured.

        Raises AssertionError with the output when check is set and it exits
        other than 0, and subprocess.TimeoutExpired (it is killed) after
        timeout seconds (times PATIENCE).
        """
        with self.popen(
            *argv,
            cgroup=cgroup,
            env=env,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            try:
                out, err = process.communicate(input, timeout * PATIENCE)
            except BaseException:
                process.kill()
                raise
        words = " ".join(map(str, argv))
        assert not check or process.returncode == 0, (
            f"{words}: exit {process.returncode}\n{out}{err}"
        )
        return subprocess.CompletedProcess([*map(str, argv)], process.returncode, out, err)

    def sysctl(self, **settings: int | str) -> None:
        """Set sysctls, with __ for the dot: sysctl(net__ipv4__ip_forward=1)."""
        words = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
        self.run("sysctl", "-qw", *words)

    def pids(self) -> list[int]:
        """The processes in it."""
        with suppress(FileNotFoundError):
            inode = Path("/run/netns", self.name).stat().st_ino
            found = (path.name for path in Path("/proc").iterdir())
            return [pid for pid in map(int, filter(str.isdigit, found)) if _netns_of(pid) == inode]
        return []


HERE = Namespace("")
"""The namespace the tests themselves run in: for guests, never the host's."""


def _netns_of(pid: int) -> int:
    with suppress(OSError):
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    return 0


def _ip(*argv: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *argv], capture_output=True, text=True)
    assert not check or done.returncode == 0, f"ip {' '.join(argv)}: {done.stderr.strip()}"


@contextmanager
def namespace(prefix: str = "t") -> Iterator[Namespace]:
    """Make a network namespace with lo up; on exit end what runs in it and delete it."""
    ns = Namespace(names.fresh(prefix))
    _ip("netns", "add", ns.name)
    try:
        _ip("-n", ns.name, "link", "set", "lo", "up")
        yield ns
    finally:
        delete(ns)


def delete(ns: Namespace) -> None:
    """Kill what runs in a namespace and delete it."""
    for pid in ns.pids():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _ip("netns", "delete", ns.name, check=False)


@dataclass(frozen=True)
class Link:
    """A veth pair's ends: addresses and interface names."""

    a4: str
    b4: str
    a6: str
    b6: str
    a_if: str
    b_if: str


@contextmanager
def veth(a: Namespace, b: Namespace, link: Link | None = None) -> Iterator[Link]:
    """Connect two namespaces by a veth pair with one IPv4 and one IPv6 address each.

    Both ends are up and the addresses usable at once: without duplicate
    address detection, which would take seconds. ``link``: with these names and
    addresses (of a /24 and a /64).
    """
    n = next(_subnets)
    link = link or Link(
        f"10.77.{n}.1",
        f"10.77.{n}.2",
        f"fd77:{n:x}::1",
        f"fd77:{n:x}::2",
        f"vnt{os.getpid()}a{n}"[-15:],
        f"vnt{os.getpid()}b{n}"[-15:],
    )
    ends = ((a, link.a_if, link.a4, link.a6), (b, link.b_if, link.b4, link.b6))
    _ip("link", "add", link.a_if, *_at(a), "type", "veth", "peer", "name", link.b_if, *_at(b))
    try:
        # ip -batch: one process for an end, since a guest without KVM takes
        # tens of milliseconds for each.
        for ns, dev, four, six in ends:
            ns.run(
                "ip",
                "-batch",
                "-",
                input=(
                    f"link set {dev} addrgenmode none\n"
                    f"link set {dev} up\n"
                    f"addr add {four}/24 dev {dev}\n"
                    f"addr add {six}/64 dev {dev} nodad\n"
                ),
            )
        for ns, dev, _, _ in ends:
            until(partial(_is_up, ns, dev), what=f"{dev} up")
        yield link
    finally:
        _ip(*(["-n", a.name] if a.name else []), "link", "delete", link.a_if, check=False)


def _is_up(ns: Namespace, dev: str) -> bool:
    return "state UP" in ns.run("ip", "link", "show", dev).stdout


def _at(ns: Namespace) -> list[str]:
    return ["netns", ns.name] if ns.name else []


def leftovers() -> list[str]:
    """Namespaces this process made and has not deleted."""
    return [name for name in _listed() if names.is_mine(name)]


def sweep() -> None:
    """Delete what runs that no longer exist have left."""
    for name in _listed():
        if names.is_orphan(name):
            delete(Namespace(name))


def _listed() -> list[str]:
    where = Path("/run/netns")
    return sorted(path.name for path in where.iterdir()) if where.is_dir() else []
