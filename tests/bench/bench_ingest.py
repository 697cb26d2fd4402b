"""How many flow records a second become durable, beside nfcapd fed the same connections.

``bench_ingest.py [--flows N] [--json FILE]`` as root. Conntrack's messages of
a real connection are recorded in a network namespace of the process's own, and
copied with other addresses, ports, counters and times: a beginning and an end
for each connection. Three ways, the first two also with `netflow export`
following the store meanwhile (ingest_follow.py):

* decoded: rows of such messages, decoded before, through the table into the
  store (what a record costs once it is in memory);
* events: the messages themselves, one a datagram as from the kernel, through a
  socket, the decoder, the table, and the store: the collector's own loop;
* nfcapd: the same connections as NetFlow 9 over loopback. Its sender waits when
  the receive buffer fills, so that it takes them all; it does not fsync.

A rate by the clock counts from the first message to the last record being
durable. Beside it stands the processor time of the receiver for a million
records, which says the same on a machine that is busy with other things.
"""

import argparse
import ctypes
import json
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from ingest_follow import Follower, following
from netflowbed import unread

from netflow import clock, ct, estimate, feed, node, store, writer
from netflow.fresh import Fresh
from netflow.state import COMMIT_AFTER, EVENTS, State, commit

HERE = Path(__file__).resolve().parent
CLONE_NEWNET = 0x40000000
OPEN = 10_000  # connections that live at a time
FIELDS = (
    "SRC", "DST", "SPORT", "DPORT", "RSRC", "RDST", "RSPORT", "RDPORT", "ID",
    "OPACKETS", "OBYTES", "RPACKETS", "RBYTES", "START", "STOP",
)  # fmt: skip
# Where each is: attributes within attributes, linux/netfilter/nfnetlink_conntrack.h.
PLACES = {
    (1, 1, 1): "SRC", (1, 1, 2): "DST", (1, 2, 2): "SPORT", (1, 2, 3): "DPORT",
    (2, 1, 1): "RSRC", (2, 1, 2): "RDST", (2, 2, 2): "RSPORT", (2, 2, 3): "RDPORT",
    (12,): "ID", (9, 1): "OPACKETS", (9, 2): "OBYTES", (10, 1): "RPACKETS", (10, 2): "RBYTES",
    (20, 1): "START", (20, 2): "STOP",
}  # fmt: skip
NESTS = {place[:n] for place in PLACES for n in range(1, len(place))}


class Template(ctypes.Structure):
    _fields_ = (
        ("bytes", ctypes.c_char_p),
        ("size", ctypes.c_uint32),
        ("at", ctypes.c_uint32 * len(FIELDS)),
    )


@dataclass
class Figure:
    """Records per second by the clock, and what a million cost the receiver."""

    records: int
    seconds: float
    cpu_seconds: float
    megabytes: float
    export: dict[str, float] | None = None

    @property
    def rate(self) -> float:
        return self.records / self.seconds

    @property
    def cpu_a_million(self) -> float:
        return self.cpu_seconds / self.records * 1e6


def own_namespace() -> None:
    """A network namespace in which connections are counted and timed."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        sys.exit("cannot make a network namespace: this needs root")
    for name in ("acct", "timestamp", "events"):
        Path(f"/proc/sys/net/netfilter/nf_conntrack_{name}").write_text("1")
    Path("/proc/sys/net/unix/max_dgram_qlen").write_text("65536")
    rule = "iptables -t mangle -A POSTROUTING -j CONNMARK --set-mark 0x100"
    for words in ("ip link set lo up", rule):
        subprocess.run(words.split(), check=True)


def record() -> tuple[bytes, bytes]:
    """What the kernel says when a TCP connection begins, and when it is gone."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as link:
        link.bind((0, 0b111))
        link.settimeout(5)
        with (
            socket.create_server(("127.0.0.2", 80)) as server,
            socket.create_connection(("127.0.0.2", 80)) as one,
            server.accept()[0] as other,
        ):
            one.send(b"x")
            other.recv(1)
        begin = link.recv(65536)
        subprocess.run(["conntrack", "-F"], check=True, stderr=subprocess.DEVNULL)
        while True:
            said = link.recv(65536)
            if struct.unpack_from("=H", said, 4)[0] == 0x102:
                return begin, said


