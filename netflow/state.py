"""What the collector knows while it follows the kernel, and how its records are committed."""

from __future__ import annotations

import socket
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic

from netflow import clock, ct, estimate, store, systemd, writer
from netflow.clock import Now
from netflow.fresh import Fresh
from netflow.sums import Sums, add

COMMIT_AFTER = 1.0
"""Seconds: a record is in the store at most so long after it was closed."""
HEARTBEAT = 5.0
"""Seconds between signs of life in an idle store: how exactly the end of a
collector that was killed is known."""
ROWS = 160_000
"""Records a commit takes at most. DuckDB writes 122,880 and more at once past
its log (a row group), which costs a third of what small commits cost."""
EVENTS = 16_384

_RECEIVE = 64 * 1024  # 16 events at once; the kernel gives at most 32 KB of a dump
_STALLED = 1.0  # seconds between looks at a writer that is waited for


def _spare() -> SimpleQueue[ct.FlowBatch]:
    batches: SimpleQueue[ct.FlowBatch] = SimpleQueue()
    batches.put(ct.FlowBatch(ROWS))
    return batches


@dataclass
class Buffers:
    """Memory that is used again and again. answers: room for one receive's rows.

    flows is being filled; what is spare was written. Pages that were never
    filled cost nothing.
    """

    events: ct.Batch = field(default_factory=lambda: ct.Batch(EVENTS))
    answers: ct.Batch = field(default_factory=lambda: ct.Batch(2048))
    flows: ct.FlowBatch = field(default_factory=lambda: ct.FlowBatch(ROWS))
    spare: SimpleQueue[ct.FlowBatch] = field(default_factory=_spare)
    raw: bytearray = field(default_factory=lambda: bytearray(_RECEIVE))


@dataclass
class Loss:
    """A loss: its number in the store, and what had been dropped and never ended before it.

    When it is over: until when it went on (ns), and the events it cost.
    """

    id: Future[int]
    dropped_before: int
    never_ended_before: int
    until: int = 0
    events: int = 0


@dataclass
class Due:
    """When what is to be done next, in monotonic seconds."""

    dump: float = 0.0
    resync: float = 0.0
    commit: float = 0.0
    heartbeat: float = 0.0


@dataclass
class State:
    """What the loop knows.

    began: when the run did. caught_up: no event up to then waits unread.
    looked: when the clocks were last compared. full_since: up to when records are
    stored (ns UTC), while the disk is full; else 0. loss: one that goes on. owed:
    those that are over, but ends of connections may still be told.
    """

    receive_buffer: int
    store: store.Store
    writer: writer.Writer
    events: socket.socket
    requests: socket.socket
    fresh: Fresh
    began: Now
    caught_up: Now
    looked: Now
    rates: estimate.Rates
    table: ct.Table = field(default_factory=ct.Table)
    sums: Sums = field(default_factory=Sums)
    buffers: Buffers = field(default_factory=Buffers)
    due: Due = field(default_factory=Due)
    seq: int = 0
    loss: Loss | None = None
    owed: list[Loss] = field(default_factory=list)
    dropped: int = 0
    received: int = 0
    full_since: int = 0
    dump_cost: float = 0.0
    dump_rows: int = 0
    dump_ended: float = 0.0


def next_seq(state: State) -> int:
    """A sequence number for a request; never 0: see ext/ct.h."""
    state.seq = state.seq % 0xFFFFFFFF + 1
    return state.seq


def mark(state: State) -> store.Mark:
    """How far the collector is, for the store."""
    opened = estimate.opens()
    rate = estimate.rate(state.rates, clock.now(), opened)
    return store.Mark(
        state.caught_up.real, state.caught_up.boot, max(opened, 0), rate.per_open, rate.per_second
    )


def commit(state: State) -> None:
    """Have what was closed made durable. Waits only for a writer that is a whole batch behind."""
    flows = state.buffers.flows
    state.due.commit = monotonic() + COMMIT_AFTER
    state.due.heartbeat = monotonic() + HEARTBEAT
    if not len(flows):
        writer.post(state.writer, partial(store.commit, state.store, None, mark(state)))
        return
    estimate.count(state.rates, flows.columns(), clock.now())
    writer.post(state.writer, partial(_write, state, flows, mark(state)))
    state.buffers.flows = _next_batch(state)


def _write(state: State, flows: ct.FlowBatch, upto: store.Mark) -> None:
    store.commit(state.store, flows.columns(), upto)
    add(state.sums, flows.columns())
    flows.clear()
    state.buffers.spare.put(flows)


def _next_batch(state: State) -> ct.FlowBatch:
    while True:
        try:
            return state.buffers.spare.get(timeout=_STALLED)
        except Empty:
            writer.check(state.writer)
            systemd.notify("WATCHDOG=1")  # the disk is slow: that is no reason to be killed
