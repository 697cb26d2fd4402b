"""Conntrack's netlink messages, built by hand as the kernel lays them out.

net/netfilter/nf_conntrack_netlink.c: ctnetlink_fill_info() for the rows of a
dump, ctnetlink_conntrack_event() for events. Numbers are those of
linux/netlink.h and linux/netfilter/nfnetlink_conntrack.h.
"""

import struct
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address

NEW, GET, DELETE = 0x100, 0x101, 0x102
MULTI, DUMP_INTR, FRESH = 0x2, 0x10, 0x600  # FRESH: NLM_F_CREATE | NLM_F_EXCL
ERROR, DONE = 2, 3
TCP, UDP, ICMP, ICMPV6, GRE, SCTP = 6, 17, 1, 58, 47, 132
NESTED = 0x8000


def attr(kind: int, data: bytes) -> bytes:
    """One attribute, padded to 4 bytes."""
    return struct.pack("=HH", len(data) + 4, kind) + data + bytes(-len(data) % 4)


def nest(kind: int, *inner: bytes) -> bytes:
    return attr(kind | NESTED, b"".join(inner))


def message(kind: int, body: bytes, *, flags: int = 0, seq: int = 0, pid: int = 0) -> bytes:
    """A netlink message of any type."""
    return struct.pack("=IHHII", len(body) + 16, kind, flags, seq, pid) + body


def error(code: int, seq: int) -> bytes:
    """NLMSG_ERROR: code is an errno, 0 for an ack."""
    request = struct.pack("=IHHII", 20, GET, 1, seq, 0)
    return message(ERROR, struct.pack("=i", -code) + request, seq=seq, pid=77)


def done(seq: int, code: int = 0) -> bytes:
    return message(DONE, struct.pack("=i", -code), flags=MULTI, seq=seq, pid=77)


Address = IPv4Address | IPv6Address


@dataclass(frozen=True)
class Tuple:
    """One direction. For ICMP sport is the id and dport type << 8 | code."""

    src: Address
    dst: Address
    proto: int
    sport: int = 0
    dport: int = 0
    zone: int | None = None

    def turned(self) -> "Tuple":
        """The reply without NAT."""
        if self.proto in (ICMP, ICMPV6):
            answer = {8: 0, 128: 129}.get(self.dport >> 8, self.dport >> 8)
            return Tuple(self.dst, self.src, self.proto, self.sport, answer << 8)
        return Tuple(self.dst, self.src, self.proto, self.dport, self.sport)


def tuple_(src: str, dst: str, proto: int, sport: int = 0, dport: int = 0) -> Tuple:
    return Tuple(ip_address(src), ip_address(dst), proto, sport, dport)


def pack_tuple(kind: int, t: Tuple) -> bytes:
    first = 1 if t.src.version == 4 else 3
    addresses = nest(1, attr(first, t.src.packed), attr(first + 1, t.dst.packed))
    proto = [attr(1, bytes([t.proto]))]
    if t.proto in (ICMP, ICMPV6):
        at = 4 if t.proto == ICMP else 7
        proto += [attr(at, t.sport.to_bytes(2, "big")), attr(at + 1, bytes([t.dport >> 8]))]
        proto += [attr(at + 2, bytes([t.dport & 255]))]
    elif t.proto in (TCP, UDP, GRE, SCTP):
        proto += [attr(2, t.sport.to_bytes(2, "big")), attr(3, t.dport.to_bytes(2, "big"))]
    zone = [] if t.zone is None else [attr(3, t.zone.to_bytes(2, "big"))]
    return nest(kind, addresses, nest(2, *proto), *zone)


@dataclass(frozen=True)
class Conn:
    """What a message may say about a connection; None is left out."""

    orig: Tuple
    reply: Tuple | None = None
    id: int = 1
    mark: int | None = None
    zone: int | None = None
    counters: tuple[int, int, int, int] | None = None  # packets, bytes; packets, bytes
    start: int | None = None
    stop: int | None = None
    state: int | None = None
    status: int = 0x188
    extra: tuple[bytes, ...] = field(default=())

    def attrs(self) -> bytes:
        out = [pack_tuple(1, self.orig), pack_tuple(2, self.reply or self.orig.turned())]
        if self.zone is not None:
            out.append(attr(18, self.zone.to_bytes(2, "big")))
        out += [attr(12, self.id.to_bytes(4, "big")), attr(3, self.status.to_bytes(4, "big"))]
        out.append(attr(7, struct.pack(">I", 30)))
        if self.counters is not None:
            for kind, at in ((9, 0), (10, 2)):
                packets, octets = self.counters[at : at + 2]
                out.append(
                    nest(
                        kind,
                        attr(1, packets.to_bytes(8, "big")),
                        attr(2, octets.to_bytes(8, "big")),
                    )
                )
        times = [attr(n, t.to_bytes(8, "big")) for n, t in ((1, self.start), (2, self.stop)) if t]
        if times:
            out.append(nest(20, *times))
        if self.state is not None:
            info = {TCP: 1, SCTP: 3}[self.orig.proto]
            out.append(nest(4, nest(info, attr(1, bytes([self.state])))))
        if self.mark is not None:
            out.append(attr(8, self.mark.to_bytes(4, "big")))
        return b"".join([*out, *self.extra])

    def body(self) -> bytes:
        family = 2 if self.orig.src.version == 4 else 10
        return struct.pack("=BBH", family, 0, 0) + self.attrs()

    def new(self) -> bytes:
        return message(NEW, self.body(), flags=FRESH)

    def update(self, pid: int = 0) -> bytes:
        return message(NEW, self.body(), pid=pid)

    def destroy(self, pid: int = 0) -> bytes:
        return message(DELETE, self.body(), pid=pid)

    def row(self, seq: int = 9, flags: int = MULTI) -> bytes:
        """A row of a dump; with flags 0 the answer to a GET."""
        return message(NEW, self.body(), flags=flags, seq=seq, pid=77)
