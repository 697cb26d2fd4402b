"""Which slice held which xid, and when: the only place where a number gets a name.

One SQLite file, ``registry.db``. It is written by ``vnet`` and read by anybody,
``netflow`` first of all, through ``open_readonly``. Beside the numbers it says
who a slice's users are: now, as the slices' files have it, not in the past.

A change is made to a copy in memory, which then replaces the file, a few times
a day. So nobody who reads holds up the writer: a lock that any local user may
take (https://www.sqlite.org/lockingv3.html, SHARED) is one on the old file. And
not WAL: who reads a WAL database must be able to write beside it
(https://www.sqlite.org/wal.html#read_only_databases), which a sandboxed daemon
cannot. Writers hold the node's lock (``guard.lock``).

Numbers: a slice without a fixed xid keeps the one it has; a slice that comes
back gets its last one if nobody had it since; else the lowest number from
FIRST up that was never used, else the lowest one that has rested. 1..255 are
only given when a file asks for them.
"""

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vnet.errors import ConflictError, VnetError

FIRST = 256
LAST = 65535
#: how long an xid rests before another slice may have it, in nanoseconds:
#: longer than any connection that carries it is kept (5 days would be
#: nf_conntrack_tcp_timeout_established, but such a one is re-marked by its
#: socket's next packet)
REST_NS = 24 * 3600 * 10**9

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tenure (
    xid   INTEGER NOT NULL CHECK (xid BETWEEN 1 AND 65535),
    slice TEXT    NOT NULL,
    since INTEGER NOT NULL,  -- ns since the epoch, UTC
    until INTEGER            -- the same; NULL: still held
);
CREATE UNIQUE INDEX IF NOT EXISTS tenure_held ON tenure (xid) WHERE until IS NULL;
CREATE INDEX IF NOT EXISTS tenure_xid ON tenure (xid, since);
CREATE INDEX IF NOT EXISTS tenure_slice ON tenure (slice, since);
"""
# A registry of an older version has no such table until it is written to.
_MEMBERS = """
CREATE TABLE IF NOT EXISTS member (
    slice TEXT NOT NULL,
    user  TEXT NOT NULL,  -- a name, or a uid in decimal
    PRIMARY KEY (user, slice)
) WITHOUT ROWID
"""


class RegistryError(VnetError, sqlite3.DatabaseError):
    """The registry cannot be read or written; to who knows SQLite only, an error of it."""

    def __init__(self, path: Path, error: Exception) -> None:
        super().__init__(
            f"registry {path}: {error}",
            "is the disk full or read-only? A damaged registry comes back from a backup, or is "
            "moved away: then numbers are given anew, and who held which is forgotten",
        )


@dataclass(frozen=True)
class Tenure:
    """``slice`` held ``xid`` from ``since`` to ``until`` (ns UTC; None: still)."""

    xid: int
    slice: str
    since: int
    until: int | None


@dataclass(frozen=True)
class Request:
    """A slice that is to have a number, and the one it insists on, if any."""

    slice: str
    xid: int | None = None
    where: str = ""  #: for messages: the file and line that ask
    users: tuple[str, ...] = ()  #: names, or uids in decimal


Member = tuple[str, str]


@dataclass
class Assignment:
    """What ``assign`` found and did."""

    xids: dict[str, int] = field(default_factory=dict)
    since: dict[str, int] = field(default_factory=dict)
    opened: list[Tenure] = field(default_factory=list)
    #: held by slices that are gone or have another number now: ``release``
    #: them once nothing is marked with them any more
    ended: list[Tenure] = field(default_factory=list)
    #: (slice, user) as it was, and as it is asked for
    members: tuple[list[Member], list[Member]] = field(default_factory=lambda: ([], []))


class Registry:
    """An open registry, for reading, as it was when it was opened.

    Every method may be called at any time, and raises RegistryError.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    def holder(self, xid: int, at_ns: int) -> str | None:
        """The slice that held ``xid`` at that time (ns UTC); None if nobody did."""
        rows = self._rows(
            "SELECT slice FROM tenure WHERE xid = ? AND since <= ?"
            " AND (until IS NULL OR until > ?) ORDER BY since DESC LIMIT 1",
            (xid, at_ns, at_ns),
        )
        return rows[0][0] if rows else None

    def tenures(self, slice: str | None = None, xid: int | None = None) -> list[Tenure]:
        """Tenures in order of time, of one slice, one xid, both, or all."""
        rows = self._rows(
            "SELECT xid, slice, since, until FROM tenure"
            " WHERE (?1 IS NULL OR slice = ?1) AND (?2 IS NULL OR xid = ?2)"
            " ORDER BY since, xid",
            (slice, xid),
        )
        return [Tenure(*row) for row in rows]

    def held(self) -> dict[str, Tenure]:
        """{slice: the tenure it has now}."""
        return {tenure.slice: tenure for tenure in self.tenures() if tenure.until is None}

    def users(self) -> dict[str, list[str]]:
        """{slice: its users, names or uids in decimal, sorted}; without those that have none."""
        found: dict[str, list[str]] = {}
        for name, user in self.members("ORDER BY slice, user"):
            found.setdefault(name, []).append(user)
        return found

    def slices_of(self, called: Iterable[str]) -> list[str]:
        """The slices of a user who is called so: by name, and by uid in decimal."""
        names = tuple(called)
        marks = ", ".join("?" * len(names))
        return sorted({name for name, _ in self.members(f"WHERE user IN ({marks})", names)})

    def members(self, which: str, values: tuple[str, ...] = ()) -> list[Member]:
        """(slice, user), as the SQL behind ``FROM member`` says."""
        if not self._rows("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'member'"):
            return []
        return self._rows(f"SELECT slice, user FROM member {which}", values)  # noqa: S608 (ours)

    def _rows(self, sql: str, values: tuple[object, ...] = ()) -> list[Any]:
        try:
            return self._connection.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise RegistryError(self._path, error) from error

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> "Registry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_readonly(path: Path | str) -> Registry:
    """Open for reading. Raises FileNotFoundError where no registry is yet, RegistryError."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no registry yet: `vnet up` or `vnet slice add` makes it")
    uri = f"{path.resolve().as_uri()}?mode=ro"
    try:
        connection = sqlite3.connect(uri, uri=True, timeout=10, check_same_thread=False)
    except sqlite3.Error as error:
        raise RegistryError(path, error) from error
    return Registry(connection, path)


def _nothing(_found: Assignment) -> None:
    pass


def assign(
    path: Path,
    requests: Iterable[Request],
    now_ns: int,
    rest_ns: int = REST_NS,
    note: Callable[[Assignment], None] = _nothing,
) -> Assignment:
    """Give every slice its number; the registry then holds exactly these, and what ``ended``.

    Its users are then the ones asked for. ``note`` is told what ``take_back``
    needs before it is done; not if nothing changes or will be to ``release``.

    All at once. Raises ConflictError, and changes nothing, when a fixed xid is
    held by another slice or rests; RegistryError.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with _changing(path) as connection:
        wanted, book = list(requests), Registry(connection, path)
        result = plan(book.tenures(), wanted, now_ns, rest_ns)
        asked = sorted({(item.slice, user) for item in wanted for user in item.users})
        result.members = book.members("ORDER BY slice, user"), asked
        if result.opened or result.ended or result.members[0] != asked:
            note(result)
        connection.executemany(
            "INSERT INTO tenure (xid, slice, since) VALUES (?, ?, ?)",
            [(new.xid, new.slice, new.since) for new in result.opened],
        )
        _set_members(connection, *result.members)
    return result


