"""What the gate makes of odd packets: options, extension headers, fragments, half headers.

Each is sent through a raw socket that writes the whole header itself, by a
slice with raw sockets of its own and by one that may send what it likes.
"""

import ctypes
import errno
import fcntl
import mmap
import socket
import struct
import subprocess
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import bpfbed
import pytest
from gate_packets import (
    ELSEWHERE,
    FRAGMENT,
    FREE,
    FULL,
    HERE,
    ICMP,
    ICMP6,
    MINE,
    NOT_HERE,
    OTHER,
    OWN,
    PACKETS,
    SCTP,
    TCP,
    THEIRS,
    UDP,
    Packet,
    fragment,
    icmp,
    ports,
)
from vnet.testing import net
from vnet.testing.cgroup import Cgroup, cgroup
from vnet.testing.poll import until

from vnet import bpf, policy, refusals

pytestmark = pytest.mark.netns

SO_MARK, IP_NODEFRAG = 36, 22


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
        gone[_id(packet)] = _left(wire, packet.to or to)
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
:VNET-OUT - [0:0]
-A OUTPUT -m bpf --object-pinned {0}/vnet_odd -j VNET-OUT
-A VNET-OUT -m bpf --object-pinned {0}/vnet_gate -j DROP
-A VNET-OUT -m mark ! --mark 0x0/0xffff -m addrtype --src-type LOCAL -m bpf --object-pinned {0}/vnet_local -j RETURN
-A VNET-OUT -m mark ! --mark 0x0/0xffff -m bpf --object-pinned {0}/vnet_spoof -j DROP
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
def test_a_raw_socket_bound_and_connected_with_ports_is_a_raw_one_still(bed: Bed, family: int):
    """Its own port is what the gate knows it by first: a call must not change it."""
    to = _target(253, family)
    packets = [Packet("", family, UDP, ports(port), own=True).bytes(to) for port in (MINE, FREE)]

    def send() -> list[bool]:
        wire = _listen()
        (bed.own.path / "cgroup.procs").write_text("0")
        sock = _raw(family)
        sock.bind((HERE[family], 40000))
        bound = [_send(sock, wire, [packet], to) for packet in packets]
        sock.connect((to, 50000))
        return bound + [_send(sock, wire, [packet], to) for packet in packets]

    assert bpfbed.inside(None, send, bed.ns) == [True, False] * 2


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
                sock.settimeout(60)
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


def _mark_by_32_bit_call(sock: socket.socket, mark: int) -> int:
    """setsockopt(SO_MARK) as a 32-bit program does it; returns what that returned."""
    code = bytes.fromhex("53 89f8 89f3 87ca 4489c6 4489cf cd80 5b c3")  # int 0x80
    low = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40, 7)  # MAP_32BIT
    low[:32] = code.ljust(28, b"\0") + struct.pack("=I", mark)
    view = (ctypes.c_char * 4096).from_buffer(low)
    call = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_uint] * 6)(ctypes.addressof(view))
    optval = ctypes.addressof(view) + 28
    return call(366, sock.fileno(), socket.SOL_SOCKET, SO_MARK, optval, 4)


@pytest.mark.skipif(
    not Path("/proc/sys/abi/vsyscall32").exists(), reason="no 32-bit programs on this kernel"
)
@pytest.mark.parametrize("mark", [OTHER, 0, FULL])
def test_a_mark_that_a_32_bit_program_sets_does_not_leave(bed: Bed, mark: int):
    """The kernel does not ask cgroup programs about such a call."""
    to = _target(239, 4)

    def send() -> list[object]:
        wire = _listen()
        (bed.own.path / "cgroup.procs").write_text("0")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", (to, 9))
            said: list[object] = [_left(wire, to), _mark_by_32_bit_call(sock, mark)]
            with suppress(PermissionError):
                sock.sendto(b"x", (to, 9))
            return [*said, sock.getsockopt(socket.SOL_SOCKET, SO_MARK), _left(wire, to)]

    assert bpfbed.inside(None, send, bed.ns) == [True, 0, mark, False]


def test_a_mark_of_nobodys_in_another_namespace_is_not_this_nodes_business(bed: Bed):
    """Another node of the same machine may have put it there."""

    def ask() -> int:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, 0x70007)
            return sock.getsockopt(socket.SOL_SOCKET, SO_MARK)

    with net.namespace() as other:
        assert bpfbed.inside(None, ask, other) == 0x70007
    assert bpfbed.inside(None, ask, bed.ns) == 0x70000


@contextmanager
def _ordinary(bed: Bed) -> Iterator[None]:
    """Without reserved addresses, so that the gate need not look at every packet's source."""
    bed.policy(addresses={})
    try:
        yield
    finally:
        bed.policy()


FOREIGN = {4: "203.0.113.77", 6: "2001:db8:ffff::77"}


