"""Follow cgroups that come and go, so that a slice stays marked without anyone's help.

And see to it that our rules stay (``upkeep``).

inotify on every directory that leads to a slice's cgroup. A cgroup made again
under its old path has a new id, which is put into the table at once; the old
id stays a while, and as long as there are sockets of it: they outlive their
cgroup (in a process that has left it, or on its way through FIN_WAIT).
"""

import contextlib
import errno
import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from inotify_simple import INotify, flags

from vnet import (
    bpfsteps,
    cgroups,
    config,
    containers,
    copyxid,
    events,
    guard,
    owners,
    policy,
    sockets,
    status,
    upkeep,
)
from vnet import state as states
from vnet.errors import BpfError, ConfigError, NodeError
from vnet.paths import Paths
from vnet.registry import RegistryError

_CGROUP_EVENTS = flags.CREATE | flags.DELETE | flags.ONLYDIR
_CONFIG_EVENTS = (
    flags.CLOSE_WRITE | flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE | flags.ONLYDIR
)

_AGAIN = 1.0
"""s, at least, until it is asked again whether a socket of a cgroup is left."""
_SHARE = 0.2
"""of our time that bringing interfaces in step takes at most, however often they change"""
_LONGEST = 5.0
"""s that it waits for that at most: some of its time may have been waiting for a command's lock"""


class Table(Protocol):
    """Which cgroup is which slice, in the kernel."""

    def table(self) -> Mapping[int, copyxid.Entry]: ...
    def set_many(self, entries: Mapping[int, int], /) -> Mapping[int, int]: ...
    def delete_many(self, ids: Sequence[int], /) -> Mapping[int, int]: ...


@dataclass
class Watched:
    """What is watched, and what the tables are known to hold of it."""

    root: Path
    paths: Paths
    linger: float  #: s that the id of a cgroup that is gone stays
    instance: Path = Path()  #: of the eBPF programs
    datapath: str = ""
    tables: list[Table] = field(default_factory=list)
    interfaces: dict[str, int] = field(default_factory=dict)  #: of containers: xid
    links: float = math.inf  #: when to bring them in step (monotonic s)
    links_rested: float = 0.0  #: no notice makes us do so before then
    complaint: str = ""  #: about one of them; not made again until it is cured
    xids: dict[str, int] = field(default_factory=dict)  #: cgroup path: xid
    registry: tuple[int, ...] = ()  #: the file that they are from
    below: dict[str, list[str]] = field(default_factory=dict)  #: ancestor: cgroup paths
    ids: dict[str, int] = field(default_factory=dict)  #: cgroup path: id in the tables
    gone: dict[int, float] = field(default_factory=dict)  #: id: when it leaves (monotonic s)
    places: dict[int, str] = field(default_factory=dict)  #: watch descriptor: ancestor
    again: float = math.inf  #: when to take all anew (monotonic s)
    late: bool = False  #: a cgroup may have sockets that are older than its entry


def run(paths: Paths, linger: float) -> None:
    """Watch until SIGTERM, SIGINT or `vnet down`. Raises NodeError if the node is not up."""
    if not paths.state.exists():
        raise NodeError("vnet watch: the node is down", "vnet up")
    wake = _signals()
    watched = Watched(cgroups.v2_root(), paths, linger)
    with (
        INotify() as inotify,
        ExitStack() as kernel,
        closing(events.Drain(paths)) as drain,
        containers.listen() as links,
        upkeep.listen() as heard,
    ):
        kept = upkeep.Upkeep(heard)
        config_watch = _watch_config(inotify, paths)
        run_watch = inotify.add_watch(paths.run_dir, flags.DELETE | flags.MOVED_TO)
        # A command has ended, or been undone, when its journal goes.
        told = {paths.state.name, paths.journal.name}
        _open_tables(watched, kernel)
        _reload(watched, inotify)
        notify("READY=1")
        while True:
            due = min(_next(watched), kept.due, watched.links, watched.again)
            wait = max(0.0, due - time.monotonic())
            ready, _, _ = select.select(
                [inotify, wake, drain, links, heard], [], [], None if wait == math.inf else wait
            )
            if reload := time.monotonic() >= watched.again:
                watched.again = math.inf
            if wake in ready:
                numbers = os.read(wake.fileno(), 64)
                if signal.SIGTERM in numbers or signal.SIGINT in numbers:
                    notify("STOPPING=1")
                    return
                reload = signal.SIGHUP in numbers
            if drain in ready:
                drain.drain()
            if links in ready:
                names = containers.changed(links)
                if names is None or names & watched.interfaces.keys():
                    watched.links = min(watched.links, watched.links_rested)
            if heard in ready:
                upkeep.hear(kept)
            if inotify in ready:
                for event in inotify.read(timeout=0):
                    if event.wd == run_watch and event.name not in told:
                        continue
                    if event.wd in (config_watch, run_watch) or event.mask & flags.Q_OVERFLOW:
                        reload = True
                    elif event.wd in watched.places:
                        _changed(watched, event.wd, event.name, inotify)
            if not paths.state.exists():  # `vnet down`
                notify("STOPPING=1")
                return
            # While there is a journal, numbers may be taken back; its end is an event.
            if reload and not paths.journal.exists():
                config_watch = _watch_config(inotify, paths)  # it may be another directory now
                _open_tables(watched, kernel)
                _reload(watched, inotify)
            if time.monotonic() >= watched.links:
                _mark_interfaces(watched)
            upkeep.tend(kept, paths)
            _expire(watched)
            if watched.late:
                with guard.lock(watched.paths):
                    if _current(watched):  # or it will be, when state.json has told
                        watched.late = False
                        for words in bpfsteps.adopt_sockets(watched.instance)[1]:
                            print(f"vnet watch: {words}", file=sys.stderr, flush=True)


