"""The page of behaviours and the table of tests name the same things."""

import re
from pathlib import Path

import behaviours
import pytest
from truth.table import ROWS

pytestmark = pytest.mark.unit
PAGE = Path(__file__).resolve().parents[2] / "docs" / "behaviours.md"


def test_each_behaviour_has_its_place_on_the_page_and_each_place_a_test():
    named = re.findall(r"^\*\*(.+)\*\*$", PAGE.read_text(), re.M)
    assert sorted(named) == sorted(one.name for one in behaviours.BEHAVIOURS)


@pytest.mark.parametrize("one", behaviours.BEHAVIOURS, ids=lambda one: one.name)
def test_each_behaviour_is_shown_by_something(one):
    assert one.run or one.rows
    assert set(one.rows) <= {row.name for row in ROWS}
