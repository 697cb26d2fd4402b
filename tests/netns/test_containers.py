"""Containers without a module, on the host's own kernel."""

import json
import os
import socket
import struct
import subprocess
import sys
from unittest import mock

import bpfbed
import pytest
from container_cases import *  # noqa: F403
from containerbed import LAYOUTS, A, B, Bed, S, Who, talk
from containerbed import bed as containers_bed
from vnet.bpfmaps import pinned
from vnet.testing.poll import until
from vnetbed import PY

from vnet import bpf, cgroups, containers, watch

pytestmark = pytest.mark.netns


@pytest.fixture(scope="module", params=LAYOUTS)
def bed(request, tmp_path_factory):
    with containers_bed(tmp_path_factory.mktemp("containers"), "bpf", request.param) as made:
        yield made


@pytest.fixture(params=[4, 6])
def family(request):
    return request.param


# -- putting the programs on interfaces, and taking them off -------------------


@pytest.fixture
def own(tmp_path):
    """A bed of its own, for those who break things."""
    with containers_bed(tmp_path, "bpf", "routed") as made:
        yield made


def filters(bed, dev, side="ingress"):
    return bed.node.run("tc", "filter", "show", "dev", dev, side).stdout


def clsact(bed, dev):
    return "clsact" in bed.node.run("tc", "qdisc", "show", "dev", dev).stdout


def test_apply_twice_does_nothing_and_nothing_wanted_takes_all_away(own: Bed):
    assert own.apply() == []
    assert own.healthy() == []
    assert len(own.apply({})) == 2
    for dev in own.wanted:
        assert filters(own, dev) == filters(own, dev, "egress") == ""
        assert not clsact(own, dev)
    assert own.healthy({}) == []
    assert len(own.healthy()) == 6  # not known, and each side's filter


def test_filters_and_qdiscs_of_others_stay(own: Bed):
    dev = own.link_a.a_if
    own.apply({})
    own.node.run("tc", "qdisc", "add", "dev", dev, "clsact")
    own.apply()
    their = ("bpf", "bytecode", "1,6 0 0 0")
    for side in ("ingress", "egress"):
        own.node.run("tc", "filter", "add", "dev", dev, side, "prio", "20", *their)
    own.apply({})
    assert clsact(own, dev)
    for side in ("ingress", "egress"):
        assert "pref 20 bpf" in filters(own, dev, side)
        assert "vnet" not in filters(own, dev, side)
    # A qdisc of ours that somebody has come to use stays, too.
    other = own.link_b.a_if
    own.apply({other: B})
    own.node.run("tc", "filter", "add", "dev", other, "egress", "prio", "20", *their)
    own.apply({})
    assert "pref 20 bpf" in filters(own, other, "egress")


def test_where_somebody_has_a_qdisc_for_one_way_only_it_says_so_and_marks_the_others(own: Bed):
    """Both of our filters would go there, and the second take the place of the first."""
    dev = own.link_a.a_if
    own.up.vnet("down")
    own.node.run("tc", "qdisc", "add", "dev", dev, "ingress")
    done = own.up.vnet("up", check=False)
    assert done.returncode == 1
    assert f"interface {dev}: somebody's qdisc ingress is where clsact has to be" in done.stderr
    own.node.run("tc", "qdisc", "del", "dev", dev, "ingress")
    own.up.vnet("up")
    assert own.healthy() == []


def test_somebody_else_s_filter_in_our_place_is_an_error_that_says_so(own: Bed):
    dev = own.link_a.a_if
    own.apply({})
    own.node.run("tc", "qdisc", "add", "dev", dev, "clsact")
    their = ("protocol", "ip", "prio", "7", "bpf", "bytecode", "1,6 0 0 0")
    own.node.run("tc", "filter", "add", "dev", dev, "ingress", *their)
    with pytest.raises(AssertionError, match=rf"interface {dev}: tc filter of priority 7"):
        own.apply()


def test_what_somebody_took_away_is_missed_and_put_back(own: Bed):
    dev = own.link_a.a_if
    own.node.run("tc", "filter", "del", "dev", dev, "egress")
    assert own.healthy() == [f"interface {dev}: the tc filter vnet_to_veth is missing"]
    assert own.apply() == [f"marked interface {dev} as xid {A}"]
    assert own.healthy() == []
    own.apply({})
    assert not clsact(own, dev)


def test_an_interface_that_changes_hands_is_marked_as_its_new_slice_s(own: Bed):
    assert own.apply({own.link_a.a_if: S, own.link_b.a_if: B}) == [
        f"marked interface {own.link_a.a_if} as xid {S}"
    ]
    talk(own, Who(own.a), Who(own.out), own.address("out", 4))
    assert own.halves("udp", 4) == [(S, 0)]


def test_an_interface_that_is_not_there_yet_is_marked_once_it_comes(own: Bed):
    heard = bpfbed.inside(None, lambda: _hears(own, "late"), own.node)
    assert heard == [True, []]


def _hears(bed: Bed, name: str):
    wanted = {**bed.wanted, name: S}
    with containers.listen() as sock:
        assert containers.apply(bed.instance, wanted) == []
        assert containers.missing(wanted) == [name]
        subprocess.run(["ip", "link", "add", name, "type", "veth", "peer", "name", "x"], check=True)
        until(lambda: name in (containers.changed(sock) or ()))
        done = containers.apply(bed.instance, wanted)
        wrong = containers.healthy(bed.instance, wanted)
        subprocess.run(["ip", "link", "del", name], check=True)
    return [done == [f"marked interface {name} as xid {S}"], wrong]


