"""Conversations of canaries with the peer and with each other, and what the node saw of them."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from vnet.check import outside
from vnet.check.trial import NotTried, Trial
from vnet.testing.nflog import Seen
from vnet.testing.packets import ICMP, ICMP6, TCP, UDP, World
from vnet.testing.steps import Steps

_LAST = ("input", "postrouting")
"""The hooks that packets come to last, if both sides' come to one of them."""
_REUSE = ["set", "SOL_SOCKET", "SO_REUSEADDR", 1]


@dataclass(frozen=True)
class Flow:
    """A connection by its first packet, and all packets of it in the order of the hooks."""

    proto: int
    src: str
    sport: int
    dst: str
    dport: int
    seen: list[Seen]

    def there(self) -> list[Seen]:
        """What its originator sent."""
        return [p for p in self.seen if (p.sport, p.dport) == (self.sport, self.dport)]

    def back(self) -> list[Seen]:
        """What its responder sent."""
        return [p for p in self.seen if (p.sport, p.dport) == (self.dport, self.sport)]

    @property
    def words(self) -> tuple[str, ...]:
        """For ``conntrack -G``."""
        name = {TCP: "tcp", UDP: "udp"}[self.proto]
        ends = ("-s", self.src, "-d", self.dst)
        return ("-p", name, *ends, "--sport", str(self.sport), "--dport", str(self.dport))


def owners_are(t: Trial, role: str, tried: str, flow: Flow, expected: tuple[int, int]) -> None:
    """The originator's and the responder's, as the connection's mark says."""
    t.equal(role, tried, expected, t.halves(flow.words))


def _flow(proto: int, seen: Sequence[Seen], port: int) -> Flow:
    mine = [p for p in seen if port in (p.sport, p.dport) and p.proto == proto]
    if not mine:
        raise NotTried(f"no packet of port {port} was seen at the node's hooks")
    first = mine[0]
    return Flow(proto, first.src, first.sport, first.dst, first.dport, mine)


def tcp(
    t: Trial,
    client: str,
    server: str,
    to: str,
    at: str = "",
    ends: tuple[int, int] | None = None,
) -> Flow:
    """A connection from SYN to the last ACK.

    ``at``: what the server binds to, if not ``to``. ``ends``: the client's port,
    and the server's (0: any), of a connection that the client resets, so that
    the next one may have the same ports at once.
    """
    w, (near, port) = t.world, ends or (0, 0)
    listen: Steps = [["socket", w.af, "SOCK_STREAM"], _REUSE, ["bind", at or to, port], ["listen"]]
    take: Steps = [["name"], ["go"], ["accept"], ["receive", w.token.hex()]]
    with t.watching() as seen, t.going(server, [*listen, *take]) as (got, rest):
        port = got[0][1]
        mine: Steps = [_RESET, _REUSE, ["bind", w.wild, near]] if ends else []
        t.does(client, [["socket", w.af, "SOCK_STREAM"], *mine, ["connectwait", to, port],
                        ["send", w.token.hex(), "", 0]])  # fmt: skip
        said = rest()
        if not said["ok"] and not ends:  # the reset may be there before the data is read
            raise NotTried(f"{server}: {said['at']}: {said['errno']}")
        t.until(
            lambda: seen() if _over(seen(), port) else [],
            "both FINs and their ACKs, or a reset",
        )
        return _flow(TCP, seen(), port)


_RESET = ["set", "SOL_SOCKET", "SO_LINGER", struct.pack("=ii", 1, 0).hex()]


def _over(seen: list[Seen], port: int) -> bool:
    """Each side's FIN has been seen, and an ACK after the later one; or a reset.

    What stays on this host, or passes through it, is over when its last hook has seen that.
    """
    mine = [p for p in seen if port in (p.sport, p.dport)]
    for hook in _LAST:
        here = [p for p in mine if p.prefix == hook]
        if len({p.sport for p in here}) == 2:
            mine = here
            break
    first: dict[int, int] = {}
    for at, packet in enumerate(mine):
        if "F" in packet.tcp_flags:
            first.setdefault(packet.sport, at)
        if "R" in packet.tcp_flags:
            return True
    last = max(first.values(), default=0)
    return len(first) == 2 and any(
        p.sport != mine[last].sport and "A" in p.tcp_flags for p in mine[last:]
    )


