"""Loading and unloading, and namespaces that come and go under traffic."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from module_bed import COPY, Bed, iptables, load
from vnet.testing import cgroup, net
from vnet.testing.poll import until

from vnet import copyxid

pytest_plugins = ["module_fixtures"]
pytestmark = pytest.mark.vm
LOADED = Path("/sys/module/xt_copyxid")


def users() -> int:
    return int((LOADED / "refcnt").read_text())


def unload() -> subprocess.CompletedProcess[str]:
    return subprocess.run(["rmmod", "xt_copyxid"], capture_output=True, text=True)


@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_it_cannot_be_unloaded_while_a_rule_uses_it(variant):
    load()
    until(lambda: users() == 0, what="no rule of another test")
    with net.namespace() as ns:
        iptables(ns, f"-t mangle -A INPUT {COPY}", f"iptables-{variant}")
        assert users() == 1
        refused = unload()
        assert refused.returncode == 1
        assert "in use" in refused.stderr
        iptables(ns, f"-t mangle -D INPUT {COPY}", f"iptables-{variant}")
        until(lambda: users() == 0, what="the rule's reference given back")
        assert unload().returncode == 0
        assert not LOADED.exists()


def test_it_unloads_with_a_full_table_and_comes_back_empty():
    load()
    with ExitStack() as stack:
        parent = stack.enter_context(cgroup.cgroup())
        groups = [stack.enter_context(cgroup.cgroup(parent=parent)) for _ in range(50)]
        with copyxid.connect() as module:
            assert module.set_many({group.id: 5 for group in groups}) == {}
        until(lambda: users() == 0, what="no rule of another test")
        assert unload().returncode == 0
        assert not copyxid.present()
        load()
        with copyxid.connect() as module:
            assert module.table() == {}


@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_stock_rules_of_the_stock_plugin_work_where_ours_was_loaded_first(variant):
    """The kernel asks for no module of a name that it has one revision of."""
    load()
    for name in ("xt_copyxid", "xt_mark"):
        here = Path("/sys/module", name)
        until(
            lambda name=name, here=here: (
                subprocess.run(["rmmod", name], capture_output=True) and not here.exists()
            ),
            what=f"{name} unloaded",
        )
    load()
    with net.namespace() as ns:
        iptables(ns, "-t mangle -A INPUT -j MARK --set-mark 5", f"iptables-{variant}", stock=True)
        listed = iptables(ns, "-t mangle -S INPUT", f"iptables-{variant}", stock=True).stdout
        assert "-j MARK --set-xmark 0x5/0xffffffff" in listed


_FLOOD = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
r = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
r.bind(("127.0.0.1", 0))
print("ready", flush=True)
while True:
    s.sendto(b"x", r.getsockname())
    r.recv(10)
"""


def test_namespaces_come_and_go_under_traffic(bed: Bed):
    """Deleted while packets flow and counters are read; nothing is left of them."""
    before = {stats.netns for stats in bed.module.stats()}
    for _ in range(8):
        with net.namespace() as ns:
            iptables(ns, f"-t mangle -A INPUT {COPY}")
            iptables(ns, f"-t mangle -A POSTROUTING {COPY}")
            argv = (sys.executable, "-ISc", _FLOOD)
            with ns.popen(*argv, cgroup=bed.a, stdout=subprocess.PIPE) as flood:
                assert flood.stdout.readline() == "ready\n"
                until(lambda ns=ns: bed.counters(ns)["in-lookup"] > 20)
                subprocess.run(["ip", "netns", "delete", ns.name], check=True)
                bed.module.stats()
                flood.kill()
    until(lambda: {s.netns for s in bed.module.stats()} == before, what="all counters gone")


_TALK = """
import socket
for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
    for _ in range(100):
        a = socket.socket(socket.AF_INET, kind); b = socket.socket(socket.AF_INET, kind)
        a.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            a.listen()
            b.connect(a.getsockname()); c = a.accept()[0]; c.send(b"x"); b.recv(1); c.close()
        else:
            b.sendto(b"x", a.getsockname()); a.recv(1)
        a.close(); b.close()
"""


def test_no_socket_reference_is_lost(bed: Bed):
    """Each look-up gives back what it took: a socket holds its namespace, which goes."""
    before = {stats.netns for stats in bed.module.stats()}
    with net.namespace() as ns:
        ns.run("ip", "link", "set", "lo", "up")
        iptables(ns, f"-t mangle -A INPUT {COPY}")
        iptables(ns, f"-t mangle -A POSTROUTING {COPY}")
        for slice in (bed.a, None):
            ns.run(sys.executable, "-ISc", _TALK, cgroup=slice)
        assert bed.counters(ns)["in-lookup"] >= 400
        assert {stats.netns for stats in bed.module.stats()} > before
    until(lambda: {s.netns for s in bed.module.stats()} == before, what="its counters gone")
