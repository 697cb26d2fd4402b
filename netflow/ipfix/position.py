"""How far an export has come, on disk: what a receiver has, it need not get again."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from netflow.wire import Position


class PositionError(Exception):
    """The file cannot be used; the message says what to do."""


class Progress(msgspec.Struct, kw_only=True):
    """What is in the file. Counts are of the whole export since it began.

    position: the receiver has all before it. records: data records handed to
    it, those among them that went again included. lost: segments that were
    gone before they were sent. refused: datagrams that nobody took.
    """

    version: int = 1
    position: Position = Position()
    records: int = 0
    messages: int = 0
    sessions: int = 0
    again: int = 0
    lost: int = 0
    refused: int = 0
    saved: int = 0


@dataclass
class Place:
    """The file, held by this process alone."""

    path: Path
    progress: Progress = field(default_factory=Progress)


@contextmanager
def held(path: Path) -> Iterator[Place]:
    """Take the file, which may not be there yet. Raises PositionError."""
    lock = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise PositionError(
            f"cannot keep a position in {path}: {error.strerror}: give another --position"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PositionError(f"another netflow export has {path}: stop it first") from None
        yield Place(path, _read(path))
    finally:
        os.close(descriptor)


def _read(path: Path) -> Progress:
    try:
        progress = msgspec.json.decode(path.read_bytes(), type=Progress)
    except FileNotFoundError:
        return Progress()
    except (OSError, msgspec.MsgspecError) as error:
        raise PositionError(
            f"cannot read {path}: {error}: remove it to begin anew (--begin says where)"
        ) from None
    if progress.version != 1:
        raise PositionError(f"{path} is of version {progress.version}: this netflow knows 1")
    return progress


def known(directory: Path) -> dict[str, Progress]:
    """The exports whose positions are in a directory, by their files' names.

    What cannot be read is none: it is the exporter that says so.
    """
    found: dict[str, Progress] = {}
    with suppress(OSError):
        for path in sorted(directory.iterdir()):
            if not path.name.startswith(".") and path.suffix != ".lock":
                with suppress(PositionError):
                    progress = _read(path)
                    if progress.saved:
                        found[path.name] = progress
    return found


def save(place: Place, now: int) -> None:
    """Write it, durable on return; there always is a whole file. Raises PositionError."""
    place.progress.saved = now
    new = place.path.with_name(f".new-{place.path.name}")
    try:
        with new.open("wb") as file:
            file.write(msgspec.json.encode(place.progress) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        new.rename(place.path)
        directory: Any = os.open(place.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise PositionError(f"cannot write {place.path}: {error.strerror}") from None
