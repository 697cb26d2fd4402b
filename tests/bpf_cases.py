"""What the base programs do, on whatever kernel: for the host's tests and the guests'.

Sockets are made in the cgroups of two slices; only what leaves them is looked
at, so most of it needs no network.
"""

import errno
import itertools
import os
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from ipaddress import ip_address
from pathlib import Path
from socket import AF_INET, AF_INET6, AF_UNIX, SOCK_DGRAM, SOCK_RAW, SOCK_STREAM, SOL_SOCKET
from unittest import mock

import bpfbed
import pytest
from bpfbed import SO_MARK, A, B, Loaded, inside, mark, marks
from vnet._bpf import lib
from vnet.policy import Control, Policy, Port
from vnet.testing.cgroup import Cgroup, cgroup, root
from vnet.testing.poll import until

from vnet import policy, refusals

IPPROTO_MPTCP = 262
ORDINARY = [(AF_INET, SOCK_STREAM), (AF_INET6, SOCK_STREAM),
            (AF_INET, SOCK_DGRAM), (AF_INET6, SOCK_DGRAM)]  # fmt: skip
RAW = [(AF_INET, SOCK_RAW, socket.IPPROTO_ICMP), (AF_INET, SOCK_RAW, socket.IPPROTO_RAW),
       (AF_INET6, SOCK_RAW, socket.IPPROTO_TCP), (AF_INET, SOCK_RAW, 0xFE)]  # fmt: skip
MPTCP = [(AF_INET, SOCK_STREAM, IPPROTO_MPTCP), (AF_INET6, SOCK_STREAM, IPPROTO_MPTCP)]
PING = [(AF_INET, SOCK_DGRAM, socket.IPPROTO_ICMP), (AF_INET6, SOCK_DGRAM, socket.IPPROTO_ICMPV6)]


@pytest.fixture(scope="module")
def shared_bed(tmp_path_factory):
    with bpfbed.loaded(tmp_path_factory.mktemp("bed")) as made:
        yield made


@pytest.fixture
def bed(shared_bed):
    shared_bed.write()
    shared_bed.forget()
    return shared_bed


def counts(bed: Loaded) -> dict[tuple[int, str], tuple[int, int]]:
    """{(xid, kind): (refused, observed)}."""
    return {(c.xid, c.kind): (c.refused, c.observed) for c in refusals.read(bed.instance)}


# -- marks ----------------------------------------------------------------


def test_a_slices_sockets_carry_its_xid_and_the_nodes_carry_none(bed):
    assert inside(bed.a, lambda: marks(*ORDINARY)) == [A] * 4
    assert inside(bed.b, lambda: marks(*ORDINARY)) == [B] * 4
    assert inside(None, lambda: marks(*ORDINARY, *RAW)) == [0] * 8


def test_ping_sockets_carry_the_xid_and_need_no_grant(bed, ns):
    ns.sysctl(net__ipv4__ping_group_range="0 0")
    assert inside(bed.a, lambda: marks(*PING), ns) == [A, A]


def test_so_mark_keeps_the_xid_and_lets_the_other_bits_through(bed):
    def ask(value, size=4):
        with socket.socket(AF_INET, SOCK_DGRAM) as sock:
            sock.setsockopt(SOL_SOCKET, SO_MARK, struct.pack("=I", value).ljust(size, b"\xff"))
            return mark(sock)

    for size in (4, 5, 4096, 4097, 20000):
        assert inside(bed.a, lambda: ask(0x12345678, size)) == 0x12340000 | A  # noqa: B023
    assert inside(bed.a, lambda: ask(0)) == A
    assert inside(None, lambda: ask(0xABCD0000 | A)) == 0xABCD0000


def test_so_mark_on_another_slices_socket_keeps_that_ones_xid(bed):
    here, there = socket.socketpair(AF_UNIX, SOCK_DGRAM)

    def make():
        with socket.socket(AF_INET, SOCK_DGRAM) as sock:
            socket.send_fds(there, [b"x"], [sock.fileno()])

    def take():
        _, [fd], _, _ = socket.recv_fds(here, 1, 1)
        with socket.socket(fileno=fd) as sock:
            sock.setsockopt(SOL_SOCKET, SO_MARK, 0x50000 | B)
            return mark(sock)

    with here, there:
        inside(bed.a, make)
        assert inside(bed.b, take) == 0x50000 | A


