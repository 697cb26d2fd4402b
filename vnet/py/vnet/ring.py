"""The ring buffer that the eBPF programs write events into, from the reader's side.

Reading and giving back are two steps: an event is given back to the kernel
when it has been kept. The position lies in the ring itself, so readers may
follow each other, one at a time.
"""

import mmap
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vnet.bpfmaps import ffi, lib, pinned
from vnet.errors import BpfError


@dataclass(frozen=True)
class Raw:
    """A struct vnet_event (vnet_bpf.h, which says what each member means)."""

    when: int
    suppressed: int
    xid: int
    owner: int
    pid: int
    mark: int
    kind: int
    observed: int
    family: int
    type: int
    proto: int
    sport: int
    dport: int
    saddr: bytes
    daddr: bytes
    comm: bytes


@dataclass(frozen=True)
class Batch:
    """What was read, and where it ends."""

    events: list[Raw]
    end: int  #: position to release
    unknown: int  #: records of another length: of other programs


def raw(event: Any) -> Raw:
    """A C struct as Python has it."""
    values = {field.name: getattr(event, field.name) for field in fields(Raw)}
    for name in ("saddr", "daddr", "comm"):
        values[name] = bytes(ffi.buffer(values[name]))
    return Raw(**values)


def read(producer: Any, size: int, at: int, room: int, page: int = mmap.PAGESIZE) -> Batch:
    """Read at most ``room`` events from position ``at`` on.

    ``producer`` is a buffer of the kernel's position page and, behind it, the
    data of ``size`` bytes twice in a row.
    """
    out = ffi.new("struct vnet_event[]", room)
    position = ffi.new("unsigned long *", at)
    unknown = ffi.new("unsigned long *")
    memory = ffi.from_buffer("uint8_t[]", producer)
    count = lib.vnet_ring_read(memory, page, size, position, out, room, unknown)
    return Batch([raw(out[n]) for n in range(count)], position[0], unknown[0])


class Ring:
    """A pinned ring buffer, mapped. Raises BpfError if it cannot be."""

    def __init__(self, path: Path) -> None:
        self._map = pinned(path)
        self._size = self._map.max_entries  # of a ring buffer: bytes
        try:
            self._consumer = mmap.mmap(self._map.fd, mmap.PAGESIZE)
            self._producer = mmap.mmap(
                self._map.fd, mmap.PAGESIZE + 2 * self._size, prot=mmap.PROT_READ,
                offset=mmap.PAGESIZE,
            )  # fmt: skip
        except (OSError, ValueError) as problem:
            os.close(self._map.fd)
            raise BpfError(f"mapping the ring buffer {path}: {problem}") from problem

    def fileno(self) -> int:
        """Readable (poll(2)) while an event waits."""
        return self._map.fd

    def read(self, room: int) -> Batch:
        """The oldest events, at most ``room``; they stay until they are released."""
        at = lib.vnet_ring_position(ffi.from_buffer(self._consumer))
        return read(self._producer, self._size, at, room)

    def release(self, batch: Batch) -> None:
        """Give a batch's room back to the kernel."""
        lib.vnet_ring_release(ffi.from_buffer(self._consumer), batch.end)

    def close(self) -> None:
        self._consumer.close()
        self._producer.close()
        os.close(self._map.fd)
