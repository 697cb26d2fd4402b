"""What attribution promises: who owns which packet, and which half of which connection."""

import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from vnet.check import flows, outside
from vnet.check.bed import MARKED
from vnet.check.facts import Property
from vnet.check.flows import Flow
from vnet.check.trial import Trial
from vnet.testing.packets import TCP, UDP, echo, ip, udp
from vnet.testing.poll import until
from vnet.testing.steps import Steps

_WHO = ("deny", "own", "full", "node")
_OUT, _IN = "postrouting", "input"
_ACK, _FIN = "A", "FA"


def _owned(
    t: Trial,
    role: str,
    tried: str,
    made: Callable[[], Flow],
    hooks: Sequence[str] = (_OUT, _IN),
    first: str = "",
) -> None:
    """Make a connection with the peer: all its packets are the role's, from the first."""
    with t.attempt(role, tried):
        flow = made()
        if first:
            t.equal(role, f"{tried}: its first packet", first, flow.seen[0].tcp_flags)
        for hook in hooks:
            t.owned(role, tried, flow.seen, hook, role)


def egress_tcp(t: Trial) -> None:
    for role in _WHO:
        made = partial(flows.tcp, t, role, "peer", t.world.there)
        _owned(t, role, "tcp connection to the peer", made, first="S")


def ingress_tcp(t: Trial) -> None:
    w = t.world
    for role in _WHO:
        for where, at in (("one address", w.here), ("every address", w.wild)):
            tried = f"tcp connection from the peer to a server at {where}"
            _owned(t, role, tried, partial(flows.tcp, t, "peer", role, w.here, at), first="S")


def egress_udp(t: Trial) -> None:
    for role in _WHO:
        for how, connected in (("unconnected", False), ("connected", True)):
            tried = f"{how} datagram to the peer, answered"
            _owned(t, role, tried, partial(flows.udp_out, t, role, connected))


def ingress_udp(t: Trial) -> None:
    for role in _WHO:
        for where, wild in (("one address", False), ("every address", True)):
            tried = f"datagram from the peer to a socket at {where} that sends nothing"
            _owned(t, role, tried, partial(flows.udp_in, t, role, wild), hooks=(_IN,))


def echoes(t: Trial) -> None:
    for role in _WHO:
        kinds = ["SOCK_DGRAM"] if "ping" in t.bed.has else []
        for kind in kinds + (["SOCK_RAW"] if role != "deny" else []):
            tried = f"ping by a {'ping' if kind == 'SOCK_DGRAM' else 'raw'} socket, answered"
            w = t.world
            with t.attempt(role, tried), t.watching() as seen:
                data = echo(w, number=w.dport).hex()
                # Else the kernel counts, up to what a raw socket has just had.
                bind = [["bind", w.here, w.dport]] if kind == "SOCK_DGRAM" else []
                t.does(role, [["socket", w.af, kind, w.icmp], *bind,
                              ["send", data, w.there, 0], ["receive", w.token.hex()]])  # fmt: skip
                mine = [p for p in seen() if w.token in p.payload]
                t.owned(role, tried, mine, _OUT, role)
                t.owned(role, tried, mine, _IN, role)


def between_slices(t: Trial) -> None:
    for name, talk in (("tcp connection", flows.tcp), ("datagram", flows.udp_between)):
        tried = f"{name} to the slice 'full', on this host"
        with t.attempt("deny", tried):
            flow = talk(t, "deny", "full", t.world.here)
            t.owned("deny", f"{tried}: what it sends", flow.there(), _OUT, "deny")
            t.owned("full", f"{tried}: as that receives it", flow.there(), _IN, "full")
            if flow.proto == TCP:
                t.owned("full", f"{tried}: the answers", flow.back(), _OUT, "full")
                t.owned("deny", f"{tried}: the answers, as they come", flow.back(), _IN, "deny")


# -- what the kernel says by itself ---------------------------------------------


