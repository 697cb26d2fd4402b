"""How a run begins: what lives, what of it the store holds, and what ended unseen.

Whoever wrote before was stopped, killed, or went down with the machine. Its
last commit says how far it had come. Connections it has recorded shares of
either still live, or end in an event that waits already, or are gone: those
get a last record, which says that they were cut.
"""

from __future__ import annotations

import logging
from functools import partial

import numpy as np

from netflow import clock, ct, feed, losses, store, strangers, writer
from netflow.estimate import Rate
from netflow.state import EVENTS, ROWS, State, commit, mark
from netflow.strangers import ANY_TIME, Columns

_TRIES = 3
_log = logging.getLogger("netflow")


def resume(state: State, what: str = "not-running") -> None:
    """Take the first dump, and read back what the store holds of the connections in it.

    what: the gap since the last commit, if there was one.
    """
    boot_id = clock.boot_id()
    if last := writer.call(state.writer, lambda: store.last_run(state.store.con)):
        state.rates.last = Rate(last.per_open, last.per_second)
    last = writer.call(state.writer, partial(store.begin_run, state.store, mark(state), boot_id))
    state.table.old(state.began.real)
    if last is None:
        feed.read_dump(state, active=False)
        return
    waiting: list[ct.Batch] = []
    whole = _first_look(state, waiting)
    # What is committed before those that wait are applied says nothing of their time.
    caught_up, state.caught_up = state.caught_up, state.began
    losses.silence(state, last, boot_id, what)
    if not whole:
        losses.unreadable(state, 1)
    # Of what a dump with holes does not show, nobody knows whether it is gone.
    gone = writer.call(state.writer, partial(store.unfinished, state.store)) if whole else None
    sums = writer.call(state.writer, partial(store.recorded, state.store))
    _tell_table(state, sums)
    if gone is not None:
        _cut(state, gone, boot_id == last.boot_id)
    # Jobs are done in order: those that were cut are stored by then.
    writer.post(state.writer, partial(store.end_live, state.store, whole))
    for batch in waiting:
        feed.apply(state, batch)
    state.caught_up = caught_up
    commit(state)


def _first_look(state: State, waiting: list[ct.Batch]) -> bool:
    """List in the store what lives, and what ends in an event that waits. False: not all."""
    whole = False
    for _ in range(_TRIES):
        writer.call(state.writer, partial(store.begin_live, state.store))
        whole = feed.read_dump(
            state, active=False, show=lambda batch: _add_live(state, batch.columns())
        )
        if whole:
            break
    # Events are older than the dump or about what it has shown: they wait until the table
    # knows what is recorded.
    caught_up = feed.take_events(
        state,
        state.receive_buffer // EVENTS + feed.ROUNDS,
        take=lambda state, batch: waiting.append(_copy(batch)),
    )
    for batch in waiting:
        _add_live(state, strangers.ends(batch, state.began.real))
    return whole and caught_up


def _add_live(state: State, entries: Columns) -> None:
    writer.call(state.writer, partial(store.add_live, state.store, entries, ANY_TIME))


def _copy(batch: ct.Batch) -> ct.Batch:
    copy = ct.Batch(max(len(batch), 1))
    copy.extend(dict(batch.columns()))
    return copy


def _tell_table(state: State, sums: Columns) -> None:
    rows = ct.FlowBatch(EVENTS)
    for first in range(0, len(sums["flow_id"]), EVENTS):
        rows.clear()
        rows.extend({name: column[first : first + EVENTS] for name, column in sums.items()})
        state.table.recorded(rows)


def _cut(state: State, gone: Columns, same_boot: bool) -> None:
    """Close connections that ended while no collector ran: some time until the dump.

    What passed after their last share is not known, so they count nothing.
    """
    count = len(gone["flow_id"])
    ended = state.began.real if same_boot else state.began.real - state.began.boot
    for first in range(0, count, ROWS):
        part = {name: column[first : first + ROWS] for name, column in gone.items()}
        commit(state)
        flows = state.buffers.flows
        nothing = np.zeros(len(part["flow_id"]), dtype=np.uint64)
        part |= dict.fromkeys(("opackets", "obytes", "rpackets", "rbytes"), nothing)
        part["start"] = part["end"]
        part["end"] = np.maximum(part["end"], np.uint64(ended))
        part["reason"] = np.full(len(nothing), ct.Reason.CUT, dtype=np.uint8)
        flows.extend(part)
    commit(state)
    if count:
        _log.info("%d connections ended while no collector ran", count)
