"""Packets with odd headers, and who may send them; for tests/netns/test_bpf_gate_packets.py."""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address

OWN, OTHER, FULL = 301, 302, 303
MINE, THEIRS, FREE = 5000, 6000, 5555
"""Ports of the slice `own`, of another slice, and of nobody."""
HERE = {4: "192.0.2.1", 6: "2001:db8::1"}
ELSEWHERE = {4: "192.0.2.7", 6: "2001:db8::7"}
NOT_HERE = {4: "198.51.100.1", 6: "2001:db8:1::1"}
"""This host's address, one of it that is reserved to another slice, and no address of it."""
TCP, UDP, SCTP, ICMP, ICMP6, UDPLITE = 6, 17, 132, 1, 58, 136
HOP, ROUTING, FRAGMENT, AH, ESP, DEST = 0, 43, 44, 51, 50, 60


@dataclass(frozen=True)
class Packet:
    """What follows the addresses, and who may send it."""

    name: str
    family: int
    proto: int
    rest: bytes
    own: bool
    full: bool = True
    options: bytes = b""
    fragment: int = 0
    """IPv4's flags and offset."""
    start: int | None = None
    """The first byte, where it is not what it should be."""
    source: dict[int, str] = field(default_factory=lambda: HERE)
    mark: int | None = None
    """SO_MARK in a control message."""
    to: str = ""
    """The destination that the header names, if another."""

    def bytes(self, to: str) -> bytes:
        """The whole packet."""
        saddr = ip_address(self.source[self.family]).packed
        daddr = ip_address(self.to or to).packed
        if self.family == 6:
            start = 0x60 if self.start is None else self.start
            head = struct.pack("!BBHHBB", start, 0, 0, len(self.rest), self.proto, 64)
            return head + saddr + daddr + self.rest
        start = 0x45 + len(self.options) // 4 if self.start is None else self.start
        length = 20 + len(self.options) + len(self.rest)
        head = struct.pack("!BBHHHBBH", start, 0, length, 1, self.fragment, 64, self.proto, 0)
        return head + saddr + daddr + self.options + self.rest


def ports(sport: int) -> bytes:
    """The start of a header of TCP, UDP or SCTP, long enough for each of them."""
    return struct.pack("!HHHH", sport, 7, 40, 0) + bytes([0, 0, 0, 0, 0x50, 2]) + bytes(26)


def icmp(kind: int) -> bytes:
    """An ICMP message."""
    return struct.pack("!BBHHH", kind, 0, 0, 77, 1) + bytes(16)


def extension(after: int, words: int = 0) -> bytes:
    """A hop-by-hop, routing or destination header that says nothing (PadN)."""
    return bytes([after, words, 1, 4 + 8 * words]) + bytes(4 + 8 * words)


def fragment(after: int, units: int, more: bool) -> bytes:
    """IPv6's fragment header; its offset in units of 8 bytes."""
    return struct.pack("!BBHI", after, 0, units << 3 | more, os.getpid())


def _by_port(name: str, make: Callable[..., Packet]) -> list[Packet]:
    """One packet from each kind of port."""
    return [
        make(name=f"{name} own port", rest=ports(MINE), own=True, full=False),
        make(name=f"{name} free port", rest=ports(FREE), own=False),
        make(name=f"{name} another's port", rest=ports(THEIRS), own=False, full=False),
    ]


def _four() -> list[Packet]:
    make = partial(Packet, family=4)
    found = []
    for name, proto in {"tcp": TCP, "udp": UDP, "sctp": SCTP}.items():
        found += _by_port(name, partial(make, proto=proto))
    found += _by_port("one option", partial(make, proto=UDP, options=b"\1\1\1\0"))
    found += _by_port("all options", partial(make, proto=UDP, options=b"\1" * 39 + b"\0"))
    found += _by_port("don't fragment", partial(make, proto=UDP, fragment=0x4000))
    found += _by_port("first fragment", partial(make, proto=UDP, fragment=0x2000))
    found += [
        make(name="later fragment", proto=UDP, rest=ports(MINE), fragment=0x2001, own=False),
        make(name="last fragment", proto=UDP, rest=ports(MINE), fragment=100, own=False),
        make(name="options look like ports", proto=UDP, options=struct.pack("!HH", MINE, 7),
             rest=ports(FREE), own=False),
        make(name="only ports", proto=UDP, rest=ports(MINE)[:4], own=True, full=False),
        make(name="half a port", proto=UDP, rest=ports(MINE)[:3], own=False),
        make(name="no transport header", proto=TCP, rest=b"", own=False),
        make(name="says it is IPv6", proto=UDP, rest=ports(MINE), start=0x65, own=False),
        # the kernel itself does not send this one
        make(name="header shorter than one", proto=UDP, rest=ports(MINE), start=0x44,
             own=False, full=False),
        make(name="echo request", proto=ICMP, rest=icmp(8), own=True),
        make(name="echo request, one byte", proto=ICMP, rest=b"\10", own=False),
        make(name="IPv6's echo request", proto=ICMP6, rest=icmp(128), own=False),
    ]  # fmt: skip
    for name, kind in {"echo reply": 0, "unreachable": 3, "redirect": 5, "timestamp": 13,
                       "number of IPv6's echo request": 128}.items():  # fmt: skip
        found.append(make(name=name, proto=ICMP, rest=icmp(kind), own=False))
    for proto in (0, 2, 4, 41, 47, ESP, AH, 103, UDPLITE, 253, 255):
        found.append(make(name=f"protocol {proto}", proto=proto, rest=ports(MINE), own=False))
    return found


