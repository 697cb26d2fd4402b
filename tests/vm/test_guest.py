"""The guest itself: the kernel it says, with our module at hand."""

import os
import re
from pathlib import Path

import pytest
from vnet.testing.net import HERE

pytestmark = pytest.mark.vm


def test_the_kernel_is_the_one_the_test_is_named_after(kernel):
    assert re.match(re.escape(kernel) + "[.-]", os.uname().release)


def test_the_module_is_found_by_name_and_loads():
    HERE.run("modprobe", "xt_copyxid")
    assert "xt_copyxid" in HERE.run("lsmod").stdout
    HERE.run("modprobe", "-r", "xt_copyxid")


def test_what_the_kernel_complains_of_is_heard(pytestconfig):
    # Unheard, it fails the test at hand: this one, if it did not listen itself.
    listener = pytestconfig.pluginmanager.get_plugin("vm-guest")
    # A line without an end is not a message yet: the next might go on with it.
    Path("/proc/sys/kernel/printk_devkmsg").write_text("on\n")  # no rate limit
    assert listener.complaint() == ""
    Path("/dev/kmsg").write_text("an ordinary word\n")
    assert listener.complaint() == ""
    Path("/dev/kmsg").write_text("WARNING: CPU: 0 PID: 1 at net/core/sock.c:1\n")
    assert "WARNING: CPU" in listener.complaint()


def test_slices_and_namespaces_can_be_made(peers, slices):
    peers.node.run("ping", "-c1", "-W5", peers.link.b6, cgroup=slices.a)
