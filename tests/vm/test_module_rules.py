"""The target in its tables and hooks, beside other rules and other namespaces."""

import socket

import pytest
from module_bed import COPY, XID_A, XID_B, Bed, both, counted, iptables, marks, python
from vnet.testing import apps, cgroup, net, nflog
from vnet.testing.poll import until

pytest_plugins = ["module_fixtures"]
pytestmark = pytest.mark.vm
UDP = socket.IPPROTO_UDP
_SEND = """
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
s.sendto(b"x", (sys.argv[1], 9))
"""


def test_the_upper_half_of_the_mark_stays_others(bare: Bed):
    iptables(bare.node, "-t mangle -A POSTROUTING -j MARK --set-xmark 0xabcd1234/0xffffffff")
    iptables(bare.node, f"-t mangle -A POSTROUTING {COPY}")
    with nflog.capture(bare.node) as log:
        python(bare.node, _SEND, bare.there(4), slice=bare.a)
        python(bare.node, _SEND, bare.there(4))
        seen = log.seen()
    sent = [s.mark for s in seen if s.prefix == "postrouting" and s.proto == UDP]
    assert sent == [0xABCD0000 | XID_A, 0xABCD0000]


def test_the_other_operations_do_what_revision_2_does(bare: Bed):
    steps = ("--set-xmark 0xff00ff00/0xffffffff", "--and-mark 0xf0f0f0f0", "--or-mark 0x3",
             "--xor-mark 0x1", "--set-mark 0x50/0xf0")  # fmt: skip
    mark = 0
    for step in steps:
        iptables(bare.node, f"-t mangle -A POSTROUTING -j MARK {step}")
    mark = ((0xFF00FF00 & 0xF0F0F0F0 | 0x3) ^ 0x1) & ~0xF0 | 0x50
    with nflog.capture(bare.node) as log:
        python(bare.node, _SEND, bare.there(4))
        seen = log.seen()
    assert [s.mark for s in seen if s.prefix == "postrouting" and s.proto == UDP] == [mark]


@pytest.mark.parametrize("variant", ["legacy", "nft"])
@pytest.mark.parametrize("family", [4, 6])
def test_one_rule_in_nat_stamps_whole_connections(bare: Bed, family, variant):
    tool = {4: "iptables", 6: "ip6tables"}[family]
    iptables(bare.node, "-t nat -A POSTROUTING -j MARK --copy-xid", f"{tool}-{variant}")
    with (
        apps.start(bare.peer, "tcp-server", bind=bare.there(family), reply=100) as server,
        apps.start(
            bare.node, "tcp-client", bare.a, to=bare.there(family), port=server.port, send=100
        ) as client,
    ):
        client.result()
    assert bare.halves("-p", "tcp", "-f", f"ipv{family}") == [(XID_A, 0)]


def test_in_the_nft_variant_it_marks_as_in_legacy(bare: Bed):
    for hook in ("INPUT", "POSTROUTING"):
        iptables(bare.node, f"-t mangle -A {hook} {COPY}", "iptables-nft")
    with (
        nflog.capture(bare.node) as log,
        apps.start(bare.node, "udp-recv", bare.b, bind="0.0.0.0", count=1) as receiver,
    ):
        python(bare.node, _SEND, bare.there(4), slice=bare.a)
        with apps.start(bare.peer, "udp-send", to=bare.here(4), port=receiver.port):
            receiver.result()
        seen = log.seen()
    assert marks(seen, "postrouting", proto=UDP) == [XID_A]
    assert marks(seen, "input", proto=UDP) == [XID_B]


def test_a_sub_cgroup_belongs_to_its_slice_and_the_deepest_slice_wins(bed: Bed):
    with (
        cgroup.cgroup(parent=bed.a) as inner,
        cgroup.cgroup(parent=inner) as innermost,
        nflog.capture(bed.node) as log,
    ):
        python(bed.node, _SEND, bed.there(4), slice=innermost)
        assert bed.module.set_many({inner.id: XID_B}) == {}
        python(bed.node, _SEND, bed.there(4), slice=innermost)
        python(bed.node, _SEND, bed.there(4), slice=bed.a)
        assert bed.module.set_many({innermost.id: 7}) == {}
        python(bed.node, _SEND, bed.there(4), slice=innermost)
        bed.module.delete_many([inner.id, innermost.id])
        python(bed.node, _SEND, bed.there(4), slice=innermost)
        seen = log.seen()
    assert marks(seen, "postrouting", proto=UDP) == [XID_A, XID_B, XID_A, 7, XID_A]


def test_a_slice_that_is_taken_out_of_the_table_is_the_node_s(bed: Bed):
    with nflog.capture(bed.node) as log, counted(bed) as gained:
        bed.module.delete_many([bed.a.id])
        python(bed.node, _SEND, bed.there(4), slice=bed.a)
        seen = log.seen()
    assert marks(seen, "postrouting", proto=UDP) == [0]
    assert gained["node-socket"] == 1


def test_a_changed_xid_is_used_at_once_also_by_old_sockets(bed: Bed):
    with (
        nflog.capture(bed.node) as log,
        apps.start(bed.node, "udp-send", bed.a, to=bed.there(4), port=9, hold=1, count=1) as sender,
    ):
        bed.module.set_many({bed.a.id: 9})
        sender.go()
        sender.result()
        seen = log.seen()
    assert marks(seen, "postrouting", proto=UDP) == [9]


