"""The store, and what is asked of it: real DuckDB files, no collector."""

import socket
import threading
from contextlib import ExitStack, closing, suppress
from functools import partial

import duckdb
import numpy as np
import pytest
from storebed import SEC, T0, addr, archiver_of, flow, put, tenures
from vnet.testing.poll import until

from netflow import access, history, names, questions, store, writer
from netflow.history import archive
from netflow.wire import Filter, Flows, Header, Top, Trailer

pytestmark = pytest.mark.unit


@pytest.fixture
def opened(tmp_path):
    kept = store.open_store(tmp_path)
    store.begin_run(kept, store.Mark(T0))
    yield kept
    kept.con.close()


@pytest.fixture
def asked(opened, monkeypatch):
    """Ask as a client would; returns (header, rows as dicts, trailer)."""
    monkeypatch.setattr(names, "tenures", lambda known, now: known.params)

    def run(question, known=None, now=T0 + 1000 * SEC, scope=access.ALL):
        lines = []
        answer = questions.ANSWERS[type(question)]
        period = questions.period(opened.con, question.filter, now, now)
        answer(opened.con, question, known or tenures(), period, scope, lines.append)
        header, *rows, trailer = lines
        assert isinstance(header, Header)
        assert isinstance(trailer, Trailer)
        return header, [dict(zip(header.columns, row, strict=True)) for row in rows], trailer

    return run


def found(asked, known=None, **fields):
    """The source ports of the records that match, in order."""
    _, rows, _ = asked(Flows(filter=Filter(**fields)), known)
    return [row["sport"] for row in rows]


def test_a_record_comes_back_as_it_was_written(opened, asked):
    put(
        opened,
        flow("fe80::1", "ff02::fb", proto=17, sport=5353, dport=5353, oxid=512, rxid=65535,
             opackets=2**63, obytes=2**64 - 1, rpackets=3, rbytes=4, flow_id=2**32 - 1, zone=9,
             reason=3, tcp_state=7, start=1.000000001, end=2.5, flow_start=0.5),
    )  # fmt: skip
    _, [row], trailer = asked(Flows(filter=Filter()))
    assert row["src"] == "fe80::1"
    assert row["dst"] == "ff02::fb"
    assert (row["opackets"], row["obytes"]) == (2**63, 2**64 - 1)
    assert (row["oxid"], row["rxid"], row["flow_id"], row["zone"]) == (512, 65535, 2**32 - 1, 9)
    assert row["start"] == T0 + int(1.000000001 * SEC)
    assert row["flow_start"] == T0 + SEC // 2
    assert (row["reason"], row["tcp_state"], row["oslice"]) == (3, 7, None)
    assert (trailer.rows, trailer.more) == (1, False)


def test_addresses_match_networks_of_both_families_and_translated_ones(opened, asked):
    put(
        opened,
        flow("10.0.0.1", "192.0.2.1", sport=1),
        flow("10.0.1.1", "192.0.2.9", sport=2, start=1, nsrc="203.0.113.7"),
        flow("2001:db8::1", "2001:db8:1::1", sport=3, start=2, end=3),
        flow("10.0.2.1", "203.0.113.7", sport=4, start=3, end=4, ndst="10.9.9.9"),
    )
    assert found(asked, src=["10.0.0.0/24"]) == [1]
    assert found(asked, src=["10.0.0.0/23", "2001:db8::/64"]) == [1, 2, 3]
    assert found(asked, src=["203.0.113.7"]) == [2]
    assert found(asked, dst=["10.9.9.9"]) == [4]
    assert found(asked, addr=["203.0.113.7"]) == [2, 4]
    assert found(asked, dst=["2001:db8:1::/48"]) == [3]
    assert found(asked, addr=["0.0.0.0/0"]) == [1, 2, 4]
    assert found(asked, addr=["198.51.100.1"]) == []


