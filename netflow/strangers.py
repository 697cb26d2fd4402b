"""Ends of connections that are not known but may be in the store.

After a restart, a connection that the collector before recorded shares of may
end between this one's first event and its first dump, or its end may be told
again by the kernel, which repeats what a listener had no room for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from time import time_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netflow import ct, store, writer
from netflow.state import State, commit

_KEY = (
    "flow_id", "zone", "proto", "src_hi", "src_lo", "dst_hi", "dst_lo", "sport", "dport"
)  # fmt: skip
_COUNTS = ("opackets", "obytes", "rpackets", "rbytes")
_ENDED = (ct.Reason.IDLE, ct.Reason.CLOSED, ct.Reason.CUT)
ANY_TIME = 1 << 62

Columns = Mapping[str, NDArray[Any]]
Held = dict[tuple[int, ...], dict[str, int]]
"""What the store holds of some connections, by their key."""


def ends(batch: ct.Batch, before: int, first: int = 0) -> dict[str, NDArray[Any]]:
    """Copies of the rows from first on that end a connection begun before a time (ns)."""
    old = (batch["msg"][first:] == ct.Msg.DESTROY) & (batch["start"][first:] < before)
    rows = first + np.flatnonzero(old)
    return {name: column[rows] for name, column in batch.columns().items()}


def held(state: State, batch: ct.Batch, first: int) -> Held:
    """What the store holds of the connections that end from this row on."""
    entries = ends(batch, state.began.real, first)
    # What is still on its way there counts, too: earlier jobs are done before.
    return _by_key(writer.call(state.writer, partial(_look_up, state.store, entries)))


def _look_up(kept: store.Store, entries: Columns) -> Columns:
    store.begin_live(kept)
    store.add_live(kept, entries, ANY_TIME)
    sums = store.recorded(kept)
    store.end_live(kept)
    return sums


def _by_key(sums: Columns) -> Held:
    names = [*_KEY, "flow_start", "end", "reason", *_COUNTS]
    rows = zip(*(sums[name].tolist() for name in names), strict=True)
    found = (dict(zip(names, map(int, row), strict=True)) for row in rows)
    return {tuple(row[name] for name in _KEY): row for row in found}


def settle(state: State, batch: ct.Batch, row: int, known: Held) -> None:
    """Record of an end what the store does not hold yet. See ct_table_settle() in ext/ct.h."""
    key = tuple(int(batch["id" if name == "flow_id" else name][row]) for name in _KEY)
    told = ct.FlowBatch(1)
    if sums := known.get(key):
        all_of_it = all(sums[name] >= batch[name][row] for name in _COUNTS)
        if sums["reason"] in _ENDED and all_of_it:
            return
        told.extend({name: [value] for name, value in sums.items()})
    if state.buffers.flows.capacity - len(state.buffers.flows) < 4:
        commit(state)
    state.table.settle(batch, row, time_ns(), told, state.buffers.flows)
