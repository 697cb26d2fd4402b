"""Every packet, where it was seen and with which mark.

Three places. On the wire: a packet socket in the peer's namespace; the mark is in the
frame's source address, where a tc program on the node's link has put it (stamp.bpf.c).
On loopback, which no wire has: NFLOG at the end of POSTROUTING. And at the end of INPUT:
NFLOG again, for what comes in from both. Both sockets keep what they see until they are
read, which is after every action; what did not fit is an error.
"""

import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from guardbed import inside
from vnet.testing.net import Namespace

WIRE, LO, IN = 0, 1, 2
"""Out to the peer; out to this host itself; in."""
PLACES = ("on the wire", "out to loopback", "in")

_HERE = Path(__file__).parent
_SNAPLEN = 192
_BUFFER = 256 << 20
_GROUP = 9
_SO_RCVBUFFORCE, _SOL_PACKET, _PACKET_STATISTICS = 33, 263, 6
_ETH_P_ALL, _PACKET_OUTGOING = 3, 4
_ULOG_CONFIG = 4 << 8 | 1
_MARK, _PAYLOAD, _PREFIX = 2, 9, 10


class LostError(Exception):
    """A capture has lost packets: nothing can be said about this run."""


@dataclass
class Wire:
    """The two capturing sockets."""

    link: socket.socket
    log: socket.socket

    def drain(self) -> Iterator[tuple[int, int, bytes]]:
        """(place, mark, beginning of the packet) of all since the last call."""
        link, log = self.link, self.log
        with suppress(BlockingIOError):
            while True:
                data, address = link.recvfrom(_SNAPLEN)
                if address[2] == _PACKET_OUTGOING or data[12:14] not in (b"\x08\x00", b"\x86\xdd"):
                    continue
                mark = data[10] << 8 | data[11] | data[7] << 16 | data[8] << 24
                yield WIRE, mark, data[14:]
        try:
            while True:
                yield from _logged(log.recv(1 << 17))
        except BlockingIOError:
            return
        except OSError as e:  # ENOBUFS
            raise LostError(f"NFLOG: {e}") from e

    def check(self) -> None:
        """Raises LostError if the wire's socket has dropped anything."""
        stats = self.link.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        dropped = struct.unpack("II", stats)[1]
        if dropped:
            raise LostError(f"{dropped} packets on the wire")


def _logged(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The packets of one datagram of nfnetlink_log (linux/netfilter/nfnetlink_log.h)."""
    at, end = 0, len(data)
    while at + 16 <= end:
        length, kind = struct.unpack_from("=IH", data, at)
        if kind == 4 << 8:
            place, mark, payload = LO, 0, b""
            here = at + 20
            while here + 4 <= at + length:
                size, what = struct.unpack_from("=HH", data, here)
                if what == _MARK:
                    mark = int.from_bytes(data[here + 4 : here + 8], "big")
                elif what == _PREFIX:
                    place = IN if data[here + 4] == 0x69 else LO  # "i", "o"
                elif what == _PAYLOAD:
                    payload = data[here + 4 : here + size]
                here += (size + 3) & ~3
            yield place, mark, payload
        at += (length + 3) & ~3


@contextmanager
def capture(
    node: Namespace, peer: Namespace, node_if: str, peer_if: str, base: Path
) -> Iterator[Wire]:
    """Stamp and capture from here on."""
    program = base / "stamp.bpf.o"
    machine = os.uname().machine
    subprocess.run(
        [
            *("clang", "-O2", "-g", "-target", "bpf", "-mcpu=v3", "-c"),
            f"-I/usr/include/{machine}-linux-gnu",
            *(str(_HERE / "stamp.bpf.c"), "-o", str(program)),
        ],
        check=True,
    )
    node.run("tc", "qdisc", "add", "dev", node_if, "clsact")
    words = (
        "filter",
        "add",
        "dev",
        node_if,
        "egress",
        "bpf",
        "da",
        "obj",
        str(program),
        "sec",
        "tc",
    )
    node.run("tc", *words)
    with inside(peer):
        link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    with inside(node):
        log = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    with link, log:
        for sock in (link, log):
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        link.bind((peer_if, _ETH_P_ALL))
        link.setblocking(False)
        _configure(log)
        table = "\n".join(
            f"chain {hook} {{ type filter hook {hook} priority 32000; policy accept;\n"
            f' {which} log prefix "{prefix}" group {_GROUP} snaplen {_SNAPLEN} '
            f"queue-threshold 1\n}}"
            for hook, which, prefix in (("input", "", "i"), ("postrouting", 'oif "lo"', "o"))
        )
        node.run("nft", "-f", "-", input=f"table inet mix {{\n{table}\n}}\n")
        try:
            log.setblocking(False)
            yield Wire(link, log)
        finally:
            node.run("nft", "delete", "table", "inet", "mix")


def _configure(log: socket.socket) -> None:
    """Bind to the group, ask for packet data, each packet at once."""
    for kind, value in (
        (1, struct.pack("=B", 1)),  # NFULA_CFG_CMD: bind
        (2, struct.pack(">IBx", _SNAPLEN, 2)),  # NFULA_CFG_MODE: copy packets
        (3, struct.pack(">I", 1024)),  # NFULA_CFG_NLBUFSIZ: charged for each packet
        (5, struct.pack(">I", 1)),  # NFULA_CFG_QTHRESH
    ):
        attribute = struct.pack("=HH", 4 + len(value), kind) + value
        body = struct.pack(">BBH", 0, 0, _GROUP) + attribute + bytes(-len(attribute) % 4)
        log.send(struct.pack("=IHHII", 16 + len(body), _ULOG_CONFIG, 5, 1, 0) + body)
        answer = log.recv(65536)
        code = struct.unpack_from("=i", answer, 16)[0]
        assert not code, os.strerror(-code)
