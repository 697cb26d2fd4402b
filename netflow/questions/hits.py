"""``who`` of a few records: found by SQL that is short to plan, judged here.

DuckDB takes several times longer to plan all of netflow.questions.who's SQL
than to answer it. Where nothing is asked but ends and a time, and few records
have them, those are taken as they are stored, and what that SQL does is done
here: sides, names, the shares of one connection as one, what fits best first.
Which way an answer came must not be seen in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from netflow import access, history, names
from netflow.networks import bounds
from netflow.protocols import REASON_OWNER
from netflow.prune import addresses
from netflow.questions.common import Period, checked_port, select
from netflow.wire import Filter, Who

if TYPE_CHECKING:
    import duckdb

FEW = 2000
"""Records; for more of them the SQL is faster."""

_FOREVER = 1 << 62
_MS = 1_000_000
_ICMP = (1, 58)
_ANY = (0, (1 << 128) - 1)
_COLUMNS = ("dst", "ndst", "src", "nsrc")  # files are sorted by dst

_HERE = "SELECT value FROM meta WHERE key = 'node'"
_ONCE_HERE = "SELECT node FROM segments UNION SELECT node FROM files WHERE own"
_TOLD = """
SELECT node, xid, epoch_ns(lag(until, 1, make_timestamp_ns(0))
        OVER (PARTITION BY node, xid ORDER BY since)), epoch_ns(since), epoch_ns(until), slice
FROM told_names WHERE list_contains($1::VARCHAR[], node)
"""

Row = tuple[Any, ...]
Held = tuple[str | None, int | None, int | None]
"""The slice that had an xid, since when and until when (None: still)."""


_Tenures = dict[int, list[tuple[int, int, int, str]]]
"""By xid: after, since, until, slice."""


class _End(NamedTuple):
    """An end of a record, before and after translation, with what it sent and whose it is."""

    address: int
    port: int
    seen: int
    seen_port: int
    packets: int
    bytes: int
    xid: int | None


class _Record(NamedTuple):
    """A record; times in ns."""

    node: str
    flow_start: int
    start: int
    end: int
    flow_id: int | None
    proto: int
    reason: int
    src: _End
    dst: _End


@dataclass(frozen=True)
class _Wanted:
    """Which ends are asked for: in a network, of a port or (None) any."""

    low: int
    high: int
    port: int | None

    def has(self, end: _End, proto: int) -> bool:
        return self._is(end.address, end.port, proto) or self._is(end.seen, end.seen_port, proto)

    def _is(self, address: int, port: int, proto: int) -> bool:
        return self.low <= address <= self.high and (
            self.port is None or (port == self.port and proto not in _ICMP)
        )


@dataclass
class _Flow:
    """Shares of one connection with the same owners, as one: when, and what was sent and got."""

    start: int
    end: int
    sp: int = 0
    sb: int = 0
    gp: int = 0
    gb: int = 0


_Shares = dict[Row, list[tuple[int, int, bool, int | None]]]
"""By connection and side: start, end, whether it goes on with the same owners, our xid."""


def hits(
    con: duckdb.DuckDBPyConnection, ask: Who, known: names.Names, p: Period, scope: access.Scope
) -> list[Row] | None:
    """All rows of an answer as who's SQL gives them; None: this is not for here.

    Raises ValueError, StoreError.
    """
    since, until = ask.filter.since, ask.filter.until
    network, port = (ask.peer, ask.peer_port) if ask.peer else (ask.own, ask.own_port)
    if not network or not scope.all or ask.filter != Filter(since=since, until=until):
        return None
    peer, own = _wanted(ask.peer, ask.peer_port), _wanted(ask.own, ask.own_port)
    found = _found(con, ask.filter, network, port)
    if found is None:
        return None
    owners = _Owners(con, known, p, found)
    flows: dict[Row, _Flow] = {}
    shares: _Shares = defaultdict(list)
    for record in found:
        for side, ours, theirs in (
            ("originator", record.src, record.dst),
            ("responder", record.dst, record.src),
        ):
            if peer.has(theirs, record.proto) and own.has(ours, record.proto):
                _add(flows, shares, record, side, ours, theirs, owners)
    return _ordered(flows, shares, ask.at)


def _wanted(network: str, port: int | None) -> _Wanted:
    if port is not None:
        checked_port(port)
    low, high = bounds(network) if network else _ANY
    return _Wanted(low, high, port)


# -- the records -----------------------------------------------------------------------


def _found(
    con: duckdb.DuckDBPyConnection, asked: Filter, network: str, port: int | None
) -> list[_Record] | None:
    """All records with an end in a network, and perhaps of a port; None: they are not few."""
    among = addresses([network], _COLUMNS)
    if port is not None:
        among = history.Among(
            [
                f"{test} AND ({column[-3]}port = $a_port::USMALLINT"
                f" OR n{column[-3]}port = $a_port::USMALLINT)"
                for test, column in zip(among.tests, _COLUMNS, strict=True)
            ],
            {**among.params, "a_port": port},
        )
    records = history.raw(con, asked.since, asked.until, among)
    if not records.sql:
        return []
    sql = f"SELECT * FROM ({records.sql}) LIMIT {FEW + 1}"  # noqa: S608
    rows = [row for chunk in select(con, sql, records.params) for row in chunk]
    if len(rows) > FEW:
        return None
    low, high = bounds(network)
    return [_record(row) for row in rows if not _is_again(row, low, high, port)]


def _is_again(row: Row, low: int, high: int, port: int | None) -> bool:
    """A test before the row's own gives the same record, too. See history.raw for rows."""
    number = row[0]
    if not number:
        return False
    (_, _, _, _, _, _, src_hi, src_lo, dst_hi, dst_lo, _, _, ndst_hi, ndst_lo,
     sport, dport, nsport, ndport, *_) = row  # fmt: skip
    tests = (
        (dst_hi, dst_lo, dport, ndport),
        (ndst_hi, ndst_lo, dport, ndport),
        (src_hi, src_lo, sport, nsport),
    )
    return any(
        hi is not None and low <= hi << 64 | lo <= high and (port is None or port in ports)
        for hi, lo, *ports in tests[:number]
    )


