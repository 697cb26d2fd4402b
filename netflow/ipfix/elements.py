"""The information elements that are exported, and the templates made of them.

Numbers, sizes and meanings: IANA's registry "IP Flow Information Export (IPFIX)
Entities"; those with PEN 29305 are the reverse of IANA's (RFC 5103 section 6.1).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

REVERSE_PEN = 29305
DOCUMENTATION_PEN = 32473
"""Set aside for documentation by RFC 5612: ours until one is assigned."""
VARIABLE = 0xFFFF
TEMPLATE_SET, OPTIONS_SET = 2, 3


@dataclass(frozen=True)
class Element:
    """A name, a number, how many bytes it is sent in, and whose number it is (0: IANA's)."""

    name: str
    number: int
    size: int
    pen: int = 0


@dataclass(frozen=True)
class Template:
    """What a data record consists of. The first ``scopes`` elements are its scope, if any."""

    id: int
    elements: tuple[Element, ...]
    scopes: int = 0

    @property
    def size(self) -> int:
        """Bytes of a record; only of one without variable elements."""
        return sum(element.size for element in self.elements)


@dataclass(frozen=True)
class Shape:
    """What is configurable about records.

    pen: the private enterprise whose elements 1 to 3 carry what IANA has none
    for. vrf: xids in ingressVRFID and egressVRFID too. uniflow: a record for
    each direction, for receivers that know nothing of biflows.
    """

    pen: int = DOCUMENTATION_PEN
    vrf: bool = False
    uniflow: bool = False


@dataclass(frozen=True)
class Kind:
    """What a record can be, each with a template of its own."""

    six: bool
    icmp: bool
    nat: bool

    @property
    def template(self) -> int:
        return 256 + self.six + 2 * self.icmp + 4 * self.nat


KINDS = tuple(
    Kind(six, icmp, nat) for nat in (False, True) for icmp in (False, True) for six in (False, True)
)
"""In order of their templates' ids, 256 to 263."""
NAMES, VRF_NAMES, DOMAIN = 272, 273, 274
"""Templates of options: an xid's slice, a VRF's name, the node's name."""

_OCTETS, _PACKETS = Element("octetDeltaCount", 1, 8), Element("packetDeltaCount", 2, 8)
_COMMON = (
    Element("flowStartMilliseconds", 152, 8),
    Element("flowEndMilliseconds", 153, 8),
    _OCTETS,
    _PACKETS,
)
_REVERSE = (
    Element("reverseOctetDeltaCount", 1, 8, REVERSE_PEN),
    Element("reversePacketDeltaCount", 2, 8, REVERSE_PEN),
)
_REST = (
    Element("protocolIdentifier", 4, 1),
    Element("flowEndReason", 136, 1),
    Element("biflowDirection", 239, 1),
    Element("flowId", 148, 4),  # of 8: reduced-size encoding, RFC 7011 section 6.2
)
_ADDRESSES = {
    False: (Element("sourceIPv4Address", 8, 4), Element("destinationIPv4Address", 12, 4)),
    True: (Element("sourceIPv6Address", 27, 16), Element("destinationIPv6Address", 28, 16)),
}
_PORTS = (Element("sourceTransportPort", 7, 2), Element("destinationTransportPort", 11, 2))
_ICMP = {
    False: (Element("icmpTypeCodeIPv4", 32, 2),),
    True: (Element("icmpTypeCodeIPv6", 139, 2),),
}
_NAT = {
    False: (
        Element("postNATSourceIPv4Address", 225, 4),
        Element("postNATDestinationIPv4Address", 226, 4),
    ),
    True: (
        Element("postNATSourceIPv6Address", 281, 16),
        Element("postNATDestinationIPv6Address", 282, 16),
    ),
}
_NAPT = (
    Element("postNAPTSourceTransportPort", 227, 2),
    Element("postNAPTDestinationTransportPort", 228, 2),
)
_VRF = (Element("ingressVRFID", 234, 4), Element("egressVRFID", 235, 4))
_USER_NAME = Element("userName", 371, VARIABLE)
_VRF_NAME = Element("VRFname", 236, VARIABLE)
_DOMAIN_ID = Element("observationDomainId", 149, 4)
_DOMAIN_NAME = Element("observationDomainName", 300, VARIABLE)


def owners(pen: int) -> tuple[Element, Element]:
    """The xid of each side's owner: ours, since no IANA element says whose a packet is."""
    return Element("originatorXid", 1, 2, pen), Element("responderXid", 2, 2, pen)


def template_of(kind: Kind, shape: Shape) -> Template:
    """The template of a kind of record."""
    elements: tuple[Element, ...] = _ADDRESSES[kind.six]
    if kind.icmp:
        elements += (*_ICMP[kind.six], Element("icmpIdentifier", 3, 2, shape.pen))
    else:
        elements += _PORTS
    elements += _COMMON
    if not shape.uniflow:
        elements += _REVERSE
    elements += _REST + owners(shape.pen)
    if shape.vrf:
        elements += _VRF
    if kind.nat:
        elements += _NAT[kind.six] + (() if kind.icmp else _NAPT)
    return Template(kind.template, elements)


def data_templates(shape: Shape) -> tuple[Template, ...]:
    """The templates of all kinds of records, in order of KINDS."""
    return tuple(template_of(kind, shape) for kind in KINDS)


def options_templates(shape: Shape) -> tuple[Template, ...]:
    """The templates of what is told beside records: names."""
    made = [
        Template(NAMES, (owners(shape.pen)[0], _USER_NAME), 1),
        Template(DOMAIN, (_DOMAIN_ID, _DOMAIN_NAME), 1),
    ]
    if shape.vrf:
        made.append(Template(VRF_NAMES, (_VRF[0], _VRF_NAME), 1))
    return tuple(made)


def template_record(template: Template) -> bytes:
    """RFC 7011 sections 3.4.1 and 3.4.2.2."""
    head = struct.pack(">HH", template.id, len(template.elements))
    if template.scopes:
        head += struct.pack(">H", template.scopes)
    return head + b"".join(map(_specifier, template.elements))


def _specifier(element: Element) -> bytes:
    """RFC 7011 section 3.2."""
    if element.pen:
        return struct.pack(">HHI", element.number | 0x8000, element.size, element.pen)
    return struct.pack(">HH", element.number, element.size)
