"""cgroup v2: where it is mounted, and the id the kernel knows a cgroup by."""

import os
import re
from pathlib import Path, PurePosixPath

from vnet.errors import NodeError

#: the kernel keeps one bit per level (COPYXID_LEVEL_MAX in xt_copyxid.h)
LEVEL_MAX = 63

_OCTAL = re.compile(r"\\([0-7]{3})")


def v2_root(mountinfo: str | None = None) -> Path:
    """Where the unified hierarchy is mounted: /sys/fs/cgroup, or elsewhere on a hybrid host.

    Raises NodeError where there is none. ``mountinfo`` is the text of
    /proc/self/mountinfo (proc(5)).
    """
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    for line in text.splitlines():
        before, _dash, after = line.partition(" - ")
        if after.split(" ", 1)[0] != "cgroup2":
            continue
        point = before.split(" ")[4]
        return Path(_OCTAL.sub(lambda match: chr(int(match[1], 8)), point))
    raise NodeError(
        "no cgroup v2 hierarchy is mounted: slices are told apart by their cgroup",
        "boot with systemd.unified_cgroup_hierarchy=1, or mount it beside v1: "
        "mount -t cgroup2 none /sys/fs/cgroup/unified",
    )


def is_hybrid(root: Path) -> bool:
    """Whether v1 controllers are mounted beside v2."""
    return root != Path("/sys/fs/cgroup")


def problem(path: str) -> str:
    """Why ``path`` cannot name a slice's cgroup; empty if it can."""
    if not path.startswith("/"):
        return "must start with / (it counts from the cgroup v2 root)"
    if "\0" in path or "\n" in path:
        return "holds a control character"
    parts = path.rstrip("/").split("/")[1:]
    if not parts:
        return "is the root of the hierarchy, which is the node itself"
    if any(part in ("", ".", "..") for part in parts):
        return "has an empty, . or .. part"
    if any(len(part.encode()) > 255 for part in parts):
        return "has a part longer than 255 bytes"
    if len(parts) > LEVEL_MAX:
        return f"is deeper than {LEVEL_MAX} levels"
    return ""


def normal(path: str) -> str:
    """The one way to write a valid path."""
    return "/" + path.strip("/")


def cgroup_id(root: Path, path: str) -> int | None:
    """The kernel's id of the cgroup: the inode of its directory. None: it is not there."""
    try:
        found = os.lstat(f"{root}{path}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    # A plain file in cgroupfs (cgroup.procs) has an inode too.
    return found.st_ino if (found.st_mode & 0o170000) == 0o040000 else None


def ids(root: Path, paths: list[str]) -> dict[str, int]:
    """{path: id} of those that exist."""
    found = ((path, cgroup_id(root, path)) for path in paths)
    return {path: number for path, number in found if number is not None}


def parents(path: str) -> list[str]:
    """Every ancestor of a path, the root first."""
    return [str(parent) for parent in reversed(PurePosixPath(path).parents)]
