"""eBPF maps by file descriptor: libbpf's calls, with bytes in and out."""

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from vnet.errors import BpfError

try:
    from vnet._bpf import ffi, lib
except ImportError as missing:
    raise BpfError(f"libbpf cannot be used: {missing}", "apt-get install libbpf1") from missing

_HEADER = Path(__file__).resolve().parents[2] / "ext/bpf/vnet_bpf.h"
"""Where this is a tree, not what was installed from one."""


def _unlike() -> str:
    """What was not built from the same vnet_bpf.h as vnet._bpf; "" if all was."""
    # One that is older than this comparison says nothing.
    built = ffi.string(lib.VNET_HEADER).decode() if hasattr(lib, "VNET_HEADER") else ""
    objects = Path(__file__).with_name("bpf_objects")
    try:
        if (objects / "header").read_text().strip() != built:
            return f"the eBPF objects in {objects}"
        header = _HEADER.read_bytes()
    except FileNotFoundError as missing:
        return "" if missing.filename == str(_HEADER) else f"the eBPF objects in {objects}"
    return "" if hashlib.sha256(header).hexdigest()[:16] == built else f"{_HEADER} as it is now"


if unlike := _unlike():
    # They would read each other's structures wrongly.
    raise BpfError(
        f"vnet._bpf was built from another vnet_bpf.h than {unlike}",
        "tools/setup in a tree, tools/install on a node: both are built again",
    )

__all__ = ["Map", "error", "ffi", "lib", "pinned", "table"]

Pairs = dict[bytes, bytes]


