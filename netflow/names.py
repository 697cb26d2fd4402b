"""Who held an xid when, from the registry; xids without a name keep their number."""

from __future__ import annotations

import logging
import sqlite3
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vnet.registry import open_readonly

from netflow.when import SECOND

NODE, OTHER = "(node)", "(other)"  # where metrics name slices: no slice's name has a (
MAX_NAMED = 1000
"""Slices that metrics name; all others are OTHER."""

_FOREVER = 1 << 62
_log = logging.getLogger("netflow")

# Each record matches at most one tenure of an xid: the earliest that had not
# ended when the record began, if it had begun when the record ended. "after"
# is the end of the one before it.
#
# The registry is of this node, under all names that it has had; what it says of
# others' xids is nothing. Theirs came with their files.
CTE = """
here AS (SELECT value AS node FROM meta WHERE key = 'node'
    UNION SELECT node FROM segments UNION SELECT node FROM files WHERE own),
registry AS (
    SELECT unnest($t_xid::USMALLINT[]) AS xid, unnest($t_slice::VARCHAR[]) AS slice,
        make_timestamp_ns(unnest($t_after::BIGINT[])) AS "after",
        make_timestamp_ns(unnest($t_since::BIGINT[])) AS since,
        make_timestamp_ns(unnest($t_until::BIGINT[])) AS until),
tenure AS MATERIALIZED (
    SELECT node, xid, slice, "after", since, until FROM registry, here
    UNION ALL
    SELECT node, xid, slice, lag(until, 1, make_timestamp_ns(0))
        OVER (PARTITION BY node, xid ORDER BY since), since, until
    FROM told_names WHERE node NOT IN (SELECT node FROM here))
"""


def join(side: str, alias: str) -> str:
    """SQL that joins to records f the tenure of one side's xid ("o" or "r") under an alias."""
    return (
        f"LEFT JOIN tenure {alias} ON {alias}.xid = {side}xid AND {alias}.node = f.node "
        f"AND {alias}.until > start_time "
        f'AND {alias}."after" <= start_time AND {alias}.since <= end_time'
    )


@dataclass
class Names:
    """The registry's tenures, read again when its file changes."""

    registry: Path
    params: dict[str, list[Any]] = field(default_factory=dict)
    seen: tuple[int, int] | None = None
    failed: tuple[int, int] | None = None  #: that of which it was said that it cannot be read


def tenures(names: Names, now: int) -> dict[str, list[Any]]:
    """The parameters of CTE. A registry that is missing or broken names nothing.

    It may appear later: it is looked at for each question.
    """
    found = changed(names.registry)
    if names.seen != found or not names.params:
        params = _read(names.registry, quietly=names.failed == found)
        names.params = params or params_of([])
        # File times tick in milliseconds: a change right after this one might
        # leave the same time behind, so a fresh file is not trusted yet. And what
        # failed may succeed: there may have been no descriptor left.
        names.seen = found if params and now - found[0] > 2 * SECOND else None
        names.failed = None if params else found
    return names.params


def changed(registry: Path) -> tuple[int, int]:
    """When a file was written (ns) and its size: to see whether it is still the same."""
    try:
        stat = registry.stat()
    except OSError:
        return 0, -1
    return stat.st_mtime_ns, stat.st_size


def _read(registry: Path, quietly: bool) -> dict[str, list[Any]]:
    """As ``params_of``; empty if it cannot be read, which is said unless it was before."""
    try:
        with open_readonly(registry) as opened:
            return params_of([(t.xid, t.slice, t.since, t.until) for t in opened.tenures()])
    except FileNotFoundError:
        return params_of([])
    except (OSError, sqlite3.Error) as error:
        if not quietly:
            _log.warning("cannot read names from %s", error)
        return {}


def held_by(
    registry: Path, xids: set[int], since: int, until: int
) -> list[tuple[int, str, int, int | None]]:
    """Tenures (xid, slice, since, until) of some xids that touch a period."""
    try:
        with open_readonly(registry) as opened:
            return [
                (t.xid, t.slice, t.since, t.until)
                for t in opened.tenures()
                if t.xid in xids and t.since <= until and (t.until is None or t.until >= since)
            ]
    except (OSError, sqlite3.Error):
        return []


def params_of(rows: list[tuple[int, str, int, int | None]]) -> dict[str, list[Any]]:
    """CTE's parameters from (xid, slice, since, until) rows, times in ns."""
    last: defaultdict[int, int] = defaultdict(int)
    params: dict[str, list[Any]] = {
        key: [] for key in ("t_xid", "t_slice", "t_after", "t_since", "t_until")
    }
    for xid, slice_name, since, until in sorted(rows, key=lambda row: (row[0], row[2])):
        end = _FOREVER if until is None else until
        for key, value in zip(params, (xid, slice_name, last[xid], since, end), strict=True):
            params[key].append(value)
        last[xid] = end
    return params
