"""What each slice sent and received since the collector began, for metrics.

Counted as records are committed, so that asking costs nothing and no count
ever goes back. A slice has a slot, which is found by its xid as of now: the
slice that holds it, or held it last. There are MAX_NAMED; slices beyond
count together. A slot whose slice is gone, and that has rested, is free again.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vnet.registry import open_readonly

from netflow.ct import Reason
from netflow.names import MAX_NAMED, NODE, OTHER, changed
from netflow.when import SECOND

REST = 3600.0
"""Seconds without traffic after which the slot of a slice that is gone is free."""

_NOBODY, _REST_OF_THEM, _FIRST = 0, 1, 2  # slots
_UNKNOWN = np.uint16(65535)
KINDS = ("out_bytes", "in_bytes", "out_packets", "in_packets", "out_flows", "in_flows")


@dataclass
class Sums:
    """Counts by slot, one column for each of KINDS, and by reason.

    slot_of: by xid; last: when a slot counted something, in monotonic seconds.
    """

    registry: Path | None = None
    slots: int = MAX_NAMED
    lock: threading.Lock = field(default_factory=threading.Lock)
    named: dict[str, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)
    reasons: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(8, np.uint64))
    slot_of: NDArray[np.uint16] = field(default_factory=lambda: np.full(65536, _UNKNOWN))
    holders: dict[int, tuple[str, bool]] = field(default_factory=dict)
    seen: tuple[int, int] | None = None
    looked: float = 0.0
    totals: NDArray[np.uint64] = field(init=False)
    last: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.totals = np.zeros((self.slots + _FIRST, len(KINDS)), np.uint64)
        self.last = np.zeros(self.slots + _FIRST)
        self.free = list(range(self.slots + _FIRST - 1, _FIRST - 1, -1))


def add(sums: Sums, flows: Mapping[str, NDArray[Any]]) -> None:
    """Count a batch of records (columns of a FlowBatch)."""
    now = monotonic()
    with sums.lock:
        _look(sums, now)
        oxid, rxid = flows["oxid"], flows["rxid"]
        originators, responders = _slots(sums, oxid), _slots(sums, rxid)
        # Where a slice is on one side, the other side's nobody does not count.
        nobody = len(sums.totals)
        originators[(oxid == 0) & (rxid != 0)] = nobody
        responders[rxid == 0] = nobody
        sent, replied = (flows["obytes"], flows["opackets"]), (flows["rbytes"], flows["rpackets"])
        began = flows["flow_start"] == flows["start"]
        for slots, out, back, flow in (
            (originators, sent, replied, "out_flows"),
            (responders, replied, sent, "in_flows"),
        ):
            _count(sums, slots, "out_bytes", out[0])
            _count(sums, slots, "in_bytes", back[0])
            _count(sums, slots, "out_packets", out[1])
            _count(sums, slots, "in_packets", back[1])
            _count(sums, slots, flow, began)
            sums.last[np.bincount(slots, minlength=nobody + 1)[:nobody] > 0] = now
        sums.reasons += np.bincount(flows["reason"], minlength=8)[:8].astype(np.uint64)


def _count(sums: Sums, slots: NDArray[Any], kind: str, amounts: NDArray[Any]) -> None:
    # Sums of one batch stay below 2^53, where doubles are exact.
    size = len(sums.totals)
    sum_ = np.bincount(slots, weights=amounts, minlength=size + 1)[:size]
    sums.totals[:, KINDS.index(kind)] += sum_.astype(np.uint64)


def _slots(sums: Sums, xids: NDArray[Any]) -> NDArray[Any]:
    slots = sums.slot_of[xids]
    unknown = slots == _UNKNOWN
    if unknown.any():
        for xid in np.unique(xids[unknown]):
            sums.slot_of[xid] = _slot(sums, int(xid))
        slots = sums.slot_of[xids]
    return np.asarray(slots, dtype=np.intp)


def _slot(sums: Sums, xid: int) -> int:
    if xid == 0:
        return _NOBODY
    name, _ = sums.holders.get(xid, (f"xid {xid}", False))
    if name not in sums.named:
        if not sums.free:
            return _REST_OF_THEM
        sums.named[name] = sums.free.pop()
    return sums.named[name]


def _look(sums: Sums, now: float) -> None:
    """See who holds which xid, if that has changed; once a minute, free what has rested."""
    found = changed(sums.registry) if sums.registry else (0, -1)
    if found != sums.seen:
        holders = _holders(sums.registry)
        # File times tick in milliseconds: a fresh file is not trusted yet. And what could not
        # be read may be readable: there may have been no descriptor left.
        trusted = holders is not None and time_ns() - found[0] > 2 * SECOND
        sums.seen = found if trusted else None
        sums.holders = holders or {}
        sums.slot_of[:] = _UNKNOWN
    if now - sums.looked < 60:
        return
    sums.looked = now
    held = {name for name, holds in sums.holders.values() if holds}
    for name, slot in list(sums.named.items()):
        if name not in held and now - sums.last[slot] > REST:
            del sums.named[name]
            sums.totals[slot] = 0
            sums.free.append(slot)
            sums.slot_of[:] = _UNKNOWN


def _holders(registry: Path | None) -> dict[int, tuple[str, bool]] | None:
    """{xid: who holds it or held it last, whether still}. Without a registry nobody does.

    None: it cannot be read.
    """
    if registry is None:
        return {}
    try:
        with open_readonly(registry) as opened:
            return {t.xid: (t.slice, t.until is None) for t in opened.tenures()}
    except FileNotFoundError:
        return {}
    except (OSError, sqlite3.Error):
        return None


def by_slice(sums: Sums) -> dict[str, dict[str, int]]:
    """{slice: {kind: count}}, NODE's and OTHER's among them."""
    with sums.lock:
        slots = {NODE: _NOBODY, OTHER: _REST_OF_THEM, **sums.named}
        return {
            name: dict(zip(KINDS, sums.totals[slot].tolist(), strict=True))
            for name, slot in slots.items()
        }


def by_reason(sums: Sums) -> dict[str, int]:
    """{why a record was closed: how many}."""
    with sums.lock:
        return {reason.name.lower(): int(sums.reasons[reason]) for reason in Reason}
