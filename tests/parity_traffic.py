"""The traffic of tests/parity.py: each function makes some and returns what was seen of it."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import rawpkt
from testbed import apps, cgroup
from testbed.cgroup import Cgroup
from testbed.net import Namespace
from testbed.nflog import Seen
from testbed.poll import until
from thread_bed import OWN_PORT, Thread, closed, of_port, watching

LATE = 777
"""The xid of a slice that comes later."""
UPPER = 0x40000
"""A bit of the mark that is somebody else's."""

ECHO = {4: (8 << 8, 0), 6: (128 << 8, 129 << 8)}
UNREACHABLE = {4: 3 << 8 | 3, 6: 1 << 8 | 4}
ANY = {4: "0.0.0.0", 6: "::"}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}


@dataclass(frozen=True)
class Found:
    """What came of the traffic."""

    packets: dict[str, list[Seen]]
    records: list[dict[str, Any]] = field(default_factory=list)
    whole: bool = False
    """Compare whole marks, not only their xids."""


def python(ns: Namespace, code: str, *argv: str, slice: Cgroup | None = None) -> str:
    """Run a few lines of Python (with socket and sys at hand) to their end."""
    code = "import socket, sys\n" + code
    return ns.run(sys.executable, "-I", "-S", "-c", code, *argv, cgroup=slice).stdout


# -- TCP -----------------------------------------------------------------------------------


def client(bed: Thread, family: int, in_slice: bool = True) -> Found:
    """A client of a's (or the node's) and a server at the peer."""
    with (
        watching(bed) as log,
        apps.start(bed.peer, "tcp-server", bind=bed.there(family), reply=3000) as far,
        apps.start(
            *(bed.ns, "tcp-client", bed.a if in_slice else None),
            to=bed.there(family),
            port=far.port,
            send=3000,
        ) as near,
    ):
        assert near.result()["received"] == 3000
        seen = closed(log, far.port)
    assert [p.tcp_flags for p in seen[:2]] == ["S", "SA"]
    return Found({"all": seen}, bed.flows.records(dport=[far.port]))


def server(bed: Thread, family: int, wildcard: bool = False) -> Found:
    """A server of b's and a client at the peer."""
    return _server(bed, ANY[family] if wildcard else bed.here(family), family)


def v4_at_v6(bed: Thread, family: int) -> Found:
    """A v6 socket of b's, reached over IPv4."""
    return _server(bed, "::", family)


def cookies(bed: Thread, family: int) -> Found:
    """A server that keeps nothing of a SYN."""
    bed.ns.sysctl(net__ipv4__tcp_syncookies=2)
    try:
        return _server(bed, bed.here(family), family)
    finally:
        bed.ns.sysctl(net__ipv4__tcp_syncookies=1)


def _server(bed: Thread, bind: str, family: int, slice: Cgroup | None = None) -> Found:
    with (
        watching(bed) as log,
        apps.start(bed.ns, "tcp-server", slice or bed.b, bind=bind, reply=3000) as near,
        apps.start(bed.peer, "tcp-client", to=bed.here(family), port=near.port, send=3000) as far,
    ):
        assert far.result()["received"] == 3000
        seen = closed(log, near.port)
    assert [p.tcp_flags for p in seen[:2]] == ["S", "SA"]
    return Found({"all": seen}, bed.flows.records(dport=[near.port]))


def between_slices(bed: Thread, family: int, tcp: bool = True) -> Found:
    """a asks b, over loopback."""
    local = LOOPBACK[family]
    kinds = ("tcp-server", "tcp-client") if tcp else ("udp-recv", "udp-send")
    does = {"reply": 3000} if tcp else {"reply": 1}
    asks = {"send": 3000} if tcp else {"count": 2, "expect": 2, "connected": 1}
    with (
        watching(bed) as log,
        apps.start(bed.ns, kinds[0], bed.b, bind=local, **does) as near,
        apps.start(bed.ns, kinds[1], bed.a, to=local, port=near.port, **asks) as far,
    ):
        far.result()
        seen = closed(log, near.port) if tcp else of_port(log, near.port)
    return Found(
        {
            "to b": [p for p in seen if p.dport == near.port],
            "to a": [p for p in seen if p.sport == near.port],
        },
        bed.flows.records(dport=[near.port]),
    )


_CONNECT = """
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
print(s.connect_ex((sys.argv[1], int(sys.argv[2]))))
"""
_REFUSED = "111"  # ECONNREFUSED


