"""UDP: who only receives, who sends, and ports that change hands."""

import re
import select
import socket
import subprocess
import sys

import pytest
from module_bed import XID_A, XID_B, Bed, counted, iptables, marks, python
from vnet.testing import apps, nflog
from vnet.testing.poll import until

pytest_plugins = ["module_fixtures"]
pytestmark = pytest.mark.vm
UDP = socket.IPPROTO_UDP
FAMILIES = pytest.mark.parametrize("family", [4, 6])


@pytest.mark.parametrize("bound", ["address", "wildcard", "connected"])
def test_a_socket_that_only_receives_owns_what_it_receives(bed: Bed, family, bound):
    options: dict[str, int | str] = {"bind": bed.here(family)}
    if bound == "wildcard":
        options["bind"] = {4: "0.0.0.0", 6: "::"}[family]
    elif bound == "connected":
        options |= {"to": bed.there(family), "to_port": 5555}
    with (
        nflog.capture(bed.node) as log,
        counted(bed) as gained,
        apps.start(bed.node, "udp-recv", bed.a, count=4, **options) as receiver,
        apps.start(
            bed.peer, "udp-send", to=bed.here(family), port=receiver.port, count=4,
            bind=bed.there(family), from_port=5555,
        ),
    ):  # fmt: skip
        assert receiver.result()["packets"] == 4
        seen = log.seen()
    assert marks(seen, "input", proto=UDP) == [XID_A] * 4
    assert bed.halves("-p", "udp", "-f", f"ipv{family}") == [(0, XID_A)]
    # Early demux finds connected sockets only, and only the first of its slot in the hash
    # table, which all namespaces share (__udp4_lib_demux_lookup); the rest is looked up.
    demuxed = gained.get("in-socket", 0)
    assert (demuxed + gained.get("in-lookup", 0), gained["filled"]) == (4, 1)
    assert bound == "connected" or not demuxed


def test_a_v6_wildcard_socket_owns_the_v4_it_receives(bed: Bed):
    with (
        nflog.capture(bed.node) as log,
        apps.start(bed.node, "udp-recv", bed.a, bind="::", count=2) as receiver,
        apps.start(bed.peer, "udp-send", to=bed.here(4), port=receiver.port, count=2),
    ):
        assert receiver.result()["packets"] == 2
        seen = log.seen()
    assert marks(seen, "input", proto=UDP) == [XID_A] * 2


@pytest.mark.parametrize("connected", [0, 1])
def test_a_sender_owns_what_it_sends_and_the_answers(bed: Bed, family, connected):
    with (
        nflog.capture(bed.node) as log,
        apps.start(bed.peer, "udp-recv", bind=bed.there(family), reply=1) as echo,
        apps.start(
            bed.node, "udp-send", bed.b, to=bed.there(family), port=echo.port, count=3, expect=3,
            connected=connected,
        ) as sender,
    ):  # fmt: skip
        assert sender.result()["replies"] == 3
        seen = log.seen()
    for hook in nflog.HOOKS:
        assert marks(seen, hook, proto=UDP) == [XID_B] * 3
    assert bed.halves("-p", "udp") == [(XID_B, 0)]


def test_two_slices_of_one_host_each_own_their_end(bed: Bed, family):
    local = {4: "127.0.0.1", 6: "::1"}[family]
    with (
        nflog.capture(bed.node) as log,
        apps.start(bed.node, "udp-recv", bed.b, bind=local, reply=1) as echo,
        apps.start(
            bed.node, "udp-send", bed.a, to=local, port=echo.port, count=2, expect=2, connected=1
        ) as sender,
    ):
        assert sender.result()["replies"] == 2
        seen, port = log.seen(), echo.port
    assert marks(seen, "postrouting", dport=port) == [XID_A] * 2
    assert marks(seen, "input", dport=port) == [XID_B] * 2
    assert marks(seen, "postrouting", sport=port) == [XID_B] * 2
    assert marks(seen, "input", sport=port) == [XID_A] * 2
    assert bed.halves("-p", "udp") == [(XID_A, XID_B)]


@pytest.mark.parametrize("connected", [False, True])
def test_a_port_that_changes_hands_ends_with_its_new_owner(bed: Bed, connected):
    """Within one connection, and with the event that tells accounting."""
    at = {"bind": bed.here(4), "port": 7000}
    if connected:
        at |= {"to": bed.there(4), "to_port": 5555}
    to = {"to": bed.here(4), "port": 7000, "bind": bed.there(4), "from_port": 5555}
    with (
        nflog.capture(bed.node) as log,
        counted(bed) as gained,
        bed.node.popen("conntrack", "-E", "-e", "UPDATES", stdout=subprocess.PIPE) as events,
    ):
        try:
            _listening(bed)
            for slice in (bed.a, bed.b):
                with (
                    apps.start(bed.node, "udp-recv", slice, count=2, **at) as receiver,
                    apps.start(bed.peer, "udp-send", count=2, **to),
                ):
                    assert receiver.result()["packets"] == 2
            until(lambda: select.select([events.stdout], [], [], 0)[0], what="an event")
            line = events.stdout.readline()
        finally:
            events.kill()
        seen = log.seen()
    assert marks(seen, "input", proto=UDP) == [XID_A, XID_A, XID_B, XID_B]
    assert bed.halves("-p", "udp") == [(0, XID_B)]
    assert (gained["filled"], gained["conflict"]) == (1, 1)
    assert re.search(rf"\[UPDATE\] udp .* mark={XID_B << 16}\b", line)


