"""What was captured against what must be."""

import time
from typing import TYPE_CHECKING

from mix import packets
from mix.packets import DIRECT, ERROR, ICMP, ICMPV6, TCP, UDP
from mix.sock import HALF, Sock
from mix.wire import IN, PLACES

if TYPE_CHECKING:
    from mix.world import World


def settle(w: "World", seconds: float = 10) -> None:
    """Compare what has come; wait for what must come yet."""
    deadline = 0.0
    while True:
        for place, mark, packet in w.tap.drain():
            _compare(w, place, mark & 0xFFFF, packet)
        if not any(p.must for p in w.pending.values()):
            for conn in w.dying:
                w.truth.forget(conn)
            w.dying.clear()
            return
        now = time.monotonic()
        deadline = deadline or now + seconds
        if now > deadline:
            for (tag, place, kind), p in w.pending.items():
                if p.must:
                    w.fail(
                        f"{p.act}: packet {tag} was not seen {PLACES[place]} "
                        f"(kind {kind}); it must be xid {p.xid}'s {p.why}"
                    )
            w.pending.clear()
            return
        time.sleep(0.0005)


def _compare(w: "World", place: int, xid: int, packet: bytes) -> None:
    """One captured packet."""
    seen = packets.parse(packet)
    proto = seen.flow.proto
    if proto == ICMPV6 and seen.kind == DIRECT and seen.flow.dport:
        return  # neighbour discovery, MLD: the kernel's own
    if proto == 2:
        return  # IGMP
    if seen.tag is not None:
        key = (seen.tag, place, seen.kind)
        p = w.pending.get(key)
        if p is None:
            w.fail(
                f"{w.act}: {seen.flow} tag {seen.tag} kind {seen.kind} "
                f"was seen {PLACES[place]} with xid {xid}: nothing of the sort was "
                f"to be sent"
            )
            return
        if p.many:
            p.must = False
        else:
            del w.pending[key]
        _judge(w, place, seen, xid, p.xid, p.act, p.why)
    elif proto == TCP:
        _tcp(w, place, seen, xid)
    elif seen.kind == ERROR and seen.quoted and seen.quoted.proto == TCP:
        _judge(w, place, seen, xid, w.of_conn(place, seen.quoted.back), w.act, "")
    else:
        w.fail(f"{w.act}: {seen.flow} was seen {PLACES[place]} with xid {xid}: unexpected")


def _tcp(w: "World", place: int, seen: packets.Seen, xid: int) -> None:
    """A segment of real TCP, or what the kernel answers to a raw one."""
    flow = seen.flow
    end = (
        (flow.dst, flow.dport, flow.src, flow.sport)
        if place == IN
        else (flow.src, flow.sport, flow.dst, flow.dport)
    )
    who = w.ends.get(end)
    found = w.truth.conns.get(flow)
    stale = 0
    if not isinstance(who, Sock) or not found:
        expected = w.of_conn(place, flow) if who is None else w.owner(who)
    else:
        # A connection's half answers on the way in, and is written on the way
        # out. Two captures have no common order: in the act that changes it,
        # either may have come first.
        expected = w.owner(who)
        conn, way = found
        half = 1 - way if place == IN else way
        if place == IN and conn.halves[half]:
            expected = conn.halves[half]
            act, old = conn.before[half]
            stale = old if act == w.act else 0
        else:
            w.truth.write(conn, half, expected, True)
    if stale and xid == stale:
        expected = stale
    w.latest[flow] = (seen.seq, seen.ack)
    # "If only reply is a RST": tcp_packet() removes the entry at once
    refused = (
        found
        and found[1]
        and seen.flags & packets.RST
        and not any(share.packets[1] for share in found[0].shares)
    )
    if found and seen.flags & packets.RST:
        found[0].reset_by = found[1]
    if place != IN or flow.src not in w.truth.local:
        w.truth.count(flow, seen.length)
    if found and place == IN and xid != expected and xid in found[0].reversed:
        # Connection tracking takes most of it for invalid, or the rest for the
        # earlier connection's; a TIME_WAIT has no owner that would know better.
        why = "the earlier owner instead" if xid else "nobody"
        w.unsaid[f"TCP that connection tracking takes for invalid: {why}"] += 1
        expected = xid
    _judge(w, place, seen, xid, expected, w.act, f"by {end[1]}")
    if found and refused:
        w.dying.append(found[0])


def _judge(
    w: "World", place: int, seen: packets.Seen, xid: int, expected: int, act: str, why: str
) -> None:
    """Is it the right owner?"""
    w.kinds[f"{packet_kind(seen)} {PLACES[place]}"] += 1
    if expected:
        w.owned += 1
    elif why == HALF and (found := w.truth.conns.get(seen.flow)):
        conn, way = found
        if conn.due[1 - way if place == IN else way]:
            w.unsaid["a raw sender's answers in a connection from outside"] += 1
    if xid == expected:
        return
    if (
        not xid
        and w.truth.datapath == "bpf"
        and seen.flags == packets.SYN
        and (
            place == IN
            and (seen.flow.dst, seen.flow.dport, seen.flow.src, seen.flow.sport) in w.waits
        )
    ):
        w.unsaid["a SYN over a TIME_WAIT"] += 1
        return
    w.fail(
        f"{act}: {seen.flow} flags {seen.flags:#x} {PLACES[place]} is xid {xid}'s, "
        f"must be {expected}'s {why}"
    )


def packet_kind(seen: packets.Seen) -> str:
    """A word for the summary."""
    proto = seen.flow.proto
    family = 4 if len(seen.flow.src) == 4 else 6
    if proto in (ICMP, ICMPV6):
        return f"ICMPv{family} " + ("echo", "echo reply", "error")[seen.kind]
    if seen.later:
        return f"fragment v{family}"
    return {TCP: "TCP", UDP: "UDP", 132: "SCTP", 47: "GRE"}.get(proto, "other") + f" v{family}"
