"""Refusals of the real programs become events: whose, what, how many, and none lost.

    slice a, slice b --- node [programs loaded, a policy; no rules] --- nobody

What each attempt is refused with is test_guard_host.py's. The programs see the
whole machine: what they say of others' marks is left out here.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from guardbed import bpffs
from vnet.testing import cgroup, net
from vnet.testing.poll import until
from vnetbed import Node

from netflow import access, names, questions, store
from netflow.wire import Filter, Spoofed
from vnet import bpf, eventlog, events, refusals, registry

pytestmark = pytest.mark.netns

A, B = 40300, 40301
PORT = 7011

#: The policy is one of a network namespace: that of the process that writes it.
_POLICY = f"""
import sys
from pathlib import Path
from vnet import policy
a, b = int(sys.argv[2]), int(sys.argv[3])
policy.write(Path(sys.argv[1]), policy.Policy(
    slices={{a: {A}, b: {B}}}, grants={{{B}: "own"}}, ports=[(policy.Port(6, {PORT}), {B})],
    observe=sys.argv[4] == "observe"))
"""

_BIND = f"""
import os, socket
open("/proc/self/comm", "w").write("binder")
try:
    socket.socket(socket.AF_INET6).bind(("::1", {PORT}))
    print(os.getpid(), "bound")
except PermissionError:
    print(os.getpid(), "refused")
"""

_RAW = """
import os, socket, sys
refused = 0
for _ in range(int(sys.argv[1])):
    try:
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()
    except PermissionError:
        refused += 1
print(os.getpid(), refused)
"""

#: A thousand slices, one after the other, ask for a raw socket 20 times on each CPU.
_MANY = """
import os, socket, sys
from pathlib import Path
from vnet import policy
slices, own = policy.Slices(Path(sys.argv[1])), int(sys.argv[2])
count = 0
for xid in range(1000, 1000 + int(sys.argv[3])):
    slices.set_many({own: xid})
    for cpu in os.sched_getaffinity(os.getppid()):
        os.sched_setaffinity(0, {cpu})
        for _ in range(20):
            try:
                socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()
            except PermissionError:
                count += 1
print(count)
"""


def ours(text):
    """The events about this test's slices."""
    found = [json.loads(line) for line in text.splitlines()]
    return [e for e in found if e["kind"] == "lost" or e["xid"] >= 1000 or e["owner_xid"] == B]


@dataclass(frozen=True)
class Bed:
    """See the drawing above."""

    node: Node
    instance: Path
    a: cgroup.Cgroup
    b: cgroup.Cgroup

    @property
    def paths(self):
        return replace(self.node.paths, bpf_dir=self.instance.parent)

    def python(self, code, *argv, slice=None):
        """Run it to its end; what it printed, as words."""
        done = self.node.ns.run(sys.executable, "-c", code, *map(str, argv), cgroup=slice)
        return done.stdout.split()

    def mode(self, mode):
        """enforce or observe."""
        self.python(_POLICY, self.instance, self.a.id, self.b.id, mode)

    def events(self, *argv):
        """What ``vnet events --json`` prints."""
        return ours(self.node.vnet("events", "--json", *argv).stdout)

    def logged(self, paths=None):
        """How many events the log holds."""
        return len(ours(eventlog.path(paths or self.paths).read_text()))

    def counts(self, xid=A):
        """{kind: Count} of one slice."""
        return {c.kind: c for c in refusals.read(self.instance) if c.xid == xid}

    @contextmanager
    def vnet(self, *argv, **kw):
        """Run ``vnet`` beside us until the end of the block."""
        process = self.node.ns.popen(
            sys.executable, "-m", "vnet.cli", *argv, env=self.node.env,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw,
        )  # fmt: skip
        with process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture
def bed(tmp_path):
    with ExitStack() as stack:
        enter = stack.enter_context
        a, b, ns = enter(cgroup.cgroup()), enter(cgroup.cgroup()), enter(net.namespace("node"))
        node = Node(ns, tmp_path)
        node.env["VNET_BPF_DIR"] = str(tmp_path / "bpf" / "vnet")
        for directory in (node.paths.state_dir, node.paths.run_dir):
            directory.mkdir()
        asked = [registry.Request("a", A), registry.Request("b", B)]
        registry.assign(node.paths.registry, asked, time.time_ns() - 10**9)
        enter(bpffs(tmp_path / "bpf"))
        instance = bpf.load(tmp_path / "bpf" / "vnet", lsm=False)
        stack.callback(bpf.remove, instance)
        made = Bed(node, instance, a, b)
        made.mode("enforce")
        yield made


