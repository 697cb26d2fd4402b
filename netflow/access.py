"""Who may ask what: root and a group all, a slice's own users about its own flows only.

The kernel says who a peer is (SO_PEERCRED, SO_PEERGROUPS), and vnet's registry
who a slice's users are, by name or uid, now. What somebody may see is a Scope;
view() turns records and names into what is in it, before any condition of
his is applied: a condition on what he may not see would tell it.
"""

from __future__ import annotations

import grp
import os
import pwd
import socket
import sqlite3
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vnet.registry import open_readonly

from netflow.protocols import REASON_ACTIVE, REASON_OWNER

_SO_PEERGROUPS = 59  # asm-generic/socket.h; Linux 4.13


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a socket, as of when it connected."""

    uid: int
    gid: int
    groups: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Scope:
    """What somebody may see: this node's flows of some slices; of None: everything there is."""

    slices: frozenset[str] | None = None

    @property
    def all(self) -> bool:
        return self.slices is None


ALL = Scope()


class Denied(Exception):
    """Somebody may not ask this; the message says who may."""


def peer(client: socket.socket) -> Peer:
    """Who connected a unix socket. More groups than Python can take count as none."""
    size = struct.calcsize("iII")
    raw = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, uid, gid = struct.unpack("iII", raw)
    try:
        raw = client.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
    except OSError:
        raw = b""
    return Peer(uid, gid, frozenset(struct.unpack(f"{len(raw) // 4}I", raw)))


def trusted(who: Peer) -> bool:
    """Root or this process's own user: they may do all, and ask for others."""
    return who.uid in (0, os.geteuid())


def reads_all(who: Peer, group: int | None) -> bool:
    """It is trusted, or in the group that may ask."""
    return trusted(who) or (group is not None and (who.gid == group or group in who.groups))


def allowed(who: Peer, group: int | None, registry: Path) -> Scope:
    """What a peer may see. Raises Denied."""
    if reads_all(who, group):
        return ALL
    if slices := slices_of(who.uid, registry):
        return Scope(slices)
    others = "" if group is None else f", members of group {_group_name(group)}"
    more = " (netflow collect --group NAME lets a group ask)" if group is None else ""
    raise Denied(
        f"uid {who.uid} may not ask: root{others} and a slice's users may (`users` in its "
        f"file){more}"
    )


def slices_of(uid: int, registry: Path) -> frozenset[str]:
    """The slices whose user this is, by the registry as it is now; none without a registry."""
    called = {str(uid)}
    with suppress(KeyError):
        called.add(pwd.getpwuid(uid).pw_name)
    try:
        with open_readonly(registry) as opened:
            return frozenset(opened.slices_of(called))
    except (OSError, sqlite3.Error):
        return frozenset()


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


# -- what is in a scope, in SQL ----------------------------------------------------------


@dataclass(frozen=True)
class View:
    """Records and names as somebody may see them.

    records is a relation to be named f, params are of it and of netflow.names'
    CTE, condition is for WHERE, once the tenures o and r are joined.
    """

    records: str
    params: dict[str, Any]
    condition: str = "true"


def view(scope: Scope, records: str, tenures: dict[str, list[Any]]) -> View:
    """Leave out of a relation (netflow.history.source) and the tenures what a scope has not.

    Of a flow between a slice of the scope and another one, that one's xid is
    NULL and its name unknown, so that no condition can find it out, and a share
    that another owner follows ends as one that goes on: the change may be the
    other one's. Other nodes' slices are others', whatever their names.
    """
    if scope.slices is None:
        return View(records, tenures)
    keep = [name in scope.slices for name in tenures["t_slice"]]
    own = {
        key: [value for value, kept in zip(column, keep, strict=True) if kept]
        for key, column in tenures.items()
    }
    known = {side: f"list_contains($scope_xids::USMALLINT[], {side}xid)" for side in "or"}
    params: dict[str, Any] = {**own, "scope_xids": sorted(set(own["t_xid"]))}
    for at, held in enumerate(zip(*own.values(), strict=True)):
        params |= {
            f"scope_{key}_{at}": value
            for key, value in zip(own, held, strict=True)
            if key in _TIMES
        }
    his = {s: _held(own, s) for s in "or"}
    masks = ", ".join(f"CASE WHEN {his[s]} THEN {s}xid END AS {s}xid" for s in "or")
    # Which side's owner changed, a share does not say.
    masks += (
        f", CASE WHEN reason = {REASON_OWNER} AND NOT (({his['o']}) AND ({his['r']}))"
        f" THEN {REASON_ACTIVE}::UTINYINT ELSE reason END AS reason"
    )
    sql = (
        f"SELECT * REPLACE ({masks}) FROM ({records}) "  # noqa: S608
        f"WHERE ({known['o']} OR {known['r']}) AND node IN (SELECT node FROM here)"
    )
    return View(sql, params, "(o.slice IS NOT NULL OR r.slice IS NOT NULL)")


_TIMES = ("t_after", "t_since", "t_until")


def _held(own: dict[str, list[Any]], side: str) -> str:
    """SQL: a slice of the scope held the side's xid at the record's time; see netflow.names.join.

    Somebody else may have held the same xid at another time. Written out, since
    a user has few slices, and DuckDB would sort all records for a subquery.
    """
    tests = [
        f"({side}xid = {xid:d}"
        f" AND start_time < make_timestamp_ns($scope_t_until_{at}::BIGINT)"
        f" AND start_time >= make_timestamp_ns($scope_t_after_{at}::BIGINT)"
        f" AND end_time >= make_timestamp_ns($scope_t_since_{at}::BIGINT))"
        for at, xid in enumerate(own["t_xid"])
    ]
    return " OR ".join(tests) or "false"
