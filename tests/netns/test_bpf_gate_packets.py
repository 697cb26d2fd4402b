"""What the gate makes of odd packets: options, extension headers, fragments, half headers.

Each is sent through a raw socket that writes the whole header itself, by a
slice with raw sockets of its own and by one that may send what it likes.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import bpfbed
import pytest
from testbed import net
from testbed.cgroup import Cgroup, cgroup

from vnet import bpf, policy, refusals

pytestmark = pytest.mark.netns

OWN, OTHER, FULL = 301, 302, 303
MINE, THEIRS, FREE = 5000, 6000, 5555
"""Ports of the slice `own`, of another slice, and of nobody."""
HERE = {4: "192.0.2.1", 6: "2001:db8::1"}
ELSEWHERE = {4: "192.0.2.7", 6: "2001:db8::7"}
NOT_HERE = {4: "198.51.100.1", 6: "2001:db8:1::1"}
"""This host's address, one of it that is reserved to another slice, and no address of it."""
TCP, UDP, SCTP, ICMP, ICMP6, UDPLITE = 6, 17, 132, 1, 58, 136
HOP, ROUTING, FRAGMENT, AH, ESP, DEST = 0, 43, 44, 51, 50, 60
SO_MARK, IP_NODEFRAG = 36, 22


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
    to_itself: bool = False

    def bytes(self, to: str) -> bytes:
        """The whole packet."""
        saddr = ip_address(to if self.to_itself else self.source[self.family]).packed
        daddr = ip_address(to).packed
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


def _id(packet: Packet) -> str:
    return f"v{packet.family}: {packet.name}"


def _target(n: int, family: int) -> str:
    """Each packet goes somewhere else, and is known by that."""
    return f"192.0.3.{n}" if family == 4 else f"2001:db8::3:{n:x}"


def _raw(family: int) -> socket.socket:
    """A raw socket that writes the whole header."""
    return socket.socket(
        socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW
    )


