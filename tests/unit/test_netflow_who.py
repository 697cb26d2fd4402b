"""``who``: which slice had to do with a peer at a time, and how sure that is."""

import pytest
from questionbed import AGO, OWN_A, PEER, asked, of
from storebed import SEC, T0, flow, put

from netflow import access, shapes
from netflow.questions import hits
from netflow.wire import Filter, Flows, Who

pytestmark = pytest.mark.unit


@pytest.fixture
def ask(tmp_path, monkeypatch):
    with asked(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def opened(ask):
    return ask.store


def around(at, skew=120, **fields):
    since, until = (T0 + int(edge * SEC) for edge in (at - skew, at + skew))
    return {"filter": Filter(since=since, until=until, **fields), "at": T0 + int(at * SEC)}


def test_who_names_the_slice_that_sent_to_a_peer_and_its_tenure(opened, ask):
    put(
        opened,
        flow("10.0.0.1", PEER, oxid=7, sport=40212, start=500, end=520, opackets=3, obytes=300,
             rpackets=2, rbytes=200),
        flow("10.0.0.1", "198.51.100.8", oxid=8, start=500, end=520, opackets=1),
    )  # fmt: skip
    [row] = ask.rows(Who(peer=PEER, peer_port=80, **around(510)))
    assert of(row, "slice", "xid", "confidence", "side") == (
        "a",
        7,
        "socket",
        "originator",
    )
    assert (row["since"], row["until"]) == (T0 - 100 * SEC, None)
    assert (row["own"], row["own_port"], row["peer"], row["peer_port"]) == (
        "10.0.0.1",
        40212,
        PEER,
        80,
    )
    assert (row["sent_packets"], row["sent_bytes"], row["got_packets"], row["got_bytes"]) == (
        3,
        300,
        2,
        200,
    )
    assert (row["own_seen"], row["peer_seen"], row["away"]) == (None, None, 0)


def test_who_finds_what_a_peer_reached_and_translated_addresses(opened, ask):
    put(
        opened,
        flow(PEER, "10.0.0.1", rxid=8, sport=5, dport=22, start=1, end=2, rpackets=1),
        flow("10.9.9.9", "203.0.113.9", oxid=7, sport=6, start=1, end=2, opackets=1,
             nsrc="192.0.2.1", nsport=1006, ndst=PEER, ndport=8080),
    )  # fmt: skip
    rows = {row["own_port"]: row for row in ask.rows(Who(peer=PEER, **around(1)))}
    assert (rows[22]["slice"], rows[22]["side"]) == ("b", "responder")
    assert rows[22]["until"] == T0 + 900 * SEC
    assert (rows[6]["slice"], rows[6]["own_seen"], rows[6]["own_seen_port"]) == (
        "a",
        "192.0.2.1",
        1006,
    )
    assert (rows[6]["peer"], rows[6]["peer_seen"], rows[6]["peer_seen_port"]) == (
        "203.0.113.9",
        PEER,
        8080,
    )
    assert len(rows) == 2

    def ports(**fields):
        return [row["own_port"] for row in ask.rows(Who(**fields, **around(1)))]

    assert ports(peer=PEER, peer_port=8080) == [6]
    assert ports(peer=PEER, own="192.0.2.1", own_port=1006) == [6]
    assert ports(peer=PEER, own="10.0.0.1") == [22]
    assert ports(peer=PEER, own_port=22) == [22]
    assert ports(peer="", own="192.0.2.1") == [6]
    assert ports(peer=PEER, peer_port=80) == []


@pytest.mark.parametrize("few", [hits.FEW, -1])
def test_who_gives_icmp_no_ports_but_what_it_asks(opened, ask, monkeypatch, few):
    monkeypatch.setattr(hits, "FEW", few)
    icmp = {"proto": 1, "sport": 77, "nsport": 78, "dport": 8 << 8, "ndport": 8 << 8}
    put(opened, flow("10.0.0.1", PEER, **icmp, oxid=7, opackets=1),
        flow(PEER, "10.0.0.1", **icmp, rxid=8, rpackets=1))  # fmt: skip
    rows = ask.rows(Who(peer=PEER, **around(0)))
    assert {row["side"] for row in rows} == {"originator", "responder"}
    for row in rows:
        assert of(row, "own_port", "peer_port", "own_seen", "own_seen_port") == (None,) * 4
        assert of(row, "icmp_type", "icmp_code", "icmp_id") == (8, 0, 77)
        shown = shapes.WHO.cells(shapes.WHO.made([*row], [*row.values()]))
        pinged = {"originator": f"10.0.0.1 -> {PEER} type 8/0 id 77",
                  "responder": f"10.0.0.1 type 8/0 id 77 <- {PEER}"}  # fmt: skip
        assert pinged[row["side"]] in shown


def test_who_finds_ipv6_peers_and_networks(opened, ask):
    put(opened, flow("2001:db8::1", "2001:db8:1::2", oxid=7, start=1, end=2, opackets=1))
    for peer in ("2001:db8:1::2", "2001:db8:1::/48"):
        assert [row["slice"] for row in ask.rows(Who(peer=peer, **around(1)))] == ["a"]
    assert ask.rows(Who(peer="2001:db8:1::3", **around(1))) == []


def test_who_puts_what_fits_best_first(opened, ask):
    put(
        opened,
        flow("10.0.0.1", PEER, sport=1, oxid=7, start=430, end=440, opackets=1),
        flow("10.0.0.1", PEER, sport=2, oxid=0, start=490, end=520, opackets=9, obytes=999),
        flow("10.0.0.1", PEER, sport=3, oxid=7, start=490, end=520, rpackets=1),
        flow("10.0.0.1", PEER, sport=4, oxid=8, start=500, end=510, opackets=1, obytes=10),
        flow("10.0.0.1", PEER, sport=5, oxid=8, start=500, end=510, opackets=1, obytes=20),
    )
    rows = ask.rows(Who(peer=PEER, **around(505)))
    assert [row["own_port"] for row in rows] == [5, 4, 3, 2, 1]
    assert [row["confidence"] for row in rows] == [
        "socket",
        "socket",
        "connection",
        "none",
        "socket",
    ]
    assert [row["away"] // SEC for row in rows] == [0, 0, 0, 0, 65]
    _, rows, trailer = ask.all(Who(peer=PEER, limit=2, **around(505)))
    assert [row["own_port"] for row in rows] == [5, 4]
    assert trailer.more


def test_who_adds_up_the_shares_of_a_connection_and_tells_a_change_of_owner(opened, ask):
    put(
        opened,
        flow("10.0.0.1", PEER, sport=1, oxid=7, flow_id=1, reason=3, start=0, end=60, opackets=5),
        flow(
            "10.0.0.1", PEER, sport=1, oxid=7, flow_id=1, start=60, end=90, flow_start=0, opackets=6
        ),
        flow("10.0.0.1", PEER, sport=2, oxid=7, flow_id=2, reason=4, start=0, end=50, opackets=1),
        flow(
            "10.0.0.1", PEER, sport=2, oxid=8, flow_id=2, start=50, end=70, flow_start=0, opackets=1
        ),
    )
    rows = ask.rows(Who(peer=PEER, **around(55)))
    told = {(row["own_port"], row["slice"]): row for row in rows}
    assert told[1, "a"]["sent_packets"] == 11
    assert told[1, "a"]["confidence"] == "socket"
    assert told[2, "a"]["confidence"] == told[2, "b"]["confidence"] == "changed"
    assert len(rows) == 3


@pytest.mark.parametrize("few", [hits.FEW, -1])
def test_who_blames_no_side_for_a_change_of_the_other_sides_owner(opened, ask, monkeypatch, few):
    monkeypatch.setattr(hits, "FEW", few)
    ends = {"src": "10.0.0.1", "dst": "192.0.2.1", "opackets": 1, "rpackets": 1}
    put(
        opened,
        flow(**ends, oxid=7, rxid=8, reason=4, start=0, end=10.0001),
        flow(**ends, oxid=7, rxid=9, reason=2, start=10.0001, end=20, flow_start=0),
    )

    def told(peer, at, skew, scope=access.ALL):
        rows = ask.rows(Who(peer=peer, **around(at, skew)), scope)
        return [(row["xid"], row["confidence"]) for row in rows]

    assert told("192.0.2.1", 10, 120) == [(7, "socket")] * 2
    assert sorted(told("10.0.0.1", 10, 120)) == [(8, "changed"), (9, "changed")]
    assert told("192.0.2.1", 5, 1) == [(7, "changed")]  # what came after is not known
    assert told("192.0.2.1", 10, 120, OWN_A) == [(7, "socket")]
    assert told("192.0.2.1", 5, 1, OWN_A) == [(7, "socket")]
    handed = Flows(filter=Filter(expression="reason owner"))
    assert len(ask.rows(handed)) == 1
    assert ask.rows(handed, OWN_A) == []
    assert [row["reason"] for row in ask.rows(handed, access.Scope(frozenset("ab")))] == [4]


@pytest.mark.parametrize("few", [hits.FEW, -1])
def test_who_tells_of_an_owner_in_between_who_is_not_asked_for(opened, ask, monkeypatch, few):
    monkeypatch.setattr(hits, "FEW", few)
    put(
        opened,
        flow("10.0.0.1", PEER, oxid=7, reason=4, start=0, end=10, opackets=1),
        flow("10.0.0.1", PEER, oxid=8, reason=4, start=10, end=20, flow_start=0, opackets=1),
        flow("10.0.0.1", PEER, oxid=7, reason=2, start=20, end=30, flow_start=0, opackets=1),
    )
    for which in ({}, {"slices": ["a"]}):
        rows = ask.rows(Who(peer=PEER, **around(5, **which)))
        assert {row["confidence"] for row in rows} == {"changed"}


def test_who_says_why_a_flow_is_nobodys(opened, ask):
    put(
        opened,
        flow("10.0.0.1", PEER, sport=1, start=1, end=2, opackets=1),
        flow("172.16.0.1", PEER, sport=2, start=1, end=2, opackets=1),
        flow("172.16.0.1", PEER, sport=3, start=1, end=2, opackets=1, nsrc="192.0.2.1"),
        flow("10.0.0.1", PEER, sport=4, start=-202, end=-201, opackets=1),
        flow("10.0.0.1", PEER, sport=5, oxid=99, start=1, end=2, opackets=1),
    )
    rows = {row["own_port"]: row for row in ask.rows(Who(peer=PEER, **around(0, 300)))}
    assert {rows[n]["confidence"] for n in (1, 2, 3, 4)} == {"none"}
    assert "node itself" in rows[1]["why"]
    assert "passing through" in rows[2]["why"]
    assert "node itself" in rows[3]["why"]
    assert "no slice was registered" in rows[4]["why"]
    assert rows[5]["xid"] == 99
    assert "nobody who held" in rows[5]["why"]


def test_who_without_a_match_says_what_is_near(opened, ask):
    put(opened, flow("10.0.0.1", PEER, sport=1, oxid=7, start=800, end=810, opackets=1))
    _, rows, trailer = ask.all(Who(peer=PEER, peer_port=80, **around(200)))
    assert rows == []
    assert any("600 s later" in note and "--skew 10m" in note for note in trailer.notes)
    _, _, trailer = ask.all(Who(peer=PEER, peer_port=81, **around(800)))
    assert any("none within 1 h" in note for note in trailer.notes)
    assert any("other ports" in note for note in trailer.notes)
    _, _, trailer = ask.all(Who(peer="198.51.100.99", **around(-AGO)))
    assert any("a gap touches" in note for note in trailer.notes)


def test_who_shows_a_slices_own_user_nothing_of_others(opened, ask):
    put(
        opened,
        flow("10.0.0.1", PEER, sport=1, oxid=8, start=1, end=2, opackets=1),
        flow("10.0.0.1", PEER, sport=2, start=1, end=2, opackets=1),
        flow("10.0.0.1", "192.0.2.1", sport=3, oxid=7, rxid=8, start=1, end=2, opackets=1),
    )
    assert ask.rows(Who(peer=PEER, **around(1)), OWN_A) == []
    [row] = ask.rows(Who(peer="192.0.2.1", **around(1)), OWN_A)
    assert (row["slice"], row["peer_slice"], row["peer_xid"]) == ("a", None, None)
    [row] = ask.rows(Who(peer="10.0.0.1", **around(1)), OWN_A)
    assert (row["slice"], row["xid"], row["since"], row["until"], row["peer_slice"]) == (
        None, None, None, None, "a",
    )  # fmt: skip
    assert ask.rows(Who(peer="192.0.2.1", **around(1, slices=["b"])), OWN_A) == []
