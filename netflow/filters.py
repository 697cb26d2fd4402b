"""From a typed question to SQL. Values go as parameters, never as text."""

from dataclasses import replace
from typing import Any

import msgspec

from netflow.language import And, Expression, Or, Test, parse
from netflow.language.sql import condition, within
from netflow.language.values import is_pattern, network
from netflow.protocols import ICMP, ICMPV6
from netflow.wire import Filter

_MAX_VALUES = 1000


def where(asked: Filter) -> tuple[str, dict[str, Any]]:
    """A condition over records ``f`` (netflow.history.source) with tenures ``o`` and ``r`` joined.

    Addresses and ports match before or after translation. Ports never match
    ICMP, whose fields of that name mean something else. Raises ValueError for
    values out of range, with a message for people.
    """
    params: dict[str, Any] = {}
    terms: list[str] = []

    def put(value: Any) -> str:
        params[f"p{len(params)}"] = value
        return f"$p{len(params) - 1}"

    if asked.since is not None:
        terms.append(f"end_time >= make_timestamp_ns({put(_time(asked.since))})")
    if asked.until is not None:
        terms.append(f"start_time <= make_timestamp_ns({put(_time(asked.until))})")

    if asked.nodes:
        terms.append(f"list_contains({put(_few(asked.nodes, 'nodes'))}::VARCHAR[], f.node)")

    owners = {"any": ("o", "r"), "originator": ("o",), "responder": ("r",)}[asked.side]
    if asked.slices:
        names = put(_few(asked.slices, "slices"))
        terms.append(_any([f"list_contains({names}::VARCHAR[], {t}.slice)" for t in owners]))
    if asked.xids:
        for xid in asked.xids:
            _within(xid, 65535, "an xid")
        xids = put(_few(asked.xids, "xids"))
        terms.append(_any([f"list_contains({xids}::USMALLINT[], {t}xid)" for t in owners]))

    for networks, columns in (
        (asked.src, ("src", "nsrc")),
        (asked.dst, ("dst", "ndst")),
        (asked.addr, ("src", "nsrc", "dst", "ndst")),
    ):
        if networks:
            wanted = dict.fromkeys(map(network, _few(networks, "addresses")))
            terms.append(_any(list(map(within(tuple(wanted), put), columns))))

    for ports, columns in (
        (asked.sport, ("sport", "nsport")),
        (asked.dport, ("dport", "ndport")),
        (asked.port, ("sport", "nsport", "dport", "ndport")),
    ):
        if ports:
            for port in ports:
                _within(port, 65535, "a port")
            values = put(_few(ports, "ports"))
            tests = [f"list_contains({values}::USMALLINT[], {c})" for c in columns]
            terms.append(f"proto NOT IN ({ICMP}, {ICMPV6}) AND {_any(tests)}")

    if asked.proto:
        for proto in asked.proto:
            _within(proto, 255, "a protocol number")
        protos = put(_few(asked.proto, "protocols"))
        terms.append(f"list_contains({protos}::UTINYINT[], proto)")
    if asked.expression:
        terms.append(f"({condition(parse(asked.expression), put)})")
    return " AND ".join(terms) or "true", params


def implied(asked: Filter) -> Filter:
    """The question with options for what its expression says of every record it matches.

    So ``dst ip A and ...`` lets files be left unread as --dst A does, and a slice
    named by it is the one the question is about. Raises ValueError.
    """
    if not asked.expression:
        return asked
    tree = parse(asked.expression)
    said: dict[str, Any] = {}
    for part in tree.parts if isinstance(tree, And) else (tree,):
        test = _as_one(part)
        if not isinstance(test, Test) or test.comparison != "=" or test.side == "both":
            continue
        option = _OPTIONS.get((test.what, test.side))
        names = test.what in ("slice", "node")
        if option is None or (names and any(is_pattern(str(value)) for value in test.values)):
            continue
        if test.what in ("slice", "xid"):
            if asked.slices or asked.xids or "side" in said:
                continue  # one side is said for all of them
            said["side"] = _SIDES[test.side]
        if not getattr(asked, option) and option not in said:
            said[option] = [str(v) if test.what == "ip" else v for v in test.values]
    return msgspec.structs.replace(asked, **said)


def _as_one(part: Expression) -> Expression:
    """``port 80 or port 443`` as ``port in [80 443]``."""
    if not isinstance(part, Or):
        return part
    tests = [test for test in part.parts if isinstance(test, Test)]
    kinds = {(test.what, test.side, test.comparison) for test in tests}
    if len(tests) < len(part.parts) or len(kinds) > 1:
        return part
    merged = dict.fromkeys(value for test in tests for value in test.values)
    return replace(tests[0], values=tuple(merged))


_SIDES = {"any": "any", "src": "originator", "dst": "responder"}
_OPTIONS = {
    ("ip", "src"): "src", ("ip", "dst"): "dst", ("ip", "any"): "addr",
    ("port", "src"): "sport", ("port", "dst"): "dport", ("port", "any"): "port",
    ("proto", "any"): "proto", ("node", "any"): "nodes",
    **{(what, side): f"{what}s" for what in ("slice", "xid") for side in _SIDES},
}  # fmt: skip


def _any(tests: list[str]) -> str:
    return "(" + " OR ".join(tests) + ")"


def _few(values: list[Any], what: str) -> list[Any]:
    if len(values) > _MAX_VALUES:
        raise ValueError(f"{len(values)} {what} in one question: at most {_MAX_VALUES}")
    return values


def _within(value: int, last: int, what: str) -> None:
    if not 0 <= value <= last:
        raise ValueError(f"{value} is not {what}: 0 to {last}")


def _time(at: int) -> int:
    if not 0 <= at < 1 << 63:
        raise ValueError(f"{at} is not a time: nanoseconds since 1970, up to 2262")
    return at
