"""What is in a Parquet file: see docs/history.md. Readers dispatch on the version.

Version 2 is the first that was written (version 1 was a store without files).
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import msgspec

from netflow.node import valid
from netflow.when import HOUR
from netflow.wire import Gap

VERSION = 2
KEY = "netflow"
"""The key of a file's description among its Parquet key-value metadata."""

ROW_GROUP = 16_384
"""Rows of a row group, the least that a question reads of a file: 2 % more bytes than with
DuckDB's 122,880, for a seventh of the rows to unpack."""

LAST = 1 << 62
"""ns UTC before which every time lies: DuckDB's timestamps end twice as late."""

_GAP = re.compile("[a-z-]{1,32}")
_Long = Annotated[int, msgspec.Meta(ge=0, lt=LAST)]
_Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_Segment = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
_Hour = Annotated[int, msgspec.Meta(ge=0, lt=LAST // HOUR)]
_Xid = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]


class Told(msgspec.Struct, kw_only=True):
    """What a file says of itself. Times in ns UTC; start and end are the records' extremes.

    Since covers[0], and up to covers[1], nothing of this node is missing from
    this file and those before it, but for ``gaps``. ``names`` are tenures of
    the xids in it: xid, slice, since, until (none: still).
    """

    schema: int
    node: str
    domain: _Number
    store: str
    segment: _Segment
    hour: _Hour
    records: _Long
    start: _Long
    end: _Long
    covers: tuple[_Long, _Long]
    gaps: list[Gap] = []
    names: list[tuple[_Xid, str, _Long, _Long | None]] = []


def encode(told: Told) -> str:
    """The description as it is put into the file."""
    return msgspec.json.encode(told).decode()


def decode(text: bytes | str) -> Told:
    """Read a description, of which the list of files can hold every word.

    Raises ValueError with a message for people.
    """
    try:
        version = json.loads(text)["schema"]
        if version != VERSION:
            raise ValueError(f"its schema version is {version}: this netflow reads {VERSION}")
        told = msgspec.json.decode(text, type=Told)
    except (msgspec.MsgspecError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"its description cannot be read: {error}") from None
    if not valid(told.node):
        raise ValueError(f"{told.node!r} cannot be a node's name")
    for gap in told.gaps:
        numbers = (gap.since, gap.until, gap.events, gap.estimate or 0)
        if not _GAP.fullmatch(gap.what) or not all(0 <= n < LAST for n in numbers):
            raise ValueError(f"it tells of a gap that cannot be: {gap}")
    return told


def _only_if_other(column: str, than: str) -> str:
    return f"CASE WHEN {column} <> {than} THEN {column} END AS {column}"


def _address_if_other(column: str, than: str) -> str:
    """Both halves, or neither: one half may be the same by chance."""
    other = f"({column}_hi <> {than}_hi OR {column}_lo <> {than}_lo)"
    return ", ".join(
        f"CASE WHEN {other} THEN {column}_{h} END AS {column}_{h}" for h in ("hi", "lo")
    )


# What only shares of one connection have in common is left out of those that
# are all of theirs; what translation did not change is not repeated.
WRITE = f"""
SELECT $node::VARCHAR AS node, $domain::UINTEGER AS domain,
    make_timestamp_ms(epoch_ns(end_time) // 1000000)::TIMESTAMP_MS AS end_time,
    (epoch_ns(end_time) // 1000000 - epoch_ns(start_time) // 1000000)::BIGINT AS duration_ms,
    CASE WHEN flow_start <> start_time
        THEN epoch_ns(start_time) // 1000000 - epoch_ns(flow_start) // 1000000 END::BIGINT
        AS flow_age_ms,
    CASE WHEN flow_start <> start_time OR reason NOT IN (1, 2, 6) THEN flow_id END AS flow_id,
    nullif(zone, 0) AS zone, proto, reason, tcp_state,
    src_hi, src_lo, dst_hi, dst_lo, sport, dport,
    {_address_if_other("nsrc", "src")}, {_address_if_other("ndst", "dst")},
    {_only_if_other("nsport", "sport")}, {_only_if_other("ndport", "dport")},
    opackets, obytes, rpackets, rbytes, oxid, rxid
FROM {{segment}}
ORDER BY dst_hi, dst_lo, dport, end_time, rowid
"""  # noqa: S608 - the table's name is ours

OPTIONS = (
    "FORMAT parquet, PARQUET_VERSION v2, COMPRESSION zstd, COMPRESSION_LEVEL 15,"
    f" WRITE_BLOOM_FILTER false, ROW_GROUP_SIZE {ROW_GROUP}"
)
"""Level 15 is 3 % less than the usual 3 for 0.8 us more of a record. Bloom filters would be
0.8 bytes of each, for columns that nobody looks up without a time."""

_ADDRESS = "(({0}_hi::UHUGEINT << 64) | {0}_lo)"
_NATTED = "((coalesce(n{0}_hi, {0}_hi)::UHUGEINT << 64) | coalesce(n{0}_lo, {0}_lo))"
_ADDRESSES = (
    f"{_ADDRESS.format('src')} AS src, {_ADDRESS.format('dst')} AS dst, "
    f"{_NATTED.format('src')} AS nsrc, {_NATTED.format('dst')} AS ndst"
)
_SAME = (
    "proto, reason, tcp_state, src_hi, src_lo, dst_hi, dst_lo, sport, dport, "
    "nsrc_hi, nsrc_lo, ndst_hi, ndst_lo, nsport, ndport, "
    "opackets, obytes, rpackets, rbytes, oxid, rxid"
)

READ: dict[int, str] = {
    2: f"""
SELECT node, domain,
    (end_time - to_milliseconds(duration_ms + coalesce(flow_age_ms, 0)))::TIMESTAMP_NS
        AS flow_start,
    (end_time - to_milliseconds(duration_ms))::TIMESTAMP_NS AS start_time,
    end_time::TIMESTAMP_NS AS end_time, flow_age_ms IS NULL AS begins,
    flow_id, coalesce(zone, 0) AS zone, {_SAME}, {_ADDRESSES}
FROM read_parquet({{files}})
""",  # noqa: S608
}
"""By schema version, a file's records as netflow.history.source gives them."""

_RAW = (
    "src_hi, src_lo, dst_hi, dst_lo, nsrc_hi, nsrc_lo, ndst_hi, ndst_lo, "
    "sport, dport, nsport, ndport, proto, reason, flow_id, "
    "opackets, obytes, rpackets, rbytes, oxid, rxid"
)
READ_RAW: dict[int, str] = {
    2: f"""
SELECT {{test}}, node, 1000000, epoch_ms(end_time), duration_ms, coalesce(flow_age_ms, 0), {_RAW}
FROM read_parquet({{files}})
WHERE end_time >= make_timestamp_ms($h_since_ms::BIGINT)
    AND epoch_ms(end_time) - duration_ms <= $h_until_ms::BIGINT
""",  # noqa: S608
}
"""By schema version, what netflow.history.raw gives of a file: nothing is made up but times."""

# When a connection began ties its shares together, of which the first may be in a file already.
_FLOW_START = "epoch_ns(flow_start) // 1000000 * 1000000"

HOT_RAW = f"""
SELECT 0, {{node}}, 1, epoch_ns(end_time), epoch_ns(end_time) - epoch_ns(start_time),
    epoch_ns(start_time) - {_FLOW_START}, {_RAW}
FROM {{segment}}
WHERE end_time >= make_timestamp_ns($h_since::BIGINT)
    AND start_time <= make_timestamp_ns($h_until::BIGINT)
"""  # noqa: S608

HOT = f"""
SELECT {{node}} AS node, {{domain}} AS domain,
    make_timestamp_ns({_FLOW_START}) AS flow_start, start_time, end_time,
    hot.flow_start = start_time AS begins, flow_id, zone, {_SAME}, {_ADDRESSES}
FROM {{segment}} AS hot
"""  # noqa: S608

COLUMNS: dict[int, dict[str, str]] = {
    2: {
        "node": "VARCHAR", "domain": "UINTEGER", "end_time": "TIMESTAMP_MS|TIMESTAMP",
        "duration_ms": "BIGINT", "flow_age_ms": "BIGINT", "flow_id": "UINTEGER",
        "zone": "USMALLINT", "proto": "UTINYINT", "reason": "UTINYINT", "tcp_state": "UTINYINT",
        "src_hi": "UBIGINT", "src_lo": "UBIGINT", "dst_hi": "UBIGINT", "dst_lo": "UBIGINT",
        "sport": "USMALLINT", "dport": "USMALLINT",
        "nsrc_hi": "UBIGINT", "nsrc_lo": "UBIGINT", "ndst_hi": "UBIGINT", "ndst_lo": "UBIGINT",
        "nsport": "USMALLINT", "ndport": "USMALLINT",
        "opackets": "UBIGINT", "obytes": "UBIGINT", "rpackets": "UBIGINT", "rbytes": "UBIGINT",
        "oxid": "USMALLINT", "rxid": "USMALLINT",
    }
}  # fmt: skip
"""By schema version, the columns a file must have, as DuckDB reads their types."""


def columns_differ(version: int, found: list[tuple[Any, ...]]) -> str:
    """Why the columns of a file (name, type, ...) are not those of its version; "" if they are."""
    wanted = COLUMNS[version]
    got = {row[0]: row[1] for row in found}
    for name, kind in wanted.items():
        if name not in got:
            return f"column {name} is missing"
        if got[name] not in kind.split("|"):
            return f"column {name} is {got[name]}, not {kind}"
    if more := set(got) - set(wanted):
        return f"unknown columns: {', '.join(sorted(more))}"
    return ""