class Map:
    """An open map. Keys and values are as long as the map's definition says."""

    def __init__(self, fd: int, name: str) -> None:
        if fd < 0:
            raise error(f"opening the eBPF map {name}")
        self.fd, self.name = fd, name
        numbers = ffi.new("uint32_t[5]")
        if code := lib.vnet_map_info(fd, numbers):
            os.close(fd)
            raise error(f"asking about the eBPF map {name}", -code)
        self.key_size, self.value_size, self.max_entries, self.id, self.type = list(numbers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.fd)

    def get(self, key: bytes) -> bytes | None:
        """The value, or None. Not for maps that have one value for each CPU."""
        value = ffi.new("char[]", self.value_size)
        if lib.bpf_map_lookup_elem(self.fd, key, value):
            if ffi.errno == 2:
                return None
            raise error(f"reading the eBPF map {self.name}")
        return bytes(ffi.buffer(value, self.value_size))

    def get_each_cpu(self, key: bytes) -> list[bytes]:
        """The values of all CPUs; none if the key is gone."""
        size, cpus = -(-self.value_size // 8) * 8, lib.libbpf_num_possible_cpus()
        value = ffi.new("char[]", size * cpus)
        if lib.bpf_map_lookup_elem(self.fd, key, value):
            if ffi.errno == 2:
                return []
            raise error(f"reading the eBPF map {self.name}")
        data = bytes(ffi.buffer(value, size * cpus))
        return [data[at : at + self.value_size] for at in range(0, size * cpus, size)]

    def set(self, key: bytes, value: bytes) -> None:
        """Write one entry. Raises BpfError."""
        if code := self.try_set(key, value):
            raise error(f"writing the eBPF map {self.name}", code)

    def try_set(self, key: bytes, value: bytes) -> int:
        """Write one entry. Returns 0 or the errno."""
        return ffi.errno if lib.bpf_map_update_elem(self.fd, key, value, 0) else 0

    def try_delete(self, key: bytes) -> int:
        """Remove one entry. Returns 0 or the errno (ENOENT: it is not there)."""
        return ffi.errno if lib.bpf_map_delete_elem(self.fd, key) else 0

    def fill(self, pairs: Pairs) -> None:
        """Write many entries, in one call where the kernel has it. Raises BpfError."""
        if not pairs:
            return
        count = ffi.new("uint32_t *", len(pairs))
        keys, values = b"".join(pairs), b"".join(pairs.values())
        if lib.bpf_map_update_batch(self.fd, keys, values, count, ffi.NULL):
            for key, value in pairs.items():
                self.set(key, value)

    def fill_array(self, first: int, values: list[int]) -> None:
        """Write entries of an array of u64, ``first`` and those after it. Raises BpfError."""
        n = len(values)
        count, keys = ffi.new("uint32_t *", n), struct.pack(f"={n}I", *range(first, first + n))
        if lib.bpf_map_update_batch(self.fd, keys, struct.pack(f"={n}Q", *values), count, ffi.NULL):
            raise error(f"writing the eBPF map {self.name}")

    def read_array(self, first: int, n: int) -> list[int]:
        """Entries of an array of u64, ``first`` and those after it. Raises BpfError."""
        keys, values = ffi.new("uint32_t[]", n), ffi.new("uint64_t[]", n)
        # The batch begins behind the key that is given (generic_map_lookup_batch()).
        before = ffi.new("uint32_t *", first - 1) if first else ffi.NULL
        token, count = ffi.new("uint32_t *"), ffi.new("uint32_t *", n)
        done = lib.bpf_map_lookup_batch(self.fd, before, token, keys, values, count, ffi.NULL)
        if (done and ffi.errno != 2) or count[0] != n:  # ENOENT: to the end
            raise error(f"reading the eBPF map {self.name}")
        return list(values)

    def pin(self, path: Path) -> None:
        """Give it a name in bpffs, in place of the map that has it. Raises BpfError."""
        new = path.with_name(f"new_{path.name}")
        new.unlink(missing_ok=True)  # of a killed one
        if lib.bpf_obj_pin(self.fd, os.fsencode(new)):
            raise error(f"pinning the eBPF map {path}")
        new.replace(path)

    def keys(self) -> Iterator[bytes]:
        """All keys, one call each; what is added or removed meanwhile may be missed."""
        key, following = ffi.NULL, ffi.new("char[]", self.key_size)
        while not lib.bpf_map_get_next_key(self.fd, key, following):
            found = bytes(ffi.buffer(following, self.key_size))
            yield found
            key = ffi.new("char[]", found)

    def items(self) -> Pairs:
        """All entries of a hash."""
        room = max(self.max_entries, 1)
        keys, values = (ffi.new("char[]", room * n) for n in (self.key_size, self.value_size))
        # The token of a hash is the number of a bucket: four bytes, whatever the keys are.
        token, count = ffi.new("char[]", max(self.key_size, 8)), ffi.new("uint32_t *", room)
        found: Pairs = {}
        last = ffi.NULL
        while True:
            done = lib.bpf_map_lookup_batch(self.fd, last, token, keys, values, count, ffi.NULL)
            if done and ffi.errno != 2:
                return {key: value for key in self.keys() if (value := self.get(key)) is not None}
            k, v = (
                bytes(ffi.buffer(data, count[0] * n))
                for data, n in ((keys, self.key_size), (values, self.value_size))
            )
            found.update(zip(_parts(k, self.key_size), _parts(v, self.value_size), strict=True))
            if done:
                return found
            last, count[0] = token, room


def pinned(path: Path) -> Map:
    """Open a map by its name in bpffs. Raises BpfError."""
    return Map(lib.bpf_obj_get(os.fsencode(path)), str(path))


def table(name: str, key_size: int, value_size: int, max_entries: int) -> Map:
    """A new table to put into a map of maps (policy.h, TABLE)."""
    made = lib.vnet_table_create(name.encode(), key_size, value_size, max_entries)
    return Map(made, name)


def error(what: str, code: int = 0, cure: str = "") -> BpfError:
    """What libbpf or the kernel said to the last call; ``code``: an errno, else C's own."""
    code = code or ffi.errno
    return BpfError(f"{what}: {os.strerror(code)}", cure)


def _parts(data: bytes, size: int) -> Iterable[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))