@pytest.mark.parametrize("family", [4, 6])
def test_what_is_forwarded_is_nobody_s(own: Bed, family):
    """Even if a slice of this host sent it, from a namespace of its own."""
    both(own.node, f"-t mangle -A FORWARD {COPY}")
    own.node.sysctl(net__ipv4__ip_forward=1, net__ipv6__conf__all__forwarding=1)
    with net.namespace("far") as far, net.veth(own.node, far) as link:
        to, back = {4: (link.b4, link.a4), 6: (link.b6, link.a6)}[family]
        # a router asks for neighbours from its link-local address, and not without one
        for dev in (own.link.a_if, link.a_if):
            own.node.run("ip", "addr", "add", "fe80::1/64", "dev", dev, "nodad")
        own.peer.run("ip", f"-{family}", "route", "add", to, "via", own.here(family))
        far.run("ip", f"-{family}", "route", "add", "default", "via", back)
        with (
            nflog.capture(own.node, hooks=("forward", "postrouting")) as log,
            counted(own) as gained,
            apps.start(far, "udp-recv", own.b, bind=to, reply=1) as echo,
            apps.start(
                own.peer, "udp-send", own.a, to=to, port=echo.port, count=2, expect=2
            ) as sender,
        ):
            assert sender.result()["replies"] == 2
            seen = log.seen()
    for hook in ("forward", "postrouting"):
        assert marks(seen, hook, proto=UDP) == [0] * 4
    assert own.halves("-p", "udp") == [(0, 0)]
    assert gained["forwarded"] >= 8


def test_what_another_namespace_sent_is_the_receiver_s_here(bed: Bed):
    """The sender's socket stays on a packet that crosses a veth: it is not ours to ask."""
    with (
        nflog.capture(bed.node) as log,
        apps.start(bed.node, "udp-recv", bed.a, bind=bed.here(4), count=1) as receiver,
        apps.start(bed.peer, "udp-send", bed.b, to=bed.here(4), port=receiver.port),
    ):
        receiver.result()
        seen = log.seen()
    assert marks(seen, "input", proto=UDP) == [XID_A]


def test_a_bridged_packet_s_foreign_socket_is_counted_and_not_used(bare: Bed):
    """With br_netfilter POSTROUTING sees bridged packets, their sender's socket on them."""
    node = bare.node
    with (
        net.namespace("one") as one,
        net.namespace("two") as two,
        net.veth(node, one) as left,
        net.veth(node, two) as right,
    ):
        node.run("ip", "link", "add", "br0", "type", "bridge")
        for link in (left, right):
            node.run("ip", "addr", "flush", "dev", link.a_if)
            node.run("ip", "link", "set", link.a_if, "master", "br0")
        node.run("ip", "link", "set", "br0", "up")
        node.run("sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=1")
        one.run("ip", "addr", "add", "10.88.0.1/24", "dev", left.b_if)
        two.run("ip", "addr", "add", "10.88.0.2/24", "dev", right.b_if)
        iptables(node, f"-t mangle -A POSTROUTING {COPY}")
        iptables(node, f"-t mangle -A PREROUTING {COPY}")
        with (
            nflog.capture(node, hooks=("prerouting", "postrouting")) as log,
            counted(bare) as gained,
            apps.start(two, "udp-recv", bare.b, bind="10.88.0.2", count=1) as receiver,
            apps.start(one, "udp-send", bare.a, to="10.88.0.2", port=receiver.port),
        ):
            receiver.result()
            seen = until(lambda: marks(log.seen(), "postrouting", proto=UDP) and log.seen())
    assert marks(seen, "postrouting", proto=UDP) == [0]
    assert marks(seen, "prerouting", proto=UDP) == [0]
    assert gained.keys() <= {"no-socket", "forwarded", "other-netns"}


def test_untracked_packets_have_their_socket_s_owner(own: Bed):
    both(own.node, "-t raw -A PREROUTING -j NOTRACK")
    both(own.node, "-t raw -A OUTPUT -j NOTRACK")
    with (
        nflog.capture(own.node) as log,
        apps.start(own.node, "udp-recv", own.b, bind="0.0.0.0", count=1, reply=1) as echo,
        apps.start(own.peer, "udp-send", to=own.here(4), port=echo.port, expect=1) as sender,
    ):
        assert sender.result()["replies"] == 1
        seen = log.seen()
    assert marks(seen, "input", proto=UDP) == [XID_B]
    assert marks(seen, "postrouting", proto=UDP) == [XID_B]
    assert own.halves("-p", "udp") == []


@pytest.mark.parametrize("rule", [
    "-t nat -A POSTROUTING", "-t nat -A OUTPUT", "-t nat -A PREROUTING", "-t nat -A INPUT",
    "-t filter -A INPUT", "-t filter -A OUTPUT", "-t filter -A FORWARD", "-t raw -A OUTPUT",
    "-t raw -A PREROUTING", "-t mangle -A PREROUTING", "-t mangle -A OUTPUT",
    "-t mangle -A FORWARD",
])  # fmt: skip
def test_every_table_and_hook_takes_it(ns, module, rule):
    for tool in ("iptables-legacy", "ip6tables-legacy"):
        iptables(ns, f"{rule} {COPY}", tool)
        iptables(ns, f"{rule.replace('-A', '-D')} {COPY}", tool)
