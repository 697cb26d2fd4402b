"""Sockets that are older than their slice: give them its xid.

A socket that was made before its cgroup was registered carries no xid. The
program vnet_setsockopt puts the xid of the socket's cgroup into whatever
SO_MARK asks for, so nobody has to find out whose a socket is: every socket on
the node is asked for the mark that it has. That covers every kind of socket,
and takes the xid of a slice that is no more off the sockets that are left.

Out of reach are sockets that no process holds in its own table of files:
connections that wait to be accepted (they carry their listener's mark as it
was when they came), sockets on their way through a UNIX socket, in io_uring's
table only or in a thread's own table, and orphans (FIN_WAIT, TIME_WAIT). Of
these, packets of TCP connections have the owner that the connection's half
names; the others are stopped by the guard (vnet_gate), since their mark is not
their socket's slice's.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from vnet.bpfmaps import lib

_SO_MARK = 36  # asm-generic/socket.h
_INET = (socket.AF_INET, socket.AF_INET6)
_PASSES = 5
_U32 = struct.Struct("=I")


@dataclass
class Adopted:
    """What ``adopt`` did."""

    sockets: int = 0  #: whose mark changed
    #: {pid: errno}: processes whose sockets the kernel does not hand out (EPERM:
    #: kernel.yama.ptrace_scope=3, or CAP_SYS_PTRACE is missing)
    refused: dict[int, int] = field(default_factory=dict)


def adopt(proc: Path = Path("/proc")) -> Adopted:
    """Give every IPv4 and IPv6 socket of the node the xid of its cgroup.

    Called when a policy is in force; whatever is made meanwhile carries its
    xid from birth. Looks until it finds nothing to change, because sockets may
    be handed from process to process meanwhile.
    """
    done = Adopted()
    for _pass in range(_PASSES):
        before = done.sockets
        done.refused = {}
        seen: set[int] = set()
        for pid in [int(path.name) for path in proc.iterdir() if path.name.isdigit()]:
            _process(proc, pid, seen, done)
        if done.sockets == before:
            break
    return done


def _process(proc: Path, pid: int, seen: set[int], done: Adopted) -> None:
    held = [(fd, inode) for fd, inode in _sockets(proc, pid) if inode not in seen]
    if not held:
        return
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for fd, _inode in held:
            got = lib.vnet_getfd(pidfd, fd)
            if got >= 0:
                with socket.socket(fileno=got) as one:
                    # Closed and used again meanwhile? Then it is another one.
                    seen.add(os.fstat(got).st_ino)
                    done.sockets += _give_mark(one)
            elif got == -errno.ESRCH:
                return
            elif got != -errno.EBADF:
                done.refused[pid] = -got
    finally:
        os.close(pidfd)


def _sockets(proc: Path, pid: int) -> Iterator[tuple[int, int]]:
    """Descriptor and inode of the sockets in a process's table of files."""
    # A process that has ended, or a kernel thread of an odd kind.
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for fd in os.listdir(proc / str(pid) / "fd"):  # noqa: PTH208 (names, thousands of them)
            with suppress(FileNotFoundError, ProcessLookupError):
                target = os.readlink(f"{proc}/{pid}/fd/{fd}")  # noqa: PTH115
                if target.startswith("socket:["):
                    yield int(fd), int(target[8:-1])


def _give_mark(one: socket.socket) -> bool:
    """Ask for the mark that it has. Returns whether it has another one then."""
    if one.family not in _INET:
        return False
    before = one.getsockopt(socket.SOL_SOCKET, _SO_MARK) & 0xFFFFFFFF
    # Without the xid: of a socket that is nobody's, the program would keep it.
    one.setsockopt(socket.SOL_SOCKET, _SO_MARK, _U32.pack(before & ~lib.VNET_XID_MASK))
    return before != one.getsockopt(socket.SOL_SOCKET, _SO_MARK) & 0xFFFFFFFF
