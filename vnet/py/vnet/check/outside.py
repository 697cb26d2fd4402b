"""Packets as the world outside sends them, built by scapy.

It takes about a second to import, so only what builds a packet here does.
"""

from typing import Any

from vnet.errors import NodeError
from vnet.testing.packets import TCP, World


def scapy() -> Any:
    """scapy's IPv4 and IPv6 layers. Raises NodeError where there is no scapy."""
    import logging

    logging.getLogger("scapy.runtime").setLevel(logging.ERROR)
    try:
        from scapy.layers import inet, inet6
    except ImportError as error:
        raise NodeError(
            f"vnet check builds packets with scapy, which is not here: {error}",
            "pip install 'vnet[check]', or apt-get install python3-scapy",
        ) from error

    class Layers:
        ip = staticmethod(lambda src, dst, **more: (
            inet6.IPv6(src=src, dst=dst, **{"nh" if k == "proto" else k: v
                                            for k, v in more.items()})
            if ":" in src else inet.IP(src=src, dst=dst, **more)))  # fmt: skip
        tcp, udp, icmp = inet.TCP, inet.UDP, inet.ICMP
        unreachable = inet6.ICMPv6DestUnreach

    return Layers


def comes_in(w: World, proto: int, sport: int, dport: int, **fields: Any) -> bytes:
    """TCP (a SYN, or as ``fields`` say) or UDP from the peer to the node, with the token."""
    s = scapy()
    layer = s.tcp if proto == TCP else s.udp
    return bytes(s.ip(w.there, w.here) / layer(sport=sport, dport=dport, **fields) / w.token)


def unreachable(w: World, sent: bytes) -> bytes:
    """The peer's port unreachable about a packet that it got."""
    s = scapy()
    error = s.icmp(type=3, code=3) if w.family == 4 else s.unreachable(code=4)
    return bytes(s.ip(w.there, w.here) / error / sent)


def portless(w: World, proto: int = 47) -> bytes:
    """Of a protocol without ports, GRE for one, from the node to the peer."""
    return bytes(scapy().ip(w.here, w.there, proto=proto) / (b"\0\0\x08\0" + w.token))


def later_fragment(w: World) -> bytes:
    """The second half of an IPv4 datagram, which has no ports in it."""
    return bytes(scapy().ip(w.here, w.there, proto=17, frag=3, id=4242) / w.token)


def passes(w: World, to: str) -> bytes:
    """A TCP reset from the peer that is of no connection."""
    s = scapy()
    reset = s.tcp(sport=w.sink, dport=w.dport, flags="R", seq=1)
    return bytes(s.ip(w.there, to) / reset)


def error_from(w: World, source: str, sport: int, dport: int) -> bytes:
    """Somebody's port unreachable, to the peer, about what that sent to the node."""
    s = scapy()
    quoted = s.ip(w.there, w.here) / s.udp(sport=sport, dport=dport) / w.token
    error = s.icmp(type=3, code=3) if w.family == 4 else s.unreachable(code=4)
    return bytes(s.ip(source, w.there) / error / quoted)
