"""What the guard refused: from the kernel's ring buffer into the log, with names.

Any number of processes may drain; one at a time reads the ring, and each batch
is given back to the kernel only when it is in the log. A reader killed in
between is followed by one that reads the same batch again.
"""

import contextlib
import fcntl
import json
import os
import re
import select
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from inotify_simple import INotify, flags

from vnet import bpf, eventlog, registry
from vnet.bpfmaps import lib
from vnet.errors import BpfError
from vnet.paths import Paths
from vnet.ring import Raw, Ring

#: what is read, named and written at once
BATCH = 1024
#: seconds between two complaints about a log that cannot be written
COMPLAIN_EVERY = 60.0

#: The names of enum vnet_kind, and what each says.
KINDS: dict[str, str] = {
    "raw": 'A raw socket, of a slice with `raw = "deny"` (EACCES), or a packet of one that it '
    "still has (dropped).",
    "packet": "A packet or XDP socket, which sees everybody's packets, or a socket of another "
    "family that sends frames past all rules (PPPoE, LLC), of a slice without "
    '`raw = "full"` (EACCES).',
    "bind": "bind() to a port that is reserved to somebody else (EACCES).",
    "address": "Somebody else's reserved address: bind() to it (EACCES), or a packet from it "
    "(dropped).",
    "port": "A packet from a port that is reserved to somebody else (dropped).",
    "foreign": "A packet of a raw socket that is not from its own ports, of a slice with "
    '`raw = "own"`, or of a UDP socket from another address than the one bound to (dropped).',
    "mark": "Another slice's number as a mark: on a socket (its own number is set instead), or "
    "on a packet (dropped).",
    "spoof": "A slice's packet from an address that this node does not have (dropped).",
    "connection": "A packet of a raw socket, or of a UDP socket that is bound elsewhere, in "
    "another slice's connection (dropped).",
    "snoop": "Somebody else's packet on its way to a raw or ping socket (which does not get it), "
    "or the option of a raw socket for the errors about others' packets (which stays off).",
    "mptcp": "A socket of a protocol whose packets the kernel sends through sockets of its own: "
    "MPTCP (EPROTONOSUPPORT; programs take TCP then), SMC, RxRPC, RDS, TIPC (EAFNOSUPPORT).",
}

#: linux/socket.h; Python does not know all
_FAMILIES = {
    2: "ipv4", 10: "ipv6", 17: "packet", 21: "rds", 24: "pppox", 26: "llc", 29: "can", 30: "tipc",
    31: "bluetooth", 33: "rxrpc", 43: "smc", 44: "xdp",
}  # fmt: skip
_TYPES = {1: "stream", 2: "dgram", 3: "raw", 4: "rdm", 5: "seqpacket", 6: "dccp", 10: "packet"}
_PROTOCOLS = {
    0: "ip", 1: "icmp", 2: "igmp", 6: "tcp", 17: "udp", 33: "dccp", 47: "gre", 50: "esp",
    51: "ah", 58: "icmpv6", 89: "ospf", 103: "pim", 132: "sctp", 136: "udplite", 255: "raw",
    262: "mptcp",
}  # fmt: skip
_PORTS = ("tcp", "udp", "sctp", "dccp", "udplite")

Namer = Callable[[int, int], str | None]


def kind_name(number: int) -> str:
    """The name of an enum vnet_kind."""
    for name in KINDS:
        if getattr(lib, f"VNET_KIND_{name.upper()}") == number:
            return name
    return str(number)


