"""Stores that older versions wrote, brought up to today's schema."""

from __future__ import annotations

import uuid

import duckdb

TABLES = """
CREATE TABLE meta (key VARCHAR NOT NULL, value VARCHAR NOT NULL);
CREATE TABLE runs (
    id UINTEGER NOT NULL, since TIMESTAMP_NS NOT NULL, until TIMESTAMP_NS NOT NULL,
    boot_id VARCHAR NOT NULL, until_boot BIGINT NOT NULL, clean BOOLEAN NOT NULL,
    opens UBIGINT NOT NULL, per_open DOUBLE NOT NULL, per_second DOUBLE NOT NULL);
CREATE TABLE losses (
    id UINTEGER NOT NULL, run UINTEGER NOT NULL, since TIMESTAMP_NS NOT NULL,
    until TIMESTAMP_NS, what VARCHAR NOT NULL, events UBIGINT NOT NULL,
    estimate UBIGINT, note VARCHAR NOT NULL);
-- Hot records: one table flows_<id> for each segment.
CREATE TABLE segments (
    id UINTEGER NOT NULL, hour BIGINT NOT NULL, node VARCHAR NOT NULL, domain UINTEGER NOT NULL);
-- What has gone to Parquet of connections whose end is not recorded.
CREATE TABLE carried (
    flow_start TIMESTAMP_NS NOT NULL, flow_id UINTEGER NOT NULL, zone USMALLINT NOT NULL,
    proto UTINYINT NOT NULL, src_hi UBIGINT NOT NULL, src_lo UBIGINT NOT NULL,
    dst_hi UBIGINT NOT NULL, dst_lo UBIGINT NOT NULL, sport USMALLINT NOT NULL,
    dport USMALLINT NOT NULL, nsrc_hi UBIGINT NOT NULL, nsrc_lo UBIGINT NOT NULL,
    ndst_hi UBIGINT NOT NULL, ndst_lo UBIGINT NOT NULL, nsport USMALLINT NOT NULL,
    ndport USMALLINT NOT NULL, opackets UBIGINT NOT NULL, obytes UBIGINT NOT NULL,
    rpackets UBIGINT NOT NULL, rbytes UBIGINT NOT NULL, oxid USMALLINT NOT NULL,
    rxid USMALLINT NOT NULL, end_time TIMESTAMP_NS NOT NULL, reason UTINYINT NOT NULL);
-- Closed records: one row for each Parquet file, and what the files tell.
CREATE TABLE files (
    name VARCHAR NOT NULL, node VARCHAR NOT NULL, domain UINTEGER NOT NULL, own BOOLEAN NOT NULL,
    store VARCHAR NOT NULL, segment UINTEGER NOT NULL, hour BIGINT NOT NULL,
    records UBIGINT NOT NULL, bytes UBIGINT NOT NULL, min_start TIMESTAMP_NS NOT NULL,
    max_end TIMESTAMP_NS NOT NULL, covers_since TIMESTAMP_NS NOT NULL,
    covers_until TIMESTAMP_NS NOT NULL, schema UTINYINT NOT NULL, sha256 VARCHAR NOT NULL);
CREATE TABLE told_gaps (
    node VARCHAR NOT NULL, since TIMESTAMP_NS NOT NULL, until TIMESTAMP_NS NOT NULL,
    what VARCHAR NOT NULL, events UBIGINT NOT NULL, estimate UBIGINT, note VARCHAR NOT NULL);
CREATE TABLE told_names (
    node VARCHAR NOT NULL, xid USMALLINT NOT NULL, slice VARCHAR NOT NULL,
    since TIMESTAMP_NS NOT NULL, until TIMESTAMP_NS NOT NULL);
-- What retention dropped, one row for each node.
CREATE TABLE retired (
    node VARCHAR NOT NULL, since TIMESTAMP_NS NOT NULL, until TIMESTAMP_NS NOT NULL,
    records UBIGINT NOT NULL, bytes UBIGINT NOT NULL, files UINTEGER NOT NULL,
    last TIMESTAMP_NS NOT NULL, why VARCHAR NOT NULL);
CREATE TABLE doomed (name VARCHAR NOT NULL, since BIGINT NOT NULL);
"""

