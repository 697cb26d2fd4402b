"""The guest's side of the vm tests, as a pytest plugin."""

import json
import os
import re
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed import debug
from testbed.again import KERNEL_SAID, RERUN
from testbed.house import PROBLEMS
from testbed.vm import DEBUG, PATIENCE, REPORTS

TEST_SECONDS = 300
"""For one test, unless it is marked limit(seconds)."""

COMPLAINT = re.compile(
    r"WARNING:|BUG:|Oops|general protection|suspicious RCU|refcount_t:|UBSAN"
    r"|unregister_netdevice: waiting|list_(?:add|del) corruption|scheduling while atomic"
    r"|unable to handle|Call Trace"
    # What debug kernels say besides.
    r"|KASAN|INFO: trying to register|INFO: possible|ODEBUG|ref_tracker:|leaked reference"
)
"""What a kernel in health never says."""


class Guest:
    """Tells the host about each test."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.log = Path(os.environ["VNET_VM_SHARE"], REPORTS)
        self.judged = not DEBUG
        self.again = False  #: the test at hand is about to run once more

    def _tell(self, said: str, **facts: Any) -> None:
        with self.log.open("a") as log:
            log.write(json.dumps({"said": said, **facts}) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """The host wants to know which test it was when the guest dies."""
        self._tell("start", nodeid=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Send each report as it is."""
        self.again |= report.outcome == RERUN
        serialize = self.config.hook.pytest_report_to_serializable
        self._tell("report", report=serialize(config=self.config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """All reports of this test are out, unless it runs once more."""
        if not self.again:
            self._tell("finish", nodeid=nodeid)
        self.again = False

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """What cannot be collected has no test to report it."""
        if report.failed:
            self._tell("problem", problem=f"{report.nodeid}: {report.longreprtext}")

    def pytest_terminal_summary(self) -> None:
        """What is wrong with the session as a whole."""
        for problem in self.config.stash[PROBLEMS]:
            self._tell("problem", problem=problem)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Behind the first report lockdep is deaf: tests that ask for one come last."""
        items.sort(key=lambda item: item.get_closest_marker("reported") is not None)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """The others are judged before."""
        if item.get_closest_marker("reported"):
            self._judge()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """There may have been none."""
        self._judge()

    def _judge(self) -> None:
        """What a debug kernel knows only at the end."""
        if self.judged:
            return
        self.judged = True
        problems, notes = debug.verdict()
        self.config.stash[PROBLEMS] += problems
        for note in notes:
            self._tell("note", note=note)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """A test that hangs fails, rather than take the others with it."""
        marker = item.get_closest_marker("limit")
        seconds = (marker.args[0] if marker else TEST_SECONDS) * PATIENCE

        def expire(*_: object) -> None:
            raise TimeoutError(f"the test took more than {seconds:g} s")

        before = signal.signal(signal.SIGALRM, expire)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None, object, object]:
        """A test during which the kernel complained has failed."""
        result = yield
        complaint = self.complaint()
        assert not complaint, complaint
        return result

    def complaint(self) -> str:
        """What the kernel has said since the last call, if it was a complaint."""
        lines = list(self._kernel_lines())
        first = next((n for n, line in enumerate(lines) if COMPLAINT.search(line)), None)
        if first is None:
            return ""
        # The first line of a report says what it is, and KASAN's go on for a hundred.
        return f"{KERNEL_SAID}:\n" + "\n".join(lines[max(first - 10, 0) : first + 150])

    def pytest_sessionstart(self) -> None:
        """Listen to the kernel from now on."""
        self.kmsg = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self.kmsg, 0, os.SEEK_END)

    def _kernel_lines(self) -> Iterator[str]:
        """Its messages since the last call: each read gives one record."""
        while True:
            try:
                record = os.read(self.kmsg, 8192)
            except BlockingIOError:
                return
            except BrokenPipeError:  # overwritten before it was read: the next one follows
                continue
            yield record.decode(errors="replace").partition(";")[2].rstrip()
