"""What fails in CI is run once more, and told, as a pytest plugin.

Of four thousand tests of things that happen at once, one fails now and then by
a schedule that its author did not think of. On a desk that is a failure. In CI
the test is run again; if it passes then, so does the session, and the failure
is printed whole at its end, to be mended. That lets nothing real go:

- two such failures in a kernel (the host's, each guest's) are borne, not three;
- what the kernel complains of is never chance;
- nor is what a test finds that plays very many packets, or kills, for the one
  that is treated wrongly (``EXACT``).
"""

import os

import pytest

MOST = 2
"""failures of a kernel's tests that may have been chance"""
KERNEL_SAID = "the kernel said"
"""how the failure begins that a message of the kernel makes (testbed.vm_guest)"""
RERUN = "rerun"
"""the outcome, of a report, of a failure after which the test runs once more"""
EXACT = [
    "tests/netns/test_endurance_host.py",
    "tests/netns/test_mix.py",
    "tests/netns/test_netflow_kills.py",
    "tests/netns/test_netflow_storm.py",
    "tests/netns/test_truth.py",
    "tests/unit/test_ct_sanitized.py",
    "tests/vm/test_endurance.py",
    "tests/vm/test_mix_debian.py",
    "tests/vm/test_truth_debian.py",
]
"""their failures count, however seldom they are"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The switch."""
    parser.addoption(
        "--again",
        action="store_true",
        default=os.environ.get("CI") == "true",
        help="run a test that fails once more, and tell (the default where CI=true)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Have pytest-rerunfailures do it, unless its own options say otherwise."""
    option = config.option
    if not option.again or option.reruns is not None:
        return
    option.reruns, option.max_suite_reruns = 1, MOST
    option.rerun_show_tracebacks = True
    option.rerun_except = [KERNEL_SAID]
    option.rerun_exclude_path = EXACT