def _set_members(
    connection: sqlite3.Connection, found: list[Member], wanted: Iterable[Member]
) -> None:
    """Nothing is written where nothing changes."""
    if found != wanted:
        connection.execute(_MEMBERS)
        connection.execute("DELETE FROM member")
        connection.executemany("INSERT INTO member VALUES (?, ?)", wanted)


def release(path: Path, tenures: Iterable[Tenure], now_ns: int) -> None:
    """End tenures that ``assign`` reported as ended. Raises RegistryError."""
    with _changing(path) as connection:
        connection.executemany(
            "UPDATE tenure SET until = max(?, since) WHERE xid = ? AND slice = ? AND until IS NULL",
            [(now_ns, tenure.xid, tenure.slice) for tenure in tenures],
        )


def take_back(
    path: Path,
    opened: Iterable[Tenure],
    ended: Iterable[Tenure],
    members: list[Member],
    marked_ns: int | None,
) -> None:
    """Undo an ``assign`` and the ``release`` after it; may be done twice, or before they were.

    ``members``: as they were. ``marked_ns``: until when packets may have had the
    numbers it gave, which then stay known as theirs; None: none ever had.
    Raises RegistryError.
    """
    given = [(one.xid, one.slice, one.since) for one in opened]
    with _changing(path) as connection:
        if marked_ns is None:
            connection.executemany(
                "DELETE FROM tenure WHERE xid = ? AND slice = ? AND since = ?", given
            )
        else:
            connection.executemany(
                "UPDATE tenure SET until = max(?, since)"
                " WHERE xid = ? AND slice = ? AND since = ? AND until IS NULL",
                [(marked_ns, *key) for key in given],
            )
        connection.executemany(
            "UPDATE tenure SET until = NULL WHERE xid = ? AND slice = ? AND since = ?",
            [(one.xid, one.slice, one.since) for one in ended],
        )
        found = Registry(connection, path).members("ORDER BY slice, user")
        _set_members(connection, found, members)


