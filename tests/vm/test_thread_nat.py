"""The literal command alone: ``iptables -t nat -A POSTROUTING -j MARK --copy-xid``.

A nat rule sees only the first packet of a connection, and only of one that
goes out. Marking that packet's connection is enough for accounting: its
records have their owner, whole. No ``vnet up`` and no other rule is in place.
"""

from pathlib import Path

import pytest
from module_bed import load, xtables_libdir
from netflowbed import accounting, collector, owners, sums
from thread_bed import A, B, Thread, closed, of_port, totals
from vnet.testing import apps, cgroup, net, nflog
from vnet.testing.net import HERE
from vnetbed import Node

from vnet import copyxid, registry, sysctls

pytestmark = pytest.mark.vm

RULE = "-t nat {} POSTROUTING -j MARK --copy-xid"
TOOLS = {
    "iptables": ("iptables", "ip6tables"),
    "legacy": ("iptables-legacy", "ip6tables-legacy"),
}


def rules(variant: str, action: str) -> None:
    """Add (-A) or delete (-D) the command's rule, IPv4 and IPv6."""
    for tool in TOOLS[variant]:
        words = RULE.format(action).split()
        HERE.run(tool, *words, env={"XTABLES_LIBDIR": xtables_libdir()})


@pytest.fixture(scope="module", params=[*TOOLS])
def bed(request, tmp_path_factory):
    base: Path = tmp_path_factory.mktemp("nat")
    load()
    with (
        cgroup.cgroup() as a,
        cgroup.cgroup() as b,
        net.namespace("peer") as peer,
        net.veth(HERE, peer) as link,
        copyxid.connect() as table,
    ):
        asked = [registry.Request("a", A, "here"), registry.Request("b", B, "here")]
        node = Node(HERE, base)
        registry.assign(base / "state" / "registry.db", asked, 1, 0)
        table.flush()
        assert table.set_many({a.id: A, b.id: B}) == {}
        rules(request.param, "-A")
        before = {key: value for key, value in sysctls.read().items() if value is not None}
        accounting(HERE)
        try:
            with collector(HERE, base / "state", wait=120) as flows:
                yield Thread(node, peer, link, a, b, flows)
        finally:
            rules(request.param, "-D")
            table.flush()
            sysctls.restore(before)


@pytest.mark.parametrize("family", [4, 6])
def test_a_whole_tcp_connection_is_attributed(bed: Thread, family):
    for slice_, owner in ((bed.a, A), (bed.b, B)):
        with (
            nflog.capture(HERE) as log,
            apps.start(bed.peer, "tcp-server", bind=bed.there(family), reply=9000) as server,
            apps.start(
                HERE, "tcp-client", slice_, to=bed.there(family), port=server.port, send=30_000
            ) as client,
        ):
            client.result()
            closed(log, server.port)
            record = bed.record(dport=[server.port])
            assert sums([record]) == totals(of_port(log, server.port))
        assert owners(record) == (owner, 0)
        assert record["originator"]["slice"] == {A: "a", B: "b"}[owner]


@pytest.mark.parametrize("family", [4, 6])
def test_a_whole_udp_exchange_is_attributed(bed: Thread, family):
    with (
        apps.start(bed.peer, "udp-recv", bind=bed.there(family), reply=1) as receiver,
        apps.start(
            *(HERE, "udp-send", bed.a),
            to=bed.there(family),
            port=receiver.port,
            count=7,
            expect=7,
        ) as sender,
    ):
        assert sender.result()["replies"] == 7
        record = bed.record(dport=[receiver.port])
    size = 7 * (128 if family == 4 else 148)
    assert owners(record) == (A, 0)
    assert sums([record]) == (7, size, 7, size)


@pytest.mark.parametrize("family", [4, 6])
def test_a_ping_is_attributed(bed: Thread, family):
    HERE.run("ping", "-q", "-c3", "-i0.2", "-W10", bed.there(family), cgroup=bed.b)
    echoes = bed.flows.records(dst=[bed.there(family)], proto=[1 if family == 4 else 58])
    [record] = [r for r in echoes if r["icmp"]["type"] in (8, 128)]
    assert owners(record) == (B, 0)
    assert sums([record])[::2] == (3, 3)


def test_a_process_outside_every_slice_is_attributed_to_nobody(bed: Thread):
    with (
        apps.start(bed.peer, "udp-recv", bind=bed.link.b4) as receiver,
        apps.start(HERE, "udp-send", to=bed.link.b4, port=receiver.port) as sender,
    ):
        sender.result()
        assert owners(bed.record(dport=[receiver.port])) == (0, 0)
