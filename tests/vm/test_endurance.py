"""Many short flows on the module, while rules, module, table and namespaces come and go.

`make endurance` runs it with a million flows.
"""

import os
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import vnetbed
from endurance import bed as beds
from endurance import slabs
from module_bed import COPY, iptables
from testbed import vm
from vnet.testing import net
from vnet.testing.net import HERE, Namespace
from vnet.testing.poll import until

from vnet import copyxid, module
from vnet import node as nodes

pytestmark = pytest.mark.vm

FLOWS = int(os.environ.get("VNET_ENDURANCE_FLOWS", "1500" if vm.DEBUG else "4000"))
"""In all, at the least: the storm makes as many again."""
MANY = int(os.environ.get("VNET_ENDURANCE_SLICES", "10000" if FLOWS > 50_000 else "2000"))
"""Slices: of 10,000 the short form would be busy with their cgroups for most of its time."""


def counters() -> dict[str, int]:
    """The module's, of the initial namespace."""
    here = Path("/proc/self/ns/net").stat().st_ino
    with copyxid.connect() as kernel:
        return next(stats.counters for stats in kernel.stats() if stats.netns == here)


def rewrite_table(bed: beds.Bed, ids: list[int], turns: int) -> None:
    """All entries are changed; then all are gone, and these two back."""
    with copyxid.connect() as kernel:
        with beds.unbroken(bed):
            for turn in range(turns):
                assert kernel.set_many(beds.rewritten(MANY, ids, turn)) == {}
        assert len(kernel.table()) == MANY + 2
        kernel.flush()
        assert kernel.set_many({bed.a.id: beds.A, bed.b.id: beds.B}) == {}


def flush_rules(node: vnetbed.Node, variant: str) -> None:
    """The rules are flushed and put in place again."""
    for tool in (f"iptables-{variant}", f"ip6tables-{variant}"):
        for table, chain in (("raw", "VNET-OUT"), ("mangle", "VNET-POST"),
                             ("mangle", "VNET-INPUT")):  # fmt: skip
            iptables(HERE, f"-t {table} -F {chain}", tool)
    assert nodes.up(node.paths).done


def reload_module(node: vnetbed.Node) -> None:
    """The node goes down, the module with it, and up."""
    nodes.down(node.paths)
    assert not module.loaded()
    nodes.up(node.paths)
    assert module.loaded()


def copy_in(ns: Namespace) -> None:
    """Rules with the module in a namespace that is not the node's."""
    for chain in ("INPUT", "POSTROUTING"):
        iptables(ns, f"-t mangle -A {chain} {COPY}")


@pytest.mark.limit(max(600, FLOWS // 100))
def test_flows_while_rules_module_table_and_namespaces_come_and_go(slices, tmp_path):
    began, long = time.monotonic(), FLOWS > 50_000
    with vnetbed.bpffs(tmp_path):
        node = vnetbed.Node(HERE, tmp_path)
        node.settings(vnetbed.UNGUARDED)

        def up() -> object:
            return nodes.up(node.paths, "nft", datapath="module")

        try:
            with beds.bed(node, slices.a, slices.b, up, counters) as bed:
                each = max(60, FLOWS // 30)

                def calm() -> None:
                    with bed.lap("calm"):
                        beds.calm(bed, each)
                    with bed.lap("drain"):
                        bed.drained()
                        if long:
                            until(lambda: not bed.waiting(), 100, "no TIME_WAIT left")

                calm()
                before = slabs.objects()
                turn = 0
                while True:
                    with ExitStack() as stack:
                        with bed.lap("cgroups"):
                            ids = stack.enter_context(beds.many_cgroups(slices.a, MANY))
                        with beds.storm(bed):
                            with bed.lap("table"):
                                rewrite_table(bed, ids, 2)
                            with bed.lap("rules"):
                                flush_rules(node, "nft")
                            with bed.lap("module"):
                                reload_module(node)
                            with bed.lap("namespaces"):
                                for number in range(1 + long):
                                    beds.churn_namespace(bed, copy_in, turn * 2 + number)
                    turn += 1
                    if bed.made.all + each * len(bed.makers) >= FLOWS:
                        break
                # While no rule asks for it connection tracking is off: what ends then it
                # takes for open, for days, with its owners, also when the ports come again.
                bed.drained()
                calm()
                with bed.lap("drain"):
                    beds.gone(bed.ns)
                    # The kernel frees the memory of one when it takes down the next
                    # (net_complete_free() in net/core/net_namespace.c): the last one's stays.
                    with net.namespace("last"):
                        pass
                    until(
                        lambda: slabs.objects()["net_namespace"] <= before["net_namespace"] + 1,
                        what="no namespace more than the last one",
                    )
                    after = slabs.settled(before)
                made, seconds = bed.made, round(time.monotonic() - began)
        finally:
            nodes.down(node.paths)
    beds.report(
        Path(os.environ["VNET_VM_SHARE"], "endurance"),
        kernel=f"{os.uname().release}, module",
        flows=made,
        turns=turn,
        seconds=seconds,
        laps=bed.laps,
        before=before,
        after=after,
    )
