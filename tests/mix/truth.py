"""The truth: docs/meanings.md and docs/guard.md as a program.

It is told what is done, packet by packet, by which socket of which slice, and who
received it; and says which mark each packet must have where, which must not be there at
all and why, and what the records must say. It asks the kernel nothing.
"""

from dataclasses import dataclass, field

from mix.packets import ICMP, ICMPV6, SCTP, TCP, UDP, Flow

DCCP = 33


Owners = tuple[int, int]
"""The originator's and the responder's."""


@dataclass(eq=False, slots=True)
class Share:
    """What passed under one pair of owners."""

    owners: Owners
    packets: list[int] = field(default_factory=lambda: [0, 0])
    """The originator's, the responder's."""
    size: list[int] = field(default_factory=lambda: [0, 0])
    aged: bool = False
    """Of records: each of it ended as the active timeout had passed, and nothing else."""


@dataclass(eq=False, slots=True)
class Conn:
    """A connection, as connection tracking keeps it."""

    flow: Flow
    """As its originator wrote it."""
    act: str
    halves: list[int] = field(default_factory=lambda: [0, 0])
    """Owner of the originator's, of the responder's side."""
    before: list[tuple[str, int]] = field(default_factory=lambda: [("", 0), ("", 0)])
    """Of each half: who had it before, and which act has changed that."""
    due: list[int] = field(default_factory=lambda: [0, 0])
    """Who owns a half that this data path leaves empty (docs/datapaths.md)."""
    reversed: frozenset[int] = frozenset()
    """TCP: its ends have been those of another, the other way round; of these owners, or 0."""
    shares: list[Share] = field(default_factory=lambda: [Share((0, 0))])
    """One for each pair of owners it has had, one after the other."""
    reset_by: int | None = None
    """TCP: the direction of the last RST, if there was one."""


@dataclass
class Policy:
    """What is granted to whom, by the slice's name."""

    raw: dict[str, str]
    ports: dict[tuple[int, int], str]
    addresses: dict[bytes, str] = field(default_factory=dict)


