"""Conntrack messages in columns, and the table of live connections: netflow/ext for Python.

A thin shell over the C of ``netflow/ext`` (its meanings are in ``ext/ct.h``).
Columns are numpy views of C memory, valid as long as their batch lives and
until it is filled anew. Numpy is imported here: keep this module off any
command's start-up path. Calls release the GIL; one batch or table belongs to
one thread at a time.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from mmap import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netflow._ct import ffi, lib

# collections.abc.Buffer is 3.12's
Buffer = bytes | bytearray | memoryview | mmap

__all__ = [
    "Batch",
    "Decoded",
    "FlowBatch",
    "Has",
    "Msg",
    "Reason",
    "Table",
    "decode",
    "get_request",
    "receive",
    "receive_events",
]


class Msg(IntEnum):
    """What a row of a Batch is: column ``msg``."""

    NEW = lib.CT_NEW
    UPDATE = lib.CT_UPDATE
    DESTROY = lib.CT_DESTROY
    DUMP = lib.CT_DUMP


class Has(IntFlag):
    """What the kernel gave in a row of a Batch: column ``has``."""

    COUNTERS = lib.CT_HAS_COUNTERS
    MARK = lib.CT_HAS_MARK
    START = lib.CT_HAS_START
    STOP = lib.CT_HAS_STOP
    REPLY = lib.CT_HAS_REPLY


class Reason(IntEnum):
    """Why a flow record was closed: column ``reason`` of a FlowBatch."""

    IDLE = lib.FLOW_IDLE
    CLOSED = lib.FLOW_CLOSED
    ACTIVE = lib.FLOW_ACTIVE
    OWNER = lib.FLOW_OWNER
    LOST = lib.FLOW_LOST
    CUT = lib.FLOW_CUT


@dataclass(frozen=True, slots=True)
class Decoded:
    """What one call of decode() or receive() met; see struct ct_decoded."""

    used: int
    skipped: int
    malformed: int
    done: bool
    interrupted: bool
    error: int
    error_seq: int
    overrun: bool
    datagrams: int = 0


def _decoded(d: Any, datagrams: int = 0) -> Decoded:
    return Decoded(
        d.used,
        d.skipped,
        d.malformed,
        bool(d.done),
        bool(d.interrupted),
        d.error,
        d.error_seq,
        bool(d.overrun),
        datagrams,
    )


class _Columns:
    """A batch of either kind: rows 0..len-1 of named columns."""

    _ctype: str
    c: Any  # the cffi pointer, for calling the library directly

    def __init__(self, c: Any) -> None:
        if c == ffi.NULL:
            raise MemoryError(f"no memory for a {self._ctype}")
        self.c = c
        self._arrays: dict[str, NDArray[Any]] = {}
        for name, field in ffi.typeof(self._ctype).fields:
            if field.type.kind == "pointer":
                size = ffi.sizeof(field.type.item)
                memory = ffi.buffer(getattr(c, name), c.capacity * size)
                self._arrays[name] = np.frombuffer(memory, dtype=f"u{size}")

    def __len__(self) -> int:
        return int(self.c.count)

    def __getitem__(self, column: str) -> NDArray[Any]:
        """A column's rows in use: a view, no copy. KeyError if there is none such."""
        return self._arrays[column][: self.c.count]

    @property
    def capacity(self) -> int:
        return int(self.c.capacity)

    @property
    def names(self) -> Sequence[str]:
        """Every column's name, in the order of ext/ct.h."""
        return tuple(self._arrays)

    def columns(self) -> dict[str, NDArray[Any]]:
        """All columns by name, as views."""
        return {name: self[name] for name in self._arrays}

    def clear(self) -> None:
        """Forget the rows; views taken before will show the next ones."""
        self.c.count = 0

    def extend(self, rows: dict[str, Any]) -> None:
        """Append rows given by column; columns left out are 0. ValueError: no room."""
        first = len(self)
        count = len(next(iter(rows.values())))
        if first + count > self.capacity:
            raise ValueError(f"{count} rows do not fit: {self.capacity - first} are free")
        for name, array in self._arrays.items():
            array[first : first + count] = rows.get(name, 0)
        self.c.count = first + count


class Batch(_Columns):
    """What the kernel said: struct ct_batch."""

    _ctype = "struct ct_batch"

    def __init__(self, capacity: int) -> None:
        super().__init__(ffi.gc(lib.ct_batch_new(capacity), lib.ct_batch_free))


class FlowBatch(_Columns):
    """Flow records: struct flow_batch."""

    _ctype = "struct flow_batch"

    def __init__(self, capacity: int) -> None:
        super().__init__(ffi.gc(lib.flow_batch_new(capacity), lib.flow_batch_free))


