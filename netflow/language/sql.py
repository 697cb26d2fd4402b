"""A filter as a condition over records: see netflow.history.source for the columns.

The tenures of both sides' xids are joined as ``o`` and ``r``. All values are
parameters. Of SQL's three truth values, NULL counts as false wherever it comes
from (no name, nothing translated): ``NOT`` is therefore ``IS NOT TRUE``.

Each function gives the condition of one kind of test, or of one column; an
address is compared by halves, which files are sorted by.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Network

from netflow.language import values
from netflow.language.tree import All, And, Expression, Network, Not, Or, Side, Test, Value
from netflow.protocols import ICMP, ICMPV6

Put = Callable[[Value | list[Value]], str]
"""Keeps a value as a parameter, and returns its name in SQL."""

_COLUMN = "{}"
"""Stands for a column in conditions that more than one is to meet."""
_V4 = 0xFFFF << 32
"""IPv4 addresses are ::ffff:a.b.c.d: first half 0, second half from here on."""
_HALF = (1 << 64) - 1
_TCP = 6
_ICMP = f"proto IN ({ICMP}, {ICMPV6})"
# As files keep it: both ends in whole milliseconds, rounded down.
_MS = "(epoch_ns(end_time) // 1000000 - epoch_ns(start_time) // 1000000)"


def condition(expression: Expression, put: Put) -> str:
    """SQL that is true of the records a filter matches, and false or NULL of others."""
    match expression:
        case All():
            return "true"
        case Not(part):
            return f"({condition(part, put)}) IS NOT TRUE"
        case And(parts):
            return " AND ".join(f"({condition(part, put)})" for part in parts)
        case Or(parts):
            return " OR ".join(f"({condition(part, put)})" for part in parts)
        case Test():
            return _test(expression, put)


def _test(test: Test, put: Put) -> str:
    match test.what:
        case "ip":
            inside = within(test.values, put)
            return _sides(test.side, lambda side: f"{inside(side)} OR {inside('n' + side)}")
        case "nat ip":
            inside = within(test.values, put)
            return _sides(test.side, lambda side: f"{inside('n' + side)} AND {_translated(side)}")
        case "port":
            fits = _number("USMALLINT", test, put)
            one = _sides(test.side, lambda s: f"{fits(f'{s[0]}port')} OR {fits(f'n{s[0]}port')}")
            return f"NOT {_ICMP} AND {one}"
        case "nat port":
            fits = _number("USMALLINT", test, put)
            new = _sides(
                test.side, lambda s: f"{fits(f'n{s[0]}port')} AND n{s[0]}port <> {s[0]}port"
            )
            return f"NOT {_ICMP} AND {new}"
        case "nat":
            ports = f"(NOT {_ICMP} AND (nsport <> sport OR ndport <> dport))"
            return f"{_translated('src')} OR {_translated('dst')} OR {ports}"
        case "xid":
            fits = _number("USMALLINT", test, put)
            return _sides(test.side, lambda side: fits(f"{_OWNER[side]}xid"))
        case "slice":
            named = _named(test.values, put)
            return _sides(test.side, lambda side: named(f"{_OWNER[side]}.slice"))
        case "node":
            return _named(test.values, put)("f.node")
        case "proto" | "reason":
            return _number("UTINYINT", test, put)(test.what)
        case "zone":
            return _number("USMALLINT", test, put)("zone")
        case "state":
            return f"proto = {_TCP} AND {_number('UTINYINT', test, put)('tcp_state')}"
        case "icmp-type":
            return f"{_ICMP} AND {_number('USMALLINT', test, put)('(dport >> 8)')}"
        case "icmp-code":
            return f"{_ICMP} AND {_number('USMALLINT', test, put)('(dport & 255)')}"
        case "family":
            four = _is_v4("src")
            return four if test.values == (4,) else f"NOT {four}"
        case "duration":
            return _number("HUGEINT", test, put)(_MS)
        case "bytes" | "packets":
            kind = "HUGEINT" if test.side == "total" else "UBIGINT"
            return _number(kind, test, put)(_count(test.what, test.side))
        case "bps":
            rate = _rate(f"8000 * {_huge('bytes', test.side)}", _MS)
        case "pps":
            rate = _rate(f"1000 * {_huge('packets', test.side)}", _MS)
        case "bpp":
            rate = _rate(_huge("bytes", test.side), _huge("packets", test.side))
    return _number("HUGEINT", test, put)(rate)


_OWNER = {"src": "o", "dst": "r"}


def _sides(side: Side, of: Callable[[str], str]) -> str:
    """The condition of one side, of either, or of both."""
    if side in ("src", "dst"):
        return f"({of(side)})"
    joint = " AND " if side == "both" else " OR "
    return f"({joint.join(f'({of(one)})' for one in ('src', 'dst'))})"


def _any(tests: Iterable[str]) -> str:
    return "(" + " OR ".join(tests) + ")"


def _number(kind: str, test: Test, put: Put) -> Callable[[str], str]:
    """The condition that a column of this type is what a test wants."""
    if len(test.values) == 1:
        wanted = f"{test.comparison} {put(test.values[0])}::{kind}"
        return lambda column: f"{column} {wanted}"
    return _listed(kind, test.values, put)


def _listed(kind: str, numbers: Sequence[Value], put: Put) -> Callable[[str], str]:
    """One of many, as one parameter: DuckDB would take seconds to plan as many comparisons.

    It looks list_contains() up in a hash table, of megabytes for each; list_position()
    reads through the list, 0.5 ns a number.
    """
    wanted = f"{put(list(numbers))}::{kind}[]"
    if len(numbers) > _LONG:
        return lambda column: f"list_contains({wanted}, {column})"
    return lambda column: f"list_position({wanted}, {column}) > 0"


_LONG = 400
"""Two lists that are longer fit into a filter: its memory is bounded."""


def _named(names: tuple[Value, ...], put: Put) -> Callable[[str], str]:
    """The condition that a column's name is, or is like, any of some."""
    tests = []
    for name in map(str, names):
        if not values.is_pattern(name):
            tests.append(f"{_COLUMN} = {put(name)}::VARCHAR")
        elif not values.is_pattern(name[:-1]):
            tests.append(f"starts_with({_COLUMN}, {put(name[:-1])}::VARCHAR)")
        else:
            tests.append(f"regexp_full_match({_COLUMN}, {put(values.regex(name))}::VARCHAR)")
    return lambda column: _any(test.replace(_COLUMN, column) for test in tests)


