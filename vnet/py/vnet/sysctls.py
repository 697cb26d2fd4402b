"""The settings of connection tracking that accounting needs, and reserved local ports."""

import os
from collections.abc import Iterable, Mapping
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


def is_on(path: Path) -> bool:
    """Whether a setting (its file) is there and not 0."""
    try:
        return path.read_text().strip() != "0"
    except OSError:
        return False


# -- ports that the kernel never picks by itself ------------------------------

#: A socket that connects, sends or listens without bind gets a port from
#: ip_local_port_range, and no hook sees that; never one of these. It is per
#: network namespace, and for IPv4 and IPv6 alike (inet_is_local_reserved_port
#: in include/net/ip.h).
RESERVED = "net.ipv4.ip_local_reserved_ports"

#: The kernel takes at most a page of text at a time, and leaves the rest of a
#: longer one to the next write (proc_do_large_bitmap in kernel/sysctl.c).
_TEXT_MAX = 4095


def parse_ports(text: str) -> set[int]:
    """``80,5000-5010`` as a set; nothing is the empty set."""
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _dash, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found


def format_ports(ports: Iterable[int]) -> str:
    """The same set as the kernel writes it: ``80,5000-5010``."""
    words: list[str] = []
    first = last = -1
    for port in [*sorted(ports), 1 << 20]:
        if port == last + 1:
            last = port
            continue
        if first >= 0:
            words.append(str(first) if first == last else f"{first}-{last}")
        first = last = port
    return ",".join(words)


def reserved_ports() -> set[int]:
    """The ports that are reserved now."""
    # One read: the kernel gives nothing from any other offset than 0.
    fd = os.open(_file(RESERVED), os.O_RDONLY)
    try:
        return parse_ports(os.read(fd, 1 << 20).decode())
    finally:
        os.close(fd)


def add_reserved(ports: Iterable[int]) -> None:
    """Reserve these too. Raises NodeError.

    At an offset other than 0 the kernel adds to what there is; at 0 it would
    replace it.
    """
    _write_ports(_pieces(format_ports(ports)), 1)


def set_reserved(ports: Iterable[int]) -> None:
    """Reserve these and no others. Raises NodeError.

    In one step if they fit into one page of text; see ``fits``.
    """
    first, *others = _pieces(format_ports(ports)) or ["\n"]
    _write_ports([first], 0)
    _write_ports(others, 1)


def fits(ports: Iterable[int]) -> bool:
    """Whether ``set_reserved`` is one step: otherwise some are free for a moment."""
    return len(format_ports(ports)) <= _TEXT_MAX


def _pieces(text: str) -> list[str]:
    """The text in parts that the kernel takes whole."""
    pieces: list[str] = []
    for word in text.split(",") if text else []:
        if pieces and len(pieces[-1]) + 1 + len(word) <= _TEXT_MAX:
            pieces[-1] += f",{word}"
        else:
            pieces.append(word)
    return pieces


def _write_ports(pieces: list[str], offset: int) -> None:
    try:
        fd = os.open(_file(RESERVED), os.O_WRONLY)
        try:
            for piece in pieces:
                os.pwrite(fd, piece.encode(), offset)
        finally:
            os.close(fd)
    except OSError as error:
        raise NodeError(
            f"sysctl {RESERVED}: the kernel says: {error.strerror}",
            "is /proc/sys writable here (containers often have it read-only)?",
        ) from error
