"""Every packet of a TCP connection carries its owner, and the connection both."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import rawpkt
from module_bed import XID_A, XID_B, Bed, counted, iptables, marks
from vnet.testing import apps, nflog
from vnet.testing.net import Namespace
from vnet.testing.poll import until

pytest_plugins = ["module_fixtures"]
pytestmark = pytest.mark.vm
TCP = socket.IPPROTO_TCP


def flags_of(seen: list[nflog.Seen], hook: str) -> list[str]:
    return [s.tcp_flags for s in seen if s.prefix == hook and s.proto == TCP]


def test_a_client_owns_every_packet_from_syn_to_last_ack(bed: Bed, family):
    with (
        nflog.capture(bed.node) as log,
        apps.start(bed.peer, "tcp-server", bind=bed.there(family), reply=3000) as server,
        apps.start(
            bed.node, "tcp-client", bed.a, to=bed.there(family), port=server.port, send=3000
        ) as client,
    ):
        assert client.result()["received"] == 3000
        server.event("flow")
        seen = until(lambda: _over(log), what="FIN both ways, and the last ACK")
    assert flags_of(seen, "postrouting")[0] == "S"
    assert flags_of(seen, "input")[0] == "SA"
    for hook in nflog.HOOKS:
        assert set(marks(seen, hook, proto=TCP)) == {XID_A}
    assert bed.halves("-p", "tcp", "-f", f"ipv{family}") == [(XID_A, 0)]


def _over(log: nflog.Capture) -> list[nflog.Seen]:
    """All that was seen, once both sides' FIN were and something after them."""
    seen = log.seen()
    fins = [i for i, s in enumerate(seen) if "F" in s.tcp_flags]
    last = fins[-1] if fins else 0
    both = {seen[i].prefix for i in fins} == set(nflog.HOOKS)
    return seen if both and seen[last + 1 :] else []


@pytest.mark.parametrize("wildcard", [False, True])
def test_a_server_owns_every_packet_from_syn_to_last_ack(bed: Bed, family, wildcard):
    bind = {4: "0.0.0.0", 6: "::"}[family] if wildcard else bed.here(family)
    with (
        nflog.capture(bed.node) as log,
        apps.start(bed.node, "tcp-server", bed.b, bind=bind, reply=3000) as server,
        apps.start(
            bed.peer, "tcp-client", to=bed.here(family), port=server.port, send=3000
        ) as client,
    ):
        assert client.result()["received"] == 3000
        server.event("flow")
        seen = until(lambda: _over(log), what="FIN both ways, and the last ACK")
    assert flags_of(seen, "input")[0] == "S"
    assert flags_of(seen, "postrouting")[0] == "SA"
    for hook in nflog.HOOKS:
        assert set(marks(seen, hook, proto=TCP)) == {XID_B}
    assert bed.halves("-p", "tcp", "-f", f"ipv{family}") == [(0, XID_B)]


def test_a_v6_socket_owns_its_v4_connections(bed: Bed):
    with (
        nflog.capture(bed.node) as log,
        apps.start(bed.node, "tcp-server", bed.b, bind="::", reply=10) as server,
        apps.start(bed.peer, "tcp-client", to=bed.here(4), port=server.port, send=10) as client,
    ):
        assert client.result()["received"] == 10
        seen = log.seen()
    for hook in nflog.HOOKS:
        assert set(marks(seen, hook, proto=TCP)) == {XID_B}


def test_two_slices_of_one_host_each_own_their_end(bed: Bed, family):
    local = {4: "127.0.0.1", 6: "::1"}[family]
    with (
        nflog.capture(bed.node) as log,
        apps.start(bed.node, "tcp-server", bed.b, bind=local, reply=3000) as server,
        apps.start(bed.node, "tcp-client", bed.a, to=local, port=server.port, send=3000) as client,
    ):
        assert client.result()["received"] == 3000
        server.event("flow")
        seen = log.seen()
        port = server.port
    assert set(marks(seen, "postrouting", dport=port)) == {XID_A}
    assert set(marks(seen, "input", dport=port)) == {XID_B}
    assert set(marks(seen, "postrouting", sport=port)) == {XID_B}
    assert set(marks(seen, "input", sport=port)) == {XID_A}
    assert bed.halves("-p", "tcp", "-f", f"ipv{family}") == [(XID_A, XID_B)]