def lines(process, count, found=b""):
    """The first so many lines that a process prints, as JSON."""
    deadline = time.monotonic() + 60
    while found.count(b"\n") < count:
        left = max(deadline - time.monotonic(), 0)
        assert select.select([process.stdout], [], [], left)[0], found
        data = os.read(process.stdout.fileno(), 65536)
        assert data, f"it has ended: {found!r}"
        found += data
    return [json.loads(line) for line in found.splitlines()[:count]]


def test_a_refused_bind_is_an_event_with_slice_port_owner_and_process(bed):
    before = events.iso(time.time_ns())
    pid, how = bed.python(_BIND, slice=bed.a)
    assert how == "refused"
    (event,) = bed.events()
    assert before <= event.pop("time") <= events.iso(time.time_ns())
    assert event == {
        "kind": "bind",
        "refused": True,
        "slice": "a",
        "xid": A,
        "owner": "b",
        "owner_xid": B,
        "family": "ipv6",
        "type": "stream",
        "proto": "tcp",
        "src": "::1",
        "sport": PORT,
        "dst": None,
        "dport": None,
        "icmp": None,
        "mark": event["mark"],
        "pid": int(pid),
        "comm": "binder",
        "suppressed": 0,
    }
    assert bed.python(_BIND, slice=bed.b)[1] == "bound"
    assert len(bed.events()) == 1, "its owner's bind is no event"


def test_a_refused_raw_socket_is_an_event_and_the_owners_grant_is_none(bed):
    assert bed.python(_RAW, 1, slice=bed.b)[1] == "0"
    pid, refused = bed.python(_RAW, 1, slice=bed.a)
    assert refused == "1"
    (event,) = bed.events()
    assert (event["kind"], event["slice"], event["xid"]) == ("raw", "a", A)
    assert (event["family"], event["type"], event["proto"]) == ("ipv4", "raw", "icmp")
    assert (event["pid"], event["owner"], event["src"]) == (int(pid), None, None)


def test_in_observe_mode_it_succeeds_and_the_event_says_so(bed):
    bed.mode("observe")
    assert bed.python(_RAW, 1, slice=bed.a)[1] == "0"
    assert bed.python(_BIND, slice=bed.a)[1] == "bound"
    assert [(event["kind"], event["refused"]) for event in bed.events()] == [
        ("raw", False),
        ("bind", False),
    ]
    assert {kind: (c.refused, c.observed) for kind, c in bed.counts().items()} == {
        "raw": (0, 1),
        "bind": (0, 1),
    }
    assert "let through" in bed.node.vnet("events").stdout


def test_the_node_itself_is_refused_as_nobodys_slice(bed):
    assert bed.python(_BIND)[1] == "refused"
    (event,) = bed.events()
    assert (event["slice"], event["xid"], event["owner"]) == (None, 0, "b")
    assert "the node" in bed.node.vnet("events").stdout


def test_a_flood_yields_few_events_and_every_refusal_is_counted(bed):
    begin = time.monotonic()
    assert bed.python(_RAW, 10_000, slice=bed.a)[1] == "10000"
    lasted = time.monotonic() - begin
    told = bed.events("--kind", "raw")
    count = bed.counts()["raw"]
    assert count.refused == 10_000
    assert len(told) + count.suppressed == 10_000
    assert 10 <= len(told) <= os.cpu_count() * (10 + 10 * (lasted + 1))
    assert sum(event["suppressed"] for event in told) <= count.suppressed

    # once the flood is over, the next event tells what had none
    def all_told():
        bed.python(_RAW, 1, slice=bed.a)
        found = bed.events("--kind", "raw")
        now = bed.counts()["raw"]
        assert len(found) + now.suppressed == now.refused
        return sum(event["suppressed"] for event in found) == now.suppressed

    if os.cpu_count() < 8:  # or the last ones of each CPU stay untold for long
        until(all_told, what="the suppressed ones told")


def test_the_table_of_counters_names_slices_and_adds_up_cpus(bed):
    bed.python(_RAW, 500, slice=bed.a)
    bed.python(_BIND, slice=bed.a)
    bed.python(_BIND)
    found = bed.node.json("events", "--counters")
    assert {(c["slice"], c["kind"], c["refused"]) for c in found} == {
        ("a", "raw", 500),
        ("a", "bind", 1),
        (None, "bind", 1),
    }
    (only,) = bed.node.json("events", "--counters", "--slice", "a", "--kind", "bind")
    assert (only["xid"], only["observed"], only["suppressed"]) == (A, 0, 0)
    assert " 500 " in bed.node.vnet("events", "--counters").stdout


