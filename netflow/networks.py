"""Addresses and networks as people write them."""

from ipaddress import ip_network

_V4_MAPPED = 0xFFFF << 32


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
