"""All that is in play; whatever is sent goes by way of the truth.

One process holds all sockets, each made by a process in its slice (mix.actors) and handed
over by SCM_RIGHTS: so the order of all that happens is known. A part of what is sent is
sent by those processes, or by those of other slices.
"""

import random
import socket
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from netflowbed import Collector
from vnet.testing import cgroup, net
from vnetbed import Node

from mix import actors, packets, wire
from mix.compare import settle
from mix.packets import DIRECT, ERROR, ICMP, ICMPV6, UDP, Flow
from mix.sock import HALF, SINKS, Pending, Sock, WrongError
from mix.truth import Conn, Truth
from mix.wire import IN, LO, WIRE


@dataclass
class World:
    """The drawing is in mix.stage."""

    node: Node
    peer: net.Namespace
    link: net.Link
    rng: random.Random
    truth: Truth
    flows: Collector
    tap: wire.Wire
    groups: dict[str, cgroup.Cgroup]
    people: dict[tuple[str, str], actors.Actor]
    variant: str = "auto"
    peers: dict[int, dict[int, socket.socket]] = field(default_factory=dict)
    """The peer's sockets by family and port: UDP and TCP."""
    raw: dict[tuple[str, int, int], Sock] = field(default_factory=dict)
    homes: dict[str, int] = field(default_factory=dict)
    pending: dict[tuple[int, int, int], Pending] = field(default_factory=dict)
    ends: dict[tuple[bytes, int, bytes, int], "Sock | None"] = field(default_factory=dict)
    """Who is, or was last, at this end of a TCP connection; None: its half says."""
    latest: dict[Flow, tuple[int, int]] = field(default_factory=dict)
    """(seq, ack) of the last TCP segment each way."""
    waits: set[tuple[bytes, int, bytes, int]] = field(default_factory=set)
    """Ends on this host that may be in TIME_WAIT."""
    since: int = 0
    """When all was in place, ns."""
    dying: list[Conn] = field(default_factory=list)
    """What connection tracking removes by itself."""
    tags: int = 0
    act: str = ""
    kinds: Counter[str] = field(default_factory=Counter)
    """Packets seen, by kind."""
    owned: int = 0
    """Packets seen that are a slice's."""
    unsaid: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    acts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    # -- who and where --

    def here(self, family: int) -> str:
        """The node's address."""
        return self.link.a4 if family == 4 else self.link.a6

    def there(self, family: int) -> str:
        """The peer's."""
        return self.link.b4 if family == 4 else self.link.b6

    def xid(self, who: str) -> int:
        """A slice's number now; 0 for the node."""
        return self.truth.xids.get(who, 0)

    def owner(self, sock: Sock) -> int:
        """Whose a socket is: its cgroup's slice's, as it is now."""
        known = sock.home >= 0 and self.homes.get(sock.who, 0) == sock.home
        return self.xid(sock.who) if known else 0

    def actor(self, who: str, caps: str = "root") -> actors.Actor:
        """A process of a slice's, started when first asked for."""
        if (who, caps) not in self.people:
            made = actors.start(self.node.ns, self.groups.get(who), caps)
            self.people[who, caps] = made
        return self.people[who, caps]

    # -- sockets --

    def open(
        self, who: str, family: int, kind: int, proto: int = 0, **how: Any
    ) -> tuple[Sock | None, int]:
        """A socket of somebody's, or None and the errno."""
        domain = socket.AF_INET if family == 4 else socket.AF_INET6
        code, name, made = self.actor(who, how.pop("caps", "root")).ask(
            "open",
            domain,
            kind,
            proto,
            how.get("options", ()),
            how.get("bind"),
            how.get("connect"),
            how.get("listen", 0),
        )
        if code:
            return None, code
        address, port = (packets.packed(name[0]), name[1]) if name else (b"", 0)
        return Sock(made, who, self.homes.get(who, 0), address, port), 0

    def raw_of(self, who: str, family: int, proto: int = 255) -> Sock:
        """A raw socket of somebody's who may have one (255: with headers of its own)."""
        key = (who, family, proto)
        if key not in self.raw:
            made, code = self.open(who, family, socket.SOCK_RAW, proto)
            assert made, (key, code)
            if proto != 255:  # what comes in is not read
                made.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            self.raw[key] = made
        return self.raw[key]

    # -- expectations --

    def tag(self) -> int:
        """One that no packet has had."""
        self.tags += 1
        return self.tags

    def expect(self, tag: int, place: int, xid: int, kind: int = DIRECT, **how: Any) -> None:
        """It must be seen there with this owner."""
        self.pending[tag, place, kind] = Pending(xid, self.act, **{"why": "", **how})

    # -- what was seen --

    def settle(self, seconds: float = 10) -> None:
        """Compare what has come; wait for what must come yet."""
        settle(self, seconds)

    def fail(self, text: str) -> None:
        """A wrong packet."""
        self.wrong.append(text)
        if len(self.wrong) >= 20:
            raise WrongError

    def of_conn(self, place: int, flow: Flow) -> int:
        """What the connection says of a packet of this flow."""
        found = self.truth.conns.get(flow)
        if not found:
            return 0
        conn, way = found
        return conn.halves[1 - way if place == IN else way]

    # -- UDP --

    def udp(
        self,
        sock: Sock,
        dst: bytes,
        dport: int,
        n: int = 1,
        size: int = 12,
        *,
        to: Sock | None = None,
        closed: bool = False,
        connected: bool = False,
        by: str = "",
        control: Any = (),
        mark: int | None = None,
        many: bool = False,
        src: bytes = b"",
    ) -> list[int]:
        """Somebody's UDP socket sends; to: whose socket receives it, on this host.

        closed: nobody's port. by: who makes the call. Returns the tags.
        """
        local = dst in self.truth.local
        xid = self.owner(sock)
        source = src or (sock.address if any(sock.address) else self.source(dst))
        flow = Flow(UDP, source, sock.port, dst, dport)
        refused = self.truth.refused(sock.who, flow, False, mark)
        head = 28 if len(dst) == 4 else 48
        tags = []
        for _ in range(n):
            tag = self.tag()
            tags.append(tag)
            data = packets.data(tag, size)
            if refused:
                self.refusals[refused] += 1
            else:
                self.truth.sent(xid, flow)
                self.truth.count(flow, head + len(data))
                if local:
                    self.expect(tag, LO, xid, many=many)
                    got = (
                        self.truth.received(self.owner(to), flow)
                        if to
                        else (self.truth.unreceived(flow))
                    )
                    self.expect(tag, IN, got, why="" if to else HALF)
                    if closed:
                        half = self.of_conn(WIRE, flow.back)
                        self.expect(tag, LO, half, ERROR, must=False)
                        self.expect(tag, IN, self.of_conn(IN, flow.back), ERROR, must=False)
                else:
                    self.expect(tag, WIRE, xid, many=many)
                    if closed:
                        self.expect(tag, IN, self.of_conn(IN, flow.back), ERROR, must=False)
            self.call(sock, data, None if connected else (packets.text(dst), dport), by, control)
        return tags

    def call(self, sock: Sock, data: bytes, where: Any, by: str = "", control: Any = ()) -> int:
        """The call itself; returns its errno. by: a process "slice" or "slice/caps"."""
        if by:
            who, _, caps = by.partition("/")
            return self.actor(who, caps or "root").ask(
                "send", data, where, control, give=sock.sock
            )[0]
        try:
            sock.sock.sendmsg([data], control, 0, *([where] if where else []))
        except OSError as e:
            if e.errno != 111:  # an error about an earlier packet
                return e.errno or 0
            with suppress(OSError):
                sock.sock.sendmsg([data], control, 0, *([where] if where else []))
        return 0

    def source(self, dst: bytes) -> bytes:
        """The address from which the kernel sends there."""
        if dst in self.truth.local:
            return dst
        return packets.packed(self.here(4 if len(dst) == 4 else 6))

    def from_peer(
        self,
        family: int,
        port: int,
        sport: int,
        n: int = 1,
        size: int = 12,
        *,
        to: Sock | None = None,
        dst: bytes = b"",
        many: bool = False,
    ) -> None:
        """The peer's UDP socket sends; to: who receives it, None: nobody."""
        dst = dst or packets.packed(self.here(family))
        flow = Flow(UDP, packets.packed(self.there(family)), sport, dst, port)
        head = 28 if family == 4 else 48
        for _ in range(n):
            tag = self.tag()
            data = packets.data(tag, size)
            if to:
                xid = self.truth.received(self.owner(to), flow)
            else:
                xid = self.truth.unreceived(flow)
                self.expect(tag, WIRE, self.truth.answered(flow.back), ERROR, must=False)
            self.truth.count(flow, head + len(data))
            self.expect(tag, IN, xid, why="" if to else HALF)
            with suppress(ConnectionRefusedError):
                self.peers[family][sport].sendto(data, (packets.text(dst), port))

    def reads(self, sock: Sock, n: int) -> None:
        """n packets are really in this socket: the truth is true."""
        sock.sock.settimeout(60)
        got = 0
        try:
            while got < n:
                sock.sock.recv(65536)
                got += 1
        except ConnectionRefusedError:
            self.reads(sock, n - got)
        except TimeoutError:
            self.fail(f"{self.act}: {got} of {n} packets were received: the model is wrong")
        sock.sock.setblocking(False)

    def peer_reads(self) -> None:
        """Empty the peer's sockets."""
        for sockets in self.peers.values():
            for port, sock in sockets.items():
                if port in SINKS:
                    with suppress(BlockingIOError, ConnectionRefusedError):
                        while True:
                            sock.recv(65536, socket.MSG_DONTWAIT)

    # -- raw --

    def raw_send(
        self,
        who: str,
        flow: Flow,
        packet: bytes,
        tag: int,
        *,
        holder: bool = False,
        error: bool = False,
        valid: bool = True,
        mark: int | None = None,
        echo: bool = False,
        readable: bool = True,
        by: str = "",
        counted: bool = True,
        place: int = WIRE,
        got: int | None = None,
    ) -> str:
        """A raw socket of somebody's sends a whole packet. Returns why it is refused, or "".

        got: whose it is where it comes in, on this host.
        """
        family = 4 if len(flow.src) == 4 else 6
        sock = self.raw_of(who, family)
        xid = self.xid(who)
        known = flow in self.truth.conns
        source = packet[12:16] if family == 4 else packet[8:24]
        outer = flow._replace(src=source)
        refused = self.truth.refused(
            who,
            outer
            if not error
            else Flow(ICMP if family == 4 else ICMPV6, source, 0, flow.dst, 0x303),
            True,
            mark,
            readable,
        )
        if not refused and valid and self.truth.joins(who, flow, echo):
            refused = "connection"
            if not error and counted:  # connection tracking has counted it by then
                self.truth.count(flow, len(packet))
        if refused:
            self.refusals[refused] += 1
        else:
            self.truth.raw_sent(xid, flow, holder, error, valid)
            if not error and valid and counted:
                self.truth.count(flow, len(packet))
            self.expect(tag, place, xid, ERROR if error else DIRECT, why=f"raw, known {known}")
            if place == LO and got is not None:
                self.expect(tag, IN, got, ERROR if error else DIRECT)
        control = [] if mark is None else [(1, 36, mark.to_bytes(4, "little"))]
        to = packet[16:20] if family == 4 else packet[24:40]
        self.call(sock, packet, (packets.text(to), 0), by, control)
        return refused