def test_events_are_asked_for_by_slice_kind_time_and_number(bed):
    bed.python(_RAW, 3, slice=bed.a)
    bed.python(_BIND)
    (*_, last) = bed.events()
    bed.python(_BIND, slice=bed.a)
    assert [e["kind"] for e in bed.events("--slice", "a")] == ["raw", "raw", "raw", "bind"]
    assert len(bed.events("--kind", "bind")) == 2
    assert len(bed.events("--limit", "2")) == 2
    assert bed.events("--slice", "b") == []
    unknown = bed.node.vnet("events", "--slice", "bb", check=False)
    assert (unknown.returncode, "ever had this name" in unknown.stderr) == (2, True)
    later = events.iso(int(time.time_ns()))[:26] + "Z"
    assert bed.events("--since", later) == []
    assert len(bed.events("--since", last["time"][:26] + "Z")) in (1, 2)
    assert len(bed.events("--since", "10m")) == 5
    table = bed.node.vnet("events", "--limit", "1").stdout
    assert "and 4 older ones" in table


def test_the_log_is_roots_and_the_journal_has_the_same_lines(bed, tmp_path):
    with closing(events.Drain(bed.paths)) as drain:
        reading, writing = os.pipe()
        code = """
import sys; from pathlib import Path; from vnet import events; from vnet.paths import Paths
events.Drain(Paths(*map(Path, sys.argv[1:]))).drain()
"""
        where = [bed.paths.config_dir, bed.paths.state_dir, bed.paths.run_dir, bed.paths.bpf_dir]
        stat = os.fstat(writing)
        for stream in (f"{stat.st_dev}:{stat.st_ino}", "1:1", ""):
            bed.python(_RAW, 1, slice=bed.a)
            subprocess.run(
                [sys.executable, "-c", code, *map(str, where)], check=True, stdout=writing,
                env={**os.environ, "JOURNAL_STREAM": stream},
            )  # fmt: skip
        os.close(writing)
        with os.fdopen(reading) as journal:
            printed = ours(journal.read())
        drain.drain()
    log = eventlog.path(bed.paths)
    assert printed == ours(log.read_text())[:1], "and nobody else's standard output"
    assert bed.logged() == 3
    assert (log.stat().st_uid, log.stat().st_mode & 0o777) == (0, 0o640)


def test_a_reader_killed_before_it_has_written_loses_nothing(bed):
    bed.python(_RAW, 5, slice=bed.a)
    code = """
import os, signal, sys; from pathlib import Path
from vnet import eventlog, events; from vnet.paths import Paths
eventlog.append = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
events.Drain(Paths(*map(Path, sys.argv[1:]))).drain()
"""
    where = [bed.paths.config_dir, bed.paths.state_dir, bed.paths.run_dir, bed.paths.bpf_dir]
    ended = subprocess.run([sys.executable, "-c", code, *map(str, where)]).returncode
    assert ended == -signal.SIGKILL
    assert not eventlog.path(bed.paths).exists()
    assert len(bed.events()) == 5


def test_a_follower_killed_and_started_again_goes_on_where_it_was(bed):
    with bed.vnet("events", "--follow", "--json") as follower:
        bed.python(_RAW, 1, slice=bed.a)
        assert [e["kind"] for e in lines(follower, 1)] == ["raw"]
    bed.python(_BIND, slice=bed.a)
    with bed.vnet("events", "--follow", "--json", "--limit", "0") as follower:
        assert [e["kind"] for e in lines(follower, 2)] == ["raw", "bind"]
        bed.python(_BIND)
        lines(follower, 1)
    assert [e["kind"] for e in bed.events()] == ["raw", "bind", "bind"]


def test_two_readers_at_once_see_every_event_once(bed):
    with ExitStack() as stack:
        two = [
            stack.enter_context(bed.vnet("events", "--follow", "--json", "--limit", "0"))
            for _ in range(2)
        ]
        for _ in range(10):
            bed.python(_BIND, slice=bed.a)
        for reader in two:
            found = lines(reader, 10)
            assert [(e["kind"], e["slice"]) for e in found] == [("bind", "a")] * 10
            assert len({e["pid"] for e in found}) == 10
    assert len(bed.events()) == 10


