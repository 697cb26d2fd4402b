"""``vnet check`` on a live node in Debian's kernels: the module, BPF LSM, SCTP, 32-bit programs.

The node is the guest itself, as on a real one. A guest is slow: each data path runs
in one kernel. What is broken there is what the host's kernel cannot have
(tests/netns/test_check_breaks.py has the rest).
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any
from xml.etree import ElementTree

import breaks
import pytest
import vnetbed
from testbed import vm
from vnet.check.bed import Bed, canaries
from vnet.check.run import PROPERTIES
from vnet.testing import cgroup, net, nflog, poll
from vnet.testing.cgroup import Cgroup
from vnet.testing.net import HERE, Namespace
from vnet.testing.poll import until

from vnet import copyxid, policy, status

pytestmark = pytest.mark.vm

DATAPATHS = {"6.1": "bpf", "6.12": "module"}
PATIENCE = 20.0
"""Seconds for what takes milliseconds elsewhere."""
SLOWNESS = 5
"""How many times as long as elsewhere the command waits."""
BROKEN = 8.0
"""Where much will not come."""
SLICES = """
[[slice]]
name = "resident"
cgroups = ["{cgroup}"]
interfaces = ["{interface}"]
[slice.grants]
raw = "own"
ports = ["tcp/1080"]
"""


@pytest.fixture(scope="module")
def home() -> Iterator[Cgroup]:
    """A real slice's."""
    with cgroup.cgroup("resident") as made:
        yield made


@pytest.fixture(scope="module")
def node(tmp_path_factory, home) -> Iterator[vnetbed.Node]:
    """The guest, up with its kernel's data path, and ``vnet watch`` beside it."""
    base = tmp_path_factory.mktemp("node")
    datapath = DATAPATHS.get(vm.running_series(), "module")
    for name in ("sctp", "smc"):
        subprocess.run(["modprobe", name], check=True)
    with ExitStack() as stack:
        enter = stack.enter_context
        box = enter(net.namespace("box"))
        link = enter(net.veth(HERE, box))
        # As on a host of containers; there is no systemd here to open ping_group_range.
        HERE.sysctl(net__ipv4__ping_group_range="0 2147483647", net__ipv4__ip_forward=1,
                    net__ipv6__conf__all__forwarding=1)  # fmt: skip
        made = enter(vnetbed.bpf_node(HERE, base, settings=""))
        text = SLICES.format(cgroup=home.rel, interface=link.a_if)
        (base / "config" / "slices.toml").write_text(text)
        made.vnet("up", "--datapath", datapath)
        argv = (sys.executable, "-m", "vnet.cli", "watch")
        watch = enter(HERE.popen(*argv, env=made.env))
        stack.callback(watch.terminate)
        until(lambda: "watch" in Path(f"/proc/{watch.pid}/cmdline").read_text(), 30)
        yield made


@pytest.fixture(scope="module")
def bed(node) -> Iterator[Bed]:
    """Canaries beside what is there."""
    with canaries(node.paths) as made:
        yield made


def check(node: vnetbed.Node, junit: Path) -> dict[str, Any]:
    """What ``vnet check --live`` reports; both its forms say the same, and all is well."""
    # As a person on a slow machine would.
    done = HERE.run(
        *(sys.executable, "-m", "vnet.cli", "check", "--live", "--json", "--junit", junit),
        env=node.env | {"VNET_PATIENCE": f"{SLOWNESS * poll.PATIENCE:g}"},
        check=False, timeout=1000,
    )  # fmt: skip
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    bad = [outcome for outcome in found["outcomes"] if outcome["verdict"] != "held"]
    assert not bad, "\n".join(map(str, bad))
    assert done.returncode == 0, done.stderr
    [suite] = ElementTree.parse(junit).getroot()
    cases = {(case.get("classname"), case.get("name")) for case in suite}
    cells = {(f"vnet.check.{o['property']}", o["role"]) for o in found["outcomes"]}
    assert cases == cells
    assert [suite.get(key) for key in ("failures", "errors", "skipped")] == ["0", "0", "0"]
    return found


#: what a tenant's programs do all day: answer, and ask five times a second
TALK = """
import select, socket, sys
kind, at, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
family = socket.AF_INET6 if ":" in at else socket.AF_INET
udp = socket.socket(family, socket.SOCK_DGRAM)
if kind == "answer":
    tcp = socket.create_server((at, port), family=family)
    udp.bind((at, port))
    print("ready", flush=True)
    sock, _ = tcp.accept()
    while True:
        for each in select.select([sock, udp], [], [])[0]:
            data, whose = each.recvfrom(100)
            if not data:
                sys.exit()
            each.sendto(data, whose) if each is udp else each.sendall(data)
sock = socket.create_connection((at, port))
udp.connect((at, port))
count = 0
while not select.select([sys.stdin], [], [], 0.2)[0]:
    for each in (sock, udp):
        each.send(b"x" * 100)
        each.settimeout(100)
        assert each.recv(100) == b"x" * 100
    count += 1
    if count == 1:
        print("talking", flush=True)
print(count)
"""
SERVES = 1080


@contextmanager
def talk(kind: str, ns: Namespace, whose: Cgroup | None, at: str) -> Iterator[Popen[str]]:
    """One end of a conversation, when it is there."""
    with ns.popen(sys.executable, "-I", "-S", "-c", TALK, kind, at, str(SERVES),
                  cgroup=whose, stdin=PIPE, stdout=PIPE) as process:  # fmt: skip
        try:
            assert process.stdout and process.stdout.readline()
            yield process
        finally:
            process.kill()


