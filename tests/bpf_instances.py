"""An instance of the programs: whole or not there. For the host's tests and the guests'."""

import itertools
import os
import socket
import sys
from socket import AF_INET, SOCK_RAW, SOCK_STREAM, SOL_SOCKET
from unittest import mock

import bpfbed
import pytest
from bpfbed import SO_MARK, A, B, inside, mark, marks
from vnet._bpf import lib
from vnet.errors import BpfError
from vnet.policy import Policy
from vnet.testing.cgroup import cgroup
from vnet.testing.poll import until

from vnet import bpf, bpfobjects, policy

KINDS = [(AF_INET, SOCK_STREAM), (AF_INET, SOCK_RAW, 1)]


@pytest.fixture
def own_bed(tmp_path):
    with bpfbed.loaded(tmp_path) as made:
        yield made


@pytest.fixture
def bpf_dir(tmp_path):
    with bpfbed.bpffs(tmp_path) as made:
        yield made


def test_an_instance_outlives_who_made_it(bpf_dir):
    code = "import sys, pathlib, vnet.bpf; print(vnet.bpf.load(pathlib.Path(sys.argv[1]), False))"
    done = bpfbed.HERE.run(sys.executable, "-c", code, bpf_dir)
    [instance] = bpf.instances(bpf_dir)
    assert done.stdout.strip() == str(instance)
    assert instance.name == bpf.version()
    assert bpf.healthy(instance) == []
    with cgroup() as a:
        policy.write(instance, Policy(slices={a.id: A}))
        assert inside(a, lambda: marks(*KINDS)) == [A, "EACCES"]


def test_loading_again_keeps_instance_and_policy(own_bed):
    assert bpf.load(own_bed.instance.parent, False) == own_bed.instance
    assert inside(own_bed.a, lambda: marks(KINDS[0])) == [A]
    assert policy.read(own_bed.instance).slices == {own_bed.a.id: A, own_bed.b.id: B}


def test_removing_leaves_nothing(own_bed):
    bpf.remove(own_bed.instance)
    assert not own_bed.instance.parent.exists()
    assert bpf.instances(own_bed.instance.parent) == []
    assert bpf.healthy(own_bed.instance) == [f"{own_bed.instance}: not there"]
    assert inside(own_bed.a, lambda: marks(*KINDS)) == [0, 0]
    with pytest.raises(BpfError, match="opening the eBPF map"):
        policy.read(own_bed.instance)


def test_what_is_wrong_with_an_instance_is_told_and_mended(own_bed):
    link = own_bed.instance / "links" / "vnet_sock_create"
    fd = lib.bpf_obj_get(os.fsencode(link))
    assert lib.bpf_link_detach(fd) == 0
    os.close(fd)
    (own_bed.instance / "links" / "vnet_setsockopt").unlink()
    assert bpf.healthy(own_bed.instance) == [
        f"{own_bed.instance}: link vnet_sock_create is detached",
        f"{own_bed.instance}: link vnet_setsockopt is gone",
    ]
    assert inside(own_bed.a, lambda: marks(KINDS[0])) == [0]
    assert bpf.load(own_bed.instance.parent, False) == own_bed.instance
    assert bpf.healthy(own_bed.instance) == []
    assert inside(own_bed.a, lambda: marks(KINDS[0])) == [A]


def forge():
    with socket.socket(AF_INET, SOCK_STREAM) as sock:
        sock.setsockopt(SOL_SOCKET, SO_MARK, 0x50000 | B)
        return mark(sock)


def test_two_versions_side_by_side_both_hold(own_bed, tmp_path):
    with mock.patch("vnet.bpf.version", return_value="0123456789ab"):
        newer = bpf.load(own_bed.instance.parent, False)
    # The newer one knows no slice yet, and leaves the older one's alone.
    assert inside(own_bed.a, forge) == 0x50000 | A
    policy.write(newer, policy.read(own_bed.instance))
    assert inside(own_bed.a, forge) == 0x50000 | A
    assert bpf.instances(own_bed.instance.parent) == sorted([newer, own_bed.instance])
    bpf.remove(own_bed.instance)
    assert inside(own_bed.a, lambda: marks(*KINDS)) == [A, "EACCES"]


