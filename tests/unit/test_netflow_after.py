"""Following the records: each once, in the order of commits, also where they have become files."""

from collections import Counter

import pytest
from storebed import SEC, T0, archiver_of, flow, put, tenures

from netflow import history, questions, store
from netflow.history import archive, files, retain
from netflow.history.after import after
from netflow.node import Node
from netflow.wire import After, Position

pytestmark = pytest.mark.unit

HOUR = 3600
NODE = Node("here", 7)


class Bed:
    """A store that is written to, and one who follows it."""

    def __init__(self, path):
        self.path, self.position, self.seen = path, Position(), Counter()
        self.skipped = self.again = self.flow_id = 0
        self.open()

    def open(self):
        self.kept = history.open_store(self.path, NODE)
        store.begin_run(self.kept, store.Mark(T0))
        self.archiver = archiver_of(self.kept)

    def close(self):
        self.archiver.con.close()
        self.kept.con.close()

    def put(self, count, at=0):
        """Records whose flow ids count on, many of them alike in what files are sorted by."""
        rows = []
        for _ in range(count):
            self.flow_id += 1
            end = at + self.flow_id % 7 / 1000
            rows.append(flow(dst=f"10.0.0.{self.flow_id % 5}", start=at, end=end, reason=3,
                             flow_id=self.flow_id))  # fmt: skip
        put(self.kept, *rows, caught_up=T0 + int(at * SEC))

    def file(self, at):
        store.commit(self.kept, None, store.Mark(T0 + int(at * SEC)))
        return archive.close_segments(self.archiver)

    def ask(self, limit=1000, begin="oldest", name="me"):
        asked = After(name=name, position=self.position, begin=begin, limit=limit)
        with history.reading(self.kept.con):
            found = after(self.kept.con, asked)
        self.position = found.position
        self.skipped += found.skipped
        self.again += found.again
        ids = found.columns["flow_id"].tolist() if found.rows else []
        self.seen.update(ids)
        return ids

    def all(self, limit=1000):
        while self.ask(limit):
            pass
        return self.seen

    @property
    def whole(self):
        return Counter(range(1, self.flow_id + 1))


@pytest.fixture
def bed(tmp_path):
    made = Bed(tmp_path)
    yield made
    made.close()


def test_records_come_in_the_order_they_were_committed_and_once(bed):
    assert bed.ask() == []
    bed.put(10)
    assert bed.ask() == list(range(1, 11))
    assert bed.ask() == []
    bed.put(5)
    bed.put(5)
    assert sorted(bed.ask(limit=7)) == list(range(11, 18))
    assert bed.all() == bed.whole


def test_a_file_that_somebody_has_removed_is_passed_over_and_counted(bed):
    for hour in range(3):
        bed.put(10, at=hour * HOUR)
        bed.file((hour + 1) * HOUR)
    _, second, _ = sorted((bed.path / "history").rglob("*.parquet"))
    assert len(bed.ask(limit=5)) == 5
    second.unlink()
    assert len(bed.all()) == 20
    assert bed.skipped == 1


def test_who_begins_now_gets_what_comes_later(bed):
    bed.put(10)
    assert bed.ask(begin="now") == []
    bed.put(3)
    assert sorted(bed.ask(begin="now")) == [11, 12, 13]


def test_a_segment_that_becomes_a_file_in_between_goes_on_where_it_was(bed):
    bed.put(100)
    assert sorted(bed.ask(limit=33)) == list(range(1, 34))
    bed.put(50, at=HOUR)
    assert bed.file(2 * HOUR) == 2
    assert sorted(bed.ask(limit=20)) == list(range(34, 54))
    assert bed.all(limit=20) == bed.whole
    assert (bed.skipped, bed.again) == (0, 0)


def test_files_are_followed_by_who_was_not_there_when_they_were_made(bed):
    bed.put(100)
    bed.put(50, at=HOUR)
    bed.file(2 * HOUR)
    bed.put(10, at=2 * HOUR)
    assert not (bed.path / "export").exists()  # nobody follows, so nothing is kept for him
    assert bed.all(limit=30) == bed.whole
    assert bed.position.by == "commit"


def test_a_part_of_a_file_goes_on_by_its_rows(bed):
    bed.put(100)
    bed.put(1, at=HOUR)
    bed.file(HOUR)
    assert len(bed.ask(limit=30)) == 30
    assert bed.position.by == "file"
    bed.file(2 * HOUR)
    bed.put(1, at=3 * HOUR)
    assert bed.all(limit=30) == bed.whole
    assert bed.again == 0


