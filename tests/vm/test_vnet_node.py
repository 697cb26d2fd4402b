"""``vnet`` with the real module: up, down, status, killed half-way, cgroups that come and go.

The eBPF node's own steps are tried on the host (tests/netns/test_vnet_bpf_node.py);
here is what the module adds, the way from one data path to the other, and BPF LSM.
A guest is slow: what is the same in both kernels takes turns in them, of the
variants of iptables, and of the steps at which somebody is killed.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import vnetbed
from testbed import vm
from vnet.testing import cgroup, net
from vnet.testing.net import HERE
from vnet.testing.poll import until
from vnetbed import watching

from vnet import bpf, copyxid, guard, iptables, module, nftables, rules, status, steps, sysctls
from vnet import node as nodes

pytestmark = pytest.mark.vm

TURN = vm.turn()
VARIANT = ("nft", "legacy")[TURN]


@pytest.fixture
def node(slices, tmp_path) -> Iterator[vnetbed.Node]:
    """Two slices, a node that is down, and no module; down again at the end."""
    assert module.unload(seconds=60)  # nf_tables may still be giving rules' references back
    # What the kernel registers stays registered: let it be there before.
    subprocess.run(["modprobe", "nf_conntrack"], check=True)
    # As the kernel sets them, so that `up` has something to change.
    HERE.sysctl(
        net__netfilter__nf_conntrack_acct=0,
        net__netfilter__nf_conntrack_timestamp=0,
        net__netfilter__nf_conntrack_events=2,
    )
    for tool in ("iptables-legacy", "ip6tables-legacy"):
        subprocess.run([tool, "-t", "mangle", "-S"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([tool, "-t", "raw", "-S"], check=True, stdout=subprocess.DEVNULL)
    # ping(8) then needs no raw socket, which these slices may not have.
    HERE.sysctl(net__ipv4__ping_group_range="0 2147483647")
    with vnetbed.bpffs(tmp_path):
        made = vnetbed.Node(HERE, tmp_path)
        made.slices(a=slices.a.rel, b=(slices.b.rel, 65535))
        yield made
        if (tmp_path / "run").exists():
            nodes.down(made.paths)


def table() -> dict[int, int]:
    with copyxid.connect() as kernel:
        return {number: entry.xid for number, entry in kernel.table().items()}


def ping_marks(slice_: cgroup.Cgroup) -> set[int]:
    """The connection marks that a ping from a slice leaves."""
    subprocess.run(["conntrack", "-F"], check=True, capture_output=True)
    HERE.run("sh", "-c", "ping -c1 127.0.0.1 && ping -c1 ::1", cgroup=slice_)
    listed = HERE.run("sh", "-c", "conntrack -L -f ipv4; conntrack -L -f ipv6").stdout
    return {int(mark) for mark in re.findall(r"^icmp.* mark=(\d+)", listed, re.MULTILINE)}


def test_up_marks_status_is_whole_a_second_up_does_nothing_and_down_leaves_nothing(node, slices):
    before = node.fingerprint()
    done = node.json("up", "--variant", VARIANT)
    assert "loaded module xt_copyxid" in done["done"]
    assert (done["datapath"], done["why"]) == ("module", "the kernel module is loaded or can be")
    assert done["remarks"] == []  # packet sockets are guarded by BPF LSM
    assert table() == {slices.a.id: 256, slices.b.id: 65535}
    assert ping_marks(slices.a) == {256}
    assert ping_marks(slices.b) == {65535}
    seen = node.json("status")  # exits 0
    assert (seen["up"], seen["whole"], seen["variant"]) == (True, True, VARIANT), seen
    assert (seen["datapath"], seen["packet_sockets"]) == ("module", "guarded")
    assert seen["counters"]["out-socket"] >= 4
    assert seen["rules"] == {"IPv4": True, "IPv6": True}
    up = node.fingerprint()
    assert node.json("up")["done"] == []
    assert node.fingerprint() == up
    node.vnet("down")
    assert node.fingerprint() == before
    assert not module.loaded()
    assert ping_marks(slices.a) <= {0}  # or nothing is tracked at all any more
    assert status.look(node.paths).up is False


def glance(node: vnetbed.Node, variant: str) -> list[object]:
    """What a step may have changed, at less cost than the fingerprint (a guest is slow)."""
    run = node.base / "run"
    files = {path.name: path.read_text() for path in run.glob("*") if path.name != "lock"}
    saved = [rules.save(family, variant) for family in (4, 6)]
    kept = [[x for x in text.splitlines() if x[0] not in "#:"] for text in saved]
    return [kept, nftables.bases(4), nftables.bases(6), sysctls.read(), files, module.loaded()]


STEPS = [
    "registry", "instance", "module", "table", "policy", "sysctls", "rules", "rules", "state"
]  # fmt: skip

_BOTH = ((2, 4, 6, 8), (3, 5, 7, 9))[TURN]
#: variant, whom, and before which step
KILLED = [
    *(("nft", "both", step) for step in _BOTH),
    ("nft", "worker", (3, 4)[TURN]),
    ("legacy", "both", (7, 8)[TURN]),
]


# What each process does when another is killed is the same on the host, where all are tried.
@pytest.mark.limit(600)
def test_an_up_killed_at_any_step_leaves_a_node_that_is_down(node):
    bpf.load(node.bpf_dir, lsm=True)  # once: it is what takes long in a guest
    before = node.fingerprint()
    (node.base / "run").mkdir()
    seen = {variant: glance(node, variant) for variant in ("nft", "legacy")}
    for variant, whom, step in KILLED:
        vnetbed.killed(node, variant, step, whom)
        undone(node, whom, step)
        assert glance(node, variant) == seen[variant], f"killed at step {step} ({STEPS[step - 1]})"
    assert node.fingerprint() == before
    assert vnetbed.killed(node, VARIANT, len(STEPS) + 1, "both") == 0


def undone(node: vnetbed.Node, whom: str, step: int) -> None:
    """By the guard; or by the next command, where both were killed."""
    if whom == "both":
        until(lambda: not guard.busy(node.paths), what="the worker is dead too")
        assert "killed half-way" in str(status.look(node.paths).differences)
        assert steps.undo(node.paths)
    until(lambda: not node.paths.journal.exists(), 120, f"step {step} is undone")


@pytest.mark.limit(600)
def test_a_repair_killed_at_any_step_goes_back_to_what_was_there(node, slices):
    nodes.up(node.paths, "nft")
    with copyxid.connect() as kernel:
        kernel.delete_many([slices.a.id])
        kernel.set_many({slices.b.id: 7})
    HERE.run("sysctl", "-qw", "net.netfilter.nf_conntrack_acct=0")
    env = iptables.environment()
    for tool in ("iptables-nft", "ip6tables-nft"):
        HERE.run(tool, "-t", "mangle", "-F", "VNET-POST", env=env)
    before = glance(node, "nft")
    for step in range(2, 6):  # table, sysctls, and the rules
        whom = ("guard", "both")[(step + TURN) % 2]
        vnetbed.killed(node, "nft", step, whom)
        undone(node, whom, step)
        assert glance(node, "nft") == before
        assert table() == {slices.b.id: 7}
    nodes.up(node.paths)
    assert status.look(node.paths).whole


def bound(slice_=None, port=81) -> str:
    """The name of the error with which bind() ends."""
    code = f"import socket; socket.socket().bind(('', {port}))"
    done = HERE.run("/usr/bin/python3", "-c", code, cgroup=slice_, check=False)
    return done.stderr.strip().rpartition("\n")[2].partition(":")[0]


def packet_sockets(slice_=None) -> set[str]:
    """How a process fares that asks for each kind of packet socket."""
    found = set()
    for kind in ("socket.AF_PACKET, socket.SOCK_RAW", "socket.AF_INET, 10"):
        code = f"import socket; socket.socket({kind}, 0x300)"
        done = HERE.run("/usr/bin/python3", "-c", code, cgroup=slice_, check=False)
        found.add(done.stderr.strip().rpartition("\n")[2].partition(":")[0])
    return found


@pytest.mark.limit(600)
def test_a_change_of_data_path_leaves_no_packet_unmarked_and_killed_leaves_the_old_one(
    node, slices
):
    (node.base / "config" / "slices.toml").write_text(
        f'[[slice]]\nname = "a"\ncgroups = ["{slices.a.rel}"]\ngrants = {{ ports = ["tcp/81"] }}\n'
    )
    nodes.up(node.paths, "nft")
    rule = "-A POSTROUTING -p udp --dport 9 -m mark --mark"
    for mark in ("0x0/0xffff", "0x100/0xffff"):
        HERE.run("iptables-nft", "-t", "mangle", *rule.split(), mark)

    def counted() -> list[int]:
        env = iptables.environment()
        text = HERE.run("iptables-nft-save", "-c", "-t", "mangle", env=env).stdout
        return [int(n) for n in re.findall(r"^\[(\d+):\d+\] -A POSTROUTING -p udp", text, re.M)]

    send = (
        "import socket, time\ns = socket.socket(2, 2)\n"
        "while True: s.sendto(b'x', ('127.0.0.1', 9)); time.sleep(0.002)"
    )
    with HERE.popen("/usr/bin/python3", "-c", send, cgroup=slices.a) as sender:
        try:
            until(lambda: counted()[1] > 20, 60, what="it sends")
            before = glance(node, "nft")[0]
            step = (2, 3)[TURN]  # the rules of IPv4 are changed, and then those of IPv6
            vnetbed.killed(node, "nft", step, "worker", "bpf")
            undone(node, "worker", step)
            assert glance(node, "nft")[0] == before
            assert status.look(node.paths).datapath == "module"
            for kind, loaded in (("bpf", False), ("module", True)):
                assert nodes.up(node.paths, datapath=kind).datapath == kind
                assert bound(slices.b) == "PermissionError"
                assert packet_sockets(slices.a) == {"PermissionError"}  # by BPF LSM
                assert packet_sockets() == {""}
                many = counted()[1]
                until(lambda n=many: counted()[1] > n + 20, 60, what="it goes on")
                seen = status.look(node.paths)
                assert (seen.datapath, seen.whole, module.loaded()) == (kind, True, loaded), seen
        finally:
            sender.kill()
    assert counted()[0] == 0
    assert bound(slices.a) == ""


def test_what_somebody_breaks_is_told_and_mended(node, slices):
    nodes.up(node.paths, "nft")
    with copyxid.connect() as kernel:
        kernel.delete_many([slices.a.id])
    HERE.run("sysctl", "-qw", "net.netfilter.nf_conntrack_acct=0")
    HERE.run("ip6tables-nft", "-t", "mangle", "-D", "INPUT", "-j", "VNET-INPUT")
    seen = node.vnet("status", check=False)
    assert seen.returncode == 1
    for words in (
        f"slice a: {slices.a.rel} (id {slices.a.id}) is not in the table",
        "nf_conntrack_acct is 0",
        "IPv6 (nft): INPUT does not jump to VNET-INPUT",
    ):
        assert words in seen.stdout
    assert len(node.json("up")["done"]) == 3, "the table, the sysctl, the rules of IPv6"
    assert status.look(node.paths).whole


def test_a_slice_added_to_a_node_that_is_up_is_marked_at_once_and_not_after_its_removal(node):
    nodes.up(node.paths, "nft")
    with cgroup.cgroup() as late:
        node.vnet("slice", "add", "late", "--cgroup", late.rel, "--xid", "9")
        assert ping_marks(late) == {9}
        assert status.look(node.paths).whole
        node.vnet("slice", "rm", "late")
        assert ping_marks(late) == {0}
        assert late.id not in table()
        assert status.look(node.paths).whole


def test_a_module_that_somebody_elses_rule_uses_stays_loaded(node):
    nodes.up(node.paths, "nft")
    rule = ("-t", "nat", "-A", "POSTROUTING", "-j", "MARK", "--copy-xid")
    with net.namespace() as other:
        other.run("iptables-legacy", *rule, env=iptables.environment())
        outcome = nodes.down(node.paths)
        assert "stays loaded" in outcome.remarks[0]
        assert "--copy-xid" in other.run("iptables-legacy-save", env=iptables.environment()).stdout
    until(lambda: module.users() == 0, what="the namespace's rule is gone")


def test_in_another_namespace_up_refuses_and_leaves_nothing(node):
    before = node.fingerprint()
    with net.namespace() as other:
        elsewhere = vnetbed.Node(other, node.base)
        refused = elsewhere.vnet("up", check=False)
        assert refused.returncode == 1
        assert "initial" in refused.stderr
        assert "VNET" not in other.run("nft", "list", "ruleset").stdout
    assert node.fingerprint() == before
    assert not module.loaded()


@pytest.mark.kernels("6.1")
def test_up_and_down_need_no_more_than_the_units_capabilities(node):
    root = Path(__file__).resolve().parents[2]
    unit = (root / "systemd" / "vnet.service").read_text()
    line = next(x for x in unit.splitlines() if x.startswith("CapabilityBoundingSet="))
    allowed = line.partition("=")[2].lower().replace("cap_", "+").split()
    limited = ("setpriv", "--no-new-privs", f"--bounding-set=-all,{','.join(allowed)}")
    path = os.pathsep.join(sys.path)
    for word in ("up", "down"):
        HERE.run(
            *limited, sys.executable, "-m", "vnet.cli", word, env=node.env | {"PYTHONPATH": path}
        )


def test_a_cgroup_made_again_keeps_its_slice_while_watched(node, slices):
    deep = slices.a.path / "not" / "yet"
    rel = f"{slices.a.rel}/not/yet"
    node.vnet("slice", "add", "deep", "--cgroup", rel, "--xid", "77")
    nodes.up(node.paths, "nft")
    with watching(node):
        old = slices.b.id
        cgroup.remove(slices.b.path)
        slices.b.path.mkdir()
        assert slices.b.id != old
        until(lambda: table().get(slices.b.id) == 65535, what="the new id is in the table")
        assert table().get(old) == 65535  # its last sockets are still its own
        assert ping_marks(slices.b) == {65535}
        deep.mkdir(parents=True)
        until(lambda: table().get(deep.stat().st_ino) == 77, what="a path that was not there")
        cgroup.remove(deep.parent)
        deep.mkdir(parents=True)
        until(lambda: table().get(deep.stat().st_ino) == 77, what="its parent was made again")
        seen = status.look(node.paths)
        assert seen.whole, seen.differences
        assert seen.lingering == 2
        assert nodes.up(node.paths).done == []  # what lingers is not taken for a stranger
        # A slice whose file appears is followed from then on.
        with cgroup.cgroup() as late:
            nodes.add_slice(node.paths, _slice(node, "late", late.rel, 5))
            until(lambda: table().get(late.id) == 5, what="the new slice")
            cgroup.remove(late.path)
            late.path.mkdir()
            until(lambda: table().get(late.id) == 5, what="the new slice's new cgroup")


def test_the_id_of_a_cgroup_that_is_gone_leaves_the_table_in_the_end(node, slices):
    nodes.up(node.paths, "nft")
    with watching(node, "--linger", "0.01"):
        old = slices.b.id
        cgroup.remove(slices.b.path)
        until(lambda: old not in table(), 120, what="the old id has left")
        assert table() == {slices.a.id: 256}
        slices.b.path.mkdir()
        until(lambda: table().get(slices.b.id) == 65535, what="the new id is in the table")


def test_the_watcher_ends_when_the_node_goes_down(node):
    nodes.up(node.paths, "nft")
    with watching(node) as process:
        nodes.down(node.paths)
        assert process.wait(30) == 0


def _slice(node, name, path, xid):
    from vnet import config

    return config.Slice(
        name, (path,), xid, config.Grants(), node.base / "config" / f"{name}.toml", 1
    )


# Once: the kernels' part of it is in test_module_netlink.py.
@pytest.mark.kernels("6.12")
@pytest.mark.limit(600)
def test_ten_thousand_slices(node):
    count = 10_000
    with cgroup.cgroup() as parent:
        paths = [parent.path / f"{n}" for n in range(count)]
        for path in paths:
            path.mkdir()
        node.slices(**{f"s{n}": f"{parent.rel}/{n}" for n in range(count)})
        nodes.up(node.paths, "nft")
        assert table() == {path.stat().st_ino: 256 + n for n, path in _by_name(paths)}
        seen = status.look(node.paths)
        assert (seen.whole, seen.entries, seen.cgroups_present) == (True, count, count)
        assert nodes.up(node.paths).done == []
        nodes.down(node.paths)
        for path in paths:
            path.rmdir()


def _by_name(paths):
    """In the order in which slices get their numbers: by name."""
    return list(enumerate(sorted(paths, key=lambda path: f"s{path.name}")))
