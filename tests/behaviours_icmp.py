"""Pings that share an id, and traceroutes: to the node, and by a slice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from behaviours_bed import ANY, ECHO, UNREACHABLE, B, Bed, O, P, U, at, marks, script
from netflowbed import owners
from vnet.testing import apps
from vnet.testing.cgroup import Cgroup
from vnet.testing.net import Namespace
from vnet.testing.nflog import Seen
from vnet.testing.poll import until

EXCEEDED = {4: 11 << 8, 6: 3 << 8}
"""Time exceeded in transit: type << 8 | code."""
ID = 0x4D2
COUNT = 5

# Raw, as ping does it where ping sockets are not allowed.
_PING = """
to, ident, count, token = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].encode()
ask, answer = (8, 0) if family(to) == socket.AF_INET else (128, 129)
s = socket.socket(family(to), socket.SOCK_RAW, 1 if ask == 8 else 58)
def packet(number):
    body = struct.pack(">BBHHH", ask, 0, 0, ident, number) + token
    words = struct.unpack(f">{len(body) // 2}H", body)
    total = sum(words)
    total = (total & 0xffff) + (total >> 16)
    total = ~((total & 0xffff) + (total >> 16)) & 0xffff
    return body[:2] + struct.pack(">H", total) + body[4:]  # the kernel writes ICMPv6's
say("ready")
wait()
heard = []
for number in range(count):
    end = time.monotonic() + 5
    s.sendto(packet(number), (to, 0))
    # until the answer is there, and then whatever else is
    while select.select([s], [], [], 0 if heard.count(token.decode()) > number
                        else max(0, end - time.monotonic()))[0]:
        data = s.recv(2000)
        data = data[20:] if ask == 8 else data
        if data[0] == answer and data[4:6] == struct.pack(">H", ident):
            heard.append(data[8:].decode())
    if not number:
        say("first")
        wait()
say("done", heard=heard)
wait()
while select.select([s], [], [], 0)[0]:
    data = s.recv(2000)
    data = data[20:] if ask == 8 else data
    if data[0] == answer and data[4:6] == struct.pack(">H", ident):
        heard.append(data[8:].decode())
say("all", heard=heard)
"""


def same_id(bed: Bed, family: int) -> None:
    """o and p ping the peer from raw sockets, with one id, the same numbers, and their own data."""
    to = (bed.there(family), ID + family, COUNT)
    with (
        bed.watching() as log,
        script(bed.ns, _PING, *to, "of o's..", slice=bed.o) as o,
        script(bed.ns, _PING, *to, "of p's..", slice=bed.p) as p,
    ):
        # The first ones one by one: of two that meet on two processors connection tracking
        # drops one, with our rules or without (conntrack -S: insert_failed).
        for pinger in (o, p):
            pinger.go()
            pinger.event("first")
        for pinger in (o, p):
            pinger.go()
        for pinger in (o, p):
            pinger.event("done")
        seen = until(lambda: _echoes(log.seen(), family)[4 * COUNT - 1 :] and log.seen())
        heard = []
        for pinger in (o, p):
            pinger.go()
            heard.append(pinger.event("all")["heard"])
    assert heard == [["of o's.."] * COUNT, ["of p's.."] * COUNT]
    echoes = _echoes(seen, family)
    for token, xid in ((b"of o's..", O), (b"of p's..", P)):
        asked = [s for s in echoes if token in s.payload and s.prefix == "postrouting"]
        assert at(asked, "postrouting") == [xid] * COUNT
    # One id is one connection: it is the first one's, and so are its answers' marks.
    first = at(echoes, "postrouting")[0]
    assert set(at(echoes, "input")) == {first}
    found = bed.records(dst=[bed.there(family)], proto=[1, 58])
    assert {owners(r) for r in found if r["icmp"]["id"] == ID + family} == {(first, 0)}


def _echoes(seen: list[Seen], family: int) -> list[Seen]:
    return [s for s in seen if s.dport in ECHO[family] and s.sport == ID + family]


# -- traceroute ----------------------------------------------------------------------------

# What traceroute -U, -T and -I do: probes with a small TTL, and the errors they come to.
_TRACE = """
kind, to, port, ttls = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
six = family(to) == socket.AF_INET6
level, ttl_option, recverr = (41, 16, 25) if six else (0, 2, 11)
icmp = 58 if six else 1
def errors(s):
    # struct sock_extended_err (linux/errqueue.h), then the offender's address
    while True:
        _, control, _, _ = s.recvmsg(2000, 2000, 0x2000)  # MSG_ERRQUEUE
        for _, _, data in control:
            _, origin, number, code = struct.unpack_from("=IBBB", data)
            if origin in (2, 3):
                at = data[16:]
                who = socket.inet_ntop(family(to), at[8:24] if six else at[4:8])
                return [who, number, code]
