"""Sums, the largest first: by slice, or by peer, port, protocol or node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from netflow import access, names, store
from netflow.networks import bounds
from netflow.questions.common import (
    Chosen,
    Period,
    Put,
    address,
    bounded,
    chosen,
    header,
    select,
    sides,
)
from netflow.wire import Top, Trailer

if TYPE_CHECKING:
    import duckdb

_SUMS = ["out_bytes", "in_bytes", "out_packets", "in_packets", "flows"]
TOP_COLUMNS = {
    "slice": ["slice", "xid", "place", *_SUMS],
    "peer": ["peer", "place", *_SUMS],
    "port": ["proto", "port", "place", *_SUMS],
    "proto": ["proto", "place", *_SUMS],
    "node": ["node", "place", *_SUMS],
}
"""What a row holds. place: inside or outside, where the other end is; None where not asked."""

_MAX_INSIDE = 100


def top(
    con: duckdb.DuckDBPyConnection,
    ask: Top,
    known: names.Names,
    p: Period,
    scope: access.Scope,
    put: Put,
) -> None:
    """Answer with sums, the largest first, and the total. Raises ValueError, StoreError.

    What the side in question sent is "out", whichever side of the connection
    it was on. A flow between two slices counts for both, and once in the total.
    """
    params: dict[str, Any] = {}
    o_place, r_place = _places(ask, params)
    originator, responder = sides(ask.filter, params)
    if ask.only != "all":
        params["only"] = ask.only == "inside"
        originator = f"({originator} AND {o_place} = $only)"
        responder = f"({responder} AND {r_place} = $only)"
    also = "" if ask.only == "all" else f"{originator} OR {responder}"
    uses = f"{originator} {responder} {'o.slice' if ask.of == 'slice' else ''}"
    records = chosen(con, ask.filter, known, p, scope, also, uses=uses)
    records.params.update(params)
    parts = {
        "ended": store.ENDED,
        "cte": names.CTE,
        "records": records.sql,
        "o": originator,
        "r": responder,
        "o_place": o_place,
        "r_place": r_place,
    }
    answer = _by_slice if ask.of == "slice" else _by_key
    rows, total = answer(con, ask, parts, records)
    shown = rows[: bounded(ask.limit)]
    put(header(TOP_COLUMNS[ask.of], p))
    for row in shown:
        put(row)
    put(
        Trailer(
            rows=len(shown),
            more=len(shown) < len(rows),
            total={"bytes": total[0] + total[1], "packets": total[2] + total[3], "flows": total[4]},
        )
    )


def _places(ask: Top, params: dict[str, Any]) -> tuple[str, str]:
    """SQL that says whether the originator's peer is inside, and whether the responder's is."""
    if not ask.inside:
        if ask.only != "all":
            raise ValueError("inside or outside of what? --inside PREFIX says it")
        return "NULL::BOOLEAN", "NULL::BOOLEAN"
    if len(ask.inside) > _MAX_INSIDE:
        raise ValueError(f"{len(ask.inside)} prefixes are inside: at most {_MAX_INSIDE}")
    tests = []
    for n, (low, high) in enumerate(map(bounds, ask.inside)):
        params |= {f"inside_{n}a": low, f"inside_{n}b": high}
        tests.append(f"{{0}} BETWEEN $inside_{n}a::UHUGEINT AND $inside_{n}b::UHUGEINT")
    place = f"({' OR '.join(tests)})"
    return place.format("dst"), place.format("src")


# -- by slice --------------------------------------------------------------------------

# One pass over the records: sums by pair of owners, and over all of them. A
# record that is all of its connection is a flow.
_PAIRS = """
WITH {cte} SELECT grouping(oxid) AS is_total, f.node, coalesce(oxid, 0), o.slice,
    coalesce(rxid, 0), r.slice, {o} AS of_o, {r} AS of_r, {o_place} AS at_o, {r_place} AS at_r,
    epoch_ns(max(end_time)),
    sum(obytes)::UBIGINT, sum(rbytes)::UBIGINT, sum(opackets)::UBIGINT, sum(rpackets)::UBIGINT,
    count(*) FILTER (WHERE begins AND reason IN {ended})
{records}
GROUP BY GROUPING SETS ((f.node, oxid, o.slice, rxid, r.slice, of_o, of_r, at_o, at_r), ())
"""
# The others, a few, must be told apart. (In one query with the sums, DuckDB
# would keep all records in memory.)
_FLOW = "hash(f.node, flow_start, flow_id, src_lo, sport, dst_lo, dport)"
_PAIRS_SHARES = f"""
WITH {{cte}}, share AS MATERIALIZED (
    SELECT DISTINCT f.node, coalesce(oxid, 0) AS oxid, o.slice AS oslice,
        coalesce(rxid, 0) AS rxid, r.slice AS rslice,
        {{o}} AS of_o, {{r}} AS of_r, {{o_place}} AS at_o, {{r_place}} AS at_r, {_FLOW} AS flow
    {{records}} AND (NOT begins OR reason NOT IN {{ended}}))
