"""What one slice must not do to another: the table of attempts.

One row is one attempt, the same for everybody; it says who is refused and how,
and who is not. The rows are data, so that the host's kernel and the guests',
and both data paths, are tested by the same ones (tests/netns/test_guard_*.py,
tests/vm/test_guard_*.py).

    a     raw = "own", holds tcp, udp and sctp port 7000, 7010-7012, 7020 on one
          address only, and an address of its own
    b     raw = "own", holds 7100
    c     raw = "deny", holds nothing
    f     raw = "full", holds nothing
    node  root, outside every slice
    user  an ordinary user, outside every slice
"""

import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

Steps = list[list]
A, B, C, F = 512, 65535, 7, 8
"""The slices' xids."""
XIDS = {"a": A, "b": B, "c": C, "f": F, "node": 0, "user": 0}
PORT, RANGE, ON_ADDRESS, PORT_B, FREE = 7000, (7010, 7012), 7020, 7100, 8100
"""Ports: a's, a's, a's on one address, b's, and one that nobody holds."""
CONNECTION = 8300
"""The local port of a connection of a, which it does not hold by a grant."""
SINK = 4999
"""A port of the peer at which nobody answers anybody."""
UNSEEN = "unseen"
"""Refused so: the packet does not come out at the other end of the wire."""
SLICES, OTHERS = ("a", "b", "c", "f"), ("b", "f", "node")
TCP, UDP, SCTP, ICMP, ICMP6 = 6, 17, 132, 1, 58


@dataclass(frozen=True)
class World:
    """The addresses of one attempt, and what its packet is known by."""

    family: int
    here: str
    there: str
    mine: str
    """a's own address, on this node too."""
    nowhere: str
    """No address of this node."""
    interface: str
    token: bytes
    dport: int
    """A port of the peer that no other attempt sends to."""

    @property
    def af(self) -> str:
        return "AF_INET" if self.family == 4 else "AF_INET6"

    @property
    def wild(self) -> str:
        return "0.0.0.0" if self.family == 4 else "::"

    @property
    def icmp(self) -> int:
        return ICMP if self.family == 4 else ICMP6


@dataclass(frozen=True)
class Case:
    """One attempt. Who is in neither list is not asked."""

    name: str
    steps: Callable[[World], Steps]
    refused: tuple[str, ...]
    allowed: tuple[str, ...]
    how: str = UNSEEN
    """UNSEEN, or the errno of the step ``at``."""
    at: str = ""
    families: tuple[int, ...] = (4, 6)
    needs: str = ""
    """sctp, lsm, uring-bind: what not every kernel has."""
    before: tuple[str, Callable[[World], Steps]] | None = None
    """Who does what first, and holds on to it."""
    tracked: bool = True
    """False: the refused packet must not have reached conntrack either."""


# -- packets ------------------------------------------------------------------


