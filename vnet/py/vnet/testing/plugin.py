"""pytest fixtures of slices: for the test suites of others, too (docs/check.md).

pytest finds this by the entry point ``pytest11``. Nothing is made before a test
asks for it; all of it needs root.

    vnet_node      a network namespace with the node's side of a link
    vnet_peer      the other side
    vnet_link      the addresses of both
    vnet_slices    makes cgroups, to be slices
    vnet_capture   starts to log the packets of the node's hooks, with their marks
    vnet_up        brings the node up with the slices that are given
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vnet.testing.cgroup import Cgroup
    from vnet.testing.net import Link, Namespace
    from vnet.testing.nflog import Capture


def _root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, for namespaces and cgroups")


@dataclass(frozen=True)
class _Pair:
    node: "Namespace"
    peer: "Namespace"
    link: "Link"


@pytest.fixture
def _vnet_pair() -> Iterator[_Pair]:
    """Two namespaces that are joined."""
    _root()
    from vnet.testing import net

    with ExitStack() as stack:
        node = stack.enter_context(net.namespace("node"))
        peer = stack.enter_context(net.namespace("peer"))
        yield _Pair(node, peer, stack.enter_context(net.veth(node, peer)))


@pytest.fixture
def vnet_node(_vnet_pair: _Pair) -> "Namespace":
    """A network namespace: vnet.testing.net.Namespace."""
    return _vnet_pair.node


@pytest.fixture
def vnet_peer(_vnet_pair: _Pair) -> "Namespace":
    """Another one, at the other end of a veth."""
    return _vnet_pair.peer


@pytest.fixture
def vnet_link(_vnet_pair: _Pair) -> "Link":
    """The veth: a is the node's end, b the peer's."""
    return _vnet_pair.link


@pytest.fixture
def vnet_slices() -> Iterator[Callable[..., "Cgroup"]]:
    """``vnet_slices()`` makes a cgroup; all go at the end, with what runs in them."""
    _root()
    from vnet.testing import cgroup

    with ExitStack() as stack:
        yield lambda name=None: stack.enter_context(cgroup.cgroup(name))


@pytest.fixture
def vnet_capture(vnet_node: "Namespace") -> Iterator[Callable[..., "Capture"]]:
    """``vnet_capture()`` logs what passes INPUT and POSTROUTING of the node from now on."""
    from vnet.testing import nflog

    with ExitStack() as stack:
        yield lambda *hooks: stack.enter_context(
            nflog.capture(vnet_node, hooks=hooks or nflog.HOOKS)
        )


@dataclass(frozen=True)
class Node:
    """A node that is up."""

    ns: "Namespace"
    base: Path
    env: Mapping[str, str]

    def vnet(self, *argv: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run ``vnet`` on it. Raises AssertionError if it fails, unless check is false."""
        return self.ns.run(
            *(sys.executable, "-m", "vnet.cli", *argv), check=check, env=dict(self.env)
        )


@pytest.fixture
def vnet_up(vnet_node: "Namespace", tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """``vnet_up({name: cgroup}, {name: grants})`` brings the node up, without the module.

    Grants are the lines of ``[slice.grants]`` (docs/config.md). It is down again
    at the end.
    """
    base = tmp_path / "vnet-node"
    env = {f"VNET_{name}_DIR": str(base / name.lower()) for name in ("CONFIG", "STATE", "RUN")} | {
        "VNET_BPF_DIR": str(base / "bpf" / "vnet")
    }
    (base / "config").mkdir(parents=True)
    (base / "bpf").mkdir()
    node = Node(vnet_node, base, env)

    def up(slices: Mapping[str, "Cgroup"], grants: Mapping[str, str] | None = None) -> Node:
        from vnet import bpf

        guarded = "unguarded" if bpf.lsm_lacking() else "guarded"
        (base / "vnet.toml").write_text(f'[guard]\npacket_sockets = "{guarded}"\n')
        text = "".join(
            f'[[slice]]\nname = "{name}"\ncgroups = ["{made.rel}"]\n'
            + (f"[slice.grants]\n{(grants or {})[name]}\n" if name in (grants or {}) else "")
            for name, made in slices.items()
        )
        (base / "config" / "slices.toml").write_text(text)
        node.vnet("up", "--datapath", "bpf")
        return node

    subprocess.run(["mount", "-t", "bpf", "bpf", base / "bpf"], check=True)
    try:
        yield up
    finally:
        try:
            node.vnet("down")
        finally:
            subprocess.run(["umount", base / "bpf"], check=True)