def test_a_load_that_fails_leaves_nothing(bpf_dir, tmp_path):
    objects = tmp_path / "objects"
    objects.mkdir()
    (objects / "base.bpf.o").write_bytes((bpfobjects.OBJECTS / "base.bpf.o").read_bytes())
    (objects / "other.bpf.o").write_bytes(b"no object")
    with (
        mock.patch("vnet.bpfobjects.OBJECTS", objects),
        pytest.raises(BpfError, match=r"other\.bpf\.o"),
    ):
        bpf.load(bpf_dir, False)
    assert not bpf_dir.exists()


def test_an_attachment_that_fails_leaves_nothing(bpf_dir):
    links = itertools.count()

    def failing(*arguments):
        if next(links) == 2:
            raise BpfError("refused by the test")
        return link(*arguments)

    link = bpf._link
    with mock.patch("vnet.bpf._link", failing), pytest.raises(BpfError, match="by the test"):
        bpf.load(bpf_dir, False)
    assert not bpf_dir.exists()


@pytest.mark.parametrize("step", ["_attach", "_pin", "_unpin"])
def test_a_loader_that_was_killed_leaves_what_the_next_one_removes(bpf_dir, step):
    def dies(*_arguments):
        os._exit(0)

    def work():
        instance = bpf.load(bpf_dir, False) if step == "_unpin" else None
        with mock.patch(f"vnet.bpf.{step}", dies):
            bpf.remove(instance) if instance else bpf.load(bpf_dir, False)

    pid = os.fork()
    if not pid:
        work()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert bpf.instances(bpf_dir) == []
    assert [path.name[:4] for path in bpf_dir.iterdir()] == ["old-" if step == "_unpin" else "new-"]
    instance = bpf.load(bpf_dir, False)
    assert list(bpf_dir.iterdir()) == [instance]


def test_a_place_that_is_no_bpffs_is_refused_before_anything_is_done(tmp_path):
    with pytest.raises(BpfError, match="is not on a bpffs"):
        bpf.load(tmp_path / "vnet", False)
    assert list(tmp_path.iterdir()) == []


def test_a_bpffs_that_is_mounted_for_it_is_roots_alone(tmp_path):
    assert bpf.mount(tmp_path / "vnet", tmp_path)
    try:
        assert bpf.is_bpffs(tmp_path / "vnet")
        assert tmp_path.stat().st_mode & 0o777 == 0o700
        assert not bpf.mount(tmp_path / "vnet", tmp_path)
    finally:
        bpfbed.HERE.run("umount", tmp_path)


def test_this_kernel_has_all_that_the_base_needs():
    assert bpf.lacking() == []


def test_a_program_that_the_kernel_refuses_is_named_with_its_verdict(bpf_dir, tmp_path):
    source = tmp_path / "bad.c"
    source.write_text(
        '__attribute__((section("socket"), used)) int bad(void *c) { return *(volatile int *)0; }\n'
    )
    made = ["-O2", "-g", "-target", "bpf", "-c", source, "-o", tmp_path / "base.bpf.o"]
    bpfbed.HERE.run("clang", *made)
    with mock.patch("vnet.bpfobjects.OBJECTS", tmp_path), pytest.raises(BpfError) as refused:
        bpf.load(bpf_dir, False)
    assert "loading the eBPF programs of base: Permission denied" in refused.value.message
    assert "invalid mem access" in refused.value.message
    assert not bpf_dir.exists()
    with mock.patch("vnet.bpfobjects.OBJECTS", tmp_path):
        assert bpf.lacking() == [refused.value.message]


def test_the_lsm_programs_come_and_go_with_their_instance_or_nothing_comes(bpf_dir):
    def packet():
        return marks((socket.AF_PACKET, SOCK_RAW, 0))

    if bpf.lsm_lacking():
        with pytest.raises(BpfError):
            bpf.load(bpf_dir, True)
        assert not bpf_dir.exists()
        return
    instance = bpf.load(bpf_dir, False)
    with cgroup() as a:
        policy.write(instance, Policy(slices={a.id: A}))
        assert inside(a, packet) == [0]
        assert bpf.healthy(instance) == []
        assert bpf.healthy(instance, lsm=True) != []
        assert bpf.load(bpf_dir, True) == instance
        assert bpf.healthy(instance) == bpf.healthy(instance, lsm=True) == []
        assert inside(a, packet) == ["EACCES"]
        assert bpf.load(bpf_dir, False) == instance
        assert bpf.healthy(instance, lsm=True) != []
        until(lambda: inside(a, packet) == [0], what="the LSM program is gone")
