"""How long questions take over a month of records, beside nfdump over the same records.

``bench_history.py [--records N] [--days N] [--store DIR] [--nfcapd DIR] [--json FILE]``
as root. Makes a store of the benchmark mix (synthetic.py), or takes one that is
there, and starts a collector on it in a network namespace of its own, with a registry
that names its slices. What is measured is what a user waits for: the command,
from its start to its end, with the answer as JSON; each a few times, on other
addresses and slices. Beside the time by the clock stands the processor time of
command and collector, which says the same on a machine that is busy.

nfdump gets the same records over loopback as IPFIX by way of nfcapd, a file for
each hour as nfcapd would have rotated them (100 million: ten minutes, 8 GB), and
answers what it can, on the same addresses: who sent to one at a time. --nfcapd
keeps those files, and takes them if they are there.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import re
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1)]

import duckdb  # noqa: E402
import numpy as np  # noqa: E402
from bench import synthetic  # noqa: E402
from netflowbed import unread  # noqa: E402

from netflow.when import HOUR, SECOND  # noqa: E402
from vnet import registry  # noqa: E402

NETFLOW = [str(Path(sys.executable).with_name("netflow"))]
PORT = 9996
FIELDS = (
    ("src", 8, 4), ("dst", 12, 4), ("sport", 7, 2), ("dport", 11, 2), ("proto", 4, 1),
    ("start", 152, 8), ("end", 153, 8), ("packets", 2, 8), ("octets", 1, 8),
)  # fmt: skip
"""Name, information element and bytes of what nfcapd gets: one direction, as nfdump has it."""


@dataclass
class Took:
    """One question: seconds by the clock, and of processor time, over its rounds."""

    wall: float
    least: float
    cpu: float
    rows: int


@dataclass
class Collector:
    """A collector over the store, in a namespace of its own."""

    process: subprocess.Popen[bytes]
    socket: Path

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self, key: str) -> float:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"^{key}:\s+(\d+) kB", text, re.M)[1]) / 1000

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


@contextmanager
def collecting(store: Path, where: Path) -> Iterator[Collector]:
    """A collector on the store; all slices of the mix have names."""
    made = registry.assign(
        where / "registry.db",
        [registry.Request(f"slice_{n}", 256 + n) for n in range(60)],
        0,
    )
    assert len(made.xids) == 60
    sysctls = "; ".join(
        f"echo 1 >/proc/sys/net/netfilter/nf_conntrack_{name}"
        for name in ("acct", "timestamp", "events")
    )
    words = ["unshare", "--net", "sh", "-c", f'ip link set lo up; {sysctls}; exec "$@"', "sh"]
    options = ["--store", store, "--socket", where / "sock", "--state-dir", where,
               "--node", "bench", "--keep", "0", "--keep-free", "0"]  # fmt: skip
    log = (where / "log").open("wb")
    process = subprocess.Popen([*words, *NETFLOW, "collect", *map(str, options)], stderr=log)
    up = Collector(process, where / "sock")
    try:
        while not up.socket.exists():
            assert process.poll() is None, (where / "log").read_text()
            time.sleep(0.05)
        yield up
    finally:
        process.terminate()
        process.wait()


def run(words: Sequence[str]) -> tuple[float, float, str]:
    """A command: seconds by the clock, of processor time, and what it printed."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(words, stdout=out, stderr=out)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        said = out.read().decode()
    assert process.returncode == 0, (words, said)
    return wall, used.ru_utime + used.ru_stime, said


def ask(up: Collector, questions: Sequence[Sequence[str]], rounds: int) -> Took:
    """The median over some questions, each by its best round; and all rounds' least.

    The processor time is the mean of all: the collector's is counted in hundredths of a second.
    """
    walls, spent, rows, began = [], 0.0, 0, up.cpu()
    for question in questions:
        best = float("inf")
        words = [*NETFLOW, *question, "-o", "ndjson", "--socket", str(up.socket)]
        for _ in range(rounds):
            wall, cpu, said = run(words)
            best, spent, rows = min(best, wall), spent + cpu, max(rows, said.count("\n"))
        walls.append(best)
    spent += up.cpu() - began
    return Took(statistics.median(walls), min(walls), spent / rounds / len(questions), rows)


