"""The slices table and the counters over generic netlink."""

import errno
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from module_bed import XID_A, XID_B, Bed
from testbed import vm
from vnet._abi import lib
from vnet.testing import cgroup, net
from vnet.testing.poll import until

from vnet import copyxid, netlink

pytest_plugins = ["module_fixtures"]
pytestmark = pytest.mark.vm

CREATE, EXCL, REPLACE = 0x400, 0x200, 0x100


class Client:
    """Sends what our own client never would, and says what the kernel answers."""

    def __init__(self, module: copyxid.Module) -> None:
        self.module = module

    def ask(self, command: int, flags: int = 0, **attrs: int) -> int:
        """0, or the errno."""
        body = struct.pack("=BBH", command, lib.COPYXID_GENL_VERSION, 0)
        for name, value in attrs.items():
            kind, form = ATTRIBUTES[name]
            body += netlink.attr(kind, struct.pack(form, value))
        message = netlink.Message(self.module.family, flags, body)
        return self.module.socket.request([message]).get(0, 0)


ATTRIBUTES = {
    "CGROUP_ID": (lib.COPYXID_A_CGROUP_ID, "=Q"),
    "XID": (lib.COPYXID_A_XID, "=I"),
    "UNKNOWN": (lib.COPYXID_A_COUNTERS + 1, "=I"),
    "SHORT": (lib.COPYXID_A_CGROUP_ID, "=I"),
}
SET, DEL = lib.COPYXID_CMD_SLICE_SET, lib.COPYXID_CMD_SLICE_DEL


@pytest.fixture
def client(table: copyxid.Module):
    return Client(table)


@pytest.fixture
def group():
    with cgroup.cgroup() as made:
        yield made


def xids(table: copyxid.Module) -> dict[int, int]:
    return {i: entry.xid for i, entry in table.table().items()}


def test_an_entry_is_added_changed_and_removed(table, group):
    assert table.set_many({group.id: 7}) == {}
    entry = table.table()[group.id]
    assert (entry.xid, entry.level) == (7, len(group.rel.split("/")) - 1)
    assert table.set_many({group.id: 8}) == {}
    assert xids(table) == {group.id: 8}
    assert table.delete_many([group.id]) == {}
    assert table.table() == {}


@pytest.mark.parametrize("xid", [1, 65535])
def test_xids_at_the_limits_are_taken(client, table, group, xid):
    assert client.ask(SET, CGROUP_ID=group.id, XID=xid) == 0
    assert xids(table) == {group.id: xid}


@pytest.mark.parametrize("xid", [0, 65536, 0xFFFFFFFF])
def test_xids_out_of_range_are_refused(client, table, group, xid):
    assert client.ask(SET, CGROUP_ID=group.id, XID=xid) == errno.ERANGE
    assert table.table() == {}


def test_what_is_missing_or_unknown_is_refused(client, table, group):
    assert client.ask(SET, CGROUP_ID=group.id) == errno.EINVAL
    assert client.ask(SET, XID=5) == errno.EINVAL
    assert client.ask(DEL) == errno.EINVAL
    assert client.ask(SET, CGROUP_ID=group.id, XID=5, UNKNOWN=1) == errno.EINVAL
    assert client.ask(SET, SHORT=5, XID=5) == errno.EINVAL
    assert client.ask(DEL, CGROUP_ID=group.id, XID=5) == errno.EINVAL
    assert client.ask(lib.COPYXID_CMD_SLICE_FLUSH, XID=5) == errno.EINVAL
    assert table.table() == {}


def test_a_cgroup_that_does_not_exist_is_refused(client, table):
    with cgroup.cgroup() as gone:
        dead = gone.id
    assert client.ask(SET, CGROUP_ID=dead, XID=5) == errno.ENOENT
    assert client.ask(SET, CGROUP_ID=1 << 60, XID=5) == errno.ENOENT
    assert table.table() == {}


def test_a_file_of_a_cgroup_is_not_a_cgroup(client, table, group):
    procs = (group.path / "cgroup.procs").stat().st_ino
    assert client.ask(SET, CGROUP_ID=procs, XID=5) == errno.ENOENT
    assert table.table() == {}


def test_the_root_cgroup_cannot_be_a_slice(client, table):
    assert client.ask(SET, CGROUP_ID=cgroup.root().stat().st_ino, XID=5) == errno.EINVAL
    assert table.table() == {}


def test_the_flags_of_netlink_mean_what_they_say(client, table, group):
    both = {"CGROUP_ID": group.id, "XID": 5}
    assert client.ask(SET, REPLACE, **both) == errno.ENOENT
    assert client.ask(SET, CREATE | EXCL, **both) == 0
    assert client.ask(SET, CREATE | EXCL, CGROUP_ID=group.id, XID=6) == errno.EEXIST
    assert xids(table) == {group.id: 5}
    assert client.ask(SET, REPLACE, CGROUP_ID=group.id, XID=6) == 0
    assert client.ask(SET, CREATE | REPLACE, CGROUP_ID=group.id, XID=7) == 0
    assert xids(table) == {group.id: 7}


