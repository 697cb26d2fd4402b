"""Questions that do not fit into memory: they cost neither history nor what is being recorded."""

import os
import subprocess
from contextlib import closing

import duckdb
import pytest
from storebed import SEC, T0, flow, put
from vnet.testing.poll import until

from netflow import history, store
from netflow.history import archive, retain
from netflow.node import Node

pytestmark = pytest.mark.netns

HOUR = 3600
ROWS = 1_200_000


@pytest.fixture
def disk(tmp_path):
    """A disk of 128 MB that only this test writes to."""
    where = tmp_path / "disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "small", where], check=True)
    yield where
    subprocess.run(["umount", "--lazy", where], check=True)


@pytest.fixture
def kept(disk):
    opened = history.open_store(disk / "store", Node("here", 7), memory="64MB")
    store.begin_run(opened, store.Mark(T0))
    yield opened
    opened.con.close()


def free(path):
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def sorting(rows):
    """A question whose records are sorted, which takes some 60 bytes of each."""
    return (
        f"SELECT hash(range) AS h, range::VARCHAR || repeat('a', 40) FROM range({rows}) ORDER BY h"
    )


def test_what_a_question_spills_costs_no_history(kept, disk):
    con = kept.con.cursor()
    archiver = archive.Archiver(kept, con, history.Keeping(), disk / "registry.db")
    for hour in range(3):
        put(kept, flow(sport=hour, start=hour * HOUR, end=hour * HOUR + 1),
            caught_up=T0 + (hour * HOUR + 1) * SEC)  # fmt: skip
    store.commit(kept, None, store.Mark(T0 + 4 * HOUR * SEC))
    assert archive.close_segments(archiver) == 3
    root, clock = disk / "store/history", retain.tick(retain.Clock(), T0 + 4 * HOUR * SEC)
    floor, before = history.Keeping(free=free(disk) - (4 << 20)), free(disk)
    with closing(kept.con.cursor()) as cursor, history.reading(cursor):
        rows = store.select(cursor, sorting(ROWS), {}, 100)
        next(rows)
        assert free(disk) < before - (8 << 20)
        retain.keep(con, root, floor, clock)
        assert con.execute("SELECT count(*) FROM files").fetchall() == [(3,)]
        # It is the question alone that is left out of account.
        retain.keep(con, root, history.Keeping(free=before + 1), clock)
        assert con.execute("SELECT count(*) FROM files").fetchall() == [(2,)]
        rows.close()
    con.close()


def test_a_question_that_spills_leaves_the_collector_room_on_a_disk_that_has_filled_up(kept, disk):
    with closing(kept.con.cursor()) as cursor:
        cursor.execute(sorting(ROWS))
    (disk / "ballast").write_bytes(bytes(free(disk) - (24 << 20)))
    asked = "SELECT current_setting('max_temp_directory_size')"
    began = kept.con.execute(asked).fetchall()
    archiver = history.start(kept, history.Keeping(), disk / "registry.db")
    try:
        until(lambda: kept.con.execute(asked).fetchall() != began, what="the archiver looks")
        with (
            closing(kept.con.cursor()) as cursor,
            pytest.raises(duckdb.OutOfMemoryException, match="max_temp_directory_size"),
        ):
            cursor.execute(sorting(3 * ROWS))
    finally:
        history.stop(archiver)
    put(kept, flow(sport=9))