def _six() -> list[Packet]:
    make = partial(Packet, family=6)
    found = []
    for name, proto in {"tcp": TCP, "udp": UDP, "sctp": SCTP}.items():
        found += _by_port(name, partial(make, proto=proto))
    behind = {
        "hop-by-hop": (HOP, extension(UDP)),
        "destination options": (DEST, extension(UDP, 3)),
        "routing": (ROUTING, bytes([UDP, 0, 0, 0]) + bytes(4)),
        "authentication": (AH, bytes([UDP, 4]) + bytes(22)),
        "first fragment": (FRAGMENT, fragment(UDP, 0, more=True)),
        "whole fragment": (FRAGMENT, fragment(UDP, 0, more=False)),
        "a chain": (HOP, extension(DEST) + extension(FRAGMENT) + fragment(AH, 0, more=True)
                    + bytes([DEST, 1]) + bytes(10) + extension(UDP, 1)),
        "as many as are read": (DEST, extension(DEST) * 10 + extension(UDP)),
    }  # fmt: skip
    for name, (first, before) in behind.items():
        for packet in _by_port(name, partial(make, proto=first)):
            found.append(make(name=packet.name, proto=first, rest=before + packet.rest,
                              own=packet.own, full=packet.full))  # fmt: skip
    found += [
        make(name="more than are read", proto=DEST, own=False, full=False,
             rest=extension(DEST) * 11 + extension(UDP) + ports(MINE)),
        make(name="later fragment", proto=FRAGMENT, own=False,
             rest=fragment(UDP, 1, more=True) + ports(MINE)),
        make(name="last fragment", proto=FRAGMENT, own=False,
             rest=fragment(UDP, 9, more=False) + ports(MINE)),
        make(name="later fragment behind options", proto=DEST, own=False,
             rest=extension(FRAGMENT) + fragment(UDP, 1, more=True) + ports(MINE)),
        make(name="extension that ends too soon", proto=DEST, rest=b"\x11\0\1", own=False),
        make(name="extension beyond the end", proto=DEST, rest=extension(UDP)[:1] + b"\xff" * 7,
             own=False),
        make(name="only ports", proto=UDP, rest=ports(MINE)[:4], own=True, full=False),
        make(name="half a port", proto=UDP, rest=ports(MINE)[:3], own=False),
        make(name="no transport header", proto=TCP, rest=b"", own=False),
        make(name="says it is IPv4", proto=UDP, rest=ports(MINE), start=0x45, own=False),
        make(name="echo request", proto=ICMP6, rest=icmp(128), own=True),
        make(name="echo request behind options", proto=DEST, rest=extension(ICMP6) + icmp(128),
             own=True),
        make(name="IPv4's echo request", proto=ICMP, rest=icmp(8), own=False),
    ]  # fmt: skip
    for name, kind in {"echo reply": 129, "unreachable": 1, "too big": 2, "router": 134,
                       "neighbour": 136, "redirect": 137}.items():  # fmt: skip
        found.append(make(name=name, proto=ICMP6, rest=icmp(kind), own=False))
    for proto in (4, 41, 47, ESP, 59, UDPLITE, 135, 139, 253, 255):
        found.append(make(name=f"protocol {proto}", proto=proto, rest=ports(MINE), own=False))
    return found


def _either(family: int) -> list[Packet]:
    make = partial(Packet, family=family)
    echo = (ICMP, icmp(8)) if family == 4 else (ICMP6, icmp(128))
    return [
        make(name="another's address", proto=echo[0], rest=echo[1], source=ELSEWHERE,
             own=False, full=False),
        make(name="another's address, own port", proto=UDP, rest=ports(MINE), source=ELSEWHERE,
             own=False, full=False),
        make(name="another's address, to itself, sent elsewhere", proto=echo[0], rest=echo[1],
             source=ELSEWHERE, to=ELSEWHERE[family], own=False, full=False),
        make(name="no address of this host", proto=UDP, rest=ports(MINE), source=NOT_HERE,
             own=False, full=False),
        make(name="own port at its own address only", proto=UDP, rest=ports(MINE + 1),
             own=True, full=False),
        make(name="another's port at this address", proto=UDP, rest=ports(THEIRS + 1),
             own=False, full=False),
        make(name="its own mark", proto=UDP, rest=ports(MINE), mark=OWN, own=True, full=False),
        make(name="its own mark and others' bits", proto=echo[0], rest=echo[1],
             mark=0xABCD0000 | OWN, own=True, full=False),
        make(name="another's mark", proto=echo[0], rest=echo[1], mark=OTHER,
             own=False, full=False),
        make(name="others' bits, and nobody's mark", proto=echo[0], rest=echo[1],
             mark=0xABCD0000, own=False, full=False),
    ]  # fmt: skip


PACKETS = [*_four(), *_either(4), *_six(), *_either(6)]
