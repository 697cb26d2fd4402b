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

Who sends from memory whose pages somebody is still to deliver (FUSE,
userfaultfd) has his socket locked until they come, and setsockopt waits for
the lock; no signal ends that (lock_sock_nested in net/core/sock.c). So all
this is done by a process of its own, in a thread, and when that gets no
further, another thread takes the next socket. Sockets that stay locked are
named, and their threads left behind: they set the mark once they get the lock.
"""

import ctypes
import errno
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from vnet.bpfmaps import lib
from vnet.errors import NodeError

_SO_MARK = 36  # asm-generic/socket.h
_INET = (socket.AF_INET, socket.AF_INET6)
_PASSES = 5
_libc = ctypes.CDLL(None, use_errno=True)

_HURRY = 0.02
"""s without progress until another thread goes on"""
_PATIENCE = 2.0
"""s without progress until it is given up, all sockets having been tried"""
_MOST = 200
"""threads; more sockets that are locked keep us from what comes after them"""
_ALL = 60.0
"""s for all of it: who has very many files, or has sockets made all the time, holds nobody up"""
_STACK = 1 << 18
"""bytes of a thread's"""


@dataclass
class Adopted:
    """What ``adopt`` did."""

    sockets: int = 0  #: whose mark changed
    #: {pid: errno}: processes whose sockets the kernel does not hand out (EPERM:
    #: kernel.yama.ptrace_scope=3, or CAP_SYS_PTRACE is missing), or not mark
    refused: dict[int, int] = field(default_factory=dict)
    #: {inode: pid}: sockets that somebody keeps locked, and a process that has them
    locked: dict[int, int] = field(default_factory=dict)
    raw: set[int] = field(default_factory=set)  #: whose raw sockets are in this namespace: xids
    #: raw sockets of this namespace that were not reached: they may be anybody's
    unreached: int = 0
    cut: bool = False  #: time was up, or too many were locked, before all had been looked at


_left: dict[int, dict[int, int]] = {}
"""{pipe of a process that still waits for locked sockets: those}; it hangs up at its end"""


def adopt(proc: Path = Path("/proc")) -> Adopted:
    """Give every IPv4 and IPv6 socket of the node the xid of its cgroup.

    Called when a policy is in force; whatever is made meanwhile carries its
    xid from birth. Looks until it finds nothing to change, because sockets may
    be handed from process to process meanwhile. Raises NodeError.
    """
    for fd in [fd for fd in _left if select.select([fd], [], [], 0)[0]]:
        os.close(fd)
        del _left[fd]
    waiting = {inode: pid for locked in _left.values() for inode, pid in locked.items()}
    reading, writing = os.pipe2(os.O_CLOEXEC)
    between = os.fork()
    if between == 0:
        # Nobody waits for a grandchild: it may have to be left behind.
        try:
            if os.fork() == 0:
                _work(proc, waiting, writing)
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(between, 0)
    text = b""
    while not text.endswith(b"\n") and (more := os.read(reading, 1 << 16)):
        text += more
    if not text.startswith(b"{"):
        os.close(reading)
        what = text.decode().strip() or "who was to do it was killed"
        raise NodeError(f"giving older sockets their marks: {what}", "run it again")
    done = msgspec.json.decode(text, type=Adopted)
    if locked := {inode: pid for inode, pid in done.locked.items() if inode not in waiting}:
        _left[reading] = locked
    else:
        os.close(reading)
    return done


