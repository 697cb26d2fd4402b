"""A collector in a network namespace, real connections, and what conntrack says of them."""

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time_ns
from typing import Any

from vnet.testing.net import HERE, Namespace
from vnet.testing.poll import PATIENCE, until

from netflow import client, output, wire

NETFLOW = [sys.executable, "-m", "netflow"]


def accounting(ns: Namespace, lasting: int = 0) -> None:
    """Switch on what the collector needs of connection tracking.

    ``lasting``: the seconds that it remembers a connection of which it sees nothing more,
    else the kernel's 10 (reset) to 120 (TIME_WAIT): a slow machine needs as long to look.
    """
    timeouts = ("udp_timeout", "icmp_timeout", "icmpv6_timeout", "tcp_timeout_close",
                "tcp_timeout_time_wait")  # fmt: skip
    more = {f"net__netfilter__nf_conntrack_{name}": lasting for name in timeouts if lasting}
    ns.sysctl(
        net__netfilter__nf_conntrack_acct=1,
        net__netfilter__nf_conntrack_timestamp=1,
        net__netfilter__nf_conntrack_events=1,
        **more,
    )


def unread(port: int, ns: Namespace = HERE) -> tuple[int, int]:
    """Bytes in a UDP socket's receive buffer (-1: nobody is bound), and datagrams it dropped."""
    path = Path("/proc/net/udp")  # read here without a process: benchmarks look at it all the time
    text = path.read_text() if ns is HERE else ns.run("cat", str(path)).stdout
    for line in text.splitlines()[1:]:
        words = line.split()
        if int(words[1].split(":")[1], 16) == port:
            return int(words[4].split(":")[1], 16), int(words[12])
    return -1, 0


def connmark(ns: Namespace, mark: int, *match: str, tool: str = "iptables") -> None:
    """Write a connection mark with an ordinary rule: low half originator, high half responder."""
    rule = ("-t", "mangle", "-A", "OUTPUT", *match, "-j", "CONNMARK", "--set-mark", hex(mark))
    ns.run(tool, *rule)


