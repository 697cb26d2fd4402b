"""Amounts of bytes as people write them."""

import re

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)([kMGT]?)")


def parse_part(text: str) -> tuple[int, float]:
    """``2G`` as bytes, ``5%`` as a part of the whole: (bytes, part), one of them 0.

    Raises ValueError with a message for people.
    """
    if text.endswith("%"):
        number = text[:-1]
        if re.fullmatch(r"\d+(\.\d+)?", number) and float(number) < 100:
            return 0, float(number) / 100
    elif found := _AMOUNT.fullmatch(text):
        return int(float(found[1]) * _UNITS[found[2]]), 0.0
    raise ValueError(f"{text!r} is not an amount: write 5%, 500M, 2G, or 0")
