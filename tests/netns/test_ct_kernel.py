"""Decoder and table on the running kernel's own conntrack, in a namespace.

What the decoder reads of a dump and of events is compared, field by field, with
what conntrack(8) prints of the same; what the table records is compared with
what the sockets sent.
"""

import ctypes
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, TypeVar

import pytest
from fuzz.ctmsg import ICMP, ICMPV6, TCP, UDP
from vnet.testing.net import Namespace
from vnet.testing.poll import until

from netflow.ct import Batch, FlowBatch, Has, Msg, Reason, Table, get_request, receive

pytestmark = pytest.mark.netns

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000
A, B = 0x0101, 0x0102  # owners
DNAT = "-t nat -A OUTPUT -p tcp --dport 81 -j DNAT --to-destination 127.0.0.2:8080"
ZONE = "-p udp --dport 9 -j CT --zone 7"
HOSTS = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def inside(ns: Namespace, fn: Callable[[], T]) -> T:
    """Call fn in a thread that has entered a namespace: what it opens stays there."""

    def enter() -> T:
        fd = os.open(f"/run/netns/{ns.name}", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(fd)
        return fn()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(enter).result()


def netlink(groups: int) -> socket.socket:
    link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    link.bind((0, groups))
    link.setblocking(False)
    return link


@dataclass
class Kernel:
    """A namespace that tracks connections, and the sockets to follow it."""

    ns: Namespace
    events: socket.socket
    requests: socket.socket
    opened: ExitStack
    buffer: bytearray = field(default_factory=lambda: bytearray(32768))

    def udp(self, family: int) -> socket.socket:
        """A UDP socket in there, closed when the test is over."""
        made = inside(self.ns, lambda: socket.socket(family, socket.SOCK_DGRAM))
        return self.opened.enter_context(made)

    def iptables(self, *words: str, families: str = "46") -> None:
        for family in families:
            self.ns.run("ip6tables" if family == "6" else "iptables", "-w", *words)

    def dump(self) -> Batch:
        out = Batch(4096)
        self.requests.send(bytes.fromhex("1400000001010103070000000000000000000000"))
        done = False
        while not done:
            done = receive(self.requests.fileno(), self.buffer, out).done
        return out

    def get(self, batch: Batch, row: int) -> Batch:
        out = Batch(1024)
        self.requests.send(get_request(batch, row, seq=5))
        met = receive(self.requests.fileno(), self.buffer, out)
        assert met.datagrams == 1 and not met.malformed
        assert len(out) == 1 or met.error
        return out

    def happened(self) -> Batch:
        out = Batch(4096)
        met = receive(self.events.fileno(), self.buffer, out)
        assert not (met.malformed or met.skipped or met.error or met.overrun)
        return out

    def listing(self) -> list[str]:
        lines = []
        for family in ("ipv4", "ipv6"):
            out = self.ns.run("conntrack", "-L", "-f", family, "-o", "extended,id").stdout
            lines += out.splitlines()
        return lines


@pytest.fixture
def kernel(ns: Namespace) -> Iterator[Kernel]:
    for name in ("acct", "timestamp", "events"):
        ns.sysctl(**{f"net__netfilter__nf_conntrack_{name}": 1})
    events, requests = inside(ns, lambda: (netlink(7), netlink(0)))
    with events, requests, ExitStack() as opened:
        made = Kernel(ns, events, requests, opened)
        made.iptables("-t", "mangle", "-A", "POSTROUTING", "-j", "CONNMARK", "--set-mark", f"{A}")
        yield made


@dataclass(frozen=True)
class Talk:
    """A connected UDP pair in the namespace."""

    client: socket.socket
    server: socket.socket

    def say(self, packets: int, size: int) -> None:
        for _ in range(packets):
            self.client.send(bytes(size))
            self.server.recv(size)


def talk(kernel: Kernel, family: int = socket.AF_INET) -> Talk:
    client, server = kernel.udp(family), kernel.udp(family)
    server.bind((HOSTS[family], 0))
    client.connect(server.getsockname())
    return Talk(client, server)


def tcp(ns: Namespace, family: int, port: int, to: str = "") -> None:
    """One connection, opened, used and closed from both ends."""

    def run() -> None:
        with (
            socket.create_server((to or HOSTS[family], 8080), family=family) as server,
            socket.create_connection((HOSTS[family], port)) as client,
        ):
            accepted = server.accept()[0]
            client.send(b"hello")
            assert accepted.recv(9) == b"hello"
            client.shutdown(socket.SHUT_WR)
            assert accepted.recv(9) == b""
            accepted.close()
            assert client.recv(9) == b""

    inside(ns, run)


def traffic(kernel: Kernel) -> None:
    """TCP, UDP and pings, both families, one of them translated, one in a zone."""
    for family, host in HOSTS.items():
        tcp(kernel.ns, family, 8080)
        talk(kernel, family).say(3, 100)
        kernel.ns.run("ping", "-c2", "-i0.01", host)
    kernel.iptables(*DNAT.split(), families="4")
    tcp(kernel.ns, socket.AF_INET, 81, to="127.0.0.2")
    for chain in ("OUTPUT", "PREROUTING"):
        kernel.iptables("-t", "raw", "-A", chain, *ZONE.split())
    for family, host in HOSTS.items():
        kernel.udp(family).sendto(b"x", (host, 9))


# -- conntrack(8)'s words for the decoder's columns -------------------------------------


def both(address: str) -> tuple[int, int]:
    ip = ip_address(address)
    wide = int(ip) if ip.version == 6 else 0xFFFF << 32 | int(ip)
    return wide >> 64, wide & 2**64 - 1


STATES = ["NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT"]
STATES += ["LAST_ACK", "TIME_WAIT", "CLOSE", "SYN_SENT2"]


def printed(line: str) -> dict[str, Any]:
    """A line of ``conntrack -o extended,id``: the facts that both tell.

    Like " [NEW] ipv4 2 icmp 1 30 src= dst= type= code= id= packets= bytes= src= ...
    mark= zone= use= id="; the second src= begins the reply.
    """
    head, original, reply = line.split(" src=")
    words = re.sub(r"\[\w+\]", "", head).split()
    facts = []
    for text in (original, reply):
        said = {}
        for key, value in re.findall(r"(\w+)=(\S+)", f"src={text}"):
            # ICMP's id comes first, conntrack's last
            said.setdefault(key, value)
            if key == "id":
                said["last id"] = value
        facts.append(said)
    rest = facts[1]

    def side(said: dict[str, str]) -> tuple[int, ...]:
        if "type" in said:
            ports = int(said["id"]), int(said["type"]) << 8 | int(said["code"])
        else:
            ports = int(said.get("sport", 0)), int(said.get("dport", 0))
        return (*both(said["src"]), *both(said["dst"]), *ports)

    return {
        "proto": int(words[3]),
        "original": side(facts[0]),
        "reply": side(rest),
        "id": int(rest["last id"]),
        "mark": int(rest.get("mark", 0)),
        "zone": int(rest.get("zone", 0)),
        "state": STATES.index(words[-1]) if words[-1].isupper() else 0,
        "counters": tuple(int(f.get(k, 0)) for f in facts for k in ("packets", "bytes")),
    }


def decoded(batch: Batch, row: int) -> dict[str, Any]:
    c = {name: int(column[row]) for name, column in batch.columns().items()}
    ends = ("src_hi", "src_lo", "dst_hi", "dst_lo", "sport", "dport")
    return {
        "proto": c["proto"],
        "original": tuple(c[e] for e in ends),
        "reply": tuple(c["r" + e] for e in ends),
        "id": c["id"],
        "mark": c["mark"],
        "zone": c["zone"],
        "state": c["tcp_state"],
        "counters": tuple(c[n] for n in ("opackets", "obytes", "rpackets", "rbytes")),
    }


def by_id(facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(facts, key=lambda fact: (fact["id"], fact["original"]))


# -- the decoder ----------------------------------------------------------------------------


def test_a_dump_reads_as_conntrack_prints_it(kernel):
    traffic(kernel)
    told = [decoded(batch, row) for batch in [kernel.dump()] for row in range(len(batch))]
    assert by_id(told) == by_id([printed(flow) for flow in kernel.listing()])
    kinds = {(fact["proto"], fact["original"][1] >> 32 == 0xFFFF) for fact in told}
    assert kinds == {(TCP, True), (TCP, False), (UDP, True), (UDP, False), (ICMP, True)} | {
        (ICMPV6, False)
    }
    assert {fact["zone"] for fact in told} == {0, 7}
    assert {fact["mark"] for fact in told} == {A}
    asked = [(f["original"][5], f["reply"][4]) for f in told if f["proto"] == TCP]
    assert (81, 8080) in asked, "one is translated"


def test_starts_are_when_the_connections_began(kernel):
    before = time.time_ns()
    traffic(kernel)
    dump = kernel.dump()
    assert ((dump["has"] & Has.START) != 0).all()
    assert (dump["start"] >= before).all() and (dump["start"] <= time.time_ns()).all()


def test_events_tell_new_update_and_destroy_apart(kernel):
    tcp(kernel.ns, socket.AF_INET, 8080)
    kernel.ns.run("conntrack", "-D", "-p", "tcp")
    told = kernel.happened()
    assert set(told["proto"]) == {TCP} and len(set(told["id"])) == 1
    kinds = [Msg(m) for m in told["msg"]]
    assert kinds[0] == Msg.NEW and kinds[-1] == Msg.DESTROY
    assert len(kinds) > 2 and set(kinds[1:-1]) == {Msg.UPDATE}
    end = Has(int(told["has"][-1]))
    assert end == Has.COUNTERS | Has.MARK | Has.START | Has.STOP | Has.REPLY
    assert STATES[told["tcp_state"][-1]] == "TIME_WAIT"


def test_events_read_as_conntrack_prints_them(kernel):
    with kernel.ns.popen(
        "stdbuf", "-oL", "conntrack", "-E", "-o", "extended,id", stdout=subprocess.PIPE, bufsize=0
    ) as watcher:
        try:
            until(lambda: followers(kernel.ns) == 2, what="conntrack -E to listen")
            kernel.happened()
            traffic(kernel)
            kernel.ns.run("conntrack", "-D", check=False)
            kernel.ns.run("conntrack", "-D", "-f", "ipv6", check=False)
            told = kernel.happened()
            lines: list[str] = []
            assert watcher.stdout is not None
            os.set_blocking(watcher.stdout.fileno(), False)
            until(lambda: read_more(watcher, lines, len(told)), what=f"{len(told)} events")
        finally:
            watcher.kill()
    events = "".join(lines).splitlines()
    names = {Msg.NEW: "[NEW]", Msg.UPDATE: "[UPDATE]", Msg.DESTROY: "[DESTROY]"}
    assert [event.split()[0] for event in events] == [names[Msg(m)] for m in told["msg"]]
    assert [printed(event) for event in events] == [decoded(told, n) for n in range(len(told))]


def followers(ns: Namespace) -> int:
    """How many sockets in a namespace follow all of conntrack's events."""
    lines = ns.run("cat", "/proc/net/netlink").stdout.splitlines()
    return sum(bool(re.match(r"\S+ +12 +\d+ +0*7 ", line)) for line in lines)


def read_more(process: "subprocess.Popen[str]", into: list[str], wanted: int) -> bool:
    assert process.stdout is not None
    try:
        data = os.read(process.stdout.fileno(), 1 << 20)
    except BlockingIOError:
        return False
    into.append(data.decode())
    return "".join(into).count("\n") >= wanted


def test_every_connection_can_be_asked_for_again(kernel):
    traffic(kernel)
    dump = kernel.dump()
    for row in range(len(dump)):
        answer = kernel.get(dump, row)
        assert decoded(answer, 0) == decoded(dump, row)
        assert answer["msg"][0] == Msg.DUMP


def test_asking_for_a_connection_that_is_gone_says_so(kernel):
    talk(kernel).say(1, 1)
    dump = kernel.dump()
    kernel.ns.run("conntrack", "-D")
    out = Batch(1024)
    kernel.requests.send(get_request(dump, 0, seq=77))
    met = receive(kernel.requests.fileno(), kernel.buffer, out)
    assert (len(out), met.error, met.error_seq) == (0, 2, 77)


# -- the table --------------------------------------------------------------------------------


@dataclass
class Collector:
    kernel: Kernel
    table: Table = field(default_factory=Table)
    flows: list[dict[str, int]] = field(default_factory=list)

    def take(self, batch: Batch, active: bool = False) -> None:
        out = FlowBatch(4096)
        row, asks = self.table.apply(batch, time.time_ns(), out, active=active)
        assert row == len(batch)
        columns = out.columns()
        self.flows += [{k: int(v[i]) for k, v in columns.items()} for i in range(len(out))]
        for asked in asks:
            self.take(self.kernel.get(batch, int(asked)))

    def follow(self) -> None:
        self.take(self.kernel.happened())

    def dump(self, active: bool = False) -> None:
        self.table.dump_begin()
        self.take(self.kernel.dump(), active)
        self.follow()
        out = FlowBatch(4096)
        assert self.table.sweep(time.time_ns(), out)
        assert len(out) == 0, "nothing was lost"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_a_change_of_owner_splits_the_record_where_it_happened(kernel, family):
    collector = Collector(kernel)
    pair = talk(kernel, family)
    pair.say(5, 100)
    collector.follow()
    kernel.iptables("-t", "mangle", "-F")
    kernel.iptables("-t", "mangle", "-A", "POSTROUTING", "-j", "CONNMARK", "--set-mark", f"{B}")
    pair.say(1, 100)
    collector.follow()
    pair.say(7, 100)
    kernel.ns.run("conntrack", "-D", "-p", "udp", "-f", "ipv6" if family == 10 else "ipv4")
    collector.follow()
    head = 28 if family == socket.AF_INET else 48
    told = [(f["oxid"], f["opackets"], f["obytes"], Reason(f["reason"])) for f in collector.flows]
    # the packet that changed the owner was counted before the change was told
    assert told == [(A, 6, 6 * (100 + head), Reason.OWNER), (B, 7, 7 * (100 + head), Reason.IDLE)]
    first, second = collector.flows
    assert first["end"] == second["start"] and first["flow_start"] == second["flow_start"]


def test_shares_of_a_long_connection_add_up_to_what_was_sent(kernel):
    collector = Collector(kernel)
    pair = talk(kernel)
    for packets in (1, 10, 0, 100):
        pair.say(packets, 50)
        collector.dump(active=True)
    kernel.ns.run("conntrack", "-D")
    collector.follow()
    assert [f["opackets"] for f in collector.flows] == [1, 10, 100, 0]
    assert len(collector.table) == 0


def test_a_stream_of_real_connections_is_recorded_once_each(kernel):
    collector = Collector(kernel)
    for round in range(5):
        for family in HOSTS:
            tcp(kernel.ns, family, 8080)
            talk(kernel, family).say(round, 10)
        if round % 2:
            collector.dump()
        if round % 3:
            collector.follow()
    for family in ("ipv4", "ipv6"):
        kernel.ns.run("conntrack", "-D", "-f", family)
    collector.follow()
    sent = sorted((f["proto"], f["opackets"]) for f in collector.flows)
    closed = [f for f in collector.flows if f["proto"] == TCP]
    assert len(closed) == 10 and {f["reason"] for f in closed} == {Reason.CLOSED}
    assert [n for proto, n in sent if proto == UDP] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert {f["oxid"] for f in collector.flows} == {A}
    assert len(collector.table) == 0
