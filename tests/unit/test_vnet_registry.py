"""xids: stable, never two holders, rested before reuse, and a history that stays."""

import os
import resource
import sqlite3
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vnet.errors import ConflictError
from vnet.registry import Request, Tenure

from vnet import registry

pytestmark = pytest.mark.unit

HOUR = 3600 * 10**9
REST = 24 * HOUR


@pytest.fixture
def book(tmp_path):
    return tmp_path / "state" / "registry.db"


def sync(book, now, *wanted, rest=REST):
    requests = [Request(*((item,) if isinstance(item, str) else item)) for item in wanted]
    result = registry.assign(book, requests, now, rest)
    registry.release(book, result.ended, now)
    return result.xids


def test_numbers_go_up_from_256_and_stay(book):
    assert sync(book, 1, "b", "a") == {"b": 256, "a": 257}
    assert sync(book, 2, "a", "c", "b") == {"a": 257, "c": 258, "b": 256}


def test_a_slice_that_comes_back_gets_its_number_again(book):
    sync(book, 1, "a", "b")
    sync(book, 2, "b")
    assert sync(book, 3, "b", "a") == {"b": 257, "a": 256}
    with registry.open_readonly(book) as known:
        assert known.tenures("a") == [Tenure(256, "a", 1, 2), Tenure(256, "a", 3, None)]


def test_a_number_rests_and_never_used_ones_come_first(book):
    sync(book, 0, "a")
    sync(book, HOUR)
    assert sync(book, 2 * HOUR, "b") == {"b": 257}
    assert sync(book, 100 * HOUR, "b", "c") == {"b": 257, "c": 258}


def test_when_no_number_is_unused_the_lowest_rested_one_is_given(book, monkeypatch):
    monkeypatch.setattr(registry, "LAST", 257)
    sync(book, 0, "a", "b")
    sync(book, HOUR, "b")
    with pytest.raises(registry.VnetError, match="held or rests"):
        sync(book, 2 * HOUR, "b", "c")
    assert sync(book, 25 * HOUR, "b", "c") == {"b": 257, "c": 256}


def test_a_fixed_number_is_honoured_and_a_held_one_refused(book):
    assert sync(book, 1, ("a", 7), "b") == {"a": 7, "b": 256}
    with pytest.raises(ConflictError, match="slice b holds it"):
        sync(book, 2, ("c", 256), "a", "b")
    with registry.open_readonly(book) as known:
        assert set(known.held()) == {"a", "b"}


def test_a_fixed_number_that_rests_is_refused_unless_told(book):
    sync(book, 0, ("a", 7))
    sync(book, HOUR)
    with pytest.raises(ConflictError, match="it rests until 1970-01-02 01:00:00Z"):
        sync(book, 2 * HOUR, ("b", 7))
    assert sync(book, 2 * HOUR, ("b", 7), rest=0) == {"b": 7}


def test_a_slice_may_be_given_another_fixed_number(book):
    sync(book, 1, "a")
    assert sync(book, 2, ("a", 9)) == {"a": 9}
    with registry.open_readonly(book) as known:
        assert known.holder(256, 1) == "a"
        assert known.holder(256, 2) is None
        assert known.holder(9, 2) == "a"
    assert sync(book, 3, "a") == {"a": 9}


def test_a_record_is_named_by_who_held_the_number_then(book):
    sync(book, 10, ("a", 7))
    sync(book, 20)
    sync(book, 30, ("b", 7), rest=0)
    with registry.open_readonly(book) as known:
        at = {when: known.holder(7, when) for when in (9, 10, 19, 20, 29, 30, 10**18)}
        assert at == {9: None, 10: "a", 19: "a", 20: None, 29: None, 30: "b", 10**18: "b"}
        assert known.tenures(xid=7) == [Tenure(7, "a", 10, 20), Tenure(7, "b", 30, None)]


def test_ended_tenures_stay_open_until_released(book):
    sync(book, 1, "a")
    result = registry.assign(book, [], 2, REST)
    assert held(book) == {"a": 256}
    registry.release(book, result.ended, 3)
    assert held(book) == {}


