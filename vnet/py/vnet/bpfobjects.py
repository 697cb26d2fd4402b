"""The eBPF objects that were built: which there are, what is in them, and into the kernel."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vnet.bpfmaps import error, ffi, lib, pinned
from vnet.errors import BpfError

OBJECTS = Path(__file__).with_name("bpf_objects")
SUFFIX = ".bpf.o"

BASE = "base"  #: the object of the programs that every data path's guard needs
LSM = "lsm"  #: the object of those that need BPF LSM

_LOG_LINES = 12

_CGROUP_KINDS = (
    lib.BPF_PROG_TYPE_CGROUP_SKB,
    lib.BPF_PROG_TYPE_CGROUP_SOCK,
    lib.BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
    lib.BPF_PROG_TYPE_CGROUP_SOCKOPT,
)

lib.vnet_listen()


@dataclass(frozen=True)
class Program:
    """A program of an object."""

    name: str
    kind: int  #: enum bpf_prog_type
    attach: int  #: enum bpf_attach_type

    @property
    def attached(self) -> bool:
        """Whether it is attached by a link, rather than named by a rule or filter."""
        return self.kind in _CGROUP_KINDS or self.kind == lib.BPF_PROG_TYPE_LSM


def files() -> list[Path]:
    """The objects' files."""
    return sorted(OBJECTS.glob("*" + SUFFIX))


def names(lsm: bool) -> list[str]:
    """The objects to load; base comes first, because the others use its maps. Raises BpfError."""
    found = [path.name.removesuffix(SUFFIX) for path in files()]
    if BASE not in found:
        raise BpfError(f"{OBJECTS}: the eBPF objects are not there", "build the package anew")
    found.remove(BASE)
    return [BASE, *(name for name in found if lsm or name != LSM)]


def programs(name: str) -> list[Program]:
    """The programs of an object. Raises BpfError."""
    with _opened(name) as handle:
        return [each for each, _raw in programs_of(handle)]


@contextmanager
def loaded(name: str, maps: dict[str, Path]) -> Iterator[Any]:
    """An object in the kernel, for a while; ``maps``: pinned ones to use instead of its own.

    Raises BpfError, with the end of the verifier's verdict where that refuses a program.
    """
    with _opened(name) as handle:
        for each, raw in maps_of(handle):
            if each in maps:
                with pinned(maps[each]) as there:
                    if lib.bpf_map__reuse_fd(raw, there.fd):
                        raise error(f"using {maps[each]} for {name}")
        if code := lib.bpf_object__load(handle):
            raise _load_error(name, -code)
        yield handle


def programs_of(handle: Any) -> Iterator[tuple[Program, Any]]:
    """The programs of a loaded object, and libbpf's handles of them."""
    raw = lib.bpf_object__next_program(handle, ffi.NULL)
    while raw != ffi.NULL:
        name = ffi.string(lib.bpf_program__name(raw)).decode()
        yield (
            Program(name, lib.bpf_program__type(raw), lib.bpf_program__expected_attach_type(raw)),
            raw,
        )
        raw = lib.bpf_object__next_program(handle, raw)


def maps_of(handle: Any) -> Iterator[tuple[str, Any]]:
    """The maps of a loaded object, and libbpf's handles of them."""
    raw = lib.bpf_object__next_map(handle, ffi.NULL)
    while raw != ffi.NULL:
        if not lib.bpf_map__is_internal(raw):
            yield ffi.string(lib.bpf_map__name(raw)).decode(), raw
        raw = lib.bpf_object__next_map(handle, raw)


@contextmanager
def _opened(name: str) -> Iterator[Any]:
    path = OBJECTS / (name + SUFFIX)
    lib.vnet_forget()
    handle = lib.bpf_object__open_file(os.fsencode(path), ffi.NULL)
    if handle == ffi.NULL:
        raise error(f"opening {path}")
    try:
        yield handle
    finally:
        lib.bpf_object__close(handle)


def _load_error(name: str, code: int) -> BpfError:
    said = ffi.string(lib.vnet_heard()).decode(errors="replace").splitlines()
    said = [f"  {line.strip()}" for line in said if line.strip()][-_LOG_LINES:]
    what = f"loading the eBPF programs of {name}: {os.strerror(code)}"
    cure = "needs root, and a kernel that lets root use BPF (lockdown=none)"
    if code != errno.EPERM:
        cure = "needs Linux 6.1 or newer"
    return BpfError("\n".join([what, *said]), cure)
