"""Where things are kept. Every place can be moved by one option or variable."""

from dataclasses import dataclass
from pathlib import Path

CONFIG_DIR = Path("/etc/vnet/slices.d")
STATE_DIR = Path("/var/lib/vnet")
RUN_DIR = Path("/run/vnet")
BPF_DIR = Path("/sys/fs/bpf/vnet")


@dataclass(frozen=True)
class Paths:
    """The four directories, and the files in them that have a name."""

    config_dir: Path = CONFIG_DIR  #: slices, *.toml
    state_dir: Path = STATE_DIR  #: survives a reboot
    run_dir: Path = RUN_DIR  #: does not
    bpf_dir: Path = BPF_DIR  #: on bpffs: what the kernel keeps of the eBPF programs

    @property
    def node_config(self) -> Path:
        """The node's own settings, beside the slices' directory."""
        return self.config_dir.parent / "vnet.toml"

    @property
    def registry(self) -> Path:
        """SQLite: which slice held which xid when."""
        return self.state_dir / "registry.db"

    @property
    def lock(self) -> Path:
        """Held (flock) by the one command that changes the node."""
        return self.run_dir / "lock"

    @property
    def journal(self) -> Path:
        """How to undo an ``up`` that is under way; absent otherwise."""
        return self.run_dir / "journal"

    @property
    def state(self) -> Path:
        """What the last ``up`` put in place; absent when the node is down."""
        return self.run_dir / "state.json"