def held(book):
    with registry.open_readonly(book) as known:
        return {name: tenure.xid for name, tenure in known.held().items()}


def test_a_reader_sees_the_registry_as_it_was_when_he_opened_it_and_holds_up_no_writer(book):
    sync(book, 1, "a")
    with registry.open_readonly(book) as known:
        known._connection.execute("BEGIN")
        assert known.holder(256, 1) == "a"  # and so it holds SQLite's lock for readers
        sync(book, 2, "b")
        assert known.holder(256, 2) == "a"
        assert known.holder(257, 2) is None
    assert held(book) == {"b": 257}


def tenures(book):
    with registry.open_readonly(book) as known:
        return known.tenures()


@pytest.mark.parametrize("released", [False, True])
def test_what_is_taken_back_was_never_there_unless_packets_may_have_been_marked_with_it(
    book, released
):
    registry.assign(book, requests(a=["alice"], b=["bob"]), 1)
    before, whole = tenures(book), book.read_bytes()
    for marked in (None, 9):
        noted = []
        asked = [Request("a", 7, users=("carol",)), Request("c")]
        result = registry.assign(book, asked, 2, REST, noted.append)
        assert noted == [result]
        assert [tenure.slice for tenure in result.opened] == ["a", "c"]
        if released:
            registry.release(book, result.ended, 3)
        for _ in range(2):
            undo = result.opened, result.ended, result.members[0], marked
            registry.take_back(book, *undo)
            assert held(book) == {"a": 256, "b": 257}
            with registry.open_readonly(book) as known:
                assert known.users() == {"a": ["alice"], "b": ["bob"]}
            marks = [Tenure(7, "a", 2, 9), Tenure(258, "c", 2, 9)] if marked else []
            assert tenures(book) == [*before, *marks]
    registry.take_back(book, [Tenure(999, "x", 1, None)], [], [("a", "alice"), ("b", "bob")], None)
    assert len(book.read_bytes()) == len(whole)


def test_nothing_is_noted_and_nothing_written_where_nothing_changes(book):
    sync(book, 1, "a")

    def written() -> tuple[int, ...]:  # not when it was read last
        stat = book.stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns

    before = written()
    registry.assign(book, [Request("a")], 2, REST, lambda found: pytest.fail(f"{found}"))
    assert written() == before


@pytest.mark.parametrize("content", [b"this is no registry" * 500, "pages"])
def test_a_damaged_registry_is_one_clear_error_to_all_who_ask_and_stays_as_it_is(book, content):
    sync(book, 1, "a")
    if content == "pages":
        content = book.read_bytes()[:4096] + os.urandom(1 << 14)
    book.write_bytes(content)
    for ask in (
        lambda: registry.assign(book, [Request("b")], 2),
        lambda: registry.release(book, [Tenure(256, "a", 1, None)], 2),
        lambda: tenures(book),
    ):
        with pytest.raises(registry.VnetError, match=f"registry {book}: ") as caught:
            ask()
        assert isinstance(caught.value, sqlite3.Error)  # who reads it may know no vnet
        assert "backup" in caught.value.cure
    assert book.read_bytes() == content


