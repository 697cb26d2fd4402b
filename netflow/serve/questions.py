"""What can be asked over HTTP: a line for each question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from netflow import shapes
from netflow.serve import models, params
from netflow.shapes import Shape


@dataclass(frozen=True)
class Question:
    """A path under /v1, its parameters, how its answer looks, and its model for the document."""

    path: str
    asks: type[params.Which]
    shape: Callable[[Any], Shape]
    answer: type[BaseModel]
    says: str


def _question(
    path: str, asks: type[params.Which], shape: Shape, says: str, row: type[BaseModel] | None = None
) -> Question:
    name = path.capitalize()
    rows = {shape.key: row or models.row(f"{name}Row", shape.columns)}
    return Question(path, asks, lambda _: shape, models.answer(name, rows), says)


_TOPS = [shapes.top(of, True) for of in ("slice", "peer", "port", "proto", "node")]

QUESTIONS = (
    _question("flows", params.FlowsOf, shapes.FLOWS, "Records, in order of time.", models.Record),
    Question(
        "top",
        params.TopOf,
        lambda asked: shapes.top(asked.of, bool(asked.inside)),
        models.answer("Top", {s.key: models.row(f"{s.key.capitalize()}Row", s.columns)
                              for s in _TOPS}),
        "Who used the network most.",
    ),
    _question("who", params.WhoWas, shapes.WHO, "Which slice had to do with a peer at a time."),
    _question("series", params.SeriesOf, shapes.SERIES, "Sums by time."),
    _question("scans", params.ScansBy, shapes.SCANS, "Which slices tried many hosts or ports."),
    _question("spoofed", params.SpoofedBy, shapes.SPOOFED, "Who sent as somebody else."),
    _question("coverage", params.CoverageOf, shapes.COVERAGE, "Which share is attributed."),
)  # fmt: skip
