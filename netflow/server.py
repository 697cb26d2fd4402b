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
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep, time_ns
from typing import TYPE_CHECKING, Any

import msgspec

from netflow import access, questions
from netflow.filters import where
from netflow.history import FileError, reading
from netflow.names import Names
from netflow.store import StoreError
from netflow.wire import (
    MAX_REQUEST,
    After,
    Asked,
    Files,
    Filter,
    For,
    Gap,
    Import,
    Metrics,
    Request,
    Status,
    Why,
    encode,
)

if TYPE_CHECKING:
    import duckdb

PATIENCE = 20.0
"""Seconds a client may take to send its request, or to read a part of the answer."""
MAX_SECONDS = 600.0
"""For a whole answer: while it goes on, the store cannot be tidied."""
MAX_CLIENTS = 16
OWN_SECONDS = 60.0
"""For a whole answer to a slice's own user."""
OWN_CLIENTS = 4
"""Of MAX_CLIENTS: slices' own users together."""
OWN_CLIENTS_EACH = 2

_FLUSH = 64 * 1024
_log = logging.getLogger("netflow")


@dataclass(frozen=True)
class Answers:
    """What a server asks the collector's side for.

    cursor gives a thread its own view of the store. fresh waits until live
    connections are recorded up to a time, and returns how far they are. take
    takes a file of records in. missing has gaps that the store cannot tell of.
    """

    cursor: Callable[[], duckdb.DuckDBPyConnection]
    fresh: Callable[[int], int]
    status: Callable[[duckdb.DuckDBPyConnection], dict[str, Any]]
    metrics: Callable[[duckdb.DuckDBPyConnection], dict[str, Any]]
    missing: Callable[[], list[Gap]]
    names: Names
    take: Callable[[duckdb.DuckDBPyConnection, int], dict[str, Any]]


@dataclass
class Client:
    """Somebody who is being answered: who asks, and the cursor, once there is one."""

    who: access.Peer
    cursor: duckdb.DuckDBPyConnection | None = None


@dataclass
class Server:
    """A listening socket, its thread and its clients' threads."""

    listener: socket.socket
    path: Path
    group: int | None
    answers: Answers
    threads: list[threading.Thread] = field(default_factory=list)
    clients: dict[socket.socket, Client] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class BusyError(Exception):
    """Too many questions are being answered already."""


class SocketError(Exception):
    """The query socket cannot be made; the message says why."""


def start(path: Path, group: str | None, answers: Answers) -> Server:
    """Listen on a unix socket. Anybody may connect: who may ask what, netflow.access says.

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
        new.chmod(0o666)
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
        for client, known in server.clients.items():
            if known.cursor is not None:
                known.cursor.interrupt()
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
        who = access.peer(client)
        with server.lock:
            server.threads = [t for t in server.threads if t.is_alive()]
            busy = _busy(server, who)
            if not busy:
                server.clients[client] = Client(who)
        if not busy:
            busy = _begin(server, client)
        if busy:
            _refuse(client, busy)


def _begin(server: Server, client: socket.socket) -> str:
    """Have a client served; why that cannot be, if it cannot."""
    thread = threading.Thread(target=_serve, args=(server, client), daemon=True)
    with server.lock:  # it is known before it can have ended
        try:
            thread.start()
        except RuntimeError as error:  # as many threads as there may be: somebody's fork bomb
            _log.warning("cannot answer a question: %s", error)
            server.clients.pop(client, None)
            return "this machine can start no more threads: ask again"
        server.threads.append(thread)
    return ""


def _busy(server: Server, who: access.Peer) -> str:
    """Why somebody must wait for others' answers; empty if he need not. The lock is held."""
    if len(server.clients) >= MAX_CLIENTS:
        return f"{MAX_CLIENTS} questions are being answered already: ask again"
    if access.reads_all(who, server.group):
        return ""
    askers = [known.who for known in server.clients.values()]
    own = [asker for asker in askers if not access.reads_all(asker, server.group)]
    if len([asker for asker in own if asker.uid == who.uid]) >= OWN_CLIENTS_EACH:
        return f"{OWN_CLIENTS_EACH} questions of uid {who.uid} are being answered: ask again"
    if len(own) >= OWN_CLIENTS:
        return f"{OWN_CLIENTS} questions of slices' users are being answered already: ask again"
    return ""


def _refuse(client: socket.socket, why: str) -> None:
    client.settimeout(0)
    _say(client, why, "busy")
    client.close()


def _say(client: socket.socket, error: str, why: Why) -> None:
    # A peer that is gone or slow is not our trouble.
    with suppress(OSError):
        client.sendall(encode({"error": error, "why": why}))


def _serve(server: Server, client: socket.socket) -> None:
    import duckdb

    given = list[int]()
    asking = server.clients[client]
    try:
        # A stranger is sent away before he has said a word: he takes nobody's place.
        scope = _scope(server, asking.who)
        request = _read_request(client, given, 1 if access.trusted(asking.who) else 0)
        if isinstance(request, For):
            request = _for(server, client, request)
            asking = server.clients[client]
            scope = _scope(server, asking.who)
        asking.cursor = server.answers.cursor()
        if isinstance(request, Import):
            _import(server.answers, asking, client, given)
        elif isinstance(request, After):
            _after(server.answers, asking, request, scope, client)
        else:
            _answer(server.answers, asking.cursor, request, scope, client)
    except ValueError as error:
        _say(client, str(error), "bad")
    except access.Denied as error:
        _say(client, str(error), "denied")
    except BusyError as error:
        _say(client, str(error), "busy")
    except (StoreError, FileError) as error:
        _say(client, str(error), "failed")
    except duckdb.Error as error:  # a question has all memory, say
        _say(client, str(error).splitlines()[0], "failed")
    except OSError as error:
        _log.debug("a client went away: %s", error)
    except Exception:
        _log.exception("a question could not be answered")
        _say(client, "internal error: see the collector's log", "failed")
    finally:
        for descriptor in given:
            os.close(descriptor)
        with server.lock:
            server.clients.pop(client, None)
        client.close()
        if asking.cursor is not None:
            asking.cursor.close()


