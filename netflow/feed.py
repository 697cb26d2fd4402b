"""From the kernel's messages to committed records: events, dumps, losses.

Three things are asked of the kernel: events as they come, a dump now and then,
so that connections that go on are recorded and ends that went unseen are
found, and single entries whose owner has changed.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic, thread_time, time_ns
from typing import Any

from numpy.typing import NDArray

from netflow import ct, fresh, nfct, store
from netflow.fresh import Fresh

COMMIT_AFTER = 1.0
"""Seconds: a record is in the store at most so long after it was closed."""
HEARTBEAT = 5.0
"""Seconds between signs of life in an idle store: how exactly the end of a
collector that was killed is known."""
RESTING = 9
"""How many times as much as a dump cost passes before one may be had for the asking."""

_ROWS = 8192
_ASKED_AT_ONCE = 64
_RECEIVE = 32 * 1024  # what the kernel gives at most per receive
ROUNDS = 16
"""Bufferfuls of events taken before other work gets its turn."""
_MIN_EVENT = 512  # bytes of the receive buffer one event takes at least (truesize)

_log = logging.getLogger("netflow")


@dataclass
class Buffers:
    """Memory that is used again and again. answers: room for one receive's rows."""

    events: ct.Batch = field(default_factory=lambda: ct.Batch(_ROWS))
    answers: ct.Batch = field(default_factory=lambda: ct.Batch(1024))
    flows: ct.FlowBatch = field(default_factory=lambda: ct.FlowBatch(_ROWS))
    raw: bytearray = field(default_factory=lambda: bytearray(_RECEIVE))


@dataclass
class Loss:
    """A loss that goes on: its number in the store, the drop count before it."""

    id: int
    dropped_before: int


@dataclass
class Due:
    """When what is to be done next, in monotonic seconds."""

    dump: float = 0.0
    resync: float = 0.0
    commit: float = 0.0
    heartbeat: float = 0.0


@dataclass
class State:
    """What the loop knows. caught_up: no event up to then waits unread (ns UTC)."""

    receive_buffer: int
    store: store.Store
    events: socket.socket
    requests: socket.socket
    fresh: Fresh
    since: int
    table: ct.Table = field(default_factory=ct.Table)
    buffers: Buffers = field(default_factory=Buffers)
    due: Due = field(default_factory=Due)
    seq: int = 0
    caught_up: int = 0
    loss: Loss | None = None
    dropped: int = 0
    received: int = 0
    dump_cost: float = 0.0
    dump_rows: int = 0
    dump_ended: float = 0.0


# -- the kernel's messages ---------------------------------------------------------


def take_events(state: State, rounds: int) -> bool:
    """Apply the events that wait, up to so many bufferfuls. True: none waits any more."""
    batch = state.buffers.events
    for _ in range(rounds):
        began = time_ns()
        batch.clear()
        told = ct.receive(state.events.fileno(), state.buffers.raw, batch)
        if told.overrun:
            _overrun(state)
        if told.malformed:
            _unreadable(state, told.malformed)
        state.received += len(batch)
        apply(state, batch)
        if not told.datagrams and not told.overrun:
            state.caught_up = began
            return True
    return False


def apply(state: State, batch: ct.Batch, active: bool = False) -> None:
    """Apply rows to the table; commits what it closes, asks what it must know."""
    now, row = time_ns(), 0
    while row < len(batch):
        row, asks = state.table.apply(batch, now, state.buffers.flows, start=row, active=active)
        if len(asks):
            _ask(state, batch, asks)
        if row < len(batch) and not len(asks):
            commit(state)


