"""cgroup v2 directories."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from vnet.testing import names
from vnet.testing.poll import until


@cache
def root() -> Path:
    """Where cgroup v2 is mounted: /sys/fs/cgroup, or below it on a hybrid host."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise RuntimeError("no cgroup v2 hierarchy is mounted")


@dataclass(frozen=True)
class Cgroup:
    """A cgroup v2 directory."""

    path: Path

    @property
    def id(self) -> int:
        """The kernel's cgroup id: the inode number of the directory (kernfs)."""
        return self.path.stat().st_ino

    @property
    def rel(self) -> str:
        """The path below the root of the hierarchy, with a leading slash."""
        return "/" + str(self.path.relative_to(root()))

    def procs(self) -> list[int]:
        """The processes in it (not in its children; no zombies)."""
        return [int(pid) for pid in (self.path / "cgroup.procs").read_text().split()]


@contextmanager
def cgroup(name: str | None = None, parent: Cgroup | None = None) -> Iterator[Cgroup]:
    """Make a cgroup, below parent or below this run's own directory.

    On exit its processes are killed and it is removed with all below it.
    """
    above = parent.path if parent else root() / f"{names.PREFIX}{os.getpid()}"
    path = above / (name or names.fresh("s"))
    path.mkdir(parents=True)
    try:
        yield Cgroup(path)
    finally:
        remove(path)
        if parent is None:
            with suppress(OSError):  # another one of this run may live in it
                above.rmdir()


def remove(path: Path) -> None:
    """Kill what runs in a cgroup and below, and remove it. Gone already is fine."""
    with suppress(FileNotFoundError):
        (path / "cgroup.kill").write_text("1")
        until(lambda: "populated 0" in (path / "cgroup.events").read_text(), what=f"{path} empty")
        for below in sorted(path.rglob("*/"), reverse=True):
            until(partial(_rmdir, below), what=f"rmdir {below}")
        until(partial(_rmdir, path), what=f"rmdir {path}")


def _rmdir(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # EBUSY: a process in it has ended but is not yet released
        return False
    return True


def leftovers() -> list[Path]:
    """Cgroups this process made and has not removed."""
    return [path for path in root().glob(f"{names.PREFIX}*") if names.is_mine(path.name)]


def sweep() -> None:
    """Remove what runs that no longer exist have left."""
    for path in root().glob(f"{names.PREFIX}*"):
        if names.is_orphan(path.name):
            remove(path)