def test_the_node_s_own_connections_are_nobody_s(bed: Bed):
    with (
        nflog.capture(bed.node) as log,
        apps.start(bed.peer, "tcp-server", bind=bed.there(4), reply=10) as server,
        apps.start(bed.node, "tcp-client", to=bed.there(4), port=server.port, send=10) as client,
        counted(bed) as gained,
    ):
        client.result()
        server.event("flow")
        seen = log.seen()
    assert {s.mark for s in seen if s.proto == TCP} == {0}
    assert bed.halves("-p", "tcp") == [(0, 0)]
    assert not gained.keys() & {"out-socket", "in-socket", "in-lookup", "in-conn", "filled"}


def test_a_refused_connection_is_the_client_s_from_syn_to_rst(bed: Bed, family):
    with nflog.capture(bed.node) as log:
        _refused(bed.node, bed.there(family), bed.a)
        seen = log.seen()
    assert [(s.tcp_flags, s.xid) for s in seen if s.proto == TCP] == [("S", XID_A), ("RA", XID_A)]


def test_the_rst_of_a_port_that_nobody_has_is_nobody_s(bed: Bed, family):
    with nflog.capture(bed.node) as log, counted(bed) as gained:
        _refused(bed.peer, bed.here(family), None)
        seen = log.seen()
    assert [(s.tcp_flags, s.xid) for s in seen if s.proto == TCP] == [("S", 0), ("RA", 0)]
    assert gained["no-socket"] >= 2


def _refused(ns: Namespace, to: str, slice) -> None:
    done = ns.run(
        *("/usr/bin/python3", "-ISc"),
        "import socket, sys\ns = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else 2)\n"
        "print(s.connect_ex((sys.argv[1], 9)))",
        to,
        cgroup=slice,
    )
    assert done.stdout.strip() == "111"  # ECONNREFUSED


def test_a_rst_after_the_socket_is_gone_is_the_former_owner_s(bed: Bed, family):
    with nflog.capture(bed.node) as log:
        with (
            apps.start(bed.peer, "tcp-server", bind=bed.there(family), request=10) as server,
            apps.start(
                bed.node, "tcp-client", bed.a, to=bed.there(family), port=server.port, send=10,
                hold="sent", close="rst",
            ) as client,
        ):  # fmt: skip
            client.event("sent")
            ours = until(lambda: [s for s in log.seen() if s.tcp_flags == "PA"])
            client.go()
            client.result()
        sport, dport, seq, ack = rawpkt.segment(ours[-1].payload)
        before = len(log.seen())
        with counted(bed) as gained:
            late = rawpkt.tcp(
                bed.there(family), dport, bed.here(family), sport, rawpkt.ACK, ack, seq + 10
            )
            rawpkt.send(bed.peer, late)
            after = until(lambda: [s for s in log.seen()[before:] if "R" in s.tcp_flags])
    assert [s.xid for s in after] == [XID_A]
    assert gained["out-conn"] >= 1


def test_time_wait_answers_in_its_former_owner_s_name(bed: Bed, family):
    with (
        nflog.capture(bed.node) as log,
        apps.start(bed.peer, "tcp-server", bind=bed.there(family)) as server,
        apps.start(
            bed.node, "tcp-client", bed.a, to=bed.there(family), port=server.port, send=10
        ) as client,
    ):
        client.result()
        fin = until(lambda: [s for s in log.seen() if s.prefix == "input" and "F" in s.tcp_flags])
        until(lambda: _over(log))
        sport, dport, seq, ack = rawpkt.segment(fin[-1].payload)
        assert _waits(bed, dport)
        before = len(log.seen())
        with counted(bed) as gained:
            again = rawpkt.tcp(
                bed.there(family), sport, bed.here(family), dport, rawpkt.FIN | rawpkt.ACK, seq, ack
            )
            rawpkt.send(bed.peer, again)
            answer = until(
                lambda: [
                    s for s in log.seen()[before:] if s.prefix == "postrouting" and s.tcp_flags
                ],
                what="ACK",
            )
    assert [(s.tcp_flags, s.xid) for s in answer] == [("A", XID_A)]
    # Neighbours may ask for each other meanwhile, without a connection.
    assert gained.keys() - {"no-conntrack"} == {"in-conn", "out-conn"}


def _waits(bed: Bed, port: int) -> bool:
    """Whether a connection of that local port is in TIME_WAIT."""
    found = bed.node.run("ss", "-tanH", "state", "time-wait", "sport", f"= :{port}").stdout
    return bool(found.strip())


