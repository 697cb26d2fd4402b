"""What a run notes about itself: clocks that are set, pauses, and what they are thought to cost."""

import socket
from dataclasses import replace

import numpy as np
import pytest

from netflow import clock, estimate, fresh, losses, node, store, writer
from netflow.clock import Now
from netflow.estimate import Rate
from netflow.fresh import Fresh
from netflow.state import State, mark
from netflow.when import SECOND

pytestmark = pytest.mark.unit

HOUR = 3600 * SECOND
BOOT = "9d0bd3a6-7b66-4d0c-8d5a-3f9b6a2a2a11"


@pytest.fixture
def state(tmp_path):
    """A collector's state over a store, without a kernel."""
    bell, ringer = socket.socketpair()
    now = clock.now()
    made = State(
        receive_buffer=1 << 20, store=store.open_store(tmp_path, node.this_node()),
        writer=writer.start(ringer), events=bell, requests=bell, fresh=Fresh(ringer),
        began=now, caught_up=now, looked=now, rates=estimate.begin(now),
    )  # fmt: skip
    begin(made)
    yield made
    writer.stop(made.writer)
    made.store.con.close()
    bell.close()
    ringer.close()


def begin(state, boot_id=BOOT):
    """A run begins; returns the one before."""
    return writer.call(state.writer, lambda: store.begin_run(state.store, mark(state), boot_id))


def gaps(state):
    writer.call(state.writer, lambda: None)
    return store.gaps(state.store.con, 0, 1 << 62, 1 << 62)[1:]  # without before-first


