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
    base: str  #: the base chain whose first rule jumps here; "": only our own chains do
    name: str
    #: Each as iptables-save prints it behind ``-A NAME ``. Chains that jump to
    #: others of ours come after those.
    rules: tuple[str, ...]


#: (table, our chain): base chain, of all data paths and earlier versions.
OURS: dict[tuple[str, str], str] = {
    ("raw", "VNET-OUT"): "OUTPUT",
    ("mangle", "VNET-SAVE"): "",
    ("mangle", "VNET-FILL"): "",
    ("mangle", "VNET-PASS"): "",
    ("mangle", "VNET-CONN"): "",
    ("mangle", "VNET-RAW"): "",
    ("mangle", "VNET-RECV"): "",
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
_CLEAR = "-j MARK --set-xmark 0x0/0xffff"
_CLEAR_ABOVE = "-j MARK --set-xmark 0x0/0xffff0000"
_SOCKET = "-m socket --nowildcard --restore-skmark"

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


def wanted(
    kind: DataPath, instance: Path, family: Family, containers: bool = False
) -> tuple[Chain, ...]:
    """The chains of a data path for one family; ``instance`` is from ``bpf.load``.

    ``containers``: some slice has interfaces, so that what is forwarded may be its.
    """
    guard = Chain(
        "raw",
        "OUTPUT",
        "VNET-OUT",
        (
            f"{_match(instance, 'vnet_gate')} -j DROP",
            f"{_SOMEBODYS} -m addrtype ! --src-type LOCAL {_match(instance, 'vnet_spoof')} -j DROP",
        ),
    )
    chains = (guard, *(_module(instance) if kind == "module" else _bpf(instance)))
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


def _bpf(instance: Path) -> tuple[Chain, ...]:
    """The same in the same hooks; a packet carries its socket's mark from birth.

    What nearly every packet needs comes first. A rule whose packets are
    counted by reason ends the chain for them, or counts and does nothing.
    """
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
                f"{_match(instance, 'vnet_settled')} -j RETURN",
                f"{_match(instance, 'vnet_unowned')} -g VNET-CONN",
                f"{_NOBODYS} -j RETURN",  # the node's own, which erases nothing
                f"{_match(instance, 'vnet_holds')} -g VNET-SAVE",
                f"{_match(instance, 'vnet_raw')} -g VNET-RAW",
                "-j RETURN",  # a tunnel's outer packet, a multicast packet that loops back
            ),
        ),
        # A receiving socket was found, and its mark is on the packet: 0 if it
        # is the node's. Its upper half is not the packet's.
        Chain(
            "mangle",
            "",
            "VNET-RECV",
            (
                f"{_match(instance, 'vnet_received')} -j RETURN",
                _CLEAR_ABOVE,
                f"{_NOBODYS} -j RETURN",
                f"{_ORIGINAL} {_HIGH_FILLED}",
                f"{_ORIGINAL} {_SAVE_HIGH}",
                f"{_REPLY} {_LOW_FILLED}",
                f"{_REPLY} {_SAVE_LOW}",
            ),
        ),
        # UDP alone is looked up each time, since its port can change hands
        # while the connection lasts. An ICMP error has no receiver: its
        # connection answers. What is there of the lower half is the sender's,
        # where sender and receiver are on this host.
        Chain(
            "mangle",
            "INPUT",
            "VNET-INPUT",
            (
                f"! -i lo {_SOMEBODYS} {_match(instance, 'vnet_contained')} -j VNET-FILL",
                f"-p udp {_NOTHING_ABOVE} {_SOCKET} -g VNET-RECV",
                _CLEAR,
                f"{_ORIGINAL} {_RESTORE_HIGH}",
                f"{_REPLY} {_RESTORE_LOW}",
                f"{_SOMEBODYS} -j RETURN",
                f"-p tcp {_NOTHING_ABOVE} {_SOCKET} -g VNET-RECV",
                f"{_UNTRACKED} -j RETURN",
                "-j RETURN",
            ),
        ),
    )


#: counter, named as the module's: the rules (chain, place from 0) that count
#: towards it, and those that count off.
_Places = tuple[tuple[str, int], ...]
_COUNTERS: dict[str, tuple[_Places, _Places]] = {
    "out-socket": (
        (("VNET-POST", 0), ("VNET-POST", 3), ("VNET-POST", 4), ("VNET-POST", 5)),
        (("VNET-RAW", 0),),  # dropped
    ),
    "out-conn": ((("VNET-CONN", 5),), ()),
    "in-lookup": ((("VNET-RECV", 0), ("VNET-RECV", 1)), (("VNET-RECV", 2),)),
    "in-conn": ((("VNET-INPUT", 5),), ()),
    "through-interface": ((("VNET-PASS", 0),), ()),
    "through-conn": ((("VNET-PASS", 4),), ()),
    "node-socket": ((("VNET-POST", 2), ("VNET-RECV", 2)), ()),
    "no-socket": ((("VNET-CONN", 6), ("VNET-INPUT", 8)), ()),
    "no-conntrack": ((("VNET-CONN", 4), ("VNET-INPUT", 7)), ()),
    "forwarded": ((("VNET-PASS", 5),), ()),
    "filled": (
        (
            *(("VNET-SAVE", 1), ("VNET-SAVE", 3), ("VNET-RECV", 4), ("VNET-RECV", 6)),
            *(("VNET-FILL", 1), ("VNET-FILL", 2)),
        ),
        (("VNET-SAVE", 0), ("VNET-SAVE", 2), ("VNET-RECV", 3), ("VNET-RECV", 5)),
    ),
    "conflict": (
        (("VNET-SAVE", 0), ("VNET-SAVE", 2), ("VNET-RECV", 3), ("VNET-RECV", 5)),
        (),
    ),
    "intrusion": ((("VNET-RAW", 3),), ()),
}

_COUNTED = re.compile(r"\[(\d+):\d+\] -A (VNET-\S+) ")


def counters(texts: Iterable[str]) -> dict[str, int]:
    """Packets by reason under the bpf data path, out of what iptables-save -c prints.

    The names are the module's (docs/netlink.md). They count from when the
    rules were put in place. What early demux finds is not told apart from
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
    return {
        name: max(0, sum(packets.get(k, 0) for k in plus) - sum(packets.get(k, 0) for k in minus))
        for name, (plus, minus) in _COUNTERS.items()
    }
