"""The query socket: who may ask, what is refused, and that asking never stops collecting.

Each client has a thread and a cursor of its own; a client that does not read
is dropped after a while. See netflow.wire for what goes over the socket.
"""

from __future__ import annotations

import errno
import grp
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep, time_ns
from typing import TYPE_CHECKING, Any

import msgspec

from netflow import ask
from netflow.filters import where
from netflow.names import Names
from netflow.store import StoreError
from netflow.wire import MAX_REQUEST, Filter, Flows, Request, Status, Top, encode

if TYPE_CHECKING:
    import duckdb

PATIENCE = 20.0
"""Seconds a client may take to send its request, or to read a part of the answer."""
MAX_SECONDS = 600.0
"""For a whole answer: while it goes on, the store cannot be tidied."""
MAX_CLIENTS = 16

_SO_PEERGROUPS = 59  # asm-generic/socket.h; Linux 4.13
_FLUSH = 64 * 1024
_log = logging.getLogger("netflow")


@dataclass(frozen=True)
class Answers:
    """What a server asks the collector's side for.

    cursor gives a thread its own view of the store. fresh waits until live
    connections are recorded up to a time, and returns how far they are.
    """

    cursor: Callable[[], duckdb.DuckDBPyConnection]
    fresh: Callable[[int], int]
    status: Callable[[duckdb.DuckDBPyConnection], dict[str, Any]]
    names: Names


@dataclass
class Server:
    """A listening socket, its thread and its clients' threads."""

    listener: socket.socket
    path: Path
    group: int | None
    answers: Answers
    threads: list[threading.Thread] = field(default_factory=list)
    clients: dict[socket.socket, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class SocketError(Exception):
    """The query socket cannot be made; the message says why."""


def start(path: Path, group: str | None, answers: Answers) -> Server:
    """Listen on a unix socket that root, this user and a group may use.

    The caller must hold the store, so that a socket found here is a dead
    collector's. Raises SocketError.
    """
    try:
        gid = grp.getgrnam(group).gr_gid if group else None
    except KeyError:
        raise SocketError(f"there is no group {group!r}: make it, or change --group") from None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    new = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        # Bound aside and renamed: nobody meets it before its mode is right.
        listener.bind(str(new))
        new.chmod(0o660)
        if gid is not None:
            os.chown(new, -1, gid)
        listener.listen(64)
        new.rename(path)
    except OSError as error:
        listener.close()
        raise SocketError(f"cannot listen on {path}: {error.strerror or error}") from None
    server = Server(listener, path, gid, answers)
    thread = threading.Thread(target=_accept, args=(server,), name="accept", daemon=True)
    server.threads.append(thread)
    thread.start()
    return server


def stop(server: Server) -> None:
    """Stop listening, interrupt what is being answered, and wait for the threads."""
    server.path.unlink(missing_ok=True)
    # close() alone does not wake a thread that waits in accept().
    server.listener.shutdown(socket.SHUT_RDWR)
    with server.lock:
        for client, cursor in server.clients.items():
            if cursor is not None:
                cursor.interrupt()
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        threads = list(server.threads)
    for thread in threads:
        thread.join(5)
    server.listener.close()


def _accept(server: Server) -> None:
    while True:
        try:
            client, _ = server.listener.accept()
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EBADF):
                return  # stop() has shut the listener down
            _log.warning("cannot take a question: %s", error)
            sleep(0.1)
            continue
        client.settimeout(PATIENCE)
        with server.lock:
            server.threads = [t for t in server.threads if t.is_alive()]
            busy = len(server.clients) >= MAX_CLIENTS
        if refusal := _refusal(client, server.group):
            _refuse(client, refusal)
        elif busy:
            _refuse(client, f"{MAX_CLIENTS} questions are being answered already: ask again")
        else:
            thread = threading.Thread(target=_serve, args=(server, client), daemon=True)
            with server.lock:
                server.clients[client] = None
                server.threads.append(thread)
            thread.start()


def _refusal(client: socket.socket, group: int | None) -> str:
    """Why the peer may not ask; empty if it may."""
    size = struct.calcsize("iII")
    peer = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, uid, gid = struct.unpack("iII", peer)
    if uid in (0, os.geteuid()):
        return ""
    if group is not None:
        if group == gid or group in _groups(client):
            return ""
        return f"uid {uid} may not ask: root and members of group {_group_name(group)} may"
    return f"uid {uid} may not ask: only root may (netflow collect --group NAME lets a group ask)"


def _groups(client: socket.socket) -> tuple[int, ...]:
    """The peer's supplementary groups; none if there are more than Python can take."""
    try:
        raw = client.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
    except OSError:
        return ()
    return struct.unpack(f"{len(raw) // 4}I", raw)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _refuse(client: socket.socket, why: str) -> None:
    client.settimeout(0)
    _say(client, why)
    client.close()


def _say(client: socket.socket, error: str) -> None:
    # A peer that is gone or slow is not our trouble.
    with suppress(OSError):
        client.sendall(encode({"error": error}))


def _serve(server: Server, client: socket.socket) -> None:
    cursor = None
    try:
        request = _read_request(client)
        cursor = server.answers.cursor()
        with server.lock:
            server.clients[client] = cursor
        _answer(server.answers, cursor, request, client)
    except (ValueError, StoreError) as error:
        _say(client, str(error))
    except OSError as error:
        _log.debug("a client went away: %s", error)
    except Exception:
        _log.exception("a question could not be answered")
        _say(client, "internal error: see the collector's log")
    finally:
        with server.lock:
            server.clients.pop(client, None)
        client.close()
        if cursor is not None:
            cursor.close()


def _read_request(client: socket.socket) -> Request:
    data = bytearray()
    while b"\n" not in data:
        part = client.recv(65536)
        if not part:
            raise ValueError("the request has no end: one line of JSON is expected")
        data += part
        if len(data) > MAX_REQUEST:
            raise ValueError(f"the request is longer than {MAX_REQUEST} bytes")
    line, _, _ = bytes(data).partition(b"\n")
    try:
        request: Request = msgspec.json.decode(line, type=Request)
        return request
    except msgspec.DecodeError as error:
        raise ValueError(f"the request cannot be read: {error}") from None


def _answer(
    answers: Answers, cursor: duckdb.DuckDBPyConnection, request: Request, client: socket.socket
) -> None:
    out = bytearray()
    deadline = monotonic() + MAX_SECONDS

    def put(line: Any) -> None:
        out.extend(encode(line))
        if len(out) >= _FLUSH:
            if monotonic() > deadline:
                raise TimeoutError(f"not through after {MAX_SECONDS} seconds")
            client.sendall(out)
            out.clear()

    if isinstance(request, Status):
        put(answers.status(cursor))
    else:
        _check(request.filter)
        now = time_ns()
        until = request.filter.until
        as_of = answers.fresh(now if until is None else min(until, now))
        period = ask.period(cursor, request.filter, now, as_of)
        if isinstance(request, Flows):
            ask.flows(cursor, request, answers.names, period, put)
        elif isinstance(request, Top):
            ask.top(cursor, request, answers.names, period, put)
    client.sendall(out)


def _check(asked: Filter) -> None:
    """Refuse bad values before the collector is asked to do anything."""
    where(asked)
    if asked.since is not None and asked.until is not None and asked.since > asked.until:
        raise ValueError("the period ends before it begins")
