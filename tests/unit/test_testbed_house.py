"""The rules of a session: what is skipped, missing or left behind fails it; what fails once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from testbed import again

pytestmark = pytest.mark.unit

TESTS = Path(__file__).parent.parent
PLUGINS = ("-p", "testbed.house", "-p", "testbed.again")
HEAD = "import pytest\n"
SKIPS = (
    HEAD
    + """
@pytest.mark.unit
def test_one(): pytest.skip("no such thing here")
"""
)


@pytest.fixture
def session(tmp_path):
    """Run a session of one file; returns its exit code and what it printed."""

    def run(text, *options, ci=False):
        (tmp_path / "pytest.ini").write_text(
            "[pytest]\nmarkers =\n unit:\n netns:\n vm:\ntestpaths = t\n"
        )
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "t" / "test_it.py").write_text(text)
        env = {key: value for key, value in os.environ.items() if key != "CI"}
        env |= {"PYTHONPATH": str(TESTS)} | ({"CI": "true"} if ci else {})
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *PLUGINS, *options],
            cwd=tmp_path, env=env, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout

    return run


def test_a_skip_is_all_right_on_a_desk(session):
    assert session(SKIPS)[0] == 0


@pytest.mark.parametrize(("options", "ci"), [((), True), (("--require-all",), False)])
def test_a_skip_fails_ci(session, options, ci):
    code, said = session(SKIPS, "t", *options, ci=ci)
    assert code == 1
    assert "skipped, but must run here: t/test_it.py::test_one" in said


def test_a_file_that_skips_itself_fails_ci(session):
    code, said = session(HEAD + "pytest.skip('not here', allow_module_level=True)", "t", ci=True)
    assert code == 1
    assert "skipped, but must run here: t/test_it.py" in said


def test_a_skip_that_is_marked_so_is_all_right_in_ci(session):
    text = SKIPS.replace("@", "@pytest.mark.may_skip('needs a moon')\n@", 1)
    assert session(text, "t", ci=True)[0] == 0


def test_ci_fails_if_all_is_run_and_a_kind_had_no_test(session):
    code, said = session(HEAD + "@pytest.mark.unit\ndef test_one(): pass", ci=True)
    assert code == 1
    assert "no test of kind 'netns' has run" in said
    assert "no test of kind 'vm' has run" in said
    assert "no test of kind 'unit' has run" not in said


def test_a_failure_is_still_a_failure_and_success_success(session):
    assert session(HEAD + "def test_one(): assert 0", "t", ci=True)[0] == 1
    assert session("def test_one(): pass", "t::nothing", ci=True)[0] == 4


#: fails when it runs for the first time
ONCE = """
import pathlib, pytest
def test_{name}():
    tried = pathlib.Path("tried-{name}")
    if not tried.exists():
        tried.touch()
        assert 0, "{why}"
"""


def test_what_fails_once_is_a_failure_on_a_desk_and_told_in_ci(session):
    code, said = session(ONCE.format(name="desk", why="by chance"), "t")
    assert code == 1
    assert "1 failed" in said
    code, said = session(ONCE.format(name="ci", why="by chance"), "t", ci=True)
    assert code == 0
    assert "RERUN t/test_it.py::test_ci" in said
    assert "AssertionError: by chance" in said
    assert "1 passed, 1 rerun" in said


def test_what_fails_twice_fails_ci(session):
    code, said = session(HEAD + "def test_one(): assert 0", "t", ci=True)
    assert code == 1
    assert "1 failed, 1 rerun" in said


def test_three_that_fail_once_are_one_too_many(session):
    text = "".join(ONCE.format(name=name, why="by chance") for name in "abc")
    code, said = session(text, "t", ci=True)
    assert code == 1
    assert "1 failed, 2 passed, 2 rerun" in said


def test_what_the_kernel_says_is_no_chance(session):
    code, said = session(ONCE.format(name="one", why="the kernel said: WARNING"), "t", ci=True)
    assert code == 1
    assert "1 failed" in said
    assert "RERUN" not in said


def test_the_one_packet_in_very_many_is_no_chance(session, tmp_path):
    for path in again.EXACT:
        assert (TESTS.parent / path).exists()
    exact = tmp_path / again.EXACT[0]
    exact.parent.mkdir(parents=True)
    exact.write_text(ONCE.format(name="one", why="one of a million"))
    code, said = session("", again.EXACT[0], ci=True)
    assert code == 1
    assert "RERUN" not in said
