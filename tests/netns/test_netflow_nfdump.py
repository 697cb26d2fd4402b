"""The filter language against nfdump itself: the same flows, the same filter, the same answer."""

import csv
import random
import signal
import struct
import subprocess
from contextlib import closing
from ipaddress import ip_address

import pytest
from netflowbed import unread
from storebed import T0, flow, put, tenures
from vnet.testing.poll import until

from netflow import history, names, store
from netflow.filters import where
from netflow.node import Node
from netflow.wire import Filter

pytestmark = pytest.mark.netns

FLOWS = 3000
RANDOM = 80
PORT = 9995
SEED = 20260301
SOURCES = ["10.0.0.1", "10.0.0.2", "10.0.1.200", "192.0.2.66", "2001:db8::1", "2001:db8:0:1::1",
           "2001:db8:ffff::17", "fe80::1"]  # fmt: skip
PEERS = ["192.0.2.7", "192.0.2.8", "192.0.2.130", "198.51.100.9", "203.0.113.255", "10.0.0.1",
         "2001:db8:1::80", "2001:db8:1::81", "2001:db8::1", "2620:0:2d0:200::7"]  # fmt: skip
PORTS = [0, 1, 22, 25, 53, 80, 443, 1023, 1024, 8080, 40000, 65535]
TYPES = [(0, 0), (3, 1), (3, 3), (8, 0), (11, 0)]
TYPES6 = [(1, 4), (3, 0), (128, 0), (129, 0)]


def flows():
    """Flows of all kinds. What the originator sent is another number of bytes in each."""
    rng = random.Random(SEED)
    made = {}
    while len(made) < FLOWS:
        src = rng.choice(SOURCES)
        dst = rng.choice([p for p in PEERS if (":" in p) == (":" in src)])
        icmp = 58 if ":" in src else 1
        proto = rng.choice([6, 6, 6, 17, 17, icmp, 47])
        sport, dport = rng.choice(PORTS), rng.choice(PORTS)
        if proto == icmp:
            kind, code = rng.choice(TYPES6 if icmp == 58 else TYPES)
            sport, dport = 0, kind << 8 | code
        elif proto == 47:
            sport = dport = 0
        packets = rng.choice([1, 1, 2, 3, 10, 100, 100_000])
        octets = packets * rng.randint(40, 1500)
        back = rng.choice([0, 1, 5, 5000])
        start = rng.randint(0, 3_000_000)
        last = start + rng.choice([0, 1, 7, 999, 1000, 1001, 60_000, 400_000])
        made[octets] = {
            "src": src, "dst": dst, "proto": proto, "sport": sport, "dport": dport,
            "opackets": packets, "obytes": octets, "rpackets": back,
            "rbytes": back * rng.randint(40, 1500), "start": start, "end": last,
        }  # fmt: skip
    return list(made.values())


# -- into nfdump's files: NetFlow 9 (RFC 3954), both directions in one record ----------------

FIELDS = ((7, 2), (11, 2), (4, 1), (2, 8), (1, 8), (24, 8), (23, 8), (22, 4), (21, 4), (32, 2))
VALUES = "!HHBQQQQIIH"
UPTIME = 4_000_000  # ms


def datagrams(rows, now):
    for sequence, first in enumerate(range(0, len(rows), 10)):
        body, count = b"", 0
        for six in (False, True):
            source, target, size = (27, 28, 16) if six else (8, 12, 4)
            fields = ((source, size), (target, size), *FIELDS)
            mine = [r for r in rows[first : first + 10] if (":" in r["src"]) == six]
            template = b"".join(struct.pack("!HH", *field) for field in fields)
            number = 256 + six
            body += struct.pack("!HHHH", 0, 8 + len(template), number, len(fields)) + template
            data = b"".join(
                ip_address(r["src"]).packed
                + ip_address(r["dst"]).packed
                + struct.pack(
                    VALUES, r["sport"], r["dport"], r["proto"], r["opackets"], r["obytes"],
                    r["rpackets"], r["rbytes"], r["start"], r["end"],
                    r["dport"] if r["proto"] in (1, 58) else 0,
                )
                for r in mine
            )  # fmt: skip
            if mine:
                data += bytes(-len(data) % 4)
                body += struct.pack("!HH", number, 4 + len(data)) + data
            count += 1 + len(mine)
        yield struct.pack("!HHIIII", 9, count, UPTIME, now, sequence, 1) + body


def waiting(ns):
    """Bytes that nfcapd has not read; -1 before it listens."""
    left, lost = unread(PORT, ns)
    assert lost == 0, "nfcapd lost datagrams"
    return left