@dataclass
class Truth:
    """What has been done so far."""

    datapath: str
    policy: Policy
    local: set[bytes]
    xids: dict[str, int]
    """{slice: the xid that it has now}; the node and what is no slice: not in it."""
    conns: dict[Flow, tuple[Conn, int]] = field(default_factory=dict)
    """Both directions."""
    past: list[Conn] = field(default_factory=list)
    """All there have been."""
    act: str = ""

    # -- connections --

    def open(self, flow: Flow) -> tuple[Conn, int]:
        """A new one, whatever there was."""
        conn = Conn(flow, self.act)
        self.past.append(conn)
        self.conns[flow.back] = (conn, 1)
        self.conns[flow] = (conn, 0)
        return conn, 0

    def track(self, flow: Flow) -> tuple[Conn, int]:
        """The connection of a packet, and the packet's direction in it."""
        return self.conns.get(flow) or self.open(flow)

    def forget(self, conn: Conn) -> None:
        """Connection tracking has removed it."""
        for flow in (conn.flow, conn.flow.back):
            if self.conns.get(flow, (None,))[0] is conn:
                del self.conns[flow]

    def count(self, flow: Flow, length: int) -> None:
        """Connection tracking has seen a packet of that many bytes."""
        found = self.conns.get(flow)
        if found:
            conn, way = found
            conn.shares[-1].packets[way] += 1
            conn.shares[-1].size[way] += length

    def write(self, conn: Conn, half: int, xid: int, take_over: bool) -> None:
        """'What is written into a connection' of docs/meanings.md."""
        old = conn.halves[half]
        if old == xid or not xid or (old and not take_over):
            return
        conn.before[half] = (self.act, old)
        conn.halves[half] = xid
        conn.due[half] = 0
        owners = (conn.halves[0], conn.halves[1])
        if old:
            conn.shares.append(Share(owners))
        else:  # an empty half gets its owner late, and for the whole share
            conn.shares[-1].owners = owners

    def begin_tcp(self, flow: Flow, originator: int, responder: int) -> None:
        """Somebody connects: a new connection, or, to connection tracking, perhaps the last one.

        Whatever it is, all of its packets and records are of these owners.
        """
        last = self.conns.get(flow)
        # Connection tracking takes a SYN in the last one's reply direction for invalid.
        earlier = last[0].reversed if last else frozenset()
        if last and last[1] == 1:
            earlier = last[0].reversed | {0, *last[0].halves}
            last[0].reversed = earlier
        conn, _ = self.open(flow)
        conn.reversed = earlier
        self.write(conn, 0, originator, True)
        self.write(conn, 1, responder, True)

    def syn(self, flow: Flow) -> None:
        """A raw SYN: to connection tracking a new connection, if the last was reset from here.

        tcp_packet() in nf_conntrack_proto_tcp.c: else it stays with the old one, and so
        does its owner.
        """
        found = self.conns.get(flow)
        if found and found[0].reset_by == 0:
            self.forget(found[0])

    # -- packets: each returns the mark that it must have --

    def sent(self, xid: int, flow: Flow) -> int:
        """An ordinary socket that is at this end of the connection sends."""
        conn, way = self.track(flow)
        self.write(conn, way, xid, True)
        return xid

    def received(self, xid: int, flow: Flow) -> int:
        """An ordinary socket receives."""
        conn, way = self.track(flow)
        self.write(conn, 1 - way, xid, True)
        return xid

    def unreceived(self, flow: Flow) -> int:
        """Nobody's socket receives it: its connection answers."""
        conn, way = self.track(flow)
        return conn.halves[1 - way]

    def answered(self, flow: Flow) -> int:
        """The kernel sends it by itself."""
        conn, way = self.track(flow)
        return conn.halves[way]

    def raw_sent(
        self, xid: int, flow: Flow, holder: bool, error: bool = False, valid: bool = True
    ) -> int:
        """A raw socket sends what the guard lets pass. holder: somebody's socket is at that end.

        error: an ICMP error about the flow; valid: it belongs to the connection at all.
        """
        known = flow in self.conns
        if not valid or (error and not known):
            return xid
        conn, way = self.track(flow)
        if not xid or conn.halves[way]:
            return xid
        if not known:
            self.write(conn, way, xid, False)
        elif self._may_fill(flow, holder, error):
            if self._looks(flow, xid):
                self.write(conn, way, xid, False)
            else:
                conn.due[way] = xid
        return xid

    def _may_fill(self, flow: Flow, holder: bool, error: bool) -> bool:
        if error:
            return False
        if flow.proto in (TCP, UDP):
            return not holder
        return flow.proto not in (ICMP, ICMPV6, SCTP, DCCP)

    def _looks(self, flow: Flow, xid: int) -> bool:
        """Can this data path know that nobody else is there? (docs/datapaths.md)"""
        if self.datapath == "module" or flow.proto not in (TCP, UDP):
            return True
        owner = self.policy.ports.get((flow.proto, flow.sport))
        return bool(owner) and self.xids.get(owner) == xid

    # -- the guard --

    def refused(
        self, who: str, flow: Flow, raw: bool, mark: int | None = None, readable: bool = True
    ) -> str:
        """Why the guard refuses what somebody sends; "" if it does not. mark: by cmsg, or None."""
        xid = self.xids.get(who, 0)
        if mark is not None and mark & 0xFFFF != xid:
            return "mark"
        if self.policy.addresses.get(flow.src, who) != who:
            return "address"
        if readable and self.policy.ports.get((flow.proto, flow.sport), who) != who:
            return "port"
        if not raw:
            return ""
        grant = self.policy.raw.get(who, "deny") if xid else "full"
        if grant == "deny":
            return "raw"
        if grant == "own":
            is_echo = flow.proto in (ICMP, ICMPV6) and not flow.dport
            owned = self.policy.ports.get((flow.proto, flow.sport)) == who
            if not readable or not (is_echo or owned):
                return "foreign"
        if xid and flow.src not in self.local:
            return "spoof"
        return ""

    def joins(self, who: str, flow: Flow, echo: bool = False) -> bool:
        """A slice's raw packet is in a connection whose end here is another slice's."""
        xid, found = self.xids.get(who, 0), self.conns.get(flow)
        if not xid or not found or echo:
            return False
        conn, way = found
        return conn.halves[way] not in (0, xid)
