"""What one slice must not do to another: the table of attempts.

One row is one attempt, the same for everybody; it says who is refused and how,
and who is not (guard_attempts.py). The rows are data, so that the host's kernel
and the guests', and both data paths, are tested by the same ones
(tests/netns/test_guard_*.py, tests/vm/test_guard_*.py). What is sent in
another's name is in guard_sends.py.
"""

import guard_sends
from guard_attempts import FREE, NAMES, ON_ADDRESS, PORT, RANGE, SLICES, Case, unspec_bind
from vnet.testing.packets import ICMP, SCTP, TCP, UDP
from vnet.testing.steps import FREEBIND, KINDS, TRANSPARENT, binds, packet_socket, sends

_REUSEPORT = ["set", "SOL_SOCKET", "SO_REUSEPORT", 1]
_EVERYBODY_ELSE = ("b", "c", "f", "node", "user")


def _bind_cases() -> list[Case]:
    def case(name, kind, steps, refused=_EVERYBODY_ELSE, allowed=("a",), **more):
        needs = "sctp" if abs(kind) == SCTP else ""
        if needs:  # its own bind() and hook, but the same policy: not everybody again
            refused = tuple(role for role in refused if role in ("b", "node"))
        more = {"how": "EACCES", "at": "bind", "needs": needs, **more}
        return Case(f"{NAMES[kind]} {name}", steps, refused, allowed, **more)

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
        free = binds(kind, PORT, "nowhere", ["set", FREEBIND])
        transparent = binds(kind, PORT, "nowhere", ["set", TRANSPARENT])
        found += [
            case(
                "bind with SO_REUSEPORT beside the owner",
                kind,
                reuse,
                # the kernel lets only the same user share a port
                refused=_EVERYBODY_ELSE[:-1],
                before=("a", lambda w, reuse=reuse: [*reuse(w), ["hold"]]),
            ),
            case("bind with IPFREEBIND", kind, free),
            # an ordinary user may not set the option
            case("bind with IPTRANSPARENT", kind, transparent, ("b", "c", "f", "node")),
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
                    ["socket", w.af, *KINDS[kind]],
                    ["bind", "127.0.0.1" if w.family == 4 else "::1", ON_ADDRESS],
                ],
                (),
                (*SLICES, "node", "user"),
            ),
        ]
        found += [
            Case(
                f"{NAMES[kind]} bind by io_uring{' in a kernel thread' * punt}",
                lambda w, kind=kind, punt=punt: [
                    ["socket", w.af, *KINDS[kind]],
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
        "PPPoE": (24, "SOCK_STREAM", 0),
        "AF_LLC": (26, "SOCK_DGRAM", 0),
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


def cases() -> list[Case]:
    """The whole table."""
    return [
        *_bind_cases(),
        *_socket_cases(),
        *guard_sends.sources(),
        *guard_sends.raw_packets(),
        *guard_sends.marks(),
    ]


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
