"""The benchmark mix of flow records, in any number, written as a collector would write them.

    synthetic.py STORE RECORDS [--days N] [--node NAME]

makes a store with that many records over that many days (30), each hour by way
of a hot segment and the archiver's own writer.

The mix is a shared research host: 60 slices on one IPv4 and one IPv6 address,
a tenth of the flows IPv6.

| part | what | packets and bytes |
|--:|---|---|
| 34 % | DNS questions to three resolvers | one each way; sizes by name, of 2,000 names |
| 30 % | TCP to 200,000 servers, Zipf, mostly 443 and 80 | log-normal by what is asked for |
| 14 % | TCP from clients to services of slices | likewise, turned round |
| 10 % | ICMP and UDP probes of 4,000 targets, sizes fixed by the prober | 1 to 4 packets |
| 6 % | scans of a port over many addresses: a SYN, perhaps a RST | 60 bytes, none or 40 back |
| 6 % | shares of connections that go on (active timeout) | log-normal |

Times are spread evenly. An end is the last packet plus connection tracking's
timeout (30 s for a UDP answer, 120 s after a TCP close, 10 s after a reset),
give or take a tick of 4 ms: so the kernel dates it, whenever its collector of
garbage comes by. Active shares end with the dump that showed them. flow_id is
a random number, as in the kernel.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from netflow import history, store
from netflow.history import archive
from netflow.node import Node
from netflow.when import HOUR, SECOND

Columns = dict[str, np.ndarray]
V4 = 0xFFFF << 32
HOME4, HOME6 = V4 | 0xC6336401, (0x20010DB800010000, 1)
PARTS = (0.34, 0.30, 0.14, 0.10, 0.06, 0.06)
DNS, OUT, IN, PROBE, SCAN, SHARE = range(6)
RESOLVERS = np.array([V4 | 0x0A000035, V4 | 0x0A000135, V4 | 0x08080808], dtype=np.uint64)
OUT_PORTS = np.array([443, 80, 22, 25, 8080, 993, 3128, 5222, 9418, 6667], dtype=np.uint16)
OUT_ODDS = np.array([62, 18, 6, 3, 3, 2, 2, 2, 1, 1]) / 100
IN_PORTS = np.array([443, 80, 3128, 8080, 22, 5001], dtype=np.uint16)
IN_ODDS = np.array([30, 25, 20, 15, 7, 3]) / 100
TICK = 4_000_000


def mixed(rng: np.random.Generator, count: int, hour: int) -> Columns:
    """That many records which ended in an hour (hours since 1970)."""
    part = rng.choice(6, count, p=PARTS)
    of = {kind: part == kind for kind in range(6)}
    xid = _owners(rng, part)
    c: Columns = {
        name: np.zeros(count, dtype=kind)
        for name, kind in (
            ("zone", "u2"), ("proto", "u1"), ("reason", "u1"), ("tcp_state", "u1"),
            ("sport", "u2"), ("dport", "u2"), ("opackets", "u8"), ("obytes", "u8"),
            ("rpackets", "u8"), ("rbytes", "u8"), ("oxid", "u2"), ("rxid", "u2"),
        )
    }  # fmt: skip
    c["flow_id"] = rng.integers(0, 1 << 32, count, dtype=np.uint32)
    c["proto"][:] = np.select(
        [of[DNS], of[PROBE] & (rng.random(count) < 0.7), of[PROBE]], [17, 1, 17], 6
    )
    inward = of[IN] | (of[SHARE] & (rng.random(count) < 0.3))
    c["oxid"][:] = np.where(inward, 0, xid)
    c["rxid"][:] = np.where(inward, xid, 0)
    _addresses(rng, c, of, inward)
    _ports(rng, c, of, inward)
    _counts(rng, c, of)
    _times(rng, c, of, hour)
    for side in ("src", "dst"):
        c[f"n{side}_hi"], c[f"n{side}_lo"] = c[f"{side}_hi"], c[f"{side}_lo"]
    c["nsport"], c["ndport"] = c["sport"], c["dport"]
    return c


def _zipf(rng: np.random.Generator, count: int, last: int, steep: float) -> np.ndarray:
    return np.minimum(rng.zipf(steep, count), last).astype(np.uint64)


def _normal(key: np.ndarray) -> np.ndarray:
    """A number that is always the same for a key, and over keys normally distributed."""
    mixed = key * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    pieces = [(mixed >> np.uint64(16 * n)) & np.uint64(0xFFFF) for n in range(4)]
    return (sum(piece.astype(float) for piece in pieces) - 2 * 0xFFFF) / (0xFFFF / 3**0.5)


def _owners(rng: np.random.Generator, part: np.ndarray) -> np.ndarray:
    """A few slices do most; probes and scans are those of some."""
    xid = 255 + _zipf(rng, len(part), 60, 1.5)
    probing = np.isin(part, (PROBE, SCAN))
    return np.where(probing, 300 + rng.integers(0, 4, len(part)), xid).astype(np.uint16)


def _addresses(
    rng: np.random.Generator, c: Columns, of: dict[int, np.ndarray], inward: np.ndarray
) -> None:
    count = len(inward)
    peer = _zipf(rng, count, 200_000, 1.3)
    peer = np.where(of[PROBE], rng.integers(1_000_000, 1_004_000, count).astype(np.uint64), peer)
    peer = np.where(of[SCAN], rng.integers(2_000_000, 6_000_000, count).astype(np.uint64), peer)
    low4 = np.uint64(V4) | (peer * np.uint64(2_654_435_761) & np.uint64(0xFFFFFFFF))
    six = (peer % np.uint64(10) == 3) & ~of[SCAN]
    high = np.where(six, np.uint64(0x2A00_0000_0000_0000) + (peer << np.uint64(20)), np.uint64(0))
    low = np.where(six, peer * np.uint64(11_400_714_819_323_198_485), low4)
    resolver = RESOLVERS[_zipf(rng, count, 3, 2.0).astype(int) - 1]
    low = np.where(of[DNS], resolver, low)
    high = np.where(of[DNS], np.uint64(0), high)
    six &= ~of[DNS]
    home_hi = np.where(six, np.uint64(HOME6[0]), np.uint64(0))
    home_lo = np.where(six, np.uint64(HOME6[1]), np.uint64(HOME4))
    for half, home, away in (("hi", home_hi, high), ("lo", home_lo, low)):
        c[f"src_{half}"] = np.where(inward, away, home)
        c[f"dst_{half}"] = np.where(inward, home, away)


def _ports(
    rng: np.random.Generator, c: Columns, of: dict[int, np.ndarray], inward: np.ndarray
) -> None:
    count = len(inward)
    icmp = c["proto"] == 1
    c["sport"][:] = rng.integers(32768, 61000, count)
    c["sport"][icmp] = c["oxid"][icmp]  # an id of the prober's own
    dport = np.where(inward, rng.choice(IN_PORTS, count, p=IN_ODDS),
                     rng.choice(OUT_PORTS, count, p=OUT_ODDS))  # fmt: skip
    c["dport"][:] = np.select(
        [of[DNS], icmp, of[PROBE], of[SCAN]],
        [53, 8 << 8, 33434 + rng.integers(0, 30, count), 22 + c["oxid"] % 4],
        dport,
    )


def _counts(rng: np.random.Generator, c: Columns, of: dict[int, np.ndarray]) -> None:
    count = len(c["proto"])
    name = _zipf(rng, count, 2000, 1.2)
    # A server has forty things to give, each of its own size, and clients
    # that ask for one write about the same.
    server = c["dst_lo"] ^ c["src_lo"] ^ c["dst_hi"] ^ c["src_hi"]
    thing = server * np.uint64(41) + _zipf(rng, count, 40, 1.5)
    request = np.exp(6.3 + 0.9 * _normal(thing ^ (c["oxid"] + c["rxid"]))).astype(np.uint64)
    response = np.exp(8.2 + 1.8 * _normal(thing)).astype(np.uint64)
    there = 4 + request // np.uint64(1400) + response // np.uint64(2800)
    back = 3 + response // np.uint64(1400)
    tries = 1 + (c["oxid"] % 4).astype(np.uint64)
    answered = rng.random(count) < 0.8
    reset = rng.random(count) < 0.3
    none = np.zeros(count, dtype=np.uint64)
    kinds = [of[DNS], of[PROBE], of[SCAN]]
    op = np.select(kinds, [none + 1, tries, none + 1], there)
    rp = np.select(kinds, [none + 1, tries * answered, none + reset], back)
    ob = np.select(kinds, [56 + name * 7 % 41, tries * 84, none + 60], there * 52 + request)
    rb = np.select(kinds, [84 + name * 31 % 307, tries * answered * 84, none + 40 * reset],
                   back * 52 + response)  # fmt: skip
    for key, values in (("opackets", op), ("rpackets", rp), ("obytes", ob), ("rbytes", rb)):
        c[key][:] = values


def _times(rng: np.random.Generator, c: Columns, of: dict[int, np.ndarray], hour: int) -> None:
    count = len(c["proto"])
    began, tcp = hour * HOUR, c["proto"] == 6
    end = began + rng.integers(0, HOUR, count)
    answer = (rng.lognormal(3.0, 0.8, count) * 1_000_000).astype(np.int64)
    lived = (rng.lognormal(-1.0, 1.8, count) * SECOND).astype(np.int64)
    was_reset = of[SCAN] | (tcp & (rng.random(count) < 0.15))
    timeout = np.select([was_reset, tcp], [10 * SECOND, 120 * SECOND], 30 * SECOND)
    tick = rng.integers(-TICK, TICK, count)
    start = end - timeout - tick - np.where(tcp & ~of[SCAN], lived, answer)
    dump = began + rng.integers(0, 60, count) * 60 * SECOND + 7 * SECOND
    dumped = rng.integers(0, 40_000_000, count)
    end = np.where(of[SHARE], np.minimum(dump + dumped, began + HOUR - 1), end)
    start = np.where(of[SHARE], end - 60 * SECOND, start)
    age = np.where(of[SHARE], rng.integers(0, 24 * HOUR, count), 0)
    c["start"], c["end"] = start.astype(np.uint64), end.astype(np.uint64)
    c["flow_start"] = (start - age).astype(np.uint64)
    c["reason"][:] = np.select([of[SHARE], tcp], [3, 2], 1)
    c["tcp_state"][:] = np.select([of[SHARE], tcp & was_reset, tcp], [3, 8, 7], 0)


def fill(path: Path, records: int, days: int, node: str, first_hour: int, seed: int = 1) -> None:
    """Make a store of the mix; prints how far it is."""
    kept = history.open_store(path, Node(node, 1), "256MB")
    store.begin_run(kept, store.Mark(first_hour * HOUR))
    archiver = archive.Archiver(kept, kept.con.cursor(), history.Keeping(), path / "registry.db")
    rng = np.random.default_rng(seed)
    hours = days * 24
    for n in range(hours):
        count = records * (n + 1) // hours - records * n // hours
        for first in range(0, count, 500_000):
            batch = mixed(rng, min(500_000, count - first), first_hour + n)
            store.commit(kept, batch, store.Mark((first_hour + n) * HOUR + 1))
        store.commit(kept, None, store.Mark((first_hour + n + 1) * HOUR))
        if n < hours - 1:
            archive.close_segments(archiver)
            archive.tidy(archiver)
        if sys.stderr.isatty() or n % 24 == 23:
            print(f"\r{n + 1} of {hours} hours", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    # Nobody tells the ends of the mix's connections that go on: a collector that
    # opens this store would look for six in a hundred of all records.
    kept.con.execute("DELETE FROM carried")
    archiver.con.close()
    store.end_run(kept)
    store.close(kept)


def main(argv: list[str]) -> None:
    import argparse
    from time import time

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("records", type=int)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--node", default="bench")
    asked: Any = parser.parse_args(argv)
    last = int(time()) * SECOND // HOUR
    fill(asked.store, asked.records, asked.days, asked.node, last - asked.days * 24 + 1)


if __name__ == "__main__":
    main(sys.argv[1:])