def _listening(bed: Bed) -> None:
    """Until somebody listens to conntrack's events: a connection made before has none."""

    def subscribed() -> bool:
        # sk Eth Pid Groups ...; 12 is NETLINK_NETFILTER
        lines = bed.node.run("cat", "/proc/net/netlink").stdout.splitlines()[1:]
        return any(w[1] == "12" and int(w[3], 16) for w in map(str.split, lines))

    until(subscribed, what="conntrack -E subscribed")


def test_a_sender_that_takes_a_port_over_takes_the_connection_over(bed: Bed):
    with apps.start(bed.peer, "udp-recv", bind=bed.there(4), count=2) as receiver:
        to = {"to": bed.there(4), "port": receiver.port, "bind": bed.here(4), "from_port": 6000}
        with nflog.capture(bed.node) as log, counted(bed) as gained:
            for slice in (bed.a, bed.b):
                with apps.start(bed.node, "udp-send", slice, **to) as sender:
                    sender.result()
            seen = log.seen()
    assert marks(seen, "postrouting", proto=UDP) == [XID_A, XID_B]
    assert bed.halves("-p", "udp") == [(XID_B, 0)]
    assert (gained["filled"], gained["conflict"]) == (1, 1)


def test_the_node_on_a_slice_s_connection_is_marked_as_itself_and_erases_nothing(bed: Bed):
    with apps.start(bed.peer, "udp-recv", bind=bed.there(4), count=3) as receiver:
        to = {"to": bed.there(4), "port": receiver.port, "bind": bed.here(4), "from_port": 6000}
        with nflog.capture(bed.node) as log, counted(bed) as gained:
            for slice in (bed.a, None, bed.a):
                with apps.start(bed.node, "udp-send", slice, **to) as sender:
                    sender.result()
            seen = log.seen()
    assert marks(seen, "postrouting", proto=UDP) == [XID_A, 0, XID_A]
    assert bed.halves("-p", "udp") == [(XID_A, 0)]
    assert gained["node-socket"] == 1
    assert "conflict" not in gained


_MULTICAST = """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(sys.argv[1]))
s.sendto(b"x", ("239.1.2.3", 7777))
"""
_MEMBER = """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("239.1.2.3", 7777))
s.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP,
             socket.inet_aton("239.1.2.3") + socket.inet_aton(sys.argv[1]))
print("ready", flush=True)
s.recv(10)
"""


def test_multicast_is_the_sender_s_also_as_it_loops_back_and_then_the_receiver_s(bed: Bed):
    with (
        nflog.capture(bed.node) as log,
        bed.node.popen(
            *(sys.executable, "-ISc", "import socket, sys" + _MEMBER, bed.here(4)),
            cgroup=bed.b,
            stdout=subprocess.PIPE,
        ) as member,
    ):
        assert member.stdout.readline() == "ready\n"
        python(bed.node, _MULTICAST, bed.here(4), slice=bed.a)
        assert member.wait(20) == 0
        seen = log.seen()
    assert marks(seen, "postrouting", proto=UDP) == [XID_A, XID_A]
    assert marks(seen, "input", proto=UDP) == [XID_B]


@pytest.mark.parametrize("chain", ["raw", "mangle"])
@FAMILIES
def test_before_routing_the_receiver_is_found_too(bare: Bed, family, chain):
    """In raw even before there is a connection."""
    tool = {4: "iptables-legacy", 6: "ip6tables-legacy"}[family]
    iptables(bare.node, f"-t {chain} -A PREROUTING -j MARK --copy-xid", tool)
    wildcard = {4: "0.0.0.0", 6: "::"}[family]
    with (
        nflog.capture(bare.node) as log,
        counted(bare) as gained,
        apps.start(bare.node, "udp-recv", bare.a, bind=wildcard, count=2) as receiver,
        apps.start(bare.peer, "udp-send", to=bare.here(family), port=receiver.port, count=2),
    ):
        assert receiver.result()["packets"] == 2
        seen = log.seen()
    assert marks(seen, "input", proto=UDP) == [XID_A] * 2
    assert gained["in-lookup"] == 2


@FAMILIES
def test_before_routing_a_wildcard_socket_owns_nothing_that_only_passes(bare: Bed, family):
    tool = {4: "iptables-legacy", 6: "ip6tables-legacy"}[family]
    iptables(bare.node, "-t mangle -A PREROUTING -j MARK --copy-xid", tool)
    wildcard, far = {4: ("0.0.0.0", "192.0.2.9"), 6: ("::", "2001:db8::9")}[family]
    bare.peer.run("ip", f"-{family}", "route", "add", far, "via", bare.here(family))
    with (
        nflog.capture(bare.node, hooks=("prerouting",)) as log,
        apps.start(bare.node, "udp-recv", bare.a, bind=wildcard) as receiver,
        apps.start(bare.peer, "udp-send", to=far, port=receiver.port) as sender,
    ):
        sender.result()
        seen = until(lambda: marks(log.seen(), "prerouting", dst=far))
    assert seen == [0]