@dataclass
class Collector:
    """``netflow collect`` and how to ask it."""

    ns: Namespace
    base: Path
    process: subprocess.Popen[str]

    @property
    def socket(self) -> Path:
        return self.base / "query.sock"

    def cli(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a ``netflow`` command that asks it."""
        words = (*NETFLOW, *argv, "--socket", str(self.socket))
        return HERE.run(*words, check=check, timeout=240)

    def ask(self, limit: int = 0, **which: Any) -> tuple[list[dict[str, Any]], list[wire.Gap]]:
        """The records that match, as users see them, and the gaps.

        Asks again while an answer falls short of now, as one may on a slow machine (and all do
        that are asked of a full disk).
        """
        goal, deadline = min(which.get("until", now := time_ns()), now), monotonic() + 20 * PATIENCE
        while True:
            rows, header = self._flows(limit, which)
            if header.as_of >= goal or monotonic() > deadline or self.status()["full_since"]:
                return rows, header.gaps

    def _flows(self, limit: int, which: dict[str, Any]) -> tuple[list[dict[str, Any]], wire.Header]:
        asked = wire.Flows(filter=wire.Filter(**which), limit=limit)
        with client.asking(self.socket, asked) as answer:
            return [output.record(answer.header.columns, row) for row in answer], answer.header

    def records(self, **which: Any) -> list[dict[str, Any]]:
        """The records that match."""
        return self.ask(**which)[0]

    def top(self, **which: Any) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
        """Sums by slice (or "xid N"), and the total."""
        asked = wire.Top(filter=wire.Filter(**which), limit=0)
        with client.asking(self.socket, asked) as answer:
            rows = [dict(zip(answer.header.columns, row, strict=True)) for row in answer]
            return {r["slice"] or f"xid {r['xid']}": r for r in rows}, answer.trailer.total

    def status(self) -> dict[str, Any]:
        return client.status(self.socket)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; returns its exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def memory(self, key: str = "VmHWM") -> int:
        """Its memory in kB, from /proc/PID/status."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"^{key}:\s+(\d+) kB", text, re.M)[1])


def launch(ns: Namespace, base: Path, *options: str, under: tuple[str, ...] = ()) -> Collector:
    """Start ``netflow collect``, perhaps under a program, without waiting for it.

    Long-lived connections are recorded when a test asks, unless it says how often: a
    dump of the collector's own in the middle of a connection makes two records of it.
    """
    if "--active-timeout" not in options:
        options = (*options, "--active-timeout", "1d")
    env = {
        "NETFLOW_STORE": str(base),
        "NETFLOW_SOCKET": str(base / "query.sock"),
        "VNET_STATE_DIR": str(base),
        "PYTHONWARNINGS": "error",
    }
    log = (base / "collector.log").open("a")
    with log:
        process = ns.popen(*under, *NETFLOW, "collect", *options, env=env, stdout=log, stderr=log)
    return Collector(ns, base, process)


@contextmanager
def collector(
    ns: Namespace, base: Path, *options: str, wait: float = 60, under: tuple[str, ...] = ()
) -> Iterator[Collector]:
    """A collector that answers; it is killed on exit if it still runs."""
    made = launch(ns, base, *options, under=under)
    try:
        until(lambda: answers(made), wait, "the collector answers")
        yield made
    finally:
        made.process.kill()
        made.process.wait()


def answers(made: Collector) -> bool:
    """It is up, and has seen what is there. AssertionError with its log if it has ended."""
    code = made.process.poll()
    assert code is None, f"exit {code}: {(made.base / 'collector.log').read_text()}"
    with suppress(client.ClientError):
        return made.status()["as_of"] > 0
    return False


def sums(records: list[dict[str, Any]]) -> tuple[int, int, int, int]:
    """Packets and bytes of the originator, then of the responder, over records."""
    four = [
        [r[side][key] for side in ("originator", "responder") for key in ("packets", "bytes")]
        for r in records
    ]
    op, ob, rp, rb = map(sum, zip(*four, strict=True)) if four else (0, 0, 0, 0)
    return op, ob, rp, rb


def loads(text: str) -> Any:
    """JSON that a command printed."""
    return json.loads(text)


def counted(ns: Namespace, *which: str) -> tuple[int, int, int, int]:
    """The same four as conntrack itself counts them, over its entries that match."""
    text = ns.run("conntrack", "-L", *which).stdout
    numbers = re.findall(r"packets=(\d+) bytes=(\d+)", text)
    assert len(numbers) % 2 == 0
    there, back = numbers[::2], numbers[1::2]
    return (
        sum(int(p) for p, _ in there),
        sum(int(b) for _, b in there),
        sum(int(p) for p, _ in back),
        sum(int(b) for _, b in back),
    )


def owners(record: dict[str, Any]) -> tuple[int, int]:
    """The xids of both sides."""
    return record["originator"]["xid"], record["responder"]["xid"]


def as_uid(uid: int, *argv: str | Path, group: int | None = None) -> list[str]:
    """Words that run a program as another user, with one more group if given."""
    also = "--clear-groups" if group is None else f"--groups={group}"
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", also, "--", *map(str, argv)]


# -- writing into conntrack ------------------------------------------------------------

Endpoint = tuple[str, int]


def set_mark(ns: Namespace, src: Endpoint, dst: Endpoint, mark: int, proto: int = 17) -> None:
    """Change the mark of one entry, which sends a mark event."""
    _in(ns, "mark", json.dumps([src, dst, mark, proto]))


def create(ns: Namespace, count: int, first: int = 0, timeout: int = 600) -> None:
    """Make that many UDP entries, each with a NEW event; timeout in seconds."""
    _in(ns, "create", json.dumps([count, first, timeout]))


def spread(ns: Namespace, count: int, first: int = 0) -> None:
    """Send one datagram to each of that many addresses: as many entries, with counters."""
    _in(ns, "spread", json.dumps([count, first]))


def destroy(ns: Namespace) -> None:
    """Remove all entries, each with a DESTROY event."""
    _in(ns, "destroy", "[]")


def _in(ns: Namespace, *words: str) -> None:
    ns.run(sys.executable, "-m", "netflowbed", *words, timeout=300)


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", len(data) + 4, kind) + data + bytes(-len(data) % 4)


def _tuple(kind: int, src: Endpoint, dst: Endpoint, proto: int) -> bytes:
    """CTA_TUPLE_ORIG (1) or CTA_TUPLE_REPLY (2), linux/netfilter/nfnetlink_conntrack.h."""
    ip = _attribute(1, socket.inet_aton(src[0])) + _attribute(2, socket.inet_aton(dst[0]))
    ports = b"".join(
        (
            _attribute(1, bytes([proto])),
            _attribute(2, src[1].to_bytes(2, "big")),
            _attribute(3, dst[1].to_bytes(2, "big")),
        )
    )
    nested = 0x8000
    inner = _attribute(1 | nested, ip) + _attribute(2 | nested, ports)
    return _attribute(kind | nested, inner)


def _message(kind: int, flags: int, attributes: bytes) -> bytes:
    head = struct.pack("=IHHII", 20 + len(attributes), 1 << 8 | kind, flags, 1, 0)
    return head + struct.pack("=BBH", socket.AF_INET if attributes else 0, 0, 0) + attributes


def _send(messages: list[bytes]) -> None:
    """Send requests in good portions and check that the kernel takes them."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as link:
        link.setsockopt(socket.SOL_SOCKET, 32, 8 << 20)  # SO_SNDBUFFORCE
        link.setblocking(False)
        for first in range(0, len(messages), 200):
            link.send(b"".join(messages[first : first + 200]))
            with suppress(BlockingIOError):
                while reply := link.recv(65536):
                    error = struct.unpack_from("=i", reply, 16)[0]
                    assert not error, os.strerror(-error)


def _main(what: str, options: list[Any]) -> None:
    request, create_excl = 1, 1 | 0x600
    if what == "mark":
        src, dst, mark, proto = options
        tuple_ = _tuple(1, tuple(src), tuple(dst), proto)
        _send([_message(0, request, tuple_ + _attribute(8, struct.pack(">I", mark)))])
    elif what == "create":
        count, first, timeout = options
        ends = (
            ((f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}", 1000), ("192.0.2.1", 53))
            for n in range(first, first + count)
        )
        rest = _attribute(7, struct.pack(">I", timeout)) + _attribute(8, struct.pack(">I", 256))
        _send(
            [
                _message(0, create_excl, _tuple(1, a, b, 17) + _tuple(2, b, a, 17) + rest)
                for a, b in ends
            ]
        )
    elif what == "spread":
        count, first = options
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            for n in range(first, first + count):
                out.sendto(b"x", (f"127.{1 + (n >> 16)}.{n >> 8 & 255}.{n & 255}", 9))
    else:
        _send([_message(2, request, b"")])


if __name__ == "__main__":
    _main(sys.argv[1], json.loads(sys.argv[2]))
