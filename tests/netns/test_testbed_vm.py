"""How results come back from a guest: here the "guest" is a child on this very kernel.

Only the boot is left out (a stand-in for tools/vm runs its command); the two
pytest sessions and what goes between them are the real ones.
Root, because the guest's side reads the kernel's log.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from vnet.testing import cgroup

pytestmark = pytest.mark.netns

ROOT = Path(__file__).resolve().parent.parent.parent

CONFTEST = f"""
import pathlib
from testbed import vm, vm_host
pytest_plugins = ["testbed.house", "testbed.again"]
vm.SERIES, vm.running_series = ("6.1",), lambda: "6.1"
vm.why_not = vm_host.why_not = lambda series: ""
vm_host.ROOT = pathlib.Path(__file__).parent
exec(pathlib.Path({str(ROOT / "tests/vm/conftest.py")!r}).read_text())
"""

STAND_IN = """
import os, subprocess, sys
words = sys.argv[sys.argv.index("--") + 1:]
with open("booted.new", "w") as booted:
    booted.write(str(os.nice(0)))
os.rename("booted.new", "booted")
code = subprocess.call(words, env={**os.environ, "VNET_VM": "1"})
if code not in range(6):
    print("its last words")
sys.exit(code if code in range(6) else 125)
"""


@pytest.fixture
def session(tmp_path):
    """Run a file of vm tests in such a guest; the exit code, and what was printed.

    ``first``: a file of tests that run here, before.
    """

    def run(text, *options, first=""):
        (tmp_path / "tools").mkdir()
        (tmp_path / "tools/vm").write_text(STAND_IN)
        (tmp_path / ".venv").symlink_to(Path(sys.prefix))
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n vm:\n")
        (tmp_path / "conftest.py").write_text(CONFTEST)
        (tmp_path / "test_it.py").write_text(
            "import os, pytest, time\npytestmark = pytest.mark.vm\n" + text
        )
        if first:
            (tmp_path / "test_first.py").write_text(first)
        env = {key: value for key, value in os.environ.items() if key != "CI"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *options],
            cwd=tmp_path,
            env=env | {"PYTHONPATH": str(ROOT / "tests")},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout

    return run


def test_each_result_arrives_as_it_was(session):
    code, said = session("""
def test_passes(): print("said in the guest")
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("no moon")
@pytest.mark.parametrize("n", [1, 2])
def test_numbers(n): assert n == 1
""")
    assert code == 1
    assert "PASSED test_it.py::test_passes[6.1]" in said
    assert "said in the guest" in said
    assert "FAILED test_it.py::test_fails[6.1] - assert 1 == 2" in said
    assert "no moon" in said
    assert "PASSED test_it.py::test_numbers[6.1-1]" in said
    assert "FAILED test_it.py::test_numbers[6.1-2]" in said
    assert "2 failed, 2 passed, 1 skipped" in said


def test_a_test_that_hangs_fails_and_the_next_one_runs(session):
    code, said = session("""
@pytest.mark.limit(1)
def test_hangs(): time.sleep(50)
def test_next(): pass
""")
    assert code == 1
    assert "FAILED test_it.py::test_hangs[6.1] - TimeoutError: the test took more than 1 s" in said
    assert "PASSED test_it.py::test_next[6.1]" in said


def test_what_finished_before_the_guest_died_counts_and_the_rest_fails(session):
    code, said = session("""
def test_before(): pass
def test_dies(): os._exit(99)
def test_after(): pass
""")
    assert code == 1
    assert "PASSED test_it.py::test_before[6.1]" in said
    assert "kernel 6.1: the guest ended; its last words:" in said
    assert "kernel 6.1: not run, the guest had ended" in said
    assert "2 failed, 1 passed" in said


def test_what_fails_once_is_run_once_more_in_ci(session):
    code, said = session(
        """
def test_once():
    if not os.path.exists("tried"):
        open("tried", "w").close()
        assert 0, "by chance"
def test_twice(): assert 0, "always"
def test_next(): pass
""",
        "--again",
    )
    assert code == 1
    assert "AssertionError: by chance" in said
    assert "FAILED test_it.py::test_twice[6.1] - AssertionError: always" in said
    assert "1 failed, 2 passed" in said and "2 rerun in" in said


def test_what_a_guests_session_leaves_behind_fails_the_whole(session):
    code, said = session("""
def test_leaves():
    from vnet.testing import cgroup, names
    global kept
    kept = cgroup.cgroup(names.fresh("left")); kept.__enter__()
""")
    assert code == 1
    assert "kernel 6.1: left behind: cgroup" in said
    assert "1 passed" in said
    cgroup.sweep()


def test_guests_boot_beside_unit_tests_but_not_beside_those_with_packets(session):
    code, said = session(
        "def test_there(): pass",
        first="""
import os, pathlib, pytest
from vnet.testing.poll import until
BOOTED = pathlib.Path("booted")
@pytest.mark.unit
def test_early(): assert not BOOTED.exists()
@pytest.mark.netns
def test_with_packets(): assert not BOOTED.exists()
@pytest.mark.unit
def test_beside():
    until(BOOTED.exists, 30)
    assert int(BOOTED.read_text()) == min(os.nice(0) + 10, 19)
""",
    )
    assert code == 0, said
    assert "4 passed" in said
