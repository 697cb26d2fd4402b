"""Scenes of other protocols; of whose a socket is; and of what others set or forge."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import rawpkt
from thread_bed import OWN_PORT
from vnet.testing import cgroup
from vnet.testing.poll import until

from truth.bed import agent
from truth.icmp import TOO_BIG, UNREACHABLE
from truth.play import LATE, UPPER, Play, Refused
from truth.udp import unanswered

SCTP, GRE = socket.IPPROTO_SCTP, socket.IPPROTO_GRE
_INIT, _INIT_ACK, _COOKIE_ECHO = 1, 2, 10


# -- protocols -----------------------------------------------------------------------------


def sctp(play: Play) -> None:
    """An association, from INIT to its end."""
    if "sctp" in play.bed.lacking:
        return
    for way in play.ways():
        port = way.resp.listen("l", way.dst, 0, SCTP)
        way.orig.connect("c", way.dst, port, way.src, proto=SCTP)
        way.resp.accept("s", "l")
        way.orig.send("c")
        way.resp.read("s")
        way.resp.send("s")
        way.orig.read("c")
        way.orig.shut("c")
        way.resp.end("s")
        way.resp.close("s", "l")
        way.orig.close("c")
        flows, seen = way.flows(dport=port), way.of_port(port)
        # the first chunk's type follows the IP header and 12 bytes of SCTP's
        chunks = [(p, p.payload[{4: 20, 6: 40}[play.family] + 12]) for p in seen]
        way.saw("SCTP INIT", [p for p, kind in chunks if kind == _INIT], flows)
        way.saw("SCTP INIT-ACK", [p for p, kind in chunks if kind == _INIT_ACK], flows)
        way.saw("SCTP COOKIE-ECHO", [p for p, kind in chunks if kind == _COOKIE_ECHO], flows)
        rest = [p for p, kind in chunks if kind not in (_INIT, _INIT_ACK, _COOKIE_ECHO)]
        way.saw("SCTP, data of who began", [p for p in rest if p.dport == port], flows)
        way.saw("SCTP, data of the other", [p for p in rest if p.sport == port], flows)


def gre(play: Play) -> None:
    """Raw sockets talk GRE, which the kernel gives to all that want it."""
    for way in play.ways():
        if way.name != "out":
            forget_gre(play)
        way.resp.protocol("s", way.dst, GRE)
        way.orig.protocol("c", way.src, GRE)
        way.orig.utter("c", way.dst, "000088b5" + "11" * 8)
        way.resp.hear("s", 1)
        asked = way.wait(lambda p: p.proto == GRE)
        way.resp.utter("s", way.src, "000088b5" + "22" * 8)
        answered = until(lambda: way.last(_gre(way.seen()[len(asked) :], b"\x22")))  # noqa: B023
        answered = _gre(way.seen(), b"\x22")
        flows = way.flows(proto="gre")
        way.saw("GRE by a raw socket", _gre(way.seen(), b"\x11"), flows)
        way.saw("GRE, the answer", answered, flows)
        way.orig.close("c")
        way.resp.close("s")


def forget_gre(play: Play) -> None:
    """Addresses are all that tells one such connection from another."""
    play.bed.ns.run("conntrack", "-D", "-f", f"ipv{play.family}", "-p", "gre", check=False)
    play.now()


def _gre(packets: list, last: bytes) -> list:  # type: ignore[type-arg]
    return [p for p in packets if p.proto == GRE and p.payload.endswith(last)]


def gre_tunnel(play: Play) -> None:
    """UDP through a GRE tunnel of the node's."""
    if "gre" in play.bed.lacking:
        return
    kind, inner, bits = {
        4: ("gre", ("10.78.0.1", "10.78.0.2"), 24),
        6: ("ip6gre", ("fd78::1", "fd78::2"), 64),
    }[play.family]
    ends = (
        (play.bed.ns, play.here, play.there, inner[0]),
        (play.bed.far, play.there, play.here, inner[1]),
    )
    device = f"vntg{play.family}"
    more, nodad = ("encaplimit none", "nodad") if play.family == 6 else ("", "")
    try:
        for ns, local, remote, address in ends:
            text = f"""\
link add {device} type {kind} local {local} remote {remote} {more}
link set {device} addrgenmode none
link set {device} up
addr add {address}/{bits} dev {device} {nodad}
"""
            ns.run("ip", "-batch", "-", input=text)
        for way in play.ways("out", "in"):
            src, dst = inner if way.name == "out" else inner[::-1]
            forget_gre(play)
            port = way.resp.udp("s", dst)
            way.orig.udp("c", src)
            way.orig.tell("c", dst, port)
            way.resp.hear("s")
            inside = way.of_port(port)
            ports = struct.pack(">H", port)
            outer = [p for p in way.seen() if p.proto == GRE and ports in p.payload[20:]]
            way.saw("GRE tunnel: the packet inside", inside, way.flows(dport=port))
            way.saw("GRE tunnel: the outer packet", outer, way.flows(proto="gre"))
    finally:
        for ns, *_ in ends:
            ns.run("ip", "link", "del", device, check=False)


