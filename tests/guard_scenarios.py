"""What takes more than one attempt: for the host and the guests alike.

Each function is a test of a guarded node (tests/guardbed.py); the table of
single attempts is tests/guard_cases.py. What raw sockets hear is in
guard_flows.py, what changes of a policy do in guard_updates.py.
"""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import guard_flows
import guard_updates
from guard_attempts import PORT, PORT_B, RANGE, SINK, XIDS
from guardbed import Guarded
from vnet.testing import nflog
from vnet.testing.packets import SCTP, TCP, UDP, World, ip, pton, udp
from vnet.testing.steps import Steps

USER_NS, NET_NS = 0x10000000, 0x40000000
CLOSED = 4998
"""A port of the peer that refuses: a connection from there leaves no TIME_WAIT behind."""
LAST = RANGE[1] + 1
"""The one port of a nearly full range that nobody has reserved."""
Scenario = Callable[[Guarded, int], None]


# -- ports the kernel picks ---------------------------------------------------


@contextmanager
def nearly_full(bed: Guarded) -> Iterator[None]:
    """A local port range of which a holds all but one."""
    before = bed.node.ns.run("sysctl", "-n", "net.ipv4.ip_local_port_range").stdout
    bed.node.ns.sysctl(net__ipv4__ip_local_port_range=f"{RANGE[0]} {LAST}")
    try:
        yield
    finally:
        bed.node.ns.sysctl(net__ipv4__ip_local_port_range=before.strip())


def picks(w: World, sctp: bool) -> dict[str, Steps]:
    """Every way in which the kernel picks a port."""
    stream, datagram = ["socket", w.af, "SOCK_STREAM"], ["socket", w.af, "SOCK_DGRAM"]
    late = ["set", 0, 24, 1]  # IP_BIND_ADDRESS_NO_PORT
    to = ["connect", w.there, CLOSED]
    found = {
        "tcp listen": [stream, ["listen"], ["name"]],
        "tcp connect": [stream, to, ["name"]],
        "tcp bind to 0": [stream, ["bind", w.wild, 0], ["name"]],
        "tcp bind without a port, connect": [stream, late, ["bind", w.here, 0], to, ["name"]],
        "udp send": [datagram, ["send", "78", w.there, SINK], ["name"]],
        "udp connect": [datagram, ["connect", w.there, SINK], ["name"]],
        "udp bind to 0": [datagram, ["bind", w.wild, 0], ["name"]],
    }
    if sctp:
        one = ["socket", w.af, "SOCK_STREAM", SCTP]
        found["sctp listen"] = [one, ["listen"], ["name"]]
        found["sctp bind to 0"] = [one, ["bind", w.wild, 0], ["name"]]
    return found


def the_kernel_never_picks_a_reserved_port(bed: Guarded, family: int) -> None:
    with nearly_full(bed):
        for role in ("c", "node", "user"):
            for name, steps in picks(bed.world(family), "sctp" in bed.has).items():
                said = bed.agents[role].tries(steps)
                assert said["ok"] and said["got"][0][1] == LAST, (role, name, said)
        # who may bind to it still has to ask for it
        w = bed.world(family)
        owner = bed.agents["a"].tries([["socket", w.af, "SOCK_STREAM"], ["bind", w.wild, RANGE[0]]])
        assert owner["ok"], owner


def with_the_last_free_port_taken_there_is_none(bed: Guarded, family: int) -> None:
    w = bed.world(family)
    taken: Steps = [["socket", w.af, "SOCK_STREAM"], ["bind", w.wild, LAST], ["listen"]]
    narrow = ["set", 0, 51, RANGE[0] | RANGE[1] << 16]  # IP_LOCAL_PORT_RANGE, 6.3
    with nearly_full(bed):
        with bed.agents["b"].holding([*taken, ["hold"]]):
            for name, steps in picks(w, False).items():
                if name.startswith("tcp"):
                    said = bed.agents["c"].tries(steps)
                    assert said.get("errno") in ("EADDRINUSE", "EADDRNOTAVAIL"), (name, said)
        stream = ["socket", w.af, "SOCK_STREAM"]
        for steps in ([["listen"]], [["connect", w.there, CLOSED]]):
            said = bed.agents["c"].tries([stream, narrow, *steps])
            expected = ("EADDRINUSE", "EADDRNOTAVAIL", "ENOPROTOOPT")
            assert said.get("errno") in expected, said


