"""Somebody sets the machine's clock while a collector runs: only a guest lets one do that."""

import time
from contextlib import contextmanager

import pytest
from netflowbed import accounting, collector, connmark, sums
from vnet.testing import net
from vnet.testing.apps import start
from vnet.testing.net import HERE
from vnet.testing.poll import until

pytestmark = pytest.mark.vm

HOUR = 3600
MINUTE = 60 * 10**9


@contextmanager
def set_by(seconds):
    """The clock is so much ahead, then as it was: a step forward, and one back."""
    offset = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)
    try:
        yield
    finally:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        time.clock_settime(time.CLOCK_REALTIME, now + offset)


def datagrams(ns, count):
    options = {"to": "127.0.0.1", "port": 9, "from_port": 4000}
    with start(ns, "udp-send", count=count, size=100, **options) as sender:
        sender.result()


@pytest.mark.kernels("6.1")  # it is the collector that is tried, not the kernel
def test_a_clock_that_is_set_loses_no_packet_and_each_step_is_a_gap(tmp_path):
    HERE.run("modprobe", "nf_conntrack")  # or there are no settings of it yet
    with net.namespace("clock") as ns:
        accounting(ns)
        ns.sysctl(net__netfilter__nf_conntrack_udp_timeout=600)
        connmark(ns, 256)
        with (
            start(ns, "udp-recv", bind="127.0.0.1", port=9),
            collector(ns, tmp_path, wait=120) as flows,
        ):
            datagrams(ns, 3)
            assert sums(flows.records())[0] == 3
            with set_by(HOUR):
                until(lambda: len(steps(flows)) == 1, 60, "it sees the first step")
                assert way(steps(flows)[0]) == "forward"
                datagrams(ns, 2)
                assert sums(flows.records())[0] == 5
            until(lambda: len(steps(flows)) == 2, 60, "it sees the second step")
            datagrams(ns, 1)
            records = flows.records()
            assert sums(records)[0] == 6
            assert all(row["start"] <= row["end"] for row in records)
            gaps = steps(flows)
            assert all(abs(gap.until - gap.since - HOUR * 10**9) < MINUTE for gap in gaps)
            assert sorted(way(gap) for gap in gaps) == ["back", "forward"]
            assert flows.stop() == 0


def steps(flows):
    """The gaps that steps of the clock are."""
    far = 10 * HOUR * 10**9
    now = time.time_ns()
    gaps = flows.ask(since=now - far, until=now + far)[1]
    return [gap for gap in gaps if gap.what == "clock-step"]


def way(gap):
    return gap.note.split()[4]  # the clock was set back by 3600.000 s
