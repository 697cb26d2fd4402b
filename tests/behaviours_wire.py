"""What else is on the wire: NAT, GRE, SCTP, a tap under load, other namespaces."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from behaviours_bed import ANY, PORT_O, PORT_P, A, B, Bed, O, P, at, marks, script
from netflowbed import owners
from thread_bed import closed, of_port
from vnet.testing import apps
from vnet.testing.nflog import Seen

NAT = 11_000
"""Ports that NAT gives, none of which the kernel gives a client of itself."""

# -- NAT -----------------------------------------------------------------------------------


@contextmanager
def _nat(bed: Bed, family: int, hook: str, rule: str) -> Iterator[None]:
    """One rule of somebody else's nat table."""
    priority = {"postrouting": "srcnat", "output": "-100"}.get(hook, "dstnat")
    ip = {4: "ip", 6: "ip6"}[family]
    text = (
        f"table {ip} others {{ chain c {{ type nat hook {hook} priority {priority}; {rule}; }}; }}"
    )
    bed.ns.run("nft", "-f", "-", input=text)
    try:
        yield
    finally:
        bed.ns.run("nft", "delete", "table", ip, "others")


def _at(address: str, port: object) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def source_nat(bed: Bed, family: int, what: str) -> None:
    """a talks to the peer from another port than it thinks (SNAT), or by masquerade."""
    proto = "tcp" if what == "snat" else "udp"
    to = _at(bed.here(family), NAT + family) if what == "snat" else f":{NAT + family}"
    words = {"snat": "snat to", "masquerade": "masquerade to"}[what]
    with (
        bed.watching() as log,
        apps.start(
            bed.peer, f"{proto}-server" if proto == "tcp" else "udp-recv",
            bind=bed.there(family), reply=10,
        ) as far,
        _nat(bed, family, "postrouting", f"{proto} dport {far.port} {words} {to}"),
    ):  # fmt: skip
        seen = _asks(bed, log, proto, bed.there(family), far.port)
        [record] = bed.records(dport=[far.port])
    assert marks(seen) == {"postrouting": {A}, "input": {A}}
    assert owners(record) == (A, 0)
    assert record["nat"]["sport"] == NAT + family


def destination_nat(bed: Bed, family: int) -> None:
    """The peer asks a port of the node's that leads to b's server."""
    port = NAT + 10 + family
    with (
        bed.watching() as log,
        apps.start(bed.ns, "tcp-server", bed.thread.b, bind=bed.here(family), reply=10) as near,
        _nat(bed, family, "prerouting", f"tcp dport {port} redirect to :{near.port}"),
        apps.start(bed.peer, "tcp-client", to=bed.here(family), port=port, send=10) as client,
    ):
        assert client.result()["received"] == 10
        seen = closed(log, client.port)
        [record] = bed.records(sport=[client.port], dport=[port])
    assert marks(seen) == {"input": {B}, "postrouting": {B}}
    assert owners(record) == (0, B)
    assert record["nat"]["dport"] == near.port


def destination_nat_of_the_nodes_own(bed: Bed, family: int) -> None:
    """a asks an address that is not here, and b's server answers."""
    nowhere, port = {4: "192.0.2.77", 6: "2001:db8::77"}[family], NAT + 20 + family
    with (
        bed.watching() as log,
        apps.start(bed.ns, "tcp-server", bed.thread.b, bind=bed.here(family), reply=10) as near,
        _nat(
            *(bed, family, "output"),
            f"tcp dport {port} dnat to {_at(bed.here(family), near.port)}",
        ),
        _reachable(bed, family, nowhere),
        apps.start(*(bed.ns, "tcp-client", bed.thread.a), to=nowhere, port=port, send=10) as client,
    ):
        assert client.result()["received"] == 10
        seen = closed(log, client.port)
        [record] = bed.records(sport=[client.port], dport=[port])
    there = [s for s in seen if s.sport == client.port]
    back = [s for s in seen if s.dport == client.port]
    assert marks(there) == {"postrouting": {A}, "input": {B}}
    assert marks(back) == {"postrouting": {B}, "input": {A}}
    assert owners(record) == (A, B)


@contextmanager
def _reachable(bed: Bed, family: int, to: str) -> Iterator[None]:
    """There is a route, without which nothing is sent at all."""
    bed.ns.run("ip", f"-{family}", "route", "add", to, "via", bed.there(family))
    try:
        yield
    finally:
        bed.ns.run("ip", f"-{family}", "route", "del", to)


