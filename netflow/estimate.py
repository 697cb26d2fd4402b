"""How many flow records a gap has cost: an estimate, from the kernel's counters and from before.

Conntrack counts no connections it makes. TCP counts those that local sockets
open and accept (RFC 4022's tcpActiveOpens and tcpPassiveOpens, /proc/net/snmp,
of this network namespace), also while no collector runs; how many flow records
come of one is measured while a collector does. For the rest there is only how
many came in a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netflow.clock import Now
from netflow.when import SECOND

WINDOW = 600 * SECOND
"""Rates are those of the last one to two of these (ns)."""

_TCP = 6
_ENDS = (1, 2)  # Reason.IDLE, CLOSED: one to each connection
_ENOUGH = 16  # opens; fewer tell no ratio
_LONG = 60.0  # seconds


def opens() -> int:
    """TCP connections that sockets of this namespace opened or accepted so far; -1: not known."""
    try:
        lines = Path("/proc/net/snmp").read_text().splitlines()
        names, values = (line.split()[1:] for line in lines if line.startswith("Tcp:"))
        tcp = dict(zip(names, map(int, values), strict=True))
        return tcp["ActiveOpens"] + tcp["PassiveOpens"]
    except (OSError, ValueError, KeyError):
        return -1


@dataclass
class Window:
    """What ended since a moment: TCP's connections, and others."""

    boot: int
    opens: int
    tcp: int = 0
    other: int = 0


@dataclass(frozen=True)
class Rate:
    """Flow records per TCP open, and others per second."""

    per_open: float
    per_second: float


@dataclass
class Rates:
    """What this collector sees, in two windows of which one is full, and what the last one saw."""

    now: Window
    before: list[Window] = field(default_factory=list)
    last: Rate | None = None


def begin(now: Now) -> Rates:
    """Rates of a collector that begins."""
    return Rates(Window(now.boot, opens()))


def count(rates: Rates, flows: dict[str, NDArray[Any]], now: Now) -> None:
    """Count the records that end a connection."""
    ends = np.isin(flows["reason"], _ENDS)
    tcp = int(np.count_nonzero(ends & (flows["proto"] == _TCP)))
    rates.now.tcp += tcp
    rates.now.other += int(np.count_nonzero(ends)) - tcp
    if now.boot - rates.now.boot > WINDOW:
        rates.before = [rates.now]
        rates.now = Window(now.boot, opens())


def rate(rates: Rates, now: Now, opened: int) -> Rate:
    """The rate of late; opened is what opens() says now.

    A collector that has not run for long goes by what the last one saw, too.
    """
    windows = [*rates.before, rates.now]
    first = windows[0]
    tcp, other = (sum(getattr(w, name) for w in windows) for name in ("tcp", "other"))
    seconds = (now.boot - first.boot) / SECOND
    by_open = first.opens >= 0 and opened - first.opens >= _ENOUGH
    # Where nobody here opens any, what there is passes through, or is not TCP.
    per_second = (other if by_open else tcp + other) / max(seconds, 1.0)
    per_open = tcp / (opened - first.opens) if by_open else 1.0
    if rates.last is None:
        return Rate(per_open, per_second)
    weight = min(seconds / _LONG, 1.0)
    return Rate(
        per_open if by_open else rates.last.per_open,
        weight * per_second + (1 - weight) * rates.last.per_second,
    )


def missing(length: int, opened: int, before: Rate) -> int:
    """About how many connections ended unseen in a span (ns) with this many TCP opens."""
    return round(max(opened, 0) * before.per_open + length / SECOND * before.per_second)
