"""Columns of flow records as data records of IPFIX, many at a time.

The columns are those of netflow.history.after: numpy arrays with the names of
the store, times as int64 nanoseconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netflow.ipfix.elements import KINDS, Kind, Shape, Template, data_templates

Columns = Mapping[str, NDArray[Any]]

_V4 = 0xFFFF  # the upper 32 of the lower 64 bits of ::ffff:a.b.c.d
_ICMP, _ICMP6 = 1, 58
_MS = 1_000_000
_WORDS = {1: "u1", 2: ">u2", 4: ">u4", 8: ">u8"}

END_REASON = np.array([1, 1, 3, 2, 4, 5, 4], dtype=np.uint8)
"""flowEndReason by the store's reason: idle 1, closed 3 (end of flow detected), active 2,
owner 4 (forced end), lost 5 (lack of resources), cut 4: nobody was there to see its end."""
INITIATOR, REVERSE_INITIATOR = 1, 2

_ANSWERS = np.arange(256, dtype=np.uint16)
"""The type of ICMP or ICMPv6 that answers a type, as conntrack has it (nf_conntrack_proto_icmp.c,
..._icmpv6.c); one that nothing answers is itself."""
for _one, _other in ((0, 8), (13, 14), (15, 16), (17, 18), (128, 129), (139, 140)):
    _ANSWERS[[_one, _other]] = _other, _one


def kinds(columns: Columns) -> NDArray[np.uint8]:
    """The index in KINDS of each record."""
    proto = columns["proto"]
    four = (columns["src_hi"] == 0) & (columns["src_lo"] >> np.uint64(32) == _V4)
    icmp = (proto == _ICMP) | (proto == _ICMP6)
    nat = np.zeros(len(proto), dtype=bool)
    for name in ("src_hi", "src_lo", "dst_hi", "dst_lo", "sport", "dport"):
        nat |= columns["n" + name] != columns[name]
    found: NDArray[np.uint8] = (~four).astype(np.uint8) + 2 * icmp + 4 * nat
    return found


def encode(columns: Columns, shape: Shape) -> Iterator[tuple[Template, NDArray[np.void]]]:
    """The data records by template; templates without records are left out.

    Within a template the records' order is kept. With ``uniflow`` there is one
    for each direction, the responder's only if it has sent anything.
    """
    templates = data_templates(shape)
    of = kinds(columns)
    for index in np.unique(of):
        kind, template = KINDS[index], templates[index]
        chosen = {name: column[of == index] for name, column in columns.items()}
        yield template, _rows(chosen, kind, shape, template, False)
        if shape.uniflow and (answered := chosen["rpackets"] > 0).any():
            back = {name: column[answered] for name, column in chosen.items()}
            yield template, _rows(back, kind, shape, template, True)


def _rows(c: Columns, kind: Kind, shape: Shape, template: Template, back: bool) -> NDArray[np.void]:
    """Records of one kind. back: what the responder sent, as a flow of its own."""
    out = np.zeros(len(c["proto"]), dtype=_layout(template))
    # A packet of the answer goes from the translated destination to the
    # translated source, and is translated to what the originator knows.
    names = ("ndst", "nsrc", "dst", "src") if back else ("src", "dst", "nsrc", "ndst")
    ports = (
        ("ndport", "nsport", "dport", "sport") if back else ("sport", "dport", "nsport", "ndport")
    )
    version = "IPv6" if kind.six else "IPv4"
    put = _six if kind.six else _four
    put(out[f"source{version}Address"], c, names[0])
    put(out[f"destination{version}Address"], c, names[1])
    if kind.icmp:
        asked = c["dport"]
        out[f"icmpTypeCode{version}"] = _ANSWERS[asked >> 8] << 8 | asked & 0xFF if back else asked
        out["icmpIdentifier"] = c["sport"]
    else:
        out["sourceTransportPort"] = c[ports[0]]
        out["destinationTransportPort"] = c[ports[1]]
    if kind.nat:
        put(out[f"postNATSource{version}Address"], c, names[2])
        put(out[f"postNATDestination{version}Address"], c, names[3])
        if not kind.icmp:
            out["postNAPTSourceTransportPort"] = c[ports[2]]
            out["postNAPTDestinationTransportPort"] = c[ports[3]]
    _common(out, c, shape, back)
    return out


def _common(out: NDArray[np.void], c: Columns, shape: Shape, back: bool) -> None:
    sent, answered = ("r", "o") if back else ("o", "r")
    out["flowStartMilliseconds"] = c["start_time"] // _MS
    out["flowEndMilliseconds"] = c["end_time"] // _MS
    out["octetDeltaCount"], out["packetDeltaCount"] = c[f"{sent}bytes"], c[f"{sent}packets"]
    if not shape.uniflow:
        out["reverseOctetDeltaCount"] = c["rbytes"]
        out["reversePacketDeltaCount"] = c["rpackets"]
    out["protocolIdentifier"] = c["proto"]
    out["flowEndReason"] = END_REASON[c["reason"]]
    out["biflowDirection"] = REVERSE_INITIATOR if back else INITIATOR
    out["flowId"] = c["flow_id"]
    out["originatorXid"], out["responderXid"] = c["oxid"], c["rxid"]
    if shape.vrf:
        out["ingressVRFID"], out["egressVRFID"] = c[f"{sent}xid"], c[f"{answered}xid"]


def _layout(template: Template) -> np.dtype[np.void]:
    return np.dtype(
        [
            (e.name, [("hi", ">u8"), ("lo", ">u8")] if e.size == 16 else _WORDS[e.size])
            for e in template.elements
        ]
    )


def _four(out: NDArray[Any], c: Columns, name: str) -> None:
    out[:] = c[f"{name}_lo"] & np.uint64(0xFFFFFFFF)


def _six(out: NDArray[Any], c: Columns, name: str) -> None:
    out["hi"], out["lo"] = c[f"{name}_hi"], c[f"{name}_lo"]
