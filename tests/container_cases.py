"""Who owns what containers send and receive: the same under both data paths."""

import socket
import struct

import lxcbed
import pytest
from containerbed import HOOKS, PROTOCOLS, TCP, UDP, A, B, Bed, S, Who, talk, xids
from vnet.testing import nflog
from vnet.testing.poll import until

Seen = list[nflog.Seen]


def owned(seen: Seen, hook: str, there: int, back: int) -> None:
    """All packets at a hook, in each direction."""
    for proto in PROTOCOLS:
        for found, xid in zip(xids(seen, proto, hook), (there, back), strict=True):
            assert found, (proto, hook)
            assert set(found) == {xid}, (proto, hook, found)


def recorded(bed: Bed, family: int, halves: tuple[int, int]) -> None:
    """One connection each, with these owners."""
    for proto in PROTOCOLS:
        assert bed.halves(proto, family) == [halves], proto


def test_what_a_container_sends_and_the_answers_are_its_slice_s(bed: Bed, family):
    seen = talk(bed, Who(bed.a), Who(bed.out), bed.address("out", family))
    for hook in ("forward", "postrouting"):
        owned(seen, hook, A, A)
    recorded(bed, family, (A, 0))


def arrives(bed: Bed, family: int, seen: Seen) -> None:
    """Only the first packet is not known yet when the rules see it."""
    for hook in ("forward", "postrouting"):
        for proto in PROTOCOLS:
            there, back = xids(seen, proto, hook)
            assert there[0] == 0, proto
            assert set(there[1:]) == {A}, proto
            assert set(back) == {A}, proto
    recorded(bed, family, (0, A))


def test_what_comes_from_outside_to_a_container_is_its_slice_s(bed: Bed, family):
    arrives(bed, family, talk(bed, Who(bed.out), Who(bed.a), bed.address("a", family)))


def test_a_port_forwarded_to_a_container_is_its_slice_s(bed: Bed, family):
    tool = {4: "iptables", 6: "ip6tables"}[family]
    here, there = bed.address("node", family), bed.address("a", family)
    rule = ("PREROUTING", "-d", here, "-j", "DNAT", "--to-destination", there)
    bed.node.run(tool, "-t", "nat", "-A", *rule)
    try:
        arrives(bed, family, talk(bed, Who(bed.out), Who(bed.a), here, bind=there))
    finally:
        bed.node.run(tool, "-t", "nat", "-D", *rule)


def test_a_container_and_a_slice_of_the_host_each_own_their_end(bed: Bed, family):
    seen = talk(bed, Who(bed.a), Who(bed.node, bed.s), bed.address("gateway", family))
    for proto in ("tcp", "udp"):
        assert set(xids(seen, proto, "input")[0]) == {S}
        assert set(xids(seen, proto, "postrouting")[1]) == {S}
        assert bed.halves(proto, family) == [(A, S)]
    # The node itself answers a ping.
    assert bed.halves("icmp", family) == [(A, 0)]


def test_a_slice_of_the_host_and_a_container_each_own_their_end(bed: Bed, family):
    seen = talk(bed, Who(bed.node, bed.s), Who(bed.a), bed.address("a", family))
    for proto in PROTOCOLS:
        assert set(xids(seen, proto, "postrouting")[0]) == {S}
        assert set(xids(seen, proto, "input")[1]) == {S}
    recorded(bed, family, (S, A))


def test_two_containers_each_own_their_end(bed: Bed, family):
    seen = talk(bed, Who(bed.a), Who(bed.b), bed.address("b", family))
    for hook in ("forward", "postrouting"):
        owned(seen, hook, A, B)
    recorded(bed, family, (A, B))


