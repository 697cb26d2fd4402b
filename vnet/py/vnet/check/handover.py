"""What attribution promises where one owner follows another, on ports and connections alike."""

from dataclasses import replace

from vnet.check import flows
from vnet.check.bed import MARKED, SINK, UPPER
from vnet.check.facts import Property
from vnet.check.flows import Flow
from vnet.check.trial import NotTried, Trial
from vnet.testing.net import HERE
from vnet.testing.packets import TCP, UDP
from vnet.testing.steps import Step, Steps

_OUT, _IN = "postrouting", "input"


def port_changes_hands(t: Trial) -> None:
    xid = t.bed.xids
    near, far = t.bed.port(), t.world.dport
    with t.attempt("full", "datagram from a port that the slice 'deny' sent from"):
        for role in ("deny", "full"):
            flow = flows.udp_out(t, role, port=far, near=near)
            tried = f"the {'first' if role == 'deny' else 'next'} sender from one port"
            t.owned(role, tried, flow.seen, _OUT, role)
            flows.owners_are(t, role, f"{tried}: owner", flow, (xid[role], 0))
    near, far = t.bed.port(), t.world.dport
    with t.attempt("full", "datagram to a port that the slice 'deny' had"):
        for role in ("deny", "full"):
            flow = flows.udp_in(t, role, port=near, far=far)
            tried = f"the {'first' if role == 'deny' else 'next'} receiver at one port"
            t.owned(role, tried, flow.seen, _IN, role)
            flows.owners_are(t, role, f"{tried}: owner", flow, (0, xid[role]))
    _connection_changes_hands(t)
    tried = "end of a tcp connection from the peer, in what is left of one to the slice 'deny'"
    for role in ("full", "own"):
        with t.attempt(role, tried):
            flow = _in_anothers_entry(t, role, xid["deny"])
            t.owned(role, tried, flow.seen, _IN, role)
            flows.owners_are(t, role, f"{tried}: owners", flow, (0, xid[role]))
    near = t.bed.port()
    tried = "an answer to what the node asked, at a socket that a slice has there by then"
    with t.attempt("deny", tried):
        w = t.world
        t.does("node", [["socket", w.af, "SOCK_DGRAM"], ["bind", w.here, near],
                        ["send", w.token.hex(), w.there, SINK]])  # fmt: skip
        flow = flows.udp_in(t, "deny", port=near, far=SINK)
        t.owned("deny", tried, flow.seen, _IN, "deny")
        asked = Flow(UDP, w.here, near, w.there, SINK, [])
        flows.owners_are(t, "deny", f"{tried}: owner", asked, (xid["deny"], 0))


def _connection_changes_hands(t: Trial) -> None:
    """The same ports again, on the entry of a connection whose end has gone unnoticed.

    Connection tracking lets a SYN pass on such an entry until it is answered
    (tcp_packet() in nf_conntrack_proto_tcp.c, TCP_CONNTRACK_IGNORE).
    """
    xid, w = t.bed.xids, t.world
    for role, state in (("full", "ESTABLISHED"), ("node", "ESTABLISHED"), ("full", "LAST_ACK")):
        near, far = t.bed.port(), t.world.dport
        tried = f"tcp connection to the peer, by the ports of one of the slice 'deny' in {state}"
        with t.attempt(role, tried):
            _left_behind(Flow(TCP, w.here, near, w.there, far, []), state, xid["deny"])
            flow = flows.tcp(t, role, "peer", w.there, ends=(near, far))
            t.owned(role, tried, flow.there(), _OUT, role)
            flows.owners_are(t, role, f"{tried}: owners", flow, (xid[role], 0))
        near, far = t.bed.port(), t.world.dport
        tried = f"tcp connection from the peer, by the ports of one to the slice 'deny' in {state}"
        with t.attempt(role, tried):
            _left_behind(Flow(TCP, w.there, far, w.here, near, []), state, xid["deny"] << 16)
            flow = flows.tcp(t, "peer", role, w.here, ends=(far, near))
            t.owned(role, tried, flow.there(), _IN, role)
            flows.owners_are(t, role, f"{tried}: owners", flow, (0, xid[role]))


def _left_behind(flow: Flow, state: str, mark: int) -> None:
    """Have connection tracking know this connection, in a state that it has not left."""
    back = ("-r", flow.dst, "-q", flow.src, "--reply-port-src", str(flow.dport),
            "--reply-port-dst", str(flow.sport))  # fmt: skip
    done = HERE.run("conntrack", "-I", *flow.words, *back, "--state", state,
                    "--timeout", "60", "--mark", str(mark), check=False)  # fmt: skip
    if done.returncode:
        raise NotTried(f"conntrack -I: {done.stderr.strip()}")


