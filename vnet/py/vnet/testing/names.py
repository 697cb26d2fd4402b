"""Names that say whose they are: ``vnt-PID-...``, PID being the maker's."""

import itertools
import os
import re
from pathlib import Path

PREFIX = "vnt-"
_counter = itertools.count(1)
_OURS = re.compile(r"vnt-(\d+)(?:-|$)")


def fresh(kind: str) -> str:
    """A name nobody has used: vnt-PID-KINDn."""
    return f"{PREFIX}{os.getpid()}-{kind}{next(_counter)}"


def is_mine(name: str) -> bool:
    """Made by this process."""
    found = _OURS.match(name)
    return found is not None and int(found[1]) == os.getpid()


def is_orphan(name: str) -> bool:
    """Made by a process like this one that is gone."""
    found = _OURS.match(name)
    return found is not None and not Path("/proc", found[1]).exists()
