"""The processes in the slices, and how to ask them."""

import pickle
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vnet.testing.cgroup import Cgroup
from vnet.testing.net import Namespace

_PROGRAM = [sys.executable, "-I", "-S", str(Path(__file__).with_name("actor.py"))]

#: By how much it may do: everything; raw sockets and SO_MARK; nothing.
CAPS: dict[str, list[str]] = {
    "root": [],
    "netraw": [
        *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
        *("--inh-caps=+net_raw", "--ambient-caps=+net_raw", "--"),
    ],
    "user": ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"],
}


@dataclass
class Actor:
    """One process."""

    process: subprocess.Popen[str]
    door: socket.socket

    def ask(self, word: str, *arguments: Any, give: socket.socket | None = None) -> Any:
        """(errno, value, made socket or None)."""
        given = [give.fileno()] if give else []
        socket.send_fds(self.door, [pickle.dumps((word, *arguments))], given)
        data, made, _, _ = socket.recv_fds(self.door, 1 << 16, 1)
        if made:
            data = self.door.recv(1 << 16)
        assert data, f"an actor has ended: {word} {arguments}"
        code, value = pickle.loads(data)
        return code, value, socket.socket(fileno=made[0]) if made else None

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        self.door.close()


def start(ns: Namespace, slice: Cgroup | None, caps: str = "root") -> Actor:
    """Start one in a slice (None: the node)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = ns.popen(
            *(*CAPS[caps], *_PROGRAM, str(theirs.fileno())),
            cgroup=slice,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
        )
    ours.settimeout(60)
    actor = Actor(process, ours)
    with suppress(ConnectionError):
        if ours.recv(16) == b"ready":
            return actor
    actor.end()
    raise AssertionError("an actor did not start")
