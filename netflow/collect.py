"""The collector: its loop, its life, and what it tells those who ask.

One thread follows the kernel (netflow.feed), another one writes
(netflow.writer), and questions are answered by others (netflow.server).
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time_ns
from typing import Any

import duckdb

from netflow import (
    clock,
    estimate,
    feed,
    figures,
    fresh,
    full,
    history,
    losses,
    nfct,
    resume,
    server,
    store,
    systemd,
    writer,
)
from netflow.feed import dump, take_events
from netflow.fresh import Fresh
from netflow.names import Names
from netflow.node import Node
from netflow.state import State, commit
from netflow.sums import Sums
from netflow.when import SECOND

_log = logging.getLogger("netflow")


@dataclass(frozen=True)
class Options:
    """What ``netflow collect`` was told. active_timeout in ns, receive_buffer in bytes."""

    store: Path
    node: Node
    keeping: history.Keeping
    socket: Path
    group: str | None
    registry: Path
    active_timeout: int
    receive_buffer: int
    verbose: bool


def run(options: Options) -> int:
    """Collect until SIGTERM or SIGINT; returns the exit code."""
    logging.basicConfig(
        stream=sys.stderr,
        format="netflow: %(message)s",
        level=logging.DEBUG if options.verbose else logging.INFO,
    )
    try:
        for warning in nfct.check_settings():
            _log.warning(warning)
        with _stop_signals() as (bell, ringer, stopping):
            _collect(options, bell, ringer, stopping)
    except (nfct.KernelError, store.StoreError, server.SocketError) as error:
        _log.error("%s", error)
        return 1
    except duckdb.Error as error:
        # The store is whole up to the last commit; a new collector goes on from there.
        _log.error("cannot write to %s: %s", options.store, str(error).splitlines()[0])
        return 1
    except OSError as error:
        _log.error("cannot go on: %s", error)
        return 1
    return 0


@dataclass
class Stopping:
    """Set by SIGTERM and SIGINT."""

    asked: bool = False


@contextmanager
def _stop_signals() -> Iterator[tuple[socket.socket, socket.socket, Stopping]]:
    """A bell that wakes the loop, rung by signals and by those who wait for fresh data."""
    stopping = Stopping()

    def stop(number: int, frame: Any) -> None:
        stopping.asked = True

    bell, ringer = socket.socketpair()
    bell.setblocking(False)
    ringer.setblocking(False)
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.set_wakeup_fd(ringer.fileno(), warn_on_full_buffer=False)
    try:
        yield bell, ringer, stopping
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        bell.close()
        ringer.close()


def _collect(
    options: Options, bell: socket.socket, ringer: socket.socket, stopping: Stopping
) -> None:
    kept = history.open_store(options.store, options.node)
    # Events are asked for before the gap before this run ends, and that before the
    # first dump: what comes in between is recorded, and never missed.
    events = nfct.open_events(options.receive_buffer)
    began = clock.now()
    state = State(
        receive_buffer=options.receive_buffer,
        store=kept,
        writer=writer.start(ringer),
        events=events,
        requests=nfct.open_requests(),
        fresh=Fresh(ringer),
        began=began,
        caught_up=began,
        looked=began,
        rates=estimate.begin(began),
        sums=Sums(options.registry),
    )
    try:
        resume.resume(state)
        serving = server.start(options.socket, options.group, _answers(state, options))
        archiver = history.start(kept, options.keeping, options.registry)
        systemd.notify(f"READY=1\nSTATUS={len(state.table)} live connections")
        _log.info("collecting into %s, asked at %s", options.store, options.socket)
        try:
            _follow(state, options, bell, stopping)
        finally:
            systemd.notify("STOPPING=1")
            fresh.end(state.fresh)
            server.stop(serving)
            history.stop(archiver)
        _finish(state)
    finally:
        writer.stop(state.writer)
        state.events.close()
        state.requests.close()


def _follow(state: State, options: Options, bell: socket.socket, stopping: Stopping) -> None:
    """Collect until a signal; also while the disk is full, as far as that goes."""
    while not stopping.asked:
        try:
            _loop(state, options, bell, stopping)
        except (store.StoreError, duckdb.Error) as error:
            if not store.is_full(error):
                raise
            full.outlast(state, bell, lambda: stopping.asked, error)


def _loop(state: State, options: Options, bell: socket.socket, stopping: Stopping) -> None:
    """Until a signal, whatever comes and whatever is due."""
    alive_every = systemd.watchdog()
    with selectors.DefaultSelector() as waiting:
        waiting.register(state.events, selectors.EVENT_READ)
        waiting.register(bell, selectors.EVENT_READ)
        while not stopping.asked:
            pause = _next(state) - monotonic()
            if alive_every:
                pause = min(pause, alive_every)
                systemd.notify("WATCHDOG=1")
            for key, _ in waiting.select(max(0.0, pause)):
                if key.fileobj is bell:
                    bell.recv(4096)
            writer.check(state.writer)
            losses.look_at_clocks(state)
            take_events(state, feed.ROUNDS)
            _do_what_is_due(state, options.active_timeout / SECOND)


# -- time ------------------------------------------------------------------------------


def _fresh_at(state: State) -> float:
    return state.dump_ended + feed.rest(state)


def _next(state: State) -> float:
    """When something is due, in monotonic seconds."""
    times = [state.due.dump, state.due.heartbeat]
    if len(state.buffers.flows):
        times.append(state.due.commit)
    if state.loss:
        times.append(state.due.resync)
    if fresh.wanting(state.fresh):
        times.append(_fresh_at(state))
    return min(times)


def _do_what_is_due(state: State, active_timeout: float) -> None:
    """Resync, dump and commit, each when its time has come."""
    if state.loss and monotonic() >= state.due.resync:
        feed.resync(state)
    timeout = monotonic() >= state.due.dump
    if timeout or (fresh.wanting(state.fresh) and monotonic() >= _fresh_at(state)):
        dump(state, active=True)
    if timeout:
        state.due.dump = monotonic() + active_timeout
    pending = len(state.buffers.flows) and monotonic() >= state.due.commit
    if pending or monotonic() >= state.due.heartbeat:
        commit(state)


def _finish(state: State) -> None:
    """Record everything up to now, and close the store. Raises StoreError if it is full."""
    if state.full_since:
        raise store.FullError(
            f"stopped while the disk of {state.store.path} is full: the next collector goes on "
            "from the last commit, with a gap"
        )
    dump(state, active=True)
    take_events(state, feed.ROUNDS)
    commit(state)
    losses.end_overrun(state)
    writer.call(state.writer, lambda: store.end_run(state.store))
    writer.call(state.writer, lambda: store.close(state.store))
    _log.info("stopped; everything up to now is stored")


# -- what askers need ------------------------------------------------------------------


def _answers(state: State, options: Options) -> server.Answers:
    view, making = state.store.con.cursor(), threading.Lock()

    def cursor() -> duckdb.DuckDBPyConnection:
        with making:
            return view.cursor()

    return server.Answers(
        cursor=cursor,
        fresh=lambda goal: fresh.wait(state.fresh, goal),
        status=lambda con: _status(state, options, con),
        metrics=lambda con: figures.figures(state, con, _status(state, options, con)),
        missing=lambda: full.gap(state),
        names=Names(options.registry),
        take=lambda con, source: history.take(state.store, con, source),
    )


def _status(state: State, options: Options, con: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "since": state.began.real,
        "now": time_ns(),
        "as_of": fresh.as_of(state.fresh),
        "full_since": state.full_since,
        "live": len(state.table),
        "events": state.received,
        **history.facts(con),
        "node": options.node.name,
        "store": str(options.store),
        "store_bytes": store.size(state.store),
        "socket": str(options.socket),
        "memory": _resident(),
    }


def _resident() -> int:
    """This process's resident memory in bytes, proc(5) statm."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