SELECT 0, node, oxid, oslice, rxid, rslice, of_o, of_r, at_o, at_r, 0, 0, 0, 0, 0, count(*)
FROM share GROUP BY ALL
UNION ALL
SELECT 1, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, 0, 0, 0,
    count(DISTINCT flow) FROM share
"""  # noqa: S608

_Key = tuple[str | None, int, str, bool | None]
_PLACE = {None: None, True: "inside", False: "outside"}


def _by_slice(
    con: duckdb.DuckDBPyConnection, ask: Top, parts: dict[str, str], records: Chosen
) -> tuple[list[tuple[Any, ...]], list[int]]:
    """Flows that no slice owns an end of are the row of xid 0; there, "out" is what the
    originator sent. A slice is one row on all nodes; an xid without a name is one for each node.
    """
    sums: defaultdict[_Key, list[int]] = defaultdict(lambda: [0] * 6)
    total = [0] * 5
    for sql in (_PAIRS, _PAIRS_SHARES):
        for chunk in select(con, sql.format(**parts), records.params):
            for is_total, node, oxid, oslice, rxid, rslice, of_o, of_r, at_o, at_r, *rest in chunk:
                last, *counts = rest
                if is_total:
                    total = [a + (b or 0) for a, b in zip(total, counts, strict=True)]
                    continue
                owners = []
                if of_o:
                    owners.append((oxid, oslice, at_o, False))
                if of_r:
                    owners.append((rxid, rslice, at_r, True))
                _add(sums, node, owners, last, counts)
    rows: list[tuple[Any, ...]] = [
        (name, last_xid & 0xFFFF, _PLACE[place], *counts)
        for (name, _, _, place), (*counts, last_xid) in sums.items()
    ]
    keys: dict[str, Callable[[Any], int]] = {
        "bytes": lambda row: row[3] + row[4],
        "packets": lambda row: row[5] + row[6],
        "flows": lambda row: row[7],
    }
    # Of equal ones, always the same first.
    rows.sort(key=lambda row: (-keys[ask.by](row), row[0] or "", row[1], row[2] or ""))
    return rows, total


def _add(
    sums: defaultdict[_Key, list[int]],
    node: str,
    owners: list[tuple[int, str | None, bool | None, bool]],
    last: int,
    counts: list[int],
) -> None:
    """Add a pair of owners' counts (bytes, packets both ways, flows) to the rows of its slices."""
    ob, rb, op, rp, flows = counts
    seen: list[_Key] = []
    for xid, name, place, back in owners:
        # One name is one row, whichever xids it has held.
        key = name, 0 if name else xid, "" if name or not xid else node, place
        row = sums[key]
        for i, n in enumerate((rb, ob, rp, op) if back else (ob, rb, op, rp)):
            row[i] += n
        row[4] += 0 if key in seen else flows
        row[5] = max(row[5], last << 16 | xid)
        seen.append(key)


# -- by anything else ------------------------------------------------------------------