def _asks(bed: Bed, log: Any, proto: str, to: str, port: int) -> list[Seen]:
    """a asks, is answered, and (TCP) closes."""
    if proto == "udp":
        options = {"to": to, "port": port, "count": 3, "expect": 3}
        with apps.start(bed.ns, "udp-send", bed.thread.a, **options) as client:
            assert client.result()["replies"] == 3
            return of_port(log, port)
    with apps.start(bed.ns, "tcp-client", bed.thread.a, to=to, port=port, send=10) as client:
        assert client.result()["received"] == 10
        return closed(log, port)


def masqueraded_for_others(bed: Bed, family: int) -> None:
    """What the node masquerades for a host is nobody's, though b has every port it could take.

    The host behind the peer is reached by the node: the peer sends its packets there.
    """
    port = NAT + 30 + family
    with (
        bed.watching() as log,
        apps.start(bed.ns, "udp-recv", bed.thread.b, bind=ANY[family], port=port),
        apps.start(bed.beyond, "udp-recv", bind=bed.far(family), reply=1) as far,
        _nat(bed, family, "postrouting", f"udp dport {far.port} masquerade to :{port}"),
        _by_the_node(bed, family),
        apps.start(
            *(bed.peer, "udp-send"),
            to=bed.far(family),
            port=far.port,
            bind=bed.there(family),
            count=2,
            expect=2,
            again=1,  # a busy guest has lost both, twice in some twenty runs
        ) as client,
    ):
        done = client.result()
        seen = of_port(log, far.port)
        assert done["replies"] == 2, (done, seen)
        [record] = bed.records(dport=[far.port])
    assert set(at(seen, "postrouting")) == {0}
    assert "input" not in marks(seen)
    assert owners(record) == (0, 0)
    assert record["nat"]["src"] == bed.here(family)


@contextmanager
def _by_the_node(bed: Bed, family: int) -> Iterator[None]:
    """The peer's own packets to the host beyond take the way by the node, and only those."""
    forwarding = {4: "net__ipv4__ip_forward", 6: "net__ipv6__conf__all__forwarding"}[family]
    was = bed.ns.run("sysctl", "-n", forwarding.replace("__", ".")).stdout.strip()
    bed.ns.sysctl(**{forwarding: 1, "net__ipv4__conf__all__send_redirects": 0})
    rule = (f"-{family}", "rule")
    bed.peer.run("ip", *rule, "add", "iif", "lo", "to", bed.far(family), "table", "77")
    words = ("default", "via", bed.here(family), "table", "77")
    bed.peer.run("ip", f"-{family}", "route", "add", *words)
    try:
        yield
    finally:
        bed.peer.run("ip", *rule, "del", "iif", "lo", "to", bed.far(family), "table", "77")
        bed.peer.run("ip", f"-{family}", "route", "del", *words)
        bed.ns.sysctl(**{forwarding: was})


# -- GRE and SCTP --------------------------------------------------------------------------

_GRE = """
here, there, begins = sys.argv[1], sys.argv[2], sys.argv[3] == "1"
s = socket.socket(family(here), socket.SOCK_RAW, 47)
s.bind((here, 0))
packet = struct.pack(">HH", 0, 0x6558) + b"frame"
say("ready")
def receive():
    ready, _, _ = select.select([s], [], [], 20)
    assert ready
    s.recv(100)
if begins:
    wait()
    s.sendto(packet, (there, 0))
receive()
if not begins:
    s.sendto(packet, (there, 0))
    receive()
else:
    s.sendto(packet, (there, 0))
say("done")
wait()
"""


def gre(bed: Bed, family: int) -> None:
    """The peer speaks GRE to a slice with a raw socket: the slice's from its first answer on."""
    here, there = bed.here(family), bed.there(family)
    with (
        bed.watching() as log,
        script(bed.ns, _GRE, here, there, 0, slice=bed.thread.a) as near,
        script(bed.peer, _GRE, there, here, 1) as far,
    ):
        far.go()
        near.event("done")
        seen = [s for s in log.seen() if s.proto == 47]
        found = bed.owners(proto=[47], dst=[here])
    assert [(s.prefix, s.xid) for s in seen] == [("input", 0), ("postrouting", A), ("input", A)]
    assert found == [(0, A)]


_SCTP_SERVER = """
s = socket.socket(family(sys.argv[1]), socket.SOCK_STREAM, 132)
s.bind((sys.argv[1], 0))
s.listen()
say("ready", port=s.getsockname()[1])
conn, _ = s.accept()
conn.recv(100)
conn.send(b"answer")
conn.recv(100)
conn.close()
say("done")
wait()
"""
_SCTP_CLIENT = """
s = socket.socket(family(sys.argv[1]), socket.SOCK_STREAM, 132)
s.connect((sys.argv[1], int(sys.argv[2])))
say("ready", port=s.getsockname()[1])
s.send(b"question")
s.recv(100)
s.close()
wait()
"""