def test_a_new_connection_over_a_time_wait_is_the_listener_s_from_its_syn(bed: Bed):
    """The port has changed hands meanwhile: a SYN is not for the dead."""
    with nflog.capture(bed.node) as log:
        with (
            apps.start(bed.node, "tcp-server", bed.a, bind=bed.here(4), request=10) as server,
            apps.start(
                bed.peer, "tcp-client", to=bed.here(4), port=server.port, send=10, from_port=4321,
                bind=bed.there(4), hold="sent",
            ) as client,
        ):  # fmt: skip
            port = server.port
            client.event("sent")
            server.stop()  # closes first, so that TIME_WAIT is here
            server.process.wait(10)
            client.go()
            client.result()
            until(lambda: _waits(bed, port))
        before = len(log.seen())
        with (
            apps.start(bed.node, "tcp-server", bed.b, bind=bed.here(4), port=port, reply=10),
            apps.start(
                bed.peer, "tcp-client", to=bed.here(4), port=port, send=10, from_port=4321,
                bind=bed.there(4),
            ) as client,
        ):  # fmt: skip
            assert client.result()["received"] == 10
        seen = [s for s in log.seen()[before:] if s.proto == TCP]
    first = next(i for i, s in enumerate(seen) if s.tcp_flags == "S")
    assert {s.xid for s in seen[first:]} == {XID_B}


@contextmanager
def _no_end_is_heard(bed: Bed, family: int) -> Iterator[None]:
    """Every reset is lost, on both sides, before connection tracking sees it."""
    tool = "iptables-legacy" if family == 4 else "ip6tables-legacy"
    lost = "OUTPUT -t raw -p tcp --tcp-flags RST RST -j DROP"
    for ns in (bed.node, bed.peer):
        iptables(ns, f"-A {lost}", tool)
    yield
    for ns in (bed.node, bed.peer):
        iptables(ns, f"-D {lost}", tool)


def _dies_unheard(bed: Bed, family: int, server: tuple, client: tuple) -> None:
    """A connection that connection tracking goes on to hold for established."""
    (server_ns, server_slice, at), (client_ns, client_slice, near) = server, client
    with (
        _no_end_is_heard(bed, family),
        apps.start(
            server_ns, "tcp-server", server_slice, bind=at, port=4323, request=10, close="rst"
        ) as left,
        apps.start(
            client_ns, "tcp-client", client_slice, to=at, port=4323, bind=near, from_port=4322,
            send=10, hold="sent", close="rst",
        ) as right,
    ):  # fmt: skip
        left.event("flow")
        right.go()
        right.result()


def _ends(bed: Bed, family: int, ours: str, slice) -> tuple[tuple, tuple]:
    """(server, client): ours is the one or the other, the peer has the other end."""
    here, there = (bed.node, slice, bed.here(family)), (bed.peer, None, bed.there(family))
    return (here, there) if ours == "server" else (there, here)


@pytest.mark.parametrize("ours", ["server", "client"])
@pytest.mark.parametrize("successor", [XID_B, 0])
def test_a_syn_on_an_entry_still_held_for_established_is_the_next_owner_s(
    bed: Bed, family, ours, successor
):
    """Both ends of the former owner's are gone unheard; the same ports are used again."""
    which = ("-p", "tcp", "-f", f"ipv{family}")
    half = {"server": lambda xid: (0, xid), "client": lambda xid: (xid, 0)}[ours]
    _dies_unheard(bed, family, *_ends(bed, family, ours, bed.a))
    assert "ESTABLISHED" in bed.node.run("conntrack", "-L", *which).stdout
    assert bed.halves(*which) == [half(XID_A)]
    server, client = _ends(bed, family, ours, bed.b if successor else None)
    with (
        nflog.capture(bed.node) as log,
        counted(bed) as gained,
        apps.start(server[0], "tcp-server", server[1], bind=server[2], port=4323, reply=10),
        apps.start(
            client[0], "tcp-client", client[1], to=server[2], port=4323, bind=client[2],
            from_port=4322, send=10,
        ) as again,
    ):  # fmt: skip
        assert again.result()["received"] == 10
        seen = [s for s in log.seen() if s.proto == TCP]
    assert seen[0].tcp_flags == "S"
    assert {s.xid for s in seen} == {successor}
    assert gained["conflict"] == 1
    assert bed.halves(*which) == [half(successor)]