SENDER = """
import socket, sys
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
link.connect(("127.0.0.1", int(sys.argv[1])))
for line in sys.stdin:
    link.send(bytes.fromhex(line))
"""


_FIT = 100
"""Datagrams that a socket of Debian's net.core.rmem_max holds."""


class Nfdump:
    """nfcapd's files of the flows."""

    def __init__(self, ns, path, rows):
        self.path = path
        path.mkdir()
        said = path.parent / "nfcapd.log"
        with said.open("w") as log:
            words = ("nfcapd", "-w", path, "-b", "127.0.0.1", "-p", str(PORT), "-t", "3600",
                     "-B", "4000000")  # fmt: skip
            daemon = ns.popen(*words, stdout=log, stderr=log)
            try:
                until(lambda: waiting(ns) >= 0, what="nfcapd to listen")
                packets = [f"{d.hex()}\n" for d in datagrams(rows, T0 // 10**9)]
                for at in range(0, len(packets), _FIT):
                    part = "".join(packets[at : at + _FIT])
                    ns.run("python3", "-c", SENDER, str(PORT), input=part)
                    until(lambda: waiting(ns) == 0, what="nfcapd to read all")
            finally:
                daemon.send_signal(signal.SIGTERM)
                daemon.wait(60)
        stored = self("any")
        assert len(stored) == len(rows), said.read_text()

    def __call__(self, text):
        """Which flows match, by what they sent. AssertionError with what nfdump says."""
        words = ["nfdump", "-R", self.path, "-o", "csv", text]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{text}: {done.stderr}"
        [header, *lines] = csv.reader(done.stdout.splitlines())
        found = [int(line[header.index("ibyt")]) for line in lines if len(line) == len(header)]
        assert len(found) == len(set(found))
        return set(found)


class Ours:
    """A store with the same flows."""

    def __init__(self, path, rows):
        self.kept = history.open_store(path, Node("here", 1))
        store.begin_run(self.kept, store.Mark(T0))
        made = []
        for n, row in enumerate(rows):
            times = {k: T0 + row[k] * 1_000_000 for k in ("start", "end")}
            rest = {k: v for k, v in row.items() if k not in ("src", "dst", "start", "end")}
            one = flow(row["src"], row["dst"], **rest, flow_id=n + 1)
            made.append(one | times | {"flow_start": times["start"]})
        put(self.kept, *made)

    def __call__(self, text):
        condition, params = where(Filter(expression=text))
        with closing(self.kept.con.cursor()) as con, history.reading(con):
            records = history.source(con)
            sql = (
                f"WITH {names.CTE} SELECT obytes FROM ({records.sql}) f"
                f" {names.join('o', 'o')} {names.join('r', 'r')} WHERE {condition}"
            )
            params |= records.params | tenures().params
            return {row[0] for row in con.execute(sql, params).fetchall()}


COMMON = """
any
not any
ip 10.0.0.1
src ip 10.0.0.1
dst ip 10.0.0.1
host 10.0.0.1
SRC HOST 10.0.0.1
src or dst ip 10.0.0.1
src and dst ip 10.0.0.1
ip 2001:db8::1
src ip 2001:0db8:0:0::0001
dst host 2001:db8:1::80
ip 203.0.113.99
ip in [10.0.0.1 192.0.2.7]
ip in [10.0.0.1, 192.0.2.7,2001:db8::1]
src ip in [10.0.0.0/24 2001:db8::/48]
dst ip in [192.0.2.0/25]
net 10.0.0.0/8
src net 10.0.0.0/24
dst net 192.0.2.128/25
net 10.0.0.0 255.255.255.0
net 10.0.1.9/24
net 0.0.0.0/0
net 2001:db8::/32
dst net 2001:db8:1::/64
dst net 2001:db8:1::80/127
inet
ipv4
inet6
ipv6
proto tcp
proto 17
proto UDP
proto icmp
proto icmp6
proto gre
proto 99
icmp-type 8
icmp-type 3
icmp-type 0
icmp-type 128
icmp-code 1
icmp-code 3
bytes > 1k
bytes 5000
bytes >= 100000
bytes < 100
bytes <= 60k
bytes > 1m
bytes > 1g
in bytes > 20000
out bytes 0
out bytes > 1k
out bytes LT 100
packets 1
packets > 2
packets = 100k
out packets >= 5000
in packets EQ 3
duration 0
duration > 1000
duration >= 1000
duration < 1k
duration LE 7
duration = 60000
bps > 1m
bps < 1000
bps 0
pps > 100
pps 1
bpp > 1000
bpp < 60
bpp = 700
proto tcp and bytes > 1m
proto tcp or proto udp
not proto tcp
not not proto tcp
not (proto tcp or proto udp)
! proto tcp && ( proto udp || proto icmp )
not proto tcp and not ip 10.0.0.1
proto tcp or proto udp and bytes > 100k
(proto tcp or proto udp) and bytes > 100k
proto tcp and not (src net 10.0.0.0/8 or dst net 192.0.2.0/24) and duration > 0
""".strip().splitlines()

# nfdump's ports of ICMP are its type and code; ours are not there.
NO_ICMP = "and not proto icmp and not proto icmp6"
COMMON += [
    f"{test} {NO_ICMP}"
    for test in (
        "port 80", "src port 80", "dst port 80", "port > 1024", "src port > 1024",
        "dst port < 53", "dst port <= 53", "port = 0", "port in [22 25 443]",
        "dst port in [80, 8080]", "src and dst port > 1000", "src or dst port GE 65535",
        "not dst port 80", "not (port 80 or port 443)", "proto tcp and port 25 or proto udp",
    )
]  # fmt: skip


def a_test(rng):
    """One test that both languages have."""
    side = rng.choice(["", "src ", "dst ", "src or dst ", "src and dst "])
    compare = rng.choice(["", "=", "==", "<", ">", "<=", ">=", "EQ ", "LT ", "GT ", "LE ", "GE "])
    address = rng.choice(SOURCES + PEERS)
    bits = rng.randint(33, 128) if ":" in address else rng.randint(1, 32)
    ports = rng.sample(PORTS, rng.randint(1, 4))
    way = rng.choice(["", "in ", "out "])
    return rng.choice([
        f"{side}{rng.choice(['ip', 'host'])} {address}",
        f"{side}net {address}/{bits}",
        f"{side}ip in [{' '.join(rng.sample(SOURCES + PEERS, rng.randint(1, 5)))}]",
        f"({side}port {compare}{rng.choice(PORTS)} {NO_ICMP})",
        f"({side}port in [{rng.choice([' ', ',']).join(map(str, ports))}] {NO_ICMP})",
        f"proto {rng.choice(['tcp', 'udp', 'icmp', 'icmp6', 'gre', '6', '17', '1', '58'])}",
        f"{way}bytes {compare}{rng.choice(['100', '1500', '1k', '60k', '1m', '20m', '1g'])}",
        f"{way}packets {compare}{rng.choice(['0', '1', '3', '5', '100', '1k', '100k'])}",
        f"duration {compare}{rng.choice(['0', '1', '7', '999', '1000', '1k', '60000'])}",
        f"bps {compare}{rng.choice(['0', '1k', '64k', '1m', '100m'])}",
        f"pps {compare}{rng.choice(['0', '1', '10', '1k'])}",
        f"bpp {compare}{rng.choice(['40', '100', '700', '1500'])}",
        f"icmp-type {rng.choice(TYPES + TYPES6)[0]}",
        rng.choice(["ipv4", "ipv6", "inet", "inet6", "any"]),
    ])  # fmt: skip


def a_filter(rng, depth):
    if depth == 0 or rng.random() < 0.2:
        return a_test(rng)
    one, other = a_filter(rng, depth - 1), a_filter(rng, depth - 1)
    return rng.choice([
        f"{one} and {other}", f"{one} or {other}", f"({one}) && ({other})", f"({one} || {other})",
        f"not ({one})", f"!({one}) and {other}", f"({one} or {other}) and not ({other})",
    ])  # fmt: skip


def test_a_filter_that_both_have_matches_the_same_flows(ns, tmp_path):
    rows = flows()
    ns.run("ip", "link", "set", "lo", "up")
    nfdump, ours = Nfdump(ns, tmp_path / "nfcapd", rows), Ours(tmp_path / "store", rows)
    rng = random.Random(SEED)
    texts = COMMON + [a_filter(rng, 3) for _ in range(RANDOM)]
    answers = {text: (ours(text), nfdump(text)) for text in texts}
    ours.kept.con.close()
    differing = {
        text: (sorted(mine - theirs)[:3], sorted(theirs - mine)[:3])
        for text, (mine, theirs) in answers.items()
        if mine != theirs
    }
    assert not differing
    # Most of them tell flows apart, so that agreeing means something.
    assert sum(0 < len(mine) < FLOWS for mine, _ in answers.values()) > len(texts) * 0.7
