"""Hot and closed records as one relation, for a period and some nodes.

    with reading(con):
        records = source(con, since, until, nodes)
        con.execute(f"SELECT ... FROM ({records.sql}) WHERE ...", {**records.params, ...})

The relation's columns:

    node, domain                    who recorded it
    flow_start                      TIMESTAMP_NS, UTC, whole milliseconds
    start_time, end_time            the same; from files whole milliseconds, too
    begins                          whether it is the first share of its connection (whose times
                                    may be those of the second, in whole milliseconds)
    flow_id                         NULL where the record is all of its connection
    zone, proto, reason, tcp_state
    src_hi, src_lo, dst_hi, dst_lo, sport, dport
    nsrc_hi, nsrc_lo, ndst_hi, ndst_lo, nsport, ndport
                                    after translation; NULL or the same where it changed nothing
    src, dst, nsrc, ndst            the addresses whole, as UHUGEINT; nsrc and ndst never NULL
    opackets, obytes, rpackets, rbytes, oxid, rxid

Conditions should name ``dst_hi`` and ``dst_lo``, which files are sorted by, and
not ``dst``, which is made up. An OR of two columns reads whole files: two
SELECTs in a UNION ALL do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from netflow.history.schema import HOT, HOT_RAW, READ, READ_RAW
from netflow.store import hot_segments

if TYPE_CHECKING:
    import duckdb

_LAST = 1 << 62
_FILES = """
SELECT schema, (SELECT value FROM meta WHERE key = 'history') || '/' || name
FROM files WHERE min_start <= make_timestamp_ns($until) AND max_end >= make_timestamp_ns($since)
    AND ($nodes IS NULL OR list_contains($nodes::VARCHAR[], node))
ORDER BY hour, name
"""


@dataclass(frozen=True)
class Source:
    """A SELECT and its parameters (their names begin with ``h_``)."""

    sql: str
    params: dict[str, Any] = field(default_factory=dict)
    files: int = 0


@dataclass(frozen=True)
class Among:
    """Conditions on columns of records, of which each record asked for meets one at least.

    None of them: nothing is known. Their parameters' names begin with ``a_``.
    netflow.prune makes them of a filter.
    """

    tests: Sequence[str] = ()
    params: dict[str, Any] = field(default_factory=dict)


@contextmanager
def reading(con: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """One view of the store: what source() names exists until the end of it.

    Without, a segment could become a file between naming and reading.
    """
    con.execute("BEGIN TRANSACTION READ ONLY")
    try:
        yield
    finally:
        con.execute("ROLLBACK")


def source(
    con: duckdb.DuckDBPyConnection,
    since: int | None = None,
    until: int | None = None,
    nodes: Sequence[str] | None = None,
    among: Among | None = None,
) -> Source:
    """The records that may overlap since..until (ns UTC; None: no bound) of some nodes, or all.

    Whole files are left out by the manifest, and parts of files by among; the
    period and the rest must still be asked for as a condition. Call it inside
    reading().
    """
    parts: list[str] = []
    params: dict[str, Any] = {}
    for number, _, node, domain in hot_segments(con):
        if nodes is None or node in nodes:
            key = f"h_{len(params)}"
            params[key] = node
            parts.append(
                HOT.format(
                    node=f"${key}::VARCHAR", domain=f"{domain}::UINTEGER", segment=f"flows_{number}"
                )
            )
    files = _files(con, since, until, nodes)
    for version, paths in files.items():
        key = f"h_{len(params)}"
        params[key] = paths
        parts.append(READ[version].format(files=f"${key}::VARCHAR[]"))
    if not parts:
        empty = HOT.format(node="''", domain="0::UINTEGER", segment="flows_0")
        parts.append(empty)
    sql = " UNION ALL ".join(parts)
    if among and among.tests:
        sql = _by_test(sql, among.tests)
        params |= among.params
    return Source(sql, params, sum(map(len, files.values())))


def raw(
    con: duckdb.DuckDBPyConnection, since: int | None, until: int | None, among: Among
) -> Source:
    """The records of a period that meet a test, as they are stored: little for DuckDB to plan.

    Its rows: the number of the test; node; the unit of the times that follow, in
    ns; end, how long before it the record began, and before that its connection;
    then as schema.READ_RAW says. A record comes once for each test that it meets, from the hot
    ones once with 0: leave out what meets a test before its row's.
    """
    low, high = _period(since, until)
    params: dict[str, Any] = {
        "h_since": low, "h_until": high,
        "h_since_ms": -(-low // 1_000_000), "h_until_ms": high // 1_000_000, **among.params,
    }  # fmt: skip
    parts = []
    for number, _, node, _ in hot_segments(con):
        key = f"h_{number}"
        params[key] = node
        part = HOT_RAW.format(node=f"${key}::VARCHAR", segment=f"flows_{number}")
        # Nothing of a table can be left out but by time: one look at it is enough.
        parts.append(f"{part} AND ({' OR '.join(f'({test})' for test in among.tests)})")
    files = _files(con, since, until, None)
    for version, paths in files.items():
        key = f"h_files_{version}"
        params[key] = paths
        parts += [
            f"{READ_RAW[version].format(test=n, files=f'${key}::VARCHAR[]')} AND {test}"
            for n, test in enumerate(among.tests)
        ]
    return Source(" UNION ALL ".join(parts), params, sum(map(len, files.values())))


def _period(since: int | None, until: int | None) -> tuple[int, int]:
    """Bounds that there always are, and that a timestamp can hold."""
    return min(max(0, since or 0), _LAST), _LAST if until is None else min(until, _LAST)


def _files(
    con: duckdb.DuckDBPyConnection,
    since: int | None,
    until: int | None,
    nodes: Sequence[str] | None,
) -> dict[int, list[str]]:
    """The files that may have records of a period, by the version of their schema."""
    low, high = _period(since, until)
    rows = con.execute(
        _FILES,
        {"since": low, "until": high, "nodes": None if nodes is None else list(nodes)},
    ).fetchall()
    return {
        version: [path for found, path in rows if found == version]
        for version in sorted({row[0] for row in rows})
    }


def _by_test(sql: str, tests: Sequence[str]) -> str:
    """The records that meet one test at least, each once."""
    parts = []
    for n, test in enumerate(tests):
        others = "".join(f" AND ({before}) IS NOT TRUE" for before in tests[:n])
        parts.append(f"SELECT * FROM ({sql}) WHERE {test}{others}")  # noqa: S608
    return " UNION ALL ".join(parts)
