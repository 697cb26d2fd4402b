"""Many connections in little time: each is recorded, or counted as missing."""

import signal
import sys

import pytest
from netflowbed import accounting, collector, connmark, destroy
from vnet.testing.poll import until

pytestmark = pytest.mark.netns

MANY = 6_000
FEW = 1_000
"""So many ends the kernel can tell again by 30 at once, on a busy machine too, before the
collector must take them for lost (half a minute, netflow/ext/table.c)."""


@pytest.fixture
def node(ns):
    accounting(ns, lasting=600)
    connmark(ns, 256)
    return ns


def storm(ns, count):
    """Open that many TCP connections over loopback and reset each."""
    ns.run(sys.executable, "-m", "churn", "storm", str(count), timeout=300)


def finals(records):
    return [r for r in records if r["proto"] == "tcp" and r["reason"] in ("closed", "idle")]


def ended(flows):
    """Connections whose end is recorded; as lost if it was told late and added nothing."""
    ends = [r for r in flows.records() if r["reason"] in ("closed", "idle", "lost")]
    return {(r["flow_id"], r["src"], r["sport"], r["dst"]) for r in ends}


def test_a_storm_that_overruns_the_buffer_loses_no_connection(node, tmp_path):
    options = ("--receive-buffer", "16384", "--active-timeout", "2s")
    with collector(node, tmp_path, *options) as flows:
        storm(node, FEW)
        destroy(node)
        until(lambda: len(ended(flows)) == FEW, 240)
        # One overrun, or several one after the other: each in the end cost nothing.
        until(lambda: all(gap.estimate == 0 for gap in flows.ask()[1]), 240)
        gaps = flows.ask()[1]
        assert {gap.what for gap in gaps} == {"overrun"} and any(gap.events for gap in gaps)
        assert flows.stop() == 0


def test_connections_that_nobody_followed_are_estimated_by_what_the_kernel_counted(node, tmp_path):
    with collector(node, tmp_path) as flows:
        storm(node, MANY)
        destroy(node)
        until(lambda: len(finals(flows.records())) == MANY, 240)
        flows.stop(signal.SIGKILL)
    storm(node, MANY // 2)
    destroy(node)
    with collector(node, tmp_path) as flows:
        records, gaps = flows.ask()
        assert len(finals(records)) == MANY
        [gap] = gaps
        assert gap.what == "not-running"
        assert MANY // 2 * 0.9 <= gap.estimate <= MANY // 2 * 1.1


def test_connections_of_another_boot_are_cut_at_its_end(node, tmp_path):
    with collector(node, tmp_path) as flows:
        storm(node, 10)
        assert {r["reason"] for r in flows.records()} == {"active"}
        flows.stop(signal.SIGKILL)
    destroy(node)
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another\n")
    place = "/proc/sys/kernel/random/boot_id"
    under = ("unshare", "--mount", "sh", "-c", f'mount --bind {boot_id} {place} && exec "$@"', "-")
    with collector(node, tmp_path, under=under) as flows:
        records, gaps = flows.ask()
        assert [gap.what for gap in gaps] == ["rebooted"]
        cut = [r for r in records if r["reason"] == "cut"]
        assert len(cut) == 10 and not sum(r["originator"]["packets"] for r in cut)
        before = {r["flow_id"]: r["end"] for r in records if r["reason"] == "active"}
        assert {r["flow_id"]: r["start"] for r in cut} == before
