"""Fixtures of the module's own tests; a plugin of their files (``pytest_plugins``)."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from module_bed import COPY, XID_A, XID_B, Bed, load, xtables_libdir
from testbed import cgroup, net

from vnet import copyxid


@pytest.fixture(scope="session")
def module() -> Iterator[copyxid.Module]:
    """The loaded module."""
    load()
    with copyxid.connect() as connection:
        yield connection


@pytest.fixture
def table(module: copyxid.Module) -> Iterator[copyxid.Module]:
    """The module with an empty table, before and after."""
    module.flush()
    yield module
    module.flush()


@pytest.fixture
def bare(table: copyxid.Module) -> Iterator[Bed]:
    """The bed without any rule."""
    with ExitStack() as stack:
        node = stack.enter_context(net.namespace("node"))
        peer = stack.enter_context(net.namespace("peer"))
        link = stack.enter_context(net.veth(node, peer))
        a = stack.enter_context(cgroup.cgroup())
        b = stack.enter_context(cgroup.cgroup())
        assert table.set_many({a.id: XID_A, b.id: XID_B}) == {}
        yield Bed(node, peer, link, a, b, table)


@pytest.fixture
def bed(bare: Bed) -> Bed:
    """The bed with the rules that node init writes."""
    rules = f"*mangle\n-A INPUT {COPY}\n-A POSTROUTING {COPY}\nCOMMIT\n"
    for tool in ("iptables-legacy-restore", "ip6tables-legacy-restore"):
        bare.node.run(tool, input=rules, env={"XTABLES_LIBDIR": xtables_libdir()})
    return bare
