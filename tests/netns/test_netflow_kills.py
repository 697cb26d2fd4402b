"""kill -9 at any moment: nothing that was acknowledged is lost, nothing is there twice.

``NETFLOW_KILLS=50`` runs the long form (``make kills``).
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager

import pytest
from netflowbed import accounting, answers, collector, connmark, destroy, launch, spread
from vnet.testing.poll import until

pytestmark = pytest.mark.netns

KILLS = int(os.environ.get("NETFLOW_KILLS", "8"))

KILLED = """
import os, runpy, signal, sys
from netflow import history

class Con:
    def __init__(self, con): self.con, self.done = con, 0
    def __getattr__(self, name): return getattr(self.con, name)
    def execute(self, *words):
        found = self.con.execute(*words)
        self.done += 1
        if self.done == int(os.environ["KILL_AFTER"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return found

def open_store(*words, _open=history.open_store):
    kept = _open(*words)
    kept.con = Con(kept.con)
    return kept

history.open_store = open_store
sys.argv = sys.argv[3:]
runpy.run_module("netflow", run_name="__main__")
"""
"""Runs a collector that is killed after so many statements of its writer."""
STATEMENTS = 30
"""A start has some fewer, up to the first commit."""

CUT_SHORT = """
import os, runpy, signal, subprocess, sys
from netflow import feed, store

def read_dump(*words, _read=feed.read_dump, **more):
    feed.read_dump = _read  # a slow writer leaves time for another one before the end
    whole = _read(*words, **more)
    for does in (["spread", "[5, 100]"], ["destroy", "[]"]):
        subprocess.run([sys.executable, "-m", "netflowbed", *does], check=True)
    return whole

feed.read_dump = read_dump
store.end_live = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.argv = sys.argv[3:]
runpy.run_module("netflow", run_name="__main__")
"""
"""A collector during whose first look connections come and go; it is killed once it has stored
which ones have ended before, but not those."""


@pytest.fixture
def node(ns):
    accounting(ns, lasting=600)
    connmark(ns, 256)
    return ns


@contextmanager
def churn(ns, life, rate):
    """Traffic in the namespace; call what is given to stop it and to learn what was sent."""
    words = (sys.executable, "-m", "churn", str(life), str(rate))
    process = ns.popen(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "ready\n"

        def sent():
            process.stdin.write("\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield sent
    finally:
        process.kill()
        process.communicate()


def shares(record):
    """What identifies a share for ever; in Parquet, times are milliseconds."""
    sides = [record[s][k] for s in ("originator", "responder") for k in ("packets", "bytes")]
    name = record["src"], record["sport"], record["dst"]
    times = record["start"][:23], record["end"][:23]
    return *name, *times, record["reason"], *sides


def test_kills_at_any_moment_lose_nothing_acknowledged_and_record_nothing_twice(
    node, tmp_path, monkeypatch
):
    # Small segments: there is always a Parquet file being written or listed.
    monkeypatch.setenv("NETFLOW_SEGMENT_ROWS", "200")
    rng = random.Random()
    seed = rng.randrange(1 << 30)
    rng.seed(seed)
    print("seed", seed)
    acknowledged = set()
    kills_while = Counter()
    with churn(node, life=2.0, rate=120) as sent:
        for _ in range(KILLS):
            flows = launch(node, tmp_path, "--active-timeout", "1s")
            try:
                if rng.random() < 0.25:
                    time.sleep(rng.uniform(0.3, 1.2))  # at its start, its first dump
                    kills_while["starting"] += 1
                else:
                    until(lambda flows=flows: answers(flows))
                    time.sleep(rng.uniform(0.0, 2.5))
                    if rng.random() < 0.7:
                        seen = flows.records()
                        assert len({shares(r) for r in seen}) == len(seen)
                        acknowledged |= {shares(r) for r in seen}
                    kills_while["running"] += 1
            finally:
                flows.process.kill()
                flows.process.wait()
        with collector(node, tmp_path, "--active-timeout", "1s") as flows:
            truth = sent()
            records, gaps = flows.ask(since=1)
            check(records, gaps, truth, acknowledged)
            assert flows.stop() == 0
        with collector(node, tmp_path) as flows:
            again, gaps = flows.ask(since=1)
            check(again, gaps, truth, {shares(r) for r in records})
    print(kills_while, len(records), "records", len(truth["short"]), "connections ended")


def test_a_start_killed_after_any_statement_forgets_no_connection_that_was_open(
    node, tmp_path, monkeypatch
):
    monkeypatch.setenv("NETFLOW_SEGMENT_ROWS", "1")
    kept = tmp_path / "kept"
    kept.mkdir()
    with collector(node, kept, "--active-timeout", "1s") as flows:
        spread(node, 3)
        until(lambda: len(flows.records(since=1)) == 3)
        # Their shares are in files; what tells the next start of them is carried.
        until(lambda: flows.status()["hot"] == 0)
    destroy(node)
    for number in range(1, STATEMENTS):
        base = tmp_path / f"{number}"
        shutil.copytree(kept, base, ignore=shutil.ignore_patterns("*.sock"))
        monkeypatch.setenv("KILL_AFTER", str(number))
        killed = launch(node, base, under=(sys.executable, "-c", KILLED))
        assert killed.process.wait(60) == -signal.SIGKILL
        with collector(node, base) as flows:
            records, gaps = flows.ask(since=1)
            assert Counter(r["reason"] for r in records) == {"active": 3, "cut": 3}, number
            assert "not-running" in {gap.what for gap in gaps}, number
        shutil.rmtree(base)


def test_what_ended_while_a_start_that_was_killed_took_its_first_look_is_in_a_gap(node, tmp_path):
    with collector(node, tmp_path) as flows:
        spread(node, 1)
        until(lambda: len(flows.records(since=1)) == 1)
        assert flows.stop() == 0
    killed = launch(node, tmp_path, under=(sys.executable, "-c", CUT_SHORT))
    assert killed.process.wait(60) == -signal.SIGKILL
    with collector(node, tmp_path) as flows:
        records, gaps = flows.ask(since=1)
    assert Counter(r["reason"] for r in records) == {"active": 1, "cut": 1}
    _, before, after = gaps
    assert {before.what, after.what} == {"not-running"}
    assert after.since <= before.until


def of(records, name):
    return [r for r in records if (r["sport"], r["dst"]) == name]


def check(records, gaps, truth, acknowledged):
    assert len({shares(r) for r in records}) == len(records)
    missing = acknowledged - {shares(r) for r in records}
    assert not missing, f"{len(missing)} acknowledged records are gone: {sorted(missing)[:3]}"
    told, ended, cut = Counter(), Counter(), Counter()
    for record in records:
        name = record["sport"], record["dst"]
        told[name] += record["originator"]["packets"]
        ended[name] += record["reason"] in ("idle", "closed")
        cut[name] += record["reason"] == "cut"
    for port, packets in truth["long"].items():
        assert told[int(port), "127.0.0.1"] == packets, (port, gaps)
    for port, there, packets, _ in truth["living"]:
        assert told[port, there] == packets
    lost = 0
    for port, there, packets, began, stop in truth["short"]:
        name = port, there
        # Looked for only if needed: there are tens of thousands.
        assert told[name] <= packets, (packets, of(records, name))
        assert ended[name] + cut[name] <= 1, of(records, name)
        if told[name] == packets and ended[name]:
            continue
        lost += 1
        near = [g for g in gaps if g.since <= stop and g.until >= began]
        assert near, (name, began, stop, gaps)
        # what was seen of it and ended unseen says that it was cut
        assert ended[name] or cut[name] or told[name] == 0, name
    print(lost, "ended unseen, estimated", sum(g.estimate or 0 for g in gaps))
