"""Asking the collector."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from netflow.lines import Gap, Header, Trailer

if TYPE_CHECKING:
    from netflow.access import Peer
    from netflow.wire import After, Asked, Chunk, For, Request, Why

    Plain = Mapping[str, Any]
    """A request as the collector reads it: its type and its fields (netflow.wire)."""

T = TypeVar("T")


class ClientError(Exception):
    """No answer, or only a part of one; the message says what to do."""


class Refused(ClientError):
    """The collector does not answer this question, and says why."""

    def __init__(self, error: str, why: Why = "failed") -> None:
        super().__init__(error)
        self.why = why


class Absent(ClientError):
    """No collector is there."""


class Answer:
    """A header, then rows while they come, then (after the last) a trailer."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        told = json.loads(_good(next(lines, b"")))
        self.header = _known(Header, {**told, "gaps": [_known(Gap, gap) for gap in told["gaps"]]})
        self.trailer = Trailer(rows=0)

    def __iter__(self) -> Iterator[list[Any]]:
        """The rows. Raises ClientError if the answer was cut short."""
        for line in self._lines:
            if line.startswith(b"["):
                yield json.loads(line)
            else:
                self.trailer = _known(Trailer, json.loads(_good(line)))
                return
        raise ClientError("the collector broke off its answer: what is shown is not all")


def _known(kind: type[T], told: dict[str, Any]) -> T:
    """A line; a newer collector may tell more than is known here."""
    return kind(**{f.name: told[f.name] for f in fields(kind) if f.name in told})  # type: ignore[arg-type]


def _good(line: bytes) -> bytes:
    if not line.endswith(b"\n"):
        raise ClientError("the collector broke off without an answer: see its log")
    if line.startswith(b'{"error":'):
        refusal = json.loads(line)
        raise Refused(refusal["error"], refusal.get("why", "failed"))
    return line


@contextmanager
def asking(path: Path, request: Request | Plain) -> Iterator[Answer]:
    """Send a question; use the answer inside the with. Raises ClientError."""
    with _connected(path, request) as lines:
        yield Answer(lines)


def status(path: Path, who: Peer | None = None) -> dict[str, Any]:
    """How the collector is. Raises ClientError."""
    from netflow.wire import Status

    with _connected(path, passed_on(Status(), who)) as lines:
        answer: dict[str, Any] = json.loads(_good(next(lines, b"")))
        return answer


def figures(path: Path, who: Peer | None = None) -> dict[str, Any]:
    """The numbers that metrics are made of (netflow.figures). Raises ClientError."""
    from netflow.wire import Metrics

    with _connected(path, passed_on(Metrics(), who)) as lines:
        answer: dict[str, Any] = json.loads(_good(next(lines, b"")))
        return answer


def passed_on(request: Asked, who: Peer | None) -> Asked | For:
    """Somebody's question, to be answered as to him; None: our own."""
    if who is None:
        return request
    from netflow.wire import For

    return For(uid=who.uid, gid=who.gid, groups=sorted(who.groups), ask=request)


def give(path: Path, file: int) -> dict[str, Any]:
    """Give the collector an open file of records; what it says of it. Raises ClientError."""
    from netflow.wire import Import

    with _connected(path, Import(), file) as lines:
        answer: dict[str, Any] = json.loads(_good(next(lines, b"")))
        return answer


def after(path: Path, asked: After) -> tuple[Chunk, bytes]:
    """The records after a position: what they are, and their columns. Raises ClientError."""
    import msgspec

    from netflow.wire import Chunk

    with _connected(path, asked) as lines:
        chunk = msgspec.json.decode(_good(next(lines, b"")), type=Chunk)
        data = b"".join(lines)
    if len(data) != chunk.rows * sum(int(kind[2:]) for _, kind in chunk.columns):
        raise ClientError("the collector broke off its answer")
    return chunk, data


@contextmanager
def _connected(
    path: Path, request: Request | Plain, file: int | None = None
) -> Iterator[Iterator[bytes]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        try:
            link.connect(str(path))
        except PermissionError:
            raise ClientError(f"{path}: permission denied") from None
        except OSError as error:
            raise Absent(
                f"no collector answers at {path} ({error.strerror}): start it with "
                "'systemctl start netflow' or 'netflow collect'"
            ) from None
        # Refused before it was read: the reason can be read all the same.
        with suppress(BrokenPipeError, ConnectionResetError):
            if file is None:
                link.sendall(_line(request))
            else:
                socket.send_fds(link, [_line(request)], [file])
        with link.makefile("rb") as lines:
            try:
                yield iter(lines)
            except OSError as error:
                raise ClientError(f"the collector broke off: {error.strerror}") from None


def _line(request: Request | Plain) -> bytes:
    if isinstance(request, Mapping):
        return json.dumps(request).encode() + b"\n"
    from netflow.wire import encode

    return encode(request)
