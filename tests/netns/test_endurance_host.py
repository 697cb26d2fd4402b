"""Many short flows on the eBPF data path, while rules, programs and policy are replaced."""

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import vnetbed
from endurance import bed as beds
from endurance import slabs
from vnet.testing import net
from vnet.testing.net import Namespace
from vnet.testing.poll import until

from vnet import bpf, bpfobjects, policy

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(bpf.lacking()), reason="this kernel cannot run the eBPF programs"),
]

FLOWS = int(os.environ.get("VNET_ENDURANCE_FLOWS", "20000"))
"""In all, at the least; `make endurance` makes more."""
MANY = 10_000
"""Slices."""
OTHERS = 500
"""Objects more that are no growth: other processes of this machine have sockets, too."""


def run(node: vnetbed.Node, code: str, *argv: str | Path) -> None:
    """Run code with the product and the tests' modules in the node's namespace."""
    env = node.env | {"PYTHONPATH": os.pathsep.join([str(vnetbed.PY), *sys.path])}
    code = "import pathlib, sys\n" + code
    node.ns.run(sys.executable, "-c", code, *map(str, argv), env=env, timeout=240)


_OTHER = """
from vnet import bpfobjects, node
from vnetbed import paths_from_env
bpfobjects.OBJECTS = pathlib.Path(sys.argv[1])
node.up(paths_from_env())
"""

_REWRITE = """
from vnet import policy
from endurance.bed import rewritten
instance, turns = pathlib.Path(sys.argv[1]), range(int(sys.argv[2]))
ids = [int(word) for word in pathlib.Path(sys.argv[3]).read_text().split()]
now = policy.read(instance)
kept = dict(now.slices)
for turn in turns:
    now.slices = kept | rewritten(len(ids), ids, turn)
    assert policy.write(instance, now) == []
    assert len(policy.read(instance).slices) == len(ids) + len(kept)
now.slices = kept
policy.write(instance, now)
"""


_BROKEN = """table inet broken {{
    chain c {{
        type filter hook postrouting priority -145
        tcp sport 20000-23999 numgen inc mod 20 == 0 meta mark set {mark}
    }}
}}
"""
#: of every twentieth packet of a slice: another's mark, and none
_FORGES, _DROPS_MARKS = _BROKEN.format(mark=7), _BROKEN.format(mark=0)


def flush_rules(node: vnetbed.Node) -> None:
    """The rules are flushed and put in place again."""
    for tool in ("iptables-nft", "ip6tables-nft"):
        for table, chain in (("raw", "VNET-OUT"), ("mangle", "VNET-POST"),
                             ("mangle", "VNET-INPUT")):  # fmt: skip
            node.ns.run(tool, "-w", "-t", table, "-F", chain)
    node.vnet("up")


def replace_instance(node: vnetbed.Node, other: Path) -> None:
    """Another version of the programs takes over, and this one again."""
    old = bpf.instances(node.bpf_dir)
    run(node, _OTHER, other)
    assert bpf.instances(node.bpf_dir) != old
    node.vnet("up")
    assert bpf.instances(node.bpf_dir) == old


def mark_in(node: vnetbed.Node, ns: Namespace) -> None:
    """Rules with our programs in a namespace that is not the node's."""
    (instance,) = bpf.instances(node.bpf_dir)
    rule = ("-A", "POSTROUTING", "-m", "bpf", "--object-pinned", instance / "progs/vnet_gate")
    ns.run("iptables-nft", "-t", "mangle", *rule)


def test_flows_while_rules_programs_and_policy_are_replaced(ns, slices, tmp_path):
    began = time.monotonic()
    other = tmp_path / "objects"
    shutil.copytree(bpfobjects.OBJECTS, other)
    (tmp_path / "note").write_text("another build")
    section = f"--add-section=.note.vnet={tmp_path}/note"
    subprocess.run(["llvm-objcopy", section, other / "base.bpf.o"], check=True)
    with vnetbed.bpf_node(ns, tmp_path / "node") as node:

        def up() -> object:
            return node.vnet("up", "--datapath", "bpf", "--variant", "nft")

        def counters() -> dict[str, int]:
            return dict(node.json("status")["counters"])

        with beds.bed(node, slices.a, slices.b, up, counters, reopens=True) as bed:
            each = max(60, FLOWS // 60)
            beds.calm(bed, each)
            bed.drained()
            before = slabs.objects()
            turn = 0
            while bed.made.all < FLOWS:
                with beds.storm(bed), beds.many_cgroups(slices.a, MANY) as ids:
                    ids_file = tmp_path / "ids"
                    ids_file.write_text("\n".join(map(str, ids)))
                    (instance,) = bpf.instances(node.bpf_dir)
                    with beds.unbroken(bed):
                        run(node, _REWRITE, instance, "4", ids_file)
                        replace_instance(node, other)
                    flush_rules(node)
                    node.vnet("down")
                    node.vnet("up")
                    for number in range(3):
                        beds.churn_namespace(
                            bed, lambda made: mark_in(node, made), turn * 3 + number
                        )
                turn += 1
            assert node.json("status")["whole"]
            bed.drained()  # of what ended while tracking was off, before its ports come again
            beds.calm(bed, each)
            bed.drained()
            beds.gone(bed.ns)
            after = slabs.settled(before, slack=OTHERS)
            made = bed.made
            for broken in (_FORGES, _DROPS_MARKS):
                ns.run("nft", "-f", "-", input=broken)
                with pytest.raises(AssertionError, match="wrong"):
                    beds.calm(bed, 30)
                ns.run("nft", "delete", "table", "inet", "broken")
            (instance,) = bpf.instances(node.bpf_dir)
            assert set(policy.read(instance).slices) == {slices.a.id, slices.b.id}
    beds.report(
        Path(__file__).parents[2] / "build/endurance/report",
        kernel=f"{os.uname().release}, eBPF data path",
        flows=made,
        turns=turn,
        seconds=round(time.monotonic() - began),
        before=before,
        after=after,
    )


def test_sockets_that_are_kept_are_seen():
    def seen() -> bool:
        before = slabs.objects()
        with ExitStack() as stack:
            for _ in range(700):
                stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            try:
                slabs.settled(before, slack=OTHERS, seconds=0)
            except AssertionError as told:
                return "'UDP': " in str(told)
        return False

    # Those of a namespace that was just deleted go a while later, and may be as many.
    until(seen, what="700 sockets are seen")


def test_a_namespace_that_is_kept_is_seen(ns):
    with ExitStack() as stack:
        with net.namespace("kept") as made:
            beds.know(ns, made, 0)
            stack.enter_context(Path("/run/netns", made.name).open())
        with pytest.raises(AssertionError, match=str(beds.CHURNED)):
            beds.gone(ns, seconds=0)
    beds.gone(ns)