def udp_out(t: Trial, role: str, connected: bool = False, port: int = 0, near: int = 0) -> Flow:
    """A datagram to the peer, and its answer; ``port``: the peer's, ``near``: the node's."""
    w = t.world
    near, port = near or t.bed.port(), port or w.dport
    made: Steps = [["socket", w.af, "SOCK_DGRAM"], _REUSE, ["bind", w.here, near]]
    where = ["", 0] if connected else [w.there, port]
    made += [["connect", w.there, port]] if connected else []
    ask: Steps = [*made, ["send", w.token.hex(), *where], ["go"], ["receive", w.token.hex()]]
    # The peer has a socket there, or it would say that it has none.
    held: Steps = [["socket", w.af, "SOCK_DGRAM"], ["bind", w.there, port], ["hold"]]
    with (
        t.going("peer", held),
        t.watching() as seen,
        t.going(role, ask) as (_, rest),
    ):
        comes_in(t, w, UDP, port, near)
        if not (said := rest())["ok"]:
            raise NotTried(f"{role}: {said['at']}: {said['errno']}")
        return _flow(UDP, [p for p in seen() if w.token in p.payload], port)


def udp_in(t: Trial, role: str, wild: bool = False, port: int = 0, far: int = 0) -> Flow:
    """A datagram from the peer to a socket that sends nothing."""
    w = t.world
    port, far = port or t.bed.port(), far or w.dport
    made: Steps = [["socket", w.af, "SOCK_DGRAM"], _REUSE,
                   ["bind", w.wild if wild else w.here, port]]  # fmt: skip
    with (
        t.watching() as seen,
        t.going(role, [*made, ["go"], ["receive", w.token.hex()]]) as (_, rest),
    ):
        comes_in(t, w, UDP, far, port)
        if not (said := rest())["ok"]:
            raise NotTried(f"{role}: {said['at']}: {said['errno']}")
        return _flow(UDP, [p for p in seen() if w.token in p.payload], port)


def udp_between(t: Trial, client: str, server: str, to: str) -> Flow:
    """A datagram from one slice to another, on this host."""
    w = t.world
    made: Steps = [["socket", w.af, "SOCK_DGRAM"], ["bind", to, 0], ["name"], ["go"],
                   ["receive", w.token.hex()]]  # fmt: skip
    with t.watching() as seen, t.going(server, made) as (got, rest):
        port = got[0][1]
        t.does(client, [["socket", w.af, "SOCK_DGRAM"], ["send", w.token.hex(), to, port]])
        if not (said := rest())["ok"]:
            raise NotTried(f"{server}: {said['at']}: {said['errno']}")
        return _flow(UDP, [p for p in seen() if w.token in p.payload], port)


def udp_passing(t: Trial, role: str, to: str) -> Flow:
    """A datagram from the peer through the node to a container that only receives."""
    w = t.world
    made: Steps = [["socket", w.af, "SOCK_DGRAM"], ["bind", to, 0], ["name"], ["go"],
                   ["receive", w.token.hex()]]  # fmt: skip
    with t.watching() as seen, t.going(role, made) as (got, rest):
        port = got[0][1]
        t.does("peer", [["socket", w.af, "SOCK_DGRAM"], ["send", w.token.hex(), to, port]])
        if not (said := rest())["ok"]:
            raise NotTried(f"{role}: {said['at']}: {said['errno']}")
        return _flow(UDP, [p for p in seen() if w.token in p.payload], port)


def comes_in(t: Trial, w: World, proto: int, sport: int, dport: int, **fields: object) -> None:
    """The peer sends a packet that scapy has built."""
    sends_raw(t, w, outside.comes_in(w, proto, sport, dport, **fields))


def sends_raw(t: Trial, w: World, data: bytes) -> None:
    """The peer sends a whole packet to the node."""
    t.does("peer", [["socket", w.af, "SOCK_RAW", 255], ["send", data.hex(), w.here, 0]])


def unreachable(seen: Sequence[Seen]) -> list[Seen]:
    """Those that say that nobody has a port. Of ICMPv6 there is more: neighbours."""
    return [p for p in seen if (p.proto, p.dport) in ((ICMP, 3 << 8 | 3), (ICMP6, 1 << 8 | 4))]


def segment(seen: Seen) -> tuple[int, int]:
    """(sequence number, acknowledged) of a TCP packet."""
    at = 40 if seen.family == 6 else (seen.payload[0] & 15) * 4
    return (
        int.from_bytes(seen.payload[at + 4 : at + 8], "big"),
        int.from_bytes(seen.payload[at + 8 : at + 12], "big"),
    )