@pytest.mark.parametrize("family", [4, 6])
def test_a_foreign_source_does_not_leave_though_nothing_shows_how_it_was_bound(
    bed: Bed, family: int
):
    """The option that let it be bound is taken back before anything is sent."""
    to = _target(238, family)
    level, option = (socket.SOL_IP, 19) if family == 4 else (socket.IPPROTO_IPV6, 75)

    def send() -> list[bool]:
        wire = _listen()
        (bed.own.path / "cgroup.procs").write_text("0")
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        left = []
        for source in (HERE[family], FOREIGN[family]):
            with socket.socket(kind, socket.SOCK_DGRAM) as sock:
                sock.setsockopt(level, option, 1)  # IP_TRANSPARENT, IPV6_TRANSPARENT
                sock.bind((source, 0))
                sock.connect((to, 9))  # IPv4 asks for a local source when it looks for a route
                sock.setsockopt(level, option, 0)
                with suppress(PermissionError):
                    sock.send(b"x")
                left.append(_left(wire, to))
        return left

    before = bed.refused(OWN)
    with _ordinary(bed):
        assert bpfbed.inside(None, send, bed.ns) == [True, False]
    assert bed.refused(OWN) > before


@pytest.mark.parametrize("family", [4, 6])
def test_a_source_that_is_taken_from_the_host_is_refused_soon(bed: Bed, family: int):
    own = {4: "192.0.2.200", 6: "2001:db8:2::200"}[family]
    to = _target(237, family)

    def send() -> list[bool]:
        wire = _listen()
        (bed.own.path / "cgroup.procs").write_text("0")
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        with socket.socket(kind, socket.SOCK_DGRAM) as sock:
            sock.bind((own, 0))
            sock.connect((to, 9))
            sock.send(b"x")
            left = [_left(wire, to)]
            subprocess.run(["ip", "address", "del", own, "dev", "lo"], check=True)

            def refused() -> bool:
                try:
                    sock.send(b"x")
                except OSError:  # IPv4: EINVAL, the kernel asks itself
                    return True
                return False

            until(refused, what="the address is not known any more")
            return left

    bed.ns.run("ip", "address", "add", own, "dev", "lo", *(["nodad"] if family == 6 else []))
    with _ordinary(bed):
        assert bpfbed.inside(None, send, bed.ns) == [True]


@pytest.mark.parametrize("family", [4, 6])
def test_a_tunnels_packet_is_not_taken_for_its_passengers(bed: Bed, family: int):
    """It has the passenger's socket, but neither its port nor its address."""
    far = {4: "192.0.3.238", 6: "2001:db8::3:ee"}[family]
    made = f"link add vx{family} type vxlan id {family} remote {far} dstport 4789 dev wire"
    try:
        bed.ns.run("ip", *made.split())
    except AssertionError as problem:
        if "Unknown device type" in str(problem):
            pytest.skip("no VXLAN on this kernel")
        raise
    # Nothing of its own: it would send what IPv6 wants to know at every new address.
    quiet = f"link set vx{family} addrgenmode none\nlink set vx{family} up arp off"
    lines = f"{quiet}\naddr add 10.9.{family}.1/24 dev vx{family}\n"
    bed.ns.run("ip", "-batch", "-", input=lines)

    def send() -> list[bool]:
        wire, inside = _listen(), f"10.9.{family}.2"
        (bed.own.path / "cgroup.procs").write_text("0")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", (inside, 9))
            seen = [_left(wire, far)]
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, ICMP) as sock:
            sock.sendto(icmp(8), (inside, 0))
            seen.append(_left(wire, far))
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, UDP) as sock:
            with suppress(PermissionError):
                sock.sendto(ports(FREE), (inside, 0))
            return [*seen, _left(wire, far)]

    assert bpfbed.inside(None, send, bed.ns) == [True, True, False]


def _hears(sock: socket.socket, timeout: float) -> bool:
    sock.settimeout(timeout)
    with suppress(TimeoutError):
        return bool(sock.recv(1))
    return False


def test_a_connection_older_than_its_slice_acknowledges_but_says_nothing_unmarked(bed: Bed):
    """Nobody can mark it while it waits to be accepted: it may acknowledge meanwhile."""

    def talk() -> list[bool]:
        bed.here(slices={bed.full.id: FULL})
        with socket.socket() as client:
            (bed.own.path / "cgroup.procs").write_text("0")
            mine = socket.create_server((HERE[4], 0))
            client.connect(mine.getsockname())
            bed.here()
            client.send(b"x")
            unsent = struct.pack("=I", 0)

            def acknowledged() -> bool:
                return not struct.unpack("=I", fcntl.ioctl(client, termios.TIOCOUTQ, unsent))[0]

            until(acknowledged, what="the acknowledgement")
            accepted, _ = mine.accept()
            accepted.send(b"y")
            early = _hears(client, 0.5)
            # another node on this machine that comes up marks whatever has no mark
            marked = bool(accepted.getsockopt(socket.SOL_SOCKET, SO_MARK))
            bed.here(slices={bed.full.id: FULL})
            heard = [early and not marked, early or _hears(client, 60)]
            mine.close()
            accepted.close()
            return heard

    try:
        assert bpfbed.inside(None, talk, bed.ns) == [False, True]
    finally:
        bed.policy()
