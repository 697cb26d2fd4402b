"""What is left unread changes no answer."""

import random
import re
from contextlib import closing

import msgspec
import numpy as np
import pytest
from bench import synthetic
from storebed import SEC, T0, archiver_of, flow, put, tenures

from netflow import history, store
from netflow.filters import where
from netflow.history import archive
from netflow.names import CTE, join
from netflow.node import Node
from netflow.prune import among
from netflow.wire import Filter

pytestmark = pytest.mark.unit

ADDRESSES = ["10.0.0.1", "10.0.0.2", "10.0.1.1", "192.0.2.7", "2001:db8::1", "2001:db8:0:1::1"]
TOLD = tenures((1, "alpha", 0, 4000), (1, "beta", 4000, None), (2, "gamma", 0, None)).params


@pytest.fixture(scope="module")
def con(tmp_path_factory):
    """Two hours of records in files, a third one hot; many translated, each at its own minute."""
    path = tmp_path_factory.mktemp("store")
    kept = history.open_store(path, Node("here", 1))
    store.begin_run(kept, store.Mark(T0))
    archiver = archiver_of(kept)
    roll = random.Random(1)
    for hour in range(3):
        rows = []
        for n in range(60):
            src, dst, nsrc, ndst = roll.choices(ADDRESSES, k=4)
            given = {"nsport": roll.choice([80, 81])} if roll.random() < 0.5 else {}
            translated = {"nsrc": nsrc, "ndst": ndst} if roll.random() < 0.5 else {}
            rows.append(
                flow(src, dst, **translated, **given, start=hour * 3600 + 60 * n,
                     end=hour * 3600 + 60 * n + 1, sport=roll.choice([80, 81, 1000]),
                     dport=roll.choice([80, 443]), proto=roll.choice([1, 6, 17]),
                     oxid=roll.choice([0, 1, 2]), rxid=roll.choice([0, 1, 2]))
            )  # fmt: skip
        put(kept, *rows, caught_up=T0 + (hour * 3600 + 600) * SEC)
    store.commit(kept, None, store.Mark(T0 + 2 * 3600 * SEC + 700 * SEC))
    assert archive.close_segments(archiver) == 2
    yield kept.con
    archiver.con.close()
    kept.con.close()


def found(con, asked, few):
    with closing(con.cursor()) as cursor, history.reading(cursor):
        condition, params = where(asked)
        records = history.source(cursor, asked.since, asked.until, asked.nodes or None, few)
        sql = (
            f"WITH {CTE} SELECT epoch_ns(start_time) FROM ({records.sql}) f"
            f" {join('o', 'o')} {join('r', 'r')} WHERE {condition} ORDER BY 1"
        )
        params = {**params, **records.params, **TOLD}
        named = set(re.findall(r"\$(\w+)", sql))
        return cursor.execute(sql, {k: v for k, v in params.items() if k in named}).fetchall()


FILTERS = [
    Filter(dst=["10.0.0.1"]),
    Filter(dst=["10.0.0.0/24", "192.0.2.7"], dport=[80]),
    Filter(dst=["2001:db8::/48"], src=["10.0.0.0/8"]),
    Filter(dst=["::/0"]),
    Filter(src=["2001:db8::1"]),
    Filter(addr=["10.0.0.2"]),
    Filter(addr=["10.0.0.1", "10.0.0.2", "10.0.1.1"]),  # more than are worth it
    Filter(addr=["2001:db8::/33"], proto=[17]),
    Filter(xids=[1]),
    Filter(xids=[0, 2], side="responder"),
    Filter(slices=["alpha"]),
    Filter(slices=["beta", "gamma"], side="originator"),
    Filter(slices=["alpha"], xids=[2]),
    Filter(slices=["nobody"]),
    Filter(dport=[443]),
    Filter(port=[80, 81]),
    Filter(sport=[81], since=T0 + 3000 * SEC, until=T0 + 5000 * SEC),
    Filter(proto=[6]),
]


def brief(asked):
    return " ".join(
        str(v) for v in msgspec.structs.astuple(asked) if v not in ([], None, "", "any")
    )


@pytest.mark.parametrize("asked", FILTERS, ids=brief)
def test_the_answer_is_the_same_with_and_without(con, asked):
    few = among(asked, con, TOLD)
    rows = found(con, asked, few)
    assert rows == found(con, asked, None)
    assert rows or asked.slices == ["nobody"]


def test_who_sent_to_an_address_reads_few_rows_of_a_file(tmp_path):
    kept = history.open_store(tmp_path, Node("here", 1))
    store.begin_run(kept, store.Mark(T0))
    archiver = archive.Archiver(kept, kept.con.cursor(), history.Keeping(), tmp_path / "none")
    mixed = synthetic.mixed(np.random.default_rng(1), 100_000, T0 // SEC // 3600)
    store.commit(kept, mixed, store.Mark(T0))
    store.commit(kept, None, store.Mark(T0 + 3600 * SEC))
    assert archive.close_segments(archiver) == 1
    con = kept.con
    [(low,)] = con.execute(
        "SELECT dst_lo FROM read_parquet($1) WHERE dst_hi = 0 AND dport = 443 LIMIT 1",
        [str(next((tmp_path / "history").glob("*/*.parquet")))],
    ).fetchall()
    asked = Filter(dst=[".".join(str(low >> shift & 255) for shift in (24, 16, 8, 0))])
    records = history.source(con, None, None, None, among(asked, con, TOLD))
    named = {k: v for k, v in records.params.items() if f"${k}" in records.sql}
    plan = con.execute(f"EXPLAIN ANALYZE SELECT * FROM ({records.sql})", named).fetchall()[0][1]
    scanned = re.findall(r"Row Groups Scanned: (\d+) / 7", plan)
    assert scanned, plan
    assert sum(map(int, scanned)) <= 2, plan
    archiver.con.close()
    con.close()