def template(message: bytes) -> Template:
    """Where a message has what differs between connections."""
    found = Template(message, len(message))

    def walk(at: int, end: int, path: tuple[int, ...]) -> None:
        while at < end:
            size, kind = struct.unpack_from("=HH", message, at)
            here = (*path, kind & 0x3FFF)
            if here in PLACES:
                found.at[FIELDS.index(PLACES[here])] = at + 4
            if here in NESTS:
                walk(at + 4, at + size, here)
            at += (size + 3) & ~3

    walk(20, len(message), ())
    return found


def library(where: Path) -> ctypes.CDLL:
    """The C helpers, compiled for this run."""
    so = where / "ingest.so"
    flags = ("-O2", "-Wall", "-Wextra", "-shared", "-fPIC")
    subprocess.run(["cc", *flags, "-o", so, HERE / "ingest.c"], check=True)
    return ctypes.CDLL(str(so))


def start_sender(lib: ctypes.CDLL, flows: int, messages: tuple[bytes, bytes]) -> socket.socket:
    """A process that sends the messages of so many connections; the socket they come from."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    theirs.setsockopt(socket.SOL_SOCKET, 32, 64 << 20)  # SO_SNDBUFFORCE
    if os.fork() == 0:
        ours.close()
        begin, end = map(template, messages)
        lib.ingest_send(
            theirs.fileno(), ctypes.c_uint64(0), ctypes.c_uint64(flows), ctypes.c_uint64(OPEN),
            ctypes.byref(begin), ctypes.byref(end),
        )  # fmt: skip
        os._exit(0)
    theirs.close()
    ours.setblocking(False)
    return ours


def collector(where: Path, events: socket.socket, ringer: socket.socket) -> State:
    """A collector whose events come from a socket of ours."""
    kept, began = store.open_store(where, node.this_node()), clock.now()
    state = State(
        receive_buffer=64 << 20, store=kept, writer=writer.start(ringer), events=events,
        requests=ringer, fresh=Fresh(ringer), began=began, caught_up=began, looked=began,
        rates=estimate.begin(began),
    )  # fmt: skip
    writer.call(state.writer, lambda: store.begin_run(kept, store.Mark(began.real), "bench"))
    return state


def finish(state: State, expected: int) -> None:
    """Wait until all is durable, and see that it is all."""
    commit(state)
    writer.call(state.writer, lambda: None)
    found = store.facts(state.store.con)["hot"]
    assert found == expected, f"{found} records of {expected}"


def spent() -> float:
    used = getrusage(RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def plain(fields: list[tuple[str, object]]) -> dict[str, object]:
    """Numbers only, for JSON."""
    return {name: value for name, value in fields if not isinstance(value, Path)}


def resident() -> float:
    """The most memory this process has had, in megabytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) / 1000


def figure(records: int, began: float, cpu: float, follower: Follower | None) -> Figure:
    """What it took, once all is durable; the processor time until all is exported."""
    seconds = time.monotonic() - began
    if follower:
        follower.wait(records)
    return Figure(records, seconds, spent() - cpu, resident())


def from_events(where: Path, flows: int, followed: bool = False) -> Figure:
    """The collector's loop over a socket."""
    lib, messages = library(where), record()
    bell, ringer = socket.socketpair()
    events = start_sender(lib, flows, messages)
    state = collector(where / "events", events, ringer)
    with following(state, where) if followed else nullcontext() as follower:
        select.select([events], [], [])
        began, cpu = time.monotonic(), spent()
        while state.received < 2 * flows:
            select.select([events], [], [], COMMIT_AFTER)
            feed.take_events(state, feed.ROUNDS)
            if len(state.buffers.flows) and time.monotonic() >= state.due.commit:
                commit(state)
        finish(state, flows)
        made = figure(flows, began, cpu, follower)
    made.export = asdict(follower, dict_factory=plain) if follower else None
    os.wait()
    writer.stop(state.writer)
    state.store.con.close()
    bell.close()
    return made