def state_of(node: vnetbed.Node, xid: int) -> dict[str, Any]:
    """All of a node that nobody else may change, and a slice's sockets and flows."""
    found = status.look(node.paths)
    table = {}
    if found.datapath == "module":
        with copyxid.connect() as module:
            table = {number: each.xid for number, each in module.table().items()}
    conntrack = HERE.run("conntrack", "-L", check=False).stdout
    conntrack += HERE.run("conntrack", "-L", "-f", "ipv6", check=False).stdout
    flows = re.findall(
        rf"^(\S+) .*?(src=.*?dport={SERVES}\b).* mark=(\d+)", conntrack, re.MULTILINE
    )
    # One blank for many: the columns are as wide as the widest of all. A timer says what
    # somebody waits for at this moment.
    sockets = re.sub(r" +(timer:\(\S+\) +)?", " ", HERE.run("ss", "-tuanOHe").stdout)
    return {
        "fingerprint": node.fingerprint(files=False),
        "whole": (found.whole, found.differences),
        "slices": status.listing(node.paths),
        "files": vnetbed.tree(node.base / "config"),
        "policy": asdict(policy.read(Path(found.instance or ""))),
        "table": table,
        "addresses": HERE.run("ip", "-br", "addr").stdout,
        "routes": HERE.run("ip", "route", "show", "table", "all").stdout,
        "namespaces": sorted(path.name for path in Path("/run/netns").iterdir()),
        "cgroups": sorted(map(str, cgroup.root().rglob("*/"))),
        "flows": {
            flow for flow in flows if int(flow[2]) & 0xFFFF == xid or int(flow[2]) >> 16 == xid
        },
        "sockets": sorted(
            re.findall(rf"^(\S+).* (\S+:{SERVES}\b.*fwmark:\S+)", sockets, re.MULTILINE)
        ),
    }


@pytest.mark.limit(1200)
def test_the_whole_check_of_a_live_node_holds_and_leaves_a_busy_slice_alone(node, home, tmp_path):
    xid = status.current_xids(node.paths)["resident"]
    with ExitStack() as stack:
        enter = stack.enter_context
        far = enter(net.namespace("far"))
        link = enter(net.veth(HERE, far))
        places = f"ip daddr {{ {link.a4}, {link.b4} }}", f"ip6 daddr {{ {link.a6}, {link.b6} }}"
        log = enter(nflog.capture(HERE, only=tuple(f"{at} th dport {SERVES}" for at in places)
                                  + tuple(f"{at} th sport {SERVES}" for at in places)))  # fmt: skip
        enter(talk("answer", far, None, link.b4))
        enter(talk("answer", HERE, home, link.a6))
        asking = [enter(talk("ask", HERE, home, link.b4)), enter(talk("ask", far, None, link.a6))]
        before = state_of(node, xid)
        assert (len(before["flows"]), len(before["sockets"])) == (4, 5), before
        assert before["whole"] == (True, [])

        found = check(node, tmp_path / "report.xml")

        assert state_of(node, xid) == before
        counts = [int(each.communicate("\n", timeout=100)[0]) for each in asking]
        seen = log.seen()
    assert min(counts) > 10
    assert len(seen) > 4 * sum(counts)
    assert {packet.xid for packet in seen} == {xid}
    assert (found["live"], found["datapath"]) == (
        True,
        DATAPATHS.get(vm.running_series(), "module"),
    )
    # Nothing is skipped, and this kernel and node have all that can be checked.
    assert found["summary"] == {each.name: "held" for each in PROPERTIES}


#: protection: those of TRIED that fall with it
BREAKS = {
    "bpf": {
        "link vnet_lsm_socket_create": {"packet-sockets", "kernel-made-sockets"},
        "link vnet_lsm_socket_bind": {"sctp-port-reserved"},
        "link vnet_lsm_sctp_bindx": {"sctp-port-reserved"},
        "link vnet_lsm_socket_setsockopt": {"mark-setsockopt"},
    },
    "module": {
        "rule INPUT -j VNET-INPUT": {"ingress-udp", "flow-owners"},
        "rule VNET-INPUT -j MARK --copy-xid": {"ingress-udp", "flow-owners"},
        "rule POSTROUTING -j VNET-POST": {"connection-hijack", "flow-owners"},
        "rule VNET-POST -m bpf vnet_join -j DROP": {"connection-hijack"},
        # The guard has marked the socket's packets from birth.
        "rule VNET-POST -j MARK --copy-xid": {"connection-hijack", "flow-owners"},
        "table of the module": {"ingress-udp", "connection-hijack", "flow-owners"},
    },
}  # fmt: skip
TRIED = {
    "bpf": ("packet-sockets", "kernel-made-sockets", "sctp-port-reserved", "mark-setsockopt"),
    "module": ("ingress-udp", "connection-hijack", "flow-owners"),
}
_MINE = {"bpf": "lsm", "module": "VNET-INPUT|VNET-POST|module"}


@pytest.mark.limit(600)
def test_each_protection_that_only_this_kernel_has_is_missed(node, bed):
    known = {each.name: each for each in breaks.every(node.paths)}
    expected, tried = BREAKS[bed.datapath], TRIED[bed.datapath]
    assert {name for name in known if re.search(_MINE[bed.datapath], name)} == set(expected)
    # that all is well before is the test above
    for name, properties in expected.items():
        with known[name].broken():
            found = breaks.fell(bed, tried, BROKEN)
        assert set(found) == properties, (name, found)
    assert breaks.fell(bed, tried, PATIENCE) == {}