_SUMMED = """
SELECT k1, k2, place, sum(ob)::UBIGINT AS ob, sum(ib)::UBIGINT AS ib, sum(op)::UBIGINT AS op,
    sum(ip)::UBIGINT AS ip, count(*) FILTER (WHERE flow IS NULL) AS flows
FROM ({sides}) GROUP BY ALL
"""
_SHARED = """
SELECT k1, k2, place, 0 AS ob, 0 AS ib, 0 AS op, 0 AS ip, count(*) AS flows
FROM (SELECT DISTINCT k1, k2, place, flow FROM ({sides}) WHERE flow IS NOT NULL {only})
GROUP BY ALL
"""
_SIDE = f"""
SELECT {{k1}} AS k1, {{k2}} AS k2, {{place}} AS place,
    {{a}}bytes AS ob, {{b}}bytes AS ib, {{a}}packets AS op, {{b}}packets AS ip,
    CASE WHEN NOT begins OR reason NOT IN {{ended}} THEN {_FLOW} END AS flow
{{records}} AND {{side}}
"""
_TOTAL = f"""
WITH {{cte}} SELECT sum(obytes)::UBIGINT, sum(rbytes)::UBIGINT, sum(opackets)::UBIGINT,
    sum(rpackets)::UBIGINT, count(*) FILTER (WHERE begins AND reason IN {{ended}})
{{records}}
UNION ALL SELECT 0, 0, 0, 0, count(*) FROM (
    SELECT DISTINCT {_FLOW} {{records}} AND (NOT begins OR reason NOT IN {{ended}}))
"""  # noqa: S608
_KEYS = {
    "peer": ("{peer}", "0"),
    "port": ("proto", "CASE WHEN proto IN (1, 58) THEN NULL ELSE dport END"),
    "proto": ("proto", "0"),
    "node": ("f.node", "0"),
}
_ORDER = {"bytes": "sum(ob) + sum(ib)", "packets": "sum(op) + sum(ip)", "flows": "sum(flows)"}
_KEY_TYPES = {"peer": "UHUGEINT", "port": "UTINYINT", "proto": "UTINYINT", "node": "VARCHAR"}
_FIRST = """
WITH {cte} SELECT k1, k2, place, sum(ob)::UBIGINT, sum(ib)::UBIGINT, sum(op)::UBIGINT,
    sum(ip)::UBIGINT, sum(flows)::UBIGINT
FROM ({summed}) GROUP BY ALL ORDER BY {order} DESC, k1, k2, place {limit}
"""


def _by_key(
    con: duckdb.DuckDBPyConnection, ask: Top, parts: dict[str, str], records: Chosen
) -> tuple[list[tuple[Any, ...]], list[int]]:
    """A flow between two slices has two peers; it is one flow of its port, protocol and node."""
    key, second = _KEYS[ask.of]
    one_side = parts["r"] if ask.of == "peer" else f"NOT ({parts['o']}) AND {parts['r']}"
    sides_of = [
        _SIDE.format(
            **{**parts, "side": side, "place": place, "a": a, "b": b},
            k1=key.format(peer=peer),
            k2=second,
        )
        for side, place, a, b, peer in (
            (f"({parts['o']})", parts["o_place"], "o", "r", "dst"),
            (f"({one_side})", parts["r_place"], "r", "o", "src"),
        )
    ]
    both = " UNION ALL ".join(sides_of)
    summed, shared = _SUMMED.format(sides=both), _SHARED.format(sides=both, only="{only}")
    # One more than asked for shows whether some were left out.
    limit = f"LIMIT {bounded(ask.limit) + 1}"
    # Either of the two fits into the store's memory where both at once may not:
    # flows of several shares are counted for the largest alone, unless they decide which it is.
    at_once = ask.by == "flows" or not ask.limit
    if at_once:
        summed = f"{summed} UNION ALL {shared.format(only='')}"
    sql = _FIRST.format(cte=parts["cte"], summed=summed, order=_ORDER[ask.by], limit=limit)
    found = {
        (k1, k2, place): counts
        for chunk in select(con, sql, records.params)
        for k1, k2, place, *counts in chunk
    }
    if not at_once:
        only = f"AND list_contains($top_keys::{_KEY_TYPES[ask.of]}[], k1)"
        sql = f"WITH {parts['cte']} {shared.format(only=only)}"
        params = {**records.params, "top_keys": [k1 for k1, _, _ in found]}
        for chunk in select(con, sql, params):
            for k1, k2, place, *counts in chunk:
                if (k1, k2, place) in found:
                    found[k1, k2, place][-1] += counts[-1]
    rows: list[tuple[Any, ...]] = []
    for (k1, k2, place), counts in found.items():
        first = (address(k1),) if ask.of == "peer" else (k1, k2) if ask.of == "port" else (k1,)
        rows.append((*first, _PLACE[place], *counts))
    total = [0] * 5
    for chunk in select(con, _TOTAL.format(**parts), records.params):
        for sums in chunk:
            total = [a + (b or 0) for a, b in zip(total, sums, strict=True)]
    return rows, total
