"""How fast a conntrack dump becomes columns, beside other ways to read it.

``bench_dump.py [--entries N] [--rounds N] [--json FILE]`` as root. The entries
are made in a network namespace of the process's own, so that nothing of the
host's is touched and all is gone at the end. The ways take turns, and of each
the best round counts: what disturbs a round only ever makes it slower. Time is
processor time, user's and kernel's, children's included: a dump is made in its
reader's recvmsg(), so that this is all of it, and on an idle machine it is what
the clock on the wall says.
"""

import argparse
import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from netflow.ct import Batch, FlowBatch, Table, receive

HERE = Path(__file__).resolve().parent
CLONE_NEWNET = 0x40000000
DUMP = bytes.fromhex("1400000001010103070000000000000000000000")
BUFFER = 32768
COLLECTOR_ROWS = 8192
PYROUTE2_ENTRIES = 4000


def library() -> ctypes.CDLL:
    """The C helpers, compiled for this run."""
    with tempfile.TemporaryDirectory() as where:
        so = Path(where, "ct_bench.so")
        flags = ("-O2", "-Wall", "-Wextra", "-shared", "-fPIC")
        subprocess.run(["cc", *flags, "-o", so, HERE / "ct_bench.c"], check=True)
        lib = ctypes.CDLL(str(so), use_errno=True)
    lib.bench_receive.restype = ctypes.c_long
    return lib


def own_namespace() -> None:
    """Enter a new network namespace in which connections are counted and timed."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        sys.exit("cannot make a network namespace: this needs root")
    for name in ("acct", "timestamp"):
        Path(f"/proc/sys/net/netfilter/nf_conntrack_{name}").write_text("1")


def netlink() -> socket.socket:
    link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    link.bind((0, 0))
    return link


def fill(lib: ctypes.CDLL, entries: int) -> None:
    limit = int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text())
    if limit and entries > limit:
        sys.exit(f"nf_conntrack_max is {limit}: {entries} entries do not fit")
    with netlink() as link:
        if code := lib.bench_fill(link.fileno(), entries):
            sys.exit(f"cannot make conntrack entries: {os.strerror(code)}")


def spent() -> float:
    """Seconds of processor time of this process and its children."""
    mine, theirs = (getrusage(who) for who in (RUSAGE_SELF, RUSAGE_CHILDREN))
    return mine.ru_utime + mine.ru_stime + theirs.ru_utime + theirs.ru_stime


@dataclass
class Best:
    """The best round so far: entries per second, by the processor and by the wall."""

    busy: float = 0.0
    wall: float = 0.0

    def run(self, once: Callable[[], int]) -> int:
        """Time one dump; returns the entries it met."""
        spent_before, began = spent(), time.perf_counter()
        met = once()
        self.wall = max(self.wall, met / (time.perf_counter() - began))
        self.busy = max(self.busy, met / (spent() - spent_before))
        return met


def ways(lib: ctypes.CDLL, entries: int) -> dict[str, Callable[[], int]]:
    """Name -> one dump that way, returning the entries met."""
    link = netlink()
    buffer = bytearray(BUFFER)
    space = (ctypes.c_char * BUFFER).from_buffer(buffer)
    whole = Batch(entries + 1024)
    part = Batch(COLLECTOR_ROWS)
    table, flows = Table(), FlowBatch(2 * COLLECTOR_ROWS)

    def bare() -> int:
        link.send(DUMP)
        got = lib.bench_receive(link.fileno(), space, BUFFER)
        assert got > 0, os.strerror(-got)
        return entries

    def columns() -> int:
        whole.clear()
        link.send(DUMP)
        while not receive(link.fileno(), buffer, whole).done:
            pass
        return len(whole)

    def in_parts(take: Callable[[], None]) -> int:
        link.send(DUMP)
        met, done = 0, False
        while not done:
            part.clear()
            done = receive(link.fileno(), buffer, part).done
            met += len(part)
            take()
        return met

    def tabled() -> int:
        table.dump_begin()
        return in_parts(lambda: void(table.apply(part, time.time_ns(), flows)))

    def void(_: object) -> None:
        pass

    def conntrack() -> int:
        out = subprocess.run(
            ["conntrack", "-L", "-o", "extended"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        )
        return int(out.stderr.split()[-6])

    return {
        "bare recv, nothing decoded": bare,
        "ours, all columns at once": columns,
        f"ours, {COLLECTOR_ROWS} rows at a time": lambda: in_parts(lambda: None),
        "ours, and into the table": tabled,
        "conntrack -L -o extended": conntrack,
    }


def _pyroute2(rounds: int) -> Best:
    """In a process of its own, with few entries: it asks for IPv4's only."""
    own_namespace()
    fill(library(), PYROUTE2_ENTRIES)
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

    best = Best()
    with NFCTSocket() as nfct:
        for _ in range(rounds):
            best.run(lambda: sum(1 for _ in nfct.dump()))
    return best


def pyroute2(rounds: int) -> Best:
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_pyroute2, (rounds,))


def measure(entries: int, rounds: int) -> dict[str, Best]:
    """The best of each way, taking turns."""
    lib = library()
    own_namespace()
    fill(lib, entries)
    todo = ways(lib, entries)
    best = {name: Best() for name in todo}
    for once in todo.values():
        once()  # warm: pages of the columns, the kernel's caches
    for _ in range(rounds):
        for name, once in todo.items():
            met = best[name].run(once)
            assert met == entries, f"{name}: {met} entries of {entries} were met"
    return best


def show(found: dict[str, Best]) -> None:
    bare, tool = found["bare recv, nothing decoded"], found["conntrack -L -o extended"]
    print(f"{'way':<30}{'entries/s':>12}{'of bare':>9}{'x conntrack':>13}{'by the wall':>13}")
    for name, way in found.items():
        print(
            f"{name:<30}{way.busy:>12,.0f}{way.busy / bare.busy:>9.2f}"
            f"{way.busy / tool.busy:>13.2f}{way.wall:>13,.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    slow = pyroute2(min(options.rounds, 3))
    found = measure(options.entries, options.rounds)
    found[f"pyroute2, {PYROUTE2_ENTRIES} entries"] = slow
    print(f"conntrack dump of {options.entries:,} entries, best of {options.rounds} rounds")
    show(found)
    if options.json:
        facts = {
            "entries": options.entries,
            "rounds": options.rounds,
            "entries_per_s": {name: way.busy for name, way in found.items()},
            "entries_per_s_by_the_wall": {name: way.wall for name, way in found.items()},
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
