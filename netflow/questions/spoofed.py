"""Who sent, or tried to send, as somebody else.

What the guard drops never gets as far as connection tracking, so no record has
it: that is in the guard's log of events. What records have is what got through:
flows that a slice began from an address that is not this node's.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from netflow import access, names
from netflow.filters import implied
from netflow.language import All, And, parse
from netflow.questions import local
from netflow.questions.common import Period, Put, address, bounded, chosen, header, select
from netflow.when import iso, parse_time
from netflow.wire import Filter, Gap, Spoofed, Trailer

if TYPE_CHECKING:
    from collections.abc import Iterator

    import duckdb

SPOOFED_COLUMNS = [
    "what", "refused", "slice", "xid", "src", "owner", "first", "last", "count", "packets",
    "bytes", "dst", "node",
]  # fmt: skip
"""what: the guard's kind of event, or foreign-source (a record's). owner: whose it was.
dst: the last one. count: events with those that were left out, or flows begun."""

KINDS = ("spoof", "mark", "address", "port", "foreign", "connection")
"""The guard's kinds that are about packets, sockets and binds in somebody else's name."""

TOLD_APART = 10_000
"""Sources at most: a full log may have 200,000, which would take 100 MB."""

_SQL = f"""
WITH {names.CTE}, {local.CTE}
SELECT o.slice, oxid, src, f.node, epoch_ns(min(start_time)), epoch_ns(max(end_time)),
    count(*) FILTER (WHERE begins), sum(opackets)::UBIGINT,
    sum(obytes)::UBIGINT, arg_max(dst, end_time)
{{records}} AND oxid <> 0 AND f.node IN (SELECT node FROM here)
    AND NOT {local.is_local("src")} AND NOT {local.is_local("nsrc")}
