"""What the module, the plugin and Python agree on: one header, read three ways."""

import re
import struct
from pathlib import Path

import pytest
from vnet._abi import ffi, lib

pytestmark = pytest.mark.unit

HEADER = Path(__file__).resolve().parents[2] / "vnet/ext/kernel/xt_copyxid.h"
_TEXT = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)

XT_ALIGN = struct.calcsize("q")
"""linux/netfilter/x_tables.h: what an entry's sizes are rounded up to."""


def _enum(name: str) -> list[str]:
    found = re.search(rf"enum {name} {{(.*?)}};", _TEXT, re.DOTALL)
    assert found, f"{HEADER.name} has no enum {name}"
    words = [part.split("=")[0].strip() for part in found[1].split(",")]
    return [word for word in words if word and not word.startswith("__")]


def test_the_target_structure_is_three_words_in_this_order():
    info = "struct xt_mark_copyxid_tginfo"
    offsets = {name: ffi.offsetof(info, name) for name in ("mark", "mask", "flags")}
    assert offsets == {"mark": 0, "mask": 4, "flags": 8}
    assert ffi.sizeof(info) == 12


def test_an_aligned_entry_of_ours_is_longer_than_one_of_revision_2():
    # iptables-legacy tells rules apart by this length before it looks at the data.
    aligned = -(-ffi.sizeof("struct xt_mark_copyxid_tginfo") // XT_ALIGN) * XT_ALIGN
    assert aligned == 16
    assert aligned > struct.calcsize("II")


def test_the_revision_fits_into_eight_bits_and_lies_above_stock():
    assert lib.XT_MARK_COPYXID_REVISION == 128
    assert 2 < lib.XT_MARK_COPYXID_REVISION < 256


def test_the_halves_of_the_marks_do_not_overlap():
    assert lib.COPYXID_MARK_MASK == lib.COPYXID_XID_MAX == 0xFFFF
    originator = lib.COPYXID_MARK_MASK << lib.COPYXID_ORIG_SHIFT
    responder = lib.COPYXID_MARK_MASK << lib.COPYXID_REPL_SHIFT
    assert originator & responder == 0
    assert originator | responder == 0xFFFFFFFF


def test_each_level_of_the_hierarchy_has_its_bit_in_a_word():
    assert 0 < lib.COPYXID_LEVEL_MAX < 64


def test_the_genetlink_name_fits_into_the_kernels_field():
    name = ffi.string(lib.COPYXID_GENL_NAME).decode()
    assert name == "copyxid"
    assert len(name) < 16, "GENL_NAMSIZ"


@pytest.mark.parametrize(
    ("enum", "first"),
    [
        ("copyxid_cmd", "COPYXID_CMD_UNSPEC"),
        ("copyxid_attr", "COPYXID_A_UNSPEC"),
        ("copyxid_counter", "COPYXID_CNT_OUT_SOCKET"),
    ],
)
def test_python_reads_every_number_as_the_header_counts_them(enum, first):
    names = _enum(enum)
    assert names[0] == first
    for number, name in enumerate(names):
        if not name.endswith("_UNSPEC"):
            assert getattr(lib, name) == number, name


def test_the_flag_of_copy_xid_is_the_only_one():
    assert _enum("xt_mark_copyxid_flags") == ["XT_MARK_COPYXID"]
    assert lib.XT_MARK_COPYXID == 1
