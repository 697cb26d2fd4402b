"""The node's own settings from vnet.toml. docs/config.md is the reference of the format."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from vnet.errors import ConfigError
from vnet.places import dotted, explain, locate

Asked = Literal["auto", "module", "bpf"]
Mode = Literal["enforce", "observe"]
PacketSockets = Literal["guarded", "unguarded"]


class _Guard(msgspec.Struct, forbid_unknown_fields=True):
    mode: Mode = "enforce"
    packet_sockets: PacketSockets = "guarded"


class _File(msgspec.Struct, forbid_unknown_fields=True):
    datapath: Asked = "auto"
    guard: _Guard = msgspec.field(default_factory=_Guard)


@dataclass(frozen=True)
class NodeConfig:
    """vnet.toml; an absent file is all defaults."""

    datapath: Asked = "auto"
    mode: Mode = "enforce"
    packet_sockets: PacketSockets = "guarded"


def load(path: Path) -> NodeConfig:
    """Read vnet.toml. Raises ConfigError with file, line and key."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return NodeConfig()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"\(at line (\d+), column \d+\)", str(error))
        line = int(at[1]) if at else text.count("\n") + 1
        raise ConfigError(f"{path}:{line}: not TOML: {error}") from error
    try:
        found = msgspec.convert(values, _File)
    except msgspec.ValidationError as error:
        what, keys = explain(str(error))
        raise ConfigError(f"{path}:{locate(text, keys)}: {dotted(keys)}: {what}") from error
    return NodeConfig(found.datapath, found.guard.mode, found.guard.packet_sockets)
