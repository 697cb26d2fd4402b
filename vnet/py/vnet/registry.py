"""Which slice held which xid, and when: the only place where a number gets a name.

One SQLite file, ``registry.db``, with one table. It is written by ``vnet`` and
read by anybody, ``netflow`` first of all, through ``open_readonly``.

A rollback journal and not WAL: a reader of a WAL database must be able to
write beside it (https://www.sqlite.org/wal.html#read_only_databases), which a
sandboxed daemon cannot, and the file is written a few times a day.

Numbers: a slice without a fixed xid keeps the one it has; a slice that comes
back gets its last one if nobody had it since; else the lowest number from
FIRST up that was never used, else the lowest one that has rested. 1..255 are
only given when a file asks for them.
"""

import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

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


@dataclass
class Assignment:
    """What ``assign`` found and did."""

    xids: dict[str, int] = field(default_factory=dict)
    since: dict[str, int] = field(default_factory=dict)
    opened: list[Tenure] = field(default_factory=list)
    #: held by slices that are gone or have another number now: ``release``
    #: them once nothing is marked with them any more
    ended: list[Tenure] = field(default_factory=list)


class Registry:
    """An open registry, for reading. Every method may be called at any time."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def holder(self, xid: int, at_ns: int) -> str | None:
        """The slice that held ``xid`` at that time (ns UTC); None if nobody did."""
        row = self._connection.execute(
            "SELECT slice FROM tenure WHERE xid = ? AND since <= ?"
            " AND (until IS NULL OR until > ?) ORDER BY since DESC LIMIT 1",
            (xid, at_ns, at_ns),
        ).fetchone()
        return row[0] if row else None

    def tenures(self, slice: str | None = None, xid: int | None = None) -> list[Tenure]:
        """Tenures in order of time, of one slice, one xid, both, or all."""
        rows = self._connection.execute(
            "SELECT xid, slice, since, until FROM tenure"
            " WHERE (?1 IS NULL OR slice = ?1) AND (?2 IS NULL OR xid = ?2)"
            " ORDER BY since, xid",
            (slice, xid),
        )
        return [Tenure(*row) for row in rows]

    def held(self) -> dict[str, Tenure]:
        """{slice: the tenure it has now}."""
        return {tenure.slice: tenure for tenure in self.tenures() if tenure.until is None}

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> "Registry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_readonly(path: Path | str) -> Registry:
    """Open for reading. Raises FileNotFoundError where no registry is yet."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no registry yet: `vnet up` or `vnet slice add` makes it")
    uri = f"{path.resolve().as_uri()}?mode=ro"
    return Registry(sqlite3.connect(uri, uri=True, timeout=10, check_same_thread=False))


def assign(
    path: Path, requests: Iterable[Request], now_ns: int, rest_ns: int = REST_NS
) -> Assignment:
    """Give every slice its number; the registry then holds exactly these, and what ``ended``.

    All in one transaction. Raises ConflictError, and changes nothing, when a
    fixed xid is held by another slice or rests.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with closing(_connect(path)) as connection, connection:
        connection.execute("BEGIN IMMEDIATE")
        tenures = Registry(connection).tenures()
        result = plan(tenures, list(requests), now_ns, rest_ns)
        connection.executemany(
            "INSERT INTO tenure (xid, slice, since) VALUES (?, ?, ?)",
            [(new.xid, new.slice, new.since) for new in result.opened],
        )
    return result


def release(path: Path, tenures: Iterable[Tenure], now_ns: int) -> None:
    """End tenures that ``assign`` reported as ended."""
    with closing(_connect(path)) as connection, connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            "UPDATE tenure SET until = max(?, since) WHERE xid = ? AND slice = ? AND until IS NULL",
            [(now_ns, tenure.xid, tenure.slice) for tenure in tenures],
        )


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


def _connect(path: Path) -> sqlite3.Connection:
    try:
        if not path.exists():
            # Made aside, so that no reader ever meets a registry without its table.
            draft = path.with_suffix(".new")
            draft.unlink(missing_ok=True)
            with closing(sqlite3.connect(draft, isolation_level=None)) as connection:
                connection.executescript(_SCHEMA)
            draft.chmod(0o644)
            draft.rename(path)
        return sqlite3.connect(path, timeout=10, isolation_level=None)
    except sqlite3.Error as error:
        raise VnetError(
            f"{path}: {error}", "is it a registry, and is the disk writable?"
        ) from error


def moment(ns: int) -> str:
    """A time for people: UTC, to the second."""
    return datetime.fromtimestamp(ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
