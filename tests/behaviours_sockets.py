"""Sockets that are handed on, change their slice, or outlive what made them."""

import re
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from behaviours_bed import GONE, GONE_BELOW, A, B, Bed, U, at, marks, script
from netflowbed import owners, sums
from thread_bed import closed, of_port
from vnet.testing import apps, cgroup
from vnet.testing.nflog import Seen
from vnet.testing.poll import until
from vnetbed import watching as vnet_watch

from vnet import bpf, policy

# One connection: a question, an answer, and both ends close.
_CLIENT = {"send": 10, "close": "half"}

# -- handed on -----------------------------------------------------------------------------

_ACCEPTS = """
def enter(directory):
    with open(directory + "/cgroup.procs", "w") as procs:
        procs.write("0")
def listener(bind):
    s = socket.socket(family(bind), socket.SOCK_STREAM)
    s.bind((bind, 0))
    s.listen()
    say("ready", port=s.getsockname()[1])
    return s
def serve(conn):
    while conn.recv(100):
        pass
    conn.sendall(bytes(10))
    conn.close()
"""

_GIVES = (
    _ACCEPTS
    + """
conn, _ = listener(sys.argv[1]).accept()
if not os.fork():
    enter(sys.argv[2])
    serve(conn)
    os._exit(0)
conn.close()
os.wait()
"""
)


def handed_on(bed: Bed, family: int) -> None:
    """b accepts; a process of a's has the socket from then on. The socket is b's all the same."""
    seen, found = _served(bed, family, _GIVES, bed.thread.a.path, slice=bed.thread.b)
    assert marks(seen) == {"input": {B}, "postrouting": {B}}
    assert found == [(0, B)]


_ACTIVATES = (
    _ACCEPTS
    + """
waiting = listener(sys.argv[1])
if not os.fork():
    enter(sys.argv[2])
    serve(waiting.accept()[0])
    os._exit(0)
os.wait()
"""
)


def activated_by_the_node(bed: Bed, family: int) -> None:
    """pid 1 listens, and starts a service of a's when somebody comes: the socket is pid 1's."""
    seen, found = _served(bed, family, _ACTIVATES, bed.thread.a.path)
    assert marks(seen) == {"input": {0}, "postrouting": {0}}
    assert found == [(0, 0)]


def activated_in_its_slice(bed: Bed, family: int) -> None:
    """The socket unit's cgroup is below the slice's, as systemd does it with Slice=."""
    with cgroup.cgroup("web.socket", bed.thread.a) as unit:
        seen, found = _served(bed, family, _ACTIVATES, bed.thread.a.path, slice=unit)
    assert marks(seen) == {"input": {A}, "postrouting": {A}}
    assert found == [(0, A)]


def _served(
    bed: Bed, family: int, code: str, *argv: object, slice: cgroup.Cgroup | None = None
) -> tuple[list[Seen], list[tuple[int, int]]]:
    """The packets and owners of one connection of the peer's to such a server."""
    with (
        bed.watching() as log,
        script(bed.ns, code, bed.here(family), *argv, slice=slice) as near,
        apps.start(
            bed.peer, "tcp-client", to=bed.here(family), port=near.port, **_CLIENT
        ) as client,
    ):
        assert client.result()["received"] == 10
        seen, port = closed(log, near.port), near.port
    return seen, bed.owners(dport=[port])


# The connection is taken apart and put together again by another socket, which its
# slice makes: TCP_REPAIR (net/ipv4/tcp.c), as CRIU does it.
_REOWNS = (
    _ACCEPTS
    + """
REPAIR, QUEUE, SEQ, OPTIONS, STAMP, WINDOW = 19, 20, 21, 22, 24, 29
def get(s, option, size=0):
    return s.getsockopt(socket.IPPROTO_TCP, option, *([size] if size else []))
def put(s, option, value):
    s.setsockopt(socket.IPPROTO_TCP, option, value)
old, _ = listener(sys.argv[1]).accept()
old.recv(100)
say("accepted")
wait()
put(old, REPAIR, 1)
queues = {}
for queue in (1, 2):
    put(old, QUEUE, queue)
    queues[queue] = get(old, SEQ) & 0xffffffff
info, mss = get(old, socket.TCP_INFO, 104), get(old, socket.TCP_MAXSEG)
window, stamp = get(old, WINDOW, 20), get(old, STAMP) & 0xffffffff
here, there = old.getsockname(), old.getpeername()
old.close()
enter(sys.argv[2])
new = socket.socket(family(here[0]), socket.SOCK_STREAM)
put(new, REPAIR, 1)
for queue, number in queues.items():
    put(new, QUEUE, queue)
    put(new, SEQ, struct.pack("=I", number))
new.bind(here)
new.connect(there)
options = [(2, mss), (3, (info[6] & 15) | (info[6] >> 4) << 16)]
options += [(4, 0)] if info[5] & 2 else []
options += [(8, 0)] if info[5] & 1 else []
put(new, OPTIONS, b"".join(struct.pack("=II", *o) for o in options))
put(new, STAMP, struct.pack("=I", stamp))
put(new, WINDOW, window)
put(new, REPAIR, 0)
say("moved")
serve(new)
"""
)