def test_the_kernels_own_answers_to_setsockopt_stay_what_they_are(bed, ns):
    def ask(level, option, value):
        with socket.socket(AF_INET, SOCK_DGRAM) as sock:
            try:
                sock.setsockopt(level, option, value)
            except OSError as e:
                return errno.errorcode[e.errno]
        return "ok"

    def unprivileged():
        os.setresuid(65534, 65534, 65534)
        return ask(SOL_SOCKET, SO_MARK, struct.pack("=I", A))

    assert inside(bed.a, lambda: ask(SOL_SOCKET, SO_MARK, b"\x01\x02")) == "EINVAL"
    assert inside(bed.a, unprivileged) == "EPERM"
    # an option longer than a page, which the program is not shown whole
    rules = "*filter\n" + "-A INPUT -s 192.0.2.1 -j ACCEPT\n" * 100 + "COMMIT\n"
    ns.run("iptables-legacy-restore", input=rules)
    assert ns.run("iptables-legacy-save").stdout.count("192.0.2.1") == 100


def test_sub_cgroups_belong_to_the_slice_and_the_deepest_registered_ancestor_wins(bed):
    with cgroup("below", bed.a) as below, cgroup("deep", below) as deep:
        assert inside(deep, lambda: marks(ORDINARY[0])) == [A]
        bed.write(slices={below.id: 9})
        assert inside(deep, lambda: marks(ORDINARY[0])) == [9]
        assert inside(bed.a, lambda: marks(ORDINARY[0])) == [A]


def test_a_cgroup_below_the_deepest_level_that_is_kept_still_belongs_to_its_slice(bed):
    here, depth = bed.a.path, len(bed.a.path.relative_to(root()).parts)
    deepest = None
    for level in range(depth + 1, 67):
        here = here / "d"
        here.mkdir()
        if level == lib.VNET_LEVEL_MAX:
            deepest = Cgroup(here)
        if level in (62, 63, 64, 66):
            assert inside(Cgroup(here), lambda: marks(ORDINARY[0])) == [A], level
    bed.write(slices={deepest.id: 9})
    assert inside(Cgroup(here), lambda: marks(ORDINARY[0])) == [9]
    assert inside(Cgroup(here), lambda: marks(RAW[0])) == ["EACCES"]
    assert policy.Slices(bed.instance).table()[deepest.id].level == lib.VNET_LEVEL_MAX


def test_slices_are_found_where_another_cgroup_is_the_root(bed):
    script = (
        "import sys; from pathlib import Path; from vnet.policy import Policy, write;"
        "write(Path(sys.argv[1]), Policy(slices={int(sys.argv[2]): 9}))"
    )
    with cgroup("root", bed.a) as top, cgroup("slice", top) as mine, cgroup("below", mine) as below:
        subprocess.run(
            ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"',
             top.path, root(), sys.executable, "-c", script, bed.instance, str(mine.id)],
            check=True,
        )  # fmt: skip
        assert inside(below, lambda: marks(ORDINARY[0])) == [9]
        assert inside(top, lambda: marks(ORDINARY[0])) == [0]


# -- what is refused ------------------------------------------------------


def test_raw_sockets_need_the_grant(bed):
    assert inside(bed.a, lambda: marks(*RAW)) == ["EACCES"] * 4
    bed.write(grants={A: "full", B: "own"})
    assert inside(bed.a, lambda: marks(*RAW)) == [A] * 4
    assert inside(bed.b, lambda: marks(*RAW)) == [B] * 4
    bed.write(grants={A: "deny", B: "own"})
    assert inside(bed.a, lambda: marks(*RAW)) == ["EACCES"] * 4
    assert inside(bed.b, lambda: marks(*RAW)) == [B] * 4


def test_mptcp_is_refused_as_a_kernel_without_it_would(bed):
    without = inside(None, lambda: marks(*MPTCP))
    assert inside(bed.a, lambda: marks(*MPTCP)) == ["EPROTONOSUPPORT"] * 2
    assert without == [0, 0]