def test_the_next_interface_with_the_number_of_one_that_went_is_nobody_s(own: Bed):
    """The kernel takes its filters along; and the entry goes with the next ``apply``."""
    dev = own.link_a.a_if
    index = json.loads(own.node.run("ip", "-j", "link", "show", dev).stdout)[0]["ifindex"]
    own.node.run("ip", "link", "del", dev)
    own.node.run(
        *("ip", "link", "add", "stranger", "index", str(index)),
        *("type", "veth", "peer", "name", "x", "netns", own.a.name),
    )
    assert filters(own, "stranger") == ""
    assert own.healthy({}) != []
    own.apply()
    with pinned(own.instance / "maps" / "interfaces") as table:
        assert index.to_bytes(4, "little") not in table.items()
    assert not clsact(own, "stranger")


def test_status_knows_containers_and_down_leaves_nothing_on_their_interfaces(own: Bed):
    assert own.up.json("status")["whole"]
    own.node.run("tc", "filter", "del", "dev", own.link_a.a_if, "egress")
    status = own.up.json("status", check=False)
    assert [line for line in status["differences"] if own.link_a.a_if in line]
    own.up.vnet("up")
    assert own.up.json("status")["whole"]
    own.up.vnet("down")
    for dev in own.wanted:
        assert not clsact(own, dev)
    assert "VNET" not in own.node.run("iptables-save").stdout


def test_a_slice_gets_interfaces_while_the_node_is_up_and_watch_marks_them_as_they_come(own: Bed):
    cgroup = f"{own.s.rel}/new"
    own.up.vnet("slice", "add", "new", "--cgroup", cgroup, "--interface", "late", "--xid", "99")
    with own.up.ns.popen(
        *(sys.executable, "-m", "vnet.cli", "watch"),
        env={**own.up.env, "PYTHONPATH": os.pathsep.join([str(PY), *sys.path])},
    ) as watch:
        try:
            wanted = {**own.wanted, "late": 99}
            own.node.run(
                *("ip", "link", "add", "late", "type", "veth", "peer", "name", "eth9"),
                *("netns", own.b.name),
            )
            until(lambda: own.healthy(wanted) == [], what="late is marked")
        finally:
            watch.terminate()


def test_filters_of_an_instance_that_is_gone_give_way_to_those_of_the_next(own: Bed):
    where = own.instance.parent
    bpf.remove(own.instance)
    assert bpf.load(where, lsm=False) == own.instance
    assert len(own.healthy()) == 6
    assert len(own.apply()) == 2
    assert own.healthy() == []


def another_version(own: Bed) -> None:
    """Have been brought up by it."""
    other = own.instance.rename(own.instance.with_name("0123456789ab"))
    state = own.up.paths.state
    state.write_text(state.read_text().replace(str(own.instance), str(other)))


def test_down_by_another_version_leaves_neither_filters_nor_marks(own: Bed):
    another_version(own)
    with Who(own.node, own.s).socket(4, socket.SOCK_DGRAM) as older:
        assert older.getsockopt(socket.SOL_SOCKET, bpfbed.SO_MARK) == S
        own.up.vnet("down")
        assert older.getsockopt(socket.SOL_SOCKET, bpfbed.SO_MARK) == 0
    for dev in own.wanted:
        assert not clsact(own, dev)
    assert bpf.instances(own.up.bpf_dir) == []
    assert "VNET" not in own.node.run("iptables-save").stdout


def test_filters_of_a_version_whose_map_we_cannot_read_are_found_all_the_same(own: Bed):
    dev = own.link_a.a_if
    their = ("protocol", "all", "prio", "20", "bpf", "bytecode", "1,6 0 0 0")
    own.node.run("tc", "filter", "add", "dev", dev, "ingress", *their)
    with mock.patch("vnet.containers._ENTRY", struct.Struct("=II6s2xQ")):
        done = bpfbed.inside(None, lambda: containers.remove(own.instance), own.node)
    assert sorted(done) == sorted(f"took the filters off {dev}" for dev in own.wanted)
    for each in own.wanted:
        assert "vnet" not in filters(own, each) + filters(own, each, "egress")
    assert "pref 20 bpf" in filters(own, dev)


def test_another_version_leaves_no_filter_where_it_wants_none(own: Bed):
    another_version(own)
    files = own.up.paths.config_dir / "slices.toml"
    files.write_text(files.read_text().replace(f'"{own.link_b.a_if}"', ""))
    own.up.vnet("up")
    assert own.healthy({own.link_a.a_if: A}) == []
    assert not clsact(own, own.link_b.a_if)


def test_watch_goes_by_the_files_of_the_moment_in_which_it_marks(own: Bed):
    """It may have read them before a slice came, and waited for whoever added that."""
    stale = watch.Watched(cgroups.v2_root(), own.up.paths, 60.0, own.instance, own.kind)
    assert stale.interfaces == {}
    bpfbed.inside(None, lambda: watch._mark_interfaces(stale), own.node)
    assert own.healthy() == []