def test_the_entry_of_a_cgroup_that_is_gone_can_be_removed(client, table):
    with cgroup.cgroup() as gone:
        dead = gone.id
        assert client.ask(SET, CGROUP_ID=dead, XID=5) == 0
    assert xids(table) == {dead: 5}
    assert client.ask(DEL, CGROUP_ID=dead) == 0
    assert client.ask(DEL, CGROUP_ID=dead) == errno.ENOENT


def test_flush_empties_the_table(table, group):
    with cgroup.cgroup(parent=group) as below:
        assert table.set_many({group.id: 7, below.id: 8}) == {}
        assert len(table.table()) == 2
        table.flush()
        assert table.table() == {}


_AS_NOBODY = """
import os, sys
sys.path[:0] = sys.argv[1:]
from vnet import copyxid
with copyxid.connect() as module:
    os.setgid(65534); os.setuid(65534)
    for what in (module.table, module.stats, module.flush, lambda: module.set_many({1: 1})):
        try:
            print(what())
        except Exception as error:
            print(error.errno)
"""


def test_without_the_capability_everything_is_refused(table, group):
    table.set_many({group.id: 7})
    done = net.HERE.run(sys.executable, "-c", _AS_NOBODY, *sys.path)
    # set_many() is the one that answers with what was refused
    assert done.stdout.splitlines() == ["1", "1", "1", "{1: 1}"]
    assert xids(table) == {group.id: 7}


def test_the_family_is_in_the_initial_namespace_only(ns):
    done = ns.run(
        sys.executable,
        "-c",
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from vnet import copyxid; print(copyxid.present())",
        *sys.path,
    )
    assert done.stdout.split() == ["False"]


@pytest.fixture(scope="module")
def many():
    """10,000 cgroups below one."""
    with cgroup.cgroup() as parent:
        paths = [parent.path / f"{n}" for n in range(10_000)]
        for path in paths:
            path.mkdir()
        yield [path.stat().st_ino for path in paths]
        for path in paths:
            path.rmdir()


def _memory() -> int:
    """Bytes in slabs and vmalloc, which is where a module's memory comes from."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    facts = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return 1024 * (facts["SUnreclaim"] + facts["VmallocUsed"])


def test_ten_thousand_slices_are_listed_and_fit_two_megabytes(table, many):
    buckets = 8 * (1 << 15)
    before = _memory()
    assert table.set_many(dict.fromkeys(many, XID_A)) == {}
    grown = _memory() - before
    assert set(table.table()) == set(many)
    # KASAN and DEBUG_OBJECTS have their own part in each entry.
    assert vm.DEBUG or grown + buckets < 2_000_000
    table.flush()
    assert table.table() == {}


def test_a_dump_is_whole_although_the_table_changes(table, many):
    """Asked again when it was interrupted: what was there all the time is there once."""
    half = many[:2000]
    table.set_many(dict.fromkeys(half, XID_A))
    code = (
        "import sys, os; sys.path[:0] = sys.argv[2:]\n"
        "from vnet import copyxid\n"
        "ids = [int(i) for i in sys.argv[1].split(',')]\n"
        "with copyxid.connect() as m:\n"
        "    print('going', flush=True)\n"
        "    while True:\n"
        "        m.set_many(dict.fromkeys(ids, 9)); m.delete_many(ids)\n"
    )
    with net.HERE.popen(
        sys.executable, "-c", code, ",".join(map(str, many[5000:5050])), *sys.path,
        stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        try:
            assert other.stdout.readline() == "going\n"
            for _ in range(3):
                assert set(half) <= set(table.table())
        finally:
            other.kill()


def test_counters_are_told_for_every_namespace_and_go_with_it(table):
    def told() -> set[int]:
        return {stats.netns for stats in table.stats()}

    assert Path("/proc/self/ns/net").stat().st_ino in told()
    with net.namespace() as one, net.namespace() as two:
        inums = {Path("/run/netns", ns.name).stat().st_ino for ns in (one, two)}
        assert inums <= told()
    until(lambda: not inums & told(), what="the namespaces' counters gone")


def test_a_fresh_namespace_counts_from_zero(bed: Bed):
    with net.namespace() as fresh:
        assert set(bed.counters(fresh).values()) == {0}


def test_a_slice_may_have_several_cgroups(bed: Bed):
    assert bed.module.set_many({bed.b.id: XID_A}) == {}
    assert xids(bed.module) == {bed.a.id: XID_A, bed.b.id: XID_A}
    assert XID_A != XID_B
