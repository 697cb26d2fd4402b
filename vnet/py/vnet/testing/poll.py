"""Waiting for facts."""

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = float(os.environ.get("VNET_PATIENCE", "1"))
"""How many times longer than usual to wait for anything: for slow machines."""


def until(fn: Callable[[], T], timeout: float = 60.0, what: str = "") -> T:
    """Call fn until it returns something true, and return that.

    Raises AssertionError after timeout seconds (times PATIENCE), with what was waited for and
    the last value. The pause between calls grows from 1 to 50 ms.
    """
    timeout *= PATIENCE
    deadline = time.monotonic() + timeout
    pause = 0.001
    while True:
        value = fn()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {timeout:g} s: {what or fn!r} (last: {value!r})")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