def test_ports_and_protocols_match_and_icmp_has_no_ports(opened, asked):
    put(
        opened,
        flow(sport=1, dport=53, proto=17),
        flow(sport=2, dport=53, start=1, ndport=5353),
        flow(sport=53, dport=8 << 8, proto=1, start=2, end=3),
    )
    assert found(asked, dport=[53]) == [1, 2]
    assert found(asked, port=[5353]) == [2]
    assert found(asked, sport=[53]) == []
    assert found(asked, port=[53], proto=[17]) == [1]
    assert found(asked, proto=[1]) == [53]
    assert found(asked, proto=[1, 6]) == [2, 53]


def test_a_period_matches_what_overlaps_it(opened, asked):
    put(opened, flow(sport=1, start=0, end=10), flow(sport=2, start=20, end=30))
    assert found(asked, since=T0 + 10 * SEC, until=T0 + 20 * SEC) == [1, 2]
    assert found(asked, since=T0 + 11 * SEC, until=T0 + 19 * SEC) == []
    assert found(asked, since=T0 + 11 * SEC) == [2]
    assert found(asked, until=T0 + 5 * SEC) == [1]


def test_a_limit_keeps_the_newest_and_says_that_there_were_more(opened, asked):
    put(opened, *(flow(sport=n, start=n, end=n + 1) for n in range(1, 6)))
    _, rows, trailer = asked(Flows(filter=Filter(), limit=2))
    assert [row["sport"] for row in rows] == [4, 5]
    assert trailer.more
    assert trailer.rows == 2
    _, rows, trailer = asked(Flows(filter=Filter(), limit=5))
    assert len(rows) == 5
    assert not trailer.more


def test_a_record_is_named_by_who_held_the_xid_at_its_time(opened, asked):
    put(
        opened,
        flow(sport=1, start=0, end=1, oxid=7),  # before anyone
        flow(sport=2, start=9, end=11, oxid=7),  # began before the tenure
        flow(sport=3, start=15, end=16, rxid=7),
        flow(sport=4, start=19, end=500, oxid=7),  # ended long after it
        flow(sport=5, start=20, end=21, oxid=7),  # nobody's
        flow(sport=6, start=31, end=40, oxid=7, rxid=8),
    )
    known = tenures((7, "old", 10, 20), (7, "new", 30, None), (8, "old", 30, None))
    _, rows, _ = asked(Flows(filter=Filter()), known)
    assert [(r["sport"], r["oslice"], r["rslice"]) for r in rows] == [
        (1, None, None), (2, "old", None), (3, None, "old"), (4, "old", None),
        (5, None, None), (6, "new", "old"),
    ]  # fmt: skip
    assert found(asked, known, slices=["old"]) == [2, 3, 4, 6]
    assert found(asked, known, slices=["old"], side="originator") == [2, 4]
    assert found(asked, known, slices=["new"]) == [6]
    assert found(asked, known, slices=["new", "old"], side="responder") == [3, 6]
    assert found(asked, known, slices=["other"]) == []
    assert found(asked, known, xids=[7], side="responder") == [3]


def test_text_in_a_question_is_never_sql(opened, asked):
    put(opened, flow(sport=1, oxid=7))
    hostile = "x' OR true; DROP TABLE flows; --"
    assert found(asked, slices=[hostile]) == []
    with pytest.raises(ValueError, match="not an address"):
        found(asked, addr=[hostile])
    assert found(asked) == [1]