def plan(tenures: list[Tenure], requests: list[Request], now_ns: int, rest_ns: int) -> Assignment:
    """What ``assign`` does, without doing it: tenures so far, in order of time."""
    held = {tenure.xid: tenure for tenure in tenures if tenure.until is None}
    last = {tenure.xid: tenure for tenure in tenures}  # in order of time: the last wins
    result = Assignment()
    taken: set[int] = set()

    def give(request: Request, xid: int) -> None:
        tenure = held.get(xid)
        if tenure is None:
            tenure = Tenure(xid, request.slice, now_ns, None)
            result.opened.append(tenure)
        taken.add(xid)
        result.xids[request.slice] = xid
        result.since[request.slice] = tenure.since

    for request in requests:
        if request.xid is not None:
            _check_fixed(request, held, last, now_ns, rest_ns)
            give(request, request.xid)

    own = {tenure.slice: tenure.xid for tenure in tenures if last[tenure.xid] is tenure}
    # A slice may hold two numbers for a moment (its fixed one was changed and
    # the change was cut short): the newer one is it.
    own |= {tenure.slice: tenure.xid for tenure in tenures if tenure.until is None}
    waiting = []
    for request in requests:
        if request.xid is not None:
            continue
        xid = own.get(request.slice)
        if xid is None or xid in taken:
            waiting.append(request)
        else:
            give(request, xid)
    _give_new(waiting, give, taken, last, now_ns, rest_ns)

    result.ended = [tenure for xid, tenure in held.items() if xid not in taken]
    return result


def _check_fixed(
    request: Request, held: dict[int, Tenure], last: dict[int, Tenure], now_ns: int, rest_ns: int
) -> None:
    xid = request.xid
    assert xid is not None
    asked = f"{request.where}: slice {request.slice}: xid {xid}".removeprefix(": ")
    if (tenure := held.get(xid)) and tenure.slice != request.slice:
        raise ConflictError(
            f"{asked}: slice {tenure.slice} holds it since {moment(tenure.since)}",
            "choose another number, or remove that slice first and let the number rest",
        )
    tenure = last.get(xid)
    if tenure and tenure.slice != request.slice and _rests(tenure, now_ns, rest_ns):
        assert tenure.until is not None
        raise ConflictError(
            f"{asked}: slice {tenure.slice} held it until {moment(tenure.until)}, and it rests "
            f"until {moment(tenure.until + rest_ns)}, so that late packets keep their owner",
            "choose another number, wait, or say `--rest 0` if none of its connections is left",
        )


def _give_new(
    waiting: list[Request],
    give: Callable[[Request, int], None],
    taken: set[int],
    last: dict[int, Tenure],
    now_ns: int,
    rest_ns: int,
) -> None:
    if not waiting:
        return
    never = (xid for xid in range(FIRST, LAST + 1) if xid not in last and xid not in taken)
    rested = (
        xid
        for xid in range(FIRST, LAST + 1)
        if xid in last and xid not in taken and not _rests(last[xid], now_ns, rest_ns)
    )
    for request in waiting:
        xid = next(never, None) or next(rested, None)
        if xid is None:
            raise VnetError(
                f"slice {request.slice}: every xid from {FIRST} to {LAST} is held or rests",
                "remove slices, or say `--rest HOURS` with fewer hours",
            )
        give(request, xid)


def _rests(tenure: Tenure, now_ns: int, rest_ns: int) -> bool:
    return tenure.until is None or tenure.until + rest_ns > now_ns


@contextmanager
def _changing(path: Path) -> Iterator[sqlite3.Connection]:
    """A copy of the registry to change, which becomes the registry if that goes well."""
    try:
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
            if path.exists():
                with closing(sqlite3.connect(path, timeout=10, isolation_level=None)) as file:
                    # Also undoes what a writer of an older version, killed, left half done.
                    file.execute("BEGIN")
                    file.execute("SELECT 1 FROM sqlite_master").fetchone()
                    file.backup(connection)
            connection.executescript(_SCHEMA)
            before = connection.total_changes
            yield connection
            if connection.total_changes != before or not path.exists():
                _publish(path, connection.serialize())
    except RegistryError:
        raise
    except sqlite3.Error as error:
        raise RegistryError(path, error) from error


def _publish(path: Path, content: bytes) -> None:
    draft = path.with_suffix(".new")
    try:
        with draft.open("wb") as out:
            os.fchmod(out.fileno(), 0o644)
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        draft.rename(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise RegistryError(path, error) from error
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def moment(ns: int) -> str:
    """A time for people: UTC, to the second."""
    return datetime.fromtimestamp(ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
