"""What a debug kernel has to say at the end of a session (tests/debug/kernel.config)."""

import re
import subprocess
from pathlib import Path

_KMEMLEAK = Path("/sys/kernel/debug/kmemleak")
_OURS = re.compile(r"\[xt_copyxid\]|bpf_prog_\w+_vnet_")
_GONE = re.compile(r"^\s+(?:\[<\w+>\] )?0x[0-9a-f]+$", re.MULTILINE)
"""A call without a name: of a module or a program that is there no more."""


def verdict() -> tuple[list[str], list[str]]:
    """(problems, notes): what fails the session, and what is merely told."""
    problems, notes = [], []
    # Each finds only the first of its kind, and is blind from then on.
    locks = Path("/proc/lockdep_stats").read_text()
    if not re.search(r"debug_locks:\s+1\b", locks):
        problems.append("lockdep had switched itself off before the end")
    else:
        notes.append("lockdep was awake to the end; " + _facts(locks))
    leaks = lost()
    ours = [leak for leak in leaks if is_ours(leak)]
    problems += [f"kmemleak: {leak}" for leak in ours]
    notes.append(f"kmemleak: {len(ours)} leaks of ours, {len(leaks) - len(ours)} of others")
    notes += [f"kmemleak, not ours: {leak}" for leak in leaks if leak not in ours]
    return problems, notes


def is_ours(leak: str) -> bool:
    """Whether our module or a program of ours has a part in it; what is unloaded may have been."""
    return bool(_OURS.search(leak) or _GONE.search(leak))


def _facts(locks: str) -> str:
    found = re.findall(
        r"^ (lock-classes|direct dependencies|dependency chains):\s+(\d+)", locks, re.M
    )
    return ", ".join(f"{count} {name}" for name, count in found)


def lost() -> list[str]:
    """Objects that nothing refers to, with where they were allocated."""
    if not _KMEMLEAK.exists():
        subprocess.run(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"], check=True)
    for _ in range(2):  # the second scan tells what the first merely suspects
        _KMEMLEAK.write_text("scan")
    text = _KMEMLEAK.read_text()
    return [
        leak.strip()
        for leak in re.split(r"^(?=unreferenced object)", text, flags=re.M)
        if leak.strip()
    ]