GROUP BY ALL ORDER BY max(end_time) DESC {{limit}}
"""  # noqa: S608


def spoofed(
    con: duckdb.DuckDBPyConnection,
    ask: Spoofed,
    known: names.Names,
    p: Period,
    scope: access.Scope,
    put: Put,
) -> None:
    """Answer with what the guard saw, by slice, kind and source, and with flows from addresses
    that are not this node's; the newest first. Raises ValueError, StoreError.
    """
    limit = bounded(ask.limit)
    records = chosen(con, ask.filter, known, p, scope)
    sql = _SQL.format(records=records.sql, limit=f"LIMIT {limit + 1}")
    params = {**records.params, **local.params(local.addresses())}
    rows: list[tuple[Any, ...]] = []
    for chunk in select(con, sql, params):
        for name, xid, src, node, first, last, count, packets, size, dst in chunk:
            rows.append(
                ("foreign-source", False, name, xid, address(src), None, first, last, count,
                 packets, size, address(dst), node)
            )  # fmt: skip
    asked = _answered(con, ask.filter)
    notes, unknown = list[str](), list[Gap]()
    if asked:
        log = _Log(known)
        sums = _sums(log, asked, p, scope)
        rows += sums.rows()
        unknown = log.gaps(p)
        if sums.merged:
            notes.append(_MERGED)
    else:
        notes.append(_LEFT_OUT)
    rows.sort(key=lambda row: -row[7])
    shown = rows[:limit]
    told = header(SPOOFED_COLUMNS, p)
    told.gaps = [*told.gaps, *unknown]
    put(told)
    for row in shown:
        put(row)
    put(Trailer(rows=len(shown), more=len(shown) < len(rows), notes=notes))


_MERGED = (
    f"of the guard's events {TOLD_APART:,} sources are told apart, those that came last: rows "
    "without one sum up the others; a shorter time, or one slice, has fewer"
)
_LEFT_OUT = (
    "the guard's events are left out: of all conditions they answer only to times, slice, xid (of "
    "who was refused) and node (this one)"
)


def _answered(con: duckdb.DuckDBPyConnection, given: Filter) -> Filter | None:
    """What is asked, if an event can answer all of it; else None."""
    asked = implied(given)
    tree = parse(given.expression) if given.expression else All()
    parts = tree.parts if isinstance(tree, And) else () if isinstance(tree, All) else (tree,)
    said = [name for name in _OPTIONS if getattr(asked, name) != getattr(given, name)]
    plain = Filter(
        since=asked.since, until=asked.until, expression=asked.expression,
        side="originator" if asked.side == "originator" else "any",
        **{name: getattr(asked, name) for name in _OPTIONS},
    )  # fmt: skip
    [(here,)] = con.execute("SELECT value FROM meta WHERE key = 'node'").fetchall()
    elsewhere = bool(asked.nodes) and here not in asked.nodes
    return None if len(said) < len(parts) or asked != plain or elsewhere else asked


_OPTIONS = ("slices", "xids", "nodes")


_Key = tuple[Any, ...]
_SRC = 4
"""Where the source is in a key: kind, refused, slice, xid, src, owner."""


@dataclass
class _Sum:
    first: int
    last: int
    count: int
    dst: str | None


@dataclass
class _Sums:
    """By key: those with a source, in the order of the last event, and those without.

    merged: some of the latter have had one.
    """

    of_source: OrderedDict[_Key, _Sum] = field(default_factory=OrderedDict)
    others: dict[_Key, _Sum] = field(default_factory=dict)
    merged: bool = False

    def add(self, key: _Key, more: _Sum) -> None:
        src = key[_SRC]
        one = (self.others if src is None else self.of_source).setdefault(key, more)
        if one is not more:
            one.first, one.last = min(one.first, more.first), max(one.last, more.last)
            one.count += more.count
            one.dst = more.dst or one.dst
        if src is not None:
            self.of_source.move_to_end(key)
        if len(self.of_source) > TOLD_APART:
            oldest, sum_ = self.of_source.popitem(last=False)
            self.add((*oldest[:_SRC], None, *oldest[_SRC + 1 :]), sum_)
            self.merged = True

    def rows(self) -> list[tuple[Any, ...]]:
        return [
            (*key, one.first, one.last, one.count, None, None, one.dst, None)
            for sums in (self.of_source, self.others)
            for key, one in sums.items()
        ]


def _sums(log: _Log, asked: Filter, p: Period, scope: access.Scope) -> _Sums:
    """The guard's events of the period."""
    sums = _Sums()
    for event in log.read():
        at = parse_time(event["time"], 0)
        log.begins = at if log.begins is None else log.begins
        if not p.since <= at <= p.until or event.get("kind") not in KINDS:
            continue
        if not _wanted(event, asked, scope):
            continue
        owner = event.get("owner")
        if scope.slices is not None and owner not in scope.slices:
            owner = None
        who = event.get("slice"), event.get("xid")
        key = event["kind"], bool(event.get("refused")), *who, event.get("src"), owner
        sums.add(key, _Sum(at, at, 1 + int(event.get("suppressed") or 0), event.get("dst")))
    return sums


def _wanted(event: dict[str, Any], asked: Filter, scope: access.Scope) -> bool:
    """By slice and xid of the one that was refused."""
    name, xid = event.get("slice"), event.get("xid")
    if scope.slices is not None and name not in scope.slices:
        return False
    return (not asked.slices or name in asked.slices) and (not asked.xids or xid in asked.xids)


@dataclass
class _Log:
    """vnet's log of events, beside its registry. begins: with what, once it was read."""

    names: names.Names
    begins: int | None = None

    def read(self) -> Iterator[dict[str, Any]]:
        """All events there are, oldest first; none where there is no log."""
        from vnet.paths import Paths

        from vnet import eventlog

        if self.names.registry is None:
            return
        paths = Paths(state_dir=self.names.registry.parent)
        yield from eventlog.each(paths, eventlog.Asked())

    def gaps(self, p: Period) -> list[Gap]:
        """What the log, once read, cannot tell of."""
        directory = self.names.registry.parent if self.names.registry else None
        if directory is None or not (directory / "events.jsonl").exists():
            return [Gap(since=p.since, until=p.until, what="no-events",
                        note="vnet watch and vnet events keep the guard's events")]  # fmt: skip
        rotated = (directory / "events.jsonl.1").exists()
        if rotated and self.begins is not None and self.begins > p.since:
            return [Gap(since=p.since, until=min(self.begins, p.until), what="no-events",
                        note=f"the guard's log begins at {iso(self.begins, 0)}")]  # fmt: skip
        return []
