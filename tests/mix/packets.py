"""Packets that are sent by raw sockets, and what a captured one says.

The templates are scapy's (``python -m mix.templates`` writes templates.json); they are
patched here, which costs microseconds, where building each would cost a thousand.

Whatever is sent with data is filled with blocks of twelve bytes: a magic word, a tag that no
other packet has, and the tag's complement. So each fragment, each ICMP error that quotes
it and each echo reply says by itself what sent it; and the checksum is the same for all tags.
"""

import json
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MAGIC = b"mIx!"
BLOCK = 12
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
ICMP, TCP, UDP, GRE, ICMPV6, SCTP, OTHER = 1, 6, 17, 47, 58, 132, 253

DIRECT, REPLY, ERROR = 0, 1, 2
"""A packet as it was sent; the echo reply to it; an ICMP error about it."""

_TEMPLATES = {
    name: bytes.fromhex(text)
    for name, text in json.loads(Path(__file__).with_name("templates.json").read_text()).items()
}


class Flow(NamedTuple):
    """What connection tracking knows a packet by. ICMP: the id of an echo, and 0."""

    proto: int
    src: bytes
    sport: int
    dst: bytes
    dport: int

    @property
    def back(self) -> "Flow":
        """The other direction."""
        if self.proto in (ICMP, ICMPV6):
            return Flow(self.proto, self.dst, self.sport, self.src, self.dport)
        return Flow(self.proto, self.dst, self.dport, self.src, self.sport)

    def __str__(self) -> str:
        return f"{self.proto} {text(self.src)}:{self.sport} > {text(self.dst)}:{self.dport}"


def text(address: bytes) -> str:
    """An address as people write it."""
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


