"""What the last ``up`` put in place, so that ``down`` takes away exactly that."""

import os
from pathlib import Path
from typing import Any

import msgspec

from vnet import datapath as datapaths
from vnet.datapath import Chain, DataPath, Family
from vnet.errors import NodeError
from vnet.iptables import Variant
from vnet.nodeconfig import Mode, PacketSockets

VERSION = 2


class Made(msgspec.Struct):
    """What iptables-nft had to make for our rules in one family."""

    tables: list[str] = []
    chains: list[str] = []  #: base chains, as TABLE/CHAIN


class State(msgspec.Struct):
    """The content of state.json."""

    since: int  #: ns UTC: when the node came up
    variant: Variant
    module_loaded: bool = False  #: by us; otherwise it was there before
    sysctls: dict[str, str] = {}  #: values before ours
    made: dict[str, Made] = {}  #: by family, "4" and "6"
    datapath: DataPath = "module"
    why: str = ""  #: it was chosen
    instance: str = ""  #: the directory on bpffs of the eBPF programs
    bpffs: bool = False  #: we mounted it
    mode: Mode = "enforce"  #: of the guard
    packet_sockets: PacketSockets = "guarded"
    reserved: str = ""  #: ports we added to ip_local_reserved_ports, as the kernel writes them
    interfaces: dict[str, int] = {}  #: of containers, with the xids they give
    version: int = VERSION


def chains(state: State, family: Family) -> tuple[Chain, ...]:
    """Our chains of one family, as a node in this state has them."""
    return datapaths.wanted(
        state.datapath, Path(state.instance), family, containers=bool(state.interfaces)
    )


def text(path: Path) -> str | None:
    """The file as it is; None if the node is down."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def load(path: Path) -> State | None:
    """The state; None if the node is down. Raises NodeError if it is not one of ours."""
    found = text(path)
    if found is None:
        return None
    try:
        values = msgspec.json.decode(found, type=dict[str, Any])
        if values.get("version") == 1:
            _from_1(values)
        return msgspec.convert(values, State)
    except (msgspec.MsgspecError, AttributeError) as error:
        raise NodeError(f"{path}: {error}", "delete it, then `vnet down` and `vnet up`") from error


def _from_1(values: dict[str, Any]) -> None:
    """Version 1 knew table mangle only, and no data path but the module."""
    for made in values.get("made", {}).values():
        made["tables"] = ["mangle"] if made.pop("table", False) else []
        made["chains"] = [f"mangle/{chain}" for chain in made.get("chains", [])]
    values["version"] = VERSION


def dump(state: State) -> str:
    return msgspec.json.format(msgspec.json.encode(state)).decode() + "\n"


def draft_of(path: Path) -> Path:
    """Where ``replace`` writes first; stays behind if it is killed there."""
    return path.with_name(f".{path.name}.new")


def replace(path: Path, content: str, mode: int = 0o644) -> None:
    """Write a file so that a reader finds the old one or the new one, whole."""
    draft = draft_of(path)
    with draft.open("w") as out:
        os.fchmod(out.fileno(), mode)
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    draft.rename(path)
