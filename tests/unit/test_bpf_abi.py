"""What the eBPF programs and Python agree on: one header, read three ways."""

import re
import shutil
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest
from vnet._bpf import ffi, lib
from vnet.policy import Port, mapped

from vnet import bpf, bpfobjects, cgroups, events, owners, policy

pytestmark = pytest.mark.unit

HEADER = Path(__file__).resolve().parents[2] / "vnet/ext/bpf/vnet_bpf.h"
_TEXT = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)


def _enum(name: str) -> list[str]:
    found = re.search(rf"enum {name} {{(.*?)}};", _TEXT, re.DOTALL)
    assert found, f"{HEADER.name} has no enum {name}"
    return [word for part in found[1].split(",") if (word := part.split("=")[0].strip())]


def _layout(struct: str) -> list[tuple[str, int, int]]:
    fields = ffi.typeof(f"struct {struct}").fields
    return [(name, f.offset, ffi.sizeof(f.type)) for name, f in fields]


@pytest.mark.parametrize(
    ("struct", "size", "layout"),
    [
        ("vnet_facts", 24, "levels:0 netns_cookie:8 ports:16 addresses:20"),
        ("vnet_port", 20, "proto:0 scope:1 port:2 addr:4"),
        ("vnet_counter_key", 8, "xid:0 kind:4"),
        ("vnet_counter", 48, "refused:0 observed:8 suppressed:16 refilled:24 tokens:32 untold:40"),
        (
            "vnet_event",
            96,
            "when:0 suppressed:8 xid:16 owner:20 pid:24 mark:28 kind:32 observed:33 family:34 "
            "type:35 proto:36 sport:38 dport:40 saddr:42 daddr:58 pad:74 comm:80",
        ),
    ],
)
def test_a_structure_has_this_size_and_these_offsets(struct, size, layout):
    fields = _layout(struct)
    assert " ".join(f"{name}:{offset}" for name, offset, _size in fields) == layout
    # No hole and no tail: the verifier of 6.1 lets no uninitialised byte out.
    ends = [offset + length for _name, offset, length in fields]
    assert ends[:-1] == [offset for _name, offset, _length in fields][1:]
    assert ends[-1] == size == ffi.sizeof(f"struct {struct}")


def test_pythons_own_packing_is_that_of_the_structures():
    for packing, struct in ((policy._PORT, "vnet_port"), (policy._FACTS, "vnet_facts")):
        assert packing.size == ffi.sizeof(f"struct {struct}")
    one = ffi.from_buffer("struct vnet_port *", policy._PORT.pack(6, 2, 65534, bytes(range(16))))
    assert (one.proto, one.scope, one.port, bytes(one.addr)) == (6, 2, 65534, bytes(range(16)))
    facts = ffi.from_buffer("struct vnet_facts *", policy._FACTS.pack(1 << 63, 2, 3, 4))
    assert (facts.levels, facts.netns_cookie, facts.ports, facts.addresses) == (1 << 63, 2, 3, 4)


@pytest.mark.parametrize("enum", ["vnet_raw", "vnet_port_scope", "vnet_kind"])
def test_python_reads_every_number_as_the_header_counts_them(enum):
    for number, name in enumerate(_enum(enum)):
        assert getattr(lib, name) == number, name


def test_every_kind_of_refusal_has_a_name():
    names = [events.kind_name(n) for n in range(1, lib.VNET_KIND_MAX)]
    assert names == [n.removeprefix("VNET_KIND_").lower() for n in _enum("vnet_kind")[1:-1]]


def test_what_python_calls_a_grant_is_what_the_programs_call_it():
    assert {f"VNET_RAW_{name.upper()}": n for name, n in policy.RAW.items()} == {
        name: n for n, name in enumerate(_enum("vnet_raw"))
    }


def test_levels_and_xids_are_those_of_the_module():
    from vnet._abi import lib as module

    assert lib.VNET_LEVEL_MAX == cgroups.LEVEL_MAX == module.COPYXID_LEVEL_MAX
    assert lib.VNET_XID_MASK == module.COPYXID_MARK_MASK
    assert lib.VNET_XID_MAX == module.COPYXID_XID_MAX


def test_the_objects_hold_the_programs_that_rules_and_filters_name():
    objects = bpfobjects.names(lsm=True)
    found = {each.name for name in objects for each in bpfobjects.programs(name)}
    assert found >= {
        *("vnet_sock_create", "vnet_setsockopt", "vnet_bind4", "vnet_bind6", "vnet_ingress"),
        *("vnet_odd", "vnet_gate", "vnet_local", "vnet_spoof", "vnet_raw", "vnet_join"),
        *("vnet_unsettled", "vnet_incoming", "vnet_may_fill"),
        *("vnet_from_veth", "vnet_to_veth"),
        *("vnet_lsm_socket_create", "vnet_lsm_socket_bind"),
    }
    # bpf_prog_info.name holds 15 letters, bpffs any: pins are named in full.
    assert all(len(name) < 64 for name in found)


