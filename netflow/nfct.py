"""The kernel's side: netlink sockets to connection tracking, and its settings.

Everything happens in the network namespace this process runs in.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from pathlib import Path

NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_SO_RCVBUFFORCE = 33
_SO_MEMINFO = 55
_SK_MEMINFO_DROPS = 8  # include/uapi/linux/sock_diag.h
_NETLINK_BROADCAST_ERROR = 4
_GROUPS = 1 << 0 | 1 << 1 | 1 << 2  # NFNLGRP_CONNTRACK_NEW, _UPDATE, _DESTROY
_CT_GET = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
_REQUEST_DUMP = 0x001 | 0x300  # NLM_F_REQUEST | NLM_F_DUMP

_SETTINGS = Path("/proc/sys/net/netfilter")


class KernelError(Exception):
    """Connection tracking cannot be followed; the message says what to do."""


@dataclass(frozen=True)
class Setting:
    """One sysctl that must be on, and what is missing without it."""

    name: str
    without: str


_NEEDED = (
    Setting("nf_conntrack_acct", "no connection has counters"),
    Setting("nf_conntrack_timestamp", "no connection has a start"),
    Setting("nf_conntrack_events", "no event is sent"),
)


def check_settings() -> list[str]:
    """Warnings about connection tracking's settings. Raises KernelError if it cannot do."""
    values = {}
    for setting in _NEEDED:
        try:
            values[setting.name] = int((_SETTINGS / setting.name).read_text())
        except OSError as error:
            raise KernelError(
                f"cannot read {_SETTINGS / setting.name} ({error.strerror}): is nf_conntrack "
                "loaded? try 'modprobe nf_conntrack_netlink'"
            ) from None
    off = [setting for setting in _NEEDED if not values[setting.name]]
    if off:
        why = "; ".join(f"net.netfilter.{s.name} is 0, so {s.without}" for s in off)
        cure = " ".join(f"net.netfilter.{s.name}=1" for s in off)
        raise KernelError(f"{why}: 'vnet up' sets this, or 'sysctl -w {cure}'")
    if values["nf_conntrack_events"] == 2:
        return [
            "net.netfilter.nf_conntrack_events is 2: connections that begin while no collector "
            "runs will not report their end ('sysctl -w net.netfilter.nf_conntrack_events=1')"
        ]
    return []


def _open(groups: int, receive_buffer: int) -> socket.socket:
    try:
        link = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER
        )
    except OSError as error:
        raise KernelError(f"cannot open a netfilter netlink socket: {error.strerror}") from None
    try:
        link.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_buffer)
        link.bind((0, groups))
    except OSError as error:
        link.close()
        raise KernelError(
            f"cannot follow connection tracking: {error.strerror} (CAP_NET_ADMIN is needed)"
        ) from None
    return link


def open_events(receive_buffer: int) -> socket.socket:
    """A socket that gets an event for each connection that begins, changes or ends.

    Delivery is reliable: when the buffer (bytes) is full, the kernel keeps the
    ends of connections and sends them again later (net/netfilter/
    nf_conntrack_ecache.c). Raises KernelError.
    """
    link = _open(_GROUPS, receive_buffer)
    link.setsockopt(_SOL_NETLINK, _NETLINK_BROADCAST_ERROR, 1)
    link.setblocking(False)
    return link


def open_requests() -> socket.socket:
    """A socket for dumps and single questions. Raises KernelError."""
    link = _open(0, 4 << 20)
    link.setblocking(False)
    return link


def dropped(link: socket.socket) -> int:
    """How many messages the kernel could not deliver so far, a 32 bit count."""
    info = link.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 64)
    return int(struct.unpack_from("=I", info, _SK_MEMINFO_DROPS * 4)[0])


def start_dump(link: socket.socket, seq: int) -> None:
    """Ask for all entries, of all address families."""
    # struct nlmsghdr, then struct nfgenmsg with AF_UNSPEC.
    link.send(struct.pack("=IHHIIBBH", 20, _CT_GET, _REQUEST_DUMP, seq, 0, 0, 0, 0))