def _listen() -> socket.socket:
    """What leaves by the interface `wire`."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
    sock.bind(("wire", 3))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    sock.setblocking(False)
    return sock


def _left(wire: socket.socket, to: str) -> bool:
    """Whether something has left for that address. What was sent is here at once."""
    want, left = ip_address(to).packed, False
    while True:
        try:
            frame = wire.recv(4096)
        except BlockingIOError:
            return left
        left |= want in (frame[16:20], frame[24:40])


def _send_all(group: Cgroup) -> dict[str, bool]:
    """Send every packet from a cgroup; which of them have left."""
    wire = _listen()
    (group.path / "cgroup.procs").write_text("0")
    socks = {family: _raw(family) for family in (4, 6)}
    socks[4].setsockopt(socket.IPPROTO_IP, IP_NODEFRAG, 1)
    gone = {}
    for n, packet in enumerate(PACKETS):
        to = _target(n, packet.family)
        control = []
        if packet.mark is not None:
            control = [(socket.SOL_SOCKET, SO_MARK, struct.pack("=I", packet.mark))]
        try:
            socks[packet.family].sendmsg([packet.bytes(to)], control, 0, (to, 0))
        except OSError as error:  # the kernel itself will not have it, or a drop shows
            assert error.errno in (errno.EINVAL, errno.EPERM), (_id(packet), error)
        gone[_id(packet)] = _left(wire, to)
    return gone


@dataclass(frozen=True)
class Bed:
    """A namespace whose OUTPUT has the gate, and two slices in it."""

    instance: Path
    ns: net.Namespace
    own: Cgroup
    full: Cgroup

    def policy(self, **changes: object) -> None:
        """Put the usual policy in force, with changes."""
        bpfbed.inside(None, lambda: self.here(**changes), self.ns)

    def here(self, **changes: object) -> None:
        """The same, for who is in the namespace."""
        at = {n: [ip_address(text) for text in texts.values()]
              for n, texts in enumerate((HERE, ELSEWHERE))}  # fmt: skip
        usual = {
            "slices": {self.own.id: OWN, self.full.id: FULL},
            "grants": {OWN: "own", FULL: "full"},
            "ports": [
                *((policy.Port(proto, MINE), OWN) for proto in (TCP, UDP, SCTP)),
                *((policy.Port(proto, THEIRS), OTHER) for proto in (TCP, UDP, SCTP)),
                *((policy.Port(UDP, MINE + 1, here), OWN) for here in at[0]),
                *((policy.Port(UDP, THEIRS + 1, here), OTHER) for here in at[0]),
            ],
            "addresses": dict.fromkeys(at[1], OTHER),
        }
        policy.write(self.instance, policy.Policy(**{**usual, **changes}))  # type: ignore[arg-type]

    def refused(self, xid: int) -> int:
        """How often a slice has been refused something."""
        return sum(c.refused for c in refusals.read(self.instance) if c.xid == xid)


#: as `vnet up` puts them
_RULES = """*raw
-A OUTPUT -m bpf --object-pinned {0}/vnet_gate -j DROP
-A OUTPUT -m mark ! --mark 0x0/0xffff -m addrtype ! --src-type LOCAL -m bpf --object-pinned {0}/vnet_spoof -j DROP
COMMIT
*mangle
-A POSTROUTING -m bpf --object-pinned {0}/vnet_join -j DROP
COMMIT
"""  # noqa: E501


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    base = tmp_path_factory.mktemp("gate")
    with bpfbed.bpffs(base) as where, net.namespace() as ns, cgroup() as own, cgroup() as full:
        made = Bed(bpf.load(where, lsm=False), ns, own, full)
        addresses = (*HERE.values(), *ELSEWHERE.values())
        ns.run("ip", "-batch", "-", input="link add wire type veth peer name end\n"
               "link set end up\nlink set wire up arp off addrgenmode none\n"
               + "".join(f"addr add {a}/{64 if ':' in a else 24} dev wire"
                         f"{' nodad' if ':' in a else ''}\n" for a in addresses)
               + "route add 192.0.3.0/24 dev wire\n")  # fmt: skip
        programs = made.instance / "progs"
        for tool in ("iptables-legacy", "ip6tables-legacy"):
            ns.run(f"{tool}-restore", input=_RULES.format(programs))
        made.policy()
        yield made


@pytest.fixture(scope="module")
def sent(bed: Bed) -> dict[int, dict[str, bool]]:
    """What has left, by xid."""
    return {
        xid: bpfbed.inside(None, partial(_send_all, group), bed.ns)
        for xid, group in ((OWN, bed.own), (FULL, bed.full))
    }


@pytest.mark.parametrize("packet", PACKETS, ids=_id)
def test_a_slice_with_raw_sockets_of_its_own_sends_only_what_is_its_own(packet, sent):
    assert sent[OWN][_id(packet)] == packet.own


@pytest.mark.parametrize("packet", PACKETS, ids=_id)
def test_a_slice_with_all_raw_sockets_keeps_off_what_is_anothers(packet, sent):
    assert sent[FULL][_id(packet)] == packet.full


def _in_two(packet: Packet, to: str) -> list[bytes]:
    """The packet in two fragments, the first one 16 bytes long."""
    first, last = packet.rest[:16], packet.rest[16:]
    if packet.family == 4:
        return [
            replace(packet, rest=first, fragment=0x2000).bytes(to),
            replace(packet, rest=last, fragment=2).bytes(to),
        ]
    first = fragment(packet.proto, 0, more=True) + first
    last = fragment(packet.proto, 2, more=False) + last
    return [replace(packet, proto=FRAGMENT, rest=rest).bytes(to) for rest in (first, last)]


def _send(sock: socket.socket, wire: socket.socket, packets: Sequence[bytes], to: str) -> bool:
    """Send these; whether any of it has left."""
    for data in packets:
        with suppress(PermissionError):
            sock.sendto(data, (to, 0))
    return _left(wire, to)


@contextmanager
def _tracked(ns: net.Namespace) -> Iterator[None]:
    """Connection tracking is on, and with it fragments are put together before the gate."""
    rule = ["OUTPUT", "-t", "filter", "-m", "conntrack", "--ctstate", "INVALID"]
    for tool in ("iptables-legacy", "ip6tables-legacy"):
        ns.run(tool, "-A", *rule)
    try:
        yield
    finally:
        for tool in ("iptables-legacy", "ip6tables-legacy"):
            ns.run(tool, "-D", *rule)


@pytest.mark.parametrize("family", [4, 6])
def test_what_is_put_together_from_fragments_is_its_senders(bed: Bed, family: int):
    to = _target(250, family)
    whole = {port: Packet("", family, UDP, ports(port), own=True) for port in (MINE, FREE)}

    def send(group: Cgroup) -> list[bool]:
        wire = _listen()
        (group.path / "cgroup.procs").write_text("0")
        return [_send(_raw(family), wire, _in_two(p, to), to) for p in whole.values()]

    with _tracked(bed.ns):
        assert bpfbed.inside(None, partial(send, bed.own), bed.ns) == [True, False]
        assert bpfbed.inside(None, partial(send, bed.full), bed.ns) == [False, True]


@pytest.mark.parametrize("family", [4, 6])
def test_a_raw_socket_older_than_its_grant_sends_no_more(bed: Bed, family: int):
    to = _target(251, family)
    mine = Packet("", family, UDP, ports(MINE), own=True).bytes(to)

    def send() -> list[bool]:
        wire = _listen()
        (bed.own.path / "cgroup.procs").write_text("0")
        sock = _raw(family)
        seen = [_send(sock, wire, [mine], to)]
        for grants in ({FULL: "full"}, {OWN: "own", FULL: "full"}):
            bed.here(grants=grants)
            seen.append(_send(sock, wire, [mine], to))
        return seen

    before = bed.refused(OWN)
    assert bpfbed.inside(None, send, bed.ns) == [True, False, True]
    assert bed.refused(OWN) > before


@pytest.mark.parametrize("family", [4, 6])
def test_a_guard_that_only_observes_lets_everything_leave_and_counts_it(bed: Bed, family: int):
    to = _target(252, family)
    packets = [
        Packet("", family, UDP, ports(THEIRS), own=False),
        Packet("", family, UDP, ports(FREE), own=False, source=ELSEWHERE),
        Packet("", family, UDP, ports(MINE), own=False, source=NOT_HERE),
    ]

    def send() -> list[bool]:
        wire = _listen()
        (bed.own.path / "cgroup.procs").write_text("0")
        return [_send(_raw(family), wire, [p.bytes(to)], to) for p in packets]

    def observed() -> int:
        return sum(c.observed for c in refusals.read(bed.instance) if c.xid == OWN)

    before = observed()
    bed.policy(observe=True)
    try:
        assert bpfbed.inside(None, send, bed.ns) == [True] * 3
    finally:
        bed.policy()
    assert observed() >= before + 3


@pytest.mark.parametrize("family", [4, 6])
def test_what_the_kernel_answers_in_a_slices_name_is_not_its_raw_packet(bed: Bed, family: int):
    """Resets and port unreachables come from raw sockets of the kernel."""
    here, af = HERE[family], (socket.AF_INET, socket.AF_INET6)[family == 6]

    def ask() -> list[int]:
        (bed.own.path / "cgroup.procs").write_text("0")
        said = []
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with socket.socket(af, kind) as sock:
                sock.settimeout(5)
                try:
                    sock.connect((here, 9))
                    sock.send(b"x")
                    sock.recv(1)
                except OSError as error:
                    said.append(error.errno)
        return said

    before = bed.refused(OWN), bed.refused(0)
    assert bpfbed.inside(None, ask, bed.ns) == [errno.ECONNREFUSED] * 2
    assert (bed.refused(OWN), bed.refused(0)) == before


@pytest.mark.parametrize("family", [4, 6])
def test_a_raw_packet_in_another_slices_connection_does_not_leave(bed: Bed, family: int):
    """The connection's mark names its owner; here a rule has written it."""
    tool = "iptables-legacy" if family == 4 else "ip6tables-legacy"
    echo = (ICMP, icmp(8)) if family == 4 else (ICMP6, icmp(128))
    cases = [
        (OTHER, UDP, ports(MINE), False),
        (OWN, UDP, ports(MINE), True),
        (OWN << 16 | OTHER, UDP, ports(MINE), False),
        (OTHER << 16, UDP, ports(MINE), True),  # the half of the other side
        (OTHER, *echo, True),  # ids may be the same by chance
    ]
    for n, (mark, proto, rest, leaves) in enumerate(cases):
        to = _target(240 + n, family)
        packet = Packet("", family, proto, rest, own=leaves).bytes(to)
        rule = ["OUTPUT", "-t", "mangle", "-d", to, "-j", "CONNMARK", "--set-mark", hex(mark)]
        bed.ns.run(tool, "-A", *rule)
        try:

            def send(packet: bytes = packet, to: str = to) -> bool:
                wire = _listen()
                (bed.own.path / "cgroup.procs").write_text("0")
                return _send(_raw(family), wire, [packet], to)

            assert bpfbed.inside(None, send, bed.ns) == leaves, hex(mark)
        finally:
            bed.ns.run(tool, "-D", *rule)
