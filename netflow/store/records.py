"""What the collector writes: records, and with them how far it has come."""

from __future__ import annotations

from netflow.store.database import Columns, Store, as_times, transaction
from netflow.store.room import check_room
from netflow.store.runs import Mark, mark_run
from netflow.store.segments import roll, segment_for

_TIMES = ("flow_start", "start", "end")
# The order of a segment's columns; a batch has the same, but for two names.
_COLUMNS = (
    'flow_start, start, "end", flow_id, zone, proto, reason, tcp_state, '
    "src_hi, src_lo, dst_hi, dst_lo, sport, dport, nsrc_hi, nsrc_lo, ndst_hi, ndst_lo, "
    "nsport, ndport, opackets, obytes, rpackets, rbytes, oxid, rxid"
)


def commit(store: Store, flows: Columns | None, mark: Mark) -> None:
    """Write records, and how far the collector is. Durable on return.

    Raises FullError where the disk has no room; then, as after any error, nothing is written.
    """
    check_room(store, len(flows["start"]) if flows is not None else 0)
    was = store.segment, store.floor
    rows = was[0].rows if was[0] else 0
    try:
        with transaction(store.con):
            if flows is not None:
                number = segment_for(store, mark.caught_up, len(flows["start"]))
                store.con.register("batch", as_times(flows, _TIMES))
                store.con.execute(f"INSERT INTO flows_{number} SELECT {_COLUMNS} FROM batch")  # noqa: S608
                store.con.unregister("batch")
            mark_run(store, mark)
    except BaseException:
        store.segment, store.floor = was
        if was[0]:
            was[0].rows = rows
        raise
    if flows is None:
        roll(store, mark.caught_up)