def reowned(bed: Bed, family: int, front: str) -> None:
    """A front end of b's (or the node's) accepts, reads, and makes the connection a's."""
    slice, before = {"slice": (bed.thread.b, B), "node": (None, 0)}[front]
    with (
        bed.watching() as log,
        script(bed.ns, _REOWNS, bed.here(family), bed.thread.a.path, slice=slice) as near,
        apps.start(
            *(bed.peer, "tcp-client"),
            to=bed.here(family),
            port=near.port,
            send=10,
            close="half",
            hold="sent",
        ) as client,
    ):
        near.event("accepted")
        port = near.port
        # The question and its acknowledgement.
        first = until(lambda: of_port(log, port)[4:] and of_port(log, port))
        near.go()
        near.event("moved")
        client.go()
        assert client.result()["received"] == 10
        then = closed(log, port)[len(first) :]
        found = bed.records(dport=[port])
    assert marks(first) == {"input": {before}, "postrouting": {before}}
    assert marks(then) == {"input": {A}, "postrouting": {A}}
    # What nobody had is the first owner's; what somebody had stays his.
    expected = [(0, B), (0, A)] if before else [(0, A)]
    assert [who for who, _ in groupby(owners(r) for r in found)] == expected
    assert [r["reason"] for r in found].count("owner") == len(expected) - 1
    assert len({(r["flow_start"], r["flow_id"]) for r in found}) == 1
    assert sums(found)[::2] == tuple(len(at(first + then, h)) for h in ("input", "postrouting"))


# -- cgroups that go -----------------------------------------------------------------------


def unit_restarts(bed: Bed, family: int) -> None:
    """u's service ends, its cgroup goes and comes back under its old path, it serves again."""
    here, path = bed.here(family), bed.u.path
    found: list[Any] = []
    with vnet_watch(bed.thread.node):
        for _start in range(2):
            with (
                bed.watching() as log,
                apps.start(bed.ns, "tcp-server", bed.u, bind=here, reply=10) as near,
            ):
                until(lambda port=near.port: _xid_of_listener(bed, port) == U)
                with apps.start(
                    bed.peer, "tcp-client", to=here, port=near.port, **_CLIENT
                ) as client:
                    assert client.result()["received"] == 10
                    seen = closed(log, near.port)
                    found.append((marks(seen), bed.owners(dport=[near.port])))
            until(lambda: not bed.u.procs())
            cgroup.remove(path)
            path.mkdir()
    assert found == [({"input": {U}, "postrouting": {U}}, [(0, U)])] * 2


def _xid_of_listener(bed: Bed, port: int) -> int:
    """The low half of its mark: 0 until somebody has put its cgroup into the tables."""
    said = bed.ns.run("ss", "-tlneH", "sport", f"= :{port}").stdout
    found = re.search(r"fwmark:0x([0-9a-f]+)", said)
    return int(found[1], 16) & 0xFFFF if found else 0


# Half of each pair stays at the node, and what it sends is looked at.
_OUTLIVES = """
to, port, home = sys.argv[1], int(sys.argv[2]), sys.argv[3]
tcp = socket.create_connection((to, port))
udp = socket.socket(family(to), socket.SOCK_DGRAM)
udp.connect((to, port))
def speak():
    for s in (udp, tcp):
        s.send(b"x" * 10)
        s.recv(100)
speak()
with open(home + "/cgroup.procs", "w") as procs:
    procs.write("0")
say("ready", tcp=tcp.getsockname()[1], udp=udp.getsockname()[1])
while True:
    wait()
    speak()
    say("spoken")
"""
_ECHO = """
t = socket.socket(family(sys.argv[1]), socket.SOCK_STREAM)
u = socket.socket(family(sys.argv[1]), socket.SOCK_DGRAM)
t.bind((sys.argv[1], 0))
u.bind(t.getsockname()[:2])
t.listen()
say("ready", port=t.getsockname()[1])
conn, _ = t.accept()
poll = select.poll()
for s in (conn, u):
    poll.register(s, select.POLLIN)
while True:
    for fd, _ in poll.poll():
        if fd == u.fileno():
            data, who = u.recvfrom(100)
            u.sendto(data, who)
        elif data := conn.recv(100):
            conn.sendall(data)
        else:
            sys.exit()
"""