def test_what_the_full_ring_has_no_room_for_is_counted(bed):
    slices = 700 if os.cpu_count() > 1 else 1400  # 10 events of each on each CPU
    (count,) = bed.python(_MANY, bed.instance, bed.a.id, slices, slice=bed.a)
    found = [c for c in refusals.read(bed.instance) if c.xid >= 1000]
    assert sum(c.refused for c in found) == int(count) >= slices * 20
    with closing(events.Drain(bed.paths)) as drain:
        total = 0
        while batch := drain.drain():
            assert batch <= events.BATCH
            total += batch
    assert bed.logged() + sum(c.suppressed for c in found) == int(count)
    size = 8 + 96
    assert total >= (1 << 20) // size, "the ring was full"
    # and it goes on round the end
    bed.mode("enforce")
    bed.python(_BIND, slice=bed.a)
    assert bed.events("--limit", "1")[0]["kind"] == "bind"


def test_a_full_disk_is_said_and_counted_and_told_in_the_log_afterwards(bed, capsys):
    state = bed.paths.state_dir
    small = state / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], check=True)
    try:
        registry_text = bed.paths.registry.read_bytes()
        paths = replace(bed.paths, state_dir=small)
        paths.registry.write_bytes(registry_text)
        ballast = small / "ballast"
        with closing(events.Drain(paths)) as drain:
            bed.python(_RAW, 1, slice=bed.a)
            drain.drain()
            kept = eventlog.path(paths).read_bytes()
            with pytest.raises(OSError, match="No space"):
                ballast.write_bytes(b"x" * 65536)
            # the page that the log has begun still has room
            page = os.sysconf("SC_PAGE_SIZE")
            while len(kept) < page - 4096 // 8:
                bed.python(_BIND, slice=bed.a)
                drain.drain()
                now = eventlog.path(paths).read_bytes()
                if now == kept:
                    break
                kept = now
            bed.python(_BIND)
            bed.python(_BIND)
            until(lambda: drain.drain() == 0, what="the ring empty")
            said = capsys.readouterr().err
            assert "No space left on device" in said
            assert said.count("No space left") == 1, "once, not for each event"
            lost = events.unwritten(paths)
            assert lost >= 1
            assert eventlog.path(paths).read_bytes().endswith(b"}\n")
            note = bed.node.vnet("--state-dir", str(small), "events").stderr
            assert f"{lost} more could not be written" in note
            ballast.unlink()
            bed.python(_BIND)
            drain.drain()
            gap, event = map(json.loads, eventlog.path(paths).read_bytes().splitlines()[-2:])
            assert (gap["kind"], gap["count"], event["kind"]) == ("lost", lost, "bind")
            assert events.unwritten(paths) == 0
            assert (
                f"{lost} events could not be written"
                in bed.node.vnet("--state-dir", str(small), "events").stdout
            )
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_events_of_a_new_instance_are_read_without_being_told(bed):
    with closing(events.Drain(bed.paths)) as drain:
        waiting = select.poll()
        waiting.register(drain, select.POLLIN)

        def refused(count):
            """One attempt of a, which wakes the reader; so many events are then in the log."""
            bed.python(_RAW, 1, slice=bed.a)
            assert waiting.poll(60_000)
            drain.drain()
            assert bed.logged() == count

        refused(1)
        # what `vnet up` does with other objects: a new one comes, the old one goes
        old = bed.instance.rename(bed.instance.with_name("0123456789ab"))
        bpf.load(bed.instance.parent, lsm=False)
        assert waiting.poll(60_000), "a new instance wakes it"
        drain.drain()
        bed.mode("enforce")
        refused(3)  # both instances refuse, and both say so
        bpf.remove(old)
        assert waiting.poll(60_000)
        drain.drain()
        refused(4)


def test_one_instance_of_the_same_name_is_another_one(bed):
    with closing(events.Drain(bed.paths)) as drain:
        bpf.remove(bed.instance)  # a `vnet down`
        bpf.load(bed.instance.parent, lsm=False)
        bed.mode("enforce")
        bed.python(_RAW, 1, slice=bed.a)
        drain.refresh()
        drain.drain()
        assert bed.logged() == 1


def test_while_there_is_nothing_a_reader_sleeps(bed):
    with closing(events.Drain(bed.paths)) as drain:
        bed.python(_RAW, 2, slice=bed.a)
        waiting = select.poll()
        waiting.register(drain, select.POLLIN)
        assert waiting.poll(60_000)
        drain.drain()
        assert bed.logged() == 2
        until(lambda: drain.drain() == 0 and waiting.poll(0) == [], what="nothing more")


#: Nobody takes every lock (flock) that he can take in some directories.
_LOCKS = """
import fcntl, os, sys
taken = []
os.setgroups([])
os.setresgid(65534, 65534, 65534)
for top in sys.argv[1:]:
    os.chdir(top)  # the way there is not part of what is tried
    os.setresuid(65534, 65534, 0)
    for where, _dirs, names in os.walk("."):
        for name in (".", *names):
            try:
                taken.append(os.open(os.path.join(where, name), os.O_RDONLY))
                fcntl.flock(taken[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except PermissionError:
                pass
    os.setresuid(0, 0, 0)
print(len(taken), flush=True)
sys.stdin.read()
"""


