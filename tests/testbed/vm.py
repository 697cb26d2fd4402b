"""What both sides of a vm test know: host and guest."""

import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SERIES = ("6.1", "6.12")
"""Kernels every vm test must pass on: Debian 12's own and its newer one."""
IN_GUEST = os.environ.get("VNET_VM") == "1"
DEBUG = (
    os.uname().release.endswith("-vnet-debug")
    if IN_GUEST
    else os.environ.get("VNET_VM_DEBUG") == "1"
)
"""The debug kernels (tests/debug/build) in the place of Debian's own."""
PATIENCE = 10.0 if DEBUG else 1.0
"""How many times longer tests wait for anything there (vnet.testing.poll)."""
REPORTS = "reports"
"""The file in the shared directory (VNET_VM_SHARE) that the guest writes."""


def running_series() -> str:
    """The series of the kernel this runs on; its whole name if it is none of ours."""
    here = os.uname().release
    return next((s for s in SERIES if re.match(re.escape(s) + "[.-]", here)), here)


def turn() -> int:
    """Which of two alternatives this kernel takes, where the kernels take turns: 0 or 1."""
    return SERIES.index(running_series()) % 2 if running_series() in SERIES else 0


def why_not(series: str) -> str:
    """Why there can be no guest with such a kernel; "" if there can."""
    if not shutil.which("qemu-system-x86_64"):
        return "needs QEMU: apt-get install qemu-system-x86"
    if not (ROOT / ".venv/bin/vng").exists():
        return "needs virtme-ng in .venv: run tools/setup"
    if DEBUG:
        built = (ROOT / "build/debug" / series / "built").exists()
        return "" if built else f"needs a debug kernel: run tests/debug/build {series}"
    releases = (
        p.name.removeprefix("vmlinuz-") for p in Path("/boot").glob(f"vmlinuz-{series}[.-]*")
    )
    if not any(Path("/lib/modules", release, "build").exists() for release in releases):
        return f"needs a {series} kernel and its headers: run tools/setup"
    return ""