def kernel_replies(t: Trial) -> None:
    for role in ("deny", "full"):
        _late_reset(t, role)
        _time_wait(t, role)
        _unreachable(t, role)
    _reset_of_nobody(t)


def _late_reset(t: Trial, role: str) -> None:
    tried = "the reset that answers a segment for a connection whose socket is gone"
    with t.attempt(role, tried), t.watching() as seen:
        w = t.world
        listen: Steps = [["socket", w.af, "SOCK_STREAM"], ["bind", w.there, 0], ["listen"],
                         ["name"], ["go"], ["accept"], ["receive", w.token.hex()]]  # fmt: skip
        abort = ["set", "SOL_SOCKET", "SO_LINGER", struct.pack("=ii", 1, 0).hex()]
        with t.going("peer", listen) as (got, rest):
            port = got[0][1]
            t.does(role, [["socket", w.af, "SOCK_STREAM"], abort, ["connectwait", w.there, port],
                          ["send", w.token.hex(), "", 0]])  # fmt: skip
            rest()
        [data, *_] = [p for p in seen() if w.token in p.payload]
        t.until(lambda: [p for p in seen() if "R" in p.tcp_flags and p.dport == port], "a reset")
        seq, ack = flows.segment(data)
        before = len(seen())
        flows.comes_in(t, w, TCP, port, data.sport, flags=_ACK, seq=ack, ack=seq + len(w.token))
        after = t.until(lambda: [p for p in seen()[before:] if "R" in p.tcp_flags
                               and p.prefix == _OUT], "a reset")  # fmt: skip
        t.owned(role, tried, after, _OUT, role)


def _time_wait(t: Trial, role: str) -> None:
    tried = "the ACK of a connection in TIME_WAIT, whose process is gone"
    with t.attempt(role, tried), t.watching() as seen:
        w = t.world
        flow = flows.tcp(t, role, "peer", w.there)
        fin = next(p for p in flow.back() if "F" in p.tcp_flags)
        seq, ack = flows.segment(fin)
        before = len(seen())
        s = outside.scapy()
        again = s.ip(w.there, w.here) / s.tcp(
            sport=flow.dport, dport=flow.sport, flags=_FIN, seq=seq, ack=ack
        )
        flows.sends_raw(t, w, bytes(again))
        after = t.until(lambda: [p for p in seen()[before:] if p.dport == flow.dport],
                      "an ACK")  # fmt: skip
        t.owned(role, tried, after, _OUT, role)


def _unreachable(t: Trial, role: str) -> None:
    tried = "the port unreachable for a datagram whose receiver is gone"
    with t.attempt(role, tried), t.watching() as seen:
        w = t.world
        flow = flows.udp_in(t, role)
        before = len(seen())
        # The kernel may have said enough of late (icmp_ratelimit, icmp_msgs_per_sec).
        for _ in range(3):
            flows.comes_in(t, w, UDP, flow.sport, flow.dport)
            with suppress(AssertionError):
                until(lambda: flows.unreachable(seen()[before:]), t.bed.patience / 3)
                break
        after = t.until(lambda: flows.unreachable(seen()[before:]), "an ICMP error")
        t.owned(role, tried, after, _OUT, role)


def _reset_of_nobody(t: Trial) -> None:
    tried = "the reset of a port that nobody has, on which somebody else's rule puts a mark"
    with t.attempt("node", tried), t.watching() as seen:
        # An answer to no question is of no connection, and neither is the reset.
        flows.comes_in(t, t.world, TCP, MARKED, t.bed.port(), flags="SA")
        after = t.until(
            lambda: [p for p in seen() if "R" in p.tcp_flags and p.dport == MARKED], "a reset"
        )
        t.owned("node", tried, after, _OUT, "node")
        asked = [p for p in seen() if p.sport == MARKED]
        t.owned("node", "what it answers, which has such a mark, too", asked, _IN, "node")


