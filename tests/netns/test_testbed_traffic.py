"""The traffic programs count rightly, and the capture sees every packet's mark."""

import pytest
from vnet.testing import apps, nflog

pytestmark = pytest.mark.netns


@pytest.fixture(params=[4, 6])
def address(request, peers):
    """The peer's address, in each family."""
    return peers.link.b4 if request.param == 4 else peers.link.b6


def test_both_ends_of_tcp_count_the_same_bytes_for_each_connection(peers, slices, address):
    with (
        apps.start(peers.peer, "tcp-server", bind=address, reply=70_000, connections=50) as server,
        apps.start(
            peers.node,
            "tcp-client",
            slices.a,
            to=address,
            port=server.port,
            connections=50,
            send=100_000,
            vary=7,
        ) as client,
    ):
        sums = client.result()
        assert (
            server.result()["received"] == sums["sent"] == sum(100_000 + i % 8 for i in range(50))
        )
        assert sums["received"] == 50 * 70_000
        mine = {(*f["local"], *f["remote"]): (f["sent"], f["received"]) for f in client.flows()}
        theirs = {(*f["remote"], *f["local"]): (f["received"], f["sent"]) for f in server.flows()}
        assert mine == theirs
        assert len(mine) == 50
        assert {f["end"] for f in client.flows()} == {"fin"}


def test_a_server_goes_on_while_nobody_reads_its_report(peers):
    with (
        apps.start(peers.peer, "tcp-server", bind=peers.link.b4, connections=1500) as server,
        apps.start(
            *(peers.node, "tcp-client"),
            to=peers.link.b4,
            port=server.port,
            connections=1500,
            send=10,
        ) as client,
    ):
        assert client.result()["sent"] == server.result()["received"] == 15_000
        assert len(server.flows()) == 1500


def test_a_client_can_end_with_a_reset(peers, address):
    with (
        apps.start(peers.peer, "tcp-server", bind=address, request=10, reply=20) as server,
        apps.start(
            peers.node,
            "tcp-client",
            to=address,
            port=server.port,
            send=10,
            receive=20,
            close="rst",
        ) as client,
    ):
        assert client.result()["received"] == 20
        server.event("flow")
        assert server.flows()[0]["end"] == "ECONNRESET"


def test_a_server_can_end_with_a_reset(peers, address):
    with (
        apps.start(peers.peer, "tcp-server", bind=address, request=10, close="rst") as server,
        apps.start(peers.node, "tcp-client", to=address, port=server.port, send=10) as client,
    ):
        client.result()
        assert client.flows()[0]["end"] == "ECONNRESET"


def test_a_held_client_waits_between_connecting_and_sending(peers, address):
    with (
        apps.start(peers.peer, "tcp-server", bind=address) as server,
        apps.start(
            peers.node, "tcp-client", to=address, port=server.port, send=5, hold="connected,sent"
        ) as client,
    ):
        client.go()
        client.event("sent")
        assert not server.flows()
        client.go()
        assert client.result()["sent"] == 5
        assert server.event("flow")["received"] == 5


@pytest.mark.parametrize("connected", [0, 1])
def test_udp_counts_and_replies(peers, address, connected):
    with (
        apps.start(peers.peer, "udp-recv", bind=address, reply=1, count=20) as receiver,
        apps.start(
            peers.node,
            "udp-send",
            to=address,
            port=receiver.port,
            count=20,
            size=300,
            expect=20,
            connected=connected,
        ) as sender,
    ):
        done = sender.result()
        assert (done["replies"], done["received"], done["sent"]) == (20, 6000, 6000)
        assert receiver.result()["received"] == 6000


def test_a_server_has_a_port_that_no_program_had_before(ns):
    """By its port it is looked for among records that stay."""
    ns.sysctl(net__ipv4__ip_local_port_range="61000 61015")
    had = []
    for _ in range(8):
        with apps.start(ns, "udp-recv", bind="127.0.0.1") as receiver:
            had.append(receiver.port)
    assert len(set(had)) == 8
    assert set(had) <= set(range(61000, 61016))


def test_a_server_takes_a_port_again_where_there_is_no_other(ns):
    ns.sysctl(net__ipv4__ip_local_port_range="61016 61017")
    for _ in range(3):
        with apps.start(ns, "udp-recv", bind="127.0.0.1") as receiver:
            assert receiver.port in (61016, 61017)


def test_udp_to_a_closed_port_is_refused(peers, address):
    with apps.start(peers.node, "udp-send", to=address, port=9, refusals=1) as sender:
        assert sender.result()["refused"] == 1


def test_the_capture_has_every_packet_of_a_connection_with_its_mark(peers, address):
    peers.node.run(
        "nft",
        "-f",
        "-",
        input="table inet m { chain o { type filter hook output priority -150;"
        " meta l4proto tcp meta mark set 0xabcd0200; }; }",
    )
    with (
        nflog.capture(peers.node) as capture,
        apps.start(peers.peer, "tcp-server", bind=address) as server,
        apps.start(peers.node, "tcp-client", to=address, port=server.port, send=1000) as client,
    ):
        client.result()
        tcp = [p for p in capture.seen() if p.proto == 6]
    out = [p for p in tcp if p.prefix == "postrouting"]
    back = [p for p in tcp if p.prefix == "input"]
    assert (out[0].tcp_flags, back[0].tcp_flags) == ("S", "SA")
    assert any("F" in p.tcp_flags for p in out)
    assert any("F" in p.tcp_flags for p in back)
    assert {p.mark for p in out} == {0xABCD0200}
    assert {p.xid for p in out} == {0x200}
    assert {p.mark for p in back} == {0}
    assert {(p.dst, p.dport) for p in out} == {(address, server.port)}
    assert max(p.length for p in out) > 1000


def test_the_capture_names_icmp_by_type_and_id(peers, address):
    with nflog.capture(peers.node) as capture:
        peers.node.run("ping", "-c1", "-e77", "-W5", address)
        seen = capture.seen()
    request, reply = (0x0800, 0x0000) if "." in address else (0x8000, 0x8100)
    echo = [p for p in seen if p.dport in (request, reply) and p.proto in (1, 58)]
    assert [p.dport for p in echo] == [request, reply]
    assert echo[0].sport == echo[1].sport == 77
