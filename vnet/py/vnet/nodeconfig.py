"""The node's own settings from vnet.toml. docs/config.md is the reference of the format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from vnet.errors import ConfigError
from vnet.places import convert

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
    found = convert(path, text, _File)
    return NodeConfig(found.datapath, found.guard.mode, found.guard.packet_sockets)
