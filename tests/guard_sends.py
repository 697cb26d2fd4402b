"""What one slice must not send in another's name: rows of the table of guard_cases.py."""

import struct
from collections.abc import Callable

from guard_attempts import (
    CONNECTION,
    FREE,
    NAMES,
    ON_ADDRESS,
    OTHERS,
    PORT,
    PORT_B,
    SINK,
    SLICES,
    A,
    B,
    Case,
    group,
    loopback,
    mapped_from_here,
    uring_datagram,
    uring_raw,
)
from vnet.testing.packets import (
    ICMP,
    ICMP6,
    SCTP,
    TCP,
    UDP,
    World,
    echo,
    fragment,
    ip,
    redirect,
    sctp,
    tcp,
    udp,
    unreachable,
)
from vnet.testing.steps import (
    FREEBIND,
    TRANSPARENT,
    Steps,
    its_connection,
    mapped_pktinfo,
    mark,
    pktinfo,
    raw,
    sends,
)


def sources() -> list[Case]:
    """Who may send from where."""

    def bound(address: str) -> Callable[[World], list]:
        return lambda w: ["bind", getattr(w, address), 0]

    def from_here(to: Callable[[World], str], port: int = 0) -> Callable[[World], Steps]:
        """Bound to an address, and from the node's own by PKTINFO."""
        return sends(lambda w: ["bind", to(w), port], cmsg=lambda w: pktinfo(w, w.here))

    others = ("b", "f", "node")
    all_others = ("b", "c", "f", "node", "user")
    everybody = (*SLICES, "node", "user")
    talking = ("a", its_connection(UDP, CONNECTION))
    return [
        Case(
            "datagram from another address than the one bound to, by PKTINFO",
            from_here(loopback),
            SLICES,
            ("node", "user"),
        ),
        Case(
            "datagram by PKTINFO, v4-mapped",
            mapped_from_here,
            SLICES,
            ("node", "user"),
            families=(4,),
        ),
        Case(
            "datagram by PKTINFO, bound to all addresses",
            from_here(lambda w: w.wild),
            (),
            everybody,
        ),
        Case("datagram by PKTINFO, bound to a group", from_here(group), (), everybody),
        Case(
            "datagram by PKTINFO, bound to a broadcast address",
            from_here(lambda w: w.here.rpartition(".")[0] + ".255"),
            (),
            everybody,
            families=(4,),
        ),
        Case(
            "datagram into a's connection, by PKTINFO",
            from_here(loopback, CONNECTION),
            ("b", "c", "f"),
            (),
            before=talking,
        ),
        Case(
            "datagram into a's connection, by PKTINFO, bound to a group",
            from_here(group, CONNECTION),
            ("b", "c", "f"),
            (),
            before=talking,
        ),
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
        *(
            Case(
                f"{name} socket's bind to a's address",
                lambda w, kind=kind, proto=proto: [
                    ["socket", w.af, kind, proto or w.icmp],
                    ["bind", w.mine, 0],
                ],
                refused,
                ("a",),
                "EACCES",
                "bind",
                needs="lsm",
            )
            for name, kind, proto, refused in (
                ("ping", "SOCK_DGRAM", 0, all_others),
                ("raw", "SOCK_RAW", UDP, others),
            )
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
            "datagram from an address that is not the node's (IPTRANSPARENT)",
            sends(
                lambda w: ["set", *TRANSPARENT[w.family], 1],
                bound("nowhere"),
            ),
            SLICES,
            ("node",),
        ),
        Case(
            "datagram from an address that is not the node's (IPFREEBIND)",
            sends(lambda w: ["set", *FREEBIND[w.family], 1], bound("nowhere")),
            SLICES,
            ("node",),
            families=(6,),  # IPv4 finds no route from there
        ),
    ]


def raw_packets() -> list[Case]:
    """What raw sockets may send."""
    reserved = [
        Case(
            f"raw packet ({NAMES[proto]}) from a reserved port",
            raw(lambda w, proto=proto, make=make: ip(w, proto, make(w, PORT))),
            OTHERS,
            ("a",),
            tracked=False,
        )
        for proto, make in ((TCP, tcp), (UDP, udp), (SCTP, sctp))
    ]
    reserved += [
        Case(
            f"raw packet ({NAMES[proto]}) without its header from a reserved port",
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
                f"raw packet into a's connection ({NAMES[proto]})",
                raw(lambda w, proto=proto, make=make: ip(w, proto, make(w, CONNECTION, SINK))),
                ("b", "f"),
                allowed,
                before=("a", its_connection(proto, CONNECTION)),
            )
            # a holds no grant of that port: only ordinary sockets may use it
            for proto, make, allowed in ((TCP, tcp, ()), (UDP, udp, ()))
        ),
        Case(
            "raw ICMP error about a's connection",
            raw(lambda w: unreachable(w, CONNECTION)),
            ("b", "f"),
            (),
            before=("a", its_connection(UDP, CONNECTION)),
        ),
    ]


def marks() -> list[Case]:
    """Which marks a single packet may ask for."""
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