def outlives_its_cgroup(bed: Bed, family: int) -> None:
    """A process leaves its cgroup, that is removed, and the process's sockets go on for long.

    ``vnet watch`` takes the ids of cgroups that are gone out of the tables after a
    while. Not this one: beside it one goes of which nothing is left.
    """
    with (
        vnet_watch(bed.thread.node, "--linger", "0.005"),
        cgroup.cgroup(GONE_BELOW, bed.u) as gone,
        cgroup.cgroup("idle", bed.u) as idle,
        bed.watching() as log,
        script(bed.peer, _ECHO, bed.there(family)) as far,
    ):
        gone_id, idle_id = gone.id, idle.id
        until(lambda: {gone_id, idle_id} <= _table(bed).keys(), what="both are in the table")
        words = (bed.there(family), far.port, cgroup.root())
        with script(bed.ns, _OUTLIVES, *words, slice=gone) as near:
            ready = near.event("ready")
            gone.path.rmdir()
            idle.path.rmdir()
            until(lambda: idle_id not in _table(bed), what="the idle one's id has left")
            near.go()
            near.event("spoken")
            assert gone_id in _table(bed)
            seen = of_port(log, far.port)
        until(lambda: gone_id not in _table(bed), what="its id has left in the end")
    assert marks(seen) == {"input": {GONE}, "postrouting": {GONE}}
    for proto in ("tcp", "udp"):
        assert set(bed.owners(sport=[ready[proto]])) == {(GONE, 0)}


def _table(bed: Bed) -> dict[int, int]:
    """The slices in the kernel: {cgroup id: xid}."""
    path = Path(bed.thread.node.env["VNET_BPF_DIR"])
    [instance] = bpf.instances(path)
    return policy.read(instance).slices


# -- references ----------------------------------------------------------------------------

_CHURN = """
here, there, port, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
kinds = (socket.SOCK_DGRAM, socket.SOCK_STREAM)
icmp = 1 if family(here) == socket.AF_INET else 58
socket.setdefaulttimeout(10)
echo = bytes([8 if icmp == 1 else 128, 0]) + bytes.fromhex("f7fe00010000")
say("ready")
wait()
for n in range(rounds):
    for kind in kinds:  # with each other, over loopback
        a, b = socket.socket(family(here), kind), socket.socket(family(here), kind)
        a.bind((here, 0))
        if kind == socket.SOCK_STREAM:
            a.listen()
            b.connect(a.getsockname()[:2])
            c, _ = a.accept()
            c.send(b"x")
            b.recv(1)
            if n % 2:
                c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
            c.close()
        else:
            b.sendto(b"x", a.getsockname()[:2])
            a.recv(1)
        a.close(); b.close()
    with socket.socket(family(here), socket.SOCK_DGRAM) as s:  # and with the peer
        s.connect((there, port))
        s.send(b"x")
        s.recv(10)
    with socket.socket(family(here), socket.SOCK_DGRAM) as s:  # which has no such port
        s.connect((there, 9))
        s.settimeout(0.2)  # a host sends so many errors a second, and no more
        s.send(b"x")
        try:
            s.recv(10)
        except OSError:
            pass
    with socket.socket(family(here), socket.SOCK_STREAM) as s:
        s.connect_ex((there, 9))
    with socket.socket(family(here), socket.SOCK_RAW, icmp) as s:
        s.sendto(echo, (there, 0))
        s.recv(100)
say("done")
wait()
"""


def no_reference_stays(bed: Bed, family: int) -> None:
    """Hundreds of flows of every kind, and then nothing of their cgroup is left in the kernel.

    Each socket holds its cgroup (cgroup_sk_alloc, kernel/cgroup/cgroup.c): a look-up
    that keeps one socket keeps the cgroup as a dying one, for ever.
    """
    parent = bed.thread.a
    with (
        cgroup.cgroup("churn", parent) as below,
        apps.start(bed.peer, "udp-recv", bind=bed.there(family), reply=1) as far,
    ):
        words = (bed.here(family), bed.there(family), far.port, 30)
        with script(bed.ns, _CHURN, *words, slice=below) as near:
            near.go()
            near.event("done", timeout=120)
            assert set(bed.owners(dst=[bed.there(family)], dport=[far.port])) == {(A, 0)}
        # One socket, held by a process that has left, is seen: so would a lost one be.
        with script(bed.ns, _LEAVES, cgroup.root(), slice=below):
            _rmdir(below.path)
            assert _dying(parent) == 1
        until(lambda: _dying(parent) == 0, what="all sockets of the cgroup are freed")


_LEAVES = """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
with open(sys.argv[1] + "/cgroup.procs", "w") as procs:
    procs.write("0")
say("ready")
wait()
"""


def _rmdir(path: Path) -> None:
    def gone() -> bool:
        with suppress(OSError):
            path.rmdir()
        return not path.exists()

    until(gone, what=f"rmdir {path}")


def _dying(parent: cgroup.Cgroup) -> int:
    text = (parent.path / "cgroup.stat").read_text()
    return int(re.search(r"nr_dying_descendants (\d+)", text)[1])
