"""A pytest plugin: what the runs have seen is kept in build/truth.

It comes with the reports of the tests, since a guest's files are gone with it.
"""

from pathlib import Path

import pytest

from truth.page import PROPERTY, from_json

WHERE = Path(__file__).resolve().parents[2] / "build" / "truth"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep it."""
    for name, value in report.user_properties if report.when == "call" else ():
        if name == PROPERTY:
            run = from_json(str(value))
            WHERE.mkdir(parents=True, exist_ok=True)
            (WHERE / f"{run.kernel}-{run.block.replace(' ', '-')}.json").write_text(str(value))
