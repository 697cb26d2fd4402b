"""``scans`` and ``spoofed``: what an abuse desk looks for."""

import json
from importlib import import_module

import pytest
from questionbed import OWN_A, PEER, asked
from storebed import SEC, T0, flow, put

from netflow.wire import Filter, Scans, Spoofed

pytestmark = pytest.mark.unit


@pytest.fixture
def ask(tmp_path, monkeypatch):
    with asked(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def opened(ask):
    return ask.store


def probes(opened, count, **given):
    """SYNs from slice a that nobody answers: one host each, unless told otherwise."""
    where = given.pop("where", lambda n: {"dst": f"198.51.{n // 250}.{n % 250 + 1}"})
    put(opened, *(
        flow("10.0.0.1", sport=1000 + n, start=n, end=n + 0.5,
             **{"oxid": 7, "opackets": 1, "obytes": 60} | where(n) | given)
        for n in range(count)
    ))  # fmt: skip


def test_a_scan_of_hosts_is_told_from_one_of_ports(opened, ask):
    probes(opened, 60, dport=22)
    probes(opened, 70, where=lambda n: {"dst": PEER, "dport": 1000 + n, "rpackets": 1})
    rows = ask.rows(Scans(filter=Filter()))
    assert [(r["slice"], r["kind"], r["proto"], r["port"], r["host"], r["most"]) for r in rows] == [
        ("a", "ports", None, None, PEER, 70), ("a", "hosts", 6, 22, None, 60)
    ]  # fmt: skip
    assert [(row["tries"], row["answered"], row["windows"]) for row in rows] == [
        (70, 70, 1), (60, 0, 1)
    ]  # fmt: skip
    assert (rows[1]["first"], rows[1]["last"]) == (T0, T0 + int(59.5 * SEC))


def test_what_is_answered_or_long_or_narrow_is_no_scan(opened, ask):
    probes(opened, 200, proto=17, dport=53, rpackets=1)
    probes(opened, 200, opackets=5, rpackets=4)
    probes(opened, 49, dport=22)
    probes(opened, 300, where=lambda n: {"dst": PEER, "dport": 25})
    assert ask.rows(Scans(filter=Filter())) == []
    assert [row["port"] for row in ask.rows(Scans(filter=Filter(), hosts=49))] == [22]
    assert [row["port"] for row in ask.rows(Scans(filter=Filter(), packets=5))] == [80]


def test_a_slow_scan_is_one_only_in_a_window_that_is_long_enough(opened, ask):
    probes(opened, 60, dport=23)
    assert ask.rows(Scans(filter=Filter(), window=10 * SEC)) == []
    [row] = ask.rows(Scans(filter=Filter(), window=10 * SEC, hosts=10))
    assert (row["windows"], row["most"], row["tries"]) == (6, 10, 60)


@pytest.mark.parametrize("bad", [{"hosts": 0}, {"ports": 0}, {"window": 0}, {"packets": -1}])
def test_scans_refuse_thresholds_that_mean_nothing(ask, bad):
    with pytest.raises(ValueError, match="or more"):
        ask.rows(Scans(filter=Filter(), **bad))


def test_scans_show_a_slices_own_user_its_own_only(opened, ask):
    probes(opened, 60, dport=22)
    probes(opened, 60, dport=23, oxid=8)
    probes(opened, 60, dport=24, oxid=8, rxid=7)
    assert [row["port"] for row in ask.rows(Scans(filter=Filter()), OWN_A)] == [22]
    assert len(ask.rows(Scans(filter=Filter()))) == 3


# -- spoofed --------------------------------------------------------------------------------


def event(at, **given):
    from netflow.when import iso

    line = {"time": iso(T0 + at * SEC), "kind": "spoof", "refused": True, "slice": "a", "xid": 7,
            "owner": None, "src": "203.0.113.1", "dst": PEER, "suppressed": 0}  # fmt: skip
    return json.dumps(line | given) + "\n"


def test_spoofed_sums_the_guards_events_and_flows_from_foreign_addresses(opened, ask, tmp_path):
    ask.known.registry = tmp_path / "registry.db"
    (tmp_path / "events.jsonl").write_text(
        event(1) + event(2, suppressed=5) + event(3, slice="b", xid=8, kind="mark", owner="a")
        + event(4, kind="raw") + event(99999)
    )  # fmt: skip
    put(
        opened,
        flow("203.0.113.77", PEER, oxid=7, start=10, end=11, opackets=2, obytes=120),
        flow("172.17.0.2", PEER, oxid=8, start=10, end=11, nsrc="192.0.2.1"),  # a container's
        flow("10.0.0.1", PEER, oxid=7, start=10, end=11),
    )
    header, rows, _ = ask.all(Spoofed(filter=Filter()))
    told = [(r["what"], r["slice"], r["src"], r["owner"], r["count"], r["refused"]) for r in rows]
    assert told == [
        ("foreign-source", "a", "203.0.113.77", None, 1, False),
        ("mark", "b", "203.0.113.1", "a", 1, True),
        ("spoof", "a", "203.0.113.1", None, 7, True),
    ]
    assert (rows[2]["first"], rows[2]["last"]) == (T0 + SEC, T0 + 2 * SEC)
    assert "no-events" not in [gap.what for gap in header.gaps]
    assert [r["what"] for r in ask.rows(Spoofed(filter=Filter(slices=["b"])))] == ["mark"]


def test_spoofed_sums_up_the_oldest_of_too_many_sources(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("netflow.questions.spoofed"), "TOLD_APART", 3)
    ask.known.registry = tmp_path / "registry.db"
    sources = [f"203.0.113.{n}" for n in (1, 2, 3, 1, 4, 5, 6, 7, 7)]
    log = [event(n, src=src, dst=f"198.51.100.{n}") for n, src in enumerate(sources)]
    (tmp_path / "events.jsonl").write_text("".join(log))
    _, rows, trailer = ask.all(Spoofed(filter=Filter()))
    assert [(row["src"], row["count"]) for row in rows] == [
        ("203.0.113.7", 2), ("203.0.113.6", 1), ("203.0.113.5", 1), (None, 5)
    ]  # fmt: skip
    rest = rows[-1]
    assert (rest["first"], rest["last"], rest["dst"]) == (T0, T0 + 4 * SEC, "198.51.100.4")
    assert "sources are told apart" in trailer.notes[0]
    assert ask.all(Spoofed(filter=Filter(since=T0 + 5 * SEC)))[2].notes == []


def test_spoofed_leaves_out_events_that_cannot_answer_the_filter(ask, tmp_path):
    ask.known.registry = tmp_path / "registry.db"
    (tmp_path / "events.jsonl").write_text(event(1) + event(2, slice="b", xid=8))
    here = ask.store.node.name

    def told(**which):
        _, rows, trailer = ask.all(Spoofed(filter=Filter(**which)))
        return "".join(sorted(row["slice"] for row in rows)), len(trailer.notes)

    assert told() == told(expression="any") == told(nodes=[here]) == ("ab", 0)
    for which in (
        {"slices": ["a"]}, {"xids": [7]}, {"slices": ["a"], "side": "originator"},
        {"expression": "slice a"}, {"expression": "src xid 7"},
        {"expression": f"slice a and node '{here}'"}, {"slices": ["a"], "nodes": [here, "other"]},
    ):  # fmt: skip
        assert told(**which) == ("a", 0), which
    assert told(expression="slice a or slice b") == ("ab", 0)
    assert told(slices=["a"], xids=[8]) == ("", 0)
    for which in (
        {"expression": "src ip 203.0.113.1 and slice a"}, {"expression": "not slice b"},
        {"expression": "slice a*"}, {"slices": ["a"], "side": "responder"}, {"nodes": ["other"]},
        {"expression": "dst slice a"}, {"src": ["203.0.113.1"]}, {"proto": [6]},
        {"slices": ["a"], "expression": "slice b"}, {"expression": "node other"},
    ):  # fmt: skip
        assert told(**which) == ("", 1), which


def test_spoofed_says_how_far_back_the_guards_log_goes(opened, ask, tmp_path):
    assert ask.all(Spoofed(filter=Filter()))[0].gaps[-1].what == "no-events"
    ask.known.registry = tmp_path / "registry.db"
    (tmp_path / "events.jsonl.1").write_text(event(50))
    (tmp_path / "events.jsonl").write_text(event(60))
    gap = ask.all(Spoofed(filter=Filter(since=T0)))[0].gaps[-1]
    assert (gap.what, gap.since, gap.until) == ("no-events", T0, T0 + 50 * SEC)
    header, _, _ = ask.all(Spoofed(filter=Filter(since=T0 + 55 * SEC)))
    assert "no-events" not in [g.what for g in header.gaps]


def test_spoofed_shows_a_slices_own_user_its_own_only(opened, ask, tmp_path):
    ask.known.registry = tmp_path / "registry.db"
    (tmp_path / "events.jsonl").write_text(
        event(1) + event(2, kind="mark", owner="b") + event(3, slice="b", xid=8, owner="a")
    )
    put(opened, flow("203.0.113.77", PEER, oxid=8, opackets=2, obytes=120))
    rows = ask.rows(Spoofed(filter=Filter()), OWN_A)
    assert {(row["what"], row["slice"], row["owner"]) for row in rows} == {
        ("spoof", "a", None), ("mark", "a", None)
    }  # fmt: skip