def test_nobody_else_can_hold_a_lock_that_keeps_refusals_from_the_log(bed):
    bed.python(_RAW, 1, slice=bed.a)
    assert len(bed.events()) == 1
    directories = (bed.paths.state_dir, bed.paths.run_dir)
    with bed.node.ns.popen(
        *(sys.executable, "-c", _LOCKS, *map(str, directories)),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert int(other.stdout.readline()) >= len(directories)
        bed.python(_RAW, 1, slice=bed.a)
        with closing(events.Drain(bed.paths)) as drain:
            assert drain.drain() >= 1
        assert bed.logged() == 2
        other.communicate("")


def test_without_a_guard_the_log_is_still_shown(bed):
    bed.python(_RAW, 1, slice=bed.a)
    assert len(bed.events()) == 1
    bpf.remove(bed.instance)
    assert len(bed.events()) == 1
    done = bed.node.vnet("events", "--counters", check=False)
    assert (done.returncode, "vnet up" in done.stderr) == (1, True)
    bpf.load(bed.instance.parent, lsm=False)


_HOLD = """
import os, socket, sys
held = socket.socket()
os.setuid(65534)
print(flush=True)
sys.stdin.read()
print(held.getsockopt(socket.SOL_SOCKET, socket.SO_MARK))
"""


def test_the_watching_units_capabilities_are_enough(bed, tmp_path):
    unit = Path(__file__).resolve().parents[2] / "systemd" / "vnet-watch.service"
    (line,) = [x for x in unit.read_text().splitlines() if x.startswith("CapabilityBoundingSet=")]
    allowed = line.partition("=")[2].lower().replace("cap_", "+").split()
    code = """
import sys; from pathlib import Path; from vnet import adopt, events, policy
from vnet.paths import Paths
paths, instance, number = Paths(*map(Path, sys.argv[1:5])), Path(sys.argv[5]), int(sys.argv[6])
assert policy.Slices(instance).set_many({number: 40302}) == {}
assert policy.Slices(instance).table()[number].xid == 40302
assert adopt.adopt(Path(sys.argv[7])).refused == {}
events.Drain(paths).drain()
"""
    where = [bed.paths.config_dir, bed.paths.state_dir, bed.paths.run_dir, bed.paths.bpf_dir]
    bed.python(_RAW, 1, slice=bed.a)
    with ExitStack() as stack:
        c = stack.enter_context(cgroup.cgroup())
        other = bed.node.ns.popen(
            *(sys.executable, "-c", _HOLD), cgroup=c,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        stack.enter_context(other)
        assert other.stdout.readline()
        one = tmp_path / "proc"  # and not all of the machine's
        one.mkdir()
        (one / str(other.pid)).symlink_to(f"/proc/{other.pid}")
        bed.node.ns.run(
            *("setpriv", "--no-new-privs", f"--bounding-set=-all,{','.join(allowed)}"),
            *(sys.executable, "-c", code, *map(str, where), str(bed.instance), str(c.id), str(one)),
        )
        assert other.communicate("")[0] == "40302\n", "its socket has the mark"
    assert bed.logged() == 1


#: Ask for another slice's number; the system call succeeds, with the slice's own.
_CLAIM = """
import socket, sys
with socket.socket() as made:
    made.setsockopt(socket.SOL_SOCKET, 36, int(sys.argv[1]))
"""


def test_netflow_spoofed_tells_who_claimed_to_be_somebody_else(bed, tmp_path):
    bed.python(_CLAIM, B, slice=bed.a)
    bed.python(_CLAIM, B, slice=bed.b)
    assert [e["kind"] for e in bed.events("--kind", "mark")] == ["mark"]
    lines = []
    with closing(store.open_store(tmp_path / "records").con) as con:
        asked = Spoofed(filter=Filter(since=time.time_ns() - 10**11, slices=["a"]))
        now = time.time_ns()
        period = questions.period(con, asked.filter, now, now)
        known = names.Names(bed.node.paths.registry)
        questions.spoofed(con, asked, known, period, access.ALL, lines.append)
    header, row, _ = lines
    told = dict(zip(header.columns, row, strict=True))
    assert (told["what"], told["slice"], told["owner"], told["count"]) == ("mark", "a", "b", 1)
    assert period.since < told["first"] <= now
    assert not [gap for gap in header.gaps if gap.what == "no-events"]
