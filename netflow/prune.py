"""What of a filter lets most of the files be left unread.

DuckDB skips row groups, and reads one column before the others, for conditions
that each name one column. A filter's seldom do: an address matches before or
after translation, a slice on either side. So the records are taken as a union:
those that match by the first column, those that match by the second and not by
the first, and so on. Files are sorted by ``dst_hi, dst_lo, dport``, and a
translated address is NULL where translation changed nothing, so that the parts
that find nothing cost next to nothing (docs/history.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from netflow.history import Among
from netflow.networks import bounds
from netflow.wire import Filter

if TYPE_CHECKING:
    import duckdb

MOST = 8
"""Parts of a union; with more of them, reading everything once is not dearer."""

_LOW = (1 << 64) - 1
_MANY = 256  # numbers in a list


def among(asked: Filter, con: duckdb.DuckDBPyConnection, tenures: dict[str, list[Any]]) -> Among:
    """The best that a filter gives; tenures are netflow.names' of this node.

    Raises ValueError for addresses that are none.
    """
    for networks, columns in (
        (asked.dst, ("dst", "ndst")),
        (asked.addr, ("dst", "ndst", "src", "nsrc")),
        (asked.src, ("src", "nsrc")),
    ):
        if networks and len(networks) * len(columns) <= MOST:
            return addresses(networks, columns)
    sides = {"any": "or", "originator": "o", "responder": "r"}[asked.side]
    if asked.xids or asked.slices:
        # Both may be asked for; then the fewer numbers are the xids' own.
        xids = asked.xids or _held(con, asked.slices, tenures)
        return _numbers(xids, [f"{side}xid" for side in sides])
    for ports, columns in (
        (asked.dport, ("dport", "ndport")),
        (asked.sport, ("sport", "nsport")),
        (asked.port, ("dport", "ndport", "sport", "nsport")),
    ):
        if ports:
            return _numbers(ports, columns)
    return Among()


def _held(
    con: duckdb.DuckDBPyConnection, slices: list[str], tenures: dict[str, list[Any]]
) -> set[int]:
    """All xids that slices of these names have had, here or on other nodes."""
    here = zip(tenures["t_slice"], tenures["t_xid"], strict=True)
    told = con.execute(
        "SELECT DISTINCT xid FROM told_names WHERE list_contains($1::VARCHAR[], slice)", [slices]
    ).fetchall()
    return {xid for name, xid in here if name in slices} | {xid for (xid,) in told}


def addresses(networks: list[str], columns: Sequence[str]) -> Among:
    """That one of the columns (src, dst, nsrc, ndst) is in one of the networks."""
    tests: list[str] = []
    params: dict[str, Any] = {}
    for n, (low, high) in enumerate(map(bounds, networks)):
        first, last, half = f"a_{n}a", f"a_{n}b", f"a_{n}h"
        one_half = low >> 64 == high >> 64
        if one_half:
            params |= {half: low >> 64, first: low & _LOW, last: high & _LOW}
            within = f"{{0}}_lo BETWEEN ${first}::UBIGINT AND ${last}::UBIGINT"
            test = f"{{0}}_hi = ${half}::UBIGINT AND {within}"
        else:
            params |= {first: low >> 64, last: high >> 64}
            test = f"{{0}}_hi BETWEEN ${first}::UBIGINT AND ${last}::UBIGINT"
        tests += [test.format(column) for column in columns]
    return Among(tests, params)


def _numbers(values: Iterable[int], columns: Sequence[str]) -> Among:
    params = {f"a_{n}": value for n, value in enumerate(sorted(set(values)))}
    if len(params) > _MANY:
        return Among()
    listed = ", ".join(f"${name}::USMALLINT" for name in params) or "NULL"
    return Among([f"{column} IN ({listed})" for column in columns], params)