# -- marks --------------------------------------------------------------------


def so_mark_changes_other_bits_only(bed: Guarded, family: int) -> None:
    high = 0x50000
    asked = high | XIDS["a"]
    forms = {
        "an int": ["set", "SOL_SOCKET", "SO_MARK", asked],
        "two pages": [
            "set",
            "SOL_SOCKET",
            "SO_MARK",
            struct.pack("=I", asked).hex().ljust(16384, "0"),
        ],
        "io_uring": ["uring", "setsockopt", 1, 36, asked],
    }
    for role in ("b", "c", "f", "node", "a"):
        for name, form in forms.items():
            w = bed.world(family)
            steps = [["socket", w.af, "SOCK_DGRAM"], form, ["get", "SOL_SOCKET", "SO_MARK"]]
            with nflog.capture(bed.node.ns, hooks=("postrouting",)) as log:
                said = bed.agents[role].tries([*steps, ["send", w.token.hex(), w.there, SINK]])
                marks = [p.mark for p in log.seen() if w.token in p.payload]
            if name == "io_uring" and said.get("errno") in ("EOPNOTSUPP", "ENOTSUP"):
                continue  # 6.7
            assert said["ok"], (role, name, said)
            assert said["got"] == [high | XIDS[role]], (role, name)
            assert marks == [high | XIDS[role]], (role, name)


def a_listener_cannot_give_its_connections_away(bed: Guarded, family: int) -> None:
    w = bed.world(family)
    forged = ["set", "SOL_SOCKET", "SO_MARK", XIDS["a"]]
    b, peer = bed.agents["b"], bed.agents["peer"]
    listener = b.begins(
        [
            ["socket", w.af, "SOCK_STREAM"],
            *(forged, ["set", "SOL_SOCKET", "SO_REUSEADDR", 1]),
            *(["bind", w.here, PORT_B], ["listen"], ["go"], ["accept"]),
            *(["get", "SOL_SOCKET", "SO_MARK"], ["receive", w.token.hex()]),
        ]
    )
    assert b.answer(listener)["ok"]
    with nflog.capture(bed.node.ns) as log:
        client = [["socket", w.af, "SOCK_STREAM"], ["connectwait", w.here, PORT_B]]
        assert peer.tries([*client, ["send", w.token.hex(), "", 0]])["ok"]
        said = b.answer(listener)
        xids = {(p.prefix, p.xid) for p in log.seen() if PORT_B in (p.sport, p.dport)}
    assert said["ok"] and said["got"][0] == XIDS["b"], said
    assert xids == {("input", XIDS["b"]), ("postrouting", XIDS["b"])}


# -- sockets and processes that move ------------------------------------------


def handed_over(bed: Guarded, giver: str, made: list, taker: str, then: list) -> dict:
    """What ``taker`` comes to with a socket that ``giver`` has made."""
    door = str(bed.node.base / f"door{next(bed.agents[taker].ids)}")
    Path(door).unlink(missing_ok=True)
    waiting = bed.agents[taker].begins([["take", door], *then])
    assert bed.agents[taker].answer(waiting)["ok"]
    given = bed.agents[giver].tries([*made, ["give", door]])
    assert given["ok"], given
    return bed.agents[taker].answer(waiting)


