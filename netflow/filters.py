"""From a typed question to SQL. Values go as parameters, never as text."""

from ipaddress import ip_network
from typing import Any

from netflow.protocols import ICMP, ICMPV6
from netflow.wire import Filter

_V4_MAPPED = 0xFFFF << 32
_MAX_VALUES = 1000


def bounds(network: str) -> tuple[int, int]:
    """The first and last address of ``A`` or ``A/len``, IPv4 as ::ffff:a.b.c.d.

    Host bits may be set: 10.1.2.3/8 means 10.0.0.0/8. Raises ValueError with
    a message for people.
    """
    try:
        net = ip_network(network, strict=False)
    except ValueError:
        raise ValueError(
            f"{network!r} is not an address or a network: write 192.0.2.1, 192.0.2.0/24 "
            "or 2001:db8::/32"
        ) from None
    base = _V4_MAPPED if net.version == 4 else 0
    return base + int(net.network_address), base + int(net.broadcast_address)


def where(asked: Filter) -> tuple[str, dict[str, Any]]:
    """A condition over ``flows`` joined with the tenures ``o`` and ``r``.

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
        tests = []
        for low, high in map(bounds, _few(networks, "addresses")):
            # UHUGEINT passes through the driver whole only as text.
            first, last = put(str(low)), put(str(high))
            tests += [f"{c} BETWEEN {first}::UHUGEINT AND {last}::UHUGEINT" for c in columns]
        if tests:
            terms.append(_any(tests))

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
    return " AND ".join(terms) or "true", params


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
