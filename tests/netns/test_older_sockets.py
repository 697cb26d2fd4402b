"""Sockets that are older than `vnet up`: they go on sending, and none of them holds it up."""

import os
import subprocess
import sys

import pytest
import vnetbed
from vnet.testing.poll import until

from vnet import bpf

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(bpf.lacking()), reason="this kernel cannot run the eBPF programs"),
]

_HOLDS = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("127.0.0.1", 0))
print(s.fileno(), flush=True)
sys.stdin.read()
"""

#: `vnet up` that sends by the older socket at the moment the rules are in place
_UP = """
import os, socket, sys
from vnet import node
from vnet.bpfmaps import lib
from vnetbed import paths_from_env
pid, fd = map(int, sys.argv[1:])
older = socket.socket(fileno=lib.vnet_getfd(os.pidfd_open(pid), fd))
rules = node._rules

def and_send(*argv):
    result = rules(*argv)
    older.sendto(b"x", older.getsockname())  # EPERM where the guard drops it
    return result

node._rules = and_send
node.up(paths_from_env())
assert older.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == 512
"""


def test_a_slices_older_socket_sends_at_the_moment_the_guards_rules_are_there(ns, slices, tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with vnetbed.bpf_node(ns, tmp_path) as node:
        node.slices(a=(slices.a.rel, 512))
        with ns.popen("/usr/bin/python3", "-c", _HOLDS, cgroup=slices.a, **pipes) as holder:
            try:
                fd = holder.stdout.readline().strip()
                env = node.env | {"PYTHONPATH": os.pathsep.join([str(vnetbed.PY), *sys.path])}
                ns.run(sys.executable, "-c", _UP, str(holder.pid), fd, env=env)
            finally:
                holder.kill()


#: A socket that a process sends by from a page of a FUSE file that does not come: it is
#: locked all the while. Each line of input: the page comes, if it has not; the socket's mark.
_LOCKS = """
import ctypes, mmap, os, socket, struct, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p

def tried(result):
    assert result == 0, os.strerror(ctypes.get_errno())

tried(libc.unshare(0x20000))  # CLONE_NEWNS
tried(libc.mount(b"none", b"/", None, 1 << 18 | 1 << 14, None))  # MS_PRIVATE | MS_REC
fuse = os.open("/dev/fuse", os.O_RDWR)
how = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
tried(libc.mount(b"fuse", sys.argv[1].encode(), b"fuse", 0, how))
asked, come = threading.Event(), threading.Event()

def attributes(node):
    mode, size = (0o40755, 0) if node == 1 else (0o100644, 4096)
    return struct.pack("=6Q10I", node, size, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

def serve():  # include/uapi/linux/fuse.h
    while True:
        _, request, unique, node = struct.unpack_from("=IIQQ", os.read(fuse, 1 << 17))
        error, answer = 0, b""
        if request == 26:  # INIT
            answer = struct.pack("=4I2H2I2H28x", 7, 31, 65536, 0, 10, 10, 4096, 1, 16, 0)
        elif request == 1:  # LOOKUP
            answer = struct.pack("=4Q2I", 2, 0, 100, 100, 0, 0) + attributes(2)
        elif request == 3:  # GETATTR
            answer = struct.pack("=QII", 100, 0, 0) + attributes(node)
        elif request in (14, 27):  # OPEN, OPENDIR
            answer = struct.pack("=QII", 1, 0, 0)
        elif request == 15:  # READ
            asked.set()
            come.wait()
            answer = bytes(4096)
        elif request in (2, 36, 42):  # FORGET, INTERRUPT, BATCH_FORGET
            continue
        else:
            error = -38
        os.write(fuse, struct.pack("=IiQ", 16 + len(answer), error, unique) + answer)

threading.Thread(target=serve, daemon=True).start()
listener = socket.create_server(("127.0.0.1", 0))
one = socket.create_connection(listener.getsockname())
if not os.fork():
    os.close(fuse)  # or it would not end with its server
    file = os.open(sys.argv[1] + "/f", os.O_RDONLY)
    page = libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
    libc.send(one.fileno(), ctypes.c_void_p(page), 1000, 0)
    os._exit(0)
asked.wait()
print(os.fstat(one.fileno()).st_ino, flush=True)
for _ in sys.stdin:
    come.set()
    print(one.getsockopt(socket.SOL_SOCKET, 36), flush=True)
"""


def test_a_socket_that_its_process_keeps_locked_is_named_and_marked_later(ns, slices, tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    (tmp_path / "fuse").mkdir()
    ns.run("ip", "link", "set", "lo", "up")
    with vnetbed.bpf_node(ns, tmp_path) as node:
        node.slices(a=(slices.a.rel, 512))
        argv = ("/usr/bin/python3", "-c", _LOCKS, str(tmp_path / "fuse"))
        with (
            ns.popen("/usr/bin/python3", "-c", _HOLDS, cgroup=slices.a, **pipes) as other,
            ns.popen(*argv, cgroup=slices.a, **pipes) as holder,
        ):
            try:
                inode = holder.stdout.readline().strip()
                assert other.stdout.readline()
                done = node.json("up")
                assert "marked 2 sockets that were older" in done["done"]  # the others
                [words] = [words for words in done["remarks"] if "locked" in words]
                assert f"socket:[{inode}] of process {holder.pid}" in words

                def mark() -> str:
                    holder.stdin.write("\n")
                    holder.stdin.flush()
                    return holder.stdout.readline().strip()

                until(lambda: mark() == "512", what="it is marked, no longer locked")
                assert node.json("status")["whole"]
            finally:
                holder.kill()
                other.kill()
