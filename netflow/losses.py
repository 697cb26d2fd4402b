"""What is missing from the records is written down: from when to when, why, and about how much."""

from __future__ import annotations

import logging
from functools import partial

from netflow import clock, estimate, nfct, store, writer
from netflow.clock import Now
from netflow.state import Loss, State
from netflow.when import SECOND

_log = logging.getLogger("netflow")


def overrun(state: State) -> None:
    """The receive buffer was full. Events are lost from when we had last caught up."""
    if state.loss is not None:
        return
    job = partial(
        store.open_loss, state.store, state.caught_up.real, "overrun", dropped(state), None
    )
    number = writer.post(state.writer, job)
    state.loss = Loss(number, state.dropped, state.table.never_ended)
    state.due.resync = 0.0
    _log.warning("the receive buffer overran: events are lost, reading all entries anew")


def dropped(state: State) -> int:
    """Events the kernel could not deliver since the last loss ended."""
    before = state.loss.dropped_before if state.loss else state.dropped
    return nfct.dropped(state.events) - before & 0xFFFFFFFF


def end_overrun(state: State) -> None:
    """Note that the overrun that goes on, if one does, is over.

    The kernel tells the ends that did not fit again, so what is missing is of
    connections that are gone and whose end it never tells: see settle().
    """
    loss = state.loss
    if loss is None:
        return
    now = nfct.dropped(state.events)
    loss.until, loss.events = clock.now().real, now - loss.dropped_before & 0xFFFFFFFF
    _log.warning("about %d events were lost", loss.events)
    state.dropped = now
    state.loss = None
    state.owed.append(loss)
    settle(state)


def settle(state: State) -> None:
    """Say of each overrun how many ends are missing; for good when none can come any more.

    An end that is missing does not say of which: it counts for all of those that
    it may be of, that no answer about one of them says less than is missing.
    """
    missing = state.table.lost
    for loss in state.owed:
        job = partial(_close, state, loss, missing + state.table.never_ended)
        writer.post(state.writer, job)
    if not missing:
        state.owed.clear()


def _close(state: State, loss: Loss, never_ended: int) -> None:
    missing = never_ended - loss.never_ended_before
    store.close_loss(state.store, loss.id.result(), loss.until, loss.events, missing)


def unreadable(state: State, messages: int) -> None:
    """Messages of the kernel did not add up."""
    _note(state, state.caught_up.real, clock.now().real, "unreadable", messages, messages)
    _log.warning("%d messages of the kernel could not be read", messages)


def look_at_clocks(state: State) -> None:
    """Note if the machine's clock was set since the last look.

    Times between what it showed and what it was set to are two times' or
    nobody's: who asks about them must know.
    """
    now = clock.now()
    moved = clock.step(state.looked, now)
    state.looked = now
    if not moved:
        return
    # What happened before the step keeps the time it had; this moment has a new one.
    state.caught_up = Now(state.caught_up.boot + now.offset, state.caught_up.boot)
    _set_clock(state, now.real - moved, now.real)


def _set_clock(state: State, shown: int, put: int) -> None:
    """The clock showed one time (ns) and was set to another."""
    how = "back" if put < shown else "forward"
    note = f"the clock was set {how} by {abs(put - shown) / SECOND:.3f} s"
    _note(state, min(shown, put), max(shown, put), "clock-step", note=note)
    _log.warning("%s: times in between are ambiguous", note)


def silence(state: State, last: store.Run, boot_id: str, what: str = "not-running") -> None:
    """Note the time since the last commit, in which nothing was recorded; what: why."""
    rebooted = boot_id != last.boot_id
    began, opens = state.began, max(estimate.opens(), 0)
    length = max(began.real - last.until, 0)
    if rebooted:
        # Nothing passes while the machine is off; of how long it was off nothing is known.
        length = min(length, began.boot)
    elif last.until_boot:
        length = max(began.boot - last.until_boot, 0)
        if clock.step(Now(last.until, last.until_boot), began):
            _set_clock(state, last.until + length, began.real)
    opened = opens - last.opens if not rebooted and opens >= last.opens else opens
    missing = estimate.missing(length, opened, estimate.Rate(last.per_open, last.per_second))
    note = ""
    if what == "not-running":
        what = "rebooted" if rebooted and last.boot_id else what
        note = "" if last.clean else "the collector before did not stop in order"
    since = min(last.until, began.real if rebooted else began.real - length)
    until = max(last.until, began.real) if rebooted else began.real
    _note(state, since, until, what, estimated=missing, note=note)


def _note(
    state: State, since: int, until: int, what: str, events: int = 0,
    estimated: int | None = None, note: str = "",
) -> None:  # fmt: skip
    job = partial(store.note_loss, state.store, since, until, what, events, estimated, note)
    writer.post(state.writer, job)