@pytest.mark.parametrize(
    "fields",
    [
        {"port": [65536]}, {"port": [-1]}, {"xids": [70000]}, {"proto": [256]}, {"since": -1},
        {"until": 1 << 63}, {"addr": ["10.0.0.0/33"]}, {"addr": ["1"] * 1001},
        {"slices": [""] * 1001},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(asked, fields):
    with pytest.raises(ValueError):
        found(asked, **fields)


def test_top_sums_by_slice_both_ways_and_counts_the_total_once(opened, asked):
    put(
        opened,
        flow(oxid=7, flow_id=1, opackets=1, obytes=100, rpackets=2, rbytes=1000),
        flow(rxid=7, flow_id=2, opackets=3, obytes=10, rpackets=4, rbytes=20),
        flow(oxid=7, rxid=8, flow_id=3, reason=3, opackets=5, obytes=5000, rpackets=6, rbytes=1),
        flow(oxid=7, rxid=8, flow_id=3, opackets=1, obytes=1, start=1, end=2, flow_start=0),
        flow(flow_id=4, opackets=1, obytes=7, rbytes=8),
        flow(oxid=9, rxid=9, flow_id=5, opackets=1, obytes=30, rpackets=1, rbytes=40),
    )
    known = tenures((7, "a", -100, None), (8, "b", -100, None))
    _, rows, trailer = asked(Top(filter=Filter()), known)
    assert {r.pop("place") for r in rows} == {None}
    by_name = {(r.pop("slice"), r.pop("xid")): r for r in rows}
    assert by_name["a", 7] == {
        "out_bytes": 5121, "in_bytes": 1011, "out_packets": 11, "in_packets": 11, "flows": 3
    }  # fmt: skip
    assert by_name["b", 8] == {
        "out_bytes": 1, "in_bytes": 5001, "out_packets": 6, "in_packets": 6, "flows": 1
    }  # fmt: skip
    assert by_name[None, 9]["out_bytes"] == by_name[None, 9]["in_bytes"] == 70
    assert by_name[None, 9]["flows"] == 1
    assert by_name[None, 0]["out_bytes"] == 7
    assert trailer.total == {"bytes": 6217, "packets": 25, "flows": 5}
    assert [r["flows"] for r in asked(Top(filter=Filter(), by="flows", limit=1), known)[1]] == [3]


def test_top_of_nothing_is_an_answer(asked):
    _, rows, trailer = asked(Top(filter=Filter()))
    assert rows == []
    assert trailer.total == {"bytes": 0, "packets": 0, "flows": 0}


def gaps_in(kept, since, until, now=1000):
    found = store.gaps(kept.con, T0 + since * SEC, T0 + until * SEC, T0 + now * SEC)
    return [(g.what, (g.since - T0) // SEC, (g.until - T0) // SEC, g.events) for g in found]


def test_time_without_a_collector_is_a_gap_for_the_answers_it_touches(tmp_path):
    kept = store.open_store(tmp_path / "s")
    assert store.begin_run(kept, store.Mark(T0 + 10 * SEC)) is None
    store.commit(kept, None, store.Mark(T0 + 20 * SEC))
    kept.con.close()
    kept = store.open_store(tmp_path / "s")
    assert store.begin_run(kept, store.Mark(T0 + 30 * SEC)).until == T0 + 20 * SEC
    assert gaps_in(kept, 0, 40) == [("before-first", 0, 10, 0), ("not-running", 20, 30, 0)]
    assert gaps_in(kept, 11, 19) == []
    assert gaps_in(kept, 31, 40) == []
    assert gaps_in(kept, 25, 26) == [("not-running", 20, 30, 0)]
    kept.con.close()


def test_a_loss_is_told_with_the_answers_it_touches(opened):
    loss = store.open_loss(opened, T0 + 100 * SEC, "overrun", 5)
    assert gaps_in(opened, 150, 160, now=200) == [("overrun", 100, 200, 5)]
    store.close_loss(opened, loss, T0 + 110 * SEC, 12)
    assert gaps_in(opened, 105, 106) == [("overrun", 100, 110, 12)]
    assert gaps_in(opened, 111, 200) == []
    assert gaps_in(opened, 20, 99) == []


def test_a_loss_that_a_killed_collector_left_open_ends_with_it(tmp_path):
    kept = store.open_store(tmp_path / "s")
    store.begin_run(kept, store.Mark(T0))
    store.commit(kept, None, store.Mark(T0 + 20 * SEC))
    store.open_loss(kept, T0 + 10 * SEC, "overrun", 5)
    kept.con.close()
    kept = store.open_store(tmp_path / "s")
    store.begin_run(kept, store.Mark(T0 + 30 * SEC))
    assert gaps_in(kept, 0, 15) == [("overrun", 10, 20, 5)]
    kept.con.close()


LIVE = {"start": "u8", "id": "u4", "zone": "u2", "proto": "u1", "sport": "u2", "dport": "u2",
        "src_hi": "u8", "src_lo": "u8", "dst_hi": "u8", "dst_lo": "u8"}  # fmt: skip


def live(*rows):
    """The columns a dump gives of the connections of some records."""
    named = [r | {"start": r["flow_start"], "id": r["flow_id"]} for r in rows]
    return {key: np.array([r[key] for r in named], dtype=kind) for key, kind in LIVE.items()}


def test_what_is_stored_of_live_connections_is_read_back_summed(opened):
    one = flow(flow_id=1, opackets=1, obytes=10, rpackets=2, rbytes=20, end=1)
    more = flow(flow_id=1, opackets=5, obytes=50, start=1, end=7, flow_start=0)
    other = flow(flow_id=2, opackets=9)
    put(opened, one, more, other)
    store.begin_live(opened)
    store.add_live(opened, live(one, flow(flow_id=3)), T0 + 100 * SEC)
    sums = store.recorded(opened)
    assert len(sums["flow_id"]) == 1
    assert (sums["opackets"][0], sums["obytes"][0], sums["rbytes"][0]) == (6, 60, 20)
    assert sums["end"][0] == T0 + 7 * SEC
    assert sums["flow_start"][0] == T0
    assert (sums["src_hi"][0], sums["src_lo"][0]) == addr("10.0.0.1")


def test_a_connection_without_a_kernel_start_is_found_by_its_newest_records(opened):
    old = flow(flow_id=1, opackets=1, start=0, end=1)
    new = flow(flow_id=1, opackets=2, start=50, end=51)
    put(opened, old, new)
    store.begin_live(opened)
    store.add_live(opened, live(new | {"flow_start": 0}), T0 + 100 * SEC)
    sums = store.recorded(opened)
    assert [(sums["flow_start"][0], sums["opackets"][0])] == [(T0 + 50 * SEC, 2)]


def test_a_store_of_another_version_or_kind_is_refused(tmp_path):
    kept = store.open_store(tmp_path / "s")
    kept.con.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    kept.con.close()
    with pytest.raises(store.StoreError, match="schema version 99"):
        store.open_store(tmp_path / "s")
    for name in ("text", "locks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "flows.duckdb").write_text("not a database " * 1000)
        with pytest.raises(store.DamagedError, match="cannot read"):
            store.open_store(tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(store.StoreError, match="is a file"):
        store.open_store(tmp_path / "file")


def test_the_store_is_not_for_everybody(opened):
    assert (opened.path / "flows.duckdb").stat().st_mode & 0o007 == 0


def test_small_commits_do_not_blow_the_store_up(opened):
    for n in range(300):
        put(opened, flow(sport=n, start=n, end=n + 1), caught_up=T0 + n * SEC)
    opened.con.execute("CHECKPOINT")
    assert store.size(opened) < 4 << 20


def test_a_question_that_goes_on_keeps_no_commit_waiting(tmp_path):
    kept = store.open_store(tmp_path)
    store.begin_run(kept, store.Mark(T0))
    put(kept, flow(sport=1))
    con, began, over = kept.con.cursor(), threading.Event(), threading.Event()

    def ask():
        # it would take days; and what interrupts it may meet the end of reading(), too
        with suppress(duckdb.InterruptException), history.reading(con):
            assert con.execute("SELECT count(*) FROM flows_1").fetchall() == [(1,)]
            began.set()
            con.execute(
                "SELECT sum(hash(a.range + b.range + sport)) FROM range(1000000) a,"
                " range(1000000) b, flows_1"
            ).fetchall()
        over.set()

    reader = threading.Thread(target=ask)
    reader.start()
    try:
        assert began.wait(60)
        for n in range(20):
            put(kept, flow(sport=2 + n), caught_up=T0 + (1000 + n) * SEC)
        assert not over.is_set()
        assert store.facts(kept.con)["hot"] == 21
    finally:
        until(lambda: con.interrupt() or over.is_set())
        reader.join()
        kept.con.close()


def test_of_slices_with_as_many_bytes_the_same_one_comes_first_each_time(opened, asked):
    known = tenures(*((xid, f"s{xid}", 0, None) for xid in range(300, 340)))
    put(opened, *(flow(sport=xid, oxid=xid) for xid in reversed(range(300, 340))))
    for _ in range(5):
        _, rows, _ = asked(Top(filter=Filter(), limit=0), known)
        named = [row["slice"] for row in rows if row["slice"]]
        assert named == sorted(named) and len(named) == 40


def test_an_answer_that_is_put_together_in_memory_has_a_bound_even_if_all_are_asked_for(
    opened, asked, monkeypatch
):
    monkeypatch.setattr(questions.common, "MOST", 3)
    put(opened, *(flow(dst=f"10.0.0.{n}", sport=n, dport=n) for n in range(1, 7)))
    for of, limit in (("peer", 0), ("port", 0), ("peer", 5)):
        _, rows, trailer = asked(Top(filter=Filter(), of=of, limit=limit))
        assert (len(rows), trailer.more) == (3, True), (of, limit)
    assert len(found(asked)) == 6  # rows that go as they come have none


class Full:
    """A connection whose pool is full at the next statement of a kind, as DuckDB says it."""

    def __init__(self, con, error, at="COMMIT"):
        self.con, self.errors, self.at = con, [error], at

    def __getattr__(self, name):
        return getattr(self.con, name)

    def execute(self, sql, *params):
        if sql.startswith(self.at) and self.errors:
            if self.at == "COMMIT":
                self.con.execute("ROLLBACK")
            raise self.errors.pop()
        return self.con.execute(sql, *params)


def test_questions_that_overlap_do_not_let_the_log_grow(opened):
    opened.con.execute("SET checkpoint_threshold = '100KB'")
    log = opened.path / "flows.duckdb.wal"
    batch = [flow(dst=f"10.9.{n}.1", sport=n) for n in range(100)]
    hour, longest = 3600 * SEC, 0
    with ExitStack() as last:
        for n in range(60):
            if n % 4 == 0:  # a question that begins before the one before has ended
                this = ExitStack()
                con = this.enter_context(closing(opened.con.cursor()))
                this.enter_context(history.reading(con))
                con.execute("SELECT count(*) FROM segments").fetchall()
                last.close()
                last.push(this.pop_all())
            put(opened, *batch, caught_up=T0 + n // 20 * hour)
            longest = max(longest, log.stat().st_size if log.exists() else 0)
            if n % 20 == 0:
                archive.close_segments(archiver_of(opened))
    assert longest < 400_000  # of 800,000


@pytest.mark.parametrize("what", ["pin block", "offload data block"])
def test_a_commit_waits_for_memory_that_it_lacks_at_the_last_moment(opened, asked, what):
    words = f"TransactionContext Error: Failed to commit: failed to {what} of size 64.0 KiB"
    opened.con = Full(opened.con, duckdb.TransactionException(words))
    put(opened, flow(sport=7))
    assert opened.con.errors == []
    assert found(asked) == [7]
    words = "TransactionContext Error: Failed to commit: something else"
    opened.con.errors = [duckdb.TransactionException(words)]
    with pytest.raises(duckdb.TransactionException, match="something else"):
        put(opened, flow(sport=8))
    assert found(asked) == [7]


def test_whatever_the_writer_does_waits_for_memory(opened):
    words = "failed to allocate data of size 256.0 KiB (19.0 MiB/19.0 MiB used)"
    opened.con = Full(opened.con, duckdb.OutOfMemoryException(words), "INSERT INTO losses")
    bell, ringer = socket.socketpair()
    begun = writer.start(ringer)
    job = partial(store.note_loss, opened, T0, T0 + SEC, "overrun", 3)
    writer.call(begun, job)
    writer.check(begun)
    writer.stop(begun)
    assert opened.con.errors == []
    assert [gap.events for gap in store.gaps(opened.con, T0, T0 + SEC, T0 + SEC)] == [3]
    bell.close()
    ringer.close()
