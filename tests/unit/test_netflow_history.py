"""Closed hours as files: what is in them, and that no record is ever twice or nowhere."""

import gzip
import itertools
import shutil
import threading
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import duckdb
import numpy as np
import pytest
from bench import synthetic
from storebed import SEC, T0, addr, archiver_of, columns, flow, put, tenures

from netflow import access, history, names, questions, store
from netflow.history import archive, files, manifest, retain, schema
from netflow.node import Node, this_node
from netflow.questions import hits
from netflow.wire import Filter, Flows, Series, Top, Who
from vnet import registry

pytestmark = pytest.mark.unit

HOUR = 3600
HERE = Node("here", 7)
DATA = Path(__file__).parent.parent / "data"


class Bed:
    """A store in a directory, opened and closed as a collector would, and asked."""

    def __init__(self, path, node=HERE):
        self.path, self.node = path, node
        self.known = tenures()
        self.open()

    def open(self, at=0):
        self.kept = history.open_store(self.path, self.node)
        self.before = store.begin_run(self.kept, store.Mark(T0 + int(at * SEC)))
        self.archiver = archiver_of(self.kept)

    def close(self):
        self.archiver.con.close()
        self.kept.con.close()

    def again(self, at=0):
        self.close()
        self.open(at)

    def put(self, *rows, at=0):
        put(self.kept, *rows, caught_up=T0 + int(at * SEC))

    def file(self, at):
        """Time passes; what is closed becomes files."""
        store.commit(self.kept, None, store.Mark(T0 + int(at * SEC)))
        return archive.close_segments(self.archiver)

    @property
    def root(self):
        return self.path / "history"

    def files(self):
        return sorted(str(p.relative_to(self.root)) for p in self.root.glob("*/*.parquet"))

    def ask(self, question):
        lines = []
        with closing(self.kept.con.cursor()) as con, history.reading(con):
            now = T0 + 10**6 * SEC
            period = questions.period(con, question.filter, now, now)
            answer = questions.ANSWERS[type(question)]
            answer(con, question, self.known, period, access.ALL, lines.append)
        header, *rows, trailer = lines
        return header, [dict(zip(header.columns, row, strict=True)) for row in rows], trailer

    def rows(self, **which):
        return self.ask(Flows(filter=Filter(**which)))[1]

    def ports(self, **which):
        return [row["sport"] for row in self.rows(**which)]

    def gaps(self, **which):
        return [
            (g.what, (g.since - T0) // SEC, (g.until - T0) // SEC)
            for g in self.ask(Flows(filter=Filter(**which)))[0].gaps
        ]


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(names, "tenures", lambda known, now: known.params)


@pytest.fixture
def bed(tmp_path):
    made = Bed(tmp_path / "store")
    yield made
    made.close()


FULL = flow("fe80::1", "ff02::fb", proto=17, sport=5353, dport=5354, oxid=512, rxid=65535,
            opackets=2**63, obytes=2**64 - 1, rpackets=3, rbytes=4, flow_id=2**32 - 1, zone=9,
            reason=3, tcp_state=7, start=1.25, end=2.5, flow_start=0.5,
            nsrc="fe80::2", ndst="2001:db8::1", nsport=9, ndport=10)  # fmt: skip


def test_a_record_is_the_same_from_a_file_but_for_what_is_below_a_millisecond(bed):
    bed.put(
        FULL,
        flow(sport=1, start=1.0001234, end=2.9999999, flow_id=77),
        flow(sport=2, start=3, end=4, reason=4, flow_id=78),
        flow("10.0.0.1", "10.0.0.2", sport=3, start=5, end=6, ndst="10.0.0.9"),
    )
    hot = bed.rows()
    assert bed.file(2 * HOUR) == 1
    closed = bed.rows()
    for row in hot:
        for key in ("start", "end", "flow_start"):
            row[key] -= row[key] % 1_000_000
    [one] = [row for row in hot if row["sport"] == 1]
    [nat] = [row for row in hot if row["sport"] == 3]
    one["flow_id"] = nat["flow_id"] = None  # all of a connection: nothing to tie together
    assert closed == hot
    assert bed.files() == ["2026-03-01/03-here-1.parquet"]


def test_hot_and_closed_records_answer_alike_and_each_is_counted_once(bed):
    for hour in range(4):
        bed.put(*(flow(sport=100 * hour + n, start=hour * HOUR + n, end=hour * HOUR + n + 1,
                       oxid=7, opackets=1, obytes=10, flow_id=n) for n in range(10)),
                at=hour * HOUR + 20)  # fmt: skip
    before, top = bed.ports(), bed.ask(Top(filter=Filter()))[1:]
    assert bed.file(3 * HOUR + 30) == 3
    assert bed.ports() == before
    assert bed.ask(Top(filter=Filter()))[1:] == top
    assert bed.file(9 * HOUR) == 1
    assert bed.ports() == before
    assert bed.ask(Top(filter=Filter()))[1:] == top
    at = T0 + (2 * HOUR + 5) * SEC
    assert bed.ports(since=at, until=at) == [204, 205]


def test_a_connection_that_changed_hands_within_its_first_millisecond_is_one_flow(bed):
    bed.put(flow(start=10, end=10.0003, reason=4, oxid=7, opackets=1, obytes=60),
            flow(flow_start=10, start=10.0003, end=12, oxid=8, opackets=5, obytes=600),
            at=20)  # fmt: skip

    def flows():
        asked = Filter(since=T0, until=T0 + 30 * SEC)
        totals = [bed.ask(Top(filter=asked, of=of))[-1].total["flows"] for of in ("slice", "port")]
        steps = bed.ask(Series(filter=asked))[1]
        return *totals, sum(step["begun"] for step in steps), len(bed.rows())

    assert flows() == (1, 1, 1, 2)
    bed.file(2 * HOUR)
    assert flows() == (1, 1, 1, 2)


def test_a_connection_with_a_share_in_a_file_and_one_that_is_hot_is_one_flow(bed, monkeypatch):
    """A file has whole milliseconds."""
    ends = {"src": "10.0.0.1", "flow_start": 10.0001234, "oxid": 7}
    bed.put(flow(**ends, start=10.0001234, end=12, reason=3, opackets=5), at=20)
    bed.file(2 * HOUR)
    bed.put(flow(**ends, start=12, end=2 * HOUR + 1, reason=1, opackets=3), at=2 * HOUR + 2)
    asked = Filter(since=T0, until=T0 + 3 * HOUR * SEC)
    assert bed.files() and len(bed.rows()) == 2
    assert len({row["flow_start"] for row in bed.rows()}) == 1
    for of in ("slice", "port"):
        assert bed.ask(Top(filter=asked, of=of))[-1].total["flows"] == 1
    for few in (hits.FEW, -1):  # two ways to look
        monkeypatch.setattr(hits, "FEW", few)
        [row] = bed.ask(Who(filter=asked, peer="10.0.0.2"))[1]
        assert row["sent_packets"] == 8


def test_only_files_of_the_period_and_the_node_are_read(bed):
    for hour in range(5):
        bed.put(flow(sport=hour, start=hour * HOUR, end=hour * HOUR + 1), at=hour * HOUR + 1)
    bed.put(flow(sport=9, start=10, end=4 * HOUR + 30), at=4 * HOUR + 30)
    bed.file(6 * HOUR)
    con = bed.kept.con

    def read(since=None, until=None, nodes=None):
        bounds = [None if t is None else T0 + int(t * SEC) for t in (since, until)]
        return history.source(con, *bounds, nodes).files

    assert read() == 5
    assert read(since=HOUR, until=HOUR + 60) == 2  # the hour's, and that of the long record
    assert read(until=5) == 1
    assert read(since=4 * HOUR + 100) == 0
    assert read(nodes=["elsewhere"]) == 0
    assert bed.ports(since=T0 + HOUR * SEC, until=T0 + (HOUR + 60) * SEC) == [9, 1]


def test_the_database_does_not_grow_with_every_hour_that_becomes_a_file(bed):
    database, sizes = bed.path / "flows.duckdb", []
    mix = np.random.default_rng(1)
    for hour in range(3):
        # So many at once go past DuckDB's log, which then never asks for a checkpoint.
        store.commit(
            bed.kept,
            synthetic.mixed(mix, 123_000, T0 // SEC // HOUR + hour),
            store.Mark(T0 + hour * HOUR * SEC),
        )
        assert bed.file((hour + 1) * HOUR) == 1
        assert archive.tidy(bed.archiver)
        sizes.append(database.stat().st_size)
    assert sizes[-1] < 1.3 * sizes[0]


def test_a_question_that_goes_on_only_puts_tidying_off(bed):
    bed.put(flow(), at=1)
    assert bed.file(2 * HOUR) == 1
    with closing(bed.kept.con.cursor()) as con, history.reading(con):
        con.execute("SELECT count(*) FROM files")
        archive.tidy(bed.archiver)
        assert con.execute("SELECT count(*) FROM files").fetchall() == [(1,)]
        bed.put(flow(sport=2), at=2 * HOUR)
    assert archive.tidy(bed.archiver)
    assert sorted(bed.ports()) == [2, 1000]


def test_a_full_segment_is_closed_before_its_hour_is_over(bed, monkeypatch):
    monkeypatch.setattr(store.segments, "SEGMENT_ROWS", 3)
    for n in range(8):
        bed.put(flow(sport=n, start=n, end=n + 1), at=n + 1)
    assert bed.file(9) == 2
    assert len(bed.files()) == 2
    assert bed.ports() == list(range(8))


def test_an_idle_hours_segment_becomes_a_file_once_the_collector_has_come_past_it(bed):
    bed.put(flow(sport=1), at=1)
    assert bed.file(100) == 0
    assert bed.file(HOUR) == 1
    assert bed.file(2 * HOUR) == 0
    bed.put(flow(sport=2, start=2 * HOUR, end=2 * HOUR + 1), at=2 * HOUR + 1)
    assert bed.ports() == [1, 2]


def test_a_restart_goes_on_with_the_hours_segment(bed):
    bed.put(flow(sport=1), at=1)
    bed.again(at=2)
    bed.put(flow(sport=2), at=3)
    assert bed.file(HOUR) == 1
    assert sorted(bed.ports()) == [1, 2]


def test_records_keep_the_name_that_the_node_had(tmp_path):
    bed = Bed(tmp_path, Node("old", 1))
    bed.put(flow(sport=1), at=1)
    bed.node = Node("new", 2)
    bed.again(at=2)
    bed.put(flow(sport=2, start=2, end=3), at=3)
    bed.known = tenures((7, "a", -100, None))
    assert [r["node"] for r in bed.rows()] == ["old", "new"]
    bed.file(HOUR)
    assert bed.ports(nodes=["old"]) == [1]
    assert bed.ports(nodes=["new"]) == [2]
    bed.close()


class Crash(BaseException):
    """The process ends here."""


STEPS = [(files, "put"), (files, "sync"), (manifest, "add"), (archive, "_tell"), (Path, "rename")]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", range(len(STEPS) + 1))
def test_a_crash_at_any_step_leaves_each_record_once(bed, monkeypatch, step, after):
    bed.put(*(flow(sport=n, reason=3, flow_id=n, opackets=1) for n in range(50)), at=1)
    crashed = SimpleNamespace(path=bed.path.parent / "crashed")

    def crash(*given, **also):
        if after:
            real(*given, **also)
        # What a process that ends here leaves: the files as they are.
        shutil.copytree(bed.path, crashed.path)
        raise Crash

    if step < len(STEPS):
        where, name = STEPS[step]
        real = getattr(where, name)
        monkeypatch.setattr(where, name, crash)
        with pytest.raises(Crash):
            bed.file(HOUR)
        monkeypatch.setattr(where, name, real)
    else:
        bed.file(HOUR)
        shutil.copytree(bed.path, crashed.path)
    found = Bed(crashed.path)
    try:
        assert sorted(found.ports()) == list(range(50))
        assert found.file(2 * HOUR) == (step < len(STEPS))
        assert sorted(found.ports()) == list(range(50))
        assert len(found.files()) == 1
        assert not list(files.drafts(found.root))
    finally:
        found.close()
    assert bed.file(2 * HOUR) == (step < len(STEPS))
    assert sorted(bed.ports()) == list(range(50))
    assert len(bed.files()) == 1


def test_a_question_that_goes_on_while_a_file_is_made_sees_each_record_once(bed):
    bed.put(*(flow(sport=n) for n in range(5)), at=1)
    with closing(bed.kept.con.cursor()) as reader, history.reading(reader):
        records = history.source(reader)
        assert bed.file(HOUR) == 1
        bed.put(flow(sport=9), at=HOUR + 1)
        rows = reader.execute(f"SELECT sport FROM ({records.sql})", records.params).fetchall()
        assert sorted(rows) == [(n,) for n in range(5)]
    assert sorted(bed.ports()) == [0, 1, 2, 3, 4, 9]


LIVE = {"start": "u8", "id": "u4", "zone": "u2", "proto": "u1", "sport": "u2", "dport": "u2",
        "src_hi": "u8", "src_lo": "u8", "dst_hi": "u8", "dst_lo": "u8"}  # fmt: skip


def live(*rows):
    named = [r | {"start": r["flow_start"], "id": r["flow_id"]} for r in rows]
    return {key: np.array([r[key] for r in named], dtype=kind) for key, kind in LIVE.items()}


def sums(kept, *rows, whole=False):
    store.begin_live(kept)
    store.add_live(kept, live(*rows), 1 << 62)
    found = store.recorded(kept)
    store.end_live(kept, whole)
    return dict(zip(found["flow_id"].tolist(), found["opackets"].tolist(), strict=True)), found


def test_what_is_stored_of_a_live_connection_is_known_though_it_went_to_files(bed):
    goes_on = flow(flow_id=1, reason=3, opackets=1, oxid=7)
    for hour in range(3):
        bed.put(goes_on | {"opackets": hour + 1, "start": T0 + hour * HOUR * SEC,
                           "end": T0 + (hour * HOUR + 9) * SEC},
                flow(flow_id=100 + hour), at=hour * HOUR + 10)  # fmt: skip
    ended = [flow(flow_id=2, reason=3, opackets=5), flow(flow_id=2, opackets=7, start=1, end=2)]
    bed.put(ended[0] | {"end": T0 + (2 * HOUR + 5) * SEC}, at=2 * HOUR + 20)
    bed.file(2 * HOUR + 30)
    assert sums(bed.kept, goes_on, ended[0])[0] == {1: 6, 2: 5}
    bed.put(ended[1] | {"flow_start": ended[0]["flow_start"]}, at=3 * HOUR)
    bed.file(5 * HOUR)
    assert len(bed.files()) == 4
    assert sums(bed.kept, goes_on, ended[0])[0] == {1: 6}
    found = sums(bed.kept, goes_on, whole=True)[1]
    assert found["end"].tolist() == [T0 + (2 * HOUR + 9) * SEC]
    assert found["reason"].tolist() == [3]
    assert sums(bed.kept, whole=True)[0] == {}
    assert sums(bed.kept, goes_on)[0] == {}  # it was not in a whole list


def test_connections_that_were_open_and_live_no_more_are_told(bed):
    a, b, c, d = (flow(flow_id=n, sport=n, reason=3, opackets=n, oxid=n) for n in range(1, 5))
    bed.put(a, b, c, flow(flow_id=9, sport=9), at=1)
    bed.file(HOUR)
    bed.put(b | {"reason": 2, "end": b["end"] + HOUR * SEC}, d, at=HOUR + 5)
    store.begin_live(bed.kept)
    store.add_live(bed.kept, live(c), 1 << 62)
    found = store.unfinished(bed.kept)
    assert sorted(zip(found["flow_id"].tolist(), found["opackets"].tolist(),
                      found["oxid"].tolist(), strict=True)) == [(1, 1, 1), (4, 4, 4)]  # fmt: skip


def ruin(path):
    """Overwrite a database in the middle, as a bad disk would."""
    database = path / "flows.duckdb"
    database.write_bytes(b"\0" * database.stat().st_size)


@pytest.mark.parametrize("how", ["gone", "ruined"])
def test_a_lost_database_is_set_aside_and_the_files_are_listed_again(bed, how):
    goes_on = flow(flow_id=1, reason=3, opackets=5, start=1.0005, end=9)
    bed.put(goes_on, flow(sport=2), at=10)
    loss = store.open_loss(bed.kept, T0 + 100 * SEC, "overrun", 5)
    store.close_loss(bed.kept, loss, T0 + 110 * SEC, 12)
    bed.file(HOUR)
    bed.put(flow(sport=3, start=HOUR, end=HOUR + 1), at=HOUR + 2)
    bed.close()
    if how == "gone":
        for path in bed.path.glob("flows.duckdb*"):
            path.unlink()
    else:
        ruin(bed.path)
    bed.open(at=10 * HOUR)
    assert bed.before  # so that what is stored of live connections is asked for
    assert sorted(bed.ports()) == [2, 1000]
    gaps = bed.gaps()
    assert ("overrun", 100, 110) in gaps
    lost = [gap for gap in gaps if gap[0] == "store-lost"]
    assert len(lost) == 1
    assert lost[0][1] < HOUR  # from the last file on
    assert bed.gaps(until=T0 + 50 * SEC) == []
    assert len(list(bed.path.glob("flows.duckdb.damaged-*"))) == (how == "ruined")
    assert sums(bed.kept, goes_on)[0] == {1: 5}
    bed.put(flow(sport=4, start=10 * HOUR, end=10 * HOUR + 1), at=10 * HOUR + 2)
    bed.file(12 * HOUR)
    assert sorted(bed.ports()) == [2, 4, 1000]
    bed.again(at=13 * HOUR)
    assert sorted(bed.ports()) == [2, 4, 1000]


class Cut:
    """A database's connection, until after so many steps the process ends.

    A step: a statement after which something else may be found than before it.
    """

    def __init__(self, con, left):
        self.con, self.left = con, left

    def __getattr__(self, name):
        return getattr(self.con, name)

    def execute(self, *words):
        found = self.con.execute(*words)
        if words[0].startswith(("SET", "COMMIT", "UPDATE")):
            self.left -= 1
            if not self.left:
                raise Crash
        return found


def test_a_database_whose_making_anew_is_cut_short_is_made_all_the_same(bed, monkeypatch):
    goes_on = flow(flow_id=1, reason=3, opackets=5, start=1.0005, end=9)
    bed.put(goes_on, at=10)
    bed.put(flow(sport=2, start=HOUR, end=HOUR + 1), at=HOUR + 2)
    bed.file(3 * HOUR)
    bed.close()
    ruin(bed.path)
    whole, connect = bed.path, duckdb.connect
    steps, cut = 0, True
    while cut:
        steps += 1
        bed.path = whole.with_name(f"cut-{steps}")
        shutil.copytree(whole, bed.path)
        with monkeypatch.context() as patched:
            patched.setattr(duckdb, "connect", lambda *a, **k: Cut(connect(*a, **k), steps))  # noqa: B023
            try:
                history.open_store(bed.path, HERE).con.close()
                cut = False
            except Crash:
                pass
        bed.open(at=10 * HOUR)
        assert bed.before
        assert [what for what, *_ in bed.gaps()].count("store-lost") == 1
        assert sorted(bed.ports()) == [2, 1000]
        assert sums(bed.kept, goes_on)[0] == {1: 5}
        bed.close()
    assert steps > 8
    bed.open()


def test_a_connection_that_outlives_a_lost_database_stays_one_however_often_it_is_read_back(bed):
    share = flow(flow_id=1, reason=3, opackets=5, flow_start=1.0001234, end=9)
    bed.put(share, at=10)
    bed.file(HOUR)
    bed.close()
    ruin(bed.path)
    for hour in range(2, 5):
        bed.open(at=hour * HOUR)
        assert sums(bed.kept, share)[0] == {1: 5 * (hour - 1)}
        times = {"start": T0 + hour * HOUR * SEC, "end": T0 + (hour * HOUR + 9) * SEC}
        bed.put(share | times, at=hour * HOUR + 10)
        if hour == 3:
            bed.file(4 * HOUR)
        bed.close()
    bed.open(at=5 * HOUR)
    assert sums(bed.kept, share)[0] == {1: 20}
    bed.put(share | {"reason": 2, "end": T0 + 5 * HOUR * SEC}, at=5 * HOUR + 10)
    bed.file(6 * HOUR)
    assert bed.kept.con.execute("SELECT flow_start, opackets FROM carried").fetchall() == []


def test_a_lost_database_without_files_is_said_too(bed):
    bed.put(flow(), at=1)
    bed.close()
    ruin(bed.path)
    bed.open(at=HOUR)
    assert "store-lost" in [what for what, *_ in bed.gaps(since=0)]
    assert bed.ports() == []


def test_a_database_with_any_block_damaged_is_set_aside_or_whole(bed):
    for hour in range(2):
        rows = (flow(sport=n, start=n, end=n + 1, flow_id=n, reason=3) for n in range(500))
        bed.put(*rows, at=hour * HOUR + 1)
        bed.file(hour * HOUR + HOUR // 2)
    bed.kept.con.execute("CHECKPOINT")
    bed.close()
    whole, header, block, aside = bed.path, 3 * 4096, 256 * 1024, 0
    size = (whole / "flows.duckdb").stat().st_size
    for first in range(header, size, block):
        bed.path = whole.with_name(f"damaged-{first}")
        shutil.copytree(whole, bed.path)
        with (bed.path / "flows.duckdb").open("r+b") as database:
            for at in (first + 100, first + block // 2):
                database.seek(at)
                database.write(b"damaged" * 9)
        bed.open(at=9 * HOUR)
        lost = "store-lost" in {what for what, *_ in bed.gaps(since=0)}
        assert lost == bool(list(bed.path.glob("flows.duckdb.damaged-*")))
        with closing(bed.kept.con.cursor()) as con, history.reading(con):
            records = history.source(con)
            count = con.execute(f"SELECT count(*) FROM ({records.sql})", records.params).fetchall()
        assert count == [(500 if lost else 1000,)]
        aside += lost
        bed.close()
    assert aside
    bed.open()


@pytest.mark.parametrize("how", ["removed", "cut short"])
def test_a_file_that_is_gone_or_damaged_is_a_gap(bed, how):
    for hour in range(2):
        bed.put(flow(sport=hour, start=hour * HOUR, end=hour * HOUR + 1), at=hour * HOUR + 1)
    bed.file(3 * HOUR)
    path = bed.root / bed.files()[0]
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    bed.again(at=3 * HOUR)
    assert bed.ports() == [1]
    assert ("file-lost", 0, 1) in bed.gaps()
    assert len(list(bed.root.glob("*/*.damaged"))) == (how == "cut short")


def other(tmp_path, **names_of):
    """A file of another node, with a gap in its hour."""
    made = Bed(tmp_path / "other", Node("other", 99))
    if names_of:
        requests = [registry.Request(name, xid) for name, xid in names_of.items()]
        registry.assign(made.path / "registry.db", requests, now_ns=1)
    made.put(flow("192.0.2.1", sport=1, oxid=256), flow(sport=2, start=5, end=6), at=10)
    store.note_loss(made.kept, T0 + 7 * SEC, T0 + 8 * SEC, "overrun", 3)
    made.file(HOUR)
    made.close()
    [name] = made.files()
    return made.root / name


def take(bed, path):
    with path.open("rb") as file, closing(bed.kept.con.cursor()) as con:
        return history.take(bed.kept, con, file.fileno())


def test_a_file_of_another_node_is_taken_once_with_its_names_and_gaps(bed, tmp_path):
    bed.known = tenures((256, "mine", -100, None))
    bed.put(flow(sport=3, start=20, end=21, oxid=256), at=30)
    path = other(tmp_path, theirs=256)
    told = take(bed, path)
    assert (told["node"], told["records"], told["new"]) == ("other", 2, True)
    again = take(bed, path)
    assert not again["new"]
    assert again["name"] == told["name"]
    rows = [(r["node"], r["sport"], r["oslice"]) for r in bed.rows()]
    assert rows == [("other", 1, "theirs"), ("other", 2, None), ("here", 3, "mine")]
    assert bed.ports(slices=["theirs"]) == [1]
    assert bed.ports(slices=["mine"]) == [3]
    assert bed.ports(nodes=["other"]) == [1, 2]
    assert ("overrun", 7, 8) in bed.gaps(nodes=["other"])
    assert bed.gaps(nodes=["here"], since=T0, until=T0 + 30 * SEC) == []
    whats = [what for what, *_ in bed.gaps(nodes=["other"], since=0)]
    assert whats == ["before-first", "overrun", "not-imported"]
    bed.again(at=40)
    assert sorted(bed.ports()) == [1, 2, 3]
    assert not take(bed, path)["new"]


def rewritten(path, change, told=None):
    """A file with other records, or another description."""
    to = path.with_name("changed.parquet")
    con = duckdb.connect()
    text = con.execute("SELECT value FROM parquet_kv_metadata(?)", [str(path)]).fetchall()[0][0]
    told = schema.decode(text) if told is None else told
    text = told if isinstance(told, str) else schema.encode(told)
    con.execute(f"COPY ({change.format(path)}) TO '{to}' (FORMAT parquet, "
                "KV_METADATA {netflow: $told})", {"told": text})  # fmt: skip
    con.close()
    return to


REFUSED = [
    ("SELECT * FROM '{}' LIMIT 1", None, "has 1 records, and says 2"),
    ("SELECT * EXCLUDE (oxid) FROM '{}'", None, "oxid is missing"),
    ("SELECT *, 1 AS more FROM '{}'", None, "unknown columns: more"),
    ("SELECT * REPLACE (oxid::INTEGER AS oxid) FROM '{}'", None, "oxid is INTEGER"),
    ("SELECT * REPLACE ('x' AS node) FROM '{}'", None, "not of node other"),
    ("SELECT * REPLACE (duration_ms + 9 AS duration_ms) FROM '{}'", None, "not of the time"),
    ("SELECT * FROM '{}'", '{"schema": 99}', "schema version is 99"),
    ("SELECT * FROM '{}'", "no json", "description cannot be read"),
    ("SELECT * FROM '{}'", '{"schema": 2}', "description cannot be read"),
]


@pytest.mark.parametrize(("change", "told", "why"), REFUSED, ids=[case[2] for case in REFUSED])
def test_a_file_that_is_not_what_it_says_is_refused(bed, tmp_path, change, told, why):
    path = rewritten(other(tmp_path), change, told)
    with pytest.raises(history.FileError, match=why):
        take(bed, path)
    assert bed.rows() == []
    assert bed.files() == []
    assert not list(files.drafts(bed.root))


def test_other_files_are_refused(bed, tmp_path):
    text = tmp_path / "text"
    text.write_text("hello")
    with pytest.raises(history.FileError):
        take(bed, text)
    plain = tmp_path / "plain.parquet"
    duckdb.execute(f"COPY (SELECT 1 AS a) TO '{plain}' (FORMAT parquet)")
    with pytest.raises(history.FileError, match="not written by netflow"):
        take(bed, plain)
    path = other(tmp_path)
    data = bytearray(path.read_bytes())
    data[200:400] = bytes(200)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(data)
    with pytest.raises(history.FileError):
        take(bed, broken)
    take(bed, path)
    with pytest.raises(history.FileError, match="holds the same records"):
        take(bed, rewritten(path, "SELECT * FROM '{}'"))
    assert bed.ports() == [1, 2]


def test_a_nodes_own_file_can_be_given_back_but_not_beside_its_hot_records(bed, tmp_path):
    bed.put(flow(sport=1), at=1)
    copy = tmp_path / "copy.parquet"
    bed.file(HOUR)
    shutil.copy(bed.root / bed.files()[0], copy)
    assert not take(bed, copy)["new"]
    retain.by_age(bed.archiver.con, T0 + 9 * HOUR * SEC, T0 + 9 * HOUR * SEC)
    assert bed.ports() == []
    assert take(bed, copy)["new"]
    assert bed.ports() == [1]


def test_old_files_go_whole_are_counted_and_are_a_gap(bed):
    for hour in range(4):
        bed.put(*(flow(sport=hour, start=hour * HOUR, end=hour * HOUR + 1) for _ in range(3)),
                at=hour * HOUR + 1)  # fmt: skip
    bed.file(5 * HOUR)
    con, now = bed.archiver.con, T0 + 5 * HOUR * SEC
    assert retain.by_age(con, T0 + (HOUR + 2) * SEC, now) == 2
    assert set(bed.ports()) == {2, 3}
    assert len(bed.files()) == 4  # somebody may still read them
    retain.sweep(con, bed.root, now - 1)
    assert len(bed.files()) == 4
    retain.sweep(con, bed.root, now)
    assert len(bed.files()) == 2
    assert ("retired", 0, HOUR + 1) in bed.gaps()
    assert bed.gaps(since=T0 + 2 * HOUR * SEC) == []
    assert retain.by_size(con, 1, now) == 1
    assert set(bed.ports()) == {3}
    assert history.facts(con)["retired"] == 9
    [gap] = [g for g in bed.ask(Flows(filter=Filter()))[0].gaps if g.what == "retired"]
    assert (gap.estimate, gap.until) == (9, T0 + (2 * HOUR + 1) * SEC)
    bed.again(at=6 * HOUR)
    assert len(bed.files()) == 1
    assert set(bed.ports()) == {3}


def test_a_full_disk_drops_the_oldest_and_a_clock_that_was_set_drops_nothing(bed):
    for hour in range(3):
        bed.put(flow(sport=hour, start=hour * HOUR, end=hour * HOUR + 1), at=hour * HOUR + 1)
    bed.file(4 * HOUR)
    clock = retain.tick(retain.Clock(), T0 + 10**9 * SEC)
    retain.keep(bed.archiver.con, bed.root, retain.Keeping(age=SEC), clock)
    assert bed.ports() == [0, 1, 2]
    clock.steady_since -= retain.STEADY
    retain.keep(bed.archiver.con, bed.root, retain.Keeping(free=1), clock)
    assert bed.ports() == [0, 1, 2]
    whole = shutil.disk_usage(bed.root).total
    retain.keep(bed.archiver.con, bed.root, retain.Keeping(free=whole), clock)
    assert bed.ports() == []
    bed.again(at=5 * HOUR)
    bed.put(flow(sport=9, start=5 * HOUR, end=5 * HOUR + 1), at=5 * HOUR + 1)
    bed.file(7 * HOUR)
    retain.keep(bed.archiver.con, bed.root, retain.Keeping(age=SEC), clock)
    assert bed.ports() == []


def test_a_slice_is_named_by_time_over_files_and_hot_records_alike(bed):
    """An xid used again, a slice renamed, one removed: as in the database, so in files."""
    bed.known = tenures(
        (256, "first", -100, 2 * HOUR), (256, "second", 3 * HOUR, None),
        (257, "gone", -100, HOUR), (258, "old_name", -100, 2 * HOUR + 30),
        (258, "new_name", 2 * HOUR + 30, None),
    )  # fmt: skip
    for hour in range(5):
        bed.put(*(flow(sport=10 * hour + n, oxid=256 + n, start=hour * HOUR + 60,
                       end=hour * HOUR + 70) for n in range(3)), at=hour * HOUR + 80)  # fmt: skip

    def owners():
        return {r["sport"]: r["oslice"] for r in bed.rows()}

    hot = owners()
    assert [hot[n] for n in (0, 10, 20, 30, 40)] == ["first", "first", None, "second", "second"]
    assert [hot[n] for n in (1, 11, 21)] == ["gone", None, None]
    assert [hot[n] for n in (2, 12, 22, 32)] == ["old_name", "old_name", "new_name", "new_name"]
    bed.file(3 * HOUR + 90)
    assert owners() == hot
    assert bed.ports(slices=["first"]) == [0, 10]
    assert bed.ports(slices=["second"]) == [30, 40]
    bed.file(9 * HOUR)
    assert owners() == hot
    assert bed.ports(slices=["gone"]) == [1]
    assert bed.ports(slices=["old_name", "new_name"]) == [2, 12, 22, 32, 42]


def test_the_registry_keeps_every_tenure_whatever_comes(tmp_path):
    """So it is kept at least as long as the records."""
    path = tmp_path / "registry.db"
    for turn in range(20):
        request = registry.Request(f"slice{turn}", 300)
        assigned = registry.assign(path, [request], now_ns=turn * 10 + 1, rest_ns=0)
        registry.release(path, assigned.opened, now_ns=turn * 10 + 5)
    with registry.open_readonly(path) as opened:
        assert [t.slice for t in opened.tenures(xid=300)] == [f"slice{n}" for n in range(20)]
        assert opened.holder(300, 3) == "slice0"


def test_a_store_of_version_1_is_brought_up_to_date_and_loses_nothing(tmp_path):
    (tmp_path / "store").mkdir()
    with gzip.open(DATA / "store-v1.duckdb.gz") as packed:
        (tmp_path / "store/flows.duckdb").write_bytes(packed.read())
    bed = Bed(tmp_path / "store")
    assert bed.ports() == [*range(1, 117), 5000, 5002, 117, 118, 5001, *range(119, 200)]
    [six] = bed.rows(sport=[5000])
    assert (six["src"], six["dst"], six["rxid"]) == ("2001:db8::1", "2001:db8::2", 300)
    [nat] = bed.rows(sport=[5001])
    assert (nat["nsrc"], nat["ndst"], nat["nsport"], nat["ndport"]) == (
        "203.0.113.9", "192.0.2.77", 5555, 8080
    )  # fmt: skip
    assert nat["start"] == T0 + 7100 * SEC
    assert [g for g in bed.gaps() if g[2] < 10**5] == [
        ("overrun", 100, 110), ("not-running", 9000, 10000)
    ]  # fmt: skip
    before = bed.rows()
    assert bed.file(10 * HOUR) == 4
    assert len(bed.files()) == 4
    for row in before:
        row["flow_id"] = row["flow_id"] if row["reason"] == 3 else None
    assert bed.rows() == before
    assert bed.rows()[0]["node"] == "here"
    bed.again(at=11 * HOUR)
    assert len(bed.rows()) == len(before)
    bed.close()


def test_anyone_can_read_a_file_with_the_sql_of_the_docs(bed):
    bed.put(FULL, flow("10.0.0.1", "198.51.100.7", sport=4000, start=1, end=2, obytes=5), at=3)
    bed.file(HOUR)
    text = (Path(__file__).parents[2] / "docs/history.md").read_text()
    [sql] = [b for b in text.split("```") if b.startswith("sql\n-- DuckDB")]
    with duckdb.connect() as con:
        con.execute(f"SET file_search_path = '{bed.path}'")
        rows = con.execute(sql.removeprefix("sql\n")).fetchall()
    assert rows == [("here", "2026-03-01 03:12:01", "10.0.0.1", 4000, "198.51.100.7", 80, 5)]


def test_a_files_documented_columns_are_those_that_it_has(bed):
    bed.put(FULL, at=3)
    bed.file(HOUR)
    found = duckdb.execute("DESCRIBE SELECT * FROM read_parquet(?)",
                           [str(bed.root / bed.files()[0])]).fetchall()  # fmt: skip
    assert [name for name, *_ in found] == [*schema.COLUMNS[schema.VERSION]]
    text = (Path(__file__).parents[2] / "docs/history.md").read_text()
    assert all(f"`{name}`" in text for name, *_ in found)


def test_files_and_directories_are_not_for_everybody(bed):
    bed.put(flow(), at=1)
    bed.file(HOUR)
    for path in (bed.root, *bed.root.rglob("*")):
        assert path.stat().st_mode & 0o007 == 0


def test_a_node_has_a_name_that_can_be_a_file_name():
    assert this_node("a.b-c_1", 5) == Node("a.b-c_1", 5)
    assert this_node("x").domain == this_node("x").domain != this_node("y").domain
    for bad in ("../x", "a/b", ".hidden", "-x", "x" * 65, "a b", "ü"):
        with pytest.raises(ValueError, match="node's name"):
            this_node(bad)


def test_an_address_is_found_by_its_halves_in_files(bed):
    bed.put(flow("2001:db8::1", "2001:db8:0:1::9", sport=1),
            flow("10.0.0.1", "2001:db8:ffff::1", sport=2, start=1, end=2),
            flow("10.0.0.1", "10.0.0.9", sport=3, start=2, end=3, ndst="192.0.2.1"),
            at=5)  # fmt: skip
    bed.file(HOUR)
    assert addr("10.0.0.9")[0] == 0
    assert bed.ports(dst=["2001:db8::/32"]) == [1, 2]
    assert bed.ports(dst=["2001:db8:0:1::/64"]) == [1]
    assert bed.ports(dst=["192.0.2.0/24"]) == [3]
    assert bed.ports(dst=["10.0.0.9"]) == [3]
    assert bed.ports(src=["::/0"]) == [1]  # IPv6 ones, as a filter means it
    assert bed.ports(src=["0.0.0.0/0"]) == [2, 3]


def test_a_question_that_takes_all_memory_fails_and_the_collector_goes_on(bed):
    bed.kept.con.execute("SET memory_limit = '20MB'")
    bed.kept.con.execute("SET max_temp_directory_size = '0MB'")
    greedy = "SELECT list(a) FROM (SELECT hash(range) a FROM range(100000000))"
    failed = []

    def ask_for_all():
        with closing(bed.archiver.con.cursor()) as con:
            try:
                list(store.select(con, greedy, {}, 1))
            except store.StoreError as error:
                failed.append(str(error))

    for turn in range(3):
        asking = threading.Thread(target=ask_for_all)
        asking.start()
        rows = 0
        while asking.is_alive():
            bed.put(*(flow(sport=n) for n in range(200)), at=turn)
            rows += 200
        asking.join()
        assert len(failed) == turn + 1
        assert "ask about a shorter time" in failed[turn]


def test_the_archiver_makes_files_beside_a_collector_that_commits(bed):
    bed.put(flow(sport=1), at=1)
    bed.put(flow(sport=2, start=HOUR, end=HOUR + 1), at=HOUR + 1)
    bed.archiver.con.close()
    bed.archiver = history.start(bed.kept, history.Keeping(), bed.path / "registry.db")
    try:
        deadline = time.monotonic() + 60
        for n in itertools.count():
            bed.put(flow(sport=n, start=HOUR + n, end=HOUR + n + 1), at=HOUR + n + 2)
            if bed.files() or time.monotonic() > deadline:
                break
            bed.archiver.stopping.wait(0.02)
        assert bed.files()
    finally:
        history.stop(bed.archiver)
    bed.archiver.con = bed.kept.con.cursor()
    assert len(bed.ports()) == n + 3
    assert columns(flow())
