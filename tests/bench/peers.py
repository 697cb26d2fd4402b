"""The peer that is a program, and whole nodes, for the guest's and the host's measurements."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SKB_OBJECT = ROOT / "build/bench/skbmark.bpf.o"  #: tools/bench builds it

#: what gives sockets their marks; neither runs for a packet
MARKS = ("vnet_sock_create", "vnet_setsockopt")


@contextmanager
def cgroup_skb(top: Path, owners: Mapping[int, int]) -> Iterator[None]:
    """Mark the packets of cgroups (by id) at the hooks of ``top`` while it lasts.

    Raises RuntimeError where the kernel refuses a part.
    """
    from vnet._bpf import ffi, lib

    def must(value: int, what: str) -> int:
        if value < 0:
            raise RuntimeError(f"{SKB_OBJECT}: {what}: {os.strerror(ffi.errno)}")
        return value

    opened = lib.bpf_object__open_file(os.fsencode(SKB_OBJECT), ffi.NULL)
    if opened == ffi.NULL:
        raise RuntimeError(f"{SKB_OBJECT}: cannot be opened")
    root = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    links = []
    try:
        must(lib.bpf_object__load(opened), "load")
        slices = lib.bpf_map__fd(lib.bpf_object__next_map(opened, ffi.NULL))
        for cgroup, xid in owners.items():
            key, value = ffi.new("uint64_t *", cgroup), ffi.new("uint32_t *", xid)
            must(lib.bpf_map_update_elem(slices, key, value, 0), "map")
        program = lib.bpf_object__next_program(opened, ffi.NULL)
        while program != ffi.NULL:
            how = lib.bpf_program__expected_attach_type(program)
            fd = lib.bpf_program__fd(program)
            links.append(must(lib.bpf_link_create(fd, root, how, ffi.NULL), "attach"))
            program = lib.bpf_object__next_program(opened, program)
        yield
    finally:
        for fd in (*links, root):
            os.close(fd)
        lib.bpf_object__close(opened)


def configuration(top: str, n: int, ports_from: int = 20_000) -> str:
    """Slices' TOML: ``n`` of them, ``/TOP/s1`` and on, each with a reserved port."""
    lines = []
    for i in range(1, n + 1):
        lines += ["[[slice]]", f'name = "s{i}"', f"xid = {i}", f'cgroups = ["{top}/s{i}"]']
        lines += ["[slice.grants]", f'ports = ["udp/{ports_from + i}"]']
    return "\n".join(lines) + "\n"


def detach(instance: Path, keep: tuple[str, ...]) -> None:
    """Take down all links of an instance but these."""
    from vnet.bpfmaps import lib

    for path in (instance / "links").iterdir():
        if path.name not in keep:
            fd = lib.bpf_obj_get(os.fsencode(path))
            lib.bpf_link_detach(fd)
            os.close(fd)
            path.unlink()
