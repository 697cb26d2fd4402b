"""What can be asked of the records: a module for each question.

Each takes the store's cursor, the request, names, the period, whom it is for
(scope) and where its lines go: a header, rows, a trailer. ANSWERS says which.
"""

from __future__ import annotations

from collections.abc import Callable

from netflow.questions.after import after
from netflow.questions.common import Period, Put, address, period
from netflow.questions.coverage import coverage
from netflow.questions.files import files
from netflow.questions.flows import FLOW_COLUMNS, flows
from netflow.questions.scans import scans
from netflow.questions.series import series
from netflow.questions.spoofed import spoofed
from netflow.questions.top import top
from netflow.questions.who import who
from netflow.wire import Coverage, Flows, Scans, Series, Spoofed, Top, Who

ANSWERS: dict[type, Callable[..., None]] = {
    Flows: flows,
    Top: top,
    Who: who,
    Series: series,
    Scans: scans,
    Spoofed: spoofed,
    Coverage: coverage,
}

__all__ = [
    "ANSWERS",
    "FLOW_COLUMNS",
    "Period",
    "Put",
    "address",
    "after",
    "files",
    "flows",
    "period",
    "top",
]
