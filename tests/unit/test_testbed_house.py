"""The rules of a session: what is skipped, missing or left behind fails it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

TESTS = Path(__file__).parent.parent
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
            [sys.executable, "-m", "pytest", "-p", "testbed.house", *options],
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