def udp(ttl):
    with socket.socket(family(to), socket.SOCK_DGRAM) as s:
        s.setsockopt(level, ttl_option, ttl)
        s.setsockopt(level, recverr, 1)
        s.sendto(b"probe", (to, port + ttl))
        poll = select.poll()
        poll.register(s, select.POLLERR)
        return errors(s) if poll.poll(10000) else None
def tcp(ttl):
    with socket.socket(family(to), socket.SOCK_STREAM) as s:
        s.setsockopt(level, ttl_option, ttl)
        s.setsockopt(level, recverr, 1)
        s.setblocking(False)
        s.connect_ex((to, port))
        poll = select.poll()
        poll.register(s, select.POLLOUT | select.POLLERR)
        if not poll.poll(10000):
            return None
        code = s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return errors(s) if code == 113 else {0: "open", 111: "refused"}.get(code, code)
def echo(ttl):
    with socket.socket(family(to), socket.SOCK_RAW, icmp) as s:
        s.setsockopt(level, ttl_option, ttl)
        body = struct.pack(">BBHHH", 128 if six else 8, 0, 0, port, ttl)
        total = sum(struct.unpack(">4H", body))
        total = ~((total & 0xffff) + (total >> 16)) & 0xffff
        s.sendto(body[:2] + struct.pack(">H", total) + body[4:], (to, 0))
        end = time.monotonic() + 10
        while select.select([s], [], [], max(0, end - time.monotonic()))[0]:
            data, (who, *_) = s.recvfrom(2000)
            data = data if six else data[20:]
            answer = [who, data[0], data[1]]
            quoted = data[8 + (40 if six else 20):]
            mine = struct.pack(">HH", port, ttl)
            if data[0] in (0, 129) and data[4:8] == mine or quoted[4:8] == mine:
                return answer
