"""That a debug kernel (make vm-debug) reports what it is there for."""

import re
import subprocess

import pytest
from testbed import debug, vm

pytestmark = [
    pytest.mark.vm,
    pytest.mark.reported,
    pytest.mark.may_skip("stock kernels have none of this"),
    pytest.mark.skipif(vm.IN_GUEST and not vm.DEBUG, reason="this is no debug kernel"),
]


def said(request: pytest.FixtureRequest, fault: str) -> str:
    """What the kernel complains of when the faulty module is loaded."""
    done = subprocess.run(["modprobe", "vnet_faulty", f"fault={fault}"], capture_output=True)
    assert done.returncode
    return str(request.config.pluginmanager.get_plugin("vm-guest").complaint())


def test_what_is_right_is_not_reported(request):
    assert said(request, "") == ""


def test_memory_that_is_read_after_it_was_freed_is_reported(request):
    assert re.search(r"KASAN: \S*use-after-free in .*vnet_faulty", said(request, "freed"))


def test_sleeping_under_a_spinlock_is_reported(request):
    assert "sleeping function called from invalid context" in said(request, "sleep") or (
        "scheduling while atomic" in said(request, "sleep")
    )


def test_memory_that_nothing_refers_to_is_reported(request):
    assert said(request, "lost") == ""
    # The module is gone, and its name with it.
    leaks = debug.lost()
    assert any(map(debug.is_ours, leaks)), leaks
