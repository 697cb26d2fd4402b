"""An IPFIX exporter that follows a store while records come into it, for bench_ingest.py.

The collector's own server answers `netflow export`, which sends over TCP to a
process that throws away what it reads.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

from netflow import collect, history, server
from netflow.node import this_node
from netflow.state import State

NETFLOW = [sys.executable, "-m", "netflow"]
DEADLINE = 600.0


@dataclass
class Follower:
    """A running export. behind: records not yet sent when the last one was durable.

    after: seconds from then until all have arrived, of which the exporter's
    position takes 2 to 3. cpu: the exporter's processor seconds.
    """

    position: Path
    records: int = 0
    behind: int = 0
    after: float = 0.0
    cpu: float = 0.0

    def sent(self) -> int:
        """Records handed to the receiver, as of the last second."""
        with suppress(FileNotFoundError):
            return int(json.loads(self.position.read_text())["records"])
        return 0

    def wait(self, records: int) -> None:
        """Until so many have arrived; to be called once they are durable."""
        self.records, began = records, time.monotonic()
        self.behind = max(0, records - self.sent())
        while self.sent() < records:
            assert time.monotonic() - began < DEADLINE, f"{self.sent()} of {records} exported"
            time.sleep(0.02)
        self.after = time.monotonic() - began


@contextmanager
def following(state: State, where: Path) -> Iterator[Follower]:
    """Answer questions about a state's store, and let an exporter ask, once it is connected."""
    options = collect.Options(
        where, this_node(), history.Keeping(), where / "query.sock", None, where / "none.db",
        0, 0, verbose=False,
    )  # fmt: skip
    serving = server.start(options.socket, None, collect._answers(state, options))
    listener = socket.create_server(("127.0.0.1", 0))
    to = f"127.0.0.1:{listener.getsockname()[1]}"
    ready, tell = os.pipe()
    if (taker := os.fork()) == 0:
        _drain(listener, tell)
    listener.close()
    follower = Follower(where / "position")
    words = ["--to", to, "--transport", "tcp", "--rate", "0", "--begin", "oldest"]
    with (where / "export.log").open("w") as log:
        exporter = subprocess.Popen(
            [*NETFLOW, "export", *words, "--socket", options.socket,
             "--position", follower.position],
            stderr=log,
        )  # fmt: skip
    os.read(ready, 1)
    try:
        yield follower
        before = getrusage(RUSAGE_CHILDREN)
        exporter.terminate()
        assert exporter.wait() == 0, (where / "export.log").read_text()
        after = getrusage(RUSAGE_CHILDREN)
        follower.cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    finally:
        exporter.kill()
        exporter.wait()
        os.kill(taker, signal.SIGKILL)
        os.waitpid(taker, 0)
        server.stop(serving)


def _drain(listener: socket.socket, tell: int) -> None:
    link, _ = listener.accept()
    os.write(tell, b".")
    while link.recv(1 << 20):
        pass
    os._exit(0)