def _ask(state: State, batch: ct.Batch, rows: NDArray[Any]) -> None:
    """Ask for entries whose owner has changed; their counters close the old share.

    The kernel answers while it takes a request, so that all answers wait once
    sending is done. No answer: it is gone, and its DESTROY is on its way.
    """
    answers = state.buffers.answers
    for first in range(0, len(rows), _ASKED_AT_ONCE):
        requests = b"".join(
            ct.get_request(batch, int(row), _seq(state))
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


def _seq(state: State) -> int:
    state.seq = state.seq % 0xFFFFFFFF + 1  # never 0: see ext/ct.h
    return state.seq


# -- dumps -----------------------------------------------------------------------------


def dump(state: State, active: bool) -> bool:
    """Look at all entries; with active, record what goes on. False: some may be missing.

    Events are applied before, so that few of them are older than the dump, and
    after it: an entry that went while it ran has told so in one of those, and
    what neither showed has ended unseen.
    """
    began = thread_time()
    take_events(state, ROUNDS)
    as_of = state.caught_up
    whole = _read_dump(state, active)
    # What the receive buffer can hold is as much as can have come meanwhile.
    caught_up = take_events(state, state.receive_buffer // _MIN_EVENT // _ROWS + ROUNDS)
    if whole and caught_up:
        while not state.table.sweep(time_ns(), state.buffers.flows):
            commit(state)
    state.dump_ended = monotonic()
    state.dump_cost = thread_time() - began
    state.dump_rows = len(state.table)
    _log.debug("dump: %d live, %.0f ms of CPU", state.dump_rows, state.dump_cost * 1e3)
    if active:
        commit(state)
        fresh.reached(state.fresh, as_of)
    return whole and caught_up


def rest(state: State) -> float:
    """Seconds after a dump before the next one may be had for the asking.

    By the processor's clock, since a busy machine makes dumps long but not
    dear, and by how many connections are left of those that were in the last.
    """
    left = min(1.0, (len(state.table) + 1) / (state.dump_rows + 1))
    return RESTING * state.dump_cost * left


def _read_dump(state: State, active: bool, show: Callable[[ct.Batch], None] | None = None) -> bool:
    """Apply a dump's rows, each batch shown first. False: the dump has holes."""
    batch = state.buffers.events
    state.table.dump_begin()
    nfct.start_dump(state.requests, _seq(state))
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


def resume(state: State) -> None:
    """The first dump, and what the store holds already of the connections in it."""
    last = store.begin_run(state.store, state.since)
    if not last:
        _read_dump(state, active=False)
        return
    store.begin_live(state.store)
    _read_dump(
        state,
        active=False,
        show=lambda batch: store.add_live(state.store, batch.columns(), last),
    )
    sums = store.recorded(state.store)
    rows = ct.FlowBatch(_ROWS)
    for first in range(0, len(sums["flow_id"]), _ROWS):
        rows.clear()
        rows.extend({name: column[first : first + _ROWS] for name, column in sums.items()})
        state.table.recorded(rows)


# -- losses ----------------------------------------------------------------------------


def _overrun(state: State) -> None:
    """The receive buffer was full. Events are lost from when we had last caught up."""
    events = _dropped(state)
    if state.loss is None:
        number = store.open_loss(state.store, state.caught_up, "overrun", events)
        state.loss = Loss(number, state.dropped)
        state.due.resync = monotonic()
        _log.warning("the receive buffer overran: events are lost, reading all entries anew")


def _dropped(state: State) -> int:
    """Events the kernel could not deliver since the last loss ended."""
    before = state.loss.dropped_before if state.loss else state.dropped
    return nfct.dropped(state.events) - before & 0xFFFFFFFF


def resync(state: State) -> None:
    """Read all entries; if nothing was lost meanwhile, the loss is over."""
    before = nfct.dropped(state.events)
    whole = dump(state, active=False)
    state.due.resync = monotonic() + max(0.05, rest(state))
    if whole and nfct.dropped(state.events) == before:
        end_loss(state)


def end_loss(state: State) -> None:
    """Note that the loss that goes on, if one does, is over."""
    if state.loss is not None:
        events = _dropped(state)
        store.close_loss(state.store, state.loss.id, time_ns(), events)
        _log.warning("about %d events were lost", events)
        state.dropped = nfct.dropped(state.events)
        state.loss = None


def _unreadable(state: State, messages: int) -> None:
    number = store.open_loss(state.store, state.caught_up, "unreadable", messages)
    store.close_loss(state.store, number, time_ns(), messages)
    _log.warning("%d messages of the kernel could not be read", messages)


# -- the store ----------------------------------------------------------------------


def commit(state: State) -> None:
    """Make what was closed durable."""
    flows = state.buffers.flows
    store.commit(state.store, flows.columns() if len(flows) else None, state.caught_up)
    flows.clear()
    state.due.commit = monotonic() + COMMIT_AFTER
    state.due.heartbeat = monotonic() + HEARTBEAT
