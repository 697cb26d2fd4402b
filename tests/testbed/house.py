"""The rules of a test session, as a pytest plugin.

Whatever the tests made is gone when they end, or the session fails. And a
test that cannot run says why, which is all right on somebody's desk but not
in CI: there (CI=true, or --require-all) a skip fails the session, unless the
test is marked ``may_skip(reason)``, and a run of everything must have run
some test of each kind.
"""

import os
import signal

import pytest
from vnet.testing import cgroup, net

KINDS = ("unit", "netns", "vm")
PROBLEMS = pytest.StashKey[list[str]]()
"""What makes the session fail although no test did."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The switch."""
    parser.addoption(
        "--require-all",
        action="store_true",
        default=os.environ.get("CI") == "true",
        help="a skipped test fails the session (the default where CI=true)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Marks, and the one that watches."""
    config.addinivalue_line("markers", "may_skip(reason): a skip of this test is all right in CI")
    config.addinivalue_line("markers", "limit(seconds): how long a vm test may take")
    config.addinivalue_line("markers", "kernels(series...): those a vm test is for, if not all")
    config.addinivalue_line("markers", "reported: a vm test that has the kernel report something")
    config.stash[PROBLEMS] = []
    # A shell's `make test &` ignores SIGINT, and so would all that tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(House(config))


class House:
    """Watches one session."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.ran: set[str] = set()
        self.skipped: list[str] = []

    def pytest_sessionstart(self) -> None:
        """Remove what a killed run has left."""
        if os.geteuid() == 0:
            net.sweep()
            cgroup.sweep()

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip what needs root for those who are not."""
        if item.get_closest_marker("netns") and os.geteuid() != 0:
            pytest.skip("needs root, for namespaces")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count kinds and skips."""
        if report.when == "call" and not report.skipped:
            self.ran.update(kind for kind in KINDS if kind in report.keywords)
        expected = "may_skip" in report.keywords or hasattr(report, "wasxfail")
        if report.skipped and not expected:
            self.skipped.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that skips itself is a skip, too."""
        if report.skipped:
            self.skipped.append(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Judge the session."""
        problems = self.config.stash[PROBLEMS]
        if os.geteuid() == 0:
            problems += [f"left behind: namespace {name}" for name in net.leftovers()]
            problems += [f"left behind: cgroup {path}" for path in cgroup.leftovers()]
        if self.config.getoption("require_all") and not self.config.option.collectonly:
            problems += [f"skipped, but must run here: {what}" for what in self.skipped]
            if self._whole_suite():
                missing = [kind for kind in KINDS if kind not in self.ran]
                problems += [f"no test of kind {kind!r} has run" for kind in missing]
        if problems and session.exitstatus in (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _whole_suite(self) -> bool:
        chosen = self.config.option.keyword or self.config.option.markexpr
        return self.config.args_source == pytest.Config.ArgsSource.TESTPATHS and not chosen

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what is wrong."""
        problems = self.config.stash[PROBLEMS]
        if problems:
            terminalreporter.section("the session fails", red=True, bold=True)
            for problem in problems:
                terminalreporter.write_line(problem)
