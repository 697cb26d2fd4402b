"""``who`` has two ways to its answer, one for few records and one for many: it is the same."""

import random
from contextlib import closing

import pytest
from questionbed import Asked
from storebed import SEC, T0, archiver_of, flow, put, tenures

from netflow import history, names, store
from netflow.history import archive
from netflow.node import Node
from netflow.questions import hits, local
from netflow.wire import Filter, Who
from vnet import registry

pytestmark = pytest.mark.unit

ADDRESSES = ["10.0.0.1", "10.0.0.2", "10.0.1.1", "192.0.2.7", "2001:db8::1", "2001:db8:0:1::1"]
NETWORKS = [*ADDRESSES, "10.0.0.0/8", "2001:db8::/32", "2001:db8::/64", "::/0", "198.51.100.1"]
PORTS = [None, None, 80, 81, 443]
HOURS = 2
"""Of records in files; those of one more are hot."""


def records(roll, hour):
    """Some of one connection, some with translated addresses, ports, or both."""
    at = hour * 3600
    yield flow("10.9.9.9", "203.0.113.9", sport=1000, nsport=2000, start=at, end=at + 1)
    for _ in range(50):
        src, dst, nsrc, ndst = roll.choices(ADDRESSES, k=4)
        start = hour * 3600 + roll.randrange(3000)
        given = {"nsrc": nsrc, "ndst": ndst} if roll.random() < 0.4 else {}
        if roll.random() < 0.4:
            given |= {"nsport": roll.choice([80, 81])}
        given |= {"sport": roll.choice([80, 81, 1000]), "dport": roll.choice([80, 443])}
        given |= {"proto": roll.choice([1, 6, 17]), "flow_id": roll.randrange(3)}
        owners = roll.choices([0, 1, 2, 9], k=2)
        for share in range(roll.choice([1, 1, 2])):
            if roll.random() < 0.3:
                owners = roll.choices([0, 1, 2], k=2)
            yield flow(
                src, dst, **given, flow_start=start, start=start + 60 * share,
                end=start + 60 * share + 60, oxid=owners[0], rxid=owners[1],
                reason=roll.choice([2, 3, 4]), opackets=roll.randrange(3),
                obytes=roll.randrange(100), rpackets=roll.randrange(2),
            )  # fmt: skip


def filled(path, node, roll):
    kept = history.open_store(path, Node(node, 1))
    store.begin_run(kept, store.Mark(T0))
    archiver = archiver_of(kept)
    for hour in range(HOURS + 1):
        put(kept, *records(roll, hour), caught_up=T0 + (hour * 3600 + 3500) * SEC)
    store.commit(kept, None, store.Mark(T0 + (HOURS * 3600 + 3600) * SEC))
    assert archive.close_segments(archiver) == HOURS
    archiver.con.close()
    return kept


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """A node with hot and closed records, and a file of another one whose slices have its xids."""
    roll = random.Random(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "addresses", list)
        patch.setattr(names, "tenures", lambda known, now: known.params)
        path = tmp_path_factory.mktemp("other")
        requests = [registry.Request(name, xid) for name, xid in (("theirs", 1), ("none", 3))]
        registry.assign(path / "registry.db", requests, now_ns=1)
        filled(path, "other", roll).con.close()
        kept = filled(tmp_path_factory.mktemp("store"), "here", roll)
        for name in sorted((path / "history").glob("*/*.parquet")):
            with name.open("rb") as file, closing(kept.con.cursor()) as con:
                history.take(kept, con, file.fileno())
        yield Asked(
            kept,
            tenures((1, "alpha", -10, 2000), (1, "beta", 2000, None), (2, "gamma", 3000, None)),
        )
        kept.con.close()


def questions(roll):
    for _ in range(16):
        at = roll.choice([None, T0 + roll.randrange((HOURS + 1) * 3600) * SEC])
        since, until = (None, None) if at is None else (at - 900 * SEC, at + 900 * SEC)
        ends = {"peer": roll.choice(NETWORKS), "peer_port": roll.choice(PORTS)}
        ours = {"own": roll.choice(["", *NETWORKS]), "own_port": roll.choice(PORTS)}
        kind = roll.random()
        if kind < 0.2 and ours["own"]:
            ends = {"peer": ""}
        elif kind < 0.7:
            ours = {}
        yield Who(filter=Filter(since=since, until=until), at=at, limit=0, **ends, **ours)


def told(ask, question):
    _, rows, trailer = ask.all(question, now=T0 + 4 * 3600 * SEC)
    best = [(row["away"], not row["xid"]) for row in rows]
    assert best == sorted(best)
    return sorted(rows, key=repr), trailer


def test_few_records_and_many_are_told_alike(ask, monkeypatch):
    answered = 0
    slices = set()
    for question in questions(random.Random(4)):
        few = told(ask, question)
        with monkeypatch.context() as patch:
            patch.setattr(hits, "FEW", -1)
            assert told(ask, question) == few, question
        answered += bool(few[0])
        slices |= {row["slice"] for row in few[0]}
    assert answered > 8
    assert slices == {"alpha", "beta", "gamma", "theirs", None}


@pytest.mark.parametrize("few", [hits.FEW, -1])
def test_a_port_that_alone_was_translated_is_found_hot_and_in_files(ask, monkeypatch, few):
    monkeypatch.setattr(hits, "FEW", few)
    ends = {"peer": "203.0.113.9", "own": "10.9.9.9", "own_port": 2000}
    asked = Who(filter=Filter(since=T0, until=T0 + 4 * 3600 * SEC), **ends)
    assert len(ask.rows(asked)) == 2 * HOURS + 1