def errors_from_outside(t: Trial) -> None:
    for role in ("deny", "full", "node"):
        _error(t, role, "the peer's port unreachable about its datagram")


def _error(t: Trial, role: str, tried: str) -> None:
    with t.attempt(role, tried), t.watching() as seen:
        w = t.world
        flow = flows.udp_out(t, role)
        flows.sends_raw(t, w, outside.unreachable(w, flow.there()[0].payload))
        after = t.until(lambda: flows.unreachable(seen()), "the error")
        t.owned(role, tried, after, _IN, role)


# -- connections -----------------------------------------------------------------


def flow_owners(t: Trial) -> None:
    xid = t.bed.xids
    w = t.world
    made: list[tuple[str, str, str, str, Callable[[], Flow]]] = []
    for role in ("deny", "full", "node"):
        made += [
            (role, "tcp connection to the peer", role, "node",
             partial(flows.tcp, t, role, "peer", w.there)),
            (role, "tcp connection from the peer", "node", role,
             partial(flows.tcp, t, "peer", role, w.here)),
            (role, "datagram to the peer", role, "node", partial(flows.udp_out, t, role)),
            (role, "datagram from the peer", "node", role, partial(flows.udp_in, t, role)),
        ]  # fmt: skip
    made += [
        ("deny", "tcp connection to the slice 'full'", "deny", "full",
         partial(flows.tcp, t, "deny", "full", w.here)),
        ("deny", "datagram to the slice 'full'", "deny", "full",
         partial(flows.udp_between, t, "deny", "full", w.here)),
    ]  # fmt: skip
    for role, tried, originator, responder, make in made:
        with t.attempt(role, tried):
            expected = (xid[originator], xid[responder])
            flows.owners_are(t, role, f"{tried}: owners of both sides", make(), expected)
    tried = "raw packet that begins a connection: owners of both sides"
    with t.attempt("full", tried):
        w = t.world
        data = ip(w, UDP, udp(w, t.bed.ports.free))
        t.does("full", [["socket", w.af, "SOCK_RAW", 255], ["send", data.hex(), w.there, 0]])
        flow = Flow(UDP, w.here, t.bed.ports.free, w.there, w.dport, [])
        flows.owners_are(t, "full", tried, flow, (xid["full"], 0))
    tried = "raw answer from a port of its own, where no socket is: owners of both sides"
    with t.attempt("holder", tried):
        w, port = t.world, t.bed.ports.reserved
        flow = Flow(UDP, w.there, w.dport, w.here, port, [])
        flows.comes_in(t, w, UDP, w.dport, port)
        # Else it is no answer, where the one that comes in is late.
        t.until(lambda: t.halves(flow.words), "what it answers")
        data = ip(w, UDP, udp(w, port))
        t.does("holder", [["socket", w.af, "SOCK_RAW", 255], ["send", data.hex(), w.there, 0]])
        flows.owners_are(t, "holder", tried, flow, (0, xid["holder"]))


PROPERTIES = (
    Property("egress-tcp", "What a slice's connection sends and gets, from the SYN to the last "
             "ACK, is its own.", egress_tcp),
    Property("ingress-tcp", "What comes to a slice's server is its own from the first SYN.",
             ingress_tcp),
    Property("egress-udp", "Datagrams are their sender's, and the answers to them.", egress_udp),
    Property("ingress-udp", "Who only receives owns what it receives, from the first packet.",
             ingress_udp),
    Property("echo", "Pings are traffic, too: scans are made of them.", echoes),
    Property("between-slices", "Between two slices of one host each owns its end.",
             between_slices),
    Property("kernel-replies", "What the kernel answers for a slice, when its process is gone, is "
             "the slice's: complaints come for resets, too.", kernel_replies),
    Property("errors-from-outside", "ICMP errors belong to whom they are about.",
             errors_from_outside),
    Property("flow-owners", "Flow records name both sides of a connection by what its mark says.",
             flow_owners),
)  # fmt: skip