def _record(row: Row) -> _Record:
    (_, node, unit, end, lasted, age, src_hi, src_lo, dst_hi, dst_lo, nsrc_hi, nsrc_lo,
     ndst_hi, ndst_lo, sport, dport, nsport, ndport, proto, reason, flow_id,
     opackets, obytes, rpackets, rbytes, oxid, rxid) = row  # fmt: skip
    src, dst = src_hi << 64 | src_lo, dst_hi << 64 | dst_lo
    # What translation did not change is NULL in files.
    nsrc = src if nsrc_hi is None else nsrc_hi << 64 | nsrc_lo
    ndst = dst if ndst_hi is None else ndst_hi << 64 | ndst_lo
    nsport = sport if nsport is None else nsport
    ndport = dport if ndport is None else ndport
    start = end - lasted
    return _Record(
        node, (start - age) * unit, start * unit, end * unit, flow_id, proto, reason,
        _End(src, sport, nsrc, nsport, opackets, obytes, oxid),
        _End(dst, dport, ndst, ndport, rpackets, rbytes, rxid),
    )  # fmt: skip


# -- whose they are --------------------------------------------------------------------


class _Owners:
    """Who held the xids of some records: the tenures of netflow.names.CTE, as its join() does."""

    def __init__(
        self,
        con: duckdb.DuckDBPyConnection,
        known: names.Names,
        p: Period,
        records: list[_Record],
    ) -> None:
        xids = {end.xid for record in records for end in (record.src, record.dst)}
        columns = names.tenures(known, p.as_of)
        keys = ("t_xid", "t_after", "t_since", "t_until", "t_slice")
        rows = zip(*(columns[key] for key in keys), strict=True)
        self.registry = _by_xid(row for row in rows if row[0] in xids)
        self.told = _told(con, {record.node for record in records})

    def of(self, record: _Record, xid: int | None) -> list[Held]:
        """As a rule one, (None, None, None) where nobody is known."""
        if not xid:
            return _NOBODY
        held = self.told.get(record.node, self.registry).get(xid, ())
        return [
            (name, since, None if until == _FOREVER else until)
            for after, since, until, name in held
            if after <= record.start < until and since <= record.end
        ] or _NOBODY