def _open_tables(watched: Watched, kernel: ExitStack) -> None:
    """The tables of the data path that is in place now; another `vnet up` may have changed it."""
    state = states.load(watched.paths.state)
    if state is None:
        return
    kernel.close()
    watched.instance, watched.datapath = Path(state.instance), state.datapath
    watched.tables = [policy.Slices(watched.instance)]
    if state.datapath == "module":
        watched.tables.append(kernel.enter_context(copyxid.connect()))


def _signals() -> socket.socket:
    """A socket that becomes readable when a signal came, and says which."""
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.detach())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reading


def _mark_interfaces(watched: Watched) -> None:
    """Bring the interfaces in step. One that cannot be is told of, once, and keeps nobody else."""
    began, watched.links = time.monotonic(), math.inf
    try:
        _apply_interfaces(watched)
    except BpfError as error:
        if watched.complaint != error.message:
            watched.complaint = error.message
            print(f"vnet watch: {error}", file=sys.stderr, flush=True)
    else:
        watched.complaint = ""
    now = time.monotonic()
    # Who is root in a container may switch its end off and on as often as he likes.
    watched.links_rested = now + min((now - began) / _SHARE, _LONGEST)


def _apply_interfaces(watched: Watched) -> None:
    with guard.lock(watched.paths):
        # As the files are now that nobody else changes them: a slice may have come
        # while we waited, and its interface must not lose its filters until we
        # hear of the file.
        if not watched.paths.journal.exists():
            with contextlib.suppress(ConfigError, RegistryError):
                watched.interfaces = _interfaces(watched, config.load(watched.paths.config_dir))
        if _current(watched):
            containers.apply(watched.instance, watched.interfaces)


def _interfaces(watched: Watched, slices: Sequence[config.Slice]) -> dict[str, int]:
    """Those of the slices that have a number: {name: xid}."""
    numbers = status.current_xids(watched.paths)
    named = [item for item in slices if item.name in numbers]
    return bpfsteps.wanted_interfaces(named, numbers)


def _current(watched: Watched) -> bool:
    """Whether our tables are those in force; if not, the change of state.json is on its way to us.

    Asked with the lock held.
    """
    state = states.load(watched.paths.state)
    return state is not None and (Path(state.instance), state.datapath) == (
        watched.instance,
        watched.datapath,
    )


def _watch_config(inotify: INotify, paths: Paths) -> int | None:
    with contextlib.suppress(OSError):
        return int(inotify.add_watch(paths.config_dir, _CONFIG_EVENTS))
    return None


def _reload(watched: Watched, inotify: INotify) -> None:
    """Take slices and their numbers anew, and bring the tables in step."""
    if not _number(watched):
        return
    watched.below = {}
    for path in watched.xids:
        for parent in cgroups.parents(path):
            watched.below.setdefault(parent, []).append(path)
    for place in watched.below:
        _watch(watched, place, inotify)
    for wd in [wd for wd, place in watched.places.items() if place not in watched.below]:
        del watched.places[wd]
        with contextlib.suppress(OSError):
            inotify.rm_watch(wd)
    watched.ids = {path: number for path, number in watched.ids.items() if path in watched.xids}
    _mark_interfaces(watched)
    _refresh(watched, list(watched.xids))
    # Ids that an earlier run (or nobody) knew to be gone. The tables first: what
    # is in one and not found afterwards is gone, not new.
    with guard.lock(watched.paths):
        tables = watched.tables if _current(watched) else []
        held = {number for table in tables for number in table.table()}
    for number in held - owners.living(held):
        watched.gone.setdefault(number, time.monotonic() + watched.linger)


