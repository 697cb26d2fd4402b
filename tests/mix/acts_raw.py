"""What is done: ICMP, raw sockets, and what else the guard must stop."""

from mix import packets
from mix.acts import ANYONE, DGRAM, FULL, STREAM, Act, bound, family, other, some
from mix.packets import ERROR, GRE, ICMP, ICMPV6, OTHER, REPLY, SCTP, UDP, Flow, packed
from mix.sock import POOL, RAW, RESERVED, SINKS, SLICES
from mix.wire import IN, WIRE
from mix.world import World

MORE = range(5100, 5400)
"""Ports of raw senders, which now and then use the others', too."""


# -- ICMP --


def ping(w: World) -> None:
    """Ping sockets and raw sockets, whose ids may be another's."""
    who, f = w.rng.choice(ANYONE), family(w)
    proto = ICMP if f == 4 else ICMPV6
    here, there = packed(w.here(f)), packed(w.there(f))
    raw = RAW.get(who, "full") != "deny" and w.rng.random() < 0.5
    if raw:
        sock, number = w.raw_of(who, f, proto), w.rng.choice((77, 78, 79))
    else:
        made, _ = w.open(who, f, DGRAM, proto, bind=(w.here(f), w.rng.choice((0, 77, 78))))
        if not made:
            return
        sock, number = made, made.port
    flow = Flow(proto, here, number, there, 0)
    xid = w.owner(sock)
    for seq in range(some(w)):
        tag = w.tag()
        if raw:
            w.truth.raw_sent(xid, flow, False)
        else:
            w.truth.sent(xid, flow)
        w.truth.count(flow, 28 + 12 if f == 4 else 48 + 12)
        w.expect(tag, WIRE, xid)
        w.expect(tag, IN, w.of_conn(IN, flow.back), REPLY)
        w.truth.count(flow.back, 28 + 12 if f == 4 else 48 + 12)
        w.call(sock, packets.echo(flow, seq, tag), (w.there(f), 0))
    w.settle()
    if not raw:
        sock.close()


def peer_pings(w: World) -> None:
    """The kernel's echo reply is nobody's."""
    f = family(w)
    proto = ICMP if f == 4 else ICMPV6
    flow = Flow(proto, packed(w.there(f)), w.rng.randrange(1000, 1050), packed(w.here(f)), 0)
    for seq in range(some(w, 8)):
        tag = w.tag()
        w.expect(tag, IN, w.truth.unreceived(flow))
        w.expect(tag, WIRE, w.truth.answered(flow.back), REPLY)
        for way in (flow, flow.back):
            w.truth.count(way, 40 if f == 4 else 60)
        body = packets.echo(flow, seq, tag)
        w.peers[f][0].sendto(packets.ip(proto, flow.src, flow.dst, body), (w.here(f), 0))


# -- raw --


def raw_udp(w: World) -> None:
    """A datagram of a raw socket's own, from a port that may be anybody's."""
    who = w.rng.choice((*FULL, "c", "node"))
    f = family(w)
    ports = POOL if w.rng.random() < 1 / 32 else (*MORE, *RESERVED["a"], *RESERVED["c"])
    port = w.rng.choice(ports)
    flow = Flow(UDP, packed(w.here(f)), port, packed(w.there(f)), w.rng.choice(SINKS))
    for _ in range(some(w, 8)):
        tag = w.tag()
        w.raw_send(who, flow, packets.udp(flow, tag), tag)


def hijack_udp(w: World) -> None:
    """A raw socket speaks on a connection of somebody else's, whose socket lives."""
    victim, f = w.rng.choice(ANYONE), family(w)
    thief = other(w, victim, (*FULL, "c", "node"))
    sock, port = bound(w, victim, f), w.rng.choice(SINKS)
    if not sock:
        return
    there = packed(w.there(f))
    if w.rng.random() < 0.7:
        w.udp(sock, there, port, some(w, 4))
    else:
        w.from_peer(f, sock.port, port, 2, to=sock)
    flow = Flow(UDP, packed(w.here(f)), sock.port, there, port)
    for _ in range(w.rng.randrange(1, 5)):
        tag = w.tag()
        w.raw_send(thief, flow, packets.udp(flow, tag), tag, holder=True)
    w.udp(sock, there, port, some(w, 4))
    w.settle()
    sock.close()


def spoof(w: World) -> None:
    """From an address that this host has not."""
    who, f = w.rng.choice((*FULL, "c", "node")), family(w)
    src = packed(f"10.99.0.{w.rng.randrange(1, 200)}" if f == 4 else "2001:db8::66")
    flow = Flow(UDP, src, w.rng.choice((*POOL, 4101)), packed(w.there(f)), w.rng.choice(SINKS))
    tag = w.tag()
    w.raw_send(who, flow, packets.udp(flow, tag), tag)


def raw_other(w: World) -> None:
    """Protocols without ports of ours: GRE, SCTP, and one of nobody's."""
    who, f = w.rng.choice((*FULL, "c", "node")), family(w)
    proto = w.rng.choice((GRE, OTHER, SCTP))
    here, there = packed(w.here(f)), packed(w.there(f))
    # connection tracking takes a second INIT for invalid
    sport, dport = (w.rng.randrange(10_000, 60_000), 9) if proto == SCTP else (0, 0)
    flow = Flow(proto, here, sport, there, dport)
    if proto == SCTP and flow in w.truth.conns:
        return
    for _ in range(1 if proto == SCTP else w.rng.randrange(1, 4)):
        tag = w.tag()
        packet = (
            packets.sctp(flow, tag) if proto == SCTP else packets.plain(proto, here, there, tag)
        )
        if not w.raw_send(who, flow, packet, tag):  # the peer knows no such protocol
            w.expect(tag, IN, w.of_conn(IN, flow.back), ERROR, must=False)


