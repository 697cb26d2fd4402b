"""Which data path this node gets, and why: asked before anything is changed."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vnet import bpf, datapath, iptables, module
from vnet.datapath import DataPath
from vnet.errors import ModuleError, NodeError, RulesError, VnetError
from vnet.iptables import Variant
from vnet.nodeconfig import Asked, PacketSockets
from vnet.paths import Paths

_PACKET_CURE = (
    "boot with lsm=...,bpf on the kernel's command line; or keep packet sockets from the slices by "
    "other means (drop CAP_NET_RAW, or a seccomp filter that refuses socket(AF_PACKET), "
    "socket(AF_XDP) and socket(AF_INET, SOCK_PACKET)) and then say so: "
    'packet_sockets = "unguarded" under [guard] in {}'
)


def packet_cure(node_config: Path) -> str:
    """What to do where packet sockets cannot be refused."""
    return _PACKET_CURE.format(node_config)


@dataclass(frozen=True)
class Choice:
    """What ``up`` is going to put in place."""

    datapath: DataPath
    why: str
    variant: Variant
    lsm: bool  #: packet sockets are refused by BPF LSM


def choose(asked: Asked, variant: Variant, packet_sockets: PacketSockets, paths: Paths) -> Choice:
    """Decide. Raises NodeError, ModuleError, RulesError if nothing of what is asked can be had.

    Whether the programs themselves can be loaded, which every data path's guard
    needs, is not asked here: that costs as much as loading them, and is undone
    as well.
    """
    why_not = _lsm_lacking(paths.bpf_dir / bpf.version())
    if why_not and packet_sockets == "guarded":
        raise NodeError(
            f"packet sockets cannot be refused on this kernel: {why_not}",
            packet_cure(paths.node_config),
        )
    chosen, why = _data_path(asked, variant)
    return Choice(chosen, why, variant, not why_not)


@cache
def _lsm_lacking(instance: Path) -> str:
    """Asked by loading those programs, unless they are in place."""
    if instance.is_dir() and not bpf.healthy(instance, lsm=True):
        return ""
    return bpf.lsm_lacking()


def _data_path(asked: Asked, variant: Variant) -> tuple[DataPath, str]:
    if asked == "module":
        require_module()
        probe("module", variant)
        return "module", "it was asked for"
    if asked == "bpf":
        probe("bpf", variant)
        return "bpf", "it was asked for"
    try:
        require_module()
        probe("module", variant)
        return "module", "the kernel module is loaded or can be"
    except VnetError as error:
        first = error
    try:
        probe("bpf", variant)
    except VnetError as second:
        raise NodeError(
            "no data path can be had on this kernel:\n"
            f"  module: {first.message}\n  bpf: {second.message}",
            first.cure,
        ) from second
    return "bpf", first.message


def require_module() -> None:
    """Raise ModuleError or NodeError if the module's data path is bound to fail."""
    module.loadable()
    directories = [iptables.PLUGIN.parent, *iptables.system_directories()]
    for directory in directories:
        plugin = directory / "libxt_MARK.so"
        if plugin.exists() and iptables.is_ours(plugin):
            return
    raise ModuleError(
        "iptables' plugin libxt_MARK.so with --copy-xid is in none of "
        + ", ".join(map(str, directories)),
        "build it: make -C vnet/ext/iptables, or install the package again",
    )


_PINNED = re.compile(r"--object-pinned \S+")


def probe(kind: DataPath, variant: Variant) -> None:
    """Ask iptables whether the kernel has every match and target of a data path's rules.

    Raises RulesError with its answer. The programs are not there yet: a
    filter of one instruction stands in for each. Nothing is committed.
    """
    for family in iptables.families():
        chains = datapath.wanted(kind, Path("/"), family)
        # Reading a legacy table makes it: one that is there already serves as
        # well, but nat, in which iptables does not allow DROP.
        there = iptables.legacy_tables(family) if variant == "legacy" else []
        table = next((name for name in there if name in ("raw", "mangle", "filter")), "mangle")
        lines = [f"*{table}", *(f":{chain.name} - [0:0]" for chain in chains)]
        for chain in chains:
            lines += [f"-A {chain.name} {rule}" for rule in _stand_in(chain.rules)]
        # A base chain of another table would do for the jumps, but not all of them: INPUT has
        # none in raw. So they are tried from a chain of ours, after all of these.
        lines.insert(1, ":VNET-TRY - [0:0]")
        lines += [f"-A VNET-TRY {rule}" for rule in _stand_in(c.jump for c in chains if c.base)]
        try:
            iptables.test(family, variant, "\n".join([*lines, "COMMIT", ""]))
        except RulesError as error:
            raise RulesError(
                f"rules that data path {kind} needs (IPv{family}): {error.message}", error.cure
            ) from error


def _stand_in(lines: Iterable[str]) -> list[str]:
    return [
        _PINNED.sub('--bytecode "1,6 0 0 0"', line)
        for line in lines
        if "--copy-xid" not in line  # exists once the module is loaded
    ]
