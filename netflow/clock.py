"""The machine's clocks: the one that records are written by may be set, the other only goes on.

Conntrack stamps connections with CLOCK_REALTIME (net/netfilter/
nf_conntrack_timestamp.h). Somebody may set it while a collector runs, or while
none does; CLOCK_BOOTTIME (clock_gettime(2)) says then how long it really was.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

STEP = 100_000_000
"""Nanoseconds: what the clock is set by at once is a step from here on. NTP's daemons slew less."""

_PREEMPTED = 1_000_000  # ns between two readings: another process ran in between


@dataclass(frozen=True)
class Now:
    """One moment: ns since the epoch (UTC), and since the machine booted."""

    real: int
    boot: int

    @property
    def offset(self) -> int:
        return self.real - self.boot


def now() -> Now:
    """This moment by both clocks."""
    for _ in range(10):
        before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        real = time.time_ns()
        boot = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        if boot - before < _PREEMPTED:
            break
    return Now(real, boot)


def step(before: Now, after: Now) -> int:
    """By how many ns the clock was set between two moments, negative: back; 0: it was not."""
    moved = after.offset - before.offset
    return moved if abs(moved) >= STEP else 0


def boot_id() -> str:
    """Which boot of this machine this is, random(4)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
