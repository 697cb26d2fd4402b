"""The chains and rules of each data path: pure data.

``rules`` puts them in place, compares them and takes them out; the reasons
why a rule is as it is are here, and in docs/datapaths.md.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DataPath = Literal["module", "bpf"]
Family = Literal[4, 6]


@dataclass(frozen=True)
class Chain:
    """A chain of our own."""

    table: str  #: raw or mangle
    #: the base chain from which a rule leads here; "": only our own chains lead here.
    #: These rules are the first of the base chain, in the order of the chains.
    base: str
    name: str
    #: Each as iptables-save prints it behind ``-A NAME ``. Chains that lead to
    #: others of ours come after those.
    rules: tuple[str, ...]
    condition: str = ""  #: the matches of the base chain's rule; "": it jumps always

    @property
    def jump(self) -> str:
        """The base chain's rule, as iptables-save prints it behind ``-A BASE ``."""
        return f"{self.condition} -j {self.name}".lstrip()


#: (table, our chain): base chain, of all data paths and earlier versions.
OURS: dict[tuple[str, str], str] = {
    ("raw", "VNET-OUT"): "OUTPUT",
    ("mangle", "VNET-SAVE"): "",
    ("mangle", "VNET-FILL"): "",
    ("mangle", "VNET-PASS"): "",
    ("mangle", "VNET-CONN"): "",
    ("mangle", "VNET-RAW"): "",
    ("mangle", "VNET-TCP"): "",
    ("mangle", "VNET-RECV"): "",
    ("mangle", "VNET-VETH"): "INPUT",
    ("mangle", "VNET-ABOVE"): "INPUT",
    ("mangle", "VNET-INPUT"): "INPUT",
    ("mangle", "VNET-FORWARD"): "FORWARD",
    ("mangle", "VNET-POST"): "POSTROUTING",
}

#: What a data path does otherwise than docs/meanings.md says, and what forces it.
DIFFERENCES: dict[DataPath, tuple[str, ...]] = {
    "module": (),
    "bpf": (
        "a SYN that reuses the addresses and ports of a connection in TIME_WAIT comes in as "
        "nobody's, its answer and all that follows as the listener's: xt_socket finds the "
        "TIME_WAIT socket, which has no mark",
        "of a packet that has bits in the upper half of its mark, only the connection says who "
        "receives it: --restore-skmark of xt_socket writes the whole mark",
        "a raw sender's TCP or UDP answers to somebody else's connection fill no empty half, "
        "unless their port is reserved to its slice: a match cannot look up who else is there",
        "two CPUs that write the halves of one connection at the same moment may lose one, "
        "which the next packet writes again: CONNMARK does not write atomically",
        "on a connection of a slice's that is not established, what comes in to a socket of the "
        "node's own and is no SYN is the slice's: the node's sockets have no mark to restore",
        "where the guard only observes, a packet with a forged mark has its connection's owner, or "
        "none: a match cannot put the socket's own mark back",
    ),
}

_ORIGINAL = "-m conntrack --ctdir ORIGINAL"
_REPLY = "-m conntrack --ctdir REPLY"
_UNTRACKED = "-m conntrack --ctstate INVALID,UNTRACKED"
_NOBODYS = "-m mark --mark 0x0/0xffff"
_SOMEBODYS = "-m mark ! --mark 0x0/0xffff"
_NOTHING_ABOVE = "-m mark --mark 0x0/0xffff0000"
_SOMETHING_ABOVE = "-m mark ! --mark 0x0/0xffff0000"
_CLEAR = "-j MARK --set-xmark 0x0/0xffff"
_CLEAR_ABOVE = "-j MARK --set-xmark 0x0/0xffff0000"
_SOCKET = "-m socket --nowildcard --restore-skmark"
_SYN = "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN"

# The halves of ct->mark: the originator's below, the responder's above.
_SAVE_LOW = "-j CONNMARK --save-mark --nfmask 0xffff --ctmask 0xffff"
_SAVE_HIGH = "-j CONNMARK --save-mark --nfmask 0xffff --ctmask 0xffff0000 --left-shift-mark 16"
_RESTORE_LOW = "-j CONNMARK --restore-mark --nfmask 0xffff --ctmask 0xffff"
_RESTORE_HIGH = (
    "-j CONNMARK --restore-mark --nfmask 0xffff --ctmask 0xffff0000 --right-shift-mark 16"
)
_LOW_FILLED = "-m connmark ! --mark 0x0/0xffff"
_HIGH_FILLED = "-m connmark ! --mark 0x0/0xffff0000"
_LOW_EMPTY = "-m connmark --mark 0x0/0xffff"
_HIGH_EMPTY = "-m connmark --mark 0x0/0xffff0000"


