"""Times as people write them, and as records carry them: nanoseconds UTC."""

import re
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache

SECOND = 1_000_000_000
HOUR = 3600 * SECOND

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SPAN = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_FRACTION = re.compile(r"\.(\d+)")
_LIMIT = 1 << 63


def parse_span(text: str) -> int:
    """A length of time such as ``90s``, ``2h`` or ``1h30m``, in nanoseconds.

    Raises ValueError with a message for people.
    """
    parts = _SPAN.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is not a length of time: write 90s, 15m, 2h, 1d or 1h30m")
    span = int(sum(float(number) * _UNITS[unit] for number, unit in parts) * SECOND)
    if span >= _LIMIT:
        raise ValueError(f"{text!r} is longer than time is counted here")
    return span


def parse_time(text: str, now: int, zone: tzinfo | None = None) -> int:
    """A point in time, in nanoseconds since the epoch.

    Takes ISO 8601 (``2026-03-01T03:12``, with a zone or in the given one, by
    default this machine's), a time of today (``03:12:30``), a day, seconds
    since the epoch (``@1772334720.5``), ``now``, or an age (``2h`` means two
    hours before now). Raises ValueError with a message for people.
    """
    text = text.strip()
    if text == "now":
        return now
    if _SPAN.match(text) and text[-1] in _UNITS:
        return max(0, now - parse_span(text))
    try:
        if text.startswith("@"):
            whole, _, fraction = text[1:].partition(".")
            return _in_range(int(whole) * SECOND + int((fraction + "0" * 9)[:9]))
        return _in_range(_parse_iso(text, now, zone))
    except (ValueError, OverflowError, OSError):
        raise ValueError(
            f"{text!r} is not a time: write 2026-03-01T03:12:30, 2026-03-01T03:12Z, 03:12, "
            "@1772334720, now, or an age such as 2h"
        ) from None


def _parse_iso(text: str, now: int, zone: tzinfo | None) -> int:
    # datetime keeps microseconds; a record's own time must survive the way
    # out and in again, so the nanoseconds are read here.
    fraction = _FRACTION.search(text)
    nanoseconds = int((fraction[1] + "0" * 9)[:9]) if fraction else 0
    text = _FRACTION.sub("", text, count=1)
    if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?", text):
        today = datetime.fromtimestamp(now // SECOND, zone).date().isoformat()
        text = f"{today}T{text.zfill(len('00:00:00') if text.count(':') == 2 else len('00:00'))}"
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        at = at.replace(tzinfo=zone) if zone else at.astimezone()
    whole = (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)
    return whole * SECOND + nanoseconds


def _in_range(at: int) -> int:
    if not 0 <= at < _LIMIT:
        raise ValueError("before 1970 or after 2262")
    return at


@lru_cache(4096)
def _second(second: int, local: bool) -> tuple[str, str]:
    at = datetime.fromtimestamp(second, UTC)
    if not local:
        return at.strftime("%Y-%m-%dT%H:%M:%S"), "Z"
    at = at.astimezone()
    text = at.isoformat(timespec="seconds")
    return text[:19], text[19:]


def iso(at: int, digits: int = 9, local: bool = False) -> str:
    """ISO 8601 with its zone: UTC, or this machine's zone when local is set."""
    text, zone = _second(at // SECOND, local)
    if not digits:
        return text + zone
    return f"{text}.{at % SECOND:09d}"[: 20 + digits] + zone
