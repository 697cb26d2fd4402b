"""How far live connections are recorded, between askers and the collector.

Kept by the clock that nobody sets: after the other one was set back, what is
stored would seem to reach into the future, and no question would wait.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field

from netflow import clock

PATIENCE = 5.0
"""Seconds a question waits for live connections to be recorded up to its time."""


@dataclass
class Fresh:
    """upto: everything is in the store up to then. wanted: up to when someone asks.

    Both in ns since the machine booted.
    """

    bell: socket.socket
    upto: int = 0
    wanted: int = 0
    ended: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)


def wait(fresh: Fresh, goal: int) -> int:
    """Called by an asker: wait until everything up to goal (ns UTC, not after now) is stored.

    Returns up to when it is; under load that is before goal, after PATIENCE.
    """
    now = clock.now()
    wanted = now.boot - (now.real - goal)
    with fresh.changed:
        if fresh.upto < wanted:
            fresh.wanted = max(fresh.wanted, wanted)
            # A full bell has been rung already.
            with suppress(BlockingIOError):
                fresh.bell.send(b"\0")
            fresh.changed.wait_for(lambda: fresh.ended or fresh.upto >= wanted, PATIENCE)
        return goal + fresh.upto - wanted if fresh.upto else 0


def as_of(fresh: Fresh) -> int:
    """Everything up to then (ns UTC, by today's clock) is stored; 0: nothing yet."""
    now = clock.now()
    with fresh.changed:
        return now.real - (now.boot - fresh.upto) if fresh.upto else 0


def wanting(fresh: Fresh) -> bool:
    """Called by the collector: somebody waits."""
    with fresh.changed:
        return fresh.wanted > fresh.upto


def reached(fresh: Fresh, upto: int) -> None:
    """Called by the collector: everything up to then (ns since boot) is committed."""
    with fresh.changed:
        fresh.upto = max(fresh.upto, upto)
        fresh.changed.notify_all()


def begin(fresh: Fresh) -> None:
    """Called by the collector: it follows again, and can be waited for."""
    with fresh.changed:
        fresh.ended = False


def end(fresh: Fresh) -> None:
    """Called by the collector: it does not follow, so that nobody need wait."""
    with fresh.changed:
        fresh.ended = True
        fresh.changed.notify_all()