def from_decoded(where: Path, flows: int, followed: bool = False, pace: int = 0) -> Figure:
    """Rows that are in memory already, again and again with other addresses.

    pace: connections a second, 0: as fast as it goes.
    """
    lib, messages = library(where), record()
    bell, ringer = socket.socketpair()
    many = 8 * (EVENTS // 2)
    events, batches = start_sender(lib, many, messages), []
    buffer = bytearray(64 * 1024)
    while sum(map(len, batches)) < 2 * many:
        select.select([events], [], [])
        batches.append(ct.Batch(EVENTS))
        while len(batches[-1]) < EVENTS // 2 and sum(map(len, batches)) < 2 * many:
            select.select([events], [], [])
            ct.receive_events(events.fileno(), buffer, batches[-1])
    os.wait()
    state = collector(where / "decoded", events, ringer)
    with following(state, where) if followed else nullcontext() as follower:
        began, cpu, done, applied = time.monotonic(), spent(), 0, 0
        while done < flows:
            for batch in batches:
                batch["src_lo"][:] += np.uint64(1 << 16)
                feed.apply(state, batch)
                applied += len(batch) // 2
                while pace and time.monotonic() < began + applied / pace:
                    time.sleep(0.001)
                if time.monotonic() >= state.due.commit:
                    commit(state)
            done += many
        finish(state, done)
        made = figure(done, began, cpu, follower)
    made.export = asdict(follower, dict_factory=plain) if follower else None
    writer.stop(state.writer)
    state.store.con.close()
    bell.close()
    return made


def from_netflow(where: Path, flows: int) -> Figure:
    """nfcapd, and nfdump's count of what it stored."""
    lib, port = library(where), 9995
    files = where / "nfcapd"
    files.mkdir()
    before = getrusage(RUSAGE_CHILDREN)
    words = ["nfcapd", "-w", files, "-b", "127.0.0.1", "-p", str(port), "-t", "3600"]
    with (where / "nfcapd.log").open("w") as log:
        daemon = subprocess.Popen(words, stdout=log, stderr=log)
    while unread(port)[0] < 0:
        assert daemon.poll() is None, (where / "nfcapd.log").read_text()
        time.sleep(0.01)
    link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    link.connect(("127.0.0.1", port))
    seq, began = ctypes.c_uint32(0), time.monotonic()
    for first in range(0, flows, 250):
        lib.ingest_netflow(
            link.fileno(), ctypes.c_uint64(first), min(250, flows - first), ctypes.byref(seq)
        )
        while unread(port)[0] > 100_000:
            time.sleep(0.0001)
    while unread(port)[0] > 0:
        time.sleep(0.0005)
    lost = unread(port)[1]
    daemon.terminate()
    daemon.wait()
    seconds = time.monotonic() - began
    after = getrusage(RUSAGE_CHILDREN)
    said = subprocess.run(
        ["nfdump", "-R", files, "-I"], capture_output=True, text=True, check=True
    ).stdout
    stored = int(said.split("Flows: ")[1].split()[0])
    # nfdump counts the two directions of a biflow record as they come: one record each.
    assert not lost and stored >= flows, f"{stored} records of {flows}, {lost} datagrams lost"
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Figure(flows, seconds, cpu, after.ru_maxrss / 1000)


WAYS = {
    "decoded": from_decoded,
    "decoded, followed": partial(from_decoded, followed=True),
    "paced, followed": partial(from_decoded, followed=True, pace=250_000),
    "events": from_events,
    "events, followed": partial(from_events, followed=True),
    "nfcapd": from_netflow,
}


def apart(name: str, flows: int) -> Figure:
    """One way in a process and a namespace of its own, so that memory is its own."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            with tempfile.TemporaryDirectory() as where:
                own_namespace()
                os.write(write, json.dumps(asdict(WAYS[name](Path(where), flows))).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        said = told.read()
    os.waitpid(child, 0)
    if not said:
        sys.exit(f"bench: {name} failed")
    return Figure(**json.loads(said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flows", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=WAYS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    names = [options.only] if options.only else list(WAYS)
    best: dict[str, Figure] = {}
    for _ in range(options.rounds):
        for name in names:
            figure = apart(name, options.flows)
            if name not in best or figure.cpu_a_million < best[name].cpu_a_million:
                best[name] = figure
    print(f"{'way':<19}{'records/s':>12}{'CPU s a million':>17}{'of nfcapd':>11}{'MB':>7}")
    peer = best.get("nfcapd")
    for name, figure in best.items():
        ratio = f"{figure.rate / peer.rate:.2f}" if peer else ""
        print(
            f"{name:<19}{figure.rate:>12,.0f}{figure.cpu_a_million:>17.2f}{ratio:>11}"
            f"{figure.megabytes:>7.0f}" + (f"  {figure.export}" if figure.export else "")
        )
    if options.json:
        facts = {
            name: asdict(figure) | {"rate": figure.rate, "cpu_a_million": figure.cpu_a_million}
            for name, figure in best.items()
        }
        options.json.write_text(
            json.dumps({"flows": options.flows, "ways": facts}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
