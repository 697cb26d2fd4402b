"""Every way ``vnet`` fails, with the exit code it ends in.

A message says what was tried and what came back; ``cure`` says what to do.
"""

__all__ = [
    "BpfError",
    "ConfigError",
    "ConflictError",
    "Interrupted",
    "LockError",
    "ModuleError",
    "NetlinkError",
    "NodeError",
    "RulesError",
    "UsageError",
    "VnetError",
]


class VnetError(Exception):
    """Base of all errors that are reported without a traceback."""

    exit_code = 1

    def __init__(self, message: str, cure: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.message}\n  {self.cure}" if self.cure else self.message


class UsageError(VnetError):
    """Input that cannot be meant: nothing was changed."""

    exit_code = 2


class ConfigError(UsageError):
    """Slice files that cannot be used; one line per problem: file, line, key."""


class ConflictError(UsageError):
    """A fixed xid that somebody else holds, or held too recently."""


class ModuleError(VnetError):
    """The kernel module is not there and could not be loaded."""


class NetlinkError(VnetError):
    """The kernel refused a netlink request. ``errno`` is its reason."""

    def __init__(self, message: str, errno: int, cure: str = "") -> None:
        super().__init__(message, cure)
        self.errno = errno


class BpfError(VnetError):
    """An eBPF program could not be loaded or attached, or a map not be used."""


class RulesError(VnetError):
    """iptables refused our rules, or holds something else than was asked."""


class LockError(VnetError):
    """Another ``vnet`` command is at work on this node."""


class NodeError(VnetError):
    """A step of ``up`` or ``down`` failed."""


class Interrupted(VnetError):
    """A signal asked us to stop; what was begun is being undone."""
