"""What a raw socket hears, and whose a connection is: scenarios of a guarded node."""

import struct
from dataclasses import replace

from guard_attempts import CONNECTION, PORT, PORT_B, SINK, XIDS, group, loopback
from guard_updates import observing
from guardbed import Guarded
from vnet.testing.packets import ICMP, TCP, UDP, World, echo, ip, pton, summed, tcp, total, udp
from vnet.testing.poll import until
from vnet.testing.steps import Steps, its_connection, pktinfo, raw, sends


def _to(bed: Guarded, proto: int, role: str, w: World) -> None:
    """Let a packet with this token come in that belongs to a role."""
    if proto == ICMP:
        assert bed.agents[role].tries(sends(kind=ICMP)(w))["ok"]
        return
    port = {"a": PORT, "b": PORT_B}[role]
    make = udp if proto == UDP else tcp
    turned = replace(w, here=w.there, there=w.here)
    packet = ip(turned, proto, summed(turned, proto, make(w, SINK, port)))
    raw = [["socket", w.af, "SOCK_RAW", 255], ["send", packet.hex(), w.here, 0]]
    assert bed.agents["peer"].tries(raw)["ok"]


HEARD = {"icmp": ICMP, "udp": UDP, "tcp": TCP}


def raw_sockets_hear_their_own_flows_only(bed: Guarded, family: int, what: str) -> None:
    proto = HEARD[what]
    first = bed.world(family)
    number = first.icmp if proto == ICMP else proto
    kind = "SOCK_DGRAM" if proto == UDP else "SOCK_STREAM"
    foreign, own = bed.world(family), bed.world(family)

    def server(port: int) -> Steps:
        listen = [["listen"]] if proto == TCP else []
        reuse = ["set", "SOL_SOCKET", "SO_REUSEADDR", 1]
        return [
            *(["socket", first.af, kind], reuse),
            *(["bind", first.here, port], *listen, ["hold"]),
        ]

    with bed.agents["a"].holding(server(PORT)), bed.agents["b"].holding(server(PORT_B)):
        listening = {}
        for role in ("b", "f", "node"):
            steps = [["socket", first.af, "SOCK_RAW", number], ["go"], ["receive", own.token.hex()]]
            listening[role] = bed.agents[role].begins(steps)
            assert bed.agents[role].answer(listening[role])["ok"]
        _to(bed, proto, "a", foreign)
        _to(bed, proto, "b", own)
        heard = {role: bed.agents[role].answer(n) for role, n in listening.items()}
    tokens = {role: "".join(said["got"]) for role, said in heard.items()}
    assert all(said["ok"] for said in heard.values()), heard
    assert foreign.token.hex() not in tokens["b"]
    assert foreign.token.hex() in tokens["f"]
    assert foreign.token.hex() in tokens["node"]


def a_ping_socket_hears_no_reply_to_anothers_raw_ping(bed: Guarded, family: int) -> None:
    """Nor the other way round, where both have one id; but each hears its own."""
    foreign, own, last = (bed.world(family) for _ in range(3))
    while total(own.token) == total(foreign.token):
        own = bed.world(family)  # a request is known by the sum of its data (vnet/ext/bpf/echo.h)
    ident, b, c = 4100 + family, bed.agents["b"], bed.agents["c"]
    ping = [["socket", own.af, "SOCK_DGRAM", own.icmp], ["bind", own.wild, ident]]
    raw = ["socket", own.af, "SOCK_RAW", own.icmp]

    def asks(w: World) -> Steps:
        return [["send", echo(w, ident).hex(), w.there, 0], ["receive", w.token.hex()]]

    before = bed.refusals().get(XIDS["c"], 0)
    with c.holding([*ping, ["hold"]]):
        assert b.tries([raw, *asks(foreign)])["ok"]
        until(lambda: bed.refusals().get(XIDS["c"], 0) > before, what="c's refusal")
    listening = b.begins([raw, ["go"], ["receive", last.token.hex()]])
    assert b.answer(listening)["ok"]
    assert c.tries([*ping, *asks(own)])["ok"]
    assert b.tries([raw, *asks(last)])["ok"]
    heard = b.answer(listening)
    assert heard["ok"] and own.token.hex() not in "".join(heard["got"]), heard
    before = bed.refusals().get(XIDS["c"], 0)
    assert c.tries([*ping, *asks(bed.world(family))])["ok"]
    if family == 6:  # who answers is not whom it has asked
        everybody = replace(own, there="ff02::1", token=bed.world(6).token)
        there = ["set", "SOL_SOCKET", "SO_BINDTODEVICE", own.interface.encode().hex()]
        said = c.tries([*ping, there, *asks(everybody)])
        assert said["ok"], said
    assert bed.refusals().get(XIDS["c"], 0) == before