def _match(instance: Path, program: str) -> str:
    return f"-m bpf --object-pinned {instance}/progs/{program}"


_VETH = f"! -i lo {_SOMEBODYS}"
# The receiving socket's mark onto the packet; true if something is above then.
_RECEIVER = f"{_NOTHING_ABOVE} {_SOCKET} {_SOMETHING_ABOVE}"

#: what may stand before the jump in a base chain's rule that is ours
_CONDITIONS = re.compile(
    rf"(?:{re.escape(_RECEIVER)}|(?:{re.escape(_VETH)} )?"
    r"-m bpf --object-pinned \S+/progs/vnet_\w+|)"
)


def is_our_jump(table: str, base: str, rule: str) -> tuple[str, str] | None:
    """(our chain, the condition) of a base chain's rule that is one of ours; else None.

    ``rule``: as iptables-save prints it behind ``-A BASE ``.
    """
    condition, _, chain = f" {rule}".rpartition(" -j ")
    condition = condition.strip()
    if OURS.get((table, chain)) != base or not _CONDITIONS.fullmatch(condition):
        return None
    return chain, condition


def wanted(
    kind: DataPath, instance: Path, family: Family, containers: bool = False
) -> tuple[Chain, ...]:
    """The chains of a data path for one family; ``instance`` is from ``bpf.load``.

    ``containers``: some slice has interfaces, so that what is forwarded may be its.
    """
    # A packet of an ordinary socket meets one program, and no rule of ours.
    guard = Chain(
        "raw",
        "OUTPUT",
        "VNET-OUT",
        (
            f"{_match(instance, 'vnet_gate')} -j DROP",
            f"{_SOMEBODYS} -m addrtype --src-type LOCAL {_match(instance, 'vnet_local')} -j RETURN",
            f"{_SOMEBODYS} {_match(instance, 'vnet_spoof')} -j DROP",
        ),
        _match(instance, "vnet_odd"),
    )
    chains = (guard, *(_module(instance) if kind == "module" else _bpf(instance, containers)))
    if not containers:
        return chains
    # POSTROUTING does the same; here it is done for those who log, filter or
    # classify in FORWARD.
    rule = "-j MARK --copy-xid" if kind == "module" else "-j VNET-PASS"
    return (*chains, Chain("mangle", "FORWARD", "VNET-FORWARD", (rule,)))


def _module(instance: Path) -> tuple[Chain, ...]:
    return (
        # INPUT, because early demux has found most receiving sockets by then.
        Chain("mangle", "INPUT", "VNET-INPUT", ("-j MARK --copy-xid",)),
        # POSTROUTING and not OUTPUT, because a mark changed in OUTPUT costs
        # every packet a second route look-up (ip_route_me_harder in
        # iptable_mangle.c).
        Chain(
            "mangle",
            "POSTROUTING",
            "VNET-POST",
            (f"{_match(instance, 'vnet_join')} -j DROP", "-j MARK --copy-xid"),
        ),
    )


