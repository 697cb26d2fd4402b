"""The host's side of the vm tests, as a pytest plugin.

The first vm test to be reached boots every kernel that is needed (tools/vm),
and inside each the same pytest runs the same node ids. Their reports come
back one by one through a shared file, so what has finished before a guest
dies counts, and the rest fails with the end of its console.

Where nothing but unit tests comes before the vm tests, the guests boot beside
those, at a lower priority. Tests with packets would not get theirs in time.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from testbed import vm
from testbed.house import PROBLEMS
from testbed.vm import DEBUG, REPORTS, ROOT, why_not

GUEST_SECONDS = 2 * 3600.0 if not DEBUG else 8 * 3600.0
"""For all tests of one kernel, its boot included: four times what two idle cores take."""


@dataclass
class Guest:
    """A booted kernel and what has been heard of its tests."""

    series: str
    share: Path
    process: subprocess.Popen[bytes]
    reports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    running: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    at: int = 0
    mourned: bool = False

    def listen(self) -> bool:
        """Take in what the guest has written; false once it will write no more."""
        gone = self.process.poll() is not None  # asked first, or its last words are missed
        log = self.share / REPORTS
        data = log.read_bytes()[self.at :] if log.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        self.at += len(whole)
        for line in whole.splitlines():
            said = json.loads(line)
            match said["said"]:
                case "start":
                    self.running = said["nodeid"]
                case "report":
                    report = said["report"]
                    self.reports.setdefault(report["nodeid"], []).append(report)
                case "finish":
                    self.finished.add(said["nodeid"])
                    self.running = ""
                case "note":
                    self.notes.append(f"kernel {self.series}: {said['note']}")
                case "problem":
                    self.problems.append(f"kernel {self.series}: {said['problem']}")
        return not gone

    def wait_for(self, nodeid: str) -> None:
        """Until the test has finished or the guest has."""
        while self.listen() and nodeid not in self.finished:
            time.sleep(0.1)

    def epitaph(self, nodeid: str) -> str:
        """Why there is no report of a test: the first to ask hears all of it."""
        if self.mourned:
            return f"kernel {self.series}: not run, the guest had ended"
        self.mourned = True
        during = f" during {self.running}" if self.running not in ("", nodeid) else ""
        tail = (self.share / "log").read_text(errors="replace").splitlines()[-60:]
        return "\n".join([f"kernel {self.series}: the guest ended{during}; its last words:", *tail])


def boot(series: str, nodeids: list[str], options: list[str], nice: int = 0) -> Guest:
    """Start a guest that runs these tests; ``nice``: for who else is at work."""
    share = Path(tempfile.mkdtemp(prefix=f"vnt-vm-{series}-"))
    (share / "items").write_text("".join(f"{nodeid}\n" for nodeid in nodeids))
    # One CPU for each guest: two guests side by side on two cores finish
    # sooner than one after the other, and a guest CPU that waits for another
    # which the host does not run stalls for seconds.
    cpus = os.environ.get("VNET_VM_CPUS", "1")
    argv = [
        *(
            "setpriv",
            "--pdeathsig",
            "TERM",
            "--",
        ),  # a session that is killed takes its guests along
        *("nice", "-n", str(nice)),
        *(sys.executable, str(ROOT / "tools/vm"), "--cpus", cpus),
        *(("--kernel", f"debug-{series}", "--memory", "4G") if DEBUG else ("--kernel", series)),
        *("--timeout", str(GUEST_SECONDS), "--share", str(share), "--"),
        *("env", f"VNET_VM_SHARE={share}", f"VNET_PATIENCE={vm.PATIENCE:g}"),
        *(str(ROOT / ".venv/bin/python"), "-m", "pytest"),
        *("-p", "no:cacheprovider", *options, f"@{share}/items"),
    ]
    with (share / "log").open("wb") as log:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT
        )
    return Guest(series, share, process)


def series_of(item: pytest.Item) -> str:
    """The kernel an item is for."""
    assert isinstance(item, pytest.Function)
    return str(item.callspec.params["kernel"])


def is_for_a_guest(item: pytest.Item) -> bool:
    """A vm test whose kernel can be booted here."""
    return item.get_closest_marker("vm") is not None and not why_not(series_of(item))


def _is_vm_or_unit(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(kind) for kind in ("vm", "unit"))


def _revived(config: pytest.Config, data: dict[str, Any]) -> pytest.TestReport:
    """A report from JSON, which knows no tuples: pytest insists on them for a skip."""
    if isinstance(data.get("longrepr"), list):
        data["longrepr"] = tuple(data["longrepr"])
    report = config.hook.pytest_report_from_serializable(config=config, data=data)
    assert isinstance(report, pytest.TestReport)
    return report


class Host:
    """Runs vm tests by asking the guests."""

    def __init__(self) -> None:
        self.guests: dict[str, Guest] = {}
        self.notes: list[str] = []
        self.early: pytest.Item | None = None
        """At which guests boot before their turn."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Find the first of the unit tests that nothing but vm tests follows."""
        vm_or_unit = list(takewhile(_is_vm_or_unit, reversed(session.items)))
        self.early = vm_or_unit[-1] if vm_or_unit else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Report what the guest reports."""
        if not self.guests and (item is self.early or is_for_a_guest(item)):
            self._boot_all(item.session, nice=0 if is_for_a_guest(item) else 10)
        if not is_for_a_guest(item):
            return None
        guest, hook = self.guests[series_of(item)], item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        guest.wait_for(item.nodeid)
        for data in guest.reports.pop(item.nodeid, []):
            hook.pytest_runtest_logreport(report=_revived(item.config, data))
        if item.nodeid not in guest.finished:
            report = pytest.TestReport(
                nodeid=item.nodeid,
                location=item.location,
                keywords=dict.fromkeys(item.keywords, 1),
                outcome="failed",
                longrepr=guest.epitaph(item.nodeid),
                when="call",
            )
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _boot_all(self, session: pytest.Session, nice: int) -> None:
        wanted: dict[str, list[str]] = {}
        for item in filter(is_for_a_guest, session.items):
            wanted.setdefault(series_of(item), []).append(item.nodeid)
        options = ["--again"] if session.config.option.again else []
        self.guests = {
            series: boot(series, nodeids, options, nice) for series, nodeids in wanted.items()
        }

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Let the guests end, and pass on what they said of the whole session."""
        for guest in self.guests.values():
            complete = not session.shouldstop and not session.shouldfail
            if not complete or session.exitstatus == pytest.ExitCode.INTERRUPTED:
                guest.process.terminate()
                guest.process.wait()
            else:
                while guest.listen():
                    time.sleep(0.1)
                if guest.process.returncode not in (0, 1) and not guest.mourned:
                    guest.problems.append(guest.epitaph(""))
            session.config.stash[PROBLEMS] += guest.problems
            self.notes += guest.notes
            shutil.rmtree(guest.share, ignore_errors=True)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """What the guests had to say that is no failure."""
        for note in self.notes:
            terminalreporter.write_line(note)
