"""The test bed itself: it makes what it says, and takes it away again."""

import subprocess
import sys
from pathlib import Path

import pytest
from vnet.testing import cgroup as cgroups
from vnet.testing import net
from vnet.testing.poll import until

pytestmark = pytest.mark.netns


def test_a_namespace_is_gone_after_its_block_even_when_the_block_fails():
    with pytest.raises(ZeroDivisionError), net.namespace() as ns:
        name = ns.name
        assert name in ns.run("ip", "netns").stdout
        _ = 1 / 0
    assert not Path("/run/netns", name).exists()


def test_a_process_left_in_a_namespace_ends_with_it():
    with net.namespace() as ns:
        process = ns.popen("sleep", "600")
        until(lambda: process.pid in ns.pids(), what="the process has entered the namespace")
    assert process.wait(60) != 0


def test_a_link_carries_both_families_at_once(peers):
    for address in (peers.link.b4, peers.link.b6):
        peers.node.run("ping", "-c1", "-W5", address)


def test_a_program_starts_inside_its_cgroup_and_its_namespace(peers, slices):
    done = peers.node.run("sh", "-c", "cat /proc/self/cgroup; ip -o link", cgroup=slices.a)
    assert f"0::{slices.a.rel}\n" in done.stdout
    assert peers.link.a_if in done.stdout


def test_two_cgroups_have_two_ids(slices):
    assert len({slices.a.id, slices.b.id}) == 2


def test_processes_in_a_cgroup_and_below_end_with_it(ns):
    with cgroups.cgroup() as outer, cgroups.cgroup("inner", parent=outer) as inner:
        processes = [ns.popen("sleep", "600", cgroup=inner), ns.popen("sleep", "600", cgroup=outer)]
        until(inner.procs)
        until(outer.procs)
    assert [p.wait(60) for p in processes] == [-9, -9]
    assert not outer.path.exists()


def test_what_a_killed_run_left_is_swept_and_the_living_ones_things_stay(ns, slices):
    code = (
        "import os, signal\n"
        "from vnet.testing import net, cgroup\n"
        "a = net.namespace('x'); a.__enter__(); b = cgroup.cgroup(); b.__enter__()\n"
        "print(os.getpid(), flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    tests = str(Path(__file__).parent.parent)
    killed = subprocess.run([sys.executable, "-c", code], cwd=tests, capture_output=True, text=True)
    pid = int(killed.stdout)
    left = [*Path("/run/netns").glob(f"vnt-{pid}-*"), cgroups.root() / f"vnt-{pid}"]
    assert len(left) == 2
    assert all(path.exists() for path in left)
    net.sweep()
    cgroups.sweep()
    assert not any(path.exists() for path in left)
    assert Path("/run/netns", ns.name).exists()
    assert slices.a.path.exists()
