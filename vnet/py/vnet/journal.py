"""How to undo what is under way, written down before it is done.

One JSON object a line, synced before the step it belongs to. Whoever finds a
journal (the guard of the command that died, or the next command) undoes its
lines from the last to the first; every undo may be done twice.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

from vnet.errors import NodeError

Entry = dict[str, Any]


class Journal:
    """An open journal: made at the first entry, so that no change leaves no trace."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def add(self, step: str, **how: Any) -> None:
        """Note how to undo ``step``, which is to be done next."""
        if self._fd < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
            self._fd = os.open(self._path, flags | os.O_CLOEXEC, 0o600)
        line = json.dumps({"step": step, **how}).encode() + b"\n"
        if os.write(self._fd, line) != len(line):  # the file system is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        os.fsync(self._fd)

    @property
    def begun(self) -> bool:
        """Whether anything was noted."""
        return self._fd >= 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read(path: Path) -> list[Entry]:
    """The entries in order; none if there is no journal. Raises NodeError if it is damaged.

    A last line cut short is one whose step was not begun.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    entries = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or "step" not in entry:
            raise NodeError(
                f"{path}:{number}: no line of a journal: what a killed command had begun cannot be "
                "undone by it",
                f"move {path} away, then `vnet down` and `vnet up`: they go by what they find",
            )
        entries.append(entry)
    return entries
