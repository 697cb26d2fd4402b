"""Times as typed and as shown."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netflow.when import SECOND, iso, parse_span, parse_time

pytestmark = pytest.mark.unit

NOW = int(datetime(2026, 3, 1, 12, 0, tzinfo=UTC).timestamp()) * SECOND
BERLIN = timezone(timedelta(hours=1))


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("2h", 7200), ("1h30m", 5400), ("1.5m", 90), ("1w", 604800)]
)
def test_a_span_is_read(text, seconds):
    assert parse_span(text) == seconds * SECOND


@pytest.mark.parametrize("text", ["", "2", "h", "2x", "-2h", "2h 3m", "1h30", "9999999999w"])
def test_what_is_no_span_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"90s|longer"):
        parse_span(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-03-01T03:12:30Z", datetime(2026, 3, 1, 3, 12, 30, tzinfo=UTC)),
        ("2026-03-01T03:12:30+01:00", datetime(2026, 3, 1, 2, 12, 30, tzinfo=UTC)),
        ("2026-03-01 03:12", datetime(2026, 3, 1, 2, 12, tzinfo=UTC)),
        ("2026-03-01", datetime(2026, 2, 28, 23, 0, tzinfo=UTC)),
        ("03:12", datetime(2026, 3, 1, 2, 12, tzinfo=UTC)),
        ("3:12:30", datetime(2026, 3, 1, 2, 12, 30, tzinfo=UTC)),
        ("now", datetime(2026, 3, 1, 12, 0, tzinfo=UTC)),
        ("2h", datetime(2026, 3, 1, 10, 0, tzinfo=UTC)),
        ("@86400", datetime(1970, 1, 2, tzinfo=UTC)),
    ],
)
def test_a_time_is_read_in_the_given_zone(text, expected):
    assert parse_time(text, NOW, BERLIN) == int(expected.timestamp()) * SECOND


def test_nanoseconds_survive():
    assert parse_time("2026-03-01T12:00:00.000000001Z", NOW) == NOW + 1
    assert parse_time("@0.25", NOW) == SECOND // 4


@pytest.mark.parametrize(
    "text", ["", "yesterday", "25:00", "2026-13-01", "@x", "@-5", "1960-01-01", "3000-01-01", "5"]
)
def test_what_is_no_time_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="2026-03-01T03:12"):
        parse_time(text, NOW)


@settings(deadline=None)
@given(st.integers(0, (1 << 63) - 1))
def test_a_time_that_is_shown_can_be_typed(at):
    assert parse_time(iso(at), NOW) == at


def test_a_shown_time_has_its_zone():
    assert iso(NOW + 5, 9) == "2026-03-01T12:00:00.000000005Z"
    assert iso(NOW + 5, 0) == "2026-03-01T12:00:00Z"
    shown = iso(NOW, 0, local=True)
    assert datetime.fromisoformat(shown).timestamp() * SECOND == NOW
