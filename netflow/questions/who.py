"""Which of ours had to do with a peer at a time: the abuse desk's question."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from netflow import access, names
from netflow.networks import bounds
from netflow.protocols import ICMP, ICMPV6, REASON_OWNER
from netflow.prune import addresses
from netflow.questions import local
from netflow.questions.common import (
    Period,
    Put,
    address,
    bounded,
    checked_port,
    chosen,
    header,
    select,
    time_of,
)
from netflow.questions.hits import hits
from netflow.when import iso
from netflow.wire import Trailer, Who

if TYPE_CHECKING:
    import duckdb

WHO_COLUMNS = [
    "slice", "xid", "confidence", "why", "since", "until", "node", "side", "start", "end",
    "flow_start", "proto", "own", "own_port", "own_seen", "own_seen_port",
    "peer", "peer_port", "peer_seen", "peer_seen_port", "sent_packets", "sent_bytes",
    "got_packets", "got_bytes", "peer_slice", "peer_xid", "away",
    "icmp_type", "icmp_code", "icmp_id",
]  # fmt: skip
"""since, until: when the slice held the xid. own, peer: as our side wrote or read them;
own_seen, peer_seen: after translation, as the network saw them, where that is different.
away: ns from the time asked for to the flow, 0 within it. icmp_*: of the request; no ports then."""

_SIDE, _PROTO = WHO_COLUMNS.index("side"), WHO_COLUMNS.index("proto")
_PORTS = [WHO_COLUMNS.index(f"{end}_port") for end in ("own", "peer", "own_seen", "peer_seen")]

_SOCKET = "sent by its sockets: they marked the connection"
_CONNECTION = "known by the connection's mark only: this side sent nothing in this time"
_CHANGED = "the connection changed its owner in this time: near the change it may be the other's"
_UNNAMED = "the registry knows nobody who held this xid then"
_WHY = {
    "before-slices": "no slice was registered on this node yet",
    "other-node": "the node itself, or passing through: that node's addresses are not known here",
    "node": "the node itself: root, the kernel, or whatever is in no slice",
    "forwarded": "passing through: none of its addresses is this node's now",
}

_ONE = "side, node, flow_start, flow_id, proto, own, own_port, peer, peer_port"
# Shares of one connection under the same owner become one row. A record in
# which peer and own changed places by translation must not be there twice.
# One is handed on if its next share has another owner or is not known; else
# the change was the other side's. Times of files are whole milliseconds.
_SQL = f"""
WITH {names.CTE},
hit AS MATERIALIZED (
    SELECT f.*, o.slice AS oslice, o.since AS osince, o.until AS ountil,
        r.slice AS rslice, r.since AS rsince, r.until AS runtil
    {{records}}),
shares AS ({{found}}),
found AS (
    SELECT *, reason = {REASON_OWNER} AND coalesce(lead(start_time) OVER next
        > end_time + INTERVAL 1 MILLISECOND, true) AS handed
    FROM shares
    WINDOW next AS (PARTITION BY {_ONE} ORDER BY start_time, end_time, reason <> {REASON_OWNER})),
flow AS (
    SELECT side, node, flow_start, flow_id, proto, own, own_port, own_seen, own_seen_port,
        peer, peer_port, peer_seen, peer_seen_port, xid, slice, since, until,
        peer_xid, peer_slice, min(start_time) AS start_time, max(end_time) AS end_time,
        sum(sp)::UBIGINT AS sp, sum(sb)::UBIGINT AS sb, sum(gp)::UBIGINT AS gp,
        sum(gb)::UBIGINT AS gb, bool_or(handed) AS handed
    FROM found GROUP BY ALL),
told AS (
    SELECT *, bool_or(handed) OVER one OR min(xid) OVER one <> max(xid) OVER one AS changed,
        CASE WHEN $at::BIGINT IS NULL THEN 0
            ELSE greatest(0, epoch_ns(start_time) - $at, $at - epoch_ns(end_time)) END AS away
    FROM flow
    WINDOW one AS (PARTITION BY {_ONE}))
SELECT slice, xid, changed, sp > 0,
    epoch_ns(since), {time_of("until")}, node, side, epoch_ns(start_time), epoch_ns(end_time),
    epoch_ns(flow_start), proto, own, own_port, own_seen, own_seen_port,
    peer, peer_port, peer_seen, peer_seen_port, sp, sb, gp, gb, peer_slice, peer_xid, away
