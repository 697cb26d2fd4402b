"""Records as the decoder gives them, for stores without a collector."""

import ipaddress
from types import SimpleNamespace

import numpy as np

from netflow import history, names, store
from netflow.history import archive

SEC = 1_000_000_000
T0 = 1_772_334_720 * SEC


def addr(text):
    ip = ipaddress.ip_address(text)
    number = int(ip) if ip.version == 6 else 0xFFFF << 32 | int(ip)
    return number >> 64, number & (1 << 64) - 1


COLUMNS = {
    "flow_start": "u8", "start": "u8", "end": "u8", "flow_id": "u4", "zone": "u2", "proto": "u1",
    "reason": "u1", "tcp_state": "u1", "sport": "u2", "dport": "u2", "nsport": "u2",
    "ndport": "u2", "opackets": "u8", "obytes": "u8", "rpackets": "u8", "rbytes": "u8",
    "oxid": "u2", "rxid": "u2", "src_hi": "u8", "src_lo": "u8", "dst_hi": "u8", "dst_lo": "u8",
    "nsrc_hi": "u8", "nsrc_lo": "u8", "ndst_hi": "u8", "ndst_lo": "u8",
}  # fmt: skip


def flow(src="10.0.0.1", dst="10.0.0.2", *, start=0.0, end=1.0, **given):
    """One record; times in seconds after T0."""
    row = dict.fromkeys(COLUMNS, 0)
    row |= {"proto": 6, "sport": 1000, "dport": 80, "reason": 2, "flow_id": 1}
    row |= {"start": T0 + int(start * SEC), "end": T0 + int(end * SEC)}
    row["flow_start"] = T0 + int(given.pop("flow_start", start) * SEC)
    nat = {"src": given.pop("nsrc", src), "dst": given.pop("ndst", dst)}
    for side, text in (("src", src), ("dst", dst)):
        row[f"{side}_hi"], row[f"{side}_lo"] = addr(text)
        row[f"n{side}_hi"], row[f"n{side}_lo"] = addr(nat[side])
    row |= {"nsport": given.get("sport", 1000), "ndport": given.get("dport", 80)}
    assert set(given) <= set(row)
    return row | given


def columns(*rows):
    return {name: np.array([r[name] for r in rows], dtype=kind) for name, kind in COLUMNS.items()}


def put(kept, *rows, caught_up=T0 + 1000 * SEC):
    flows, mark = columns(*rows), store.Mark(caught_up)
    store.patiently(lambda: store.commit(kept, flows, mark))  # as netflow.writer does


def archiver_of(kept):
    """One that makes files of a store's segments, without its thread."""
    return archive.Archiver(kept, kept.con.cursor(), history.Keeping(), kept.path / "registry.db")


def tenures(*rows):
    """A registry whose tenures are given in seconds after T0."""

    def at(seconds):
        return None if seconds is None else T0 + int(seconds * SEC)

    params = names.params_of([(xid, name, at(a), at(b)) for xid, name, a, b in rows])
    return SimpleNamespace(registry=None, params=params)
