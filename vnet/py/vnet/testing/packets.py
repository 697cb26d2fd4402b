"""Packets, byte by byte, with right checksums where somebody reads them, and a token inside."""

import socket
import struct
from dataclasses import dataclass, replace

TCP, UDP, SCTP, ICMP, ICMP6 = 6, 17, 132, 1, 58
NAMES = {TCP: "tcp", UDP: "udp"}


@dataclass(frozen=True)
class World:
    """The addresses of one attempt, and what its packet is known by."""

    family: int
    here: str
    there: str
    mine: str
    """An address of this node that is granted to one slice."""
    nowhere: str
    """No address of this node."""
    interface: str
    token: bytes
    dport: int
    """A port of the peer that no other attempt sends to."""
    sink: int = 4999
    """A port of the peer at which nobody answers anybody."""

    @property
    def af(self) -> str:
        return "AF_INET" if self.family == 4 else "AF_INET6"

    @property
    def wild(self) -> str:
        return "0.0.0.0" if self.family == 4 else "::"

    @property
    def icmp(self) -> int:
        return ICMP if self.family == 4 else ICMP6


def total(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    found: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while found >> 16:
        found = (found & 0xFFFF) + (found >> 16)
    return found ^ 0xFFFF


def pton(address: str) -> bytes:
    """The bytes of an address."""
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def udp(w: World, sport: int, dport: int = 0) -> bytes:
    """A UDP header and the token. No checksum: nobody reads it."""
    return struct.pack(">HHHH", sport, dport or w.dport, 8 + len(w.token), 0) + w.token


def tcp(w: World, sport: int, dport: int = 0, flags: int = 2) -> bytes:
    """A TCP header (SYN) and the token."""
    return (
        struct.pack(">HHIIBBHHH", sport, dport or w.dport, 1, 0, 0x50, flags, 64000, 0, 0) + w.token
    )


def sctp(w: World, sport: int, dport: int = 0) -> bytes:
    """An SCTP header with a DATA-like chunk that carries the token."""
    return (
        struct.pack(">HHII", sport, dport or w.dport, 1, 0)
        + struct.pack(">BBH", 1, 0, 20)
        + w.token * 2
    )


def echo(w: World, number: int = 77, reply: bool = False) -> bytes:
    """An ICMP echo, with the checksum that IPv4's raw sockets do not make."""
    kind = ((8, 0) if w.family == 4 else (128, 129))[reply]
    body = struct.pack(">BBHHH", kind, 0, 0, number, 1) + w.token
    return body[:2] + struct.pack(">H", total(body)) + body[4:] if w.family == 4 else body


def ip(w: World, proto: int, body: bytes, source: str = "", options: bytes = b"") -> bytes:
    """An IP packet from the node to the peer. IPv4's checksum is the kernel's work."""
    src, dst = pton(source or w.here), pton(w.there)
    if w.family == 6:
        return struct.pack(">IHBB", 6 << 28, len(body), proto, 64) + src + dst + body
    words = 5 + len(options) // 4
    size = words * 4 + len(body)
    head = struct.pack(">BBHHHBBH", 0x40 | words, 0, size, 0, 0, 64, proto, 0)
    return head + src + dst + options + body


def fragment(w: World, proto: int, body: bytes, at: int, more: bool) -> bytes:
    """An IPv4 fragment: at is in units of 8 bytes."""
    packet = ip(w, proto, body)
    return packet[:4] + struct.pack(">HH", 4242, at | (0x2000 if more else 0)) + packet[8:]


def summed(w: World, proto: int, body: bytes) -> bytes:
    """With the checksum of TCP or UDP: a receiver's conntrack wants it."""
    at = 6 if proto == UDP else 16
    pseudo = pton(w.here) + pton(w.there) + struct.pack(">II", len(body), proto)
    return body[:at] + struct.pack(">H", total(pseudo + body)) + body[at + 2 :]


def icmp_error(w: World, kind: tuple[int, int], rest: bytes) -> bytes:
    """An ICMP error with its checksum: NAT drops one about a connection if it is wrong."""
    body = struct.pack(">BBHI", *kind, 0, 0) + rest
    # RFC 8200, 8.1: the sum of ICMPv6 covers a pseudo header, too
    pseudo = pton(w.here) + pton(w.there) + struct.pack(">II", len(body), w.icmp)
    found = total(body if w.family == 4 else pseudo + body)
    return body[:2] + struct.pack(">H", found) + body[4:]


def unreachable(w: World, port: int) -> bytes:
    """A port unreachable about what the peer answered to a connection from this port."""
    back = struct.pack(">HHHH", w.sink, port, 8 + len(w.token), 0) + w.token
    swapped = replace(w, here=w.there, there=w.here)
    quoted = ip(swapped, UDP, back)
    if w.family == 4:  # the kernel fills this in only for the outer header
        quoted = quoted[:10] + struct.pack(">H", total(quoted[:20])) + quoted[12:]
    return ip(w, w.icmp, icmp_error(w, (3, 3) if w.family == 4 else (1, 4), quoted))


def redirect(w: World) -> bytes:
    """An ICMP redirect about no connection in particular."""
    return ip(w, w.icmp, icmp_error(w, (5, 1) if w.family == 4 else (137, 0), w.token))
