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


def timed(run: Callable[[], int], entries: int) -> float:
    """Processor seconds for one run, which must have met every entry."""
    begin = spent()
    met = run()
    took = spent() - begin
    assert met in (entries, -1), f"{met} entries of {entries} were met"
    return took


def ways(lib: ctypes.CDLL, entries: int) -> dict[str, Callable[[], int]]:
    """Name -> one dump that way, returning the entries met (-1: not counted)."""
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
        return -1

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


def _pyroute2(rounds: int) -> float:
    """In a process of its own, with few entries: the best rate, entries/s."""
    own_namespace()
    fill(library(), PYROUTE2_ENTRIES)
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

    best = float("inf")
    with NFCTSocket() as nfct:
        for _ in range(rounds):
            met = [0]

            def run(met: list[int] = met) -> int:
                return sum(1 for _ in nfct.dump())

            best = min(best, timed(run, PYROUTE2_ENTRIES))
    return PYROUTE2_ENTRIES / best


def pyroute2_rate(rounds: int) -> float:
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_pyroute2, (rounds,))


def measure(entries: int, rounds: int) -> dict[str, float]:
    """Entries per processor second, by way."""
    lib = library()
    own_namespace()
    fill(lib, entries)
    todo = ways(lib, entries)
    best = dict.fromkeys(todo, float("inf"))
    for run in todo.values():
        run()  # warm: pages of the columns, the kernel's caches
    for _ in range(rounds):
        for name, run in todo.items():
            best[name] = min(best[name], timed(run, entries))
    return {name: entries / seconds for name, seconds in best.items()}


def show(rates: dict[str, float]) -> None:
    bare, tool = rates["bare recv, nothing decoded"], rates["conntrack -L -o extended"]
    print(f"{'way':<36}{'entries/s':>12}{'of bare':>10}{'x conntrack':>13}")
    for name, rate in rates.items():
        print(f"{name:<36}{rate:>12,.0f}{rate / bare:>10.2f}{rate / tool:>13.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    slow = {f"pyroute2, {PYROUTE2_ENTRIES} entries": pyroute2_rate(min(options.rounds, 3))}
    rates = measure(options.entries, options.rounds) | slow
    print(f"conntrack dump of {options.entries:,} entries, best of {options.rounds} rounds")
    show(rates)
    if options.json:
        facts = {"entries": options.entries, "rounds": options.rounds, "entries_per_s": rates}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
