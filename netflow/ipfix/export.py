"""The exporter: asks the collector for what came, sends it, remembers what has arrived.

The collector is only ever asked, a bounded number of records at a time, and
not faster than told to. The position that is kept is behind what the receiver
has acknowledged, so whatever ends when, each record arrives at least once.
"""

from __future__ import annotations

import logging
import selectors
import signal
import socket
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep, time, time_ns
from typing import Any, Literal

import numpy as np

from netflow import client, systemd
from netflow.ipfix import position, session, transport
from netflow.ipfix.elements import Shape
from netflow.ipfix.names import Tenure
from netflow.ipfix.position import Place
from netflow.ipfix.transport import Link, LinkError, Stopped
from netflow.wire import After, Chunk, Position

MOST = 16_384
"""Records asked for at a time: some 10 ms of the collector's."""
LOOK = 0.5
"""Seconds between looks for new records, once all are sent."""
SAVE = 1.0
"""Seconds between savings of the position: what may come twice after a kill."""
LONGEST = 30.0
"""The longest pause between attempts, in seconds."""
SETTLED = 2.0
"""Seconds after which what a receiver's kernel has acknowledged counts as read by it: should it
break off, what came later goes again."""

_log = logging.getLogger("netflow")


@dataclass(frozen=True)
class Options:
    """What ``netflow export`` was told. rate: records per second, 0: as fast as it goes."""

    to: transport.Target
    socket: Path
    position: Path
    begin: Literal["now", "oldest"]
    once: bool
    shape: Shape
    size: int
    again_after: float
    again_every: int
    rate: int


@dataclass
class Export:
    """An export that goes on. at: what to ask for next.

    flying: bytes after which a position is reached, and the records on the way
    there, for what is not acknowledged. arrived: the same for what is, but not
    settled, with the time (monotonic) at which that was seen.
    """

    options: Options
    place: Place
    bell: socket.socket
    at: Position
    link: Link | None = None
    session: session.Session | None = None
    flying: deque[tuple[int, Position, int]] = field(default_factory=deque)
    arrived: deque[tuple[float, Position, int]] = field(default_factory=deque)
    saved_at: float = 0.0
    saved: Position | None = None
    complaint: str = ""


def run(options: Options) -> int:
    """Export until SIGTERM or SIGINT; returns the exit code."""
    logging.basicConfig(stream=sys.stderr, format="netflow: %(message)s", level=logging.INFO)
    try:
        with position.held(options.position) as place, _stop_signals() as bell:
            export = Export(options, place, bell, place.progress.position)
            systemd.notify(f"READY=1\nSTATUS=to {options.to}")
            try:
                _save(export)  # before anything is sent: it would be sent again at each start
                _follow(export)
            except Stopped:
                pass
            finally:
                systemd.notify("STOPPING=1")
                _part(export)
    except (position.PositionError, LinkError, client.ClientError) as error:
        _log.error("%s", error)
        return 1
    return 0


@contextmanager
def _stop_signals() -> Iterator[socket.socket]:
    """A socket that becomes readable when the process is to end."""
    bell, ringer = socket.socketpair()
    ringer.setblocking(False)
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: None) for number in signals}
    signal.set_wakeup_fd(ringer.fileno(), warn_on_full_buffer=False)
    try:
        yield bell
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        bell.close()
        ringer.close()


def _follow(export: Export) -> None:
    """Until all is sent, where that was asked for, or for ever."""
    pause, once = 1.0, export.options.once
    while True:
        try:
            if not export.at.store and export.options.begin == "now":
                _begin(export)
            link = export.link or _connect(export)
            rows = _step(export, link)
            if link.stop_by:
                return
            if rows:
                pause = 1.0
                continue
            if once and not export.flying:
                return
            transport.rest(link, 0.02 if export.flying else LOOK)
        except (LinkError, client.ClientError) as error:
            if isinstance(error, LinkError):
                _drop(export)
            if once:
                raise
            if str(error) != export.complaint:  # once for each trouble
                export.complaint = str(error)
                _log.warning("%s; trying again", error)
            _sleep(export, pause)
            pause = min(LONGEST, 2 * pause)


def _begin(export: Export) -> None:
    """Keep where it is now: what comes from here on is sent, whenever the receiver is there."""
    asked = After(name=_name(export.options), begin="now")
    chunk, _ = client.after(export.options.socket, asked)
    export.at = export.place.progress.position = chunk.position
    _save(export)


