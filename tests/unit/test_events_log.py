"""The log of events: whole lines, two files, and what is asked for."""

import json
import os
import resource
import stat
import threading
from contextlib import closing, contextmanager

import pytest
from vnet.eventlog import Asked
from vnet.paths import Paths

from vnet import eventlog

pytestmark = pytest.mark.unit


@pytest.fixture
def paths(tmp_path):
    return Paths(tmp_path / "etc", tmp_path, tmp_path / "run")


def line(number: int, **values) -> bytes:
    made = {"time": f"2026-01-01T00:00:{number:012.9f}Z", "kind": "raw", "slice": "a", "n": number}
    return json.dumps(made | values, separators=(",", ":")).encode() + b"\n"


def numbers(paths, limit=None, **asked):
    return [event["n"] for event in eventlog.read(paths, Asked(**asked), limit)[0]]


def test_only_root_and_its_group_may_read_it(paths):
    before = os.umask(0)
    try:
        eventlog.append(paths, line(1))
    finally:
        os.umask(before)
    assert stat.S_IMODE(eventlog.path(paths).stat().st_mode) == 0o640


def test_the_file_before_is_kept_and_the_one_before_that_is_not(paths):
    for number in range(9):
        eventlog.append(paths, line(number), rotate_at=3 * len(line(0)))
    assert numbers(paths) == [3, 4, 5, 6, 7, 8]
    assert sorted(file.name for file in paths.state_dir.iterdir()) == [
        "events.jsonl",
        "events.jsonl.1",
    ]
    eventlog.append(paths, line(9), rotate_at=3 * len(line(0)))
    assert numbers(paths) == [6, 7, 8, 9]


def test_a_file_is_never_longer_than_allowed_but_by_one_batch_alone(paths):
    eventlog.append(paths, line(1) * 10, rotate_at=100)
    assert numbers(paths) == [1] * 10
    eventlog.append(paths, line(2), rotate_at=100)
    assert eventlog.path(paths).read_bytes() == line(2)


def test_half_a_line_that_a_killed_writer_left_is_cut_off(paths):
    for half in (b"", b"{", line(2)[:-1], b"x" * 10000):
        eventlog.path(paths).write_bytes(line(1) + half)
        assert numbers(paths) == [1], "it is not read"
        eventlog.append(paths, line(3))
        assert eventlog.path(paths).read_bytes() == line(1) + line(3)
    eventlog.path(paths).write_bytes(b"y" * 9000)
    eventlog.append(paths, line(4))
    assert eventlog.path(paths).read_bytes() == line(4)


@contextmanager
def files_end_at(size: int):
    """The kernel writes no file beyond this size: the first write is short, the next fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_of_what_does_not_fit_on_the_disk_nothing_is_written(paths):
    eventlog.append(paths, line(1))
    with files_end_at(int(2.5 * len(line(1)))), pytest.raises(OSError, match="too large"):
        eventlog.append(paths, line(2) + line(3))
    assert eventlog.path(paths).read_bytes() == line(1)
    eventlog.append(paths, line(4))
    assert numbers(paths) == [1, 4]


def test_a_filter_tells_by_time_slice_and_kind(paths):
    eventlog.append(paths, line(1) + line(2, slice="b") + line(3, kind="bind") + line(4))
    assert numbers(paths) == [1, 2, 3, 4]
    assert numbers(paths, slice="a") == [1, 3, 4]
    assert numbers(paths, slice="b") == [2]
    assert numbers(paths, kind="bind") == [3]
    assert numbers(paths, kind="bind", slice="b") == []
    assert numbers(paths, since="2026-01-01T00:00:03.000000000Z") == [3, 4]
    # the words of one member are not taken for another's
    eventlog.append(paths, line(5, slice=None, comm='"slice":"c"') + line(6, slice="c"))
    assert numbers(paths, slice="c") == [6]


def test_a_limit_keeps_the_newest_and_counts_all(paths):
    for number in range(10):
        eventlog.append(paths, line(number), rotate_at=6 * len(line(0)))
    found, count = eventlog.read(paths, Asked(), 3)
    assert ([event["n"] for event in found], count) == ([7, 8, 9], 10)


def test_lines_that_are_not_ours_are_passed_over(paths):
    foreign = b'nonsense\n\xff\xfe\n[1]\n7\n\n{"time":3}\n{"kind":"raw"}\n'
    eventlog.append(paths, line(1) + foreign + line(2))
    assert numbers(paths, kind="raw") == [1, 2]
    assert numbers(paths) == [1, 2]


def test_no_log_is_no_events(paths):
    assert eventlog.read(paths, Asked()) == ([], 0)


def test_a_follower_sees_each_new_event_once_over_rotations(paths):
    eventlog.append(paths, line(0))
    with closing(eventlog.Tail(paths, Asked())) as tail:
        assert tail.new() == []
        seen = []
        for number in range(1, 20):
            eventlog.append(paths, line(number), rotate_at=3 * len(line(10)))
            if number % 2:
                seen += tail.new()
        seen += tail.new()
        assert [event["n"] for event in seen] == list(range(1, 20))


def test_a_follower_that_slept_over_two_rotations_has_missed_none(paths):
    eventlog.append(paths, line(0))
    with closing(eventlog.Tail(paths, Asked())) as tail:
        for number in range(1, 6):
            eventlog.append(paths, line(number), rotate_at=2 * len(line(10)))
        assert [event["n"] for event in tail.new()] == [1, 2, 3, 4, 5]
        eventlog.append(paths, line(6), rotate_at=2 * len(line(10)))
        assert [event["n"] for event in tail.new()] == [6]


def test_a_follower_waits_for_a_log_that_is_not_there_yet(paths):
    with closing(eventlog.Tail(paths, Asked(kind="raw"))) as tail:
        assert tail.new() == []
        eventlog.append(paths, line(1) + line(2, kind="bind"))
        assert [event["n"] for event in tail.new()] == [1]


def test_a_follower_reads_a_line_when_it_is_whole(paths):
    eventlog.append(paths, line(1))
    with closing(eventlog.Tail(paths, Asked())) as tail, eventlog.path(paths).open("ab") as out:
        out.write(line(2)[:20])
        out.flush()
        assert tail.new() == []
        out.write(line(2)[20:])
        out.flush()
        assert [event["n"] for event in tail.new()] == [2]


def test_a_follower_goes_on_behind_half_a_line_that_was_cut_off(paths):
    eventlog.append(paths, line(1))
    with closing(eventlog.Tail(paths, Asked())) as tail:
        with eventlog.path(paths).open("ab") as out:
            out.write(line(2)[:20])
        assert tail.new() == []
        eventlog.append(paths, b"")  # cuts it off
        assert tail.new() == []
        eventlog.append(paths, line(3))
        assert [event["n"] for event in tail.new()] == [3]


def test_a_reader_beside_a_writer_who_rotates_sees_no_gap(paths):
    done = threading.Event()

    def write():
        for number in range(600):
            eventlog.append(paths, line(number), rotate_at=30 * len(line(1000)))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not done.is_set():
            seen = numbers(paths)
            assert seen == list(range(seen[0], seen[0] + len(seen))) if seen else True
    finally:
        writer.join()
    assert numbers(paths)[-1] == 599