def test_a_container_that_never_answers_is_known_by_what_reached_it(bed: Bed, family):
    """POSTROUTING does not know the port of a bridge: the tc program writes the half."""
    bed.node.run("conntrack", "-F")
    bed.out.run("ping", "-q", "-c1", "-W10", bed.address("a", family))  # neighbours are known
    with Who(bed.out).socket(family, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", (bed.address("a", family), UDP))
        until(lambda: bed.halves("udp", family) == [(0, A)])


def test_a_mark_of_somebody_else_s_rule_makes_nobody_a_container(bed: Bed):
    """Nor does it stay where it says something false."""
    rule = ("PREROUTING", "-i", bed.outside.a_if, "-j", "MARK", "--set-xmark", f"{B}/0xffff")
    bed.node.run("iptables", "-t", "mangle", "-A", *rule)
    try:
        seen = talk(bed, Who(bed.out), Who(bed.a), bed.address("a", 4))
        arrives(bed, 4, seen)
        to_node = talk(bed, Who(bed.out), Who(bed.node, bed.s), bed.address("node", 4))
    finally:
        bed.node.run("iptables", "-t", "mangle", "-D", *rule)
    assert set(xids(to_node, "udp", "input")[0]) == {S}
    assert bed.halves("udp", 4) == [(0, S)]


def udp4(src: str, sport: int, dst: str, dport: int) -> bytes:
    """A datagram of one byte; the kernel fills in the rest of the IP header."""
    head = struct.pack(">BBHHHBBH", 0x45, 0, 29, 0, 0, 64, 17, 0)
    addresses = socket.inet_aton(src) + socket.inet_aton(dst)
    return head + addresses + struct.pack(">HHHH", sport, dport, 9, 0) + b"x"


def test_a_container_cannot_take_another_s_connection_nor_name_itself(bed: Bed):
    """It sends from a's address and port, and with a's mark: the packet is its own still."""
    bed.node.sysctl(net__ipv4__conf__all__rp_filter=0)
    bed.node.run("conntrack", "-F")
    a, out = bed.address("a", 4), bed.address("out", 4)
    with (
        Who(bed.a).socket(4, socket.SOCK_DGRAM) as sender,
        Who(bed.b).socket(4, socket.SOCK_RAW, socket.IPPROTO_RAW) as forger,
        nflog.capture(bed.node, hooks=("forward", "postrouting")) as log,
    ):
        sender.bind((a, 7777))
        sender.sendto(b"x", (out, UDP))
        until(lambda: bed.halves("udp", 4) == [(A, 0)])
        forger.setsockopt(socket.SOL_SOCKET, 36, A)  # SO_MARK
        forger.sendto(udp4(a, 7777, out, UDP), (out, 0))

        def there() -> list[nflog.Seen]:
            return [p for p in log.seen() if p.sport == 7777 or p.dport == UDP]

        seen = until(lambda: (found := there())[3:] and found)
    assert [(p.prefix, p.xid) for p in seen] == [
        (hook, xid) for xid in (A, B) for hook in ("forward", "postrouting")
    ]
    assert bed.halves("udp", 4) == [(A, 0)]


def test_a_namespace_that_is_no_slice_s_stays_nobody_s(bed: Bed):
    bed.apply({bed.link_a.a_if: A})
    try:
        seen = talk(bed, Who(bed.b), Who(bed.out), bed.address("out", 4))
        for hook in ("forward", "postrouting"):
            owned(seen, hook, 0, 0)
        recorded(bed, 4, (0, 0))
    finally:
        bed.apply()


# -- a real one ------------------------------------------------------------------

L, VETH = 999, "vntlxc"
_GATEWAYS = "lxc.net.0.ipv4.gateway = 10.98.0.1\nlxc.net.0.ipv6.gateway = fd98::1\n"
_NETWORKS = {
    "routed": "lxc.net.0.veth.mode = router\n" + _GATEWAYS,
    "bridged": "lxc.net.0.link = br0\n" + _GATEWAYS,
}


@pytest.fixture
def lxc(bed: Bed):
    if lacking := lxcbed.missing():
        pytest.skip(f"not installed: {lacking}")
    where = {"routed": VETH, "bridged": "br0"}[bed.layout]
    with lxcbed.container(bed.node, VETH, "10.98.0.2", "fd98::2", _NETWORKS[bed.layout]) as made:
        for address in ("10.98.0.1/24", "fd98::1/64"):
            bed.node.run("ip", "addr", "replace", address, "dev", where, "nodad")
        try:
            bed.apply({**bed.wanted, VETH: L})
            # lxc waits for no duplicate address detection
            until(lambda: "tentative" not in made.run("busybox", "ip", "addr"))
            yield made
        finally:
            if bed.layout == "bridged":
                for address in ("10.98.0.1/24", "fd98::1/64"):
                    bed.node.run("ip", "addr", "del", address, "dev", where)
    bed.apply()


def test_an_lxc_container_is_known_both_ways_by_its_veth(bed: Bed, lxc: lxcbed.Container, family):
    out = bed.address("out", family)
    bed.node.run("conntrack", "-F")
    with nflog.capture(bed.node, hooks=HOOKS) as log:
        with Who(bed.out).socket(family, socket.SOCK_STREAM) as server:
            server.bind((out, TCP))
            server.listen()
            server.settimeout(60)
            with lxc.popen("sh", "-c", f"echo hello | nc -w 30 {out} {TCP}") as sender:
                with server.accept()[0] as accepted:
                    assert accepted.recv(100) == b"hello\n"
                assert sender.wait(60) == 0
        lxc.run("ping", "-q", "-c", "2", "-W", "5", out)
        sent = log.seen()
        assert bed.halves("tcp", family, "--dport", str(TCP)) == [(L, 0)]
        assert bed.halves("icmp", family) == [(L, 0)]
        there = {4: lxc.v4, 6: lxc.v6}[family]
        with Who(bed.out).socket(family, socket.SOCK_STREAM) as client:
            client.connect((there, 80))
            client.sendall(b"GET /index.html HTTP/1.0\r\n\r\n")
            assert client.recv(10000).startswith(b"HTTP/1.")
        got = log.seen()[len(sent) :]
        assert bed.halves("tcp", family, "--dport", "80") == [(0, L)]
    for hook in ("forward", "postrouting"):
        # not the node's own, which looks for its neighbours
        of_it = [p for p in sent if p.proto == 6 or p.dport >> 8 in (0, 8, 128, 129)]
        assert {p.xid for p in of_it if p.prefix == hook and out in (p.src, p.dst)} == {L}
        arrived = [p.xid for p in got if p.prefix == hook and p.proto == 6 and p.dport == 80]
        assert arrived[0] == 0
        assert set(arrived[1:]) == {L}
        assert {p.xid for p in got if p.prefix == hook and p.sport == 80} == {L}