def _connect(export: Export) -> Link:
    options = export.options
    link = transport.connect(options.to, export.bell, options.rate)
    link.meanwhile = lambda: _acknowledged(export, link)
    export.link = link
    again = options.to.kind == "udp"
    export.session = session.Session(
        options.shape,
        options.size,
        options.again_after if again else 0,
        options.again_every if again else 0,
    )
    export.place.progress.sessions += 1
    _log.info("exporting to %s", options.to)
    export.complaint = ""
    return link


def _step(export: Export, link: Link) -> int:
    """Ask once, send what came; returns how many records."""
    options, progress = export.options, export.place.progress
    assert export.session is not None
    most = min(MOST, max(100, options.rate // 4)) if options.rate else MOST
    chunk, data = client.after(
        options.socket, After(name=_name(options), position=export.at, begin=options.begin,
                              limit=most)
    )  # fmt: skip
    _tell(export, chunk)
    messages = session.again(export.session, time())
    if chunk.rows:
        tenures = [Tenure(*one) for one in chunk.names]
        columns = _columns(chunk, data)
        messages += session.export(
            export.session, chunk.node, chunk.domain, columns, tenures, time()
        )
    records = sum(block.records for block in messages)
    if chunk.position != export.at:
        end = link.sent + sum(len(block.data) for block in messages)
        export.flying.append((end, chunk.position, records))
        export.at = chunk.position
    refused = link.refused
    progress.messages += transport.send(link, messages)
    progress.refused += link.refused - refused
    progress.records += records
    _acknowledged(export, link)
    return chunk.rows


def _name(options: Options) -> str:
    """What the collector knows us by."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in f"export-{options.to}")[:100]


def _columns(chunk: Chunk, data: bytes) -> dict[str, Any]:
    columns, at = {}, 0
    for name, kind in chunk.columns:
        columns[name] = np.frombuffer(data, dtype=kind, count=chunk.rows, offset=at)
        at += columns[name].nbytes
    return columns


def _tell(export: Export, chunk: Chunk) -> None:
    """Nothing is left out or sent again without a word."""
    if chunk.skipped:
        export.place.progress.lost += chunk.skipped
        _log.error("%d segments of records were gone before they were sent", chunk.skipped)
    if chunk.again:
        export.place.progress.again += chunk.again
        _log.warning("%d records go again: how far they were is not known", chunk.again)


def _acknowledged(export: Export, link: Link, settled: bool = False) -> None:
    """Take in what has arrived, and save it every now and then. Raises LinkError."""
    progress, now = export.place.progress, monotonic()
    reached = link.sent - transport.waiting(link)
    transport.check(link)  # what a receiver that is gone has acknowledged says nothing
    while export.flying and export.flying[0][0] <= reached:
        _, position, records = export.flying.popleft()
        export.arrived.append((now, position, records))
    settled = settled or link.target.kind == "udp"
    while export.arrived and (settled or now - export.arrived[0][0] >= SETTLED):
        progress.position = export.arrived.popleft()[1]
    if progress.position != export.saved and now - export.saved_at >= SAVE:
        _save(export)


def _save(export: Export) -> None:
    position.save(export.place, time_ns())
    export.saved, export.saved_at = export.place.progress.position, monotonic()
    systemd.notify(f"STATUS={export.place.progress.records} records to {export.options.to}")


def _drop(export: Export) -> None:
    """The session is over: what is not known to have been read goes again in the next."""
    if export.link is None:
        return
    export.link.sock.close()
    export.link = None
    again = sum(records for _, _, records in (*export.arrived, *export.flying))
    export.place.progress.again += again
    if again:
        _log.warning("up to %d records go again: they may not have been read", again)
    export.flying.clear()
    export.arrived.clear()
    export.at = export.place.progress.position
    _save(export)


def _part(export: Export) -> None:
    """End: what is on its way has a while to arrive."""
    link, until = export.link, monotonic() + transport.PARTING
    if link is not None:
        with suppress(LinkError):
            while transport.waiting(link) and monotonic() < until:
                transport.check(link)
                sleep(0.01)
            _acknowledged(export, link, settled=True)
        export.place.progress.again += sum(records for _, _, records in export.flying)
        transport.close(link)
    _save(export)
    progress = export.place.progress
    _log.info("%d records sent in %d messages", progress.records, progress.messages)


def _sleep(export: Export, seconds: float) -> None:
    """Raises Stopped."""
    if seconds <= 0:
        return
    with selectors.DefaultSelector() as waiting:
        waiting.register(export.bell, selectors.EVENT_READ)
        if waiting.select(seconds):
            raise Stopped