def raw_fragments(w: World) -> None:
    """A raw socket fragments by itself."""
    who = w.rng.choice((*FULL, "c", "node"))
    flow = Flow(UDP, packed(w.here(4)), w.rng.choice(POOL), packed(w.there(4)), w.rng.choice(SINKS))
    tag = w.tag()
    whole = packets.udp(flow, tag, 480)[20:]
    ident = w.rng.randrange(1, 65536)
    parts = [
        packets.ip(UDP, flow.src, flow.dst, whole[:248], ident, 0x2000),
        packets.ip(UDP, flow.src, flow.dst, whole[248:], ident, 248 // 8),
    ]
    sock, xid = w.raw_of(who, 4), w.xid(who)
    refused = w.truth.refused(who, flow, True)
    if not refused and w.truth.joins(who, flow):
        refused = "connection"
        w.truth.count(flow, 20 + len(whole))
    if refused:
        w.refusals[refused] += 1
    else:
        w.truth.raw_sent(xid, flow, False)
        w.truth.count(flow, 20 + len(whole))
        w.expect(tag, WIRE, xid, many=True)
    for part in parts:
        w.call(sock, part, (w.there(4), 0))


# -- marks, ports --


def forged_mark(w: World) -> None:
    """SO_MARK: what is asked for is not what is had."""
    who = w.rng.choice(ANYONE)
    sock = bound(w, who, 4)
    if not sock:
        return
    value = w.rng.choice([w.xid(s) for s in SLICES] + [1, 0x30000, 0x50007])
    caps = w.rng.choice(("root", "netraw", "user"))
    code, got, _ = w.actor(w.rng.choice(ANYONE), caps).ask("mark", value, give=sock.sock)
    if not code and got & 0xFFFF != w.owner(sock):
        w.fail(f"{w.act}: SO_MARK {value:#x} of {who} gave {got:#x}")
    w.udp(sock, packed(w.there(4)), w.rng.choice(SINKS), some(w, 4))
    w.settle()
    sock.close()


def forged_cmsg(w: World) -> None:
    """A mark for one packet, which asks no hook of the cgroup's."""
    who = w.rng.choice(ANYONE)
    caps = w.rng.choice(("root", "netraw", "user"))
    sock = bound(w, who, 4)
    if not sock:
        return
    xid = w.owner(sock)
    value = w.rng.choice([w.xid(s) for s in SLICES] + [xid, xid | 0x40000, 0, 99])
    control = [(1, 36, value.to_bytes(4, "little"))]
    sink = w.rng.choice(SINKS)
    if caps == "user":  # the kernel's own check
        tag = w.tag()
        code = w.call(sock, packets.data(tag), (w.there(4), sink), f"{who}/user", control)
        if code != 1:
            w.fail(f"{w.act}: SO_MARK by cmsg without capabilities: errno {code}")
    else:
        w.udp(sock, packed(w.there(4)), sink, 1, by=f"{who}/{caps}", control=control, mark=value)
    w.settle()
    sock.close()


def reserved(w: World) -> None:
    """bind() to a port that is somebody's."""
    owner = w.rng.choice(tuple(RESERVED))
    who, f = w.rng.choice(ANYONE), family(w)
    kind = w.rng.choice((DGRAM, STREAM))
    port = w.rng.choice(RESERVED[owner])
    sock, code = w.open(who, f, kind, bind=(w.here(f), port), options=((1, 2, 1),))
    if (code == 13) != (who != owner):
        w.fail(f"{w.act}: bind of {who} to {port} of {owner}: errno {code}")
    if sock:
        sock.close()
    elif code == 13:
        w.refusals["bind"] += 1


# -- errors --


def forged_error(w: World) -> None:
    """An ICMP error about somebody's connection: by a raw socket here, or from the peer."""
    victim, f = w.rng.choice(ANYONE), family(w)
    sock, port = bound(w, victim, f), w.rng.choice(SINKS)
    if not sock:
        return
    here, there = packed(w.here(f)), packed(w.there(f))
    w.udp(sock, there, port, 2)
    flow = Flow(UDP, here, sock.port, there, port)
    if w.rng.random() < 0.5:
        tag = w.tag()
        w.expect(tag, IN, w.of_conn(IN, flow.back), ERROR)
        error = packets.unreachable(there, here, packets.udp(flow, tag))
        w.peers[f][0].sendto(error, (w.here(f), 0))
    else:
        thief, tag = other(w, victim, (*FULL, "c", "node")), w.tag()
        error = packets.unreachable(here, there, packets.udp(flow.back, tag))
        w.raw_send(thief, flow, error, tag, error=True, holder=True)
    w.settle()
    sock.close()


ACTS = [
    Act(ping, 10),
    Act(peer_pings, 5),
    Act(raw_udp, 10),
    Act(hijack_udp, 8),
    Act(spoof, 3),
    Act(raw_other, 4),
    Act(raw_fragments, 3),
    Act(forged_mark, 4),
    Act(forged_cmsg, 5),
    Act(reserved, 3),
    Act(forged_error, 5),
]
