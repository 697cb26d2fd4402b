"""Which slice's name stands for an xid when: what must be told before which record.

A receiver takes the name it was told last. So names go before the first record
that they hold for, and again when another slice has got the xid.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from netflow.ipfix.records import Columns


class Tenure(NamedTuple):
    """A slice held an xid from since to until (ns UTC). after: when the one before it ended."""

    xid: int
    slice: str
    after: int
    since: int
    until: int


def runs(
    columns: Columns, tenures: Sequence[Tenure], told: Mapping[int, str]
) -> Iterator[tuple[int, int, dict[int, str]]]:
    """Parts of the records (first, last + 1), and the names to tell before each.

    As a rule it is one: an xid rests before it is given to another slice.
    """
    count = len(columns["proto"])
    changes: defaultdict[int, dict[int, str]] = defaultdict(dict)
    held: defaultdict[int, list[Tenure]] = defaultdict(list)
    for tenure in tenures:
        held[tenure.xid].append(tenure)
    for xid, of in held.items():
        for at, name in _changes(columns, xid, of, told.get(xid)):
            changes[at][xid] = name
    cuts = sorted({0, count, *changes})
    for first, last in pairwise(cuts):
        yield first, last, changes.get(first, {})


def _changes(
    columns: Columns, xid: int, tenures: list[Tenure], told: str | None
) -> Iterator[tuple[int, str]]:
    """Where another name begins to hold for an xid."""
    rows = np.flatnonzero((columns["oxid"] == xid) | (columns["rxid"] == xid))
    if len(tenures) == 1 and tenures[0].slice == told:
        return
    which = _held(columns["start_time"][rows], columns["end_time"][rows], tenures)
    steps = np.flatnonzero(np.diff(which, prepend=-2))
    for step in steps:
        if which[step] >= 0 and (name := tenures[which[step]].slice) != told:
            yield int(rows[step]), name
            told = name


def _held(start: NDArray[Any], end: NDArray[Any], tenures: list[Tenure]) -> NDArray[np.int64]:
    """Which tenure names each record, -1 for none: netflow.names.join says the same in SQL."""
    found = np.full(len(start), -1, dtype=np.int64)
    for number, t in enumerate(tenures):
        found[(t.until > start) & (t.after <= start) & (t.since <= end)] = number
    return found
