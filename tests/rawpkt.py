"""IP packets byte by byte, with right checksums, and raw sockets that send them.

scapy would do it too, but takes twenty seconds to import in a guest.
"""

import socket
import struct
import subprocess
import sys

from vnet.testing.cgroup import Cgroup
from vnet.testing.net import Namespace

SYN, RST, ACK, FIN = 2, 4, 16, 1

_SEND = """
import socket, sys
to, *packets = sys.argv[1:]
six = ":" in to
s = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
for p in packets:
    s.sendto(bytes.fromhex(p), (to, 0))
"""


def send(
    ns: Namespace, *packets: bytes, slice: Cgroup | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Send whole IP packets from a raw socket (IP_HDRINCL) of a slice."""
    first = packets[0]
    if first[0] >> 4 == 4:
        to = socket.inet_ntop(socket.AF_INET, first[16:20])
    else:
        to = socket.inet_ntop(socket.AF_INET6, first[24:40])
    argv = (sys.executable, "-I", "-S", "-c", _SEND, to, *(p.hex() for p in packets))
    return ns.run(*argv, cgroup=slice, check=check)


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _ip(src: str, dst: str, proto: int, body: bytes, checksum_at: int) -> bytes:
    if ":" in src:
        a, b = (socket.inet_pton(socket.AF_INET6, x) for x in (src, dst))
        pseudo = a + b + struct.pack(">II", len(body), proto)
        head = struct.pack(">IHBB", 6 << 28, len(body), proto, 64) + a + b
    else:
        a, b = (socket.inet_pton(socket.AF_INET, x) for x in (src, dst))
        pseudo = a + b + struct.pack(">HH", proto, len(body))
        # the kernel fills in the header's own checksum, and the id
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, proto, 0) + a + b
    if proto == socket.IPPROTO_ICMP:
        pseudo = b""
    total = checksum(pseudo + body)
    return head + body[:checksum_at] + struct.pack(">H", total) + body[checksum_at + 2 :]


def udp(src: str, sport: int, dst: str, dport: int, data: bytes = b"x") -> bytes:
    """A UDP datagram."""
    body = struct.pack(">HHHH", sport, dport, 8 + len(data), 0) + data
    return _ip(src, dst, socket.IPPROTO_UDP, body, 6)


def tcp(
    src: str, sport: int, dst: str, dport: int, flags: int, seq: int = 1, ack: int = 0
) -> bytes:
    """A TCP segment without data."""
    body = struct.pack(">HHIIBBHHH", sport, dport, seq, ack, 0x50, flags, 64000, 0, 0)
    return _ip(src, dst, socket.IPPROTO_TCP, body, 16)


def unreachable(src: str, dst: str, quoted: bytes) -> bytes:
    """A port unreachable about a packet."""
    if ":" in src:
        body = struct.pack(">BBHI", 1, 4, 0, 0) + quoted
        return _ip(src, dst, socket.IPPROTO_ICMPV6, body, 2)
    body = struct.pack(">BBHI", 3, 3, 0, 0) + quoted
    return _ip(src, dst, socket.IPPROTO_ICMP, body, 2)


def too_big(src: str, dst: str, quoted: bytes, mtu: int) -> bytes:
    """A router's word that a packet does not fit."""
    if ":" in src:
        return _ip(src, dst, socket.IPPROTO_ICMPV6, struct.pack(">BBHI", 2, 0, 0, mtu) + quoted, 2)
    return _ip(src, dst, socket.IPPROTO_ICMP, struct.pack(">BBHI", 3, 4, 0, mtu) + quoted, 2)


def segment(packet: bytes) -> tuple[int, int, int, int]:
    """(source port, destination port, sequence, acknowledged) of a TCP packet."""
    start = 40 if packet[0] >> 4 == 6 else (packet[0] & 15) * 4
    return struct.unpack_from(">HHII", packet, start)
