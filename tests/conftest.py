"""Fixtures for every kind of test; the rules of a session are in testbed.house."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from vnet.testing import cgroup as cgroups
from vnet.testing import net

pytest_plugins = ["testbed.house", "testbed.again"]


@dataclass(frozen=True)
class Peers:
    """Two namespaces joined by a veth link; the node is end a."""

    node: net.Namespace
    peer: net.Namespace
    link: net.Link


@dataclass(frozen=True)
class Slices:
    """Two cgroups, to be two slices."""

    a: cgroups.Cgroup
    b: cgroups.Cgroup


@pytest.fixture
def ns() -> Iterator[net.Namespace]:
    """An empty network namespace."""
    with net.namespace() as made:
        yield made


@pytest.fixture
def peers() -> Iterator[Peers]:
    """A node and a peer with a link between them."""
    with ExitStack() as stack:
        node = stack.enter_context(net.namespace("node"))
        peer = stack.enter_context(net.namespace("peer"))
        yield Peers(node, peer, stack.enter_context(net.veth(node, peer)))


@pytest.fixture
def slices() -> Iterator[Slices]:
    """Two cgroups."""
    with cgroups.cgroup() as a, cgroups.cgroup() as b:
        yield Slices(a, b)
