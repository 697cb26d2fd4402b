"""``make demo`` on the host's kernel: what it shows, and that nothing of it stays."""

import re
import subprocess
from pathlib import Path

import pytest
from vnet.testing import cgroup
from vnet.testing.net import HERE
from vnetbed import Node

pytestmark = pytest.mark.netns
ROOT = Path(__file__).resolve().parents[2]


def _names(path: Path) -> set[str]:
    """What is in a directory, but for what tests make (``vnt-PID``)."""
    found = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    return {name for name in found if not name.startswith("vnt-")}


def _host(tmp_path: Path) -> dict[str, object]:
    """All that a demo could leave behind."""
    links = HERE.run("ip", "-o", "link").stdout.splitlines()
    return {
        "rules and sysctls": Node(HERE, tmp_path).fingerprint(),
        "namespaces": _names(Path("/run/netns")),
        "cgroups": _names(cgroup.root()),
        "links": {line.split()[1] for line in links if not line.split()[1].startswith("vnt")},
        "mounts": {
            line
            for line in Path("/proc/self/mounts").read_text().splitlines()
            if not re.search("/vnt-|/pytest-", line)  # another session's tests
        },
        "bpffs": _names(Path("/sys/fs/bpf")),
        "files": {entry.name for entry in Path("/tmp").glob("vnet-demo*")},
        "run": _names(Path("/run")),
        "ping": Path("/proc/sys/net/ipv4/ping_group_range").read_text(),
    }


def test_the_demo_shows_owners_and_refusals_and_leaves_the_host_as_it_was(tmp_path):
    before = _host(tmp_path)
    done = subprocess.run([ROOT / "tools" / "demo"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert _host(tmp_path) == before
    assert "by the data path bpf" in done.stdout
    assert "bind: Permission denied" in done.stdout
    assert "bind to a reserved port" in done.stdout
    answer = done.stdout[done.stdout.index("8. A complaint") :]
    assert "codeen" in answer
    assert "coral" not in answer
