"""What the words between keywords mean. All raise ValueError with a message for people."""

from __future__ import annotations

import re
from ipaddress import IPv4Network, IPv6Network, ip_network

from netflow import protocols
from netflow.language.errors import suggestion
from netflow.language.tree import Network
from netflow.when import parse_span

_SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_AMOUNT = re.compile(r"([0-9]+)([kmgt]?)", re.IGNORECASE | re.ASCII)
_MILLISECOND = 1_000_000
MAX = (1 << 64) - 1


def number(text: str, last: int, what: str) -> int:
    """A plain number from 0 to last."""
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and int(text) <= last):
        raise ValueError(f"{text!r} is not {what}: write 0 to {last}")
    return int(text)


def amount(text: str) -> int:
    """``1500``, ``10k``, ``2G``; k is 1000, as for nfdump."""
    found = _AMOUNT.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is not an amount: write 1500, 10k, 2m, 1g or 1t")
    value = int(found[1][:25]) * _SCALES[found[2].lower()]
    if len(found[1]) > 20 or value > MAX:
        raise ValueError(f"{text!r} is more than is ever counted")
    return value


def milliseconds(text: str) -> int:
    """``1500`` and ``1500ms``; ``2s``, ``1h30m``. A lone ``m`` would be a million to nfdump."""
    low = text.lower()
    if low.isascii() and low.removesuffix("ms").isdigit():
        return number(low.removesuffix("ms"), MAX, "a number of milliseconds")
    if re.fullmatch(r"[0-9.]+m", low):
        raise ValueError(
            f"{text!r} is minutes or, to nfdump, a million milliseconds: write {low[:-1]}m0s "
            "or a number of milliseconds"
        )
    if re.fullmatch(r"[0-9]+k", low):
        return amount(low)
    try:
        return parse_span(low) // _MILLISECOND
    except ValueError:
        raise ValueError(
            f"{text!r} is not a length of time: write milliseconds, or 500ms, 2s, 1h, 1h30m"
        ) from None


def network(text: str, mask: str | None = None) -> Network:
    """``A``, ``A/len`` or ``A`` and a mask; host bits may be set, as for nfdump."""
    try:
        found = ip_network(text if mask is None else f"{text}/{mask}", strict=False)
    except ValueError:
        raise ValueError(
            f"{text!r} is not an address or a network: write 192.0.2.1, 192.0.2.0/24 "
            "or 2001:db8::/32 (names are not looked up)"
        ) from None
    if isinstance(found, IPv6Network):
        if found.network_address.scope_id is not None:
            raise ValueError(f"{text!r}: write the address without %, zones are not recorded")
        four = found.network_address.ipv4_mapped
        if four is not None and found.prefixlen >= 96:
            return IPv4Network((int(four), found.prefixlen - 96))
    return found


def address(text: str) -> Network:
    """One address, as the network that holds nothing else."""
    found = network(text)
    if found.prefixlen != found.max_prefixlen:
        raise ValueError(f"{text!r} is a network: write `net {text}`, or `ip in [{text}]`")
    return found


def protocol(text: str) -> int:
    """A name or a number."""
    try:
        return protocols.parse(text)
    except ValueError as error:
        raise ValueError(f"{error}{suggestion(text, protocols.NAMES.values())}") from None


def reason(text: str) -> int:
    """Why a record was closed, as a number."""
    return _named(text, {name: number for number, name in protocols.REASONS.items()}, "a reason")


def state(text: str) -> int:
    """TCP's state, as a number."""
    return _named(text, {name: n for n, name in enumerate(protocols.TCP_STATES)}, "a state of TCP")


def _named(text: str, known: dict[str, int], what: str) -> int:
    low = text.lower().replace("-", "_")
    if low not in known:
        raise ValueError(
            f"{text!r} is not {what}: write one of {', '.join(known)}{suggestion(low, known)}"
        )
    return known[low]


def name(text: str) -> str:
    """A slice's or a node's name, or a pattern of such."""
    if not text:
        raise ValueError("an empty name is nobody's")
    if not text.isprintable() or ('"' in text and "'" in text):
        raise ValueError(f"{text!r} is not a name or a pattern")
    if is_pattern(text):
        regex(text)
    return text


def is_pattern(text: str) -> bool:
    """It stands for more names than itself."""
    return any(mark in text for mark in "*?[")


_PIECE = re.compile(r"\*+|\?|\[(!?)([^\[\]]+)\]|(.)", re.DOTALL)
_RANGE = re.compile(r"(.)-(.)|(.)", re.DOTALL)


def regex(pattern: str) -> str:
    """A pattern as a regular expression that matches whole names, for RE2 and Python alike.

    Not DuckDB's GLOB, whose time grows with the power of the number of ``*``.
    """
    parts: list[str] = []
    for piece in _PIECE.finditer(pattern):
        if piece[3] == "[":
            raise ValueError(f"{pattern!r}: a [ has no ] that closes it, or nothing in between")
        if piece[3]:
            parts.append(_literal(piece[3]))
        elif piece[2]:
            parts.append(f"[{'^' if piece[1] else ''}{_characters(pattern, piece[2])}]")
        else:
            parts.append("." if piece[0] == "?" else ".*")
    return "".join(parts)


def _characters(pattern: str, text: str) -> str:
    parts: list[str] = []
    for found in _RANGE.finditer(text):
        if found[3]:
            parts.append(_literal(found[3]))
        elif found[1] > found[2]:
            raise ValueError(f"{pattern!r}: {found[0]} is the wrong way round")
        else:
            parts.append(f"{_literal(found[1])}-{_literal(found[2])}")
    return "".join(parts)


def _literal(character: str) -> str:
    return character if character.isalnum() else f"\\{character}"