def a_socket_stays_its_makers_whoever_holds_it(bed: Guarded, family: int) -> None:
    w = bed.world(family)
    datagram, mine = ["socket", w.af, "SOCK_DGRAM"], ["bind", w.wild, PORT]
    send = ["send", w.token.hex(), w.there, SINK]
    # a's own: c uses it as a's, and what it sends is a's
    with nflog.capture(bed.node.ns, hooks=("postrouting",)) as log:
        said = handed_over(bed, "a", [datagram, mine], "c", [send])
        marks = [p.mark for p in log.seen() if w.token in p.payload]
    assert said["ok"] and marks == [XIDS["a"]], said
    assert handed_over(bed, "a", [datagram], "c", [mine])["ok"]
    # not a's: a's process cannot make it so
    said = handed_over(bed, "c", [datagram], "a", [mine])
    assert (said.get("at"), said.get("errno")) == ("bind", "EACCES"), said
    forge = [["set", "SOL_SOCKET", "SO_MARK", XIDS["a"]], ["get", "SOL_SOCKET", "SO_MARK"]]
    assert handed_over(bed, "c", [datagram], "a", forge)["got"] == [XIDS["c"]]
    # a raw one is no more to c than it was to b
    for number, out in ((PORT_B, True), (PORT, False)):
        w = bed.world(family)
        packet = ip(w, UDP, udp(w, number)).hex()
        raw = [["socket", w.af, "SOCK_RAW", 255]]
        handed_over(bed, "b", raw, "c", [["send", packet, w.there, 0]])
        assert bool(bed.seen(w.token, family)) is out, number


def a_socket_stays_with_the_slice_that_its_process_leaves(bed: Guarded, family: int) -> None:
    w = bed.world(family)
    made, mine = ["socket", w.af, "SOCK_DGRAM"], ["bind", w.wild, PORT]
    raw = ["socket", w.af, "SOCK_RAW", UDP]

    def moved(role: str, to: str, before: list, after: list) -> dict:
        return bed.agents[role].tries([*before, ["cgroup", str(bed.slices[to].path)], *after])

    refused = {"at": "bind", "errno": "EACCES"}
    assert moved("b", "a", [made], [mine]).items() >= refused.items()
    assert moved("b", "a", [], [made, mine])["ok"]
    assert moved("a", "c", [made], [mine])["ok"]
    assert moved("a", "c", [], [made, mine]).items() >= refused.items()
    assert moved("a", "c", [], [raw]).items() >= {"at": "socket", "errno": "EACCES"}.items()
    assert moved("c", "a", [], [raw])["ok"]
    # a process that moved while it held a connection of its old slice
    with nflog.capture(bed.node.ns, hooks=("postrouting",)) as log:
        assert moved("b", "a", [made], [["send", w.token.hex(), w.there, SINK]])["ok"]
        assert [p.mark for p in log.seen() if w.token in p.payload] == [XIDS["b"]]


def namespaces_made_inside_a_slice_open_nothing(bed: Guarded, family: int) -> None:
    w = bed.world(family)
    mine = [["socket", w.af, "SOCK_STREAM"], ["bind", w.wild, PORT]]
    refused = {"ok": False, "at": "socket", "errno": "EACCES"}
    for flags in (NET_NS, USER_NS, USER_NS | NET_NS):
        for first in ([], [["uid", 65534]]):
            if first and not flags & USER_NS:
                continue  # an ordinary user makes no other namespace without that one
            c, enter = bed.agents["c"], [["unchroot"], *first, ["unshare", flags]]
            entered = c.tries(enter)
            assert entered["ok"], (flags, first, entered)
            said = c.tries([*enter, ["socket", w.af, "SOCK_RAW", 255]])
            # without the capability over its namespace it does not come that far
            expected = ("EACCES", "EPERM") if flags == USER_NS else ("EACCES",)
            assert not said["ok"] and said["errno"] in expected, (flags, first, said)
            said = c.tries([*enter, *mine])
            if flags & NET_NS:  # its ports are nobody's
                assert said["ok"], said
            else:
                assert (said.get("at"), said.get("errno")) == ("bind", "EACCES"), said
            if "mptcp" in bed.has:
                said = c.tries([*enter, ["socket", w.af, "SOCK_STREAM", 262]])
                assert said["errno"] == "EPROTONOSUPPORT"
            if "lsm" in bed.has and flags & NET_NS:
                said = c.tries([*enter, ["socket", "AF_PACKET", "SOCK_RAW", 0x0300]])
                assert said.items() >= refused.items(), said
    # with the grant it may, there too
    said = bed.agents["b"].tries([["unshare", NET_NS], ["socket", w.af, "SOCK_RAW", 255]])
    assert said["ok"], said