def _bpf(instance: Path, containers: bool) -> tuple[Chain, ...]:
    """The same in the same hooks; a packet carries its socket's mark from birth.

    A packet of a settled connection meets one program in POSTROUTING, in INPUT
    xt_socket and one program, and none of our chains. Of the others, a rule
    whose packets are counted by reason ends the chain for them, or counts and
    does nothing.
    """
    # What a container sends to this host: before its mark gives way to the receiver's.
    veth = Chain(
        "mangle",
        "INPUT",
        "VNET-VETH",
        ("-g VNET-FILL",),
        f"{_VETH} {_match(instance, 'vnet_contained')}",
    )
    return (
        # The sender's mark into its half. CONNMARK sends a mark event if, and
        # only if, that changes something.
        Chain(
            "mangle",
            "",
            "VNET-SAVE",
            (
                f"{_ORIGINAL} {_LOW_FILLED}",  # counts conflicts
                f"{_ORIGINAL} {_SAVE_LOW}",
                f"{_REPLY} {_HIGH_FILLED}",
                f"{_REPLY} {_SAVE_HIGH}",
            ),
        ),
        # What a container sends fills its half, and takes none over: in there
        # one may send anything. An ICMP error says nothing about the connection
        # that it quotes.
        Chain(
            "mangle",
            "",
            "VNET-FILL",
            (
                "-m conntrack --ctstate RELATED --ctstatus CONFIRMED -j RETURN",
                f"{_ORIGINAL} {_LOW_EMPTY} {_SAVE_LOW}",
                f"{_REPLY} {_HIGH_EMPTY} {_SAVE_HIGH}",
            ),
        ),
        # It passes through: a container sends it, whose interface has marked
        # it; or receives it, whose half answers.
        Chain(
            "mangle",
            "",
            "VNET-PASS",
            (
                f"{_match(instance, 'vnet_contained')} -g VNET-FILL",
                _CLEAR,
                f"{_ORIGINAL} {_RESTORE_HIGH}",
                f"{_REPLY} {_RESTORE_LOW}",
                f"{_SOMEBODYS} -j RETURN",
                "-j RETURN",
            ),
        ),
        # No socket of a user's sends it: its half answers.
        Chain(
            "mangle",
            "",
            "VNET-CONN",
            (
                f"{_match(instance, 'vnet_passing')} -g VNET-PASS",
                f"{_ORIGINAL} {_RESTORE_LOW}",
                f"{_REPLY} {_RESTORE_HIGH}",
                f"{_UNTRACKED} {_CLEAR}",
                f"{_UNTRACKED} -j RETURN",
                f"{_SOMEBODYS} -j RETURN",
                "-j RETURN",
            ),
        ),
        # A slice's raw sender, and the half is empty or another's.
        Chain(
            "mangle",
            "",
            "VNET-RAW",
            (
                f"{_match(instance, 'vnet_join')} -j DROP",
                f"{_ORIGINAL} {_LOW_EMPTY} {_match(instance, 'vnet_may_fill')} -g VNET-SAVE",
                f"{_REPLY} {_HIGH_EMPTY} {_match(instance, 'vnet_may_fill')} -g VNET-SAVE",
                "-j RETURN",
            ),
        ),
        Chain(
            "mangle",
            "POSTROUTING",
            "VNET-POST",
            (
                f"{_match(instance, 'vnet_unowned')} -g VNET-CONN",
                # It opens a connection, which may be in the entry of the last one.
                f"{_SYN} {_NOBODYS} {_LOW_FILLED} {_ORIGINAL} "
                f"{_match(instance, 'vnet_holds')} -g VNET-SAVE",
                f"{_NOBODYS} -j RETURN",  # the node's own, which erases nothing else
                f"{_match(instance, 'vnet_holds')} -g VNET-SAVE",
                f"{_match(instance, 'vnet_raw')} -g VNET-RAW",
                "-j RETURN",  # a tunnel's outer packet, a multicast packet that loops back
            ),
            _match(instance, "vnet_unsettled"),
        ),
        # A receiving socket was found, and its mark is on the packet: 0 if it
        # is the node's, which erases a half only with a SYN. Its upper half is
        # not the packet's.
        Chain(
            "mangle",
            "",
            "VNET-RECV",
            (
                _CLEAR_ABOVE,
                f"-p udp {_NOBODYS} -j RETURN",
                f"{_NOBODYS} {_HIGH_EMPTY} {_ORIGINAL} -j RETURN",
                f"{_NOBODYS} {_LOW_EMPTY} {_REPLY} -j RETURN",
                f"{_ORIGINAL} {_HIGH_FILLED}",
                f"{_ORIGINAL} {_SAVE_HIGH}",
                f"{_REPLY} {_LOW_FILLED}",
                f"{_REPLY} {_SAVE_LOW}",
            ),
        ),
        # The same; but the node's and those in TIME_WAIT, which have no mark either,
        # leave it to the half. It comes back from VNET-RECV and finds it there.
        Chain("mangle", "", "VNET-TCP", (_CLEAR_ABOVE, f"{_SOMEBODYS} -g VNET-RECV")),
        *([veth] if containers else []),
        # This rule puts the receiver's mark on every packet that has a receiver.
        # What of it is not the packet's goes at once.
        Chain("mangle", "INPUT", "VNET-ABOVE", (_CLEAR_ABOVE,), _RECEIVER),
        # The connection does not name that receiver. UDP goes by its socket then,
        # since its port can change hands while the connection lasts. TCP goes by
        # a slice's socket: connection tracking may have kept the entry of an
        # earlier connection with these addresses and ports (tcp_packet(): it
        # ignores a SYN on one that it holds for closed, until that is
        # answered); and a SYN by anybody's. For the rest (TIME_WAIT, or no socket)
        # a filled half answers. An ICMP error has no receiver: its connection
        # answers. What may be there of the lower half is the sender's, where
        # sender and receiver are on this host.
        Chain(
            "mangle",
            "INPUT",
            "VNET-INPUT",
            (
                f"-p udp {_NOTHING_ABOVE} {_match(instance, 'vnet_whole')} {_SOCKET} -g VNET-RECV",
                _CLEAR,
                f"{_SYN} {_NOTHING_ABOVE} {_match(instance, 'vnet_whole')} {_SOCKET} -g VNET-RECV",
                f"-p tcp {_NOTHING_ABOVE} {_match(instance, 'vnet_whole')} {_SOCKET} -j VNET-TCP",
                f"{_ORIGINAL} {_RESTORE_HIGH}",
                f"{_REPLY} {_RESTORE_LOW}",
                f"{_SOMEBODYS} -j RETURN",
                f"-p tcp {_NOTHING_ABOVE} {_match(instance, 'vnet_whole')} {_SOCKET} -g VNET-RECV",
                f"{_UNTRACKED} -j RETURN",
                "-j RETURN",
            ),
            _match(instance, "vnet_incoming"),
        ),
    )