def total(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    found = sum(struct.unpack(f">{len(data) // 2}H", data))
    while found >> 16:
        found = (found & 0xFFFF) + (found >> 16)
    return ~found & 0xFFFF


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


# -- steps --------------------------------------------------------------------


def binds(kind: int, port: int, where: str = "", *options: list, v6: bool = False):
    """Bind to a port; ``where``: an attribute of the world, an address, or the wildcard."""

    def steps(w: World) -> Steps:
        address = getattr(w, where, where) or w.wild
        family = "AF_INET6" if v6 else w.af
        if v6:
            address = "::" if not where else f"::ffff:{address}"
        made = ["socket", family, *_KINDS[kind]]
        return [made, *([*o[:1], *_option(w, o)] for o in options), ["bind", address, port]]

    return steps


_KINDS = {
    TCP: ("SOCK_STREAM", 0),
    UDP: ("SOCK_DGRAM", 0),
    SCTP: ("SOCK_STREAM", SCTP),
    # one-to-many, which has a bind of its own
    -SCTP: ("SOCK_SEQPACKET", SCTP),
}
_FREEBIND, _TRANSPARENT = {4: (0, 15), 6: (41, 78)}, {4: (0, 19), 6: (41, 75)}


def _option(w: World, option: list) -> list:
    return [*option[1][w.family], 1] if isinstance(option[1], dict) else option[1:]


def raw(packet: Callable[[World], bytes], proto: int = 255, *options: list):
    """Send a whole packet (proto 255: with its header), or what follows the IP header."""

    def steps(w: World) -> Steps:
        made = ["socket", w.af, "SOCK_RAW", proto]
        return [made, *map(list, options), ["send", packet(w).hex(), w.there, 0]]

    return steps


def raw_sctp(w: World) -> bytes:
    """From a's port by SCTP."""
    return ip(w, SCTP, sctp(w, PORT))


def sends(*options: list, kind: int = UDP, cmsg: Callable[[World], list] = lambda w: []):
    """An ordinary datagram, or an echo request from a ping socket."""

    def steps(w: World) -> Steps:
        if kind == UDP:
            made, data, port = ["socket", w.af, "SOCK_DGRAM", 0], w.token, SINK
        else:
            made, data, port = ["socket", w.af, "SOCK_DGRAM", w.icmp], echo(w), 0
        before = [o(w) if callable(o) else list(o) for o in options]
        return [made, *before, ["send", data.hex(), w.there, port, cmsg(w)]]

    return steps


def pktinfo(w: World, source: str = "") -> list:
    """A cmsg that names a's address as the source."""
    at = pton(source or w.mine)
    if w.family == 4:
        return [[0, 8, (struct.pack("=i", 0) + at + bytes(4)).hex()]]
    return [[41, 50, (at + struct.pack("=i", 0)).hex()]]


def mark(value: int) -> Callable[[World], list]:
    """A cmsg SO_MARK."""
    return lambda w: [["SOL_SOCKET", "SO_MARK", struct.pack("=I", value).hex()]]


def mapped_pktinfo(w: World) -> Steps:
    """From an IPv6 socket to an IPv4 peer, a's address as the source."""
    at = pton(f"::ffff:{w.mine}")
    cmsg = [41, 50, (at + struct.pack("=i", 0)).hex()]
    there = f"::ffff:{w.there}"
    return [
        ["socket", "AF_INET6", "SOCK_DGRAM", 0],
        ["send", w.token.hex(), there, SINK, [cmsg]],
    ]


def unspec_bind(w: World) -> Steps:
    """inet_bind() takes AF_UNSPEC for AF_INET where the address is 0.0.0.0."""
    sockaddr = struct.pack("=H", 0) + struct.pack(">H", PORT) + bytes(12)
    return [["socket", w.af, "SOCK_DGRAM", 0], ["bindbytes", sockaddr.hex()]]


def its_connection(kind: int) -> Callable[[World], Steps]:
    """A connection of whoever asks, from a port that nobody has reserved."""

    def steps(w: World) -> Steps:
        made = ["socket", w.af, *_KINDS[kind]]
        first = [["send", b"first".hex(), "", 0]] if kind == UDP else []
        start = [["bind", w.here, CONNECTION], ["connect", w.there, SINK]]
        # ended by a reset: no TIME_WAIT is in the next one's way
        abort = ["set", "SOL_SOCKET", "SO_LINGER", struct.pack("=ii", 1, 0).hex()]
        return [made, abort, *start, *first, ["hold"]]

    return steps


def icmp_error(w: World, kind: tuple[int, int], rest: bytes) -> bytes:
    """An ICMP error with its checksum: NAT drops one about a connection if it is wrong."""
    body = struct.pack(">BBHI", *kind, 0, 0) + rest
    # RFC 8200, 8.1: the sum of ICMPv6 covers a pseudo header, too
    pseudo = pton(w.here) + pton(w.there) + struct.pack(">II", len(body), w.icmp)
    found = total(body if w.family == 4 else pseudo + body)
    return body[:2] + struct.pack(">H", found) + body[4:]


def unreachable(w: World) -> bytes:
    """A port unreachable about what the peer answered to a's connection."""
    back = struct.pack(">HHHH", SINK, CONNECTION, 8 + len(w.token), 0) + w.token
    swapped = replace(w, here=w.there, there=w.here)
    quoted = ip(swapped, UDP, back)
    if w.family == 4:  # the kernel fills this in only for the outer header
        quoted = quoted[:10] + struct.pack(">H", total(quoted[:20])) + quoted[12:]
    return ip(w, w.icmp, icmp_error(w, (3, 3) if w.family == 4 else (1, 4), quoted))


def redirect(w: World) -> bytes:
    """An ICMP redirect about no connection in particular."""
    return ip(w, w.icmp, icmp_error(w, (5, 1) if w.family == 4 else (137, 0), w.token))


def packet_socket(family: int | str, kind: int | str, proto: int):
    """A socket that sees and sends frames."""
    return lambda w: [["socket", family, kind, proto]]


def uring(*operation) -> Callable[[World], list]:
    """A step by io_uring."""
    return lambda w: ["uring", *operation]


def uring_datagram(value: int, punt: int):
    """A datagram with a cmsg SO_MARK, sent by io_uring."""
    return lambda w: [
        ["socket", w.af, "SOCK_DGRAM", 0],
        ["uring", "send", f"={w.token.hex()}", w.there, SINK, value, punt],
    ]


def uring_raw(port: int, punt: int):
    """A raw packet, the socket and the sending by io_uring."""

    def steps(w: World) -> Steps:
        family = socket.AF_INET if w.family == 4 else socket.AF_INET6
        packet = ip(w, UDP, udp(w, port)).hex()
        return [
            ["uring", "open", family, 3, 255, punt],
            ["uring", "send", f"={packet}", w.there, 0, -1, punt],
        ]

    return steps


# -- the table ----------------------------------------------------------------

_REUSEPORT = ["set", "SOL_SOCKET", "SO_REUSEPORT", 1]
_EVERYBODY_ELSE = ("b", "c", "f", "node", "user")
_NAMES = {TCP: "tcp", UDP: "udp", SCTP: "sctp", -SCTP: "sctp one-to-many"}


def _bind_cases() -> list[Case]:
    def case(name, kind, steps, refused=_EVERYBODY_ELSE, allowed=("a",), **more):
        needs = "sctp" if abs(kind) == SCTP else ""
        if needs:  # its own bind() and hook, but the same policy: not everybody again
            refused = tuple(role for role in refused if role in ("b", "node"))
        more = {"how": "EACCES", "at": "bind", "needs": needs, **more}
        return Case(f"{_NAMES[kind]} {name}", steps, refused, allowed, **more)

    found = []
    for kind in (TCP, UDP, SCTP, -SCTP):
        found += [
            case("bind to all addresses", kind, binds(kind, PORT)),
            case("bind to one address", kind, binds(kind, PORT, "here")),
            case("bind within a range", kind, binds(kind, RANGE[1])),
            case("bind to the port next to a range", kind, binds(kind, RANGE[1] + 1), (), SLICES),
            case(
                "bind to a port of one address",
                kind,
                binds(kind, ON_ADDRESS, "here"),
            ),
            case("bind to all where one address is held", kind, binds(kind, ON_ADDRESS)),
            case(
                "bind to a v4-mapped address",
                kind,
                binds(kind, PORT, "here", v6=True),
                families=(4,),
            ),
            case("bind to a's address", kind, binds(kind, 0, "mine")),
        ]
    for kind in (TCP, UDP):
        reuse = binds(kind, PORT, "", _REUSEPORT)
        free = binds(kind, PORT, "nowhere", ["set", _FREEBIND])
        transparent = binds(kind, PORT, "nowhere", ["set", _TRANSPARENT])
        found += [
            case(
                "bind with SO_REUSEPORT beside the owner",
                kind,
                reuse,
                # the kernel lets only the same user share a port
                refused=_EVERYBODY_ELSE[:-1],
                before=("a", lambda w, reuse=reuse: [*reuse(w), ["hold"]]),
            ),
            case("bind with IP_FREEBIND", kind, free),
            # an ordinary user may not set the option
            case("bind with IP_TRANSPARENT", kind, transparent, ("b", "c", "f", "node")),
            case(
                "bind to a v4-mapped address that a holds",
                kind,
                binds(kind, FREE, "mine", v6=True),
                families=(4,),
            ),
            case(
                "bind to ::, which is IPv4's too",
                kind,
                binds(kind, PORT, v6=True),
                families=(4,),
            ),
            case(
                "bind to another address than the one that is held",
                kind,
                lambda w, kind=kind: [
                    ["socket", w.af, *_KINDS[kind]],
                    ["bind", "127.0.0.1" if w.family == 4 else "::1", ON_ADDRESS],
                ],
                (),
                (*SLICES, "node", "user"),
            ),
        ]
        found += [
            Case(
                f"{_NAMES[kind]} bind by io_uring{' in a kernel thread' * punt}",
                lambda w, kind=kind, punt=punt: [
                    ["socket", w.af, *_KINDS[kind]],
                    ["uring", "bind", w.wild, PORT, punt],
                ],
                _EVERYBODY_ELSE,
                ("a",),
                "EACCES",
                "uring",
                needs="uring-bind",
            )
            for punt in (0, 1)
        ]
    found.append(
        case("bind with AF_UNSPEC", UDP, unspec_bind, families=(4,), at="bindbytes"),
    )
    return found


def _socket_cases() -> list[Case]:
    found = [
        Case(
            f"raw socket of protocol {proto}",
            lambda w, proto=proto: [
                ["socket", w.af, "SOCK_RAW", w.icmp if proto == "icmp" else proto]
            ],
            ("c",),
            ("a", "b", "f", "node"),
            "EACCES",
            "socket",
        )
        for proto in ("icmp", TCP, UDP, SCTP, 47, 255)
    ]
    found += [
        Case(
            f"raw socket by io_uring{' in a kernel thread' * punt}",
            lambda w, punt=punt: [["uring", "open", 2 if w.family == 4 else 10, 3, 255, punt]],
            ("c",),
            ("a", "b", "f", "node"),
            "EACCES",
            "uring",
        )
        for punt in (0, 1)
    ]
    kinds = {
        "AF_PACKET, SOCK_RAW": ("AF_PACKET", "SOCK_RAW", 0x0300),
        "AF_PACKET, SOCK_DGRAM": ("AF_PACKET", "SOCK_DGRAM", 0x0008),
        "AF_PACKET, SOCK_PACKET": ("AF_PACKET", 10, 0x0300),
        "AF_INET, SOCK_PACKET": ("AF_INET", 10, 0x0300),
        "AF_XDP": (44, "SOCK_RAW", 0),
    }
    found += [
        Case(
            f"packet socket ({name})",
            packet_socket(*what),
            ("a", "b", "c"),
            ("f", "node"),
            "EACCES",
            "socket",
            families=(4,),
            needs="lsm",
        )
        for name, what in kinds.items()
    ]
    found.append(
        Case(
            "MPTCP socket",
            lambda w: [["socket", w.af, "SOCK_STREAM", 262]],
            SLICES,
            ("node", "user"),
            "EPROTONOSUPPORT",
            "socket",
        )
    )
    found.append(Case("ping", sends(kind=ICMP), (), (*SLICES, "node", "user")))
    return found


def _source_cases() -> list[Case]:
    """Who may send from where."""

    def bound(address: str) -> Callable[[World], list]:
        return lambda w: ["bind", getattr(w, address), 0]

    others = ("b", "f", "node")
    all_others = ("b", "c", "f", "node", "user")
    return [
        Case("datagram from a's address by PKTINFO", sends(cmsg=pktinfo), all_others, ("a",)),
        Case(
            "datagram from a's address by IPV6_PKTINFO, v4-mapped",
            mapped_pktinfo,
            all_others,
            ("a",),
            families=(4,),
        ),
        Case(
            "datagram from a's port of one address, bound elsewhere, by PKTINFO",
            sends(
                lambda w: ["bind", "127.0.0.1" if w.family == 4 else "::1", ON_ADDRESS],
                cmsg=lambda w: pktinfo(w, w.here),
            ),
            all_others,
            ("a",),
        ),
        Case(
            "echo request from a's address by PKTINFO",
            sends(kind=ICMP, cmsg=pktinfo),
            all_others,
            ("a",),
            families=(4,),  # IPv6's takes no source from there
        ),
        Case(
            "echo request from a's address, bound",
            sends(bound("mine"), kind=ICMP),
            all_others,
            ("a",),
        ),
        Case(
            "raw socket bound to a's address",
            lambda w: [
                ["socket", w.af, "SOCK_RAW", UDP],
                ["bind", w.mine, 0],
                ["send", udp(w, PORT_B).hex(), w.there, 0],
            ],
            others,
            (),
        ),
        Case(
            "raw packet from a's address",
            raw(lambda w: ip(w, UDP, udp(w, PORT), w.mine)),
            others,
            ("a",),
        ),
        Case(
            "raw echo request from a's address",
            raw(lambda w: ip(w, w.icmp, echo(w), w.mine)),
            others,
            ("a",),
        ),
        Case(
            "raw packet from an address that is not the node's",
            raw(lambda w: ip(w, UDP, udp(w, FREE), w.nowhere)),
            ("a", "b", "f"),
            ("node",),
        ),
        Case(
            "datagram from an address that is not the node's (IP_TRANSPARENT)",
            sends(
                lambda w: ["set", *_TRANSPARENT[w.family], 1],
                bound("nowhere"),
            ),
            SLICES,
            ("node",),
        ),
        Case(
            "datagram from an address that is not the node's (IP_FREEBIND)",
            sends(lambda w: ["set", *_FREEBIND[w.family], 1], bound("nowhere")),
            SLICES,
            ("node",),
            families=(6,),  # IPv4 finds no route from there
        ),
    ]


def _raw_cases() -> list[Case]:
    reserved = [
        Case(
            f"raw packet ({_NAMES[proto]}) from a reserved port",
            raw(lambda w, proto=proto, make=make: ip(w, proto, make(w, PORT))),
            OTHERS,
            ("a",),
            tracked=False,
        )
        for proto, make in ((TCP, tcp), (UDP, udp), (SCTP, sctp))
    ]
    reserved += [
        Case(
            f"raw packet ({_NAMES[proto]}) without its header from a reserved port",
            raw(lambda w, make=make: make(w, PORT), proto),
            OTHERS,
            ("a",),
            tracked=False,
        )
        for proto, make in ((TCP, tcp), (UDP, udp), (SCTP, sctp))
    ]
    return [
        *reserved,
        Case(
            "raw packet from a port of one address",
            raw(lambda w: ip(w, UDP, udp(w, ON_ADDRESS))),
            OTHERS,
            ("a",),
        ),
        Case(
            "raw packet with IP options from a reserved port",
            raw(lambda w: ip(w, UDP, udp(w, PORT), options=b"\1\1\1\0")),
            OTHERS,
            ("a",),
            families=(4,),
        ),
        *(
            Case(
                f"raw packet behind extension header {header} from a reserved port",
                raw(
                    lambda w, header=header: ip(
                        w, header, struct.pack(">BBHI", UDP, 0, 0x0104, 0) + udp(w, PORT)
                    )
                ),
                OTHERS,
                (),
                families=(6,),
            )
            for header in (0, 60)
        ),
        Case(
            "raw packet in two fragments from a reserved port",
            lambda w: [
                ["socket", w.af, "SOCK_RAW", 255],
                ["send", fragment(w, UDP, udp(w, PORT) + bytes(8), 0, True).hex(), w.there, 0],
                ["send", fragment(w, UDP, w.token, 3, False).hex(), w.there, 0],
            ],
            OTHERS,
            ("a",),
            families=(4,),
        ),
        Case(
            "later fragment alone (IP_NODEFRAG)",
            raw(lambda w: fragment(w, UDP, w.token, 3, False), 255, ["set", 0, 22, 1]),
            ("a", "b"),
            ("f", "node"),
            families=(4,),
        ),
        Case(
            "raw packet from a port nobody holds",
            raw(lambda w: ip(w, UDP, udp(w, FREE))),
            ("a", "b"),
            ("f", "node"),
        ),
        Case(
            "raw packet from b's port",
            raw(lambda w: ip(w, TCP, tcp(w, PORT_B))),
            ("a", "f", "node"),
            ("b",),
            tracked=False,
        ),
        Case(
            "raw packet of a protocol without ports",
            raw(lambda w: ip(w, 47, struct.pack(">HH", 0, 0x0800) + w.token)),
            ("a", "b"),
            ("f", "node"),
        ),
        Case(
            "raw echo request",
            raw(lambda w: echo(w), ICMP),
            (),
            ("a", "b", "f", "node"),
            families=(4,),
        ),
        Case(
            "raw echo request",
            raw(lambda w: echo(w), ICMP6),
            (),
            ("a", "b", "f", "node"),
            families=(6,),
        ),
        Case(
            "raw echo reply",
            raw(lambda w: ip(w, w.icmp, echo(w, reply=True))),
            ("a", "b"),
            ("f", "node"),
        ),
        Case(
            "raw ICMP redirect",
            raw(redirect),
            ("a", "b"),
            ("f", "node"),
        ),
        *(
            Case(
                f"raw packet into a's connection ({_NAMES[proto]})",
                raw(lambda w, proto=proto, make=make: ip(w, proto, make(w, CONNECTION, SINK))),
                ("b", "f"),
                allowed,
                before=("a", its_connection(proto)),
            )
            # a holds no grant of that port: only ordinary sockets may use it
            for proto, make, allowed in ((TCP, tcp, ()), (UDP, udp, ()))
        ),
        Case(
            "raw ICMP error about a's connection",
            raw(unreachable),
            ("b", "f"),
            (),
            before=("a", its_connection(UDP)),
        ),
    ]


def _mark_cases() -> list[Case]:
    high = 0x50000
    found = []
    for name, steps, who in (
        ("datagram", lambda m: sends(cmsg=mark(m)), ("b", "c", "f", "node")),
        ("echo request", lambda m: sends(kind=ICMP, cmsg=mark(m)), ("b", "c", "f", "node")),
        ("datagram by io_uring", lambda m: uring_datagram(m, 0), ("b", "c", "f", "node")),
        (
            "datagram by io_uring in a kernel thread",
            lambda m: uring_datagram(m, 1),
            ("b", "c", "f", "node"),
        ),
    ):
        found += [
            Case(f"{name} with a's mark by cmsg", steps(A), who, ("a",)),
            Case(f"{name} with b's mark and other bits by cmsg", steps(high | B), (), ("b",)),
        ]
    found += [
        Case(
            f"raw packet by io_uring{' in a kernel thread' * punt} from a reserved port",
            uring_raw(PORT, punt),
            OTHERS,
            ("a",),
        )
        for punt in (0, 1)
    ]
    return found


def cases() -> list[Case]:
    """The whole table."""
    return [*_bind_cases(), *_socket_cases(), *_source_cases(), *_raw_cases(), *_mark_cases()]


def table(without: tuple[str, ...] = (), families: tuple[int, ...] = (4, 6)) -> list:
    """(case, family) for pytest, without those that need what is named."""
    import pytest

    found = []
    for case in cases():
        optional = case.needs == "uring-bind"
        marks = [pytest.mark.may_skip("not every kernel has it")] if optional else []
        found += [
            pytest.param(case, family, id=f"{case.name}, v{family}", marks=marks)
            for family in case.families
            if family in families and (case.needs not in without or not case.needs)
        ]
    return found