# -- sockets that the kernel makes ---------------------------------------------


def sockets_that_the_kernel_makes_for_others_are_guarded_too(bed: Guarded, family: int) -> None:
    """SMC falls back to TCP, and RxRPC is over UDP: on sockets that run no sock_create hook."""
    w = bed.world(family)
    inet, at = (2, 16) if family == 4 else (10, 28)
    anywhere = struct.pack("=H", inet) + struct.pack(">H", PORT) + bytes(at - 4)
    smc = [["socket", 43, 1, 0 if family == 4 else 1], ["bindbytes", anywhere.hex()]]
    sockaddr = struct.pack("=HHHH", 33, 0, 2, at) + anywhere
    rxrpc = [["socket", 33, 2, inet], ["bindbytes", sockaddr.ljust(36, b"\0").hex()]]
    for steps in (smc, rxrpc):
        said = bed.agents["a"].tries(steps)
        if said.get("errno") in ("EAFNOSUPPORT", "EPROTONOSUPPORT"):
            continue  # nobody has it
        assert said["ok"], (steps[0], said)
        for role in ("b", "c", "f", "node"):
            said = bed.agents[role].tries(steps)
            assert said.get("errno") == "EACCES", (steps[0], role, said)
    there = struct.pack("=H", inet) + struct.pack(">H", SINK)
    rest = bytes(4) + pton(w.there) + bytes(4) if family == 6 else pton(w.there)
    connect = ["connectbytes", (there + rest).ljust(at, b"\0").hex()]
    with nflog.capture(bed.node.ns, hooks=("postrouting",)) as log:
        said = bed.agents["c"].tries([smc[0], connect])
        bed.seen(w.token, family)
        marks = {p.mark for p in log.seen() if p.proto == TCP and p.dport == SINK}
    assert marks <= {XIDS["c"]}, (marks, said)


def slices_have_families_whose_packets_are_their_own(bed: Guarded) -> None:
    """Any other passes no rule, or speaks through sockets that the kernel makes."""
    own = {1, 2, 10, 15, 16, 38, 40}  # UNIX, INET, INET6, KEY, NETLINK, ALG, VSOCK
    the_kernels = {21, 30, 33, 43}  # RDS, TIPC, RXRPC, SMC
    said = [bed.agents["c"].tries([["socket", family, "SOCK_DGRAM", 0]]) for family in range(46)]
    errors = [one.get("errno") for one in said]
    assert {n for n, error in enumerate(errors) if error != "EACCES"} == own | the_kernels, errors
    assert {errors[n] for n in the_kernels} == {"EAFNOSUPPORT"}
    assert [n for n in (1, 2, 10) if not said[n]["ok"]] == []


BY_PACKET: tuple[Scenario, ...] = (
    so_mark_changes_other_bits_only,
    a_listener_cannot_give_its_connections_away,
    a_socket_stays_its_makers_whoever_holds_it,
    a_socket_stays_with_the_slice_that_its_process_leaves,
    guard_flows.a_forged_packet_is_not_counted_to_the_connection,
    guard_flows.a_socket_bound_elsewhere_takes_no_connection_over,
    guard_flows.a_ping_socket_hears_no_reply_to_anothers_raw_ping,
    sockets_that_the_kernel_makes_for_others_are_guarded_too,
)
"""Those that depend on who writes the marks."""

SCENARIOS: tuple[Scenario, ...] = (
    *BY_PACKET,
    guard_flows.a_raw_socket_hears_no_errors_about_others,
    the_kernel_never_picks_a_reserved_port,
    with_the_last_free_port_taken_there_is_none,
    namespaces_made_inside_a_slice_open_nothing,
    guard_updates.switching_between_observe_and_enforce_takes_effect_at_once,
)
