"""The messages of one transport session: templates, names, records, sequence numbers.

RFC 7011: the message header in section 3.1; templates belong to a transport
session and an observation domain (section 8), and go once over TCP and again
and again over UDP (8.4). A sequence number counts data records, those of
options among them, of a session and a domain before the message (3.1).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netflow.ipfix.elements import (
    DOMAIN,
    NAMES,
    OPTIONS_SET,
    TEMPLATE_SET,
    VRF_NAMES,
    Shape,
    Template,
    data_templates,
    options_templates,
    template_record,
)
from netflow.ipfix.names import Tenure, runs
from netflow.ipfix.records import Columns, encode

VERSION = 10
_HEADER = np.dtype(
    [
        ("version", ">u2"), ("length", ">u2"), ("time", ">u4"), ("sequence", ">u4"),
        ("domain", ">u4"), ("set", ">u2"), ("set_length", ">u2"),
    ]
)  # fmt: skip
HEADERS = _HEADER.itemsize
"""Bytes of a message before its records: its header and that of its one set."""
_LONG = 255


@dataclass
class Domain:
    """What has been told of one observation domain in this session."""

    node: str
    sequence: int = 0
    told: dict[int, str] = field(default_factory=dict)
    templates_at: float = float("-inf")
    messages: int = 0


@dataclass
class Session:
    """A transport session. size: the most bytes of a message.

    again_after, again_every: seconds and messages after which templates and
    names are sent again; 0 never, which is for TCP.
    """

    shape: Shape
    size: int
    again_after: float = 0
    again_every: int = 0
    domains: dict[int, Domain] = field(default_factory=dict)


@dataclass(frozen=True)
class Messages:
    """Messages one after another in a buffer, and where each begins and the last ends."""

    data: memoryview
    bounds: Sequence[int]
    records: int = 0


def export(
    session: Session,
    node: str,
    domain: int,
    columns: Columns,
    tenures: Sequence[Tenure],
    at: float,
) -> list[Messages]:
    """Messages for records of a domain, and all that must go before them. at: s since the epoch."""
    known = session.domains.setdefault(domain, Domain(node))
    made = again(session, at, domain)
    for first, last, news in runs(columns, tenures, known.told):
        if news:
            known.told.update(news)
            made += _names(session, domain, known, news, at)
        part = {name: column[first:last] for name, column in columns.items()}
        for template, rows in encode(part, session.shape):
            made += _pack(session, domain, known, template, rows, at)
    return made


def again(session: Session, at: float, only: int | None = None) -> list[Messages]:
    """Templates and names where they are due, of one domain or all."""
    made: list[Messages] = []
    for number, known in session.domains.items():
        if only is None or number == only:
            first = known.templates_at == float("-inf")
            aged = session.again_after and at - known.templates_at >= session.again_after
            used = session.again_every and known.messages >= session.again_every
            if first or aged or used:
                made += _templates(session, number, known, at)
                made += _names(session, number, known, known.told, at)
    return made


def _templates(session: Session, domain: int, known: Domain, at: float) -> list[Messages]:
    known.templates_at, known.messages = at, 0
    body = [template_record(template) for template in data_templates(session.shape)]
    made = _whole(session, domain, known, TEMPLATE_SET, body, at, 0)
    # Each in a message of its own: a receiver that stumbles over an element of
    # an enterprise in a scope, as nfacctd does, still knows the others.
    for template in options_templates(session.shape):
        made += _whole(session, domain, known, OPTIONS_SET, [template_record(template)], at, 0)
    node = known.node.encode()
    body = [struct.pack(">I", domain) + _text(node)]
    return made + _whole(session, domain, known, DOMAIN, body, at, 1)


def _names(
    session: Session, domain: int, known: Domain, names: Mapping[int, str], at: float
) -> list[Messages]:
    texts = [(xid, _text(name.encode())) for xid, name in names.items()]
    if not texts:
        return []
    body = [struct.pack(">H", xid) + text for xid, text in texts]
    made = _whole(session, domain, known, NAMES, body, at, 1)
    if session.shape.vrf:
        body = [struct.pack(">I", xid) + text for xid, text in texts]
        made += _whole(session, domain, known, VRF_NAMES, body, at, 1)
    return made


def _text(data: bytes) -> bytes:
    """A variable-length element, RFC 7011 section 7."""
    if len(data) < _LONG:
        return bytes([len(data)]) + data
    return struct.pack(">BH", _LONG, len(data)) + data


def _whole(
    session: Session, domain: int, known: Domain, set_id: int, parts: list[bytes], at: float,
    count: int,
) -> list[Messages]:  # fmt: skip
    """Messages of parts of different lengths. count: 1 if they are data records."""
    made: list[Messages] = []
    while parts:
        taken, length = 1, HEADERS + len(parts[0])
        while taken < len(parts) and length + len(parts[taken]) <= session.size:
            length += len(parts[taken])
            taken += 1
        head = _head(length, set_id, domain, known.sequence, at)
        data = head.tobytes() + b"".join(parts[:taken])
        known.sequence = (known.sequence + taken * count) & 0xFFFFFFFF
        made.append(Messages(memoryview(data), (0, length)))
        parts = parts[taken:]
    return made


def _pack(
    session: Session, domain: int, known: Domain, template: Template, rows: NDArray[Any],
    at: float,
) -> list[Messages]:  # fmt: skip
    """Messages of records of one size: as many as fit, and one of the rest."""
    per = (session.size - HEADERS) // template.size
    full = len(rows) // per
    made = []
    for first, messages, each in ((0, full, per), (full * per, 1, len(rows) - full * per)):
        if not messages or not each:
            continue
        length = HEADERS + each * template.size
        block = np.empty(
            messages, dtype=[("head", _HEADER), ("body", "u1", (each * template.size,))]
        )
        sequences = known.sequence + each * np.arange(messages, dtype=np.int64)
        block["head"] = _head(length, template.id, domain, 0, at)
        block["head"]["sequence"] = sequences & 0xFFFFFFFF
        part = rows[first : first + messages * each]
        block["body"] = part.view("u1").reshape(messages, each * template.size)
        known.sequence = (known.sequence + messages * each) & 0xFFFFFFFF
        known.messages += messages
        bounds = range(0, messages * length + 1, length)
        made.append(Messages(memoryview(block.tobytes()), bounds, messages * each))
    return made


def _head(length: int, set_id: int, domain: int, sequence: int, at: float) -> NDArray[np.void]:
    return np.array(
        (
            VERSION, length, int(at) & 0xFFFFFFFF, sequence & 0xFFFFFFFF, domain, set_id,
            length - 16,
        ),
        dtype=_HEADER,
    )  # fmt: skip
