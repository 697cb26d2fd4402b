"""The rows, and what is expected of each way under which rules.

A cell says whose the packet is and, after a space, what its connection or its
flow record names: ``a -/a`` is slice a's, in a connection that somebody else
began and in which a is the responder. ``b>a`` is b's as it is sent and a's as it
is received, both on this host. ``-`` is nobody, ``^`` a bit of the mark's upper
half, which is somebody else's. ``none`` has not passed the hooks. The letter at
the end is the reason why something is nobody's, from REASONS.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

COLUMNS = ("out", "in", "local")
FAMILIES = (4, 6)

REASONS = {
    "k": "the kernel itself is there: no socket is at this end, and the connection names nobody "
    "(answers of closed ports, echo replies)",
    "o": "the node's own socket, which is no slice's",
    "r": "it only passes through this host, or a router speaks",
    "l": "the kernel looks up no receiver of this protocol (SCTP, raw sockets): the connection "
    "names it from its first answer on",
    "h": "packet sockets send and receive below the IP hooks: no mark, no connection",
    "t": "a tunnel's outer packet: whose packet is inside pays for it, the tunnel is the node's",
    "i": "a raw packet in a connection that is not its sender's: it is the sender's, and takes "
    "nothing over",
    "g": "the guard lets no slice do this",
    "n": "table nat sees only the first packet of a connection, and only of one that this host "
    "starts; on loopback the mark stays on the packet to its receiver",
    "1": "bpf: the SYN of a connection in TIME_WAIT (see datapaths.md)",
    "2": "bpf: bits in the upper half of the mark (see datapaths.md)",
    "3": "bpf: a raw answer from a port that is not reserved (see datapaths.md)",
    "4": "bpf: a stock rule cannot tell who sends: it writes what the packet carries",
    "5": "bpf: what SCTP's accept() gives has no mark, and without the other rules nothing else "
    "names its packets",
    "c": "no such packet",
    "p": "not played: needs `vnet up`",
    "x": "this kernel does not have it",
}

ORIGINATOR = {"out": "a a/-", "in": "a -/a", "local": "a>b a/b"}
"""What the side sends that began."""
RESPONDER = {"out": "a -/a", "in": "a a/-", "local": "b>a a/b"}


@dataclass(frozen=True)
class Row:
    """A kind of packet."""

    group: str
    name: str
    by: dict[str, str]
    """Who sends it: ORIGINATOR or RESPONDER."""
    cells: dict[str, str] = field(default_factory=dict)
    """Where it is otherwise than ``by`` says."""
    first: bool = False
    """It is the first packet of its connection, which alone table nat sees."""
    sock: bool = True
    """A socket sends it, or what is left of one."""
    bpf: dict[str, str] = field(default_factory=dict)
    """Where it cannot be so without the module."""
    nat: dict[str, str] = field(default_factory=dict)
    """With the rule in table nat, where that does not follow from the rest."""
    nat_bpf: dict[str, str] = field(default_factory=dict)
    """The same without the module."""
    needs: str = ""
    """What not every kernel has."""

    def expected(self, datapath: str, rules: str, family: int) -> dict[str, str]:
        """By column. "local4" is local, where IPv4 alone is meant."""
        found = self.by | self.cells
        if rules == "mangle":
            found |= self.bpf if datapath == "bpf" else {}
        else:
            found = {column: self._nat(datapath, column, cell) for column, cell in found.items()}
            found |= self.nat | (self.nat_bpf if datapath == "bpf" else {})
        return {column: found.get(f"{column}{family}", found[column]) for column in COLUMNS}

    def _nat(self, datapath: str, column: str, cell: str) -> str:
        """The originator's half is stamped; a packet has the mark it was sent with, if any.

        The module marks the one packet that it sees; without it every packet
        carries its socket's mark.
        """
        packet, _, rest = cell.partition(" ")
        if not rest:  # only a reason
            return cell
        flows, _, why = rest.partition(" ")
        sender = packet.partition(">")[0]
        marked = self.sock if datapath == "bpf" else self.first and self.by is ORIGINATOR
        sent = sender if marked or sender == "none" else _nobody(sender)
        got = _nobody(packet) if sent == "none" else sent
        now = {"out": sent, "in": _nobody(packet), "local": f"{sent}>{got}"}[column]
        halves = ",".join(dict.fromkeys(f"{f.partition('/')[0]}/-" for f in flows.split(",")))
        if column == "in" and self.by is ORIGINATOR:
            halves = "-/-"
        if (now, halves) != (packet, flows):
            why = "n"
        return f"{now} {halves} {why}".strip()


def _nobody(owner: str) -> str:
    """The same mark without an owner."""
    return "-^" if owner.endswith("^") else "-"


def _rows() -> Iterator[Row]:
    tcp, udp, icmp = "TCP", "UDP", "ICMP"
    yield Row(tcp, "SYN", ORIGINATOR, first=True)
    yield Row(tcp, "SYN-ACK", RESPONDER)
    yield Row(tcp, "data and ACKs of who began", ORIGINATOR)
    yield Row(tcp, "data and ACKs of the other", RESPONDER)
    yield Row(tcp, "GSO/GRO packet", ORIGINATOR)
    yield Row(tcp, "FIN of who began", ORIGINATOR)
    yield Row(tcp, "FIN of the other", RESPONDER)
    yield Row(tcp, "last ACK", ORIGINATOR)
    yield Row(tcp, "SYN to a wildcard IPv6 socket", ORIGINATOR, first=True)
    yield Row(tcp, "its SYN-ACK", RESPONDER)
    yield Row(tcp, "SYN-ACK that is a cookie", RESPONDER)
    yield Row(tcp, "ACK that brings the cookie", ORIGINATOR)
    yield Row(tcp, "RST by the application", ORIGINATOR)
    yield Row(
        *(tcp, "SYN to a closed port", ORIGINATOR),
        cells={"in": "- -/- k", "local": "a>- a/- k"},
        first=True,
    )
    yield Row(
        *(tcp, "RST of the closed port", RESPONDER),
        cells={"out": "- -/- k", "local": "->a a/- k"},
        sock=False,
    )
    yield Row(tcp, "ACK out of TIME_WAIT", ORIGINATOR)
    yield Row(tcp, "RST after the socket is gone", ORIGINATOR, sock=False)
    yield Row(
        *(tcp, "SYN over a TIME_WAIT, to b", ORIGINATOR),
        cells={"out": "c", "in": "b -/a,-/b", "local": "c"},
        bpf={"in": "- -/a,-/b 1"},
        first=True,
    )
    yield Row(
        *(tcp, "b's answers to it", RESPONDER),
        cells={"out": "b -/a,-/b", "in": "c", "local": "c"},
    )
    yield Row(tcp, "SYN over a raw socket", ORIGINATOR, first=True)
    yield Row(tcp, "SYN-ACK to it", RESPONDER)
    yield Row(tcp, "the kernel's RST about it", ORIGINATOR, sock=False)
    mptcp = {"out": "g", "local": "g"}
    yield Row(
        *(tcp, "MPTCP (SYN)", ORIGINATOR),
        cells=mptcp,
        first=True,
        nat={"out": "a a/-", "local": "a>a a/- n"},
        nat_bpf=mptcp,
    )

    yield Row(udp, "connected", ORIGINATOR, first=True)
    yield Row(udp, "answer of a connected socket", RESPONDER)
    yield Row(udp, "unconnected, to a wildcard socket", ORIGINATOR, first=True)
    yield Row(udp, "answer of a wildcard socket", RESPONDER)
    yield Row(udp, "to who only receives", ORIGINATOR, first=True)
    hands = {"out": "a a/-,b/-", "in": "a -/a,-/b", "local": "c"}
    yield Row(
        *(udp, "of a port that changes hands: before", ORIGINATOR),
        cells=hands,
        first=True,
        nat={"out": "a a/- n"},
    )
    yield Row(
        *(udp, "after", ORIGINATOR),
        cells=hands | {"out": "b a/-,b/-", "in": "b -/a,-/b"},
        nat={"out": "- a/- n"},
        nat_bpf={"out": "b a/- n"},
    )
    yield Row(
        *(udp, "of the node, on a slice's connection", ORIGINATOR),
        cells={"out": "- a/- o", "in": "c", "local": "c"},
    )
    yield Row(
        *(udp, "multicast", ORIGINATOR),
        first=True,
        nat={"local4": "-+a>a a/- n"},  # two copies, and table nat sees the first
        nat_bpf={"local4": "a>a a/- n"},
    )
    yield Row(udp, "fragments", ORIGINATOR, first=True)
    yield Row(udp, "GSO/GRO packet (UDP_SEGMENT)", ORIGINATOR, first=True)
    yield Row(
        *(udp, "a packet socket's frame", ORIGINATOR),
        cells={"out": "none none h", "local": "none>b -/b h"},
        nat={"out": "none none h"},
    )

    for kind in ("ping", "raw"):
        yield Row(
            *(icmp, f"echo request of a {kind} socket", ORIGINATOR),
            cells={"in": "- -/- k", "local": "a>- a/- k"},
            first=True,
        )
        yield (
            Row(
                *(icmp, "the kernel's echo reply to it", RESPONDER),
                cells={"out": "- -/- k", "local": "->a a/- k"},
                sock=False,
            )
            if kind == "ping"
            else Row(
                *(icmp, "the kernel's echo reply to a raw socket", RESPONDER),
                cells={"out": "- -/- k", "local": "->a a/- k"},
                sock=False,
            )
        )
    yield Row(icmp, "port unreachable, of a port that was a slice's", RESPONDER, sock=False)
    yield Row(
        *(icmp, "port unreachable, of a port that nobody had", RESPONDER),
        cells={"out": "- -/- k", "local": "->a a/- k"},
        sock=False,
    )
    yield Row(
        *(icmp, "error about a TCP connection", RESPONDER),
        cells={"out": "c", "local": "c"},
        sock=False,
    )
    yield Row(
        *(icmp, "packet too big (PMTU)", RESPONDER),
        cells={"out": "- none r", "local": "c"},
        nat={"out": "- none r"},
        sock=False,
    )

    others = "Other protocols"
    unseen = {"in": "- -/a l", "local": "a>- a/b l"}
    yield Row(others, "SCTP INIT", ORIGINATOR, cells=unseen, first=True, needs="sctp")
    yield Row(others, "SCTP INIT-ACK", RESPONDER, needs="sctp")
    yield Row(others, "SCTP COOKIE-ECHO", ORIGINATOR, needs="sctp")
    yield Row(others, "SCTP, data of who began", ORIGINATOR, needs="sctp")
    yield Row(
        *(others, "SCTP, data of the other", RESPONDER),
        nat_bpf={"out": "-+a -/- 5", "local": "-+b>-+b a/- 5"},
        needs="sctp",
    )
    yield Row(others, "GRE by a raw socket", ORIGINATOR, cells=unseen, first=True)
    yield Row(others, "GRE, the answer", RESPONDER)
    yield Row(
        *(others, "GRE tunnel: the packet inside", ORIGINATOR),
        cells={"local": "c"},
        first=True,
        needs="gre",
    )
    yield Row(
        *(others, "GRE tunnel: the outer packet", ORIGINATOR),
        cells={"out": "a -/- t", "in": "- -/- t", "local": "c"},
        first=True,
        nat_bpf={"out": "a a/- 4"},
        needs="gre",
    )

    whose = "Whose it is, and what others set"
    only_out = {"in": "c", "local": "c"}
    yield Row(whose, "of a sub-cgroup", ORIGINATOR, cells=only_out, first=True)
    yield Row(
        *(whose, "to a socket older than its slice, before", ORIGINATOR),
        cells={"out": "c", "in": "- -/- o", "local": "c"},
        nat={"in": "p"},
    )
    yield Row(
        *(whose, "to the same, from then on", ORIGINATOR),
        cells={"out": "c", "in": "l -/l", "local": "c"},
        nat={"in": "p"},
    )
    yield Row(
        *(whose, "of the node", ORIGINATOR),
        cells={"out": "- -/- o", "in": "- -/- o", "local": "->- -/- o"},
        first=True,
    )
    yield Row(
        *(whose, "forwarded", ORIGINATOR),
        cells={"out": "- -/- r", **only_out},
    )
    yield Row(
        *(whose, "with another's upper bits, first packet", ORIGINATOR),
        cells={"out": "a^ a/-", "in": "a^ -/a", "local": "c"},
        bpf={"in": "-^ -/a 2"},
        first=True,
    )
    yield Row(
        *(whose, "with another's upper bits, the rest", ORIGINATOR),
        cells={"out": "a^ a/-", "in": "a^ -/a", "local": "c"},
    )
    raw = {"in": "c", "local": "c"}
    yield Row(whose, "raw answer from a reserved port", RESPONDER, cells=raw)
    yield Row(
        *(whose, "raw answer where no socket is", RESPONDER),
        cells=raw,
        bpf={"out": "a -/- 3"},
    )
    yield Row(
        *(whose, "raw answer where the node's server is", RESPONDER),
        cells={"out": "a -/- i", **raw},
    )
    yield Row(
        *(whose, "raw packet into another slice's connection", ORIGINATOR),
        cells={"out": "none a/- g", **raw},
        nat={"out": "- a/- n"},
        nat_bpf={"out": "b a/- n"},
    )
    yield Row(
        *(whose, "raw ICMP error about another's connection", RESPONDER),
        cells={"out": "a -/- i", **raw},
    )


ROWS = list(_rows())


def expected(datapath: str, rules: str, lacking: frozenset[str] = frozenset()) -> dict[str, str]:
    """Every cell by its key; ``lacking``: what this kernel does not have (Row.needs)."""
    return {
        key(row.name, column, family): "x" if row.needs in lacking and cell != "c" else cell
        for row in ROWS
        for family in FAMILIES
        for column, cell in row.expected(datapath, rules, family).items()
    }


def key(row: str, column: str, family: int) -> str:
    """A cell's key."""
    return f"{row}|{column}|{family}"
