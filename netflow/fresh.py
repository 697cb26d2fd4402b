"""How far live connections are recorded, between askers and the collector."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field

PATIENCE = 5.0
"""Seconds a question waits for live connections to be recorded up to its time."""


@dataclass
class Fresh:
    """as_of: everything up to then (ns UTC) is in the store. wanted: up to when someone asks."""

    bell: socket.socket
    as_of: int = 0
    wanted: int = 0
    ended: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)


def wait(fresh: Fresh, goal: int) -> int:
    """Called by an asker: wait until everything up to goal (not after now) is in the store.

    Returns as_of; under load that is before goal, after PATIENCE.
    """
    with fresh.changed:
        if fresh.as_of < goal:
            fresh.wanted = max(fresh.wanted, goal)
            # A full bell has been rung already.
            with suppress(BlockingIOError):
                fresh.bell.send(b"\0")
            fresh.changed.wait_for(lambda: fresh.ended or fresh.as_of >= goal, PATIENCE)
        return fresh.as_of


def wanting(fresh: Fresh) -> bool:
    """Called by the collector: somebody waits."""
    with fresh.changed:
        return fresh.wanted > fresh.as_of


def reached(fresh: Fresh, as_of: int) -> None:
    """Called by the collector: everything up to then is committed."""
    with fresh.changed:
        fresh.as_of = max(fresh.as_of, as_of)
        fresh.changed.notify_all()


def end(fresh: Fresh) -> None:
    """Called by the collector: nobody need wait any more."""
    with fresh.changed:
        fresh.ended = True
        fresh.changed.notify_all()
