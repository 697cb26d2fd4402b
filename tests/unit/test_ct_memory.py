"""Columns are what ct.h says, and the table stays small and quick as it grows."""

import numpy as np
import pytest
from netflow._ct import ffi

from netflow.ct import Batch, FlowBatch, Reason, Table
from netflow.protocols import REASON_ACTIVE, REASON_OWNER, REASONS

pytestmark = pytest.mark.unit

LIVE = 200_000


@pytest.mark.parametrize("kind", [Batch, FlowBatch])
def test_every_column_is_aligned_writable_and_its_own(kind):
    batch = kind(1000)
    batch.c.count = 1000
    columns = batch.columns()
    for n, column in enumerate(columns.values()):
        assert column.ctypes.data % 64 == 0
        column[:] = n + 1
    assert all((column == n + 1).all() for n, column in enumerate(columns.values()))
    assert batch.capacity == 1000, "no column overlaps the head"


def test_reasons_are_called_as_the_header_calls_them():
    assert {reason.value: reason.name.lower() for reason in Reason} == REASONS
    assert (REASON_ACTIVE, REASON_OWNER) == (Reason.ACTIVE, Reason.OWNER)


@pytest.mark.parametrize("kind", [Batch, FlowBatch])
def test_columns_are_as_wide_as_the_header_says(kind):
    batch = kind(1)
    for name, field in ffi.typeof(kind._ctype).fields:
        if field.type.kind == "pointer":
            assert batch[name].dtype == np.dtype(f"u{ffi.sizeof(field.type.item)}")
    assert set(batch.names) == {n for n, _ in ffi.typeof(kind._ctype).fields} - {
        "capacity",
        "count",
    }


def test_views_outlive_a_refill_but_show_the_new_rows():
    batch = Batch(2)
    batch.extend({"id": [1, 2]})
    view = batch["id"]
    batch.clear()
    batch.extend({"id": [3]})
    assert list(view) == [3, 2] and list(batch["id"]) == [3]


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        Batch(1).extend({"id": [1, 2]})


def live(first: int, count: int, msg: int, n: int = 1) -> Batch:
    """Connections told apart by address and port, IPv6."""
    ids = np.arange(first, first + count, dtype=np.uint64)
    batch = Batch(count)
    columns = {"msg": msg, "has": 0b111, "family": 10, "proto": 17, "src_hi": ids, "src_lo": ids}
    columns |= {"dst_hi": 5, "sport": ids & 0xFFFF, "id": ids, "mark": 7, "start": 9, "opackets": n}
    batch.extend({k: np.broadcast_to(v, count) for k, v in columns.items()})
    return batch


def test_200_000_live_connections_fit_in_30_mb_and_none_is_mixed_up():
    table, out = Table(), FlowBatch(LIVE + 4)
    table.apply(live(0, LIVE, 4), 10, out)
    assert len(table) == LIVE
    assert table.memory < 30 * 2**20
    table.apply(live(0, LIVE, 3, n=2), 20, out)
    assert len(table) == 0 and len(out) == LIVE
    assert (out["opackets"] == 2).all() and (out["flow_id"] == np.arange(LIVE)).all()
    assert (out["src_lo"] == np.arange(LIVE)).all() and (out["oxid"] == 7).all()
    assert (out["reason"] == Reason.IDLE).all()


def test_memory_is_used_again():
    table, out = Table(), FlowBatch(20_004)
    sizes = []
    for n in range(6):
        table.apply(live(n * 20_000, 20_000, 4), 10, out)
        table.apply(live(n * 20_000, 20_000, 3), 20, out)
        sizes.append(table.memory)
        out.clear()
    assert len(set(sizes)) == 1