#: counter, named as the module's: the rules (chain, place from 0) that count
#: towards it, and those that count off.
_Places = tuple[tuple[str, int], ...]
_COUNTERS: dict[str, tuple[_Places, _Places]] = {
    "out-socket": (
        (("VNET-POST", 3), ("VNET-POST", 4), ("VNET-POST", 5)),
        (("VNET-RAW", 0),),  # dropped
    ),
    "out-conn": ((("VNET-CONN", 5),), ()),
    "in-lookup": ((("VNET-RECV", 0),), (("VNET-RECV", 1), ("VNET-RECV", 2), ("VNET-RECV", 3))),
    "in-conn": ((("VNET-INPUT", 6),), (("VNET-TCP", 1),)),
    "through-interface": ((("VNET-PASS", 0),), ()),
    "through-conn": ((("VNET-PASS", 4),), ()),
    "node-socket": (
        (
            *(("VNET-POST", 1), ("VNET-POST", 2)),
            *(("VNET-RECV", 1), ("VNET-RECV", 2), ("VNET-RECV", 3)),
        ),
        (),
    ),
    "no-socket": ((("VNET-CONN", 6), ("VNET-INPUT", 9)), ()),
    "no-conntrack": ((("VNET-CONN", 4), ("VNET-INPUT", 8)), ()),
    "forwarded": ((("VNET-PASS", 5),), ()),
    "filled": (
        (
            *(("VNET-SAVE", 1), ("VNET-SAVE", 3), ("VNET-RECV", 5), ("VNET-RECV", 7)),
            *(("VNET-FILL", 1), ("VNET-FILL", 2)),
        ),
        (("VNET-SAVE", 0), ("VNET-SAVE", 2), ("VNET-RECV", 4), ("VNET-RECV", 6)),
    ),
    "conflict": (
        (("VNET-SAVE", 0), ("VNET-SAVE", 2), ("VNET-RECV", 4), ("VNET-RECV", 6)),
        (),
    ),
    "intrusion": ((("VNET-RAW", 3),), ()),
}
#: counters to which the programs' own count of settled packets adds
_SETTLED = ("out-socket", "in-lookup")

_COUNTED = re.compile(r"\[(\d+):\d+\] -A (VNET-\S+) ")


def counters(texts: Iterable[str], settled: tuple[int, int] = (0, 0)) -> dict[str, int]:
    """Packets by reason under the bpf data path, out of what iptables-save -c prints.

    ``settled``: (sent, received) packets of settled connections, which meet no
    rule that counts; ``bpf.settled`` has them. The names are the module's
    (docs/netlink.md). Rules count from when they were put in place, programs
    from when they were loaded. What early demux finds is not told apart from
    what is looked up: both are ``in-lookup``.
    """
    packets: dict[tuple[str, int], int] = {}
    for text in texts:
        places: dict[str, int] = {}
        for line in text.splitlines():
            if match := _COUNTED.match(line):
                place = places[match[2]] = places.get(match[2], -1) + 1
                key = (match[2], place)
                packets[key] = packets.get(key, 0) + int(match[1])
    found = {
        name: max(0, sum(packets.get(k, 0) for k in plus) - sum(packets.get(k, 0) for k in minus))
        for name, (plus, minus) in _COUNTERS.items()
    }
    for name, number in zip(_SETTLED, settled, strict=True):
        found[name] += number
    return found