def packed(address: str) -> bytes:
    """An address as packets have it."""
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def data(tag: int, size: int = BLOCK) -> bytes:
    """That many bytes that say the tag: at least a block."""
    block = MAGIC + tag.to_bytes(4, "big") + (tag ^ 0xFFFFFFFF).to_bytes(4, "big")
    return block * max(size // BLOCK, 1)


def _checksum(body: bytes) -> int:
    """RFC 1071: the ones' complement sum is the remainder by 65535."""
    if len(body) % 2:
        body += b"\0"
    return 0xFFFF - int.from_bytes(body, "big") % 0xFFFF


def ip(proto: int, src: bytes, dst: bytes, body: bytes, ident: int = 0, fragment: int = 0) -> bytes:
    """The IP header around it; fragment: flags and offset of IPv4."""
    four = len(src) == 4
    head = bytearray(_TEMPLATES["ip4" if four else "ip6"])
    if four:
        struct.pack_into(">HHH", head, 2, 20 + len(body), ident, fragment)
        head[9] = proto
        head[12:20] = src + dst
        struct.pack_into(">H", head, 10, 0)
        struct.pack_into(">H", head, 10, _checksum(head))
    else:
        struct.pack_into(">HB", head, 4, len(body), proto)
        head[8:40] = src + dst
    return bytes(head) + body


def transport(proto: int, src: bytes, dst: bytes, body: bytearray, at: int) -> bytes:
    """Fill in the checksum at this place."""
    pseudo = b"" if proto == ICMP else src + dst + struct.pack(">II", len(body), proto)
    struct.pack_into(">H", body, at, 0)
    struct.pack_into(">H", body, at, _checksum(pseudo + body) or 0xFFFF)
    return bytes(body)


def udp(flow: Flow, tag: int, size: int = BLOCK) -> bytes:
    """A datagram, from the IP header on."""
    body = bytearray(_TEMPLATES["udp"][:8]) + data(tag, size)
    struct.pack_into(">HHH", body, 0, flow.sport, flow.dport, len(body))
    return ip(UDP, flow.src, flow.dst, transport(UDP, flow.src, flow.dst, body, 6))


def tcp(flow: Flow, flags: int, seq: int, ack: int, tag: int | None) -> bytes:
    """A segment, with a block of data unless tag is None."""
    body = bytearray(_TEMPLATES["tcp"][:20]) + (b"" if tag is None else data(tag))
    struct.pack_into(">HHIIBB", body, 0, flow.sport, flow.dport, seq, ack, 0x50, flags)
    return ip(TCP, flow.src, flow.dst, transport(TCP, flow.src, flow.dst, body, 16))


def echo(flow: Flow, seq: int, tag: int, size: int = BLOCK, reply: bool = False) -> bytes:
    """An echo request, or reply, without IP header: what raw and ping sockets send."""
    name = "echo4" if flow.proto == ICMP else "echo6"
    body = bytearray(_TEMPLATES[name][:8]) + data(tag, size)
    body[0] = ({ICMP: 0, ICMPV6: 129} if reply else {ICMP: 8, ICMPV6: 128})[flow.proto]
    struct.pack_into(">HH", body, 4, flow.sport, seq & 0xFFFF)
    return transport(flow.proto, flow.src, flow.dst, body, 2)


def unreachable(src: bytes, dst: bytes, quoted: bytes) -> bytes:
    """A port unreachable about a packet, from the IP header on."""
    four = len(src) == 4
    proto = ICMP if four else ICMPV6
    body = bytearray(_TEMPLATES["error4" if four else "error6"][:8]) + quoted[:160]
    return ip(proto, src, dst, transport(proto, src, dst, body, 2))


def sctp(flow: Flow, tag: int) -> bytes:
    """An INIT chunk with a block of data as its parameters; its CRC is not right."""
    body = bytearray(_TEMPLATES["sctp"]) + data(tag)
    struct.pack_into(">HH", body, 0, flow.sport, flow.dport)
    struct.pack_into(">H", body, 14, len(body) - 12)
    return ip(SCTP, flow.src, flow.dst, bytes(body))


def plain(proto: int, src: bytes, dst: bytes, tag: int) -> bytes:
    """A packet of a protocol without ports."""
    head = _TEMPLATES["gre"] if proto == GRE else b""
    return ip(proto, src, dst, head + data(tag))


@dataclass(slots=True)
class Seen:
    """What a captured packet says. flow: of what an ICMP error quotes, too, as quoted."""

    flow: Flow
    kind: int
    flags: int
    seq: int
    ack: int
    length: int
    tag: int | None
    quoted: Flow | None
    later: bool
    """A fragment, not the first: has no ports."""


def parse(packet: bytes) -> Seen:
    """Read the beginning of an IP packet."""
    if packet[0] >> 4 == 4:
        length, at, proto = packet[2] << 8 | packet[3], (packet[0] & 15) * 4, packet[9]
        src, dst = packet[12:16], packet[16:20]
        later = bool((packet[6] & 0x1F) | packet[7])
    else:
        length, at, proto = 40 + (packet[4] << 8 | packet[5]), 40, packet[6]
        src, dst, later = packet[8:24], packet[24:40], False
        while proto in (0, 43, 44, 60):
            later = later or (proto == 44 and bool(packet[at + 2] or packet[at + 3] & 0xF8))
            proto, at = packet[at], at + (8 if proto == 44 else (packet[at + 1] + 1) * 8)
            if later:
                break
    sport = dport = flags = seq = ack = 0
    kind, quoted = DIRECT, None
    if not later and len(packet) >= at + 8:
        if proto in (TCP, UDP, SCTP):
            sport, dport = packet[at] << 8 | packet[at + 1], packet[at + 2] << 8 | packet[at + 3]
            if proto == TCP and len(packet) >= at + 14:
                seq, ack = struct.unpack_from(">II", packet, at + 4)
                flags = packet[at + 13]
        elif proto in (ICMP, ICMPV6):
            what = packet[at]
            if what in ((8, 0) if proto == ICMP else (128, 129)):
                sport = packet[at + 4] << 8 | packet[at + 5]
                kind = REPLY if what in (0, 129) else DIRECT
            elif what in (3, 4, 5, 11, 12) if proto == ICMP else what < 128:
                kind = ERROR
                quoted = _quoted(packet[at + 8 :])
            else:
                dport = what << 8 | packet[at + 1]
    tag, where = None, packet.find(MAGIC, at)
    if where >= 0 and len(packet) >= where + BLOCK:
        said, other = struct.unpack_from(">II", packet, where + 4)
        tag = said if said ^ other == 0xFFFFFFFF else None
    flow = Flow(proto, src, sport, dst, dport)
    return Seen(flow, kind, flags, seq, ack, length, tag, quoted, later)


def _quoted(packet: bytes) -> Flow | None:
    return parse(packet).flow if len(packet) >= 28 and packet[0] >> 4 in (4, 6) else None