def _scope(server: Server, who: access.Peer) -> access.Scope:
    return access.allowed(who, server.group, server.answers.names.registry)


def _for(server: Server, client: socket.socket, request: For) -> Asked:
    """Somebody else's question, which a trusted peer passes on: from now on it is his."""
    who = server.clients[client].who
    if not access.trusted(who):
        raise access.Denied(f"uid {who.uid} may not ask for others: only root may")
    asker = access.Peer(request.uid, request.gid, frozenset(request.groups))
    with server.lock:
        del server.clients[client]
        busy = _busy(server, asker)
        server.clients[client] = Client(asker)
    if busy:
        raise BusyError(busy)
    return request.ask


def _import(answers: Answers, asking: Client, client: socket.socket, given: list[int]) -> None:
    """What others may read they may not add to."""
    if not access.trusted(asking.who):
        raise access.Denied(f"uid {asking.who.uid} may not import: only root may")
    if len(given) != 1:
        raise ValueError("an import needs one open file with the request")
    assert asking.cursor is not None
    client.sendall(encode(answers.take(asking.cursor, given[0])))


def _after(
    answers: Answers, asking: Client, request: After, scope: access.Scope, client: socket.socket
) -> None:
    """What follows is not to be stopped by the collector, nor the other way round."""
    if not scope.all:
        raise access.Denied("a slice's user may not follow the records of all")
    assert asking.cursor is not None
    with _limited(asking.cursor, OWN_SECONDS):
        parts = list(questions.after(asking.cursor, request, answers.names))
    for part in parts:
        client.sendall(part)


def _read_request(client: socket.socket, given: list[int], most: int) -> Request:
    """The request. Of descriptors that come with it the first ones are added to given; those
    there is no room for the kernel closes.
    """
    deadline = monotonic() + PATIENCE
    data = bytearray()
    while b"\n" not in data:
        left = deadline - monotonic()
        if left <= 0:
            raise TimeoutError(f"no request after {PATIENCE:.0f} seconds")
        client.settimeout(left)
        part, descriptors, _, _ = socket.recv_fds(client, 65536, most - len(given))
        given += descriptors
        if not part:
            raise ValueError("the request has no end: one line of JSON is expected")
        data += part
        if len(data) > MAX_REQUEST:
            raise ValueError(f"the request is longer than {MAX_REQUEST} bytes")
    client.settimeout(PATIENCE)
    line, _, _ = bytes(data).partition(b"\n")
    try:
        request: Request = msgspec.json.decode(line, type=Request)
        return request
    except msgspec.DecodeError as error:
        raise ValueError(f"the request cannot be read: {error}") from None


def _answer(
    answers: Answers,
    cursor: duckdb.DuckDBPyConnection,
    request: Asked,
    scope: access.Scope,
    client: socket.socket,
) -> None:
    out = bytearray()
    seconds = MAX_SECONDS if scope.all else OWN_SECONDS
    deadline = monotonic() + seconds

    def put(line: Any) -> None:
        out.extend(encode(line))
        if len(out) >= _FLUSH:
            if monotonic() > deadline:
                raise TimeoutError(f"not read after {seconds:.0f} seconds")
            client.sendall(out)
            out.clear()

    with _limited(cursor, seconds):
        _ask(answers, cursor, request, scope, put)
    client.sendall(out)


@contextmanager
def _limited(cursor: duckdb.DuckDBPyConnection, seconds: float) -> Iterator[None]:
    """Interrupt what takes longer. Raises StoreError then."""
    late = threading.Timer(seconds, cursor.interrupt)
    late.daemon = True
    late.start()
    try:
        yield
    except StoreError as error:
        if late.finished.is_set():
            raise StoreError(f"not through after {seconds:.0f} seconds: ask about less") from error
        raise
    finally:
        late.cancel()


def _ask(
    answers: Answers,
    cursor: duckdb.DuckDBPyConnection,
    request: Asked,
    scope: access.Scope,
    put: questions.Put,
) -> None:
    if isinstance(request, Status | Metrics | Files):
        if not scope.all:
            raise access.Denied(
                "a slice's user may ask about its flows only, not about the collector or its files"
            )
        with reading(cursor):
            if isinstance(request, Status):
                put(answers.status(cursor))
            elif isinstance(request, Metrics):
                put(answers.metrics(cursor))
            else:
                questions.files(cursor, request, put)
    else:
        _check(request.filter)
        now = time_ns()
        until = request.filter.until
        as_of = answers.fresh(now if until is None else min(until, now))
        with reading(cursor):
            period = questions.period(cursor, request.filter, now, as_of, answers.missing())
            questions.ANSWERS[type(request)](cursor, request, answers.names, period, scope, put)


def _check(asked: Filter) -> None:
    """Refuse bad values before the collector is asked to do anything."""
    where(asked)
    if asked.since is not None and asked.until is not None and asked.since > asked.until:
        raise ValueError("the period ends before it begins")
