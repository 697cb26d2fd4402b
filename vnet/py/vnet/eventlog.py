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
from typing import Any, BinaryIO

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
    for event in each(paths, asked):
        found.append(event)
        count += 1
    return list(found), count


def each(paths: Paths, asked: Asked) -> Iterator[dict[str, Any]]:
    """The events, oldest first, one at a time: all of them may take 160 MB."""
    return _chosen(_lines(paths), asked)


def _lines(paths: Paths) -> Iterator[bytes]:
    with contextlib.ExitStack() as stack:
        for fd in _open(paths):
            for line in stack.enter_context(os.fdopen(fd, "rb")):
                if not line.endswith(b"\n"):
                    break  # being written: its other half must not pass for a line
                yield line


def _open(paths: Paths) -> list[int]:
    """Both files as they belong together, the older one first."""
    while True:
        found = [_opened(path(paths)), _opened(old_path(paths))]
        again = _opened(path(paths))
        newest = [os.fstat(fd).st_ino if fd is not None else None for fd in (found[0], again)]
        unused = [again]
        if newest[0] != newest[1]:  # rotated in between: they may be no neighbours
            unused += found
        for fd in unused:
            if fd is not None:
                os.close(fd)
        if newest[0] == newest[1]:
            return [fd for fd in reversed(found) if fd is not None]


def _opened(file: Path) -> int | None:
    try:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


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
    """Follows the log over rotations, from its end on."""

    def __init__(self, paths: Paths, asked: Asked) -> None:
        self._paths, self._asked = paths, asked
        self._half = b""
        self._file: BinaryIO | None = None
        for fd in _open(paths):
            self.close()
            self._file = os.fdopen(fd, "rb")
            self._file.seek(0, os.SEEK_END)

    def new(self) -> list[dict[str, Any]]:
        """What was added since the last call."""
        files = [os.fdopen(fd, "rb") for fd in _open(self._paths)]
        found: list[dict[str, Any]] = []
        if self._file is not None:
            found += self._read(self._file)
            ours = os.fstat(self._file.fileno())
            for at, file in enumerate(files):
                if os.path.samestat(os.fstat(file.fileno()), ours):
                    for older in files[: at + 1]:
                        older.close()
                    del files[: at + 1]
                    break
        for file in files:  # the log has gone on in these
            self.close()
            self._file, self._half = file, b""
            found += self._read(file)
        return found

    def _read(self, file: BinaryIO) -> list[dict[str, Any]]:
        if file.tell() > os.fstat(file.fileno()).st_size:
            # A line that the full disk left half was cut off again.
            file.seek(0, os.SEEK_END)
            self._half = b""
        whole, newline, half = (self._half + file.read()).rpartition(b"\n")
        self._half = half
        return list(_chosen((whole + newline).splitlines(keepends=True), self._asked))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
