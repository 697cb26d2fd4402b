"""Follow cgroups that come and go, so that a slice stays marked without anyone's help.

inotify on every directory that leads to a slice's cgroup. A cgroup made again
under its old path has a new id, which is put into the table at once; the old
id stays a while, since sockets outlive their cgroup (TIME_WAIT, FIN_WAIT and
data still in flight hold a reference to it).
"""

import contextlib
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from inotify_simple import INotify, flags

from vnet import cgroups, config, copyxid, status
from vnet.errors import ConfigError, NodeError
from vnet.paths import Paths

_CGROUP_EVENTS = flags.CREATE | flags.DELETE | flags.ONLYDIR
_CONFIG_EVENTS = (
    flags.CLOSE_WRITE | flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE | flags.ONLYDIR
)


@dataclass
class Watched:
    """What is watched, and what the table is known to hold of it."""

    root: Path
    xids: dict[str, int] = field(default_factory=dict)  #: cgroup path: xid
    below: dict[str, list[str]] = field(default_factory=dict)  #: ancestor: cgroup paths
    ids: dict[str, int] = field(default_factory=dict)  #: cgroup path: id in the table
    gone: dict[int, float] = field(default_factory=dict)  #: id: when it leaves (monotonic s)
    places: dict[int, str] = field(default_factory=dict)  #: watch descriptor: ancestor


def run(paths: Paths, linger: float) -> None:
    """Watch until SIGTERM, SIGINT or `vnet down`. Raises NodeError if the node is not up."""
    if not paths.state.exists():
        raise NodeError("vnet watch: the node is down", "vnet up")
    wake = _signals()
    watched = Watched(cgroups.v2_root())
    with INotify() as inotify, copyxid.connect() as kernel:
        config_watch = _watch_config(inotify, paths)
        inotify.add_watch(paths.run_dir, flags.DELETE)
        _reload(watched, paths, inotify, kernel, linger)
        notify("READY=1")
        while True:
            ready, _, _ = select.select([inotify, wake], [], [], _until_next(watched))
            reload = False
            if wake in ready:
                numbers = os.read(wake.fileno(), 64)
                if signal.SIGTERM in numbers or signal.SIGINT in numbers:
                    notify("STOPPING=1")
                    return
                reload = signal.SIGHUP in numbers
            if inotify in ready:
                for event in inotify.read(timeout=0):
                    if event.wd == config_watch or event.mask & flags.Q_OVERFLOW:
                        reload = True
                    elif event.wd in watched.places:
                        _changed(watched, event.wd, event.name, inotify, kernel, linger)
            if not paths.state.exists():  # `vnet down`
                notify("STOPPING=1")
                return
            if reload:
                if config_watch is None:
                    config_watch = _watch_config(inotify, paths)
                _reload(watched, paths, inotify, kernel, linger)
            _expire(watched, kernel)


def _signals() -> socket.socket:
    """A socket that becomes readable when a signal came, and says which."""
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.detach())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reading


def _watch_config(inotify: INotify, paths: Paths) -> int | None:
    with contextlib.suppress(OSError):
        return int(inotify.add_watch(paths.config_dir, _CONFIG_EVENTS))
    return None


def _reload(
    watched: Watched, paths: Paths, inotify: INotify, kernel: copyxid.Module, linger: float
) -> None:
    """Take slices and their numbers anew, and bring the table in step.

    Slices that have no number yet wait for `vnet up`. Files with an error
    change nothing: what was watched goes on.
    """
    try:
        slices = config.load(paths.config_dir)
    except ConfigError as error:
        print(f"vnet watch: keeping the slices as they were:\n{error.message}", file=sys.stderr)
        return
    numbers = status.current_xids(paths)
    watched.xids = {
        path: numbers[item.name] for item in slices if item.name in numbers for path in item.cgroups
    }
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
    _refresh(watched, list(watched.xids), kernel, linger)
    # Ids that an earlier run (or nobody) knew to be gone. The table first: what
    # is in it and not found afterwards is gone, not new.
    table = kernel.table()
    live = cgroups.live_ids(watched.root)
    for number in table:
        if number not in live:
            watched.gone.setdefault(number, time.monotonic() + linger)


def _watch(watched: Watched, place: str, inotify: INotify) -> bool:
    try:
        watched.places[inotify.add_watch(f"{watched.root}{place}", _CGROUP_EVENTS)] = place
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _changed(
    watched: Watched, wd: int, name: str, inotify: INotify, kernel: copyxid.Module, linger: float
) -> None:
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
    _refresh(watched, [*below, *([path] if path in watched.xids else [])], kernel, linger)


def _between(watched: Watched, path: str) -> set[str]:
    return {
        parent
        for leaf in watched.below.get(path, [])
        for parent in cgroups.parents(leaf)
        if parent.startswith(f"{path}/")
    }


def _refresh(watched: Watched, paths: list[str], kernel: copyxid.Module, linger: float) -> None:
    """Bring the table in step for these cgroup paths."""
    new: dict[int, int] = {}
    for path in paths:
        number = cgroups.cgroup_id(watched.root, path)
        before = watched.ids.get(path)
        if before is not None and before != number:
            watched.gone[before] = time.monotonic() + linger
            del watched.ids[path]
        if number is not None:
            watched.gone.pop(number, None)
            watched.ids[path] = number
            new[number] = watched.xids[path]
    if not new:
        return
    refused = kernel.set_many(new)
    for path in [path for path, number in watched.ids.items() if number in refused]:
        del watched.ids[path]  # gone again already: its removal is an event of its own


def _until_next(watched: Watched) -> float | None:
    if not watched.gone:
        return None
    return max(0.0, min(watched.gone.values()) - time.monotonic())


def _expire(watched: Watched, kernel: copyxid.Module) -> None:
    now = time.monotonic()
    due = [number for number, when in watched.gone.items() if when <= now]
    if due:
        kernel.delete_many(due)
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