# -- whose socket it is --------------------------------------------------------------------


def sub_cgroup(play: Play) -> None:
    """A cgroup below a's."""
    if play.family == 6:
        return
    with (
        cgroup.cgroup("deeper", play.bed.cgroups[0]) as below,
        agent(play.bed.ns, below) as deeper,
    ):
        for each in (play, play.twin):
            assert each
            way = each.way("out")
            unanswered(way, deeper, way.resp, "of a sub-cgroup")


def older_socket(play: Play) -> None:
    """Servers are there before their cgroup becomes a slice."""
    if not play.bed.node or play.family == 6:
        return
    vnet, peer = play.bed.node.vnet, play.agent("peer")
    plays = [each for each in (play, play.twin) if each]
    with cgroup.cgroup() as late, agent(play.bed.ns, late) as server:
        ports = [server.udp(f"s{each.family}", each.here) for each in plays]
        try:
            for row in ("to a socket older than its slice, before", "to the same, from then on"):
                for each, port in zip(plays, ports, strict=True):
                    way = each.way("in")
                    # Each has its own port, and so a connection of its own.
                    own = peer.udp(f"c {row}", each.there)
                    peer.tell(f"c {row}", each.here, port)
                    server.hear(f"s{each.family}")
                    way.saw(row, way.of_port(port), way.flows(dport=port, sport=own))
                if "before" in row:
                    vnet("slice", "add", "late", "--cgroup", late.rel, "--xid", str(LATE))
        finally:
            vnet("slice", "rm", "late", check=False)


def node(play: Play) -> None:
    """The node itself talks, and nobody's slice is at its end."""
    for way in play.ways():
        unanswered(way, way.orig_root, way.resp_root, "of the node")


def forwarded(play: Play) -> None:
    """The peer sends by this node to a host beyond; and more at once than fits on the way."""
    family, ns, peer = play.family, play.bed.ns, play.agent("peer")
    beyond = {4: "192.0.2.9", 6: "2001:db8::9"}[family]
    node = play.agent("node")
    forwarding = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}[family]
    switches = (forwarding, "net.ipv4.conf.all.send_redirects")
    was = [node.sysctl(*each) for each in zip(switches, "10", strict=True)]
    hop = ("via", play.there, "dev", play.bed.link.a_if, "mtu", "lock", "1300")
    ns.run("ip", f"-{family}", "route", "add", beyond, *hop)
    play.bed.far.run("ip", f"-{family}", "route", "add", beyond, "via", play.here)
    # A mark that another rule has set is no owner: what passes has none.
    rule = "meta mark set 0x7" if play.bed.rules == "mangle" else ""
    try:
        with prerouting(play, rule):
            way = play.way("in")
            own = peer.udp("c", play.there)
            peer.tell("c", beyond, 7500)
            peer.tell("c", beyond, 7500)
            until(lambda: [p for p in way.of_port(own) if p.prefix == "postrouting"][1:])
            seen, flows = way.of_port(own), way.flows(dport=7500, sport=own)
            way.saw("forwarded", seen, flows)
            large = bytearray(rawpkt.udp(play.there, 7501, beyond, 7500, bytes(1400)))
            if family == 4:
                large[6] = 0x40  # do not fragment
            peer.raw(large.hex())
            seen = way.wait(lambda p: p.dport == TOO_BIG[family], "the error")
            # That packet is dropped, and its connection with it.
            way.saw("packet too big (PMTU)", seen, way.flows(dport=7500, sport=7501))
    finally:
        ns.run("ip", f"-{family}", "route", "del", beyond)
        play.bed.far.run("ip", f"-{family}", "route", "del", beyond)
        for each in zip(switches, was, strict=True):
            node.sysctl(*each)


