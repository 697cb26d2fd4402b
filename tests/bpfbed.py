"""The eBPF programs in a bpffs of the test's own, two slices, and work done inside a cgroup."""

import json
import os
import socket
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vnet.bpfmaps import pinned
from vnet.policy import Policy
from vnet.ring import Ring
from vnet.testing.cgroup import Cgroup, cgroup
from vnet.testing.net import HERE, Namespace

from vnet import bpf, policy

A, B = 777, 65535
"""The xids of the slices a and b."""

SO_MARK = 36
CLONE_NEWNET = 0x40000000


@contextmanager
def bpffs(base: Path) -> Iterator[Path]:
    """A place that is not there yet in a bpffs of its own; what gets pinned in it goes with it."""
    top = base / "bpffs"
    top.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", top], check=True)
    where = top / "vnet"
    try:
        yield where
    finally:
        for path in [*bpf.instances(where), *where.glob("new-*"), *where.glob("old-*")]:
            bpf.remove(path)  # detached now, and not a moment later
        subprocess.run(["umount", top], check=True)


@dataclass(frozen=True)
class Loaded:
    """An instance, with two slices in its policy."""

    instance: Path
    a: Cgroup
    b: Cgroup

    def write(self, **fields: Any) -> list[int]:
        """Put a policy in force that has the two slices in it."""
        slices = {self.a.id: A, self.b.id: B} | fields.pop("slices", {})
        return policy.write(self.instance, Policy(slices=slices, **fields))

    def forget(self) -> None:
        """Start counting and telling anew."""
        self.events()
        with pinned(self.instance / "maps" / "counters") as counters:
            for key in list(counters.keys()):
                counters.try_delete(key)

    def events(self) -> list[Any]:
        """What has been reported and not been read yet."""
        ring = Ring(self.instance / "maps" / "events")
        try:
            found = []
            while (batch := ring.read(64)).events:
                found += batch.events
                ring.release(batch)
            return found
        finally:
            ring.close()


@contextmanager
def loaded(base: Path, lsm: bool = False) -> Iterator[Loaded]:
    """See Loaded; no slice has any grant."""
    with bpffs(base) as where, cgroup() as a, cgroup() as b:
        bed = Loaded(bpf.load(where, lsm), a, b)
        bed.write()
        yield bed


def inside(group: Cgroup | None, work: Callable[[], Any], ns: Namespace = HERE) -> Any:
    """Call ``work`` in a process of that cgroup and namespace; what it returns, as JSON has it."""
    with child(group, work, ns) as answer:
        return answer()


@contextmanager
def child(
    group: Cgroup | None, work: Callable[[], Any], ns: Namespace = HERE
) -> Iterator[Callable[[], Any]]:
    """Let a process do ``work``. Yields a function that waits for what it returns."""
    out, into = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(out)
            if group:
                (group.path / "cgroup.procs").write_text("0")
            if ns.name:
                enter(ns)
            said = json.dumps({"got": work()})
        except BaseException:
            said = json.dumps({"error": traceback.format_exc()})
        with suppress(BaseException):
            os.write(into, said.encode())
        os._exit(0)
    os.close(into)

    def answer() -> Any:
        with os.fdopen(os.dup(out), "rb") as stream:
            said = json.loads(stream.read())
        assert "error" not in said, said["error"]
        return said["got"]

    try:
        yield answer
    finally:
        os.close(out)
        with suppress(ProcessLookupError):
            os.kill(pid, 9)
        os.waitpid(pid, 0)


def enter(ns: Namespace) -> None:
    """Move this process into a namespace (os.setns is of Python 3.12)."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", ns.name).open() as there:
        if libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def mark(sock: socket.socket) -> int:
    """A socket's mark."""
    return sock.getsockopt(socket.SOL_SOCKET, SO_MARK) & 0xFFFFFFFF


def marks(*kinds: tuple[int, ...]) -> list[int | str]:
    """The marks of new sockets of these kinds, or the names of the errors that came instead."""
    import errno

    found: list[int | str] = []
    for kind in kinds:
        try:
            with socket.socket(*kind) as sock:
                found.append(mark(sock))
        except OSError as e:
            found.append(errno.errorcode[e.errno or 0])
    return found