def refused(bed: Thread, family: int) -> Found:
    """a connects to a port that nobody has."""
    return _refuse(bed, bed.ns, bed.there(family), 7390 + family, bed.a)


def reset_of_nobody(bed: Thread, family: int) -> Found:
    """The peer connects to a port that nobody has."""
    return _refuse(bed, bed.peer, bed.here(family), 7380 + family, None)


def _refuse(bed: Thread, ns: Namespace, to: str, port: int, slice: Cgroup | None) -> Found:
    with watching(bed) as log:
        assert python(ns, _CONNECT, to, str(port), slice=slice).strip() == _REFUSED
        seen = of_port(log, port)
    assert [p.tcp_flags for p in seen] == ["S", "RA"]
    return Found({"all": seen}, bed.flows.records(dport=[port]))


def reset(bed: Thread, family: int) -> Found:
    """a closes with a RST."""
    with (
        watching(bed) as log,
        apps.start(bed.peer, "tcp-server", bind=bed.there(family), request=10, reply=10) as far,
        apps.start(
            *(bed.ns, "tcp-client", bed.a),
            to=bed.there(family),
            port=far.port,
            send=10,
            receive=10,
            close="rst",
        ) as near,
    ):
        near.result()
        far.event("flow")
        seen = until(
            lambda: (
                [p for p in of_port(log, far.port) if "R" in p.tcp_flags] and of_port(log, far.port)
            )
        )
    return Found({"all": seen}, bed.flows.records(dport=[far.port]))


def late_reset(bed: Thread, family: int) -> Found:
    """A segment for a connection whose socket has gone."""
    with watching(bed) as log:
        with (
            apps.start(bed.peer, "tcp-server", bind=bed.there(family), request=10) as far,
            apps.start(
                *(bed.ns, "tcp-client", bed.a),
                to=bed.there(family),
                port=far.port,
                send=10,
                hold="sent",
                close="rst",
            ) as near,
        ):
            near.event("sent")
            ours = until(lambda: [s for s in of_port(log, far.port) if s.tcp_flags == "PA"])
            near.go()
            near.result()
        until(lambda: [s for s in of_port(log, far.port) if "R" in s.tcp_flags], what="RST")
        sport, dport, seq, ack = rawpkt.segment(ours[-1].payload)
        before = len(log.seen())
        there, here = bed.there(family), bed.here(family)
        rawpkt.send(bed.peer, rawpkt.tcp(there, dport, here, sport, rawpkt.ACK, ack, seq + 10))
        after = until(lambda: [s for s in log.seen()[before:] if "R" in s.tcp_flags])
    return Found({"RST": after}, bed.flows.records(dport=[far.port]))


def time_wait(bed: Thread, family: int) -> Found:
    """The peer's FIN again, after the socket has gone."""
    with (
        watching(bed) as log,
        apps.start(bed.peer, "tcp-server", bind=bed.there(family)) as far,
        apps.start(
            bed.ns, "tcp-client", bed.a, to=bed.there(family), port=far.port, send=10
        ) as near,
    ):
        near.result()
        near.process.wait(10)
        seen = closed(log, far.port)
        fin = next(p for p in seen if p.prefix == "input" and "F" in p.tcp_flags)
        sport, dport, seq, ack = rawpkt.segment(fin.payload)
        there, here = bed.there(family), bed.here(family)
        again = rawpkt.tcp(there, sport, here, dport, rawpkt.FIN | rawpkt.ACK, seq, ack)
        rawpkt.send(bed.peer, again)
        answer = until(
            lambda: [p for p in of_port(log, far.port)[len(seen) :] if p.prefix != "input"],
            what="TIME_WAIT's ACK",
        )
    assert [p.tcp_flags for p in answer] == ["A"]
    return Found({"ACK": answer}, bed.flows.records(dport=[far.port]))