say("ready")
wait()
say("done", answers=[{"udp": udp, "tcp": tcp, "icmp": echo}[kind](ttl) for ttl in ttls])
"""


def _trace(
    ns: Namespace, kind: str, to: str, port: int, ttls: list[int], slice: Cgroup | None = None
) -> list[Any]:
    """What came back for each probe: who said which ICMP type and code, or what connect() said."""
    with script(ns, _TRACE, kind, to, port, ttls, slice=slice) as tracer:
        tracer.go()
        return list(tracer.event("done")["answers"])


def _split(code: int) -> list[int]:
    return [code >> 8, code & 0xFF]


def _errors(seen: list[Seen], code: int) -> list[Seen]:
    return [s for s in seen if s.proto in (1, 58) and s.dport == code]


def traceroute_to_the_node(bed: Bed, family: int, kind: str) -> None:
    """The peer traces to the node, and to a host beyond it, with the guard on."""
    here, port, unreachable = bed.here(family), 33000 + family * 10, UNREACHABLE[family]
    with bed.watching() as log:
        if kind == "udp":
            [answer] = _trace(bed.peer, "udp", here, port, [1])
            assert answer == [here, *_split(unreachable)]
            # Nobody has that port: it is the kernel's own answer, for nobody.
            assert at(_errors(log.seen(), unreachable), "postrouting") == [0]
            assert bed.owners(dport=[port + 1]) == [(0, 0)]
        elif kind == "tcp":
            _tcp_to_the_node(bed, family, port)
        else:
            [answer] = _trace(bed.peer, "icmp", here, port, [1])
            assert answer == [here, 0 if family == 4 else 129, 0]
            replies = [s for s in log.seen() if s.dport == ECHO[family][1] and s.sport == port]
            assert at(replies, "postrouting") == [0]
    with bed.watching() as log, _routed(bed, family) as far:
        [answer] = _trace(bed.peer, kind, far, port + 5, [1])
        assert answer == [here, *_split(EXCEEDED[family])]
        assert at(_errors(log.seen(), EXCEEDED[family]), "postrouting") == [0]


def _tcp_to_the_node(bed: Bed, family: int, port: int) -> None:
    here = bed.here(family)
    with (
        bed.watching() as log,
        apps.start(bed.ns, "tcp-server", bed.thread.b, bind=ANY[family]) as server,
    ):
        assert _trace(bed.peer, "tcp", here, port, [1]) == ["refused"]
        assert _trace(bed.peer, "tcp", here, server.port, [1]) == ["open"]
        seen = log.seen()
        resets = [s for s in seen if s.sport == port and "R" in s.tcp_flags]
        answers = [s for s in seen if s.sport == server.port and s.tcp_flags == "SA"]
        assert (at(resets, "postrouting"), at(answers, "postrouting")) == ([0], [B])
        assert bed.owners(dport=[port]) == [(0, 0)]
        assert set(bed.owners(dport=[server.port])) == {(0, B)}


@contextmanager
def _routed(bed: Bed, family: int) -> Iterator[str]:
    """A destination that the peer reaches by the node only."""
    far = {4: "192.0.2.9", 6: "2001:db8::9"}[family]
    forwarding = {4: "net__ipv4__ip_forward", 6: "net__ipv6__conf__all__forwarding"}[family]
    was = bed.ns.run("sysctl", "-n", forwarding.replace("__", ".")).stdout.strip()
    dev, back = bed.thread.link.a_if, bed.there(family)
    bed.ns.sysctl(**{forwarding: 1, "net__ipv4__conf__all__send_redirects": 0})
    bed.ns.run("ip", f"-{family}", "route", "add", far, "via", back, "dev", dev)
    bed.peer.run("ip", f"-{family}", "route", "add", far, "via", bed.here(family))
    try:
        yield far
    finally:
        bed.ns.run("ip", f"-{family}", "route", "del", far)
        bed.peer.run("ip", f"-{family}", "route", "del", far)
        bed.ns.sysctl(**{forwarding: was})


_HEAR = """
six = sys.argv[1] == "6"
s = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_RAW, 58 if six else 1)
say("ready")
wait()
heard = []
while select.select([s], [], [], 0)[0]:
    data = s.recv(2000)
    heard.append((data if six else data[20:])[0])
say("all", heard=heard)
"""


def traceroute_by_a_slice(bed: Bed, family: int, kind: str) -> None:
    """o traces to the host behind the peer; p listens to ICMP, and hears none of it."""
    far, hop, port = bed.far(family), bed.there(family), 34000 + family * 10
    slice, xid = (bed.u, U) if kind == "udp" else (bed.o, O)  # UDP's way needs no grant
    exceeded, unreachable = EXCEEDED[family], UNREACHABLE[family]
    with bed.watching() as log, script(bed.ns, _HEAR, family, slice=bed.p) as other:
        answers = _trace(bed.ns, kind, far, port, [1, 2], slice=slice)
        seen = [s for s in log.seen() if s.proto != 58 or s.dport >> 8 < 130]  # no neighbours'
        other.go()
        heard = other.event("all")["heard"]
    last = {
        "udp": [far, *_split(unreachable)],
        "tcp": "refused",
        "icmp": [far, 0 if family == 4 else 129, 0],
    }[kind]
    assert answers == [[hop, *_split(exceeded)], last]
    assert at(_errors(seen, exceeded), "input") == [xid]
    assert marks(seen) == {"postrouting": {xid}, "input": {xid}}
    assert not {exceeded >> 8, unreachable >> 8, ECHO[family][1] >> 8} & set(heard)
    protos = {"udp": [17], "tcp": [6], "icmp": [1, 58]}[kind]
    assert set(bed.owners(dst=[far], proto=protos)) == {(xid, 0)}
