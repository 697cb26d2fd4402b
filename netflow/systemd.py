"""The service manager's notification protocol, sd_notify(3)."""

import os
import socket
from contextlib import suppress
from functools import cache


def notify(state: str) -> None:
    """Tell the service manager, where there is one. Never fails."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError):
        _link().sendto(state.encode(), address)


@cache
def _link() -> socket.socket:
    """One for all: a sign of life must not take a descriptor when there is none left."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def watchdog() -> float:
    """How often the service manager wants a sign of life, in seconds; 0: it does not."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not usec.isdigit() or (pid and pid != str(os.getpid())):
        return 0.0
    return int(usec) / 2_000_000