def over_time_wait(bed: Thread, family: int) -> Found:
    """A server of a's ends, and b's gets a connection from the same port of the same peer."""
    here = {"bind": bed.here(family)}
    there = {"to": bed.here(family), "bind": bed.there(family), "from_port": 4321, "send": 10}

    def waits() -> bool:
        words = ("ss", "-tanH", "state", "time-wait", "sport", f"= :{port}")
        return bool(bed.ns.run(*words).stdout.strip())

    with watching(bed) as log:
        with (
            apps.start(bed.ns, "tcp-server", bed.a, request=10, **here) as first,
            apps.start(bed.peer, "tcp-client", port=first.port, hold="sent", **there) as far,
        ):
            port = first.port
            far.event("sent")
            first.stop()  # closes first, so that TIME_WAIT is here
            first.process.wait(10)
            far.go()
            far.result()
            until(waits)
        before = len(log.seen())
        with (
            apps.start(bed.ns, "tcp-server", bed.b, port=port, reply=10, **here),
            apps.start(bed.peer, "tcp-client", port=port, **there) as far,
        ):
            assert far.result()["received"] == 10
        seen = [p for p in log.seen()[before:] if port in (p.sport, p.dport)]
    at = next(i for i, p in enumerate(seen) if p.tcp_flags == "S")
    return Found({"SYN": [seen[at]], "rest": seen[at + 1 :]}, bed.flows.records(dport=[port]))


# -- UDP -----------------------------------------------------------------------------------


def receiver(bed: Thread, family: int, bound: str) -> Found:
    """A socket of b's that sends nothing."""
    options: dict[str, int | str] = {"bind": bed.here(family)}
    if bound == "wildcard":
        options["bind"] = ANY[family]
    elif bound == "connected":
        options |= {"to": bed.there(family), "to_port": 5555}
    with (
        watching(bed) as log,
        apps.start(bed.ns, "udp-recv", bed.b, count=4, **options) as near,
        apps.start(
            *(bed.peer, "udp-send"),
            to=bed.here(family),
            port=near.port,
            count=4,
            bind=bed.there(family),
            from_port=5555,
        ),
    ):
        assert near.result()["packets"] == 4
        seen = of_port(log, near.port)
    assert len(seen) == 4
    return Found({"all": seen}, bed.flows.records(dport=[near.port]))


def sender(bed: Thread, family: int, connected: bool) -> Found:
    """A socket of b's that asks and is answered."""
    with (
        watching(bed) as log,
        apps.start(bed.peer, "udp-recv", bind=bed.there(family), reply=1) as far,
        apps.start(
            *(bed.ns, "udp-send", bed.b),
            to=bed.there(family),
            port=far.port,
            count=3,
            expect=3,
            connected=int(connected),
        ) as near,
    ):
        assert near.result()["replies"] == 3
        seen = of_port(log, far.port)
    assert len(seen) == 6
    return Found({"all": seen}, bed.flows.records(dport=[far.port]))


def receivers_change(bed: Thread, family: int) -> Found:
    """b has the port that a had, while its connection lasts."""
    at = {"bind": bed.here(family), "port": 7000}
    to = {"to": bed.here(family), "port": 7000, "bind": bed.there(family), "from_port": 5556}
    groups: dict[str, list[Seen]] = {}
    for name, slice in _in_turn(bed):
        with (
            watching(bed) as log,
            apps.start(bed.ns, "udp-recv", slice, count=1, **at) as near,
            apps.start(bed.peer, "udp-send", **to),
        ):
            near.result()
            groups[name] = groups.get(name, []) + of_port(log, 7000)
        # An answer is never older than the question: what follows is after it.
        records = bed.flows.records(dport=[7000])
    return Found(groups, _shares(records))


def senders_change(bed: Thread, family: int) -> Found:
    """b sends from the port that a sent from."""
    groups: dict[str, list[Seen]] = {}
    with apps.start(bed.peer, "udp-recv", bind=bed.there(family)) as far:
        to = {"to": bed.there(family), "port": far.port, "from_port": 7001}
        for name, slice in _in_turn(bed):
            groups[name] = groups.get(name, []) + _send(bed, slice, far.port, to)
            records = bed.flows.records(dport=[far.port])
    return Found(groups, _shares(records))


def _in_turn(bed: Thread) -> list[tuple[str, Cgroup]]:
    """Who has the port, one after another. b twice: what brings the change may be counted to a."""
    return [("first", bed.a), ("then", bed.b), ("then", bed.b)]


def node_between(bed: Thread, family: int) -> Found:
    """a, the node and a again send from one port."""
    groups = {}
    with apps.start(bed.peer, "udp-recv", bind=bed.there(family)) as far:
        to = {"to": bed.there(family), "port": far.port, "from_port": 7002}
        for name, slice in (("slice", bed.a), ("node", None), ("slice again", bed.a)):
            groups[name] = _send(bed, slice, far.port, to)
        records = bed.flows.records(dport=[far.port])
    return Found(groups, records)