def test_a_write_that_fails_leaves_the_registry_as_it_was(book):
    sync(book, 1, "a")
    before = book.read_bytes()
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, usual[1]))
    try:
        with pytest.raises(registry.VnetError, match="File too large"):
            sync(book, 2, "a", "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert book.read_bytes() == before
    assert [path.name for path in book.parent.iterdir()] == ["registry.db"]


def test_a_reader_cannot_write(book):
    sync(book, 1, "a")
    with registry.open_readonly(book) as known, pytest.raises(sqlite3.OperationalError):
        known._connection.execute("DELETE FROM tenure")


def test_no_registry_is_told_as_such(book):
    with pytest.raises(FileNotFoundError, match="no registry yet"):
        registry.open_readonly(book)


def test_the_file_can_be_read_by_all_and_written_by_its_owner(book):
    sync(book, 1, "a")
    assert oct(book.stat().st_mode & 0o777) == "0o644"
    assert oct(book.parent.stat().st_mode & 0o777) == "0o755"
    assert [path.name for path in book.parent.iterdir()] == ["registry.db"]


def test_a_writer_killed_in_a_transaction_has_written_nothing(book):
    sync(book, 1, "a")
    code = (
        "import sqlite3, os, signal\n"
        f"c = sqlite3.connect({str(book)!r}, isolation_level=None)\n"
        "c.execute('BEGIN IMMEDIATE')\n"
        "c.execute('INSERT INTO tenure VALUES (900, \"x\", 1, NULL)')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert sync(book, 2, "a", "b") == {"a": 256, "b": 257}
    with registry.open_readonly(book) as known:
        assert known.tenures(xid=900) == []


def test_ten_thousand_slices_get_their_numbers_in_no_time(book):
    requests = [f"s{n}" for n in range(10_000)]
    xids = sync(book, 1, *requests)
    assert sorted(xids.values()) == list(range(256, 10_256))
    assert sync(book, 2, *reversed(requests)) == xids


_steps = st.lists(
    st.tuples(
        st.integers(0, 30),  # hours that pass
        st.lists(st.sampled_from("abcdef"), unique=True),
        st.sampled_from("abcdef"),
        st.none() | st.integers(1, 3) | st.integers(256, 259),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(_steps)
def test_whatever_comes_no_number_has_two_holders_or_too_little_rest(steps):
    """The rules of the registry, over any course of events."""
    tenures, now = [], 0
    for hours, names, chosen, xid in steps:
        now += hours * HOUR + 1
        requests = [Request(name, xid if name == chosen else None) for name in names]
        try:
            result = registry.plan(tenures, requests, now, REST)
        except ConflictError:
            continue
        assert sorted(result.xids) == sorted(names)
        assert len(set(result.xids.values())) == len(names)
        tenures = [
            Tenure(old.xid, old.slice, old.since, now) if old in result.ended else old
            for old in tenures
        ] + result.opened
        tenures.sort(key=lambda tenure: tenure.since)
        assert {t.slice: t.xid for t in tenures if t.until is None} == result.xids
    for one in tenures:
        for two in tenures:
            if one.xid == two.xid and one.slice != two.slice and one.since <= two.since:
                assert one.until is not None
                assert one.until + REST <= two.since


def test_times_are_shown_in_utc():
    os.environ["TZ"] = "Asia/Tokyo"
    assert registry.moment(0) == "1970-01-01 00:00:00Z"


def requests(**users):
    return [Request(name, users=tuple(called)) for name, called in users.items()]


def test_users_are_those_that_were_asked_for_last(book):
    registry.assign(book, requests(a=["alice", "1005"], b=["alice"], c=[]), 1)
    with registry.open_readonly(book) as known:
        assert known.users() == {"a": ["1005", "alice"], "b": ["alice"]}
        assert known.slices_of(["alice", "1000"]) == ["a", "b"]
        assert known.slices_of(["bob", "1005"]) == ["a"]
        assert known.slices_of(["bob"]) == []
    registry.assign(book, requests(a=["bob"], b=[]), 2)
    with registry.open_readonly(book) as known:
        assert known.users() == {"a": ["bob"]}
        assert known.slices_of(["alice", "1005"]) == []


def test_a_registry_without_users_can_be_read_and_gets_them_when_it_is_written_to(book):
    registry.assign(book, requests(a=[]), 1)
    with registry.open_readonly(book) as known:
        tables = known._connection.execute("SELECT name FROM sqlite_master").fetchall()
        assert ("member",) not in tables  # as every registry was once
        assert known.users() == {}
        assert known.slices_of(["alice"]) == []
    registry.assign(book, requests(a=["alice"]), 2)
    with registry.open_readonly(book) as known:
        assert known.users() == {"a": ["alice"]}
        assert known.tenures() == [Tenure(256, "a", 1, None)]


def test_a_refused_assignment_changes_no_users(book):
    registry.assign(book, requests(a=["alice"]), 1)
    with pytest.raises(ConflictError):
        registry.assign(book, [Request("b", 256, users=("bob",))], 2)
    with registry.open_readonly(book) as known:
        assert known.users() == {"a": ["alice"]}
