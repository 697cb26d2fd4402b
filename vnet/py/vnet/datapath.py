"""The chains and rules of each data path: pure data.

``rules`` puts them in place, compares them and takes them out; the reasons
why a rule is as it is are here.
"""

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
    ("mangle", "VNET-INPUT"): "INPUT",
    ("mangle", "VNET-POST"): "POSTROUTING",
}

#: What a data path does otherwise than docs/meanings.md says, and what forces it.
DIFFERENCES: dict[DataPath, tuple[str, ...]] = {"module": (), "bpf": ()}


def _match(instance: Path, program: str) -> str:
    return f"-m bpf --object-pinned {instance}/progs/{program}"


def wanted(kind: DataPath, instance: Path, family: Family) -> tuple[Chain, ...]:
    """The chains of a data path for one family; ``instance`` is from ``bpf.load``."""
    guard = Chain(
        "raw",
        "OUTPUT",
        "VNET-OUT",
        (
            f"{_match(instance, 'vnet_gate')} -j DROP",
            "-m mark ! --mark 0x0/0xffff -m addrtype ! --src-type LOCAL "
            f"{_match(instance, 'vnet_spoof')} -j DROP",
        ),
    )
    if kind == "module":
        return (
            guard,
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
    return (guard,)