# -- what others set, or forge -------------------------------------------------------------


@contextmanager
def prerouting(play: Play, rule: str) -> Iterator[None]:
    """Somebody else's rule for what comes in."""
    if not rule:
        yield
        return
    hook = "type filter hook prerouting priority mangle"
    chain = f"table inet others {{\nchain pre {{\n{hook};\n{rule}\n}}\n}}\n"
    play.bed.ns.run("nft", "-f", "-", input=chain)
    try:
        yield
    finally:
        play.bed.ns.run("nft", "delete", "table", "inet", "others")


def upper_bits(play: Play) -> None:
    """A bit that is somebody else's: set by the sender, or by a rule for what comes in."""
    with prerouting(play, f"meta mark set meta mark or {UPPER:#x}"):
        for way in play.ways("out", "in"):
            port = way.resp.listen("l", way.dst)
            mark = UPPER if way.name == "out" else 0
            way.orig.connect("c", way.dst, port, way.src, mark=mark)
            way.resp.accept("s", "l")
            way.orig.send("c")
            way.resp.read("s")
            sent, flows = [p for p in way.seen() if p.dport == port], way.flows(dport=port)
            way.saw("with another's upper bits, first packet", sent[:1], flows)
            way.saw("with another's upper bits, the rest", sent[1:], flows)
            way.orig.close("c")
            way.resp.close("s", "l")


def raw_answers(play: Play) -> None:
    """a answers the peer's question with a raw socket, in its own name or in another's."""
    a, node, peer = play.agent("a"), play.agent("node"), play.agent("peer")
    rows = (
        ("raw answer from a reserved port", OWN_PORT),
        ("raw answer where no socket is", 4200),
        ("raw answer where the node's server is", 0),
    )
    for row, port in rows:
        if not port:
            port = node.udp("s", play.here)
        way = play.way("in")
        own = peer.udp("c", play.there)
        peer.tell("c", play.here, port)
        way.wait(lambda p, port=port: p.dport == port)
        a.raw(rawpkt.udp(play.here, port, play.there, own).hex())
        seen = way.wait(lambda p, port=port: p.sport == port and p.proto == socket.IPPROTO_UDP)
        way.saw(row, seen, way.flows(dport=port, sport=own))
        node.close("s")


def raw_into_anothers(play: Play) -> None:
    """b sends into a connection of a's."""
    way = play.way("out")
    port = way.resp.udp("s", way.dst)
    own = way.orig.udp("c", way.src)
    way.orig.tell("c", way.dst, port)
    before = len(way.seen())
    with suppress(Refused):
        play.agent("b").raw(rawpkt.udp(way.src, own, way.dst, port).hex())
    row = "raw packet into another slice's connection"
    seen = [p for p in way.seen()[before:] if p.proto == socket.IPPROTO_UDP]
    way.saw(row, seen, way.flows(dport=port))


def forged_error(play: Play) -> None:
    """a sends an ICMP error about a connection of the node's."""
    way, node, peer = play.way("in"), play.agent("node"), play.agent("peer")
    port = node.udp("s", play.here)
    own = peer.udp("c", play.there)
    peer.tell("c", play.here, port)
    node.hear("s")
    quoted = rawpkt.udp(play.there, own, play.here, port)
    play.agent("a").raw(rawpkt.unreachable(play.here, play.there, quoted).hex())
    seen = way.wait(lambda p: p.dport == UNREACHABLE[play.family])
    row = "raw ICMP error about another's connection"
    way.saw(row, seen, way.flows(dport=port, sport=own))
    node.close("s")


SCENES = (sctp, gre, gre_tunnel, sub_cgroup, older_socket, node, forwarded, upper_bits,
          raw_answers, raw_into_anothers, forged_error)  # fmt: skip