def _in_anothers_entry(t: Trial, role: str, xid: int, *options: Step) -> Flow:
    """What ends a connection from the peer, whose SYN the node did not see: another's half is left.

    As it is when the rules come into force while connections last, or when two
    CPUs wrote the halves at one moment. Connection tracking waits for the last
    ACK of the one before.
    """
    w = t.world
    listen: Steps = [["socket", w.af, "SOCK_STREAM"], *options, ["bind", w.here, 0], ["listen"],
                     ["name"], ["hold"]]  # fmt: skip
    with t.going(role, listen) as (served, _), t.watching() as seen:
        port = served[0][1]
        begin: Steps = [["socket", w.af, "SOCK_STREAM"], ["connectwait", w.here, port],
                        ["name"], ["hold"]]  # fmt: skip
        with t.going("peer", begin) as (client, _):
            flow = Flow(TCP, w.there, client[0][1], w.here, port, [])
            done = HERE.run("conntrack", "-U", *flow.words, "--state", "LAST_ACK",
                            "--mark", str(xid << 16), check=False)  # fmt: skip
            if done.returncode:
                raise NotTried(f"conntrack -U: {done.stderr.strip()}")
        end = t.until(lambda: [p for p in seen() if p.dport == port and "F" in p.tcp_flags],
                      "a FIN")  # fmt: skip
        return replace(flow, seen=end)


def node_erases_nothing(t: Trial) -> None:
    xid = t.bed.xids
    near, far = t.bed.port(), t.world.dport
    tried = "datagram of the node's from a port that the slice 'deny' sent from"
    with t.attempt("node", tried):
        flows.udp_out(t, "deny", port=far, near=near)
        flow = flows.udp_out(t, "node", port=far, near=near)
        t.owned("node", tried, flow.seen, _OUT, "node")
        flows.owners_are(t, "node", f"{tried}: owner", flow, (xid["deny"], 0))


def others_bits(t: Trial) -> None:
    for role in ("deny", "full"):
        tried = "answer that comes in with somebody else's bit in the upper half of its mark"
        with t.attempt(role, tried):
            flow = flows.udp_out(t, role, port=MARKED)
            marks = {p.mark for p in flow.seen if p.prefix == _IN}
            t.equal(role, tried, {UPPER | t.bed.xids[role]}, marks)
    tried = "datagram that comes in with such a bit, and begins a connection"
    with t.attempt("deny", tried):
        flow = flows.udp_in(t, "deny", far=MARKED)
        t.equal("deny", tried, {UPPER}, {p.mark & 0xFFFF0000 for p in flow.seen})
    tried = "tcp connection that comes in with such a bit"
    with t.attempt("deny", tried):
        flow = flows.tcp(t, "peer", "deny", t.world.here, ends=(MARKED, 0))
        marks = {p.mark for p in flow.there()[1:]}
        t.equal("deny", f"{tried}: behind the SYN", {UPPER | t.bed.xids["deny"]}, marks)
        flows.owners_are(t, "deny", f"{tried}: owners", flow, (0, t.bed.xids["deny"]))
    tried = "end of a tcp connection to a socket of the node's with such a bit, left by a slice's"
    with t.attempt("node", tried):
        bit = ["set", "SOL_SOCKET", "SO_MARK", UPPER]
        flow = _in_anothers_entry(t, "node", t.bed.xids["deny"], bit)
        t.equal("node", tried, {0}, {p.mark & 0xFFFF0000 for p in flow.seen})
    tried = "two datagrams to a socket that has such a bit in its own mark"
    with t.attempt("deny", tried), t.watching() as seen:
        w, port = t.world, t.bed.port()
        made: Steps = [["socket", w.af, "SOCK_DGRAM"],
                       ["set", "SOL_SOCKET", "SO_MARK", UPPER], ["bind", w.here, port],
                       ["go"], ["receive", w.token.hex()], ["receive", w.token.hex()]]  # fmt: skip
        with t.going("deny", made) as (_, rest):
            for _ in range(2):
                flows.comes_in(t, w, UDP, w.dport, port)
            rest()
        t.equal("deny", tried, [t.bed.xids["deny"]] * 2,
                [p.mark for p in seen() if w.token in p.payload])  # fmt: skip


PROPERTIES = (
    Property("port-changes-hands", "A port that another slice uses next must not stay in the name "
             "of the first.", port_changes_hands),
    Property("node-erases-nothing", "What the node sends on a slice's connection must not wipe "
             "out its owner.", node_erases_nothing),
    Property("others-bits", "The upper half of a mark belongs to VPNs and container networks.",
             others_bits),
)  # fmt: skip
