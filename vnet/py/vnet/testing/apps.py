"""Start the programs of vnet.testing.traffic and read what they counted."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vnet.testing.cgroup import Cgroup
from vnet.testing.net import Namespace
from vnet.testing.poll import PATIENCE

# -I -S: no site-packages, whose hooks take longer than the program itself.
_PROGRAM = [sys.executable, "-I", "-S", str(Path(__file__).with_name("traffic.py"))]


@dataclass
class App:
    """A running program and the events it has printed so far."""

    words: str
    process: subprocess.Popen[str]
    events: list[dict[str, Any]] = field(default_factory=list)
    noise: list[str] = field(default_factory=list)
    reader: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        # Read as it comes: a program whose pipe is full stands still.
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def event(self, name: str, timeout: float = 60.0) -> dict[str, Any]:
        """The first event of that name, waited for up to timeout seconds.

        Raises AssertionError with what the program printed if it ends or the
        time passes without it.
        """
        timeout *= PATIENCE
        deadline = time.monotonic() + timeout
        while True:
            over = not self.reader.is_alive()  # asked first, or its last words are missed
            found = next((seen for seen in list(self.events) if seen["event"] == name), None)
            if found:
                return found
            if over or time.monotonic() > deadline:
                raise AssertionError(
                    f"{self.words}: no {name!r} within {timeout:g} s; it said:\n"
                    + "\n".join([*map(str, self.events[-5:]), *self.noise])
                )
            self.reader.join(0.005)

    @property
    def port(self) -> int:
        """The port it is bound to (a client's: of its first connection)."""
        first = next((e for e in self.events if "port" in e), None)
        return int((first or self.event("ready"))["port"])

    def go(self) -> None:
        """Let go of a hold."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        """Ask a server to finish: the end of its input."""
        assert self.process.stdin
        if not self.process.stdin.closed:
            self.process.stdin.close()

    def result(self, timeout: float = 90.0, stop: bool = False) -> dict[str, Any]:
        """What it counted in all, once it is done; with stop it is asked to finish.

        It gives up by itself after 60 s (PATIENCE in traffic.py), and then says what it counted.
        """
        if stop:
            self.stop()
        return self.event("done", timeout)

    def flows(self) -> list[dict[str, Any]]:
        """What it counted for each connection or UDP peer, so far."""
        return [seen for seen in self.events if seen["event"] == "flow"]

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                self.events.append(json.loads(line))
            else:
                self.noise.append(line.rstrip())


_used: set[int] = set()
"""Every port that a program of this process has had."""

_DRAWS = 20
"""Draws of a port that is fresh: a namespace may have but a few to draw from."""


@contextmanager
def start(
    ns: Namespace, kind: str, cgroup: Cgroup | None = None, **options: int | str
) -> Iterator[App]:
    """Run a program of vnet.testing.traffic; it is killed when the block ends.

    A server or udp program is ready (bound) when this returns. The options
    are the program's own. A server that is given no port gets one that no
    program has had before, as long as there are any: by its port it is found in
    a long capture, or among records that are kept.
    """
    any_port = kind in ("tcp-server", "udp-recv") and not options.get("port")
    # The kernel draws from some 28,000: of 200 servers, two have one port in half of all runs.
    for again in reversed(range(_DRAWS)):
        with _running(ns, kind, cgroup, options) as app:
            if any_port and again and app.port in _used:
                continue
            _used.add(app.port)
            yield app
            return


@contextmanager
def _running(
    ns: Namespace, kind: str, cgroup: Cgroup | None, options: dict[str, int | str]
) -> Iterator[App]:
    words = [kind, *(f"{key}={value}" for key, value in options.items())]
    with ns.popen(
        *_PROGRAM,
        *words,
        cgroup=cgroup,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        app = App(" ".join(words), process)
        try:
            app.event("connected" if kind == "tcp-client" else "ready")
            yield app
        finally:
            process.kill()
            app.reader.join()