def sctp(bed: Bed, family: int) -> None:
    """The peer asks b's SCTP server. SCTP's sockets cannot be looked up, so INIT is nobody's."""
    import pytest

    try:
        bed.ns.run("python3", "-ISc", "import socket; socket.socket(2, 1, 132)")
    except AssertionError:
        pytest.skip("this kernel has no SCTP")
    here = bed.here(family)
    with (
        bed.watching() as log,
        script(bed.ns, _SCTP_SERVER, here, slice=bed.thread.b) as near,
        script(bed.peer, _SCTP_CLIENT, here, near.port),
    ):
        near.event("done")
        seen = [s for s in log.seen() if s.proto == 132 and near.port in (s.sport, s.dport)]
        found = bed.owners(proto=[132], dport=[near.port])
    first, *rest = [(_chunk(s), s.prefix, s.xid) for s in seen]
    assert first == (1, "input", 0)
    assert {kind[2] for kind in rest} == {B}, rest
    assert set(found) == {(0, B)}


def _chunk(packet: Seen) -> int:
    """The type of its first chunk (RFC 9260, 3.2)."""
    head = (packet.payload[0] & 15) * 4 if packet.family == 4 else 40
    return packet.payload[head + 12]


# -- a tap under load ----------------------------------------------------------------------

# A server, and beside it what listens in.
_TAP = """
bind, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
server = socket.socket(family(bind), socket.SOCK_DGRAM)
tap = socket.socket(family(bind), socket.SOCK_RAW, 17)
for s in (server, tap):
    s.setsockopt(socket.SOL_SOCKET, 33, 32 << 20)  # SO_RCVBUFFORCE
server.bind((bind, port))
head = 20 if family(bind) == socket.AF_INET else 0
say("ready")
got = 0
while got < count:
    server.recv(100)
    got += 1
wait()
mine = others = 0
while select.select([tap], [], [], 0)[0]:
    data = tap.recv(200)[head:]
    if struct.unpack_from(">H", data, 2)[0] == port:
        mine += 1
    else:
        others += 1
say("done", mine=mine, others=others)
"""
_FLOOD = """
to, ports, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
socks = [socket.socket(family(to), socket.SOCK_DGRAM) for _ in ports]
after = socket.socket(family(to), socket.SOCK_DGRAM)
after.connect((to, 9))
after.settimeout(1)  # a host sends so many errors a second, and no more
say("ready")
for n in range(count):
    for s, port in zip(socks, ports):
        s.sendto(b"x" * 20, (to, port))
    if n % 100 == 99:  # a CPU's backlog holds a thousand (netdev_max_backlog): is it empty?
        try:
            after.send(b"x")
            after.recv(1)
        except OSError:
            pass
say("done")
"""
LOAD = 1500


def tap_under_load(bed: Bed, family: int) -> None:
    """o and p are flooded at once; each one's raw socket hears all of its own, nothing else."""
    here = bed.here(family)
    with (
        script(bed.ns, _TAP, here, PORT_O, LOAD, slice=bed.o) as o,
        script(bed.ns, _TAP, here, PORT_P, LOAD, slice=bed.p) as p,
        script(bed.peer, _FLOOD, here, [PORT_O, PORT_P], LOAD) as flood,
    ):
        flood.event("done")
        for tap in (o, p):
            tap.go()
        heard = [tap.event("done") for tap in (o, p)]
        found = {port: set(bed.owners(dport=[port])) for port in (PORT_O, PORT_P)}
    assert [(h["mine"], h["others"]) for h in heard] == [(LOAD, 0)] * 2
    assert found == {PORT_O: {(0, O)}, PORT_P: {(0, P)}}


# -- other namespaces ----------------------------------------------------------------------


def other_namespace(bed: Bed, family: int) -> None:
    """A process of a's in a namespace without an interface of ours: nothing here is a's.

    Its mark stays in there, where nobody reads it. With an interface it is
    known: tests/container_cases.py.
    """
    with (
        bed.watching() as log,
        apps.start(bed.ns, "udp-recv", bed.thread.b, bind=bed.here(family), reply=1) as near,
        apps.start(
            *(bed.beyond, "udp-send", bed.thread.a),
            to=bed.here(family),
            port=near.port,
            count=2,
            expect=2,
        ) as far,
    ):
        assert far.result()["replies"] == 2
        seen, found = of_port(log, near.port), bed.owners(dport=[near.port])
    assert marks(seen) == {"input": {B}, "postrouting": {B}}
    assert found == [(0, B)]