# -- what is asked ---------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """An address that somebody sent to, and when."""

    address: str
    port: int
    at: int
    name: str


def targets(files: Sequence[Path], count: int) -> list[Target]:
    """Servers outside that slices sent to, one of each of some files over the whole time."""
    found = []
    for number in range(count):
        name = files[(2 * number + 1) * len(files) // (2 * count)]
        rows = duckdb.execute(
            "SELECT dst_lo, dport, epoch_ms(end_time) FROM read_parquet($1) WHERE dst_hi = 0"
            " AND src_hi = 0 AND oxid <> 0 AND proto = 6 AND dport IN (80, 443)"
            " ORDER BY hash(dst_lo, end_time) LIMIT 1",
            [str(name)],
        ).fetchall()
        low, port, end = rows[0]
        found.append(Target(address(low), port, end * 1_000_000, str(name)))
    return found


def address(low: int) -> str:
    return str(ipaddress.IPv4Address(low & 0xFFFFFFFF))


def iso(ns: int) -> str:
    return datetime.fromtimestamp(ns / SECOND, UTC).isoformat(timespec="seconds")


def ours(up: Collector, found: list[Target], first: int, last: int, rounds: int) -> dict[str, Took]:
    """All questions. first, last: of the records, ns."""
    day = (first + 10 * 24 * HOUR if last - first > 12 * 24 * HOUR else first) // HOUR * HOUR
    span = ["--since", iso(day), "--until", iso(day + 24 * HOUR)]
    month = ["--since", iso(first), "--until", iso(last)]
    asked: dict[str, list[list[str]]] = {
        "who --to ADDR:PORT --at T": [
            ["who", "--to", f"{t.address}:{t.port}", "--at", iso(t.at)] for t in found
        ],
        "query --dst ADDR --dport PORT --at T": [
            ["query", "--dst", t.address, "--dport", str(t.port), "--at", iso(t.at)] for t in found
        ],
        "series of a slice, a day by the minute": [
            ["series", "--slice", f"slice_{n}", *span, "--step", "1m"] for n in (0, 1, 4)
        ],
        "top, an hour": [["top", "--since", iso(day), "--until", iso(day + HOUR)]],
        "top, a day": [["top", *span]],
        "query --dst ADDR --limit 1000, all the time": [
            ["query", "--dst", t.address, "--limit", "1000", *month] for t in found[:2]
        ],
        "top, all the time": [["top", *month]],
    }
    return {
        name: told(name, ask(up, questions, 1 if "all the time" in name else rounds))
        for name, questions in asked.items()
    }


def told(name: str, took: Took) -> Took:
    print(
        f"{name:<42}{took.wall * 1e3:>9.0f} ms, least {took.least * 1e3:.0f}, processor"
        f" {took.cpu * 1e3:.0f} ms, {took.rows} rows",
        flush=True,
    )
    return took


# -- a reader and the writer -----------------------------------------------------------


def commits_beside(store: Path) -> dict[str, float]:
    """How long commits of 16,384 records take while a long question runs, and while none does."""
    from netflow import store as stores
    from netflow.node import Node

    kept = stores.open_store(store, Node("bench", 1))
    stores.begin_run(kept, stores.Mark(time.time_ns()))
    batch = synthetic.mixed(np.random.default_rng(5), 16_384, time.time_ns() // HOUR)
    files = [str(f) for f in sorted((store / "history").glob("*/*.parquet"))]
    reader, done = kept.con.cursor(), False

    def read() -> None:
        nonlocal done
        reader.execute(
            "SELECT oxid, sum(obytes), count(DISTINCT dst_lo % 100000) FROM"
            " read_parquet($1::VARCHAR[]) GROUP BY oxid", [files[: max(1, len(files) // 3)]],
        ).fetchall()  # fmt: skip
        done = True

    def commit() -> float:
        began = time.perf_counter()
        stores.patiently(lambda: stores.commit(kept, batch, stores.Mark(time.time_ns())))
        return time.perf_counter() - began

    alone = [commit() for _ in range(10)]
    thread = Thread(target=read)
    thread.start()
    beside = []
    while not done or len(beside) < 3:
        beside.append(commit())
    thread.join()
    kept.con.close()
    return {
        "alone": statistics.median(alone),
        "beside": statistics.median(beside),
        "longest": max(beside),
        "commits": len(beside),
    }


# -- nfdump ----------------------------------------------------------------------------


def packed(path: Path) -> np.ndarray:
    """A file's IPv4 records as IPFIX data records."""
    columns = duckdb.execute(
        "SELECT src_lo, dst_lo, sport, dport, proto, epoch_ms(end_time) - duration_ms AS start,"
        ' epoch_ms(end_time) AS "end", opackets, obytes FROM read_parquet($1)'
        " WHERE src_hi = 0 AND dst_hi = 0",
        [str(path)],
    ).fetchnumpy()
    kinds = {1: "u1", 2: ">u2", 4: ">u4", 8: ">u8"}
    out = np.zeros(len(columns["sport"]), dtype=[(name, kinds[size]) for name, _, size in FIELDS])
    for name, column in (
        ("src", columns["src_lo"] & np.uint64(0xFFFFFFFF)),
        ("dst", columns["dst_lo"] & np.uint64(0xFFFFFFFF)),
        ("packets", columns["opackets"]),
        ("octets", columns["obytes"]),
        *((name, columns[name]) for name in ("sport", "dport", "proto", "start", "end")),
    ):
        out[name] = column
    return out


def message(sets: bytes, seq: int) -> bytes:
    return struct.pack("!HHIII", 10, 16 + len(sets), int(time.time()), seq, 1) + sets


def fill_nfcapd(where: Path, files: Sequence[Path]) -> int:
    """A directory of nfcapd's for each file; returns how many records it took."""
    template = struct.pack("!HH", 256, len(FIELDS)) + b"".join(
        struct.pack("!HH", element, size) for _, element, size in FIELDS
    )
    template = struct.pack("!HH", 2, 4 + len(template)) + template
    taken = 0
    for number, file in enumerate(files):
        if not number % 24:
            print(f"nfcapd: {taken:,} records, {number} of {len(files)} hours", flush=True)
        records = packed(file)
        into = where / f"{file.parent.name}-{file.name[:2]}"
        into.mkdir(parents=True, exist_ok=True)
        words = ["nfcapd", "-w", into, "-b", "127.0.0.1", "-p", str(PORT), "-t", "3600"]
        with (where.parent / "nfcapd.log").open("a") as log:
            daemon = subprocess.Popen(words, stdout=log, stderr=log)
        while unread(PORT)[0] < 0:
            assert daemon.poll() is None, (where.parent / "nfcapd.log").read_text()
            time.sleep(0.01)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
            link.connect(("127.0.0.1", PORT))
            link.send(message(template, 0))
            for first in range(0, len(records), 28):
                data = records[first : first + 28].tobytes()
                link.send(message(struct.pack("!HH", 256, 4 + len(data)) + data, first))
                if first % (28 * 16) == 0:
                    while unread(PORT)[0] > 100_000:
                        time.sleep(0.0002)
        while unread(PORT)[0] > 0:
            time.sleep(0.002)
        assert not unread(PORT)[1], "nfcapd lost datagrams"
        daemon.terminate()
        daemon.wait()
        taken += len(records)
    (where.parent / f"{where.name}.records").write_text(str(taken))
    return taken


def filled(where: Path) -> int:
    """How many records are in a directory that fill_nfcapd() has filled whole; else 0."""
    count = where.parent / f"{where.name}.records"
    return int(count.read_text()) if count.exists() else 0


def theirs(where: Path, found: list[Target], rounds: int) -> dict[str, Took]:
    """nfdump's times for who sent to an address: in the file of the hour, and in all of them."""

    def nfdump(files: Path, target: Target, window: bool) -> tuple[float, float, int]:
        words = ["nfdump", "-R", str(files), "-q", "-o", "csv"]
        if window:
            form = "%Y/%m/%d.%H:%M:%S"
            span = [datetime.fromtimestamp(target.at / SECOND + d) for d in (-120, 120)]
            words += ["-t", "-".join(t.strftime(form) for t in span)]
        words.append(f"dst ip {target.address} and dst port {target.port}")
        wall, cpu, said = run(words)
        return wall, cpu, said.count("\n")

    def timed(
        files: Callable[[Target], Path], some: list[Target], window: bool, rounds: int
    ) -> Took:
        best = [
            min(nfdump(files(target), target, window) for _ in range(rounds)) for target in some
        ]
        walls, cpus, rows = zip(*best, strict=True)
        return Took(statistics.median(walls), min(walls), statistics.median(cpus), max(rows))

    def hour(target: Target) -> Path:
        name = Path(target.name)
        return where / f"{name.parent.name}-{name.name[:2]}"

    return {
        "nfdump, an address at a time, in the hour's file": told(
            "nfdump, in the hour's file", timed(hour, found, True, rounds)
        ),
        "nfdump, an address, all its files": told(
            "nfdump, all its files", timed(lambda target: where, found[:2], False, 1)
        ),
    }


# -- all of it -------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--days", type=int, default=0, help="default: 139,000 records an hour")
    parser.add_argument("--store", type=Path, help="one that synthetic.py has made")
    parser.add_argument("--nfcapd", type=Path, help="nfdump's files, if an earlier run kept them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    facts: dict[str, Any] = {"load": os.getloadavg()[1]}
    with tempfile.TemporaryDirectory(prefix="bench-history-") as name:
        where = Path(name)
        store = options.store or where / "store"
        if not options.store:
            days = options.days or max(1, options.records // (139_000 * 24))
            last = time.time_ns() // HOUR
            synthetic.fill(store, options.records, days, "bench", last - days * 24 + 1)
        files = sorted((store / "history").glob("*/*.parquet"))
        first, until, records = duckdb.execute(
            "SELECT epoch_ns(min(end_time)), epoch_ns(max(end_time)), count(*)"
            " FROM read_parquet($1)", [[str(file) for file in files]],
        ).fetchall()[0]  # fmt: skip
        size = sum(file.stat().st_size for file in files)
        facts |= {"records": records, "days": (until - first) / SECOND / 86400}
        facts |= {"files": len(files), "bytes_a_record": size / records}
        print(f"{records:,} records in {len(files)} files, {size / records:.1f} bytes each")
        peers = options.nfcapd or where / "nfcapd"
        if shutil.which("nfdump"):
            facts["peer_records"] = filled(peers) or fill_nfcapd(peers, files)
        found = targets(files, 8)
        with collecting(store, where) as up:
            facts["idle_mb"] = up.memory("VmRSS")
            facts["peak_before_mb"] = up.memory("VmHWM")
            up.forget_peak()
            took = ours(up, found, first, until, options.rounds)
            facts["peak_mb"] = up.memory("VmHWM")
        print(f"the collector's memory: {facts['idle_mb']:.0f} MB, at most {facts['peak_mb']:.0f}")
        facts["ours"] = {key: asdict(value) for key, value in took.items()}
        facts["commits"] = commits_beside(store)
        print("commits:", facts["commits"])
        if "peer_records" in facts:
            took = theirs(peers, found, options.rounds)
            facts["theirs"] = {key: asdict(value) for key, value in took.items()}
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
