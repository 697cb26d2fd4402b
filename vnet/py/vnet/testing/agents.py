"""Somebody in a slice who does what it is told, by vnet.testing.attempts."""

import itertools
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vnet.testing.attempts import PATIENCE
from vnet.testing.cgroup import Cgroup
from vnet.testing.net import Namespace
from vnet.testing.poll import PATIENCE as SLOWNESS
from vnet.testing.steps import Steps

# -I -S: no site-packages, whose hooks take longer than the program itself.
_PROGRAM = [sys.executable, "-I", "-S", str(Path(__file__).with_name("attempts.py"))]


@dataclass
class Agent:
    """Somebody in a slice who does what it is told."""

    role: str
    process: subprocess.Popen[str]
    answers: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    rest: bytes = b""
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def tries(self, steps: Steps, patience: float = PATIENCE) -> dict[str, Any]:
        """Take the steps and say how it went.

        ``patience``: seconds (times vnet.testing.poll.PATIENCE) for each wait.
        """
        return self.answer(self.begins(steps, wait=True, patience=patience))

    def begins(self, steps: Steps, wait: bool = False, patience: float = PATIENCE) -> int:
        """Take steps that end in holding on, or wait for somebody."""
        number = next(self.ids)
        self._ask(id=number, steps=steps, wait=wait, patience=patience * SLOWNESS)
        return number

    def answer(self, number: int, timeout: float = 60) -> dict[str, Any]:
        """The next answer to a request, within so many seconds (times poll.PATIENCE)."""
        deadline = time.monotonic() + timeout * SLOWNESS
        while not self.answers.get(number):
            out = self.process.stdout
            assert out
            left = max(deadline - time.monotonic(), 0)
            assert select.select([out], [], [], left)[0], f"{self.role}: no answer"
            data = os.read(out.fileno(), 65536)
            assert data, f"{self.role} has ended"
            *lines, self.rest = (self.rest + data).split(b"\n")
            for line in lines:
                said = json.loads(line)
                self.answers.setdefault(said["id"], []).append(said)
        return self.answers[number].pop(0)

    def drops(self, number: int) -> None:
        """End a request that holds on."""
        mine = next(self.ids)
        self._ask(id=mine, drop=number)
        self.answer(mine)

    @contextmanager
    def holding(self, steps: Steps) -> Iterator[dict[str, Any]]:
        """What a request that ends in ``hold`` has got, while it holds on."""
        number = self.begins(steps)
        try:
            said = self.answer(number)
            assert said["ok"], said
            yield said
        finally:
            self.drops(number)

    def _ask(self, **request: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()


@contextmanager
def begin(
    role: str, ns: Namespace, cgroup: Cgroup | None = None, uid: int | None = None
) -> Iterator[Agent]:
    """Start an agent; its first answer, to request 0, says that it is there."""
    who = [] if uid is None else [f"uid={uid}"]
    with ns.popen(
        *_PROGRAM, *who, cgroup=cgroup, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield Agent(role, process)
        finally:
            with suppress(BrokenPipeError):  # it has ended by itself
                if process.stdin:
                    process.stdin.close()