FROM told
ORDER BY away, coalesce(xid, 0) = 0, changed, sp = 0, sb + gb DESC, end_time DESC, own_port
LIMIT $limit
"""  # noqa: S608


def _side(originator: str, responder: str) -> str:
    return f"CASE WHEN side = 'originator' THEN {originator} ELSE {responder} END"


_OWN, _PEER = _side("src", "dst"), _side("dst", "src")
_FOUND = f"""
SELECT side, node, flow_start, flow_id, proto,
    {_OWN} AS own, {_side("sport", "dport")} AS own_port,
    {_side("nsrc", "ndst")} AS own_seen,
    {_side("coalesce(nsport, sport)", "coalesce(ndport, dport)")} AS own_seen_port,
    {_PEER} AS peer, {_side("dport", "sport")} AS peer_port,
    {_side("ndst", "nsrc")} AS peer_seen,
    {_side("coalesce(ndport, dport)", "coalesce(nsport, sport)")} AS peer_seen_port,
    {_side("oxid", "rxid")} AS xid, {_side("oslice", "rslice")} AS slice,
    {_side("osince", "rsince")} AS since, {_side("ountil", "runtil")} AS until,
    {_side("rxid", "oxid")} AS peer_xid, {_side("rslice", "oslice")} AS peer_slice,
    start_time, end_time, reason,
    {_side("opackets", "rpackets")} AS sp, {_side("obytes", "rbytes")} AS sb,
    {_side("rpackets", "opackets")} AS gp, {_side("rbytes", "obytes")} AS gb
FROM (SELECT 'originator' AS side, * FROM hit WHERE {{originator}}
    UNION ALL SELECT 'responder', * FROM hit WHERE {{responder}})
