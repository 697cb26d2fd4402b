"""``top``, ``series``, ``coverage``: sums, over all there is and over what one may see."""

import pytest
from questionbed import AGO, OWN_A, PEER, asked, of
from storebed import SEC, T0, flow, put

from netflow.wire import Coverage, Filter, Flows, Series, Top

pytestmark = pytest.mark.unit


@pytest.fixture
def ask(tmp_path, monkeypatch):
    with asked(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def opened(ask):
    return ask.store


def mixed(opened):
    put(
        opened,
        flow("10.0.0.1", PEER, oxid=7, flow_id=1, opackets=1, obytes=100, rpackets=2,
             rbytes=1000),
        flow("10.0.0.1", PEER, oxid=7, flow_id=2, dport=53, proto=17, obytes=5, opackets=1),
        flow(
            "203.0.113.5", "10.0.0.1", rxid=8, flow_id=3, sport=9, obytes=10, rbytes=20, rpackets=1
        ),
        flow("10.0.0.1", "192.0.2.1", oxid=7, rxid=8, flow_id=4, sport=4, obytes=7, rbytes=1),
        flow("10.0.0.1", PEER, oxid=7, flow_id=5, sport=5, reason=3, obytes=50),
        flow("10.0.0.1", PEER, oxid=7, flow_id=5, sport=5, start=1, end=2, flow_start=0, obytes=50),
    )  # fmt: skip


def sums(rows, *keys):
    return {
        tuple(row[key] for key in keys): (row["out_bytes"], row["in_bytes"], row["flows"])
        for row in rows
    }


def test_top_by_peer_counts_what_our_side_sent_as_out(opened, ask):
    mixed(opened)
    _, rows, trailer = ask.all(Top(filter=Filter(), of="peer"))
    assert sums(rows, "peer", "place") == {
        (PEER, None): (205, 1000, 3),
        ("203.0.113.5", None): (20, 10, 1),
        ("192.0.2.1", None): (7, 1, 1),
        ("10.0.0.1", None): (1, 7, 1),
    }
    assert trailer.total == {"bytes": 1243, "packets": 5, "flows": 5}
    assert rows[0]["peer"] == PEER
    [row] = ask.rows(Top(filter=Filter(slices=["b"]), of="peer", by="flows", limit=1))
    assert sums([row], "peer") in ({("10.0.0.1",): (1, 7, 1)}, {("203.0.113.5",): (20, 10, 1)})


def test_top_by_port_protocol_and_node_counts_each_flow_once(opened, ask):
    mixed(opened)
    put(opened, flow(proto=1, sport=3, dport=8 << 8, oxid=7, flow_id=9, obytes=84))
    rows = ask.rows(Top(filter=Filter(), of="port"))
    assert sums(rows, "proto", "port") == {
        (6, 80): (227, 1011, 4), (17, 53): (5, 0, 1), (1, None): (84, 0, 1)
    }  # fmt: skip
    rows = ask.rows(Top(filter=Filter(), of="proto"))
    assert sums(rows, "proto") == {(6,): (227, 1011, 4), (17,): (5, 0, 1), (1,): (84, 0, 1)}
    [row] = ask.rows(Top(filter=Filter(), of="node"))
    assert row["flows"] == 6


@pytest.mark.parametrize("key", ["slice", "peer", "port", "proto", "node"])
def test_top_tells_inside_from_outside(opened, ask, key):
    mixed(opened)
    inside = ["10.0.0.0/8", "192.0.2.0/24"]
    _, rows, trailer = ask.all(Top(filter=Filter(), of=key, inside=inside, limit=0))
    assert {row["place"] for row in rows} == {"inside", "outside"}
    _, only, part = ask.all(Top(filter=Filter(), of=key, inside=inside, only="outside"))
    assert only == [row for row in rows if row["place"] == "outside"]
    assert part.total == {"bytes": 1235, "packets": 5, "flows": 4}
    assert trailer.total["flows"] == 5
    _, only, part = ask.all(Top(filter=Filter(), of=key, inside=inside, only="inside"))
    assert {row["place"] for row in only} == {"inside"}
    assert part.total == {"bytes": 8, "packets": 0, "flows": 1}


def test_top_wants_to_know_what_is_inside(ask):
    with pytest.raises(ValueError, match="--inside"):
        ask.rows(Top(filter=Filter(), only="outside"))
    with pytest.raises(ValueError, match="not an address"):
        ask.rows(Top(filter=Filter(), inside=["x"]))


@pytest.mark.parametrize("key", ["slice", "peer", "port", "proto", "node"])
def test_top_shows_a_slices_own_user_its_own_only(opened, ask, key):
    mixed(opened)
    _, rows, trailer = ask.all(Top(filter=Filter(), of=key), OWN_A)
    assert trailer.total == {"bytes": 1213, "packets": 4, "flows": 4}
    assert sum(row["flows"] for row in rows) == 4
    if key == "slice":
        assert sums(rows, "slice", "xid") == {("a", 7): (212, 1001, 4)}
    if key == "peer":
        assert sums(rows, "peer") == {(PEER,): (205, 1000, 3), ("192.0.2.1",): (7, 1, 1)}


# -- series, coverage ----------------------------------------------------------------------


def test_a_series_has_what_a_slice_sent_and_got_in_each_step(opened, ask):
    put(
        opened,
        flow(oxid=7, start=0, end=10, obytes=1, rbytes=2, opackets=3, rpackets=4),
        flow(rxid=7, start=60, end=100, obytes=5, rbytes=6),
        flow(oxid=7, rxid=7, start=100, end=119, obytes=10, rbytes=20),
        flow(oxid=8, start=100, end=119, obytes=1000),
    )
    asked = {"since": T0, "until": T0 + 600 * SEC, "slices": ["a"]}
    _, rows, trailer = ask.all(Series(filter=Filter(**asked), step=60 * SEC))
    assert [of(row, "start", "out_bytes", "in_bytes", "begun") for row in rows] == [
        (T0, 1, 2, 1), (T0 + 60 * SEC, 36, 35, 2)
    ]  # fmt: skip
    assert trailer.total == {"bytes": 74, "step": 60 * SEC}
    assert len(ask.rows(Series(filter=Filter(**asked)))) == 2
    for step in (1, -60 * SEC):
        with pytest.raises(ValueError, match="step"):
            ask.rows(Series(filter=Filter(**asked), step=step))


def test_a_series_shows_a_slices_own_user_its_own_only(opened, ask):
    put(opened, flow(oxid=7, rxid=8, obytes=3, rbytes=4), flow(oxid=8, obytes=100))
    asked = Series(filter=Filter(since=T0, until=T0 + 60 * SEC))
    [row] = ask.rows(asked, OWN_A)
    assert (row["out_bytes"], row["in_bytes"], row["begun"]) == (3, 4, 1)


def test_coverage_says_how_much_is_attributed_and_why_the_rest_is_not(opened, ask):
    put(
        opened,
        flow("10.0.0.1", PEER, oxid=7, start=3600, end=3601, obytes=10, opackets=1),
        flow(PEER, "10.0.0.1", rxid=99, start=3600, end=3601, obytes=20),
        flow("10.0.0.1", PEER, start=3600, end=3601, obytes=30),
        flow("127.0.0.1", "127.0.0.1", start=3600, end=3601, obytes=1),
        flow("172.16.0.1", PEER, start=3600, end=3601, obytes=40),
        flow("172.16.0.1", PEER, start=3600, end=3601, obytes=2, nsrc="192.0.2.1"),
        flow("10.0.0.1", PEER, start=-3000, end=-2999, obytes=50),
    )
    asked = Filter(since=T0 - 2 * AGO * SEC, until=T0 + 7200 * SEC)
    _, rows, trailer = ask.all(Coverage(filter=asked, step=3600 * SEC), now=T0 + 8000 * SEC)
    told = {row["what"]: (row["bytes"], row["begun"]) for row in rows if row["what"] != "gap"}
    assert told == {
        "slice": (10, 1), "unnamed": (20, 1), "node": (33, 3), "forwarded": (40, 1),
        "before-slices": (50, 1),
    }  # fmt: skip
    gap = [row["seconds"] for row in rows if row["what"] == "gap"]
    assert sum(gap) == AGO
    assert max(gap) <= 3600
    [node] = [row for row in rows if row["what"] == "node"]
    assert of(node, "share_begun", "share_bytes") == (3 / 6, 33 / 103)
    _, whole, _ = ask.all(Coverage(filter=asked), now=T0 + 8000 * SEC)
    assert {row["start"] for row in whole} == {asked.since}
    assert [row["bytes"] for row in whole] == [10, 50, 40, 33, 20, 0]
    assert trailer.total["bytes"] == 153
    assert trailer.total["attributed_bytes"] == 30
    assert trailer.total["attributed_begun"] == 2


def test_coverage_of_a_slices_own_user_is_of_its_own(opened, ask):
    put(opened, flow(oxid=7, obytes=1), flow(oxid=8, obytes=2), flow(obytes=4))
    _, rows, _ = ask.all(Coverage(filter=Filter(since=T0, until=T0 + SEC)), OWN_A)
    assert [(row["what"], row["bytes"]) for row in rows] == [("slice", 1)]


def test_flows_show_a_slices_own_user_its_own_only(opened, ask):
    put(opened, flow(sport=1, oxid=7, rxid=8), flow(sport=2, oxid=8), flow(sport=3, rxid=7))
    rows = ask.rows(Flows(filter=Filter()), OWN_A)
    assert {(r["sport"], r["oslice"], r["oxid"], r["rslice"], r["rxid"]) for r in rows} == {
        (1, "a", 7, None, None), (3, None, None, "a", 7)
    }  # fmt: skip
