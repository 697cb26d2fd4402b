"""From the kernel's messages to records: events, dumps, and questions about single entries.

Three things are asked of the kernel: events as they come, a dump now and then,
so that connections that go on are recorded and ends that went unseen are
found, and single entries whose owner has changed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from time import monotonic, thread_time, time_ns
from typing import Any

from numpy.typing import NDArray

from netflow import clock, ct, fresh, losses, nfct, strangers, writer
from netflow.state import EVENTS, State, commit, next_seq

RESTING = 9
"""How many times as much as a dump cost passes before one may be had for the asking."""
ROUNDS = 16
"""Bufferfuls of events taken before other work gets its turn."""

_ASKED_AT_ONCE = 64
_MIN_EVENT = 512  # bytes of the receive buffer one event takes at least (truesize)

_log = logging.getLogger("netflow")


# -- the kernel's messages ---------------------------------------------------------


def take_events(
    state: State, rounds: int, take: Callable[[State, ct.Batch], None] | None = None
) -> bool:
    """Apply the events that wait, up to so many bufferfuls. True: none waits any more."""
    batch = state.buffers.events
    for _ in range(rounds):
        began = clock.now()
        batch.clear()
        told = ct.receive_events(state.events.fileno(), state.buffers.raw, batch)
        if told.overrun:
            losses.overrun(state)
        if told.malformed:
            losses.unreadable(state, told.malformed)
        state.received += len(batch)
        (take or apply)(state, batch)
        if not told.datagrams and not told.overrun:
            state.caught_up = began
            return True
    return False


def apply(state: State, batch: ct.Batch, active: bool = False) -> None:
    """Apply rows to the table; commits what it closes, asks what it must know."""
    now, row, held = time_ns(), 0, None
    while row < len(batch):
        flows = state.buffers.flows
        row, asks = state.table.apply(batch, now, flows, start=row, active=active)
        if len(asks) and batch["msg"][asks[-1]] == ct.Msg.DESTROY:
            stranger, asks = int(asks[-1]), asks[:-1]
            if held is None:
                held = strangers.held(state, batch, stranger)
            strangers.settle(state, batch, stranger, held)
        elif row < len(batch) and not len(asks):
            commit(state)
        if len(asks):
            _ask(state, batch, asks)


def _ask(state: State, batch: ct.Batch, rows: NDArray[Any]) -> None:
    """Ask for entries whose owner has changed; their counters close the old share.

    The kernel answers while it takes a request, so that all answers wait once
    sending is done. No answer: it is gone, and its DESTROY is on its way.
    """
    answers = state.buffers.answers
    for first in range(0, len(rows), _ASKED_AT_ONCE):
        requests = b"".join(
            ct.get_request(batch, int(row), next_seq(state))
            for row in rows[first : first + _ASKED_AT_ONCE]
        )
        state.requests.send(requests)
        while True:
            answers.clear()
            told = ct.receive(state.requests.fileno(), state.buffers.raw, answers)
            if not told.datagrams and not told.overrun:
                break
            rest, _ = state.table.apply(answers, time_ns(), state.buffers.flows)
            while rest < len(answers):
                commit(state)
                rest, _ = state.table.apply(answers, time_ns(), state.buffers.flows, start=rest)


# -- dumps -----------------------------------------------------------------------------


def dump(state: State, active: bool) -> bool:
    """Look at all entries; with active, record what goes on. False: some may be missing.

    Events are applied before, so that few of them are older than the dump, and
    after it: an entry that went while it ran has told so in one of those, and
    what neither showed has ended unseen.
    """
    began = thread_time()
    take_events(state, ROUNDS)
    upto = state.caught_up.boot
    whole = read_dump(state, active)
    # What the receive buffer can hold is as much as can have come meanwhile.
    caught_up = take_events(state, state.receive_buffer // _MIN_EVENT // EVENTS + ROUNDS)
    if whole and caught_up:
        _sweep(state)
    state.dump_ended = monotonic()
    state.dump_cost = thread_time() - began
    state.dump_rows = len(state.table)
    _log.debug("dump: %d live, %.0f ms of CPU", state.dump_rows, state.dump_cost * 1e3)
    if active:
        commit(state)
        if whole:  # or nobody knows of some entries up to when they are recorded
            writer.post(state.writer, partial(fresh.reached, state.fresh, upto))
    return whole and caught_up


def _sweep(state: State) -> None:
    """Close what neither dump nor events have shown."""
    done = False
    while not done:
        done = state.table.sweep(time_ns(), state.buffers.flows)
        if not done:
            commit(state)
    losses.settle(state)


def rest(state: State) -> float:
    """Seconds after a dump before the next one may be had for the asking.

    By the processor's clock, since a busy machine makes dumps long but not
    dear, and by how many connections are left of those that were in the last.
    """
    left = min(1.0, (len(state.table) + 1) / (state.dump_rows + 1))
    return RESTING * state.dump_cost * left


def read_dump(state: State, active: bool, show: Callable[[ct.Batch], None] | None = None) -> bool:
    """Apply a dump's rows, each batch shown first. False: the dump has holes."""
    batch = state.buffers.events
    state.table.dump_begin()
    nfct.start_dump(state.requests, next_seq(state))
    interrupted = False
    while True:
        batch.clear()
        told = ct.receive(state.requests.fileno(), state.buffers.raw, batch)
        if show:
            show(batch)
        apply(state, batch, active)
        interrupted |= told.interrupted or told.overrun or told.malformed > 0
        if told.done:
            return not interrupted
        # The kernel always has the next part ready, so that nothing means failure.
        if told.error or not told.datagrams:
            why = os.strerror(told.error) if told.error else "no answer"
            _log.warning("a dump of connection tracking broke off: %s", why)
            state.requests.close()
            state.requests = nfct.open_requests()
            return False


def resync(state: State) -> None:
    """After an overrun, read all entries; if nothing was lost meanwhile, the loss is over."""
    before = nfct.dropped(state.events)
    whole = dump(state, active=False)
    state.due.resync = monotonic() + max(0.05, rest(state))
    if whole and nfct.dropped(state.events) == before:
        losses.end_overrun(state)
