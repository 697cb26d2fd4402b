"""Somebody flushes all rules, ours among them: `vnet watch` puts ours back, and nobody else's."""

import re
import select
from collections.abc import Iterator
from pathlib import Path

import pytest
import vnetbed
from vnet.testing.poll import PATIENCE, until
from vnetbed import watching

from vnet import bpf, datapath, state

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(bpf.lacking()), reason="this kernel cannot run the eBPF programs"),
]

#: counts what is answered to slice a: that it is a's, only its connection says
THEIRS = """table inet theirs {
    chain in {
        type filter hook input priority 300
        icmp type echo-reply meta mark & 0xffff == 512 counter
        icmpv6 type echo-reply meta mark & 0xffff == 512 counter
    }
}
"""

#: saves the sender for the other direction
OTHER = f"{datapath._REPLY} {datapath._SAVE_LOW}".split()


@pytest.fixture
def node(ns, slices, tmp_path) -> Iterator[vnetbed.Node]:
    ns.run("ip", "link", "set", "lo", "up")
    ns.run("sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")
    with vnetbed.bpf_node(ns, tmp_path) as made:
        made.slices(a=(slices.a.rel, 512))
        yield made


def marked(node, slices) -> bool:
    """Whether what slice a receives has its mark, IPv4 and IPv6."""

    def counts() -> list[int]:
        text = node.ns.run("nft", "list", "table", "inet", "theirs").stdout
        return [int(packets) for packets in re.findall(r"packets (\d+)", text)]

    before = counts()
    node.ns.run("sh", "-c", "ping -c1 127.0.0.1; ping -c1 ::1", cgroup=slices.a)
    return counts() == [packets + 1 for packets in before]


def said(process) -> str:
    """What a watcher that has ended said."""
    assert process.wait(60) == 0
    return process.stderr.read()


def test_flushed_with_everything_else_they_come_back_and_nothing_else_does(node, slices):
    node.vnet("up", "--variant", "nft")
    before = node.fingerprint()
    node.ns.run("nft", "add", "table", "inet", "gone")
    with watching(node) as process:
        node.ns.run("nft", "-f", "-", input=f"flush ruleset\n{THEIRS}")
        until(lambda: marked(node, slices), what="packets are marked again")
        until(lambda: node.json("status", check=False)["whole"], what="they are whole again")
        assert "inet gone" not in node.ns.run("nft", "list", "ruleset").stdout
        node.ns.run("nft", "delete", "table", "inet", "theirs")
        assert node.fingerprint() == before
        # One of them, and a jump that is no longer the first.
        node.ns.run("nft", "-f", "-", input=THEIRS)
        node.ns.run("iptables-nft", "-t", "mangle", "-F", "VNET-SAVE")
        node.ns.run("ip6tables-nft", "-t", "raw", "-I", "OUTPUT", "-j", "ACCEPT")
        until(lambda: node.json("status", check=False)["whole"], what="they are whole again")
        assert marked(node, slices)
        assert "-j ACCEPT" in node.ns.run("ip6tables-nft", "-t", "raw", "-S", "OUTPUT").stdout
        node.vnet("down")
        told = said(process)
    # Tables that hold somebody's rule stay.
    left = node.ns.run("nft", "list", "ruleset").stdout
    assert "VNET" not in left and "table inet theirs" in left and "table ip mangle" not in left
    assert "rules of ours were changed" in told
    # Not which: tables are read one by one, and its first look may have been half done.
    assert re.search(r"IPv6 \(nft\): chain VNET-\w+ is missing", told)


def test_legacy_tables_that_tell_nobody_are_looked_at(node, slices):
    node.vnet("up", "--variant", "legacy")
    with watching(node) as process:
        node.ns.run("nft", "-f", "-", input=THEIRS)
        for tool in ("iptables-legacy", "ip6tables-legacy"):
            node.ns.run(tool, "-w", "-t", "mangle", "-F")
        until(lambda: marked(node, slices), 30, "packets are marked again")
        until(lambda: node.json("status", check=False)["whole"], what="the command has ended")
        node.vnet("down")
        assert "(legacy): POSTROUTING does not jump to VNET-POST" in said(process)


#: looks three times; between the first two a rule is replaced, before the third time passes
LOOKS = """
import subprocess, sys
import vnetbed
from vnet import upkeep
paths = vnetbed.paths_from_env()
kept = upkeep.Upkeep(upkeep.listen())
upkeep.tend(kept, paths)
assert kept.whole
subprocess.run(sys.argv[1:], check=True)
for later in (0, upkeep._READ_EVERY):
    kept.due, kept.read = 0.0, kept.read - later
    print("look", file=sys.stderr)
    upkeep.tend(kept, paths)
"""


def test_a_legacy_rule_in_the_place_of_another_of_its_length_is_found_when_they_are_read(node):
    node.vnet("up", "--variant", "legacy")
    replaced = ("iptables-legacy", "-t", "mangle", "-R", "VNET-SAVE", "2", *OTHER)
    done = node.python("-c", LOOKS, *replaced)
    first, second = done.stderr.split("look\n")[1:]
    assert not first
    assert "IPv4 (legacy): rule 2 of chain VNET-SAVE is" in second
    assert node.json("status")["whole"]


#: looks once, has the rules flushed, and looks again
REPAIRS = """
import subprocess
import vnetbed
from vnet import upkeep
paths = vnetbed.paths_from_env()
kept = upkeep.Upkeep(upkeep.listen())
upkeep.tend(kept, paths)
assert kept.rested > 0.0
subprocess.run(["nft", "flush", "ruleset"], check=True)
kept.due = kept.rested = 0.0
upkeep.tend(kept, paths)
assert kept.rested == 0.0 < kept.tried
"""


def test_what_a_repair_takes_is_not_waited_for_as_what_looking_takes(node):
    """Twenty times that, and rules that are flushed again would be gone for half a minute."""
    node.vnet("up", "--variant", "nft")
    assert "are as they were again" in node.python("-c", REPAIRS).stderr
    assert node.json("status")["whole"]


def test_what_cannot_be_put_back_is_told_once_and_tried_again(node, slices):
    node.vnet("up", "--variant", "nft")
    program = Path(state.load(node.paths.state).instance, "progs", "vnet_odd")
    away = program.with_name("away")
    with watching(node) as process:
        program.rename(away)
        node.ns.run("nft", "-f", "-", input=f"flush ruleset\n{THEIRS}")
        assert select.select([process.stderr], [], [], 60 * PATIENCE)[0], "it says nothing"
        assert not marked(node, slices)
        away.rename(program)
        until(lambda: marked(node, slices), 30, "packets are marked again")
        node.vnet("down")
        told = said(process)
    assert told.count("cannot be put back") == 1


def test_a_flush_while_nobody_watched_is_noticed_by_who_watches_next(node, slices):
    node.vnet("up", "--variant", "nft")
    node.ns.run("nft", "-f", "-", input=f"flush ruleset\n{THEIRS}")
    with watching(node):
        until(lambda: marked(node, slices), what="packets are marked again")
