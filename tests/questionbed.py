"""Questions asked of a store as a collector asks them, without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from storebed import SEC, T0, addr, tenures

from netflow import access, names, questions, store
from netflow.questions import local

OURS = ["10.0.0.1", "192.0.2.1"]
"""The node's addresses."""
PEER = "198.51.100.7"
KNOWN = ((7, "a", -100, None), (8, "b", -100, 900))
"""Slices: xid, name, from when to when."""
OWN_A = access.Scope(frozenset({"a"}))
"""What a user of slice a may see."""
AGO = 10_000
"""Seconds before T0 that the collector began."""


@dataclass
class Asked:
    """A store, and how to ask it."""

    store: store.Store
    known: Any = field(default_factory=lambda: tenures(*KNOWN))

    def all(
        self, question: Any, scope: access.Scope = access.ALL, now: int = T0 + 1000 * SEC
    ) -> tuple[Any, list[dict[str, Any]], Any]:
        """Header, rows and trailer."""
        lines: list[Any] = []
        period = questions.period(self.store.con, question.filter, now, now)
        answer = questions.ANSWERS[type(question)]
        answer(self.store.con, question, self.known, period, scope, lines.append)
        header, *rows, trailer = lines
        assert trailer.rows == len(rows)
        return header, [dict(zip(header.columns, row, strict=True)) for row in rows], trailer

    def rows(self, question: Any, scope: access.Scope = access.ALL) -> list[dict[str, Any]]:
        """Its rows."""
        return self.all(question, scope)[1]


@contextmanager
def asked(path: Path, patch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """A node with OURS and KNOWN, whose collector has run since AGO."""
    ours = [hi << 64 | low for hi, low in map(addr, OURS)]
    patch.setattr(names, "tenures", lambda known, now: known.params)
    patch.setattr(local, "addresses", lambda: ours)
    kept = store.open_store(path)
    store.begin_run(kept, store.Mark(T0 - AGO * SEC))
    yield Asked(kept)
    kept.con.close()


def of(row: dict[str, Any], *columns: str) -> tuple[Any, ...]:
    """Some of its columns."""
    return tuple(row[column] for column in columns)
