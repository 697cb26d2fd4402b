"""The settings of connection tracking that accounting needs."""

from collections.abc import Mapping
from pathlib import Path

from vnet.errors import NodeError

#: Each with the reason it is needed. They are per network namespace.
WANTED: dict[str, str] = {
    # Off by default: flows would have no packets and bytes.
    "net.netfilter.nf_conntrack_acct": "1",
    # Off by default: flows would have no start and end.
    "net.netfilter.nf_conntrack_timestamp": "1",
    # 2, the default since 5.19, prepares only those connections for events that
    # begin while somebody listens: one that began before the collector did
    # would end unseen (nf_ct_ecache_ext_add in nf_conntrack_ecache.c).
    "net.netfilter.nf_conntrack_events": "1",
}


def _file(key: str) -> Path:
    return Path("/proc/sys") / key.replace(".", "/")


def read(keys: Mapping[str, str] = WANTED) -> dict[str, str | None]:
    """{key: value now}; None where the kernel has no such setting (yet)."""
    found: dict[str, str | None] = {}
    for key in keys:
        try:
            found[key] = _file(key).read_text().strip()
        except FileNotFoundError:
            found[key] = None
    return found


def write(key: str, value: str) -> None:
    """Set one. Raises NodeError."""
    try:
        _file(key).write_text(value)
    except FileNotFoundError as error:
        raise NodeError(
            f"sysctl {key}: this kernel has no such setting",
            "it needs CONFIG_NF_CONNTRACK_TIMESTAMP and CONFIG_NF_CONNTRACK_EVENTS, "
            "as distributions' kernels have",
        ) from error
    except OSError as error:
        raise NodeError(
            f"sysctl {key} = {value}: the kernel says: {error.strerror}",
            "is /proc/sys writable here (containers often have it read-only)?",
        ) from error


def restore(old: Mapping[str, str]) -> list[str]:
    """Put old values back where ours is still there. Returns the keys put back.

    Who changed a setting after us meant it.
    """
    now = read(old)
    put_back = []
    for key, value in old.items():
        if now[key] == WANTED.get(key) and now[key] != value:
            write(key, value)
            put_back.append(key)
    return put_back