def _send(bed: Thread, slice: Cgroup | None, port: int, to: dict[str, Any]) -> list[Seen]:
    with watching(bed) as log, apps.start(bed.ns, "udp-send", slice, **to) as near:
        near.result()
        near.process.wait(10)
        return of_port(log, port)


def _shares(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record of each owner: the packet that brings a change may be in either share."""
    found = {}
    for record in records:
        found[record["originator"]["xid"], record["responder"]["xid"]] = record
    return list(found.values())


_MULTICAST = """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(sys.argv[1]))
s.sendto(b"x", ("239.1.2.3", 7777))
"""
_MEMBER = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("239.1.2.3", 7777))
s.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
             socket.inet_aton("239.1.2.3") + socket.inet_aton(sys.argv[1]))
print("ready", flush=True)
s.recv(10)
"""


def multicast(bed: Thread, family: int) -> Found:
    """a sends to a group that b is in."""
    member = (sys.executable, "-I", "-S", "-c", _MEMBER, bed.here(family))
    with (
        watching(bed) as log,
        bed.ns.popen(*member, cgroup=bed.b, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        python(bed.ns, _MULTICAST, bed.here(family), slice=bed.a)
        assert process.wait(20) == 0
        seen = of_port(log, 7777)
    assert [p.prefix for p in seen].count("postrouting") == 2
    return Found({"all": seen}, bed.flows.records(dport=[7777]))


# -- ICMP ----------------------------------------------------------------------------------


def ping(bed: Thread, family: int, raw: bool) -> Found:
    """Both slices ping the peer."""
    bed.ns.sysctl(net__ipv4__ping_group_range="1 0" if raw else "0 2147483647")
    groups, records = {}, []
    for name, slice in (("a", bed.a), ("b", bed.b)):
        with watching(bed) as log:
            bed.ns.run("ping", "-nq", "-c2", "-i0.01", bed.there(family), cgroup=slice)
            groups[name] = [p for p in log.seen() if p.dport in ECHO[family] and p.sport]
        assert len(groups[name]) == 4
        records += _echoes(bed, groups[name], bed.there(family))
    return Found(groups, records)


def echo_reply(bed: Thread, family: int) -> Found:
    """The peer pings the node."""
    with watching(bed) as log:
        bed.peer.run("ping", "-nq", "-c1", bed.here(family))
        seen = [p for p in log.seen() if p.dport in ECHO[family] and p.sport]
    assert len(seen) == 2
    return Found({"all": seen}, _echoes(bed, seen, bed.here(family)))


def _echoes(bed: Thread, seen: list[Seen], dst: str) -> list[dict[str, Any]]:
    records = bed.flows.records(dst=[dst], proto=[1, 58])
    return [r for r in records if r["icmp"]["id"] in {p.sport for p in seen}]


def error_from_outside(bed: Thread, family: int) -> Found:
    """The peer has no such port."""
    with (
        watching(bed) as log,
        apps.start(bed.ns, "udp-send", bed.a, to=bed.there(family), port=9, refusals=1) as near,
    ):
        done = near.result()
        assert done["refused"] == 1
        errors = [p for p in log.seen() if p.dport == UNREACHABLE[family]]
    return Found({"error": errors}, bed.flows.records(sport=[done["local"][1]], proto=[17]))


def error_about_tcp(bed: Thread, family: int) -> Found:
    """An ICMP error about a connection of a's."""
    with (
        watching(bed) as log,
        apps.start(bed.peer, "tcp-server", bind=bed.there(family)) as far,
        apps.start(
            *(bed.ns, "tcp-client", bed.a),
            to=bed.there(family),
            port=far.port,
            send=10,
            hold="sent",
        ) as near,
    ):
        near.event("sent")
        ours = until(lambda: [s for s in of_port(log, far.port) if s.tcp_flags == "PA"])
        quoted = ours[0].payload[:68]
        rawpkt.send(bed.peer, rawpkt.unreachable(bed.there(family), bed.here(family), quoted))
        errors = until(lambda: [p for p in log.seen() if p.dport == UNREACHABLE[family]])
        near.go()
    return Found({"error": errors}, bed.flows.records(dport=[far.port]))


def error_of_our_own(bed: Thread, family: int) -> Found:
    """The peer asks a port that b has had."""
    options = {"to": bed.here(family), "from_port": 7300 + family}
    with watching(bed) as log:
        with (
            apps.start(bed.ns, "udp-recv", bed.b, bind=bed.here(family), count=1) as near,
            apps.start(bed.peer, "udp-send", port=near.port, **options) as far,
        ):
            far.result()
            near.result()
            near.process.wait(10)
        with apps.start(bed.peer, "udp-send", port=near.port, refusals=1, **options) as far:
            assert far.result()["refused"] == 1
        errors = [p for p in log.seen() if p.dport == UNREACHABLE[family]]
    return Found({"error": errors}, bed.flows.records(dport=[near.port]))


# -- raw -----------------------------------------------------------------------------------


def raw_syn(bed: Thread, family: int) -> Found:
    """b speaks TCP over a raw socket; the kernel, which knows nothing of it, resets."""
    port = 4100 + family
    with (
        watching(bed) as log,
        apps.start(bed.peer, "tcp-server", bind=bed.there(family)) as far,
    ):
        syn = rawpkt.tcp(bed.here(family), port, bed.there(family), far.port, rawpkt.SYN)
        rawpkt.send(bed.ns, syn, slice=bed.b)
        seen = until(lambda: of_port(log, port)[2:] and of_port(log, port), what="RST")
    names = {"S": "SYN", "SA": "SYN-ACK", "R": "RST"}
    groups: dict[str, list[Seen]] = {}
    for packet in seen:
        groups.setdefault(names[packet.tcp_flags], []).append(packet)
    return Found(groups, bed.flows.records(dport=[far.port]))


def raw_answer(bed: Thread, family: int, own_port: bool) -> Found:
    """a answers over a raw socket where no socket is: from its reserved port, or another."""
    port = OWN_PORT if own_port else 4200
    with watching(bed) as log:
        with apps.start(
            bed.peer, "udp-send", to=bed.here(family), port=port, bind=bed.there(family)
        ) as far:
            far.result()
            until(lambda: of_port(log, far.port), what="the question")
            answer = rawpkt.udp(bed.here(family), port, bed.there(family), far.port)
            rawpkt.send(bed.ns, answer, slice=bed.a)
        seen = [p for p in of_port(log, far.port) if p.sport == port and p.proto == 17]
    return Found({"answer": seen}, bed.flows.records(dport=[port], sport=[far.port]))


def raw_in_nodes_name(bed: Thread, family: int) -> Found:
    """The half is empty, since the node's own server has it, but it is not free."""
    with (
        watching(bed) as log,
        apps.start(bed.ns, "udp-recv", bind=bed.here(family)) as near,
        apps.start(
            *(bed.peer, "udp-send"),
            to=bed.here(family),
            port=near.port,
            bind=bed.there(family),
        ) as far,
    ):
        far.result()
        until(lambda: of_port(log, near.port), what="the question")
        forged = rawpkt.udp(bed.here(family), near.port, bed.there(family), far.port)
        rawpkt.send(bed.ns, forged, slice=bed.b)
        seen = [p for p in of_port(log, near.port) if p.sport == near.port]
    return Found({"answer": seen}, bed.flows.records(dport=[near.port]))


def forged_packet(bed: Thread, family: int) -> Found:
    """b sends into a connection of a's: the guard drops it, and nothing is b's."""
    with (
        watching(bed) as log,
        apps.start(bed.peer, "udp-recv", bind=bed.there(family)) as far,
        apps.start(
            *(bed.ns, "udp-send", bed.a),
            to=bed.there(family),
            port=far.port,
            bind=bed.here(family),
        ) as near,
    ):
        near.result()
        forged = rawpkt.udp(bed.here(family), near.port, bed.there(family), far.port)
        assert rawpkt.send(bed.ns, forged, slice=bed.b, check=False).returncode != 0
        seen = of_port(log, far.port)
    return Found({"all": seen}, bed.flows.records(dport=[far.port]))


def forged_error(bed: Thread, family: int) -> Found:
    """b sends an ICMP error about a connection of the node's."""
    with (
        watching(bed) as log,
        apps.start(bed.ns, "udp-recv", bind=bed.here(family)) as near,
        apps.start(
            *(bed.peer, "udp-send"),
            to=bed.here(family),
            port=near.port,
            bind=bed.there(family),
        ) as far,
    ):
        far.result()
        until(lambda: of_port(log, near.port), what="the question")
        near.stop()
        near.process.wait(20)
        here, there = bed.here(family), bed.there(family)
        quoted = rawpkt.udp(there, far.port, here, near.port)
        rawpkt.send(bed.ns, rawpkt.unreachable(here, there, quoted), slice=bed.b)
        seen = [p for p in log.seen() if p.dport == UNREACHABLE[family]]
    return Found({"error": seen}, bed.flows.records(dport=[near.port]))


# -- whose socket, and others' bits --------------------------------------------------------


def sub_cgroup(bed: Thread, family: int) -> Found:
    """A server in a cgroup below a's."""
    with cgroup.cgroup("deeper", bed.a) as below:
        return _server(bed, bed.here(family), family, below)


def older_sockets(bed: Thread, family: int) -> Found:
    """A server is there before its cgroup becomes a slice."""
    to = {"to": bed.here(family), "bind": bed.there(family), "expect": 1}
    groups, records = {}, []
    with (
        cgroup.cgroup() as late,
        apps.start(bed.ns, "udp-recv", late, bind=bed.here(family), reply=1) as near,
    ):
        try:
            for name in ("before", "after"):
                with (
                    watching(bed) as log,
                    apps.start(bed.peer, "udp-send", port=near.port, **to) as far,
                ):
                    assert far.result()["replies"] == 1
                    groups[name] = of_port(log, near.port)
                    records += bed.flows.records(dport=[near.port], sport=[far.port])
                if name == "before":
                    words = ("late", "--cgroup", late.rel, "--xid", str(LATE))
                    bed.node.vnet("slice", "add", *words)
        finally:
            bed.node.vnet("slice", "rm", "late", check=False)
    return Found(groups, records)


_MARKED = """
to, port, mark = sys.argv[1:]
s = socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, 36, int(mark))
s.sendto(b"x", (to, int(port)))
"""


def upper_bits_out(bed: Thread, family: int) -> Found:
    """a marks its packets for somebody else's rules."""
    with (
        watching(bed) as log,
        apps.start(bed.peer, "udp-recv", bind=bed.there(family), count=1) as far,
    ):
        words = (bed.there(family), str(far.port), str(UPPER))
        python(bed.ns, _MARKED, *words, slice=bed.a)
        far.result()
        seen = of_port(log, far.port)
    return Found({"all": seen}, bed.flows.records(dport=[far.port]), whole=True)


def upper_bits_in(bed: Thread, family: int) -> Found:
    """Somebody else's rule marks what comes in to b."""
    rule = f"add chain inet others pre {{ type filter hook prerouting priority mangle; \
        meta mark set meta mark or {UPPER:#x}; }}"
    bed.ns.run("nft", "-f", "-", input=f"add table inet others\n{rule}\n")
    try:
        found = _server(bed, bed.here(family), family)
    finally:
        bed.ns.run("nft", "delete", "table", "inet", "others")
    first, *rest = found.packets["all"]
    return Found({"SYN": [first], "rest": rest}, found.records, whole=True)


def passing(bed: Thread, family: int) -> Found:
    """The node forwards what the peer sends by it, with a mark of another's rule."""
    far, port = {4: "192.0.2.9", 6: "2001:db8::9"}[family], 7500 + family
    dev, back = bed.link.a_if, bed.there(family)
    forwarding = {4: "net__ipv4__ip_forward", 6: "net__ipv6__conf__all__forwarding"}[family]
    was = bed.ns.run("sysctl", "-n", forwarding.replace("__", ".")).stdout.strip()
    bed.ns.sysctl(**{forwarding: 1, "net__ipv4__conf__all__send_redirects": 0})
    bed.ns.run("ip", f"-{family}", "route", "add", far, "via", back, "dev", dev)
    bed.peer.run("ip", f"-{family}", "route", "add", far, "via", bed.here(family))
    rule = "add chain inet others pre { type filter hook prerouting priority mangle; \
        meta mark set 0x7; }"
    bed.ns.run("nft", "-f", "-", input=f"add table inet others\n{rule}\n")
    try:
        with (
            watching(bed) as log,
            apps.start(bed.peer, "udp-send", to=far, port=port, count=2) as sent,
        ):
            sent.result()
            seen = until(lambda: of_port(log, port)[1:] and of_port(log, port))
    finally:
        bed.ns.run("nft", "delete", "table", "inet", "others")
        bed.ns.run("ip", f"-{family}", "route", "del", far)
        bed.peer.run("ip", f"-{family}", "route", "del", far)
        bed.ns.sysctl(**{forwarding: was})
    return Found(
        {"all": [p for p in seen if p.prefix == "postrouting"]}, bed.flows.records(dport=[port])
    )