def _number(watched: Watched) -> bool:
    """Take slices and their numbers anew.

    Slices that have no number yet wait for `vnet up`. Files or a registry with
    an error change nothing: what was watched goes on.
    """
    watched.registry = _version(watched.paths.registry)
    try:
        slices = config.load(watched.paths.config_dir)
        numbers = status.current_xids(watched.paths)
    except (ConfigError, RegistryError) as error:
        print(f"vnet watch: keeping the slices as they were:\n{error.message}", file=sys.stderr)
        return False
    watched.xids = {
        path: numbers[item.name] for item in slices if item.name in numbers for path in item.cgroups
    }
    return True


def _version(path: Path) -> tuple[int, ...]:
    """Which file this is: each change of the registry replaces it."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return ()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _watch(watched: Watched, place: str, inotify: INotify) -> bool:
    try:
        watched.places[inotify.add_watch(f"{watched.root}{place}", _CGROUP_EVENTS)] = place
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _changed(watched: Watched, wd: int, name: str, inotify: INotify) -> None:
    """Something called ``name`` came or went in a watched directory."""
    if not name:  # IN_IGNORED: the directory itself is gone
        del watched.places[wd]
        return
    path = f"{watched.places[wd].rstrip('/')}/{name}"
    below = watched.below.get(path, [])
    # Watch first, then look: what is made in between is seen by one of them.
    # A new directory may already hold more that lead to a slice's.
    for place in sorted({path, *_between(watched, path)}):
        if place in watched.below:
            _watch(watched, place, inotify)
    _refresh(watched, [*below, *([path] if path in watched.xids else [])])


def _between(watched: Watched, path: str) -> set[str]:
    return {
        parent
        for leaf in watched.below.get(path, [])
        for parent in cgroups.parents(leaf)
        if parent.startswith(f"{path}/")
    }


def _refresh(watched: Watched, paths: list[str]) -> None:
    """Bring the tables in step for these cgroup paths."""
    there = []
    for path in paths:
        number = cgroups.cgroup_id(watched.root, path)
        before = watched.ids.get(path)
        if before is not None and before != number:
            watched.gone[before] = time.monotonic() + watched.linger
            del watched.ids[path]
        if number is not None:
            watched.late = watched.late or before != number
            watched.gone.pop(number, None)
            watched.ids[path] = number
            there.append(path)
    if not there:
        return
    refused: dict[int, int] = {}
    # An `up` at work would write its own tables over ours.
    with guard.lock(watched.paths):
        if not _current(watched):
            return
        # What it did to the numbers is an event on its way to us, but not yet here.
        stale = _version(watched.paths.registry) != watched.registry
        if stale and not watched.paths.journal.exists():
            _number(watched)
        new = {watched.ids[path]: watched.xids[path] for path in there if path in watched.xids}
        for table in watched.tables:
            refused |= table.set_many(new)
    for path in [path for path, number in watched.ids.items() if number in refused]:
        why = refused[watched.ids.pop(path)]
        if why != errno.ENOENT:  # gone again already: its removal is an event of its own
            watched.again = time.monotonic() + _AGAIN
            print(f"vnet watch: {path} is not in the table: {os.strerror(why)}; trying again",
                  file=sys.stderr, flush=True)  # fmt: skip


def _next(watched: Watched) -> float:
    """When the next id is due to leave (monotonic s)."""
    return min(watched.gone.values(), default=math.inf)


def _expire(watched: Watched) -> None:
    now = time.monotonic()
    due = [number for number, when in watched.gone.items() if when <= now]
    # A process that has left its cgroup, or been given a socket of it, may use that
    # for as long as it likes: the socket stays the slice's.
    for number in sockets.holding(due) if due else ():
        due.remove(number)
        watched.gone[number] = now + max(watched.linger, _AGAIN)
    if due:
        with guard.lock(watched.paths):
            for table in watched.tables if _current(watched) else []:
                table.delete_many(due)
        for number in due:
            del watched.gone[number]


def notify(message: str) -> None:
    """Tell the service manager, if one listens (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        out.connect("\0" + address[1:] if address[0] == "@" else address)
        out.send(message.encode())