DAMAGE = {
    "gone": None,
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "cut short": lambda data: data[:-20],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_part_of_a_segment_whose_order_is_lost_comes_again_and_is_counted(bed, how):
    bed.put(100)
    assert len(bed.ask(limit=33)) == 33
    bed.put(1, at=HOUR)
    bed.file(HOUR)
    order = bed.path / "export" / "1.order"
    order.unlink() if how == "gone" else order.write_bytes(DAMAGE[how](order.read_bytes()))
    bed.all()
    assert bed.again == 33
    assert bed.seen - bed.whole == Counter(range(1, 34))
    assert bed.whole - bed.seen == Counter()


def test_only_orders_that_somebody_is_in_the_middle_of_are_kept(bed):
    bed.put(10)
    bed.ask(limit=5, name="slow")
    for hour in range(1, 5):
        bed.position = Position(store=bed.kept.id, segment=hour, row=10)
        bed.put(10, at=hour * HOUR)
        bed.ask()
        bed.file(hour * HOUR)
    assert sorted(order.name for order in (bed.path / "export").glob("*.order")) == [
        "1.order", "4.order",
    ]  # fmt: skip


def test_a_segment_that_was_dropped_before_it_was_read_is_told_of(bed):
    bed.put(10)
    assert len(bed.ask(limit=5)) == 5
    for hour in range(1, 4):
        bed.put(10, at=hour * HOUR)
    bed.file(4 * HOUR)
    bed.put(10, at=4 * HOUR)
    retain.by_age(bed.kept.con, T0 + int(2.5 * HOUR) * SEC, T0)
    bed.all()
    assert bed.skipped == 3
    assert sorted(bed.seen) == [*range(1, 6), *range(31, 51)]


def test_files_of_a_database_that_was_lost_are_read_before_the_new_ones(bed):
    bed.put(10)
    assert len(bed.ask(limit=4)) == 4
    bed.put(10, at=HOUR)
    bed.file(2 * HOUR)
    bed.close()
    (bed.path / "flows.duckdb").unlink()
    bed.open()
    bed.put(10, at=3 * HOUR)
    assert bed.all(limit=7) == bed.whole
    assert (bed.skipped, bed.again) == (0, 0)


def test_a_position_of_a_store_that_is_not_here_begins_with_the_oldest_and_says_so(bed):
    bed.put(10)
    bed.position = Position(store="another", segment=8, row=3)
    assert bed.all() == bed.whole
    assert bed.skipped == 1


def test_records_of_other_nodes_are_not_followed(bed, tmp_path):
    other = Bed(tmp_path / "other")
    other.put(10)
    other.close()
    from netflow.history import imports

    again = history.open_store(tmp_path / "other", Node("there", 8))
    maker = archive.Archiver(again, again.con.cursor(), history.Keeping(), tmp_path / "r.db")
    store.begin_run(again, store.Mark(T0))
    put(again, flow(flow_id=99))
    store.commit(again, None, store.Mark(T0 + HOUR * SEC))
    archive.close_segments(maker)
    maker.con.close()
    foreign = [
        path for path in files.directory(again.path).glob("*/*.parquet") if "there" in path.name
    ]
    again.con.close()
    with foreign[0].open("rb") as file:
        assert imports.take(bed.kept, bed.kept.con.cursor(), file.fileno())["new"]
    bed.put(3)
    assert bed.all() == bed.whole


def test_values_and_names_come_as_they_were_also_from_files(bed):
    row = flow(nsrc="198.51.100.1", nsport=4000, oxid=256, rxid=300, opackets=7, end=2.5,
               obytes=1 << 40, flow_id=5, reason=3)  # fmt: skip
    known = tenures((256, "first", -100, -50), (256, "second", -40, None), (7, "no", 0, None))
    known.registry, known.seen = bed.path / "none", (0, -1)
    put(bed.kept, row)
    answers = []
    for _ in range(2):
        asked = After(name="me", begin="oldest")
        chunk, *columns = questions.after(bed.kept.con, asked, known)
        answers.append((chunk, [bytes(column) for column in columns]))
        bed.file(HOUR)
    assert answers[0][1] == answers[1][1]
    assert b'"second"' in answers[0][0]
    assert b'"first"' not in answers[0][0]
    assert b'"no"' not in answers[0][0]


def test_a_collector_that_starts_anew_goes_on_in_the_segment(bed):
    bed.put(100)
    assert sorted(bed.ask(limit=33)) == list(range(1, 34))
    bed.archiver.con.close()
    store.close(bed.kept)  # with a checkpoint
    bed.open()
    bed.put(10)
    assert bed.all(limit=20) == bed.whole
    assert (bed.skipped, bed.again) == (0, 0)


def test_a_position_that_is_ahead_of_a_store_set_back_goes_on_at_its_end_and_says_so(bed):
    bed.put(10)
    bed.position = Position(store=bed.kept.id, segment=1, row=50)
    assert bed.ask() == []
    assert bed.skipped == 1
    bed.put(3)
    assert sorted(bed.ask()) == [11, 12, 13]


def test_nobody_asks_for_nothing_for_ever(bed):
    bed.put(3)
    assert [len(bed.ask(limit=n)) for n in (0, -5, 1, 1)] == [1, 1, 1, 0]


@pytest.mark.parametrize("name", ["", "../x", "a b", ".hidden", "x" * 101])
def test_a_name_that_cannot_be_one_is_refused(bed, name):
    with pytest.raises(ValueError, match="name"):
        bed.ask(name=name)


def test_numbers_go_on_after_everything_was_dropped(bed):
    bed.put(10)
    bed.put(10, at=HOUR)
    assert bed.all() == bed.whole
    bed.file(3 * HOUR)
    retain.by_age(bed.kept.con, T0 + 9 * HOUR * SEC, T0)
    bed.close()
    bed.open()
    bed.put(10, at=9 * HOUR)
    assert bed.all() == bed.whole
