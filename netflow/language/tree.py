"""What a filter means: tests of one property each, joined. str() writes it as a filter again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Literal, get_args

from netflow import protocols

Network = IPv4Network | IPv6Network
Value = int | str | Network

Counter = Literal["bytes", "packets", "bps", "pps", "bpp"]
What = Literal[
    "ip", "nat ip", "port", "nat port", "nat", "xid", "slice", "node", "duration", "proto",
    "icmp-type", "icmp-code", "family", "reason", "state", "zone",
    "bytes", "packets", "bps", "pps", "bpp",
]  # fmt: skip
COUNTERS: tuple[str, ...] = get_args(Counter)

Side = Literal["any", "src", "dst", "both", "total"]
"""src is the originator, dst the responder. A counter has src, dst or total."""
Comparison = Literal["=", "<", "<=", ">", ">="]


@dataclass(frozen=True, slots=True)
class Test:
    """One property of a record, compared with values: with "=" it is any of them, else with one.

    Values: an address or network of ip and nat ip; a name, or a pattern with
    ``*``, ``?`` and ``[...]``, of slice and node; a number of all others (of
    family 4 or 6, of duration in milliseconds, of reason and state as in
    netflow.protocols). Of nat, which asks whether anything was translated, none.
    """

    __test__ = False  # pytest: this is no test

    what: What
    values: tuple[Value, ...] = ()
    comparison: Comparison = "="
    side: Side = "any"

    def __str__(self) -> str:
        name: str = self.what
        if name == "family":
            return f"ipv{self.values[0]}"
        if name == "nat":
            return name
        if name in ("ip", "nat ip") and len(self.values) == 1 and not _whole(self.values[0]):
            name = name.replace("ip", "net")
        texts = [_text(self.what, value) for value in self.values]
        side = "" if self.side == "any" or self.default_side == self.side else _SIDES[self.side]
        if len(texts) == 1:
            comparison = "" if self.comparison == "=" else self.comparison + " "
            return f"{side}{name} {comparison}{texts[0]}"
        return f"{side}{name} in [{' '.join(texts)}]"

    @property
    def default_side(self) -> Side:
        """What it means when no side is named."""
        return "src" if self.what in COUNTERS else "any"


_SIDES = {"src": "src ", "dst": "dst ", "both": "src and dst ", "total": "total "}


@dataclass(frozen=True, slots=True)
class All:
    """Every record."""

    def __str__(self) -> str:
        return "any"


@dataclass(frozen=True, slots=True)
class Not:
    """What a part does not match."""

    part: Expression

    def __str__(self) -> str:
        return f"not {_inner(self.part)}"


@dataclass(frozen=True, slots=True)
class And:
    """What all parts match; two or more, none of them And."""

    parts: tuple[Expression, ...]

    def __str__(self) -> str:
        return " and ".join(map(_inner, self.parts))


@dataclass(frozen=True, slots=True)
class Or:
    """What any part matches; two or more, none of them Or."""

    parts: tuple[Expression, ...]

    def __str__(self) -> str:
        return " or ".join(map(_inner, self.parts))


Expression = All | Not | And | Or | Test
ALL = All()


def negated(part: Expression) -> Expression:
    """Its contrary, not nested deeper than need be."""
    return part.part if isinstance(part, Not) else Not(part)


def joined(kind: type[And] | type[Or], parts: list[Expression]) -> Expression:
    """Parts of a chain as one; a chain within a chain of its kind is the same chain."""
    flat: list[Expression] = []
    for part in parts:
        flat += part.parts if isinstance(part, kind) else [part]
    return flat[0] if len(flat) == 1 else kind(tuple(flat))


def _inner(part: Expression) -> str:
    return f"({part})" if isinstance(part, And | Or) else str(part)


def _whole(value: Value) -> bool:
    return isinstance(value, Network) and value.prefixlen == value.max_prefixlen


def _text(what: What, value: Value) -> str:
    if isinstance(value, Network):
        return str(value.network_address if _whole(value) else value)
    if isinstance(value, str):
        # A word of the language, or what would be cut in two, needs quotes.
        if re.fullmatch(r"[A-Za-z0-9_.*?:@/-]+", value) and not value.replace("-", "").isalpha():
            return value
        return f"'{value}'" if '"' in value else f'"{value}"'
    if what == "proto":
        return protocols.name(value)
    if what == "reason":
        return protocols.REASONS[value]
    if what == "state":
        return protocols.tcp_state(value)
    return str(value)
