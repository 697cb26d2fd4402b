"""What a slice's user may see, and that nothing he asks tells him more."""

import json
import os
import pwd

import pytest
from storebed import SEC, T0, flow, put, tenures
from vnet.registry import Request

from netflow import access, names, questions, store
from netflow.wire import Filter, Flows, Scans, Spoofed, Top, Who
from vnet import registry

pytestmark = pytest.mark.unit

MINE, YOURS = 300, 400
NAMES = ((MINE, "mine", 0, None), (YOURS, "yours", 0, None), (500, "mine", -500, -100),
         (500, "yours", -50, None))  # fmt: skip
OWN = access.Scope(frozenset({"mine"}))
EVERYTHING = [1, 2, 3, 4, 5, 6, 7]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Ask the store of seven flows, named by their source ports; rows as dicts."""
    monkeypatch.setattr(names, "tenures", lambda known, now: known.params)
    kept = store.open_store(tmp_path)
    store.begin_run(kept, store.Mark(T0))
    put(
        kept,
        flow(sport=1, oxid=MINE, rxid=0),
        flow(sport=2, oxid=MINE, rxid=YOURS),
        flow(sport=3, oxid=YOURS, rxid=MINE),
        flow(sport=4, oxid=YOURS, rxid=0),
        flow(sport=5, oxid=0, rxid=0),
        flow(sport=6, oxid=500, rxid=0),  # it was mine once, and is yours now
        flow(sport=7, oxid=MINE, rxid=500),
    )

    def run(scope, question=Flows, also=None, **which):
        request, lines = question(filter=Filter(**which), **(also or {})), []
        period = questions.period(kept.con, request.filter, T0 + 1000 * SEC, T0 + 1000 * SEC)
        answer = questions.ANSWERS[question]
        answer(kept.con, request, tenures(*NAMES), period, scope, lines.append)
        header, *rows, run.trailer = lines
        return [dict(zip(header.columns, row, strict=True)) for row in rows]

    yield run
    kept.con.close()


def ports(rows):
    return [row["sport"] for row in rows]


def test_who_may_see_all_sees_all(asked):
    assert sorted(ports(asked(access.ALL))) == EVERYTHING


def test_a_slices_user_sees_its_flows_and_not_who_is_at_the_other_end(asked):
    rows = {row["sport"]: row for row in asked(OWN)}
    assert sorted(rows) == [1, 2, 3, 7]
    sides = {port: [row[k] for k in ("oxid", "oslice", "rxid", "rslice")]
             for port, row in rows.items()}  # fmt: skip
    assert sides[2] == [MINE, "mine", None, None]
    assert sides[3] == [None, None, MINE, "mine"]
    assert sides[7] == [MINE, "mine", None, None]


def test_a_user_of_both_slices_sees_both_names(asked):
    rows = asked(access.Scope(frozenset({"mine", "yours"})))
    assert sorted(ports(rows)) == [1, 2, 3, 4, 6, 7]
    assert {(row["oslice"], row["rslice"]) for row in rows if row["sport"] in (2, 3)} == {
        ("mine", "yours"),
        ("yours", "mine"),
    }


@pytest.mark.parametrize(
    "which",
    [
        {"slices": ["yours"]},
        {"xids": [YOURS]},
        {"xids": [500]},
        {"expression": "slice yours"},
        {"expression": f"xid {YOURS}"},
        {"expression": "slice y*"},
    ],
    ids=str,
)
def test_no_condition_finds_out_who_is_at_the_other_end(asked, which):
    assert asked(access.ALL, **which) != []
    assert asked(OWN, **which) == []


def test_not_the_other_slice_finds_nothing_out_either(asked):
    by_name, by_none = (ports(asked(OWN, expression=f"not slice {n}")) for n in ("yours", "nobody"))
    assert sorted(by_name) == sorted(by_none)


def test_another_nodes_slice_of_the_same_name_is_not_his(asked):
    assert asked(OWN, nodes=["other"]) == []


def test_sums_have_no_row_of_others(asked):
    rows = asked(OWN, Top)
    assert [row["slice"] for row in rows if row["slice"]] == ["mine"]
    assert not any(row["xid"] in (YOURS, 500) for row in rows)


ALSO = {Who: {"peer": "10.0.0.0/8"}, Scans: {"hosts": 1, "ports": 1, "packets": 1000}}


@pytest.mark.parametrize("question", questions.ANSWERS, ids=lambda question: question.__name__)
def test_no_answer_has_anything_of_others(asked, question):
    """Nor sums: what is told of his flows is the same whether or not there are other ones."""
    since = {"since": T0 - 10 * SEC, "until": T0 + 100 * SEC}
    whole = asked(access.ALL, question, ALSO.get(question), **since)
    rows = asked(OWN, question, ALSO.get(question), **since)
    said = [*rows, asked.trailer.total, asked.trailer.notes]
    text = json.dumps(said, default=str)
    assert '"yours"' not in text, text
    for row in rows:
        assert not {YOURS, 500} & {value for key, value in row.items() if key.endswith("xid")}
    if question not in (Spoofed,):  # which has nothing to tell here
        assert rows != []
        assert rows != whole


def test_a_user_is_known_by_name_or_by_number(tmp_path):
    book = tmp_path / "registry.db"
    me = pwd.getpwuid(os.getuid())
    wanted = [Request("a", users=(me.pw_name,)), Request("b", users=(str(me.pw_uid), "nobody")),
              Request("c", users=("no-such-user",))]  # fmt: skip
    registry.assign(book, wanted, 1)
    assert access.slices_of(me.pw_uid, book) == {"a", "b"}
    assert access.slices_of(pwd.getpwnam("nobody").pw_uid, book) == {"b"}
    assert access.slices_of(64999, book) == frozenset()


@pytest.mark.parametrize("content", [None, b"", b"no database at all" * 100])
def test_without_a_registry_nobody_is_a_slices_user(tmp_path, content):
    book = tmp_path / "registry.db"
    if content is not None:
        book.write_bytes(content)
    assert access.slices_of(os.getuid(), book) == frozenset()
    with pytest.raises(access.Denied, match="uid 64999 may not ask"):
        access.allowed(access.Peer(64999, 64999), None, book)
