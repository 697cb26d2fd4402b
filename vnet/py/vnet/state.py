"""What the last ``up`` put in place, so that ``down`` takes away exactly that."""

import os
from pathlib import Path

import msgspec

from vnet.errors import NodeError
from vnet.rules import Variant


class Made(msgspec.Struct):
    """What iptables-nft had to make for our rules in one family."""

    table: bool = False
    chains: list[str] = []


class State(msgspec.Struct):
    """The content of state.json."""

    since: int  #: ns UTC: when the node came up
    variant: Variant
    module_loaded: bool = False  #: by us; otherwise it was there before
    sysctls: dict[str, str] = {}  #: values before ours
    made: dict[str, Made] = {}  #: by family, "4" and "6"
    version: int = 1


def text(path: Path) -> str | None:
    """The file as it is; None if the node is down."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def load(path: Path) -> State | None:
    """The state; None if the node is down. Raises NodeError if it is not one of ours."""
    found = text(path)
    try:
        return None if found is None else msgspec.json.decode(found, type=State)
    except msgspec.MsgspecError as error:
        raise NodeError(f"{path}: {error}", "delete it, then `vnet down` and `vnet up`") from error


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