def test_time_that_passes_is_no_step():
    before = Now(10 * HOUR, HOUR)
    assert clock.step(before, Now(11 * HOUR + SECOND // 20, 2 * HOUR)) == 0
    assert clock.step(before, Now(10 * HOUR, 2 * HOUR)) == -HOUR
    assert clock.step(before, Now(13 * HOUR, 2 * HOUR)) == 2 * HOUR
    assert clock.step(clock.now(), clock.now()) == 0


@pytest.mark.parametrize(("set_by", "how"), [(-HOUR, "back"), (HOUR, "forward")])
def test_a_clock_that_is_set_is_noted_with_both_times(state, monkeypatch, set_by, how):
    now = clock.now()
    monkeypatch.setattr(losses.clock, "now", lambda: now)
    state.looked = Now(now.real - set_by, now.boot)  # what it showed would be so far off
    losses.look_at_clocks(state)
    losses.look_at_clocks(state)  # told once
    [gap] = gaps(state)
    assert gap.what == "clock-step"
    assert gap.until - gap.since == HOUR
    assert gap.note == f"the clock was set {how} by 3600.000 s"
    assert abs(state.caught_up.real - now.real) < HOUR // 2


def test_a_question_waits_for_what_is_new_also_after_the_clock_was_set_back():
    bell, ringer = socket.socketpair()
    known = Fresh(ringer)
    now = clock.now()
    fresh.reached(known, now.boot - 5 * SECOND)
    assert not fresh.wanting(known)
    known.ended = True  # or it would wait for somebody to collect
    # The clock shows what it may: five seconds are missing, not none.
    as_of = fresh.wait(known, now.real)
    assert fresh.wanting(known)
    assert now.real - as_of == pytest.approx(5 * SECOND, abs=SECOND)
    bell.close()
    ringer.close()


def last(state, **what):
    """The run before, as it might have been."""
    return replace(store.last_run(state.store.con), **what)


def test_a_pause_is_as_long_as_the_clock_that_nobody_sets_says(state):
    began = state.began
    before = last(state, until=began.real + HOUR, until_boot=began.boot - 60 * SECOND)
    losses.silence(state, before, BOOT)
    told = {gap.what: gap for gap in gaps(state)}
    assert set(told) == {"not-running", "clock-step"}
    assert told["not-running"].since == began.real - 60 * SECOND
    assert told["not-running"].until == began.real
    step = told["clock-step"]
    assert step.since == began.real and step.until == began.real + HOUR + 60 * SECOND


def test_a_pause_is_estimated_by_opens_and_by_the_clock(state):
    opened = max(estimate.opens(), 0)
    before = last(
        state, until=state.began.real - 100 * SECOND, until_boot=state.began.boot - 100 * SECOND,
        opens=max(opened - 40, 0), per_open=0.5, per_second=3.0, clean=True,
    )  # fmt: skip
    losses.silence(state, before, BOOT)
    [gap] = gaps(state)
    expected = 300 + 0.5 * min(40, opened)
    assert gap.what == "not-running" and gap.note == ""
    assert expected <= gap.estimate <= expected + 20  # others may open some meanwhile


def test_after_a_boot_nothing_is_estimated_for_the_time_the_machine_was_off(state):
    before = last(
        state, until=state.began.real - 1000 * HOUR, until_boot=HOUR, boot_id="another",
        per_open=0.0, per_second=1.0,
    )  # fmt: skip
    losses.silence(state, before, BOOT)
    [gap] = gaps(state)
    assert gap.what == "rebooted" and gap.since == before.until
    assert gap.estimate <= min(state.began.boot, 1000 * HOUR) / SECOND + 1
    assert "did not stop in order" in gap.note


def test_a_boot_after_the_clock_was_set_back_leaves_no_time_untold(state):
    """It was ahead when the run before had begun, or is behind now."""
    before = last(state, until=state.began.real + 2 * HOUR, until_boot=HOUR, boot_id="another")
    losses.silence(state, before, BOOT)
    [gap] = gaps(state)
    assert (gap.what, gap.since, gap.until) == ("rebooted", state.began.real, before.until)


def test_how_far_a_run_is_follows_a_clock_that_is_set_back(state):
    def until(real, boot):
        made = replace(mark(state), caught_up=real, boot=boot)
        writer.call(state.writer, lambda: store.commit(state.store, None, made))
        return store.last_run(state.store.con).until

    real, boot = state.began.real, state.began.boot
    assert until(real + HOUR, boot + SECOND) == real + HOUR
    assert until(real, boot + SECOND) == real + HOUR  # no later than the one before
    assert until(real + SECOND, boot + 2 * SECOND) == real + SECOND


def ends(count, proto=17, reason=1):
    return {
        "reason": np.full(count, reason, dtype=np.uint8),
        "proto": np.full(count, proto, dtype=np.uint8),
    }


def test_rates_are_of_ends_only_and_a_young_collector_goes_by_the_last_ones():
    now = clock.now()
    rates = estimate.begin(now)
    opened = rates.now.opens
    estimate.count(rates, ends(600), now)
    estimate.count(rates, ends(900, reason=3), now)  # active shares
    estimate.count(rates, ends(50, proto=6, reason=2), now)
    later = Now(now.real, now.boot + 30 * SECOND)
    assert estimate.rate(rates, later, opened + 100) == Rate(0.5, 20.0)
    rates.last = Rate(0.7, 40.0)
    assert estimate.rate(rates, later, opened + 100) == Rate(0.5, 30.0)
    assert estimate.rate(rates, later, opened).per_open == 0.7
    old = Now(now.real, now.boot + 2 * estimate.WINDOW)
    estimate.count(rates, ends(0), old)
    estimate.count(rates, ends(0), Now(now.real, old.boot + 2 * estimate.WINDOW))
    assert len(rates.before) == 1 and rates.now.other == 0


def test_a_writer_that_failed_says_so_to_whoever_gives_it_work():
    bell, ringer = socket.socketpair()
    broken = writer.start(ringer)
    with pytest.raises(OSError, match="no space"):
        writer.call(broken, lambda: (_ for _ in ()).throw(OSError("no space")))
    assert bell.recv(1) == b"\0"
    done = []
    with pytest.raises(OSError, match="no space"):
        writer.post(broken, lambda: done.append(1))
    writer.stop(broken)
    assert not done
    bell.close()
    ringer.close()
