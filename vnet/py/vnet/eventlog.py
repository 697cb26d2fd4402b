"""The log of events: ``events.jsonl`` and the one before it, ``events.jsonl.1``.

One JSON object a line, oldest first. A line is there whole or not at all: what
a full disk or a kill left of one is cut off again. Written under the lock of
the readers of the ring only (``events.reading``); read without any lock.
"""

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vnet.paths import Paths

#: bytes after which a file becomes the old one
ROTATE_AT = 16 << 20


def path(paths: Paths) -> Path:
    """Where events are kept."""
    return paths.state_dir / "events.jsonl"


def old_path(paths: Paths) -> Path:
    """The file before it."""
    return paths.state_dir / "events.jsonl.1"


def append(paths: Paths, lines: bytes, rotate_at: int = ROTATE_AT) -> None:
    """Add whole lines. Raises OSError, and then nothing was added."""
    log = path(paths)
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size + len(lines) > rotate_at:
            log.replace(old_path(paths))
    fd = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    try:
        size = _whole(fd)
        try:
            left = memoryview(lines)
            while left:
                left = left[os.write(fd, left) :]
        except OSError:
            os.ftruncate(fd, size)
            raise
    finally:
        os.close(fd)


def _whole(fd: int) -> int:
    """Cut off half a line that a killed writer left; the file's size then."""
    size = os.fstat(fd).st_size
    if size == 0 or os.pread(fd, 1, size - 1) == b"\n":
        return size
    at = size
    while at > 0:
        start = max(0, at - 4096)
        newline = os.pread(fd, at - start, start).rfind(b"\n")
        at = start if newline < 0 else start + newline + 1
        if newline >= 0:
            break
    os.ftruncate(fd, at)
    return at


@dataclass(frozen=True)
class Asked:
    """Which events are asked for; a None asks for all."""

    since: str | None = None  #: as the events' own ``time``, which sorts as text
    slice: str | None = None  #: who was refused
    kind: str | None = None

    def wants(self, event: dict[str, Any]) -> bool:
        """Whether it is one of them."""
        return (
            (self.kind is None or event.get("kind") == self.kind)
            and (self.slice is None or event.get("slice") == self.slice)
            and (self.since is None or str(event.get("time")) >= self.since)
        )


def read(paths: Paths, asked: Asked, limit: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """The newest ``limit`` events (None: all), oldest first, and how many there are in all."""
    found: deque[dict[str, Any]] = deque(maxlen=limit)
    count = 0
    for event in _chosen(_lines(paths), asked):
        found.append(event)
        count += 1
    return list(found), count


def _lines(paths: Paths) -> Iterator[bytes]:
    with contextlib.ExitStack() as stack:
        for fd in _open(paths):
            for line in stack.enter_context(os.fdopen(fd, "rb")):
                if line.endswith(b"\n"):  # not yet whole: it is being written
                    yield line


def _open(paths: Paths) -> list[int]:
    """Both files as they belong together, the older one first."""
    while True:
        found = {}
        for file in (path(paths), old_path(paths)):
            with contextlib.suppress(FileNotFoundError):
                found[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        inodes = {os.fstat(fd).st_ino for fd in found.values()}
        if len(inodes) == len(found):
            return list(reversed(found.values()))
        for fd in found.values():  # rotated in between: one file was opened twice
            os.close(fd)


def _chosen(lines: Iterable[bytes], asked: Asked) -> Iterator[dict[str, Any]]:
    """What is asked for. A line that is not ours (somebody edited the file) is passed over."""
    # Most lines are told apart without being read as JSON: 32 MiB in 0.1 s.
    needles = [
        f'"{key}":"{value}"'.encode()
        for key, value in (("kind", asked.kind), ("slice", asked.slice))
        if value is not None
    ]
    decoder = msgspec.json.Decoder()
    for line in lines:
        if not all(needle in line for needle in needles):
            continue
        try:
            event = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        if isinstance(event, dict) and {"time", "kind"} <= event.keys() and asked.wants(event):
            yield event


class Tail:
    """Follows the log over rotations."""

    def __init__(self, paths: Paths, asked: Asked) -> None:
        self._paths, self._asked = paths, asked
        self._file = self._reopened()
        if self._file is not None:
            self._file.seek(0, os.SEEK_END)
        self._half = b""

    def _reopened(self) -> Any:
        try:
            return path(self._paths).open("rb")
        except FileNotFoundError:
            return None

    def new(self) -> list[dict[str, Any]]:
        """What was added since the last call."""
        found: list[dict[str, Any]] = []
        while True:
            if self._file is not None:
                found += self._read()
                try:
                    now = path(self._paths).stat()
                except FileNotFoundError:
                    return found
                here = os.fstat(self._file.fileno())
                if (now.st_dev, now.st_ino) == (here.st_dev, here.st_ino):
                    return found
                # It was rotated. Whoever rotates has written all of the old one.
                found += self._read()
                self._file.close()
                self._half = b""
            self._file = self._reopened()
            if self._file is None:
                return found

    def _read(self) -> list[dict[str, Any]]:
        if self._file.tell() > os.fstat(self._file.fileno()).st_size:
            # A line that the full disk left half was cut off again.
            self._file.seek(0, os.SEEK_END)
            self._half = b""
        whole, newline, half = (self._half + self._file.read()).rpartition(b"\n")
        self._half = half
        return list(_chosen((whole + newline).splitlines(keepends=True), self._asked))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