def test_observing_refuses_nothing_and_marks_as_ever(bed):
    def all_of_it():
        found = marks(*RAW, *MPTCP)
        with socket.socket(AF_INET, SOCK_DGRAM) as sock:
            sock.setsockopt(SOL_SOCKET, SO_MARK, 5)
            return [*found, mark(sock)]

    bed.write(observe=True)
    assert inside(bed.a, all_of_it) == [A] * 7
    assert counts(bed) == {(A, "raw"): (0, 4), (A, "mptcp"): (0, 2), (A, "mark"): (1, 0)}
    assert [(e.kind, e.observed) for e in bed.events()] == [
        *[(lib.VNET_KIND_RAW, 1)] * 4, *[(lib.VNET_KIND_MPTCP, 1)] * 2, (lib.VNET_KIND_MARK, 0)
    ]  # fmt: skip


def test_enforcing_and_observing_are_switched_by_one_store(bed):
    now = policy.control(bed.instance)
    assert now.observe is False
    policy.set_control(bed.instance, Control(now.generation, True))
    assert inside(bed.a, lambda: marks(RAW[0])) == [A]
    policy.set_control(bed.instance, now)
    assert inside(bed.a, lambda: marks(RAW[0])) == ["EACCES"]


# -- what is told ---------------------------------------------------------


def test_a_refusal_is_counted_and_told(bed):
    def refused():
        return [marks(RAW[0]), os.getpid()]

    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    got, pid = inside(bed.a, refused)
    assert got == ["EACCES"]
    assert counts(bed) == {(A, "raw"): (1, 0)}
    [event] = bed.events()
    assert (event.xid, event.kind, event.pid, event.observed) == (A, lib.VNET_KIND_RAW, pid, 0)
    assert (event.family, event.type, event.proto) == (AF_INET, SOCK_RAW, socket.IPPROTO_ICMP)
    assert event.comm.rstrip(b"\0").decode() == Path("/proc/self/comm").read_text().strip()
    assert before <= event.when <= time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert bed.events() == []


def test_a_mark_that_was_not_allowed_is_told_with_whose_it_is(bed):
    def ask():
        with socket.socket(AF_INET6, SOCK_STREAM) as sock:
            for value in (0x70000, A, 0x60000 | A, 0x50000 | B):
                sock.setsockopt(SOL_SOCKET, SO_MARK, value)

    inside(bed.a, ask)
    [event] = bed.events()
    assert (event.xid, event.owner, event.mark & 0xFFFF) == (A, B, B)
    assert (event.family, event.type, event.proto) == (AF_INET6, SOCK_STREAM, socket.IPPROTO_TCP)
    assert counts(bed) == {(A, "mark"): (1, 0)}


def test_a_flood_is_told_now_and_then_and_counted_in_full(bed):
    many = 500

    def flood():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        return [Counter(marks(*[RAW[0]] * many)), time.clock_gettime_ns(time.CLOCK_BOOTTIME)]

    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    got, after = inside(bed.a, flood)
    assert got == {"EACCES": many}
    seconds = (after - before) / 1e9
    [count] = refusals.read(bed.instance)
    told = bed.events()
    # a bucket that was full, and what flowed into it meanwhile
    assert 10 <= len(told) <= lib.VNET_EVENT_BURST + seconds * lib.VNET_EVENT_PER_SECOND + 1
    assert (count.refused, count.suppressed) == (many, many - len(told))
    # another slice's bucket is its own
    inside(bed.b, lambda: marks(RAW[0]))
    assert [e.xid for e in bed.events()] == [B]

    def told_again():
        one = {min(os.sched_getaffinity(0))}  # the same as before
        inside(bed.a, lambda: os.sched_setaffinity(0, one) or marks(RAW[0]))
        return bed.events()

    # what was suppressed is told with the first event after it
    found = until(told_again, what="a token")
    untold = sum(e.suppressed for e in told) + found[0].suppressed
    assert untold == refusals.read(bed.instance)[0].suppressed


# -- policies -------------------------------------------------------------