# -- counters ----------------------------------------------------------------------------


def _count(what: str, side: Side) -> str:
    return _huge(what, side) if side == "total" else f"{'o' if side == 'src' else 'r'}{what}"


def _huge(what: str, side: Side) -> str:
    """A counter, or both, in a type that no sum or product of them leaves."""
    if side == "total":
        return f"(o{what}::HUGEINT + r{what}::HUGEINT)"
    return f"{'o' if side == 'src' else 'r'}{what}::HUGEINT"


def _rate(amount: str, per: str) -> str:
    """A rate in whole numbers; 0 where nothing is to be divided by, as nfdump has it."""
    return f"(CASE WHEN {per} > 0 THEN {amount} // {per} ELSE 0 END)"


# -- addresses ---------------------------------------------------------------------------


def within(networks: Sequence[Value], put: Put) -> Callable[[str], str]:
    """The condition that one of the columns of addresses is in any of the networks."""
    alike: defaultdict[tuple[int, int], list[Network]] = defaultdict(list)
    for network in networks:
        assert isinstance(network, Network)
        alike[network.version, network.prefixlen].append(network)
    tests: list[str] = []
    for some in alike.values():
        many = len(some) > _FEW and not any(map(_holds_v4, some))
        tests += [_masked(some, put)] if many else [_network(one, put) for one in some]
    return lambda column: _any(test.replace(_COLUMN, column) for test in tests)


_FEW = 4
"""So many are compared one by one, so that files can be left unread; more of them as a list."""


def _network(network: Network, put: Put) -> str:
    """A network has one first half, or all second halves of some first ones."""
    low, high = bounds(network)
    if low == high:
        found = f"{{}}_hi = {put(low >> 64)}::UBIGINT AND {{}}_lo = {put(low & _HALF)}::UBIGINT"
    elif low >> 64 == high >> 64:
        found = (
            f"{{}}_hi = {put(low >> 64)}::UBIGINT AND {{}}_lo "
            f"BETWEEN {put(low & _HALF)}::UBIGINT AND {put(high & _HALF)}::UBIGINT"
        )
    else:
        found = f"{{}}_hi BETWEEN {put(low >> 64)}::UBIGINT AND {put(high >> 64)}::UBIGINT"
    if _holds_v4(network):
        found += f" AND NOT {_is_v4(_COLUMN)}"  # ::/0 is IPv6
    return f"({found})"


def _masked(networks: list[Network], put: Put) -> str:
    """Any of many networks of one length."""
    length = networks[0].prefixlen + (96 if networks[0].version == 4 else 0)
    mask = (1 << 128) - (1 << (128 - length))
    bases = [bounds(network)[0] for network in networks]
    if networks[0].version == 4:
        listed = _listed("UBIGINT", [base & _HALF for base in bases], put)
        return f"({_COLUMN}_hi = 0 AND {listed(f'{_COLUMN}_lo & {put(mask & _HALF)}::UBIGINT')})"
    if length <= 64:
        listed = _listed("UBIGINT", [base >> 64 for base in bases], put)
        return listed(f"{_COLUMN}_hi & {put(mask >> 64)}::UBIGINT")
    # As text: of a list with numbers on both sides of 2^127 DuckDB makes DOUBLEs.
    listed = _listed("UHUGEINT", [str(base) for base in bases], put)
    return listed(f"{_COLUMN} & {put(mask)}::UHUGEINT")


def _holds_v4(network: Network) -> bool:
    low, high = bounds(network)
    return network.version == 6 and low <= _V4 <= high


def bounds(network: Network) -> tuple[int, int]:
    """The first and last address, IPv4 as ::ffff:a.b.c.d."""
    base = _V4 if isinstance(network, IPv4Network) else 0
    return base + int(network.network_address), base + int(network.broadcast_address)


def _is_v4(column: str) -> str:
    return f"({column}_hi = 0 AND {column}_lo BETWEEN {_V4} AND {_V4 | 0xFFFFFFFF})"


def _translated(side: str) -> str:
    return f"(n{side}_hi <> {side}_hi OR n{side}_lo <> {side}_lo)"
