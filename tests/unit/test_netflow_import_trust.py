"""What a file says of itself is believed only where it can be true, and harms no question."""

from contextlib import closing

import duckdb
import pytest
from storebed import SEC, T0, archiver_of, flow, put, tenures

from netflow import access, history, names, questions, store
from netflow.history import archive, schema
from netflow.node import Node
from netflow.wire import Filter, Flows, Top

pytestmark = pytest.mark.unit

HOUR = 3600
HERE, THERE = Node("here", 7), Node("there", 8)


class Bed:
    """A store that is opened and closed as a collector would, and asked."""

    def __init__(self, path, node):
        self.path, self.node = path, node
        self.open()

    def open(self):
        self.kept = history.open_store(self.path, self.node)
        store.begin_run(self.kept, store.Mark(T0))
        self.archiver = archiver_of(self.kept)

    def close(self):
        self.archiver.con.close()
        self.kept.con.close()

    def again(self):
        self.close()
        self.open()

    def put(self, *rows, at):
        put(self.kept, *rows, caught_up=T0 + at * SEC)

    def file(self, at):
        store.commit(self.kept, None, store.Mark(T0 + at * SEC))
        return archive.close_segments(self.archiver)

    def files(self):
        root = self.path / "history"
        return sorted(root.glob("*/*.parquet"))

    def ask(self, question, now=10**6):
        lines = []
        with closing(self.kept.con.cursor()) as con, history.reading(con):
            period = questions.period(con, question.filter, T0 + now * SEC, T0 + now * SEC)
            answer = questions.ANSWERS[type(question)]
            answer(con, question, tenures(), period, access.ALL, lines.append)
        return lines

    def ports(self):
        header, *rows, _ = self.ask(Flows(filter=Filter()))
        return sorted(row[header.columns.index("sport")] for row in rows)

    def gaps(self, node):
        header = self.ask(Flows(filter=Filter(since=0, nodes=[node])))[0]
        return [(gap.what, (gap.since - T0) // SEC) for gap in header.gaps]

    def take(self, path):
        with path.open("rb") as file, closing(self.kept.con.cursor()) as con:
            return history.take(self.kept, con, file.fileno())


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A collector that files are given to, with one record of its own."""
    monkeypatch.setattr(names, "tenures", lambda known, now: known.params)
    bed = Bed(tmp_path / "desk/store", HERE)
    bed.put(flow(sport=9), at=10)
    yield bed
    bed.close()


def filed(path, node=THERE):
    """The file of two records of a node."""
    bed = Bed(path, node)
    bed.put(flow(sport=1, reason=3), flow(sport=2, start=5, end=6), at=10)
    assert bed.file(HOUR) == 1
    bed.close()
    return bed.files()[0]


def changed(path, select="SELECT * FROM '{}'", **told):
    """The same with other records, or other words about them."""
    to = path.with_name("changed.parquet")
    with duckdb.connect() as con:
        [(text,)] = con.execute("SELECT value FROM parquet_kv_metadata(?)", [str(path)]).fetchall()
        said = schema.decode(text)
        for key, value in told.items():
            setattr(said, key, value)
        con.execute(f"COPY ({select.format(path)}) TO '{to}' (FORMAT parquet, "
                    "KV_METADATA {netflow: $told})", {"told": schema.encode(said)})  # fmt: skip
    return to


def node(name):
    return f"SELECT * REPLACE ('{name}' AS node) FROM '{{}}'", {"node": name}


def value(text, column):
    return f"SELECT * REPLACE ({text} AS {column}) FROM '{{}}'", {}


def said(**told):
    return "SELECT * FROM '{}'", told


def gap(since=1, until=2, what="overrun", events=0):
    return said(gaps=[schema.Gap(since=since, until=until, what=what, events=events)])


LIES = {
    "a node that is a way out": node("a/../../../../outside/x"),
    "a node that is a pattern": node("*"),
    "a segment that has no next": said(segment=2**32 - 1),
    "a segment before the first": said(segment=0),
    "a domain of 33 bits": said(domain=2**32),
    "an hour that no calendar has": said(hour=10**9),
    "a time that no timestamp has": said(covers=(0, 2**63)),
    "a gap that no timestamp has": gap(until=2**63),
    "a gap of no name": gap(what="{0.__class__} {1}"),
    "a gap of less than nothing": gap(events=-1),
    "a slice of 17 bits": said(names=[(65536, "a", 0, None)]),
    "bytes that no sum holds": value("18446744073709551615::UBIGINT", "obytes"),
    "packets that no link carries": value("72057594037927936::UBIGINT", "rpackets"),
    "a connection older than time": value("9223372036854775807::BIGINT", "flow_age_ms"),
    "a connection that began before 1970": value("3000000000000::BIGINT", "flow_age_ms"),
    "a record without a count": value("NULL::UBIGINT", "obytes"),
    "a record of no node": value("NULL::VARCHAR", "node"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_tells_what_cannot_be_changes_nothing(desk, tmp_path, lie):
    select, told = LIES[lie]
    path = changed(filed(tmp_path / "there"), select, **told)
    with pytest.raises(history.FileError):
        desk.take(path)
    assert not list((desk.path / "history").rglob("*.parquet"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["desk", "there"]
    assert [p.name for p in (tmp_path / "desk").iterdir()] == ["store"]
    assert desk.ports() == [9]
    desk.ask(Top(filter=Filter()))


def test_as_much_as_a_file_may_say_can_be_asked_about_beside_others_like_it(desk, tmp_path):
    path = filed(tmp_path / "there")
    select = value(f"{2**55 - 1}::UBIGINT", "obytes")[0]
    for n in range(10):
        assert desk.take(changed(path, select, store=f"s{n}"))["new"]
    [_, row, _] = desk.ask(Top(filter=Filter()))
    assert 10 * 2 * (2**55 - 1) in row


def test_a_file_covers_no_time_beyond_its_hour_whatever_it_says(desk, tmp_path):
    path = filed(tmp_path / "there")
    end = HOUR - T0 // SEC % HOUR  # of the hour, in seconds after T0
    desk.take(changed(path, covers=(T0, T0 + 10**9 * SEC)))
    assert desk.gaps("there") == [("before-first", -T0 // SEC), ("not-imported", end - 1)]


def test_a_file_of_an_hour_to_come_does_not_hide_what_was_not_imported(desk, tmp_path):
    path = filed(tmp_path / "there")
    end = HOUR - T0 // SEC % HOUR
    desk.take(path)
    hour = T0 // SEC // HOUR + 10_000
    ahead = T0 + 10**8 * SEC
    desk.take(changed(path, segment=2, hour=hour, covers=(ahead, ahead)))
    assert ("not-imported", end - 1) in desk.gaps("there")


def test_a_file_of_another_store_under_this_nodes_name_leaves_the_numbers_as_they_are(
    desk, tmp_path
):
    path = filed(tmp_path / "there", HERE)
    assert desk.take(changed(path, segment=2**31 - 1))["new"]
    desk.again()
    assert desk.file(2 * HOUR) == 1
    desk.again()
    desk.put(flow(sport=10, start=2 * HOUR, end=2 * HOUR + 1), at=2 * HOUR + 2)
    assert [number for number, *_ in store.hot_segments(desk.kept.con)] == [2]
    assert desk.ports() == [1, 2, 9, 10]


def test_files_made_after_the_clock_was_ahead_tell_of_their_own_time(desk, tmp_path):
    there, year = Bed(tmp_path / "there", THERE), 8760 * HOUR
    there.put(flow(sport=1), at=10)
    there.put(flow(sport=2, start=year, end=year + 1), at=year + 2)
    there.put(flow(sport=3, start=HOUR + 100, end=HOUR + 101), at=HOUR + 102)
    assert there.file(HOUR + 103) == 2
    store.note_loss(there.kept, T0 + (HOUR + 50) * SEC, T0 + (HOUR + 60) * SEC, "overrun", 5)
    assert there.file(3 * HOUR) == 1
    there.close()
    end = 2 * HOUR - T0 // SEC % HOUR
    for path in there.files():
        assert desk.take(path)["new"]
    assert desk.ports() == [1, 2, 3, 9]
    assert desk.gaps("there") == [
        ("before-first", -T0 // SEC), ("overrun", HOUR + 50), ("not-imported", end - 1),
    ]  # fmt: skip


def test_files_of_a_clock_that_was_set_back_before_all_others_tell_of_their_own_time(
    desk, tmp_path
):
    there, day = Bed(tmp_path / "there", THERE), 24 * HOUR
    there.put(flow(sport=1), at=10)
    assert there.file(HOUR) == 1
    there.put(flow(sport=2, start=-day, end=1 - day), at=2 - day)
    store.note_loss(there.kept, T0 - (day - 5) * SEC, T0 - (day - 6) * SEC, "overrun", 5)
    assert there.file(2 * HOUR) == 1
    there.close()
    for path in there.files():
        assert desk.take(path)["new"]
    assert ("overrun", 5 - day) in desk.gaps("there")
