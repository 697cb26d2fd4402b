"""Every packet a hook sees, with its mark.

The kernel's NFLOG (nfnetlink_log) hands copies of packets to a netlink
socket. The rules are nft rules in a table of our own with the last priority
at each hook, so they see what every other rule, legacy or nft, has left in
the mark. The socket's buffer holds all until it is read: no reader runs
beside the traffic, and what does not fit is an error and never a silence.
Message layout: linux/netfilter/nfnetlink_log.h.
"""

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from vnet.testing.net import Namespace

HOOKS = ("input", "postrouting")
ICMP = (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6)
_SNAPLEN = 128
_BUFFER = 64 << 20  # bytes; one packet takes about 1 kB of it
_NETLINK_NETFILTER = 12
_SO_RCVBUFFORCE = 33
_ULOG_PACKET, _ULOG_CONFIG = 4 << 8 | 0, 4 << 8 | 1
_CMD_BIND, _COPY_PACKET = 1, 2
_A_HDR, _A_MARK, _A_PAYLOAD, _A_PREFIX = 1, 2, 9, 10
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Seen:
    """A packet at a hook. For ICMP, sport is the echo id and dport type << 8 | code."""

    mark: int
    prefix: str
    """The hook, as in HOOKS."""
    family: int
    """4 or 6."""
    proto: int
    src: str
    dst: str
    sport: int
    dport: int
    tcp_flags: str
    """The letters of those set, of FSRPA; "" when not TCP."""
    length: int
    """The whole IP packet, bytes."""
    payload: bytes
    """Its first 128 bytes, from the IP header on."""

    @property
    def xid(self) -> int:
        """The owner: the low half of the mark."""
        return self.mark & 0xFFFF


class Capture:
    """The packets of one capture."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._seen: list[Seen] = []

    def seen(self) -> list[Seen]:
        """All packets up to now, in the order of the hooks.

        Raises OSError ENOBUFS if the kernel had to drop some.
        """
        with suppress(BlockingIOError):
            while True:
                self._seen += _packets(self._sock.recv(1 << 18))
        return list(self._seen)


@contextmanager
def capture(
    ns: Namespace,
    group: int = 7,
    hooks: tuple[str, ...] = HOOKS,
    only: tuple[str, ...] = ("",),
    more: str = "",
) -> Iterator[Capture]:
    """Log every packet at the hooks (nft's names) of a namespace, IPv4 and IPv6.

    ``only``: those that one of these nft expressions matches. ``more``: chains
    of the caller's own in the same table. Raises OSError EBUSY if somebody
    listens to the group already.
    """
    table = f"vnt_nflog_{group}"
    log = f"group {group} snaplen {_SNAPLEN} queue-threshold 1"
    chains = "".join(
        f"chain {hook} {{ type filter hook {hook} priority 32000; policy accept;\n"
        + "".join(f'{match} log prefix "{hook}" {log}\n' for match in only)
        + "}\n"
        for hook in hooks
    )
    with _netlink(ns) as sock:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        _configure(sock, group)
        try:
            ns.run("nft", "-f", "-", input=f"table inet {table} {{\n{chains}{more}}}\n")
            sock.setblocking(False)
            yield Capture(sock)
        finally:  # also of what a signal has interrupted: then there may be none
            ns.run("nft", "delete", "table", "inet", table, check=False)


def _netlink(ns: Namespace) -> socket.socket:
    """A netlink socket of a namespace: it stays there when its maker goes back."""
    if not ns.name:
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{ns.name}", os.O_RDONLY)
    try:
        _setns(there)
        try:
            return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        finally:
            _setns(home)
    finally:
        os.close(home)
        os.close(there)


def _setns(fd: int) -> None:
    # os.setns exists from Python 3.12 on.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _configure(sock: socket.socket, group: int) -> None:
    """Bind to the group, ask for packet data, each packet at once."""
    _ask(sock, group, 1, struct.pack("=B", _CMD_BIND))  # NFULA_CFG_CMD
    _ask(sock, group, 2, struct.pack(">IBx", _SNAPLEN, _COPY_PACKET))  # NFULA_CFG_MODE
    # The kernel reserves this much for each packet, and charges the buffer for it.
    _ask(sock, group, 3, struct.pack(">I", 512))  # NFULA_CFG_NLBUFSIZ
    _ask(sock, group, 5, struct.pack(">I", 1))  # NFULA_CFG_QTHRESH


def _ask(sock: socket.socket, group: int, kind: int, value: bytes) -> None:
    attr = struct.pack("=HH", 4 + len(value), kind) + value
    attr += bytes(-len(attr) % 4)
    body = struct.pack(">BBH", socket.AF_UNSPEC, 0, group) + attr
    # NLM_F_REQUEST | NLM_F_ACK
    sock.send(struct.pack("=IHHII", 16 + len(body), _ULOG_CONFIG, 5, 1, 0) + body)
    while True:
        answer = sock.recv(65536)
        if struct.unpack_from("=H", answer, 4)[0] == 2:  # NLMSG_ERROR
            break
    code = struct.unpack_from("=i", answer, 16)[0]
    if code:
        raise OSError(-code, f"NFLOG group {group}: {os.strerror(-code)}")


def _packets(data: bytes) -> Iterator[Seen]:
    at = 0
    while at + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        if kind == _ULOG_PACKET:
            attrs = dict(_attributes(data[at + 20 : at + length]))
            mark = struct.unpack(">I", attrs.get(_A_MARK, bytes(4)))[0]
            prefix = attrs.get(_A_PREFIX, b"").rstrip(b"\0").decode()
            if seen := _parse(mark, prefix, attrs.get(_A_PAYLOAD, b"")):
                yield seen
        at += (length + 3) & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        yield kind & 0x3FFF, data[at + 4 : at + length]
        at += (length + 3) & ~3


def _parse(mark: int, prefix: str, packet: bytes) -> Seen | None:
    """What the headers say; None for what is too short to be a packet."""
    if len(packet) >= 20 and packet[0] >> 4 == 4:
        length, proto = struct.unpack_from(">H", packet, 2)[0], packet[9]
        src = socket.inet_ntop(socket.AF_INET, packet[12:16])
        dst = socket.inet_ntop(socket.AF_INET, packet[16:20])
        above, first = packet[(packet[0] & 15) * 4 :], not packet[6] & 0x1F and not packet[7]
        family = 4
    elif len(packet) >= 40 and packet[0] >> 4 == 6:
        length, proto, first = 40 + struct.unpack_from(">H", packet, 4)[0], packet[6], True
        src = socket.inet_ntop(socket.AF_INET6, packet[8:24])
        dst = socket.inet_ntop(socket.AF_INET6, packet[24:40])
        above, family = packet[40:], 6
        if proto == 0 and len(above) >= 8:  # hop-by-hop options, as MLD has
            proto, above = above[0], above[(above[1] + 1) * 8 :]
    else:
        return None
    sport = dport = 0
    flags = ""
    if first and len(above) >= 8:
        if proto in (socket.IPPROTO_TCP, socket.IPPROTO_UDP, 132):
            sport, dport = struct.unpack_from(">HH", above)
        elif proto in (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6):
            dport = above[0] << 8 | above[1]
            if above[0] in ((0, 8) if family == 4 else (128, 129)):
                sport = struct.unpack_from(">H", above, 4)[0]
        if proto == socket.IPPROTO_TCP and len(above) >= 14:
            flags = "".join(name for bit, name in enumerate("FSRPA") if above[13] >> bit & 1)
    return Seen(mark, prefix, family, proto, src, dst, sport, dport, flags, length, packet)
