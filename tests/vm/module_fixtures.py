"""Fixtures of the module's own tests; a plugin of their files (``pytest_plugins``)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from module_bed import COPY, XID_A, XID_B, Bed, Stage, load, xtables_libdir
from testbed import vm
from vnet.testing import cgroup, net

from vnet import copyxid


@pytest.fixture
def family() -> int:
    """By turns: a guest is slow, and the truth table has each kernel see both."""
    return (4, 6)[vm.turn()]


@pytest.fixture
def module() -> Iterator[copyxid.Module]:
    """The module, loaded by now."""
    load()
    with copyxid.connect() as connection:
        yield connection


@pytest.fixture
def table(module: copyxid.Module) -> Iterator[copyxid.Module]:
    """The module with an empty table, before and after."""
    module.flush()
    yield module
    module.flush()


@contextmanager
def _stage() -> Iterator[Stage]:
    with net.namespace("node") as node, net.namespace("peer") as peer, net.veth(node, peer) as link:
        # What a test asks of connections may be later than the kernel's half a minute.
        node.sysctl(
            net__netfilter__nf_conntrack_udp_timeout=600,
            net__netfilter__nf_conntrack_udp_timeout_stream=600,
            net__netfilter__nf_conntrack_icmp_timeout=600,
            net__netfilter__nf_conntrack_icmpv6_timeout=600,
            net__netfilter__nf_conntrack_tcp_timeout_close=600,
        )
        yield Stage(node, peer, link)


@contextmanager
def _bed(stage: Stage, table: copyxid.Module) -> Iterator[Bed]:
    with ExitStack() as stack:
        a = stack.enter_context(cgroup.cgroup())
        b = stack.enter_context(cgroup.cgroup())
        assert table.set_many({a.id: XID_A, b.id: XID_B}) == {}
        yield Bed(stage.node, stage.peer, stage.link, a, b, table)


def _add_rules(stage: Stage) -> None:
    rules = f"*mangle\n-A INPUT {COPY}\n-A POSTROUTING {COPY}\nCOMMIT\n"
    for tool in ("iptables-legacy-restore", "ip6tables-legacy-restore"):
        stage.node.run(tool, input=rules, env={"XTABLES_LIBDIR": xtables_libdir()})


@pytest.fixture
def bare(table: copyxid.Module) -> Iterator[Bed]:
    """A bed of its own, without any rule."""
    with _stage() as stage, _bed(stage, table) as bed:
        yield bed


@pytest.fixture
def own(bare: Bed) -> Bed:
    """A bed of its own, with the rules that node init writes."""
    _add_rules(Stage(bare.node, bare.peer, bare.link))
    return bare


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """Namespaces and rules that a file's tests share: they take seconds in a guest."""
    load()
    with _stage() as made:
        _add_rules(made)
        yield made


@pytest.fixture
def bed(stage: Stage, table: copyxid.Module) -> Iterator[Bed]:
    """The bed with the rules that node init writes; nothing but those is kept."""
    with _bed(stage, table) as made:
        yield made
        stage.node.run("conntrack", "-F")