def test_what_is_written_is_read_again(bed):
    here, there, six = (ip_address(a) for a in ("192.0.2.7", "192.0.2.8", "2001:db8::7"))
    given = Policy(
        slices={bed.a.id: A, bed.b.id: B},
        grants={A: "own", B: "full"},
        ports=[
            (Port(6, 80), A),
            (Port(17, 53, here), A),
            (Port(17, 53, there), B),
            (Port(132, 65535, six), B),
        ],
        addresses={here: A, six: B},
        observe=True,
    )
    assert policy.write(bed.instance, given) == []
    found = policy.read(bed.instance)
    found.ports.sort(key=lambda pair: (pair[0].proto, pair[0].port, str(pair[0].address)))
    given.ports.sort(key=lambda pair: (pair[0].proto, pair[0].port, str(pair[0].address)))
    assert found == given
    bed.write()
    assert policy.read(bed.instance) == Policy(slices={bed.a.id: A, bed.b.id: B})


def test_nobody_ever_meets_half_a_policy(bed):
    """With each swap slice a changes its xid and its grant: what it gets always fits together."""

    stop, enough = bed.a.path / "stop", bed.a.path / "enough"

    def hammer():
        seen = Counter()
        while not stop.exists():
            try:
                with socket.socket(*RAW[0]) as sock:
                    seen[mark(sock)] += 1
            except PermissionError:
                seen["EACCES"] += 1
            if len(seen) > 1 and min(seen.values()) > 5 and not enough.exists():
                enough.mkdir()
        return seen

    # 8 may have raw sockets, 7 may not; in no policy is a nobody's.
    policies = [
        Policy(slices={bed.a.id: 7}, grants={8: "full"}),
        Policy(slices={bed.a.id: 8, bed.b.id: 7}, grants={8: "own"}),
    ]
    policy.write(bed.instance, policies[0])
    with bpfbed.child(bed.a, hammer) as answer:
        for given in policies * 10:
            policy.write(bed.instance, given)
        turns = itertools.cycle(policies)  # it may have had no processor yet
        until(lambda: enough.exists() or policy.write(bed.instance, next(turns)))
        stop.mkdir()
        seen = answer()
    assert set(seen) == {"EACCES", "8"}, seen
    assert min(seen.values()) > 5, seen


def test_slices_of_the_policy_in_force_can_be_added_and_removed_one_by_one(bed):
    table = policy.Slices(bed.instance)
    bed.write(grants={9: "full"})
    with cgroup("one", bed.a) as one, cgroup("more", one) as more:
        gone = 1 << 60
        assert table.set_many({more.id: 9, bed.b.id: 10, gone: 11}) == {gone: errno.ENOENT}
        assert inside(more, lambda: marks(RAW[0])) == [9]
        assert inside(bed.b, lambda: marks(ORDINARY[0])) == [10]
        entry = table.table()[more.id]
        assert (entry.xid, entry.level) == (9, len(more.rel.split("/")) - 1)
        assert table.delete_many([more.id, gone]) == {}
        assert inside(more, lambda: marks(ORDINARY[0], RAW[0])) == [A, "EACCES"]
        table.flush()
        assert table.table() == {}
        assert inside(more, lambda: marks(ORDINARY[0], RAW[0])) == [0, 0]


def test_a_table_that_is_full_grows(bed):
    with mock.patch("vnet.policy._ROOM", 1):
        bed.write()  # room for five
        with cgroup("many", bed.a) as many:
            for n in range(8):
                (many.path / str(n)).mkdir()
            ids = {(many.path / str(n)).stat().st_ino: n + 1 for n in range(8)}
            assert policy.Slices(bed.instance).set_many(ids) == {}
            found = policy.read(bed.instance).slices
            assert found == {bed.a.id: A, bed.b.id: B} | ids
            assert inside(Cgroup(many.path / "7"), lambda: marks(ORDINARY[0])) == [8]


def test_a_cgroup_that_is_gone_keeps_its_entry_while_the_policy_names_it(bed):
    with cgroup() as late:
        number = late.id
        assert bed.write(slices={number: 5}) == []
    assert bed.write(slices={number: 5}) == []
    assert policy.Slices(bed.instance).table()[number].level == 0
    assert bed.write() == []
    assert bed.write(slices={number: 5}) == [number]
    assert number not in policy.read(bed.instance).slices
