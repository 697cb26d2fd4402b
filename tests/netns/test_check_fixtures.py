"""The fixtures of vnet.testing in somebody else's test suite, and the checker's words."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from vnet.testing import names

from vnet import bpf

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(bpf.lacking()), reason="this kernel cannot run the eBPF programs"),
]
DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


def test_the_example_in_the_docs_passes_as_a_test_suite_of_its_own(tmp_path):
    """Outside of this tree, by the installed package and its entry point alone."""
    [example] = re.findall(
        r"```python\n(# test_tenants\.py.*?)```", (DOCS / "check.md").read_text(), re.DOTALL
    )
    (tmp_path / "test_tenants.py").write_text(example)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_ADDOPTS", "CI")}
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", tmp_path],
        cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert re.search(rf"{example.count('def test_')} passed", out), out
    assert not list(Path("/run/netns").glob(f"{names.PREFIX}{process.pid}-*"))


def test_the_fixtures_are_listed_with_what_they_are_for(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--fixtures", "-q", tmp_path],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    for name in ("node", "peer", "link", "slices", "capture", "up"):
        assert re.search(rf"^vnet_{name} -- .*\n    \S", done.stdout, re.MULTILINE), name


def test_no_ordinary_command_imports_what_only_tests_and_checks_need():
    code = (
        "import sys, vnet.cli, vnet.cli_check, vnet.node, vnet.watch\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('scapy', 'pytest')\n"
        "       or m.startswith(('vnet.testing', 'vnet.check'))]\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_scapy_the_checker_says_how_to_get_it(tmp_path):
    (tmp_path / "scapy").mkdir()
    (tmp_path / "scapy" / "__init__.py").write_text("raise ImportError('hidden by the test')\n")
    done = subprocess.run(
        [sys.executable, "-m", "vnet.cli", "check"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "scapy" in done.stderr
    assert "vnet[check]" in done.stderr
    assert "Traceback" not in done.stderr
