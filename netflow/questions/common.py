"""What all questions have in common: their period, their records, numbers as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_ntop
from typing import TYPE_CHECKING, Any

from netflow import access, history, names, store
from netflow.filters import implied, where
from netflow.prune import among
from netflow.when import SECOND
from netflow.wire import Filter, Gap, Header

if TYPE_CHECKING:
    import duckdb

_STEP = 1000
_OF_TENURES = re.compile(r"\b[or]\.(slice|since|until)\b")
_PARAMETER = re.compile(r"\$(\w+)")


@dataclass(frozen=True)
class Period:
    """What a question is about, and how far the collector has come (ns UTC)."""

    since: int
    until: int
    as_of: int
    gaps: list[Gap]


Put = Callable[[Any], None]


def period(
    con: duckdb.DuckDBPyConnection,
    asked: Filter,
    now: int,
    as_of: int,
    missing: Sequence[Gap] = (),
) -> Period:
    """The period asked for, with the gaps that touch it; it ends at the time of asking at last.

    missing: gaps of now, that the store does not tell of.
    """
    until = now if asked.until is None else min(asked.until, now)
    since = asked.since
    if since is None:
        # All there is: that collecting began some time is no gap in it.
        since = history.first(con)
    gaps = history.gaps(con, since, until, now, implied(asked).nodes or None)
    gaps += [gap for gap in missing if gap.since <= until and gap.until >= since]
    return Period(since, until, as_of, gaps)


@dataclass(frozen=True)
class Chosen:
    """The records a question is about: ``WITH {names.CTE} SELECT ... {sql}``.

    sql is FROM and WHERE: records f with the tenures o and r of its sides.
    """

    sql: str
    params: dict[str, Any]


def chosen(
    con: duckdb.DuckDBPyConnection,
    asked: Filter,
    known: names.Names,
    p: Period,
    scope: access.Scope,
    also: str = "",
    few: history.Among | None = None,
    uses: str | None = None,
) -> Chosen:
    """The records that match, of those that the scope has; also is one more condition, our own.

    few: what the caller knows of all that it wants; else the filter says it.
    uses: the caller's SQL; if nothing in it asks for names they are not looked
    up, which takes longer than all the rest of a sum.
    All questions get theirs here, so that no one sees more than he may. Raises
    ValueError for a filter that cannot be meant.
    """
    condition, params = where(asked)
    tenures = names.tenures(known, p.as_of)
    asked = implied(asked)
    few = few or among(asked, con, tenures)
    found = history.source(con, asked.since, asked.until, asked.nodes or None, few)
    seen = access.view(scope, found.sql, tenures)
    terms = " AND ".join(f"({term})" for term in (condition, seen.condition, also) if term)
    joins = f"{names.join('o', 'o')} {names.join('r', 'r')}"
    if uses is not None and not _OF_TENURES.search(f"{uses} {terms}"):
        joins = ""
    sql = f"FROM ({seen.records}) f {joins} WHERE {terms}"
    return Chosen(sql, {**params, **found.params, **seen.params})


def select(
    con: duckdb.DuckDBPyConnection, sql: str, params: dict[str, Any]
) -> Iterator[list[tuple[Any, ...]]]:
    """Rows in chunks. Parameters that the text does not name are left out, as DuckDB wants it."""
    named = set(_PARAMETER.findall(sql))
    return store.select(con, sql, {k: v for k, v in params.items() if k in named}, _STEP)


# -- sides ---------------------------------------------------------------------------


def sides(asked: Filter, params: dict[str, Any]) -> tuple[str, str]:
    """When the originator's side, and when the responder's, is one that the question is about.

    A slice's side; that of the slices asked for, if they are named; and the
    originator's where no slice is on either. Adds to params.
    """
    asked = implied(asked)
    if asked.slices or asked.xids:
        params |= {"side_slices": asked.slices, "side_xids": asked.xids}
        its = (
            "coalesce(list_contains($side_slices::VARCHAR[], {0}.slice)"
            " OR list_contains($side_xids::USMALLINT[], {0}xid), false)"
        )
        no = "false"
        return (
            no if asked.side == "responder" else its.format("o"),
            no if asked.side == "originator" else its.format("r"),
        )
    return "(coalesce(oxid, 0) <> 0 OR coalesce(rxid, 0) = 0)", "(coalesce(rxid, 0) <> 0)"


def time_of(column: str) -> str:
    """A time of a tenure or record in ns; NULL for one that has not come."""
    return f"nullif(epoch_ns({column}), {1 << 62})"


def header(columns: list[str], p: Period) -> Header:
    """The first line of an answer."""
    return Header(columns=columns, since=p.since, until=p.until, as_of=p.as_of, gaps=p.gaps)


def checked_limit(limit: int) -> int:
    """Raises ValueError for one that cannot be."""
    if not 0 <= limit <= 1 << 40:
        raise ValueError("a limit is 0 (none) or more")
    return limit


MOST = 100_000
"""Rows of an answer that is put together in memory: some 50 MB."""


def bounded(limit: int) -> int:
    """How many rows there are at most in such an answer, where 0 asks for all of them."""
    return min(checked_limit(limit) or MOST, MOST)


def checked_port(port: int) -> int:
    """Raises ValueError for one that cannot be."""
    if not 0 <= port <= 65535:
        raise ValueError(f"{port} is not a port: 0 to 65535")
    return port


@lru_cache(16384)
def address(number: int) -> str:
    """An address as text; ::ffff:a.b.c.d is written as IPv4."""
    if number >> 32 == 0xFFFF:
        return inet_ntop(AF_INET, (number & 0xFFFFFFFF).to_bytes(4, "big"))
    return inet_ntop(AF_INET6, number.to_bytes(16, "big"))


_STEPS = [60, 300, 600, 3600, 6 * 3600, 86400]
_MAX_STEPS = 100_000


def step_of(asked: int, p: Period) -> int:
    """The step asked for (ns), or with 0 one that cuts the period into at most about 200.

    Raises ValueError for one that would give too many.
    """
    span = max(1, p.until - p.since)
    if asked == 0:
        steps = [step * SECOND for step in _STEPS]
        return next((step for step in steps if span <= 200 * step), steps[-1])
    if asked < SECOND or span // asked > _MAX_STEPS:
        raise ValueError(f"a step is at least 1s, and a period at most {_MAX_STEPS} of them")
    return asked
