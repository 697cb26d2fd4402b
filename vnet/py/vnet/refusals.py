"""How often the guard refused whom what: the kernel's counters, over all CPUs."""

from dataclasses import dataclass
from pathlib import Path

from vnet import events
from vnet.bpfmaps import ffi, pinned


@dataclass(frozen=True)
class Count:
    """Of one slice and kind, since the programs were loaded."""

    xid: int
    kind: str
    refused: int
    observed: int  #: would have been, but for mode `observe`
    suppressed: int  #: of both: they have no event of their own


def read(instance: Path) -> list[Count]:
    """All counters of an instance that are not 0, by xid and kind.

    Raises BpfError where they cannot be read.
    """
    found = []
    with pinned(instance / "maps" / "counters") as counters:
        every_key = counters.keys()
        for key in every_key:
            values = [_counter(value) for value in counters.get_each_cpu(key)]
            refused, observed, suppressed = (sum(value[n] for value in values) for n in range(3))
            if refused or observed:
                slice_and_kind = ffi.from_buffer("struct vnet_counter_key *", key)
                kind = events.kind_name(slice_and_kind.kind)
                found.append(Count(slice_and_kind.xid, kind, refused, observed, suppressed))
    return sorted(found, key=lambda count: (count.xid, count.kind))


def _counter(value: bytes) -> tuple[int, int, int]:
    counter = ffi.from_buffer("struct vnet_counter *", value)
    return counter.refused, counter.observed, counter.suppressed