def _work(proc: Path, waiting: dict[int, int], pipe: int) -> None:
    """The grandchild's whole life; it holds nothing that anybody waits for, like guard.lock."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.closerange(3, pipe)
    os.closerange(pipe + 1, os.sysconf("SC_OPEN_MAX"))
    threading.stack_size(_STACK)
    try:
        said = msgspec.json.encode(_adopt(proc, waiting))
    except Exception as error:
        said = repr(error).encode()
    # Left open: it hangs up when the last of our threads has ended.
    os.write(pipe, said + b"\n")


def _adopt(proc: Path, waiting: dict[int, int]) -> Adopted:
    done = Adopted(locked=waiting)
    deadline = time.monotonic() + _ALL
    for _pass in range(_PASSES):
        before = done.sockets
        done.refused, done.raw = {}, set()
        # Those made later are made under the policy in force.
        now = _Pass(proc, done, _raw())
        done.cut = not _go_through(now, deadline)
        done.locked |= now.locked
        missing = now.raw - (now.seen - done.locked.keys())
        done.unreached = len(missing & _raw()) if missing else 0
        if done.sockets == before or done.cut:
            break
    return done


def _raw() -> set[int]:
    """Inodes of the raw sockets of this network namespace (raw_sock_seq_show, net/ipv4/raw.c)."""
    found = set()
    for name in ("raw", "raw6"):
        with suppress(FileNotFoundError):
            lines = Path("/proc/net", name).read_text().splitlines()[1:]
            found |= {int(line.split()[9]) for line in lines}
    return found - {0}  # the kernel's own


class _Pass:
    """Once through all sockets; several threads take them from here, one at a time."""

    def __init__(self, proc: Path, done: Adopted, raw: set[int]) -> None:
        self.proc, self.done, self.raw = proc, done, raw
        self.seen: set[int] = set()
        self.finished = 0  #: how many, and how many descriptors were looked at to find them
        self._in_hand: dict[int, tuple[int, int]] = {}  #: thread: (inode, pid)
        self._turn = threading.Lock()
        self._sockets = self._all()

    @property
    def locked(self) -> dict[int, int]:
        """Those that are in some thread's hands: {inode: pid}."""
        return dict(self._in_hand.copy().values())

    def work(self) -> None:
        """A thread's: until there is none left."""
        me = threading.get_ident()
        while True:
            with self._turn:
                self.finished += self._in_hand.pop(me, None) is not None
                found = next(self._sockets, None)
                if found is None:
                    return
                pid, fd, inode = found
                self._in_hand[me] = inode, pid
            try:
                self._one(pid, fd)
            except OSError as error:
                self.done.refused[pid] = error.errno or errno.EIO

    def _all(self) -> Iterator[tuple[int, int, int]]:
        """Process, descriptor and inode of each socket that is in a process's table of files."""
        for pid in [int(path.name) for path in self.proc.iterdir() if path.name.isdigit()]:
            for fd, inode in list(self._sockets_of(pid)):
                if not (inode in self.seen or inode in self.done.locked or inode in self.locked):
                    yield pid, fd, inode

    def _sockets_of(self, pid: int) -> Iterator[tuple[int, int]]:
        """Descriptor and inode of the sockets in a process's table of files."""
        # A process that has ended, or a kernel thread of an odd kind.
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            for fd in os.listdir(self.proc / str(pid) / "fd"):  # noqa: PTH208 (thousands of names)
                self.finished += 1
                # Closed; or a file's name is longer than a page (ENAMETOOLONG, do_proc_readlink).
                with suppress(OSError):
                    target = os.readlink(f"{self.proc}/{pid}/fd/{fd}")  # noqa: PTH115
                    if target.startswith("socket:["):
                        yield int(fd), int(target[8:-1])

    def _one(self, pid: int, fd: int) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            # It has ended, and perhaps its number is a thread's by now.
            if error.errno in (errno.ESRCH, errno.EINVAL, errno.ENOENT):
                return
            raise
        try:
            got = lib.vnet_getfd(pidfd, fd)
        finally:
            os.close(pidfd)
        if got in (-errno.ESRCH, -errno.EBADF):
            return
        if got < 0:
            raise OSError(-got, os.strerror(-got))
        try:
            self._mark(got)
        finally:
            os.close(got)  # who closes a socket last may have to linger

    def _mark(self, fd: int) -> None:
        try:
            domain = _get(fd, socket.SO_DOMAIN)
        except OSError as error:
            # Closed and used again meanwhile? Then it is another one, or a file.
            if error.errno == errno.ENOTSOCK:
                return
            raise
        inode = os.fstat(fd).st_ino
        self.seen.add(inode)
        if domain not in _INET:
            return
        before = _get(fd, _SO_MARK)
        # Without the xid: of a socket that is nobody's, the program would keep it.
        _set(fd, _SO_MARK, before & ~lib.VNET_XID_MASK)
        after = _get(fd, _SO_MARK)
        with self._turn:
            self.done.sockets += before != after
        if inode in self.raw:
            self.done.raw.add(after & lib.VNET_XID_MASK)


def _go_through(now: _Pass, deadline: float) -> bool:
    """Have one thread do it all, and more where that is held up; those that are stay behind.

    False: not all were looked at.
    """
    threads: list[threading.Thread] = []
    before = -1
    while not threads or threads[-1].is_alive():
        if time.monotonic() > deadline:
            return False
        if now.finished == before or not threads:
            if len(threads) == _MOST:
                return False
            threads.append(threading.Thread(target=now.work, daemon=True))
            threads[-1].start()
        before = now.finished
        threads[-1].join(_HURRY if len(threads) < _MOST else _PATIENCE)
    patience = time.monotonic() + _PATIENCE
    for thread in threads:
        thread.join(max(0.0, patience - time.monotonic()))
    return True


# Not by the module socket, which lets no other thread run meanwhile, and whose
# sockets are asked for their names when they are made, which takes the lock too.


def _get(fd: int, option: int) -> int:
    value, size = ctypes.c_uint(), ctypes.c_uint(4)
    if _libc.getsockopt(fd, socket.SOL_SOCKET, option, ctypes.byref(value), ctypes.byref(size)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return value.value


def _set(fd: int, option: int, value: int) -> None:
    if _libc.setsockopt(fd, socket.SOL_SOCKET, option, ctypes.byref(ctypes.c_uint(value)), 4):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