"""  # noqa: S608

# side of ours: its address and port in the record, the peer's.
_SIDES = (("originator", "src", "dst"), ("responder", "dst", "src"))


def who(
    con: duckdb.DuckDBPyConnection,
    ask: Who,
    known: names.Names,
    p: Period,
    scope: access.Scope,
    put: Put,
) -> None:
    """Answer with connections of ours with the peer, the one that fits best first.

    Nearest to the time asked for, then attributed before not, then by how sure
    the owner is, then by bytes. Raises ValueError, StoreError.
    """
    limit = bounded(ask.limit)
    rows = _find(con, ask, known, p, scope, limit + 1)
    more = len(rows) > limit
    rows = rows[:limit]
    notes = [] if rows else _hints(con, ask, known, p, scope)
    put(header(WHO_COLUMNS, p))
    place = _places(con, known, p) if any(not row[1] for row in rows) else lambda row: ""
    for row in rows:
        put(_told(row, place(row)))
    put(Trailer(rows=len(rows), more=more, notes=notes))


def _places(
    con: duckdb.DuckDBPyConnection, known: names.Names, p: Period
) -> Callable[[tuple[Any, ...]], str]:
    """Says of a row whose owner is nobody what its side is instead: a key of _WHY."""
    first = dict(
        con.execute("SELECT node, epoch_ns(min(since)) FROM told_names GROUP BY node").fetchall()
    )
    here = {
        node
        for (node,) in con.execute(
            "SELECT value FROM meta WHERE key = 'node' UNION SELECT node FROM segments"
            " UNION SELECT node FROM files WHERE own"
        ).fetchall()
    }
    since = min(names.tenures(known, p.as_of)["t_since"], default=None)
    first |= dict.fromkeys(here, since)
    ours = set(local.addresses())

    def place(row: tuple[Any, ...]) -> str:
        told = dict(zip(WHO_COLUMNS, (*row[:2], "", "", *row[4:]), strict=False))
        begun = first.get(told["node"])
        if begun is None or told["end"] < begun:
            return "before-slices"
        if told["node"] not in here:
            return "other-node"
        ends = [told[name] for name in ("own", "peer", "own_seen", "peer_seen")]
        return "node" if any(a in ours or local.is_loopback(a) for a in ends) else "forwarded"

    return place


def _told(row: tuple[Any, ...], place: str) -> tuple[Any, ...]:
    slice_name, xid, changed, sent, *rest = row
    if not xid:
        confidence, why = "none", _WHY.get(place, "not yours") if xid is not None else "not yours"
    elif changed:
        confidence, why = "changed", _CHANGED
    elif sent:
        confidence, why = "socket", _SOCKET
    else:
        confidence, why = "connection", _CONNECTION
    if xid and slice_name is None:
        why += f"; {_UNNAMED}"
    made = [slice_name, xid, confidence, why, *rest]
    icmp: list[int | None] = [None, None, None]
    if made[_PROTO] in (ICMP, ICMPV6):
        # In place of ports its originator has the request's id, its responder type and code.
        ports = [made[at] for at in _PORTS[:2]]
        ident, kind = ports if made[_SIDE] == "originator" else ports[::-1]
        icmp = [kind >> 8, kind & 0xFF, ident]
        for at in _PORTS:
            made[at] = None
    for name in ("own", "own_seen", "peer", "peer_seen"):
        at = WHO_COLUMNS.index(name)
        made[at] = address(made[at])
    for name in ("own", "peer"):
        seen = WHO_COLUMNS.index(f"{name}_seen")
        plain = WHO_COLUMNS.index(name)
        if made[seen : seen + 2] == made[plain : plain + 2]:
            made[seen : seen + 2] = [None, None]
    return (*made, *icmp)


def _find(
    con: duckdb.DuckDBPyConnection,
    ask: Who,
    known: names.Names,
    p: Period,
    scope: access.Scope,
    limit: int,
) -> list[tuple[Any, ...]]:
    if (rows := hits(con, ask, known, p, scope)) is not None:
        return rows[:limit]
    few = addresses([ask.peer], ("dst", "ndst", "src", "nsrc")) if ask.peer else None
    records = chosen(con, ask.filter, known, p, scope, few=few)
    params = {**records.params, "at": ask.at, "limit": limit}
    tests = {}
    for side, own, peer in _SIDES:
        test = _either("peer", peer, ask.peer, ask.peer_port, params)
        if ask.own or ask.own_port is not None:
            test += " AND " + _either("own", own, ask.own, ask.own_port, params)
        tests[side] = test
    sql = _SQL.format(records=records.sql, found=_FOUND.format(**tests))
    return [row for chunk in select(con, sql, params) for row in chunk]


def _either(name: str, column: str, network: str, port: int | None, params: dict[str, Any]) -> str:
    """SQL: an end of a record, before or after translation."""
    ends = [_end(name, of, network, port, params) for of in (column, f"n{column}")]
    return f"(coalesce({ends[0]}, false) OR coalesce({ends[1]}, false))"


def _end(name: str, column: str, network: str, port: int | None, params: dict[str, Any]) -> str:
    """SQL: an end of a record is this address (or in this network) and this port."""
    terms = []
    if network:
        low, high = bounds(network)
        halves = [f"{column}_{half}" for half in ("hi", "lo")]
        if column.startswith("n"):
            # Of an end whose port alone was translated, a file has no other address.
            halves = [f"coalesce({half}, {half[1:]})" for half in halves]
        hi, lo = halves
        if low >> 64 == high >> 64:
            params |= {f"{name}_hi": low >> 64, f"{name}_a": low & _LOW, f"{name}_b": high & _LOW}
            terms.append(
                f"{hi} = ${name}_hi::UBIGINT AND {lo} BETWEEN ${name}_a::UBIGINT"
                f" AND ${name}_b::UBIGINT"
            )
        else:
            params |= {f"{name}_a": low >> 64, f"{name}_b": high >> 64}
            terms.append(f"{hi} BETWEEN ${name}_a::UBIGINT AND ${name}_b::UBIGINT")
    if port is not None:
        params[f"{name}_port"] = checked_port(port)
        its = column[:-2] + "port"
        its = f"coalesce({its}, {its[1:]})" if its.startswith("n") else its
        terms.append(f"{its} = ${name}_port::USMALLINT AND proto NOT IN (1, 58)")
    return f"({' AND '.join(terms) or 'true'})"


_LOW = (1 << 64) - 1


def _hints(
    con: duckdb.DuckDBPyConnection,
    ask: Who,
    known: names.Names,
    p: Period,
    scope: access.Scope,
) -> list[str]:
    """Why there may be nothing."""
    notes = []
    if p.gaps:
        notes.append("a gap touches this time: there may have been one whose record is missing")
    since, until = ask.filter.since, ask.filter.until
    if since is None or until is None or ask.near <= 0:
        return notes
    wider = msgspec.structs.replace(
        ask.filter,
        since=max(0, since - ask.near),
        until=min(until + ask.near, (1 << 63) - 1),
    )
    at = ask.at if ask.at is not None else (since + until) // 2
    near = _find(con, msgspec.structs.replace(ask, filter=wider, at=at), known, p, scope, 1)
    if near:
        *_, away = near[0]
        start, end = near[0][8], near[0][9]
        when = start if start > at else end
        way = "later" if start > at else "earlier"
        minutes = -(-away // (60 * 10**9))
        notes.append(
            f"the nearest one is {away / 1e9:.0f} s {way}, at {iso(when, 0)}: if the clocks "
            f"differ by so much, --skew {minutes}m finds it"
        )
    else:
        hours = ask.near / 3600e9
        notes.append(f"there is none within {hours:g} h either")
    if ask.peer_port is not None or ask.own_port is not None:
        any_port = msgspec.structs.replace(ask, peer_port=None, own_port=None)
        if ask.peer and _find(con, any_port, known, p, scope, 1):
            notes.append("there are flows with this peer at that time on other ports")
    return notes
