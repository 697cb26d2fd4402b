"""A full disk: from the write that failed until there is room again.

The store is whole as of its last commit, and can be asked. What cannot be
written cannot be kept either, so the collector stops following: it closes its
event socket, since for a reliable listener that does not read the kernel keeps
every connection that ends (and counts it against nf_conntrack_max). Once there
is room it begins anew, as another process would (netflow.resume): what lives is
read back from the store and counted whole, what ended meanwhile is cut, and
from the last commit on there is a gap, ``disk-full``.
"""

from __future__ import annotations

import logging
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from time import time_ns

from netflow import clock, ct, estimate, fresh, nfct, resume, store, systemd, writer
from netflow.state import Buffers, Due, State
from netflow.when import SECOND
from netflow.wire import Gap

WHAT = "disk-full"
LOOK = 1.0
"""Seconds between looks at the disk."""

_log = logging.getLogger("netflow")


def outlast(
    state: State, bell: socket.socket, stopping: Callable[[], bool], error: BaseException
) -> None:
    """Wait until the store can be written to, and begin anew; or until stopping.

    error: what said that it cannot.
    """
    _give_up(state)
    room = _room(error)
    alive_every = systemd.watchdog()
    pause = min(LOOK, alive_every) if alive_every else LOOK
    while not stopping():
        systemd.notify("WATCHDOG=1")
        select.select([bell], [], [], pause)
        with suppress(BlockingIOError):
            bell.recv(4096)
        if not store.has_room(state.store, room):
            continue
        try:
            _begin_anew(state)
            return
        except Exception as again:
            if not store.is_full(again):
                raise
            room = max(room, _room(again))
            _stop_following(state)


def _room(error: BaseException) -> int:
    """Bytes to wait for: more than a commit wants, or it would be full again at once."""
    return max(store.ROOM, 2 * error.wanted if isinstance(error, store.FullError) else 0)


def gap(state: State) -> list[Gap]:
    """The gap that goes on, if the disk is full: until this moment."""
    since = state.full_since  # once: it may be over in this moment
    return [Gap(since=since, until=time_ns(), what=WHAT)] if since else []


def _give_up(state: State) -> None:
    _stop_following(state)
    last = store.patiently(lambda: store.last_run(state.store.con))
    state.full_since = last.until if last else state.began.real
    since = datetime.fromtimestamp(state.full_since // SECOND, UTC)
    _log.error(
        "the disk of %s is full: nothing is recorded from %s on, until there is room; "
        "questions are answered", state.store.path, f"{since:%Y-%m-%dT%H:%M:%SZ}",
    )  # fmt: skip
    systemd.notify("STATUS=the disk is full: nothing is recorded")


def _stop_following(state: State) -> None:
    """Nothing is held: no events, no connections, no records."""
    fresh.end(state.fresh)
    writer.stop(state.writer)
    state.events.close()
    state.requests.close()
    state.table, state.buffers, state.due = ct.Table(), Buffers(), Due()
    state.loss, state.owed = None, []


def _begin_anew(state: State) -> None:
    state.writer = writer.start(state.fresh.bell)
    state.events = nfct.open_events(state.receive_buffer)
    began = clock.now()  # as in collect: the gap ends when events are heard
    state.requests = nfct.open_requests()
    state.dropped = 0
    state.began = state.caught_up = state.looked = began
    state.rates = estimate.begin(began)
    resume.resume(state, WHAT)
    writer.call(state.writer, lambda: None)  # all of that is durable
    state.full_since = 0
    fresh.begin(state.fresh)
    _log.warning("there is room again: collecting goes on, with a gap (%s)", WHAT)
    systemd.notify(f"STATUS={len(state.table)} live connections")