def a_raw_socket_hears_no_errors_about_others(bed: Guarded, family: int) -> None:
    """IP_RECVERR stays off: the error queue is not asked about."""
    w = bed.world(family)
    level, option = (0, 11) if family == 4 else (41, 25)
    one = struct.pack("=I", 1)
    forms = [1, one.hex().ljust(16384, "0"), *([one[:1].hex()] if family == 4 else [])]
    for role, kind, on in (("b", "SOCK_RAW", 0), ("b", "SOCK_DGRAM", 1), ("f", "SOCK_RAW", 1),
                           ("node", "SOCK_RAW", 1)):  # fmt: skip
        for form in forms:
            made = [["socket", w.af, kind, UDP], ["set", level, option, form]]
            before = bed.refusals().get(XIDS[role], 0)
            said = bed.agents[role].tries([*made, ["get", level, option]])
            assert said["ok"] and said["got"] == [on], (role, kind, said)
            assert bed.refusals().get(XIDS[role], 0) == before + (not on), (role, kind)


def a_forged_packet_is_not_counted_to_the_connection(bed: Guarded, family: int) -> None:
    w = bed.world(family)
    made = [["socket", w.af, "SOCK_DGRAM"], ["bind", w.here, PORT], ["connect", w.there, SINK]]
    words = (f"src={w.here}", f"sport={PORT}", f"dport={SINK}")
    bed.node.ns.run("conntrack", "-D", "-p", "udp", "--sport", str(PORT), check=False)
    bed.node.ns.run("conntrack", "-D", "-f", "ipv6", "-p", "udp", "--sport", str(PORT), check=False)
    with bed.agents["a"].holding([*made, ["send", w.token.hex(), "", 0], ["hold"]]):
        bed.seen(w.token, family)
        [before] = bed.tracked(*words)
        assert "packets=1" in before
        forged = raw(lambda w: ip(w, UDP, udp(w, PORT, SINK)))
        for role in ("b", "f", "node"):
            bed.agents[role].tries(forged(w))
        [after] = bed.tracked(*words)
        assert "packets=1" in after
        assert bed.agents["a"].tries(forged(w))["ok"]
        [after] = bed.tracked(*words)
        assert "packets=2" in after


def _marks(bed: Guarded, *words: str) -> set[int]:
    """The originators of the connections that hold all these words."""
    lines = [
        dict(w.split("=", 1) for w in line.split() if "=" in w) for line in bed.tracked(*words)
    ]
    return {int(found["mark"]) & 0xFFFF for found in lines}


def a_socket_bound_elsewhere_takes_no_connection_over(bed: Guarded, family: int) -> None:
    """Nor does it where the guard only observes."""
    w, port = bed.world(family), CONNECTION + 1
    words = (f"src={w.here}", f"sport={port}", f"dport={SINK}")
    cmsg = pktinfo(w, w.here)
    send = ["send", w.token.hex(), w.there, SINK, cmsg]
    made = ["socket", w.af, "SOCK_DGRAM"]
    with bed.agents["a"].holding(its_connection(UDP, port)(w)):
        bed.seen(w.token, family)
        for bound in (loopback(w), group(w)):
            with observing(bed):
                assert bed.agents["c"].tries([made, ["bind", bound, port], send])["ok"]
            assert _marks(bed, *words) == {XIDS["a"]}, bound
    # it may be the first there, and then others may take over from it
    words = (f"src={w.here}", f"sport={port + 1}", f"dport={SINK}")
    assert bed.agents["c"].tries([made, ["bind", group(w), port + 1], send])["ok"]
    assert _marks(bed, *words) == {XIDS["c"]}
    with bed.agents["a"].holding(its_connection(UDP, port + 1)(w)):
        assert _marks(bed, *words) == {XIDS["a"]}


def a_later_fragment_has_no_ports(bed: Guarded, header: str) -> None:
    """IPv6's on loopback are not put together before INPUT. The flow label is nobody's port."""
    w, port = bed.world(6), CONNECTION + 3
    options = {"none": [], "routing": [57, bytes((0, 2, 4, *bytes(5))) + pton(w.here)],
               "options": [59, bytes((0, 0, 1, 4, *bytes(4)))]}[header]  # fmt: skip
    made = ["socket", "AF_INET6", "SOCK_DGRAM"]
    extension = [["set", 41, options[0], options[1].hex()]] if options else []
    to = struct.pack("=H", 10) + struct.pack(">HI", port, PORT) + pton(w.here) + bytes(4)
    with (
        bed.agents["a"].holding([made, ["bind", "::", PORT], ["hold"]]),
        bed.agents["c"].holding([made, ["bind", w.here, port], ["hold"]]),
    ):
        label = ["set", 41, 33, 1]  # IPV6_FLOWINFO_SEND
        send = [["connectbytes", to.hex()], ["send", bytes(65490).hex(), "", 0]]
        said = bed.agents["c"].tries([made, ["bind", w.here, 0], label, *extension, *send])
        assert said["ok"], said
        [line] = bed.tracked(f"dport={port}")
        bed.node.ns.run("conntrack", "-D", "-f", "ipv6", "-p", "udp", "--dport", str(port))
    assert f"mark={XIDS['c'] << 16 | XIDS['c']}" in line.split(), line
