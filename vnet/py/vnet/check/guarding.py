"""What the guard promises: attempts to forge and to hear what is somebody else's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING

from vnet.bpf import HEARING
from vnet.check import outside
from vnet.check.facts import LACKING, OTHERS, SLICES, WITH_RAW, Property
from vnet.check.trial import NotTried, Trial
from vnet.testing import steps
from vnet.testing.packets import (
    ICMP,
    NAMES,
    TCP,
    UDP,
    World,
    echo,
    ip,
    tcp,
    udp,
    unreachable,
)
from vnet.testing.steps import Maker, Step, Steps

if TYPE_CHECKING:
    from vnet import eventlog, events, refusals

# -- raw and packet sockets -------------------------------------------------------


def raw_deny(t: Trial) -> None:
    for proto, name in ((0, "icmp"), (TCP, "tcp"), (UDP, "udp"), (255, "raw")):
        tried = f"raw socket of protocol {name}"
        how = lambda w, p=proto: [["socket", w.af, "SOCK_RAW", p or w.icmp]]  # noqa: E731
        t.refuses(("deny",), tried, how, "socket", "EACCES")
        t.allows(("holder", *WITH_RAW), tried, how)


def raw_own_send(t: Trial) -> None:
    ports = t.bed.ports
    foreign = {
        "raw packet from a port that nobody has": lambda w: ip(w, UDP, udp(w, ports.free)),
        "raw echo reply": lambda w: ip(w, w.icmp, echo(w, reply=True)),
    }
    for tried, make in foreign.items():
        t.drops(("own", "holder"), tried, steps.raw(make))
    # Each another one: two slices that speak the same to one peer share a connection.
    for role, name, proto in (("own", "GRE", 47), ("holder", "ESP", 50)):
        tried = f"raw packet of a protocol without ports ({name})"
        t.drops((role,), tried, steps.raw(partial(outside.portless, proto=proto)))
    if t.family == 4:
        tried = "a later fragment, which has no ports"
        alone = steps.raw(outside.later_fragment, 255, ["set", "IPPROTO_IP", _IP_NODEFRAG, 1])
        t.drops(("own", "holder"), tried, alone)
        t.allows(("full",), tried, alone, seen=True)
    own = steps.raw(lambda w: ip(w, TCP, tcp(w, ports.own)))
    t.allows(("own",), "raw packet from a port of its own", own, seen=True)
    request = steps.raw(lambda w: ip(w, w.icmp, echo(w, number=w.dport)))
    t.allows(("own", "holder"), "raw echo request", request, seen=True)


_IP_NODEFRAG = 22
"""Of a sending socket: connection tracking does not wait for the other fragments."""


def raw_full_send(t: Trial) -> None:
    ports = t.bed.ports
    for tried, make in {
        "raw packet from a port that nobody has": lambda w: ip(w, UDP, udp(w, ports.free)),
        # Another protocol: two slices that speak the same to one peer share a connection.
        "raw packet of a protocol without ports (253)": lambda w: outside.portless(w, 253),
        "raw echo request": lambda w: ip(w, w.icmp, echo(w, number=w.dport)),
    }.items():
        t.allows(("full", "node"), tried, steps.raw(make), seen=True)


def raw_own_receive(t: Trial) -> None:
    for proto, kind in ((UDP, "SOCK_DGRAM"), (TCP, "SOCK_STREAM")):
        name = NAMES[proto]
        for role in ("own", "full", "node"):
            tried = f"raw {name} socket, while {name} comes in for the holder"
            with t.attempt(role, tried):
                _hear(t, role, tried, proto, kind)

    gone = t.bed.before.hearing
    t.note("own", not gone, f"look whether {HEARING} was attached before the canaries came",
           "it was, if a slice needs it", gone[0] if gone else "so it was")  # fmt: skip


def _hear(t: Trial, role: str, tried: str, proto: int, kind: str) -> None:
    """A packet for the holder, then one for the slice itself, so that there is an end to it."""
    ports, foreign, own = t.bed.ports, t.world, t.world
    mine = ports.own if role == "own" else t.bed.port()

    def server(port: int) -> Steps:
        made: Steps = [["socket", own.af, kind], ["set", "SOL_SOCKET", "SO_REUSEADDR", 1]]
        return [*made, ["bind", own.here, port], *([["listen"]] if proto == TCP else []), ["hold"]]

    listen: Steps = [["socket", own.af, "SOCK_RAW", proto], ["go"], ["receive", own.token.hex()]]
    with (
        t.going("holder", server(ports.reserved)),
        t.going(role, server(mine)),
        t.going(role, listen) as (_, rest),
    ):
        for world, port in ((foreign, ports.reserved), (own, mine)):
            data = outside.comes_in(world, proto, world.sink, port)
            t.does("peer", [["socket", own.af, "SOCK_RAW", 255],
                            ["send", data.hex(), own.here, 0]])  # fmt: skip
        said = rest()
    if not said["ok"]:
        t.note(role, False, tried, "it hears what is its own", f"{said['at']}: {said['errno']}")
        return
    heard = foreign.token.hex() in "".join(said["got"])
    expected = "it does not hear it" if role == "own" else "it hears it"
    t.note(role, heard is (role != "own"), tried, expected,
           "heard" if heard else "heard its own only")  # fmt: skip


def packet_sockets(t: Trial) -> None:
    kinds: dict[str, tuple[int | str, int | str, int]] = {
        "AF_PACKET, SOCK_RAW": ("AF_PACKET", "SOCK_RAW", 0x0300),
        "AF_PACKET, SOCK_DGRAM": ("AF_PACKET", "SOCK_DGRAM", 0x0008),
        "AF_INET, SOCK_PACKET": ("AF_INET", 10, 0x0300),
        "AF_XDP": (44, "SOCK_RAW", 0),
    }
    for name, what in kinds.items():
        how = steps.packet_socket(*what)
        t.refuses(("holder", "own", "deny"), f"packet socket ({name})", how, "socket", "EACCES")
        t.allows(("full", "node"), f"packet socket ({name})", how)


# -- marks, sources, connections ----------------------------------------------------


def mark_setsockopt(t: Trial) -> None:
    high, forged = 0x50000, t.bed.xids["holder"]
    for role in (*OTHERS, "holder"):
        tried = f"SO_MARK {high | forged:#x}, the holder's xid below, then a datagram"
        with t.attempt(role, tried), t.watching() as seen:
            w = t.world
            said = t.does(role, [["socket", w.af, "SOCK_DGRAM"],
                                 ["set", "SOL_SOCKET", "SO_MARK", high | forged],
                                 ["get", "SOL_SOCKET", "SO_MARK"],
                                 ["send", w.token.hex(), w.there, w.sink]])  # fmt: skip
            marks = [p.mark for p in seen() if w.token in p.payload]
            mine = high | t.bed.xids[role]
            t.equal(role, tried, f"socket {mine:#x}, packet {[mine]}",
                    f"socket {said['got'][0]:#x}, packet {marks}")  # fmt: skip

    if "ia32" not in t.bed.has:
        return
    tried = "SO_MARK as a 32-bit program sets it, the holder's xid, then a datagram"

    def how(w: World) -> Steps:
        made: Steps = [["socket", w.af, "SOCK_DGRAM"], ["set32", "SOL_SOCKET", "SO_MARK", forged]]
        return [*made, ["send", w.token.hex(), w.there, w.sink]]

    # The kernel shows it to no cgroup program: BPF LSM refuses it, or the packet is dropped.
    if "lsm" in t.bed.has:
        t.refuses(("own", "deny", "full"), tried, how, "set32", "EPERM")
    else:
        t.drops(("own", "deny", "full"), tried, how)


_NUMBERED: tuple[Callable[[World], Step], ...] = (lambda w: ["bind", w.here, w.dport],)
"""For a ping socket: else the kernel counts, up to the number that a raw socket has just had."""


def mark_cmsg(t: Trial) -> None:
    xids = t.bed.xids
    for name, kind in (("datagram", UDP), ("echo request", ICMP)):
        if kind == ICMP and "ping" not in t.bed.has:
            continue
        sends = partial(steps.sends, *_NUMBERED) if kind == ICMP else steps.sends
        tried, how = (
            f"{name} with the holder's xid by a control message",
            steps.mark(xids["holder"]),
        )
        t.drops(OTHERS, tried, sends(kind=kind, cmsg=how))
        t.allows(("holder",), tried, sends(kind=kind, cmsg=how), seen=True)
        own = steps.mark(0x50000 | xids["own"])
        tried = f"{name} with its own xid and others' bits by a control message"
        t.allows(("own",), tried, sends(kind=kind, cmsg=own), seen=True)


def source_local(t: Trial) -> None:
    ports = t.bed.ports
    how = steps.raw(lambda w: ip(w, UDP, udp(w, ports.free), w.nowhere))
    t.drops(("own", "full"), "raw packet from an address that is not the node's", how)
    t.allows(("node",), "raw packet from an address that is not the node's", how, seen=True)
    how = steps.sends(
        lambda w: ["set", *steps.TRANSPARENT[w.family], 1], lambda w: ["bind", w.nowhere, 0]
    )
    tried = "datagram from an address that is not the node's (IP_TRANSPARENT)"
    t.drops(SLICES, tried, how)
    t.allows(("node",), tried, how, seen=True)


def connection_hijack(t: Trial) -> None:
    port = t.bed.ports.connection
    for proto, make in ((TCP, tcp), (UDP, udp)):
        name = NAMES[proto]
        t.drops(
            ("own", "full"),
            f"raw {name} packet in the holder's connection",
            steps.raw(lambda w, p=proto, m=make: ip(w, p, m(w, port, w.sink))),  # type: ignore[misc]
            ("holder", steps.its_connection(proto, port)),
        )
    t.drops(
        ("own", "full"),
        "raw ICMP error about the holder's connection",
        steps.raw(lambda w: unreachable(w, port)),
        ("holder", steps.its_connection(UDP, port)),
    )
    mine = t.bed.ports.free
    t.allows(
        ("full",),
        "raw udp packet in its own connection",
        steps.raw(lambda w: ip(w, UDP, udp(w, mine, w.sink))),
        ("full", steps.its_connection(UDP, mine)),
        seen=True,
    )


def kernel_made(t: Trial) -> None:
    mptcp: Maker = lambda w: [["socket", w.af, "SOCK_STREAM", 262]]  # noqa: E731
    t.refuses(SLICES, "MPTCP socket", mptcp, "socket", "EPROTONOSUPPORT")
    if "mptcp" in t.bed.has:
        t.allows(("node",), "MPTCP socket", mptcp)
    if "smc" in t.bed.has and "lsm" not in t.bed.has:
        for role in SLICES:
            t.skip(role, "SMC socket", f"SMC is loaded, and {LACKING['lsm']}")
    elif "smc" in t.bed.has:
        smc: Maker = lambda w: [["socket", 43, 1, 0 if w.family == 4 else 1]]  # noqa: E731
        t.refuses(SLICES, "SMC socket", smc, "socket", "EAFNOSUPPORT")
        t.allows(("node",), "SMC socket", smc)


# -- told ------------------------------------------------------------------------


def refusals_reported(t: Trial) -> None:
    from vnet import eventlog, events, refusals

    ports, xids = t.bed.ports, t.bed.xids
    attempts: dict[str, tuple[str, Maker]] = {
        "bind": ("deny", steps.binds(TCP, ports.reserved)),
        "raw": ("deny", lambda w: [["socket", w.af, "SOCK_RAW", TCP]]),
        "port": ("full", steps.raw(lambda w: ip(w, UDP, udp(w, ports.reserved)))),
        "mark": ("own", steps.sends(cmsg=steps.mark(xids["holder"]))),
    }
    refused = 0
    with closing(events.Drain(t.bed.paths)) as drain:
        for kind, (role, how) in attempts.items():
            tried = f"is a refusal of kind {kind} counted?"
            drain.drain(wait=True)  # what others were refused before
            of_kind = eventlog.Tail(t.bed.paths, eventlog.Asked(kind=kind))
            with t.attempt(role, tried), closing(of_kind):
                before = _count(refusals.read(t.bed.instance), xids[role], kind)
                said = t.tries(role, how(t.world))
                if said["ok"]:
                    continue  # it was not refused, which is another property's matter
                refused += 1
                after = _count(refusals.read(t.bed.instance), xids[role], kind)
                t.equal(role, tried, before + 1, after)
                t.note(role, _told(t, drain, of_kind, role, how),
                       f"is it an event of kind {kind}?", "there is a new one in the log",
                       f"looked for in {eventlog.path(t.bed.paths)}")  # fmt: skip
        t.note("node", refused > 0, "is anything refused at all?", "yes", f"{refused} of 4")


def _told(t: Trial, drain: events.Drain, log: eventlog.Tail, role: str, how: Maker) -> bool:
    """Whether the log gets an event of this slice's."""

    def came() -> bool:
        drain.drain(wait=True)
        if any(event.get("xid") == t.bed.xids[role] for event in log.new()):
            return True
        t.tries(role, how(t.world))  # who is refused often gets no event of each (events.h)
        return False

    with suppress(NotTried):
        return t.until(came, "an event in the log")
    return False