def test_an_object_can_be_read_by_a_kernel_that_was_not_there_when_it_was_built():
    for path in bpfobjects.OBJECTS.glob("*.bpf.o"):
        sections = subprocess.run(
            ["llvm-readelf", "-S", path], capture_output=True, text=True, check=True
        ).stdout
        assert ".BTF.ext" in sections, path  # CO-RE's relocations
        assert ".debug_" not in sections, path
        assert path.stat().st_size < 400_000, path


# -- ports ----------------------------------------------------------------

ANY, ADDR, WILD = lib.VNET_PORT_ANY, lib.VNET_PORT_ADDR, lib.VNET_PORT_WILD
ONE, TWO = ip_address("192.0.2.1"), ip_address("2001:db8::2")


def _packed(*ports: tuple[Port, int]) -> dict[tuple[int, bytes], int]:
    return {
        (policy._PORT.unpack(key)[1], policy._PORT.unpack(key)[3]): int.from_bytes(value, "little")
        for key, value in policy._ports(ports).items()
    }


def test_an_ipv4_address_is_its_mapped_ipv6_address():
    assert mapped(ONE) == ip_address("::ffff:192.0.2.1").packed
    assert mapped(TWO) == TWO.packed
    assert mapped(None) == bytes(16)
    assert policy._address_back(mapped(ONE)) == ONE
    assert policy._address_back(mapped(TWO)) == TWO


def test_a_port_on_every_address_is_one_entry():
    assert _packed((Port(6, 80), 7)) == {(ANY, bytes(16)): 7}


def test_a_port_on_one_address_says_who_may_bind_to_all_of_them():
    assert _packed((Port(6, 80, ONE), 7)) == {(ADDR, mapped(ONE)): 7, (WILD, bytes(16)): 7}
    assert _packed((Port(6, 80, ONE), 7), (Port(6, 80, TWO), 7))[WILD, bytes(16)] == 7


def test_a_port_that_slices_share_by_address_nobody_may_bind_to_all_of_them():
    assert _packed((Port(6, 80, ONE), 7), (Port(6, 80, TWO), 8))[WILD, bytes(16)] == 0
    # not even who has the rest of it
    assert _packed((Port(6, 80, ONE), 7), (Port(6, 80), 8))[WILD, bytes(16)] == 0


@pytest.mark.parametrize("apart", [1, 6, 12, 19, 24, 36, 53, 77, 100])
def test_cgroups_made_one_after_the_other_have_a_place_each_among_the_owners(apart):
    ids = range(5_000, 5_000 + 10_000 * apart, apart)
    assert len({owners.place(number) for number in ids}) == 10_000


@pytest.fixture
def tree(tmp_path):
    """A copy of the package in a tree of its own, built as it is here."""
    shutil.copytree(Path(bpf.__file__).parent, tmp_path / "vnet/py/vnet")
    shutil.copytree(HEADER.parent, tmp_path / "vnet/ext/bpf")
    return tmp_path / "vnet"


def refused(tree):
    words = [sys.executable, "-m", "vnet.cli", "status"]
    env = {
        "PYTHONPATH": str(tree / "py"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "VNET_STATE_DIR": "/none",
    }
    done = subprocess.run(words, env=env, cwd=tree, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_what_was_built_of_another_header_is_refused_with_a_cure(tree):
    assert "vnet_bpf.h" not in refused(tree)[1]
    built = tree / "py/vnet/bpf_objects/header"
    with (tree / "ext/bpf/vnet_bpf.h").open("a") as header:
        header.write("/* one more line */\n")
    code, said = refused(tree)
    assert code == 1
    assert "vnet._bpf was built from another vnet_bpf.h than" in said
    assert "vnet_bpf.h as it is now" in said
    assert "try: tools/setup" in said
    # The objects are built again, Python's part is not.
    subprocess.run(["make", "-s", "-C", tree / "ext/bpf"], check=True, capture_output=True)
    assert "the eBPF objects in" in refused(tree)[1]
    built.unlink()  # as of before there was this comparison
    assert "the eBPF objects in" in refused(tree)[1]
    # Installed, there is no header to compare with.
    shutil.copy(Path(bpf.__file__).with_name("bpf_objects") / "header", built)
    shutil.rmtree(tree / "ext")
    assert "vnet_bpf.h" not in refused(tree)[1]
