"""What is done: UDP, out, in, between slices and to groups."""

import socket
import struct

from mix import packets
from mix.acts import ANYONE, Act, bound, family, other, some
from mix.packets import UDP, Flow, packed
from mix.sock import CLOSED, POOL, RESERVED, SINKS
from mix.wire import IN, WIRE
from mix.world import World

REUSEPORT = (1, 15, 1)
UDP_SEGMENT = 103


def udp_out(w: World) -> None:
    """Somebody asks the peer, from a port that others have used, and may be answered."""
    who, f = w.rng.choice(ANYONE), family(w)
    port = w.rng.choice(SINKS)
    connected = w.rng.random() < 0.5
    sock = bound(w, who, f, w.rng.choice((0, *RESERVED.get(who, ()), *POOL)))
    if not sock:
        return
    if connected:
        sock.sock.connect((w.there(f), port))
    by = w.rng.choice((who, other(w, who))) if w.rng.random() < 0.05 else ""
    n = some(w)
    w.udp(
        sock,
        packed(w.there(f)),
        port,
        n,
        connected=connected,
        by=by,
        size=w.rng.choice((12, 120, 1200)),
    )
    if w.rng.random() < 0.5:
        w.from_peer(f, sock.port, port, n, to=sock)
        w.reads(sock, n)
    sock.close()


def udp_shared(w: World) -> None:
    """Two have one port at the same time and take turns on one 5-tuple."""
    one = w.rng.choice(ANYONE)
    two, f, port = other(w, one), family(w), w.rng.choice(POOL)
    socks = [bound(w, who, f, port, options=(REUSEPORT,)) for who in (one, two)]
    if all(socks):
        dport = w.rng.choice(SINKS)
        for _ in range(w.rng.randrange(2, 7)):
            w.udp(w.rng.choice(socks), packed(w.there(f)), dport, some(w, 6))
    for sock in socks:
        if sock:
            sock.close()


def udp_in(w: World) -> None:
    """The peer sends to somebody's port; then to nobody's, as he has left."""
    who, f = w.rng.choice(ANYONE), family(w)
    sock = bound(w, who, f, wild=w.rng.random() < 0.3)
    if not sock:
        return
    sport, n = w.rng.choice(SINKS), some(w)
    if w.rng.random() < 0.3:
        sock.sock.connect((w.there(f), sport))
        sock.address = packed(w.here(f))
    w.from_peer(f, sock.port, sport, n, to=sock)
    w.reads(sock, n)
    if w.rng.random() < 0.4:
        sock.address = packed(w.here(f))
        w.udp(sock, packed(w.there(f)), sport, some(w))
    w.settle()
    sock.close()
    if w.rng.random() < 0.5:
        w.from_peer(f, sock.port, sport, w.rng.randrange(1, 4))


def udp_between(w: World) -> None:
    """Two slices of this host talk, over loopback or the node's own address."""
    one, f = w.rng.choice(ANYONE), family(w)
    two = w.rng.choice(ANYONE)
    at = w.rng.choice((w.here(f), "::1" if f == 6 else "127.0.0.1"))
    a, b = (bound(w, who, f, address=at) for who in (one, two))
    if a and b:
        n = some(w)
        w.udp(a, packed(at), b.port, n, to=b)
        w.reads(b, n)
        if w.rng.random() < 0.7:
            n = some(w)
            w.udp(b, packed(at), a.port, n, to=a)
            w.reads(a, n)
    for sock in (a, b):
        if sock:
            sock.close()


def udp_to_nobody(w: World) -> None:
    """A port that nobody has, at the peer or here: ICMP errors come back."""
    who, f = w.rng.choice(ANYONE), family(w)
    sock = bound(w, who, f)
    if not sock:
        return
    sock.sock.setsockopt(0 if f == 4 else 41, 11 if f == 4 else 25, 0)
    to = w.rng.choice((w.there(f), w.here(f)))
    for _ in range(w.rng.randrange(1, 4)):
        w.udp(sock, packed(to), w.rng.choice(CLOSED), closed=True)
    w.settle()
    sock.close()


def fragments(w: World) -> None:
    """More than a frame holds, out and in."""
    who, f = w.rng.choice(ANYONE), family(w)
    sock, port = bound(w, who, f), w.rng.choice(SINKS)
    if not sock:
        return
    for _ in range(w.rng.randrange(1, 4)):
        w.udp(sock, packed(w.there(f)), port, size=w.rng.choice((2400, 4800)), many=True)
    if w.rng.random() < 0.5:
        w.from_peer(f, sock.port, port, 1, size=3600, to=sock)
        w.reads(sock, 1)
    w.settle()
    sock.close()


def segments(w: World) -> None:
    """One call, many datagrams (UDP_SEGMENT): one packet, as far as the link can."""
    who, f = w.rng.choice(ANYONE), family(w)
    sock, port = bound(w, who, f), w.rng.choice(SINKS)
    if not sock:
        return
    w.udp(
        sock,
        packed(w.there(f)),
        port,
        size=12 * w.rng.randrange(20, 90),
        many=True,
        control=[(17, UDP_SEGMENT, struct.pack("=H", 240))],
    )
    w.settle()
    sock.close()


def multicast(w: World) -> None:
    """To a group, whose copy loops back to a member."""
    who, member = w.rng.choice(ANYONE), w.rng.choice(ANYONE)
    sock = bound(w, who, 4)
    port = w.rng.choice(CLOSED)
    one = bound(w, member, 4, port, address="239.1.2.3")
    if sock and one:
        here = socket.inet_aton(w.here(4))
        sock.sock.setsockopt(0, 32, here)  # IP_MULTICAST_IF
        one.sock.setsockopt(0, 35, socket.inet_aton("239.1.2.3") + here)
        group, xid = packed("239.1.2.3"), w.owner(sock)
        flow = Flow(UDP, sock.address, sock.port, group, port)
        for _ in range(some(w)):
            tag = w.tag()
            w.truth.sent(xid, flow)
            w.expect(tag, WIRE, xid)
            w.expect(tag, IN, w.truth.received(w.owner(one), flow))
            w.truth.count(flow, 40)
            w.call(sock, packets.data(tag), ("239.1.2.3", port))
        w.settle()
    for made in (sock, one):
        if made:
            made.close()


ACTS = [
    Act(udp_out, 30),
    Act(udp_shared, 8),
    Act(udp_in, 20),
    Act(udp_between, 20),
    Act(udp_to_nobody, 6),
    Act(fragments, 4),
    Act(segments, 4),
    Act(multicast, 3),
]