def _count(counts: list[refusals.Count], xid: int, kind: str) -> int:
    return sum(c.refused for c in counts if (c.xid, c.kind) == (xid, kind))


PROPERTIES = (
    Property("raw-deny", "Raw sockets send and hear anything: a slice without the grant has none.",
             raw_deny),
    Property("raw-own-send", 'A slice with raw = "own" may speak from its own ports only, so that '
             "what it sends is known to be its own.", raw_own_send),
    Property("raw-own-receive", 'A slice with raw = "own" must not hear what comes in for others.',
             raw_own_receive),
    Property("raw-full-send", 'A slice with raw = "full", and the node, must not be kept from what '
             "they may do.", raw_full_send),
    Property("packet-sockets", "A packet socket hears every frame and sends past all rules.",
             packet_sockets, needs=("lsm",), families=(4,)),
    Property("mark-setsockopt", "Packets are attributed by their mark: SO_MARK must not make them "
             "somebody else's.", mark_setsockopt),
    Property("mark-cmsg", "A mark can come with a single packet, too.", mark_cmsg),
    Property("source-local", "A source that is not this node's makes others answer for what a "
             "slice has sent.", source_local),
    Property("connection-hijack", "A raw packet in somebody's connection is read as his.",
             connection_hijack),
    Property("kernel-made-sockets", "What the kernel sends by sockets of its own, for MPTCP or "
             "SMC, would be nobody's.", kernel_made),
    Property("refusals-reported", "A refusal that nobody hears of is an attack that nobody "
             "notices.", refusals_reported, families=(4,)),
)  # fmt: skip
