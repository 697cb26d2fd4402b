"""Asking the collector."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from netflow.wire import Header, Request, Status, Trailer, encode


class ClientError(Exception):
    """No answer, or only a part of one; the message says what to do."""


class Refused(ClientError):
    """The collector does not answer this question, and says why."""


class Answer:
    """A header, then rows while they come, then (after the last) a trailer."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self.header = msgspec.json.decode(_good(next(lines, b"")), type=Header)
        self.trailer = Trailer(rows=0)

    def __iter__(self) -> Iterator[list[Any]]:
        """The rows. Raises ClientError if the answer was cut short."""
        for line in self._lines:
            if line.startswith(b"["):
                yield msgspec.json.decode(line)
            else:
                self.trailer = msgspec.json.decode(_good(line), type=Trailer)
                return
        raise ClientError("the collector broke off its answer: what is shown is not all")


def _good(line: bytes) -> bytes:
    if not line.endswith(b"\n"):
        raise ClientError("the collector broke off without an answer: see its log")
    if line.startswith(b'{"error":'):
        raise Refused(str(msgspec.json.decode(line)["error"]))
    return line


@contextmanager
def asking(path: Path, request: Request) -> Iterator[Answer]:
    """Send a question; use the answer inside the with. Raises ClientError."""
    with _connected(path, request) as lines:
        yield Answer(lines)


def status(path: Path) -> dict[str, Any]:
    """How the collector is. Raises ClientError."""
    with _connected(path, Status()) as lines:
        answer: dict[str, Any] = msgspec.json.decode(_good(next(lines, b"")))
        return answer


@contextmanager
def _connected(path: Path, request: Request) -> Iterator[Iterator[bytes]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        try:
            link.connect(str(path))
        except PermissionError:
            raise ClientError(
                f"{path}: permission denied: only root and members of the group given to "
                "netflow collect --group may ask"
            ) from None
        except OSError as error:
            raise ClientError(
                f"no collector answers at {path} ({error.strerror}): start it with "
                "'systemctl start netflow' or 'netflow collect'"
            ) from None
        # Refused before it was read: the reason can be read all the same.
        with suppress(BrokenPipeError, ConnectionResetError):
            link.sendall(encode(request))
        with link.makefile("rb") as lines:
            try:
                yield iter(lines)
            except OSError as error:
                raise ClientError(f"the collector broke off: {error.strerror}") from None
