"""An agent that stands in a slice and tries what it is told to.

    python -I -S attempts.py <requests, one JSON object a line

A request is ``{"id": N, "steps": [[WORD, ARGUMENT...], ...]}``, and maybe
``"patience"``, in seconds, for each wait for somebody else. The steps are
taken one after the other with a socket of their own, and the answer is one
line: ``{"id": N, "ok": true, "got": [...]}``, or which step the kernel refused
and how: ``{"id": N, "ok": false, "at": "bind", "errno": "EACCES", "got": [...]}``.
``{"drop": N}`` ends the child of a request that holds on. Nothing that one
attempt does to its process (namespaces, users, cgroups) is left for the next:
then a forked child does it. With the argument ``uid=N`` the agent is that user.

The socket is that of the agent's cgroup as long as no step moves the process.
Numbers may be given by their names in Python's socket module. Bytes are hex.

socket FAMILY TYPE PROTO   make a socket; the steps after it use it
set LEVEL OPTION VALUE     setsockopt: an int, or bytes
set32 LEVEL OPTION VALUE   the same as a 32-bit program does it (x86-64 with ia32 emulation)
get LEVEL OPTION           getsockopt of an int; the value is part of the answer
bind ADDRESS PORT          or: an interface, PROTO (packet sockets)
bindbytes, connectbytes BYTES        any sockaddr, through the system call itself
listen, name               getsockname's address and port are part of the answer
connect ADDRESS PORT       begun, not waited for; connectwait: until it is made
send BYTES ADDRESS PORT [CMSGS]      sendmsg; CMSGS is a list of [LEVEL, TYPE, BYTES]
sendif BYTES INTERFACE     a whole frame through a packet socket
accept                     wait for a connection
receive TOKEN              read until a datagram holds these bytes; all are in the answer
hear SECONDS               the datagrams that come in this time are in the answer
uring OPERATION ...        the same by io_uring: see vnet.testing.uring
hold                       answer now, and live until dropped
go                         answer now with "at": "go", and carry on
hammer FAMILY TYPE ADDRESS PORT      try to bind until dropped; then how it went
cgroup DIRECTORY, unshare FLAGS, uid N, unchroot    of the process
take PATH, give PATH       a socket, by SCM_RIGHTS through a UNIX socket at PATH
"""

import errno
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

PATIENCE = 30.0
"""Seconds to wait for what another process is to do."""
FORKED = {"set32", "hold", "go", "hammer", "cgroup", "unchroot", "unshare", "uid", "take"}
"""Steps that change the process, or keep it: a child takes those."""


_MAP_32BIT = 0x40
_SETSOCKOPT32 = 366  # arch/x86/entry/syscalls/syscall_32.tbl
_INT80 = bytes.fromhex(
    "4989f8 53"  # mov r8, rdi; push rbx
    "418b00 418b5804 418b4808 418b500c 418b7010 418b7814"  # eax, ebx, ecx, edx, esi, edi from [r8]
    "cd80 5b c3"  # int 0x80; pop rbx; ret
)


def number(word: int | str) -> int:
    """A number, or what the socket module calls so."""
    return int(getattr(socket, word)) if isinstance(word, str) else word


def tell(request: int, **facts: Any) -> None:
    """Print one JSON line, in one write: others print, too."""
    os.write(1, json.dumps({"id": request, **facts}).encode() + b"\n")


