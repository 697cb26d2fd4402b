"""Cgroups of the table of slices: which are there, how deep, and a quick copy for the programs.

The map ``owners`` holds, at one of two places for each cgroup id, whose cgroup
it is; what has no room there is found in the table. ``maps`` is the directory
of an instance's maps, ``generation`` the policy in it (``vnet.policy``).
"""

import errno
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from vnet import cgroups
from vnet.bpfmaps import Map, error, lib, pinned

_U32, _U64 = struct.Struct("=I"), struct.Struct("=Q")
_KERNELS_ROOT = 1  # the root's inode (kernfs_create_root() in fs/kernfs/dir.c)


def fill(maps: Path, generation: int, entries: Mapping[int, int]) -> None:
    """Make the copy of {cgroup id: xid}: of those with the same places, two. Raises BpfError."""
    words = [0] * (1 << lib.VNET_OWNER_BITS)
    for number, xid in entries.items():
        at = place(number)
        at ^= words[at] != 0
        words[at] = words[at] or number << 16 | xid
    with _opened(maps) as owners:
        owners.fill_array(generation << lib.VNET_OWNER_BITS, words)


def add(maps: Path, generation: int, entries: Mapping[int, int]) -> None:
    """As ``fill``, of entries that were added, or changed and cleared before. Raises BpfError."""
    with _opened(maps) as owners:
        for number, xid in entries.items():
            for key in _keys(generation, number):
                if not any(owners.get(key) or b""):
                    owners.set(key, _U64.pack(number << 16 | xid))
                    break


def clear(maps: Path, generation: int, ids: Iterable[int]) -> None:
    """Before these go, or get another xid. Raises BpfError."""
    with _opened(maps) as owners:
        for number in ids:
            for key in _keys(generation, number):
                if _U64.unpack(owners.get(key) or bytes(8))[0] >> 16 == number:
                    owners.set(key, bytes(8))


def read(maps: Path, generation: int) -> list[tuple[int, int]]:
    """The (cgroup id, xid) that are in the copy. Raises BpfError."""
    size = 1 << lib.VNET_OWNER_BITS
    with _opened(maps) as owners:
        words = owners.read_array(generation * size, size)
    return [(word >> 16, word & lib.VNET_XID_MAX) for word in words if word]


def levels(ids: Iterable[int]) -> dict[int, int]:
    """{cgroup id: depth below the root} of those that exist. Raises BpfError."""
    root = os.open(cgroups.v2_root(), os.O_RDONLY | os.O_DIRECTORY)
    try:
        top = lib.vnet_slashes(root)
        found = {}
        for number in ids:
            level = lib.vnet_cgroup_level(root, top, number)
            if 0 < level <= lib.VNET_LEVEL_MAX:
                found[number] = level
            elif level < 0 and level not in (-errno.ESTALE, -errno.ENOENT):
                raise error(f"looking up cgroup {number}", -level)
        return found
    finally:
        os.close(root)


def living(ids: Iterable[int]) -> set[int]:
    """Those of the cgroup ids whose cgroup exists.

    Each is asked for by its handle. A walk would go through what slices' users have made: who may
    make cgroups may make very many, or some a thousand levels deep.
    """
    root = os.open(cgroups.v2_root(), os.O_RDONLY | os.O_DIRECTORY)
    gone = (-errno.ESTALE, -errno.ENOENT)
    try:
        return {number for number in ids if lib.vnet_cgroup_level(root, 0, number) not in gone}
    finally:
        os.close(root)


def table_changes(
    found: Mapping[int, int], wanted: Mapping[int, int], xids: set[int]
) -> tuple[dict[int, int], list[int]]:
    """(entries to set, ids to delete).

    An entry too many whose xid is a slice's and whose cgroup is gone stays:
    sockets outlive their cgroup, and ``vnet watch`` takes it away later.
    """
    to_set = {number: xid for number, xid in wanted.items() if found.get(number) != xid}
    extra = [number for number in found if number not in wanted]
    live = living(extra)
    return to_set, [number for number in extra if number in live or found[number] not in xids]


def bits(depths: Iterable[int]) -> int:
    """The levels at which the programs look for slices, which the kernel counts from its own root.

    Where another cgroup is mounted as the root (a cgroup namespace), nobody can say how deep that
    one is: all of them.
    """
    if cgroups.v2_root().stat().st_ino != _KERNELS_ROOT:
        return int((2 << lib.VNET_LEVEL_MAX) - 2)
    found = 0
    for level in depths:
        found |= 1 << level
    return found


def place(number: int) -> int:
    """The first place of a cgroup id in the map ``owners`` (policy.h: owner_of)."""
    factor: int = lib.VNET_OWNER_FACTOR
    size: int = lib.VNET_OWNER_BITS
    return number * factor % (1 << 64) >> (64 - size)


def _keys(generation: int, number: int) -> tuple[bytes, bytes]:
    at = generation << lib.VNET_OWNER_BITS | place(number)
    return _U32.pack(at), _U32.pack(at ^ 1)


def _opened(maps: Path) -> Map:
    return pinned(maps / "owners")