_NOBODY: list[Held] = [(None, None, None)]


def _by_xid(rows: Iterable[tuple[int, int, int, int, str]]) -> _Tenures:
    made: _Tenures = defaultdict(list)
    for xid, after, since, until, name in rows:
        made[xid].append((after, since, until, name))
    return made


def _told(con: duckdb.DuckDBPyConnection, nodes: set[str]) -> dict[str, _Tenures]:
    """By node, the tenures that came with the files of nodes that are not this one."""
    here = {node for (node,) in con.execute(_HERE).fetchall()}
    if nodes <= here:
        return {}
    here |= {node for (node,) in con.execute(_ONCE_HERE).fetchall()}
    others = sorted(nodes - here)
    made: dict[str, list[Any]] = {node: [] for node in others}
    for node, *tenure in con.execute(_TOLD, [others]).fetchall():
        made[node].append(tenure)
    return {node: _by_xid(rows) for node, rows in made.items()}


# -- rows ------------------------------------------------------------------------------


def _add(
    flows: dict[Row, _Flow],
    shares: _Shares,
    record: _Record,
    side: str,
    ours: _End,
    theirs: _End,
    owners: _Owners,
) -> None:
    """Add a record, seen from one of its sides, to the flow that it is a share of."""
    for name, since, until in owners.of(record, ours.xid):
        for peer_name, _, _ in owners.of(record, theirs.xid):
            key = (
                side, record.node, record.flow_start, record.flow_id, record.proto,
                *ours[:4], *theirs[:4], ours.xid, name, since, until, theirs.xid, peer_name,
            )  # fmt: skip
            flow = flows.get(key)
            if flow is None:
                flow = flows[key] = _Flow(record.start, record.end)
            flow.start, flow.end = min(flow.start, record.start), max(flow.end, record.end)
            flow.sp, flow.sb = flow.sp + ours.packets, flow.sb + ours.bytes
            flow.gp, flow.gb = flow.gp + theirs.packets, flow.gb + theirs.bytes
            shares[_connection(key)].append(
                (record.start, record.end, record.reason != REASON_OWNER, ours.xid)
            )


def _changed(shares: list[tuple[int, int, bool, int | None]]) -> bool:
    """Whether our side had several owners, or the share after one that was handed on is not known.

    Times of files are whole milliseconds.
    """
    shares.sort(key=lambda share: share[:3])
    nexts = [start for start, *_ in shares[1:]]
    return len({xid for *_, xid in shares}) > 1 or any(
        not kept and (after is None or after > end + _MS)
        for (_, end, kept, _), after in zip(shares, [*nexts, None], strict=True)
    )


def _ordered(flows: dict[Row, _Flow], shares: _Shares, at: int | None) -> list[Row]:
    """The rows of netflow.questions.who's SQL, in its order."""
    changed = {one for one, its in shares.items() if _changed(its)}
    made = []
    for key, flow in flows.items():
        side, node, flow_start, _, proto, *ends, xid, name, since, until, peer_xid, peer = key
        other = _connection(key) in changed
        away = 0 if at is None else max(0, flow.start - at, at - flow.end)
        row = (
            name, xid, other, flow.sp > 0, since, until, node, side, flow.start, flow.end,
            flow_start, proto, *ends, flow.sp, flow.sb, flow.gp, flow.gb, peer, peer_xid, away,
        )  # fmt: skip
        best = (away, not xid, other, not flow.sp, -flow.sb - flow.gb, -flow.end, ends[1])
        made.append((best, row))
    made.sort(key=lambda pair: pair[0])
    return [row for _, row in made]


def _connection(key: Row) -> Row:
    """What the shares of a connection have in common, whoever owned it."""
    return key[:7] + key[9:11]