def decode(data: Buffer, out: Batch) -> Decoded:
    """Append the netlink messages in data to out, as ct_decode() does.

    Where the batch is full or an error was met, ``used`` is less than the
    length: call again with the rest.
    """
    view = ffi.from_buffer(data)
    return _decoded(lib.ct_decode(view, len(view), out.c))


def receive(fd: int, buffer: Buffer, out: Batch) -> Decoded:
    """Receive from a netlink socket into out, as ct_recv_decode() does.

    Raises OSError as recvmsg(2) does, but for EAGAIN (no datagrams) and
    ENOBUFS (``overrun``).
    """
    return _received(lib.ct_recv_decode, fd, buffer, out)


EVENT_MAX = 4096
"""Bytes of receive_events()'s buffer that each event takes: CT_EVENT_MAX."""


def receive_events(fd: int, buffer: Buffer, out: Batch) -> Decoded:
    """Receive events, many by one system call, as ct_recv_events() does. Never waits.

    Raises OSError as recvmmsg(2) does, but for EAGAIN (no datagrams) and
    ENOBUFS (``overrun``).
    """
    return _received(lib.ct_recv_events, fd, buffer, out)


def _received(by: Any, fd: int, buffer: Buffer, out: Batch) -> Decoded:
    view = ffi.from_buffer(buffer, require_writable=True)
    what = ffi.new("struct ct_decoded *")
    taken = by(fd, view, len(view), out.c, what)
    if taken < 0 and taken != -errno.EAGAIN:
        raise OSError(-taken, f"receiving from conntrack: {os.strerror(-taken)}")
    return _decoded(what, max(taken, 0))


def get_request(batch: Batch, row: int, seq: int) -> bytes:
    """A netlink request for one row's connection; seq must not be 0 (see ct.h)."""
    if not 0 <= row < len(batch):
        raise IndexError(f"row {row} of {len(batch)}")
    space = ffi.new("uint8_t[192]")
    size = lib.ct_get_request(batch.c, row, seq, space, len(space))
    return bytes(ffi.buffer(space, size))


class Table:
    """Live connections, and what of them is recorded: struct ct_table."""

    def __init__(self, max_asks: int = 1024) -> None:
        self.c: Any = ffi.gc(lib.ct_table_new(), lib.ct_table_free)
        if self.c == ffi.NULL:
            raise MemoryError("no memory for the connection table")
        self._asks = np.zeros(max(max_asks, 1), dtype=np.uint32)
        self._max_asks = max_asks
        self._nasks = ffi.new("uint32_t *")

    def __len__(self) -> int:
        return int(lib.ct_table_count(self.c))

    @property
    def lost(self) -> int:
        """Connections recorded as lost whose end may still be told."""
        return int(lib.ct_table_lost(self.c))

    @property
    def never_ended(self) -> int:
        """Connections recorded as lost whose end never was told."""
        return int(lib.ct_table_never_ended(self.c))

    @property
    def memory(self) -> int:
        """Bytes in use."""
        return int(lib.ct_table_memory(self.c))

    def apply(
        self,
        events: Batch,
        now: int,
        out: FlowBatch,
        *,
        start: int = 0,
        active: bool = False,
    ) -> tuple[int, NDArray[np.uint32]]:
        """Take rows from start on; now in ns, UTC. See ct_table_apply().

        Returns the row to go on from (less than len(events): flush and call
        again) and the rows to ask about: the kernel, or if it is a DESTROY
        the store.
        """
        asks = ffi.cast("uint32_t *", ffi.from_buffer(self._asks))
        row = lib.ct_table_apply(
            self.c, events.c, start, now, active, out.c, asks, self._max_asks, self._nasks
        )
        return int(row), self._asks[: self._nasks[0]].copy()

    def old(self, before: int) -> None:
        """What began before (ns, UTC) may be in the store. See ct_table_old()."""
        lib.ct_table_old(self.c, before)

    def settle(self, events: Batch, row: int, now: int, sums: FlowBatch, out: FlowBatch) -> None:
        """Take an end of which the store holds this much. See ct_table_settle()."""
        if out.capacity - len(out) < 4:
            raise ValueError("settling needs room for four records")
        lib.ct_table_settle(self.c, events.c, row, now, sums.c, out.c)

    def recorded(self, sums: FlowBatch) -> None:
        """Tell what the store holds of live connections. See ct_table_recorded()."""
        lib.ct_table_recorded(self.c, sums.c)

    def dump_begin(self) -> None:
        """Call before asking for a dump. See ct_table_dump_begin()."""
        lib.ct_table_dump_begin(self.c)

    def sweep(self, now: int, out: FlowBatch) -> bool:
        """After a complete dump: close what it did not show. False: out is full, call again."""
        return not lib.ct_table_sweep(self.c, now, out.c)