def iso(ns: int) -> str:
    """Nanoseconds UTC as ``2026-03-01T03:12:30.123456789Z``: such texts sort as times do."""
    seconds, rest = divmod(ns, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


_AGO = re.compile(r"(\d{1,6})([smhd])")


def moment(text: str, now: int) -> int:
    """``10m`` ago, or ISO 8601 (without a zone: local time), in ns UTC.

    Raises ValueError with the reason.
    """
    if ago := _AGO.fullmatch(text):
        return max(0, now - int(ago[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[ago[2]] * 10**9)
    try:
        at = datetime.fromisoformat(text)
        return max(0, int(at.timestamp() * 10**6) * 1000)
    except (ValueError, OverflowError, OSError):
        raise ValueError("not 30s, 10m, 2h, 7d, or a time such as 2026-03-01T03:12") from None


def boot_time() -> int:
    """What to add to CLOCK_BOOTTIME for the wall clock, now (ns)."""
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def describe(event: Raw, boot: int, name: Namer) -> dict[str, Any]:
    """An event as its line in the log says it; ``name(xid, at_ns)`` names a slice.

    docs/guard.md is the reference of the members.
    """
    at = event.when + boot
    kind = kind_name(event.kind)
    family = _FAMILIES.get(event.family, str(event.family))
    internet = family in ("ipv4", "ipv6")
    proto = _PROTOCOLS.get(event.proto, str(event.proto)) if internet else None
    made: dict[str, Any] = {
        "time": iso(at),
        "kind": kind,
        "refused": not event.observed,
        "slice": name(event.xid, at),
        "xid": event.xid,
        "owner": name(event.owner, at),
        "owner_xid": event.owner,
        "family": family,
        "type": _TYPES.get(event.type, str(event.type)) if event.type else None,
        "proto": proto,
        "src": _address(event.saddr, family, wildcard=kind in ("bind", "address")),
        "sport": None,
        "dst": _address(event.daddr, family),
        "dport": None,
        "icmp": None,
        "mark": event.mark,
        "pid": event.pid or None,
        "comm": event.comm.split(b"\0")[0].decode(errors="replace") or None,
        "suppressed": event.suppressed,
    }
    if proto in _PORTS:
        made["sport"], made["dport"] = event.sport or None, event.dport or None
    elif proto in ("icmp", "icmpv6") and made["dst"]:
        made["icmp"] = {"type": event.sport >> 8, "code": event.sport & 0xFF, "id": event.dport}
    return made


def _address(packed: bytes, family: str, wildcard: bool = False) -> str | None:
    """An address; the unspecified one is nothing, except where it was asked for."""
    if family not in ("ipv4", "ipv6"):
        return None
    found = IPv6Address(packed)
    plain = found.ipv4_mapped or found
    if not plain.is_unspecified:
        return str(plain)
    if not wildcard:
        return None
    return str(IPv4Address(0)) if family == "ipv4" else "::"


@contextlib.contextmanager
def naming(paths: Paths) -> Iterator[Namer]:
    """The registry's names; None where it has none, and for the node (xid 0)."""
    known = None
    with contextlib.suppress(FileNotFoundError, sqlite3.Error):
        known = registry.open_readonly(paths.registry)

    def name(xid: int, at_ns: int) -> str | None:
        with contextlib.suppress(sqlite3.Error):  # its number says it as well
            return known.holder(xid, at_ns) if known is not None and xid else None
        return None

    try:
        yield name
    finally:
        if known is not None:
            known.close()


@contextlib.contextmanager
def reading(paths: Paths, wait: bool) -> Iterator[bool]:
    """Be the one reader of the ring; False if somebody else is and we do not wait.

    The lock is a file that only root can open: whoever can open one can hold it.
    """
    for directory in (paths.state_dir, paths.run_dir):
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    fd = os.open(paths.run_dir / "events.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


class Drain:
    """Takes events out of the rings of all instances, also of those to come.

    Wait (poll(2)) until it is readable, then ``drain()``; a reader that does
    nothing else may simply call it now and then.
    """

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._rings: dict[int, Ring] = {}  #: by the instance's inode
        self._epoll = select.epoll()
        self._inotify = INotify(nonblocking=True)
        self._epoll.register(self._inotify, select.EPOLLIN)
        self._watched = False
        self._complained = float("-inf")
        self.refresh()

    def fileno(self) -> int:
        """Readable while there is something to do."""
        return self._epoll.fileno()

    def refresh(self) -> None:
        """Look which instances there are now; needed only where there was none before."""
        for event in self._inotify.read(timeout=0):
            if event.mask & flags.IGNORED:  # the directory went with its last instance
                self._watched = False
        if not self._watched:
            with contextlib.suppress(OSError):  # the node is down: nothing to watch
                self._inotify.add_watch(self._paths.bpf_dir, flags.MOVED_TO | flags.MOVED_FROM)
                self._watched = True
        # One of the same objects has the name of the one before, not its inode.
        there = {}
        for instance in bpf.instances(self._paths.bpf_dir):
            with contextlib.suppress(FileNotFoundError):
                there[instance.stat().st_ino] = instance
        for inode in self._rings.keys() - there.keys():
            ring = self._rings.pop(inode)
            while self._batch(ring):  # nobody else will read what it still holds
                pass
            self._epoll.unregister(ring)
            ring.close()
        for inode in there.keys() - self._rings.keys():
            with contextlib.suppress(BpfError):  # it went away in this moment
                ring = Ring(there[inode] / "maps" / "events")
                self._rings[inode] = ring
                self._epoll.register(ring, select.EPOLLIN)

    def drain(self, wait: bool = False) -> int:
        """Move what waits in the rings to the log; how many events that was.

        At most BATCH of each ring, so that nobody who floods keeps the caller.
        Raises nothing on account of the log: what cannot be written is counted,
        said on stderr, and left as a number in the log once it can be written.
        """
        with reading(self._paths, wait) as ours:
            if not ours:
                # Whoever reads holds the lock for a batch only. Ready is what
                # the rings stay until then: do not spin on it.
                time.sleep(0.02)
                return 0
            count = sum(self._batch(ring) for ring in self._rings.values())
            self.refresh()
        return count

    def _batch(self, ring: Ring) -> int:
        batch = ring.read(BATCH)
        if batch.unknown:
            print(f"vnet: {batch.unknown} events of another version were passed over: `vnet up`",
                  file=sys.stderr)  # fmt: skip
        boot = boot_time()
        with naming(self._paths) as name:
            lines = [_line(describe(event, boot, name)) for event in batch.events]
        if lines:
            self._keep(lines)
        ring.release(batch)
        if lines and under_journal():
            with contextlib.suppress(OSError):
                sys.stdout.write("".join(lines))
                sys.stdout.flush()
        return len(lines)

    def _keep(self, lines: list[str]) -> None:
        lost = unwritten(self._paths)
        text = "".join(lines)
        if lost:
            text = _line({"time": iso(time.time_ns()), "kind": "lost", "count": lost}) + text
        try:
            eventlog.append(self._paths, text.encode())
        except OSError as error:
            _count_unwritten(self._paths, lost + len(lines))
            if time.monotonic() - self._complained >= COMPLAIN_EVERY:
                self._complained = time.monotonic()
                print(f"vnet: {eventlog.path(self._paths)}: {error.strerror}: "
                      f"{lost + len(lines)} events are not in it", file=sys.stderr)  # fmt: skip
        else:
            if lost:
                _count_unwritten(self._paths, 0)

    def close(self) -> None:
        for ring in self._rings.values():
            ring.close()
        self._inotify.close()
        self._epoll.close()


def _line(event: dict[str, Any]) -> str:
    # ASCII: a process may call itself anything, and logs are read on terminals
    return json.dumps(event, separators=(",", ":")) + "\n"


def unwritten(paths: Paths) -> int:
    """How many events could not be written to the log, since it was last written."""
    try:
        return int((paths.run_dir / "events.lost").read_text() or 0)
    except (OSError, ValueError):
        return 0


def _count_unwritten(paths: Paths, count: int) -> None:
    # The run directory is another file system than the log's, in memory.
    file = paths.run_dir / "events.lost"
    with contextlib.suppress(OSError):
        if count:
            draft = file.with_name("events.lost.new")
            draft.write_text(f"{count}\n")
            draft.replace(file)
        else:
            file.unlink(missing_ok=True)


def under_journal() -> bool:
    """Whether standard output is the journal's (JOURNAL_STREAM, systemd.exec(5))."""
    device, _colon, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        here = os.fstat(sys.stdout.fileno())
        return (here.st_dev, here.st_ino) == (int(device), int(inode))
    except (OSError, ValueError):
        return False
