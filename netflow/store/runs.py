"""Lives of collectors, and what they lost: noted as they go."""

from __future__ import annotations

from dataclasses import dataclass

import duckdb

from netflow.store.database import Store, transaction


@dataclass(frozen=True)
class Mark:
    """How far the collector has come, written with each commit.

    caught_up: no record that ends before is missing (ns UTC). boot: the same
    moment by CLOCK_BOOTTIME (ns). opens: the kernel's count of TCP opens then.
    per_open, per_second: records per TCP open and other records per second,
    from which a gap's estimate is made.
    """

    caught_up: int
    boot: int = 0
    opens: int = 0
    per_open: float = 1.0
    per_second: float = 0.0


@dataclass(frozen=True)
class Run:
    """One life of a collector; times in ns UTC, the rest as in Mark at its last commit."""

    id: int
    since: int
    until: int
    boot_id: str
    until_boot: int
    clean: bool
    opens: int
    per_open: float
    per_second: float


def begin_run(store: Store, mark: Mark, boot_id: str = "") -> Run | None:
    """Note that a collector runs from now; returns the run before, if there was one.

    A loss the last run left open ended, at the latest, with that run.
    """
    last = last_run(store.con)
    losses = store.con.execute("SELECT coalesce(max(id), 0) FROM losses").fetchall()[0][0]
    number = last.id + 1 if last else 1
    with transaction(store.con):
        store.con.execute(
            "UPDATE losses SET until = greatest(since, make_timestamp_ns(?)) WHERE until IS NULL",
            [last.until if last else 0],
        )
        store.con.execute(
            "INSERT INTO runs VALUES ($1, make_timestamp_ns($2), make_timestamp_ns($2), $3, $4,"
            " false, $5, $6, $7)",
            [number, mark.caught_up, boot_id, mark.boot, mark.opens, mark.per_open,
             mark.per_second],
        )  # fmt: skip
    store.run, store.losses = number, losses
    return last


def last_run(con: duckdb.DuckDBPyConnection) -> Run | None:
    """The newest run in the store."""
    rows = con.execute(
        "SELECT id, epoch_ns(since), epoch_ns(until), boot_id, until_boot, clean, opens, per_open,"
        " per_second FROM runs ORDER BY id DESC LIMIT 1"
    ).fetchall()
    return Run(*rows[0]) if rows else None


def mark_run(store: Store, mark: Mark) -> None:
    """Note how far this run has come; called in a transaction.

    Not by UPDATE: while any reader is older than a row's last update DuckDB makes
    no checkpoint, and where questions overlap one always is: the log would grow for ever.
    """
    [(since, until, boot_id, clean, until_boot)] = store.con.execute(
        "DELETE FROM runs WHERE id = ?"
        " RETURNING epoch_ns(since)::BIGINT, epoch_ns(until)::BIGINT, boot_id, clean, until_boot",
        [store.run],
    ).fetchall()
    # What is later the boot clock says: the other one may have been set back.
    until = mark.caught_up if mark.boot > until_boot else max(until, mark.caught_up)
    store.con.execute(
        "INSERT INTO runs VALUES ($1, make_timestamp_ns($2), make_timestamp_ns($3), $4, $5, $6,"
        " $7, $8, $9)",
        [store.run, since, until, boot_id, mark.boot, clean, mark.opens,
         mark.per_open, mark.per_second],
    )  # fmt: skip


def end_run(store: Store) -> None:
    """Note that this run has recorded all it should."""
    store.con.execute("UPDATE runs SET clean = true WHERE id = ?", [store.run])


def first_run(con: duckdb.DuckDBPyConnection) -> int:
    """When the first collector began to write here (ns), 0 if none did."""
    sql = "SELECT coalesce(epoch_ns(min(since)), 0) FROM runs"
    return int(con.execute(sql).fetchall()[0][0])


def open_loss(
    store: Store, since: int, what: str, events: int, estimate: int | None = None, note: str = ""
) -> int:
    """Note a loss that goes on; returns its id. estimate: records thought missing."""
    store.losses += 1
    store.con.execute(
        "INSERT INTO losses VALUES (?, ?, make_timestamp_ns(?), NULL, ?, ?, ?, ?)",
        [store.losses, store.run, since, what, events, estimate, note],
    )
    return store.losses


def close_loss(
    store: Store, loss: int, until: int, events: int, estimate: int | None = None
) -> None:
    """Note that a loss is over, and how many events it cost."""
    store.con.execute(
        "UPDATE losses SET until = make_timestamp_ns(?), events = ?,"
        " estimate = coalesce(?, estimate) WHERE id = ?",
        [until, events, estimate, loss],
    )


def note_loss(
    store: Store, since: int, until: int, what: str, events: int = 0,
    estimate: int | None = None, note: str = "",
) -> None:  # fmt: skip
    """Note a loss that is over."""
    store.losses += 1
    store.con.execute(
        "INSERT INTO losses VALUES (?, ?, make_timestamp_ns(?), make_timestamp_ns(?), ?, ?, ?, ?)",
        [store.losses, store.run, since, max(since, until), what, events, estimate, note],
    )