SEGMENT = """
CREATE TABLE flows_{id} (
    flow_start TIMESTAMP_NS NOT NULL, start_time TIMESTAMP_NS NOT NULL,
    end_time TIMESTAMP_NS NOT NULL, flow_id UINTEGER NOT NULL, zone USMALLINT NOT NULL,
    proto UTINYINT NOT NULL, reason UTINYINT NOT NULL, tcp_state UTINYINT NOT NULL,
    src_hi UBIGINT NOT NULL, src_lo UBIGINT NOT NULL,
    dst_hi UBIGINT NOT NULL, dst_lo UBIGINT NOT NULL,
    sport USMALLINT NOT NULL, dport USMALLINT NOT NULL,
    nsrc_hi UBIGINT NOT NULL, nsrc_lo UBIGINT NOT NULL,
    ndst_hi UBIGINT NOT NULL, ndst_lo UBIGINT NOT NULL,
    nsport USMALLINT NOT NULL, ndport USMALLINT NOT NULL,
    opackets UBIGINT NOT NULL, obytes UBIGINT NOT NULL,
    rpackets UBIGINT NOT NULL, rbytes UBIGINT NOT NULL,
    oxid USMALLINT NOT NULL, rxid USMALLINT NOT NULL)
"""


def create(con: duckdb.DuckDBPyConnection, version: int) -> None:
    """Make the tables of an empty store, which may be a lost one's: see netflow.history.recover."""
    con.execute("BEGIN")
    _make(con, version)
    con.execute("INSERT INTO meta VALUES ('recovering', '')")
    con.execute("COMMIT")


def _make(con: duckdb.DuckDBPyConnection, version: int) -> None:
    con.execute(TABLES)
    con.execute(SEGMENT.format(id=0))  # always empty: what a relation without records is made of
    con.execute(
        "INSERT INTO meta VALUES ('schema', ?), ('store', ?)", [str(version), uuid.uuid4().hex]
    )


def _half(column: str, shift: bool) -> str:
    part = f"{column} >> 64" if shift else f"{column} & 18446744073709551615::UHUGEINT"
    return f"({part})::UBIGINT"


_ADDRESSES = ", ".join(
    f"{_half(c, True)} AS {c}_hi, {_half(c, False)} AS {c}_lo"
    for c in ("src", "dst", "nsrc", "ndst")
)


def from_1(con: duckdb.DuckDBPyConnection, node: str, domain: int) -> None:
    """Version 1 (one table of all records, addresses in 128 bits) becomes 2, whole or not at all.

    Every hour of it becomes a segment of this node, so that it goes to
    Parquet like any other.
    """
    con.execute("BEGIN")
    for table in ("flows", "losses", "runs", "meta"):
        con.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    _make(con, 2)
    con.execute(
        "INSERT INTO runs SELECT id, since, until, '', 0, true, 0, 1, 0 FROM old_runs ORDER BY id"
    )
    con.execute("""
        INSERT INTO losses SELECT id, run, since, until, what, events, NULL, ''
        FROM old_losses ORDER BY id""")
    hours = con.execute(
        "SELECT DISTINCT epoch_ns(end_time) // 3600000000000 FROM old_flows ORDER BY 1"
    ).fetchall()
    for number, (hour,) in enumerate(hours, 1):
        con.execute(SEGMENT.format(id=number))
        con.execute(
            f"INSERT INTO flows_{number} BY NAME SELECT * EXCLUDE (src, dst, nsrc, ndst), "  # noqa: S608
            f"{_ADDRESSES} FROM old_flows WHERE epoch_ns(end_time) // 3600000000000 = ?",
            [hour],
        )
        con.execute("INSERT INTO segments VALUES (?, ?, ?, ?)", [number, hour, node, domain])
    for table in ("flows", "losses", "runs", "meta"):
        con.execute(f"DROP TABLE old_{table}")
    con.execute("COMMIT")