class Attempt:
    """One request: its socket, and what it has seen so far."""

    def __init__(self, request: int, patience: float = PATIENCE) -> None:
        self.request = request
        self.patience = patience
        self.got: list[Any] = []
        self.sock: Any = None

    def run(self, steps: list[list[Any]]) -> None:
        """Take the steps; the answer is printed."""
        word, answer = "", {}
        try:
            for word, *arguments in steps:
                getattr(self, f"do_{word}")(*arguments)
        except OSError as e:
            name = errno.errorcode.get(e.errno or 0, type(e).__name__)
            answer = {"ok": False, "at": word, "errno": name}
        else:
            answer = {"ok": True}
        if self.sock:  # whoever hears the answer may want the same port
            self.sock.close()
        tell(self.request, **answer, got=self.got)

    def do_socket(self, family: int | str, kind: int | str, proto: int | str = 0) -> None:
        self.sock = socket.socket(number(family), number(kind), number(proto))

    def do_set(self, level: int | str, option: int | str, value: int | str) -> None:
        given = bytes.fromhex(value) if isinstance(value, str) else value
        self.sock.setsockopt(number(level), number(option), given)

    def do_set32(self, level: int | str, option: int | str, value: int) -> None:
        import ctypes
        import mmap

        # All that is pointed to must be below 4 GiB.
        page = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_32BIT, 7)
        start = ctypes.addressof(ctypes.c_char.from_buffer(page))
        given = [_SETSOCKOPT32, self.sock.fileno(), number(level), number(option), start + 600, 4]
        page[: len(_INT80)] = _INT80
        page[512 : 512 + 4 * len(given)] = struct.pack(f"={len(given)}I", *given)
        page[600:604] = struct.pack("=I", value)
        call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(start)
        if (code := call(start + 512)) < 0:
            raise OSError(-code, "setsockopt")

    def do_get(self, level: int | str, option: int | str) -> None:
        self.got.append(self.sock.getsockopt(number(level), number(option)))

    def do_bind(self, address: str, port: int) -> None:
        self.sock.bind((address, port))

    def do_bindbytes(self, sockaddr: str) -> None:
        self._libc("bind", sockaddr)

    def do_connectbytes(self, sockaddr: str) -> None:
        self.sock.setblocking(False)
        self._libc("connect", sockaddr)

    def _libc(self, call: str, sockaddr: str) -> None:
        import ctypes

        raw = bytes.fromhex(sockaddr)
        libc = ctypes.CDLL(None, use_errno=True)
        if getattr(libc, call)(self.sock.fileno(), raw, len(raw)):
            raise OSError(ctypes.get_errno(), call)

    def do_listen(self) -> None:
        self.sock.listen(16)

    def do_name(self) -> None:
        self.got.append(list(self.sock.getsockname()[:2]))

    def do_connect(self, address: str, port: int) -> None:
        self.sock.setblocking(False)
        code = self.sock.connect_ex((address, port))
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, "connect")
        self.sock.setblocking(True)

    def do_connectwait(self, address: str, port: int) -> None:
        self.sock.settimeout(self.patience)
        self.sock.connect((address, port))
        self.sock.settimeout(None)

    def do_send(self, data: str, address: str, port: int, cmsgs: Any = ()) -> None:
        ancillary = [(number(a), number(b), bytes.fromhex(c)) for a, b, c in cmsgs]
        where = (address, port) if address else None
        self.sock.sendmsg([bytes.fromhex(data)], ancillary, 0, where)

    def do_sendif(self, data: str, interface: str) -> None:
        self.sock.sendto(bytes.fromhex(data), (interface, 0x0800))

    def do_accept(self) -> None:
        self.sock.settimeout(self.patience)
        self.sock, _ = self.sock.accept()

    def do_receive(self, token: str) -> None:
        until = time.monotonic() + self.patience
        while self._read(until):
            if token in self.got[-1]:
                return
        raise OSError(errno.ETIMEDOUT, "receive")

    def do_hear(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._read(until):
            pass

    def _read(self, until: float) -> bool:
        ready, _, _ = select.select([self.sock], [], [], max(until - time.monotonic(), 0))
        if ready:
            self.got.append(self.sock.recv(4096)[:256].hex())
        return bool(ready)

    def do_uring(self, operation: str, *arguments: Any) -> None:
        sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
        import uring  # type: ignore[import-not-found]  # -I -S: no package here

        given = [bytes.fromhex(a[1:]) if str(a)[:1] == "=" else a for a in arguments]
        value = getattr(uring, operation)(self.sock, *given)
        if isinstance(value, socket.socket):
            self.sock = value

    def do_hold(self) -> None:
        tell(self.request, ok=True, got=self.got)
        while True:
            signal.pause()

    def do_go(self) -> None:
        tell(self.request, ok=True, at="go", got=self.got)

    def do_hammer(self, family: str, kind: str, address: str, port: int) -> None:
        results: dict[str, int] = {}
        dropped: list[int] = []
        signal.signal(signal.SIGTERM, lambda *_: dropped.append(1))
        self.do_go()
        while not dropped:
            with socket.socket(number(family), number(kind)) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    sock.bind((address, port))
                    result = "ok"
                except OSError as e:
                    result = errno.errorcode[e.errno or 0]
            results[result] = results.get(result, 0) + 1
        self.got.append(results)

    def do_cgroup(self, directory: str) -> None:
        with open(f"{directory}/cgroup.procs", "w") as procs:  # noqa: PTH123
            procs.write("0")

    def do_unchroot(self) -> None:
        # Whoever is in a chroot may make no user namespace (create_user_ns), and the
        # guests' tests are: entering a mount namespace, even one's own, leaves it.
        if os.environ.get("VNET_VM") != "1":
            return
        import ctypes

        own = os.open("/proc/1/ns/mnt", os.O_RDONLY)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(own, 0):
            raise OSError(ctypes.get_errno(), "setns")

    def do_unshare(self, flags: int) -> None:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(flags):
            raise OSError(ctypes.get_errno(), "unshare")

    def do_uid(self, uid: int) -> None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)

    def do_take(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(path)
            door.listen(1)
            self.do_go()
            door.settimeout(self.patience)
            other, _ = door.accept()
            with other:
                _, [descriptor], _, _ = socket.recv_fds(other, 1, 1)
        self.sock = socket.socket(fileno=descriptor)

    def do_give(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as door:
            door.connect(path)
            socket.send_fds(door, [b"x"], [self.sock.fileno()])


def requests() -> Iterator[dict[str, Any]]:
    """What comes on standard input."""
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    """Serve until the end of the input."""
    # On one CPU, so that what is sent later arrives later, too.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    children: dict[int, int] = {}
    for word in sys.argv[1:]:
        Attempt(0).do_uid(int(word.removeprefix("uid=")))
    tell(0, ok=True, pid=os.getpid())
    for request in requests():
        if "drop" in request:
            os.kill(children[request["drop"]], signal.SIGTERM)
            os.waitpid(children.pop(request["drop"]), 0)
            tell(request["id"], ok=True, got=[])
            continue
        words = {step[0] for step in request["steps"]}
        if not words & FORKED and "uring" not in words:
            Attempt(request["id"], request.get("patience", PATIENCE)).run(request["steps"])
            continue
        child = os.fork()
        if not child:
            try:
                Attempt(request["id"], request.get("patience", PATIENCE)).run(request["steps"])
            finally:
                os._exit(0)
        if request["wait"]:
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                name = signal.Signals(os.WTERMSIG(status)).name
                tell(request["id"], ok=False, at="died", errno=name, got=[])
        else:
            children[request["id"]] = child
    for child in children.values():
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
