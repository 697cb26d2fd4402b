"""``vnet`` on the eBPF data path: up, down, status, the guard's mode, slices, killed half-way."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import vnetbed
from vnet.testing import cgroup
from vnet.testing.poll import until
from vnetbed import watching

from vnet import bpf, bpfobjects, guard, module, policy, registry, status, sysctls

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(bpf.lacking()), reason="this kernel cannot run the eBPF programs"),
    pytest.mark.skipif(not bpf.lsm_lacking(), reason="written for a kernel without BPF LSM"),
]
VARIANTS = pytest.mark.parametrize("variant", ["nft", "legacy"])


@pytest.fixture
def node(ns, slices, tmp_path) -> Iterator[vnetbed.Node]:
    """Two slices, of which a holds tcp/80 and b an address; the node is down."""
    ns.run("ip", "link", "set", "lo", "up")
    ns.run("ip", "address", "add", "127.9.9.9/8", "dev", "lo")
    # ping(8) then needs no raw socket
    ns.run("sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")
    with vnetbed.bpf_node(ns, tmp_path) as made:
        (tmp_path / "config" / "slices.toml").write_text(f"""
[[slice]]
name = "a"
cgroups = ["{slices.a.rel}"]
grants = {{ ports = ["tcp/80", "udp/5000-5003"] }}
[[slice]]
name = "b"
cgroups = ["{slices.b.rel}"]
xid = 65535
grants = {{ raw = "own", addresses = ["127.9.9.9"] }}
""")
        yield made


def bind(node, port, kind="STREAM", address="", slice_=None) -> int:
    """The errno of binding to a port from a slice; 0 if it went well."""
    code = (
        f"import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_{kind})\n"
        f"try: s.bind(({address!r}, {port}))\nexcept OSError as e: print(e.errno)\nelse: print(0)"
    )
    return int(node.ns.run("/usr/bin/python3", "-c", code, cgroup=slice_).stdout)


def ping_marks(node, slice_=None) -> set[int]:
    """The connection marks that a ping from a slice leaves."""
    node.ns.run("conntrack", "-F")
    node.ns.run("sh", "-c", "ping -c1 127.0.0.1 && ping -c1 ::1", cgroup=slice_)
    listed = node.ns.run("sh", "-c", "conntrack -L -f ipv4; conntrack -L -f ipv6").stdout
    return {int(mark) for mark in re.findall(r"^icmp.* mark=(\d+)", listed, re.MULTILINE)}


def grant(node, raw) -> None:
    """Change b's grant of raw sockets, and apply it."""
    path = node.base / "config" / "slices.toml"
    path.write_text(re.sub('raw = "[a-z]+"', f'raw = "{raw}"', path.read_text()))
    node.vnet("up")


_HOLDS_RAW = "import socket; s = socket.socket(2, 3, 1); print('made', flush=True); input()"


def test_raw_sockets_cost_the_others_only_while_some_may_not_hear_everything(node, slices):
    def guarded() -> bool:
        return bpf.is_hearing_guarded(instance(node))

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    node.vnet("up")
    assert guarded()  # b may have raw sockets, and not hear everything
    (instance(node) / "links" / bpf.HEARING).unlink()
    assert "link vnet_ingress is gone" in node.vnet("status", check=False).stdout
    node.vnet("up")
    assert guarded()
    grant(node, "full")
    assert not guarded()
    with node.ns.popen("/usr/bin/python3", "-c", _HOLDS_RAW, cgroup=slices.b, **pipes) as process:
        assert process.stdout.readline() == "made\n"
        grant(node, "deny")
        assert guarded()  # it has one from before
        assert node.json("status")["whole"]
        process.kill()
    node.vnet("up")
    assert not guarded()


@VARIANTS
def test_up_chooses_ebpf_says_why_marks_and_guards_and_down_leaves_nothing(node, slices, variant):
    if variant == "legacy":  # a legacy table that is once there stays
        for tool in ("iptables-legacy", "ip6tables-legacy"):
            for table in ("raw", "mangle"):
                node.ns.run(tool, "-t", table, "-S")
    before = node.fingerprint()
    done = node.json("up", "--variant", variant)
    assert (done["datapath"], done["variant"]) == ("bpf", variant)
    assert "no loadable modules" in done["why"]
    assert any("packet sockets are not refused" in remark for remark in done["remarks"])
    assert ping_marks(node, slices.a) == {256}
    assert ping_marks(node, slices.b) == {65535}
    assert ping_marks(node) == {0}
    assert bind(node, 80) == errno.EACCES
    assert bind(node, 80, slice_=slices.b) == errno.EACCES
    assert bind(node, 80, slice_=slices.a) == 0
    assert bind(node, 81, slice_=slices.b) == 0
    assert bind(node, 81, address="127.9.9.9", slice_=slices.a) == errno.EACCES
    assert bind(node, 81, address="127.9.9.9", slice_=slices.b) == 0
    seen = node.json("status")  # exits 0
    assert (seen["up"], seen["whole"], seen["datapath"]) == (True, True, "bpf")
    assert (seen["guard"], seen["packet_sockets"]) == ("enforce", "unguarded")
    assert seen["counters"]["out-socket"] >= 2
    refused = {(one["slice"], one["kind"]): one["refused"] for one in seen["refusals"]}
    assert refused["b", "bind"] == 1
    assert refused["a", "address"] == 1
    up = node.fingerprint()
    assert node.json("up", "--variant", variant)["done"] == []
    assert node.fingerprint() == up
    node.vnet("down")
    assert node.fingerprint() == before
    assert ping_marks(node, slices.a) <= {0}
    assert bind(node, 80, slice_=slices.b) == 0


def test_status_tells_people_the_data_path_and_that_the_guard_is_partial(node):
    node.vnet("up")
    seen = node.vnet("status").stdout
    assert "bpf: module xt_copyxid: this kernel" in seen
    assert "partial: packet sockets are not refused" in seen
    assert "of this data path:" in seen


STEPS = [
    "registry", "instance", "reserved", "hearing", "policy", "sysctls", "rules", "rules", "state"
]  # fmt: skip


def killed_up(node, variant, step, whom, *command) -> "subprocess.CompletedProcess[str]":
    """``vnetbed.killed`` in the node's namespace."""
    code = (
        "import sys, vnetbed, pathlib\n"
        "from vnet.testing.net import HERE\n"
        "node = vnetbed.Node(HERE, pathlib.Path(sys.argv[1]))\n"
        "sys.exit(vnetbed.killed(node, sys.argv[2], int(sys.argv[3]), sys.argv[4], "
        "argv=sys.argv[5:]) != 0)\n"
    )
    argv = (str(node.base), variant, str(step), whom, *command)
    env = node.env | {"PYTHONPATH": os.pathsep.join([str(vnetbed.PY), *sys.path])}
    return node.ns.run(sys.executable, "-c", code, *argv, check=False, env=env)


@pytest.mark.limit(300)
@pytest.mark.parametrize("whom", ["worker", "guard", "both"])
def test_an_up_killed_at_any_step_leaves_a_node_that_is_down(node, slices, whom):
    before = node.fingerprint()
    marking = STEPS.index("policy") + 1
    for step in range(1, len(STEPS) + 1):
        assert killed_up(node, "nft", step, whom).returncode != 0
        if whom == "both":
            until(lambda: not guard.busy(node.paths), what="the worker is dead too")
            assert "killed half-way" in str(node.json("status", check=False)["differences"])
            node.vnet("down")
        until(lambda: not node.paths.journal.exists(), what=f"step {step} is undone")
        assert node.fingerprint() == before, f"killed at step {step} ({STEPS[step - 1]})"
        # Nobody holds a number; who may have been marked with one is known.
        with registry.open_readonly(node.paths.registry) as known:
            assert known.held() == {}
            assert len(known.tenures()) == 2 * max(0, step + 1 - marking)
    assert bind(node, 80, slice_=slices.b) == 0
    whole = killed_up(node, "nft", len(STEPS) + 1, whom)  # and there is no other step
    assert whole.returncode == 0, whole.stderr


@pytest.mark.limit(300)
@pytest.mark.parametrize("whom", ["worker", "guard", "both"])
def test_a_changed_policy_killed_at_any_step_leaves_the_old_one_in_force(node, slices, whom):
    node.vnet("up")
    path = node.base / "config" / "slices.toml"
    text = path.read_text().replace("tcp/80", "tcp/81").replace("xid = 65535", "xid = 900")
    path.write_text(text + 'users = ["alice"]\n')
    before, old, names = node.fingerprint(), policy.read(instance(node)), book(node)
    for step in range(1, 6):  # registry, instance, reserved, policy, the port given back
        assert killed_up(node, "nft", step, whom).returncode != 0
        undone(node, step, whom)
        assert node.fingerprint() == before, f"killed at step {step}"
        assert policy.read(instance(node)) == old
        assert book(node) == names
    assert bind(node, 80, slice_=slices.b) == errno.EACCES
    assert [row["xid"] for row in node.json("slice", "history", "b")] == [65535, 900, 900]
    node.vnet("up")
    assert book(node) == ({"a": 256, "b": 900}, {"b": ["alice"]})
    assert bind(node, 80, slice_=slices.b) == 0
    assert bind(node, 81, slice_=slices.b) == errno.EACCES
    assert node.json("status")["whole"]


def undone(node, step, whom) -> None:
    """What was killed is: by the guard, or by the next command, where both were."""
    if whom == "both":
        until(lambda: not guard.busy(node.paths), what="the worker is dead too")
        undo = "from vnet import steps; steps.undo(__import__('vnetbed').paths_from_env())"
        node.python("-c", undo)
    until(lambda: not node.paths.journal.exists(), what=f"step {step} is undone")


def everything(node) -> list[object]:
    """What the kernel holds, the registry and the slices' files."""
    files = vnetbed.tree(node.base / "config")
    return [node.fingerprint(), policy.read(instance(node)), book(node), files, reserved(node)]


#: the steps of ``slice add`` and ``slice rm`` of a slice with a port, on a node that is up
CHANGING = ["registry", "file", "reserved", "policy", "state"]


@pytest.mark.limit(300)
def test_a_slice_command_killed_at_any_step_changes_nothing(node, late):
    node.vnet("up")
    with registry.open_readonly(node.paths.registry) as reader:
        # Any user may read it, for as long as he likes: that holds nobody up.
        reader._connection.execute("BEGIN")
        reader.held()
        for argv in (late, ("slice", "rm", "late")):
            before = everything(node)
            for step, whom in enumerate(["worker", "guard", "both", "worker", "both"], 1):
                assert killed_up(node, "nft", step, whom, *argv).returncode != 0
                undone(node, step, whom)
                assert everything(node) == before, f"{argv} killed at {CHANGING[step - 1]}"
            whole = killed_up(node, "nft", len(CHANGING) + 1, "worker", *argv)
            assert whole.returncode == 0, whole.stderr  # and there is no other step
            assert node.json("status")["whole"]
    assert book(node)[0] == {"a": 256, "b": 65535}
    assert [path.name for path in (node.base / "config").iterdir()] == ["slices.toml"]


def test_a_slice_command_that_fails_changes_nothing(node, late):
    node.vnet("up")
    config, damaged = node.base / "config", b"this is no registry" * 500

    def refused(argv, words) -> None:
        before = everything(node)
        done = node.vnet(*argv, check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
        assert words in done.stderr
        assert everything(node) == before

    for argv in (late, ("slice", "rm", "late")):
        subprocess.run(["mount", "--bind", config, config], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", config], check=True)
            refused(argv, "Read-only file system")
        finally:
            subprocess.run(["umount", config], check=True)
        whole = node.paths.registry.read_bytes()
        node.paths.registry.write_bytes(damaged)
        before, files = node.fingerprint(), vnetbed.tree(config)
        for command in (argv, ("status",), ("slice", "ls"), ("slice", "history")):
            done = node.vnet(*command, check=False)
            assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
            assert f"registry {node.paths.registry}: " in done.stdout + done.stderr
        assert (node.fingerprint(), vnetbed.tree(config)) == (before, files)
        assert node.paths.registry.read_bytes() == damaged
        node.paths.registry.write_bytes(whole)
        node.vnet(*argv)
    assert node.json("status")["whole"]
    # Nothing was marked with what was refused: it is as if it had never been.
    assert [row["xid"] for row in node.json("slice", "history", "late")] == [9]


@pytest.fixture
def late() -> Iterator[tuple[str, ...]]:
    """The command that adds a slice with a port of its own."""
    with cgroup.cgroup() as made:
        yield "slice", "add", "late", "--cgroup", made.rel, "--xid", "9", "--port", "tcp/90"


def book(node) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Who holds which number, and the slices' users, by the registry."""
    with registry.open_readonly(node.paths.registry) as known:
        return {name: tenure.xid for name, tenure in known.held().items()}, known.users()


def instance(node) -> Path:
    (found,) = bpf.instances(node.bpf_dir)
    return found


def test_what_somebody_breaks_is_told_and_mended(node, slices):
    node.vnet("up")
    (instance(node) / "links" / "vnet_bind4").unlink()
    node.ns.run("iptables-nft", "-t", "raw", "-F", "VNET-OUT")
    node.ns.run("ip6tables-nft", "-t", "mangle", "-D", "INPUT", "2")
    node.ns.run("sysctl", "-qw", "net.ipv4.ip_local_reserved_ports=7000")
    empty = "policy.write(pathlib.Path(sys.argv[1]), policy.Policy())"
    node.python("-c", f"import sys, pathlib; from vnet import policy; {empty}", instance(node))
    until(lambda: bind(node, 80, slice_=slices.b) == 0, what="the door stands open")
    seen = node.vnet("status", check=False)
    assert seen.returncode == 1
    for words in (
        "link vnet_bind4 is gone",
        "IPv4 (nft): chain VNET-OUT holds 0 rules instead of 3",
        "IPv6 (nft): INPUT does not jump to VNET-INPUT",
        "the reserved ports in force are not those in the files",
        "the reserved addresses in force are not those in the files",
        f"slice a: {slices.a.rel} (id {slices.a.id}) is not in the table",
        "the grants of raw sockets in force are not those in the files",
    ):
        assert words in seen.stdout
    node.vnet("up")
    assert node.json("status")["whole"]
    assert bind(node, 80, slice_=slices.b) == errno.EACCES
    reserved = node.ns.run("sysctl", "-n", "net.ipv4.ip_local_reserved_ports").stdout.strip()
    assert reserved == "80,5000-5003,7000"
    node.vnet("down")
    reserved = node.ns.run("sysctl", "-n", "net.ipv4.ip_local_reserved_ports").stdout.strip()
    assert reserved == "7000"


def test_the_guards_mode_is_switched_at_once_and_vnet_toml_wins_at_the_next_up(node, slices):
    node.vnet("up")
    assert node.json("guard") == {"mode": "enforce", "configured": "enforce"}
    observing = node.vnet("guard", "observe")
    assert "vnet.toml says enforce; the next `vnet up` goes by it" in observing.stderr
    assert bind(node, 80, slice_=slices.b) == 0
    seen = node.json("status")
    assert (seen["whole"], seen["guard"], seen["guard_configured"]) == (True, "observe", "enforce")
    assert [one["observed"] for one in seen["refusals"] if one["kind"] == "bind"] == [1]
    node.vnet("guard", "enforce")
    assert bind(node, 80, slice_=slices.b) == errno.EACCES
    node.vnet("guard", "observe")
    node.vnet("up")
    assert bind(node, 80, slice_=slices.b) == errno.EACCES
    node.settings(vnetbed.UNGUARDED + 'mode = "observe"\n')
    up = node.vnet("up")
    assert "the guard observes" in up.stderr
    assert bind(node, 80, slice_=slices.b) == 0


def test_the_guard_of_a_node_that_is_down_cannot_be_switched(node):
    refused = node.vnet("guard", "observe", check=False)
    assert refused.returncode == 1
    assert "the node is down" in refused.stderr


#: makes a UDP socket, says its mark whenever it is asked
_HOLDS = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
print("made", flush=True)
for line in sys.stdin:
    print(s.getsockopt(socket.SOL_SOCKET, 36), flush=True)
"""


@contextmanager
def holder(node, slice_):
    """A process with a socket that is asked for its mark."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with node.ns.popen("/usr/bin/python3", "-c", _HOLDS, cgroup=slice_, **pipes) as process:
        assert process.stdout.readline() == "made\n"

        def mark() -> int:
            process.stdin.write("\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        try:
            yield mark
        finally:
            process.kill()


def test_a_slice_added_to_a_node_that_is_up_is_guarded_and_marked_at_once(node, slices):
    node.vnet("up")
    with cgroup.cgroup() as late, holder(node, late) as mark:
        assert (mark(), bind(node, 90)) == (0, 0)
        node.vnet("slice", "add", "late", "--cgroup", late.rel, "--xid", "9", "--port", "tcp/90")
        assert mark() == 9  # older than its slice
        assert ping_marks(node, late) == {9}
        assert bind(node, 90) == errno.EACCES
        assert bind(node, 90, slice_=late) == 0
        assert 90 in reserved(node)
        assert node.json("status")["whole"]
        node.vnet("slice", "rm", "late")
        assert mark() == 0
        assert ping_marks(node, late) == {0}
        assert bind(node, 90) == 0
        assert 90 not in reserved(node)
        assert node.json("status")["whole"]


def test_sockets_that_are_older_than_up_are_marked_and_no_mark_is_left_after_down(node, slices):
    with holder(node, slices.a) as mark:
        assert mark() == 0
        node.vnet("up")
        assert mark() == 256
        node.vnet("down")
        assert mark() == 0


def reserved(node) -> set[int]:
    return sysctls.parse_ports(
        node.ns.run("sysctl", "-n", "net.ipv4.ip_local_reserved_ports").stdout
    )


def test_more_reserved_ports_than_the_kernel_takes_at_once(node):
    node.ns.run("sysctl", "-qw", "net.ipv4.ip_local_reserved_ports=7,9")
    odd = set(range(10001, 30000, 2))
    text = ", ".join(f'"udp/{number}"' for number in sorted(odd))
    (node.base / "config" / "many.toml").write_text(
        f'[[slice]]\nname = "many"\ncgroups = ["/many"]\ngrants = {{ ports = [{text}] }}\n'
    )
    node.vnet("up")
    ours = {80, 5000, 5001, 5002, 5003}
    assert reserved(node) == odd | ours | {7, 9}
    assert bind(node, 10001, "DGRAM") == errno.EACCES
    assert bind(node, 10002, "DGRAM") == 0
    (node.base / "config" / "many.toml").unlink()
    node.vnet("up")
    assert reserved(node) == ours | {7, 9}
    node.vnet("down")
    assert reserved(node) == {7, 9}


def test_where_packet_sockets_cannot_be_refused_up_refuses_unless_that_is_accepted(node):
    node.settings("")
    files, before = vnetbed.tree(node.base / "config"), node.fingerprint()
    refused = node.vnet("up", check=False)
    assert refused.returncode == 1
    assert "packet sockets cannot be refused" in refused.stderr
    for words in ("CAP_NET_RAW", "seccomp", "SOCK_PACKET", 'packet_sockets = "unguarded"'):
        assert words in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (vnetbed.tree(node.base / "config"), node.fingerprint()) == (files, before)
    assert not (node.base / "state").exists()


def test_a_bad_vnet_toml_is_refused_with_exit_code_2_and_changes_nothing(node):
    node.settings('[guard]\nmode = "maybe"\n')
    before = node.fingerprint()
    for argv in (("up",), ("guard", "observe")):
        refused = node.vnet(*argv, check=False)
        assert refused.returncode == 2
        assert f"{node.base}/vnet.toml:2: guard.mode: " in refused.stderr
    assert node.fingerprint() == before


def test_where_neither_data_path_can_be_had_one_error_says_what_each_lacks(node):
    tools = vnetbed.shim(node.base / "tools", "iptables-nft-restore", "fail")
    before = node.fingerprint()
    refused = node.vnet("up", check=False, path=tools)
    assert refused.returncode == 1
    assert "no data path can be had" in refused.stderr
    assert "module: module xt_copyxid" in refused.stderr
    assert "bpf: rules that data path bpf needs (IPv4)" in refused.stderr
    assert node.fingerprint() == before


def test_another_version_takes_over_without_a_packet_that_is_not_marked(node, slices, tmp_path):
    node.vnet("up")
    old = instance(node)
    other = tmp_path / "objects"
    shutil.copytree(bpfobjects.OBJECTS, other)
    (tmp_path / "note").write_text("another build")
    subprocess.run(
        ["llvm-objcopy", f"--add-section=.note.vnet={tmp_path}/note", other / "base.bpf.o"],
        check=True,
    )
    rule = ("POSTROUTING", "-p", "udp", "--dport", "9", "-m", "mark")
    node.ns.run("iptables-nft", "-t", "mangle", "-A", *rule, "--mark", "0x0/0xffff")
    node.ns.run("iptables-nft", "-t", "mangle", "-A", *rule, "--mark", "0x100/0xffff")

    def counted() -> list[int]:
        text = node.ns.run("iptables-nft-save", "-c", "-t", "mangle").stdout
        return [int(n) for n in re.findall(r"^\[(\d+):\d+\] -A POSTROUTING -p udp", text, re.M)]

    send = "import socket\ns = socket.socket(2, 2)\nwhile True: s.sendto(b'x', ('127.0.0.1', 9))"
    with node.ns.popen("/usr/bin/python3", "-c", send, cgroup=slices.a) as sender:
        try:
            until(lambda: counted()[1] > 100, what="it sends")
            code = (
                "import pathlib, sys\nfrom vnet import bpfobjects\n"
                "bpfobjects.OBJECTS = pathlib.Path(sys.argv.pop(1))\n"
                "from vnet.cli import main\nmain()"
            )
            up = node.python("-c", code, str(other), "up").stdout
            assert f"removed the eBPF programs in {old}" in up
            many = counted()[1]
            until(lambda: counted()[1] > many + 100, what="it goes on")
        finally:
            sender.kill()
    assert counted()[0] == 0
    assert instance(node) != old
    assert str(instance(node)) in node.ns.run("iptables-nft-save").stdout
    seen = node.json("status", check=False)
    assert any("of another version" in words for words in seen["differences"])
    node.vnet("up")  # back to ours
    assert instance(node) == old
    assert node.json("status")["whole"]


def test_a_cgroup_made_again_keeps_its_slice_while_watched(node, slices):
    node.vnet("up")
    path = instance(node)

    def table() -> dict[int, int]:
        return policy.read(path).slices

    with watching(node):
        old = slices.b.id
        cgroup.remove(slices.b.path)
        slices.b.path.mkdir()
        until(lambda: table().get(slices.b.id) == 65535, what="the new id is in the table")
        assert table().get(old) == 65535  # its last sockets are still its own
        assert ping_marks(node, slices.b) == {65535}
        seen = node.json("status")
        assert (seen["whole"], seen["lingering"]) == (True, 1)
        assert node.json("up")["done"] == []  # what lingers is not taken for a stranger
        with cgroup.cgroup() as late:
            node.vnet("slice", "add", "late", "--cgroup", late.rel, "--xid", "5")
            cgroup.remove(late.path)
            late.path.mkdir()
            until(lambda: table().get(late.id) == 5, what="the new slice's new cgroup")


def test_a_cgroup_made_again_gets_the_number_that_the_last_up_gave_its_slice(node, slices):
    """Also where nothing but the number told the watcher of that ``up``."""
    node.vnet("up")
    path = instance(node)
    text = '[[slice]]\nname = "late"\ncgroups = ["{}"]\n'
    with watching(node), cgroup.cgroup() as late:
        file = node.base / "config" / "late.toml"

        def again() -> int | None:
            cgroup.remove(late.path)
            late.path.mkdir()
            until(lambda: late.id in policy.read(path).slices, what="it is marked")
            return policy.read(path).slices[late.id]

        file.write_text(text.format(late.rel))
        node.vnet("up")
        assert again() == 257
        file.write_text(text.format(late.rel) + "xid = 777\n")
        node.vnet("up")
        assert again() == 777
        file.write_text(text.format(late.rel) + "xid = 900\n")
        assert killed_up(node, "nft", 3, "worker").returncode != 0  # at the policy
        undone(node, 3, "worker")
        assert again() == 777


def test_the_watcher_goes_on_with_another_version_and_ends_when_the_node_goes_down(node, slices):
    node.vnet("up")
    with watching(node, "--linger", "0.01") as process:
        node.vnet("down")
        assert process.wait(60) == 0
    node.vnet("up")
    with watching(node, "--linger", "0.001") as process:
        old = slices.b.id
        cgroup.remove(slices.b.path)
        until(lambda: old not in policy.read(instance(node)).slices, what="the old id has left")
        slices.b.path.mkdir()
        until(
            lambda: policy.read(instance(node)).slices.get(slices.b.id) == 65535, what="the new id"
        )


@contextmanager
def deep(top: Path, levels: int) -> Iterator[None]:
    """Cgroups in one another, as who may make some in his own may make them."""
    paths = [f"{top}{'/d' * level}" for level in range(1, levels + 1)]
    made = []
    try:
        for path in paths:
            os.mkdir(path)  # noqa: PTH102 (thousands, and long)
            made.append(path)
        yield
    finally:
        for path in reversed(made):
            os.rmdir(path)  # noqa: PTH106


def test_very_deep_cgroups_of_a_slice_stop_neither_commands_nor_the_watcher(node, slices):
    node.vnet("up")
    with deep(slices.a.path, 1500), cgroup.cgroup() as late, watching(node):
        node.vnet("slice", "add", "late", "--cgroup", late.rel, "--xid", "5")
        node.vnet("slice", "rm", "late")
        assert node.json("status")["whole"]
        cgroup.remove(slices.b.path)
        slices.b.path.mkdir()
        until(
            lambda: policy.read(instance(node)).slices.get(slices.b.id) == 65535, what="the new id"
        )


def test_what_was_refused_just_before_the_node_went_down_is_in_the_log(node, slices):
    """Nobody had read the ring, which goes with the programs."""
    node.vnet("up")
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)"
    done = node.ns.run(sys.executable, "-ISc", code, cgroup=slices.a, check=False)
    assert "PermissionError" in done.stderr
    node.vnet("down")
    told = node.vnet("events", "--slice", "a", "--json").stdout.splitlines()
    assert [json.loads(line)["kind"] for line in told] == ["raw"]


def test_while_a_down_is_half_done_nobody_puts_the_rules_back(node):
    """It was killed: without its programs, a node with our rules would send nothing."""
    node.vnet("up")
    node.paths.journal.write_text('{"step": "down"}\n')
    node.ns.run("nft", "flush", "ruleset")
    looks = """
import vnetbed
from vnet import upkeep
kept = upkeep.Upkeep(upkeep.listen())
upkeep.tend(kept, vnetbed.paths_from_env())
"""
    assert not node.python("-c", looks).stderr
    assert "VNET" not in node.ns.run("iptables-nft-save").stdout
    assert "killed half-way" in node.vnet("status", check=False).stdout
    node.vnet("up")
    assert node.json("status")["whole"]
    node.vnet("down")
    assert not node.paths.journal.exists()


def test_doctor_says_what_would_break_the_guard(node):
    seen = {finding["id"]: finding for finding in node.json("doctor", check=False)}
    assert seen["packet-sockets"]["level"] == "advice"  # it is accepted
    assert seen["module-missing"]["level"] == "advice"
    assert "fwmark-accept" not in seen
    node.settings("")
    node.ns.run("sysctl", "-qw", "net.ipv4.tcp_fwmark_accept=1")
    seen = {finding["id"]: finding for finding in node.json("doctor", check=False)}
    assert seen["packet-sockets"]["level"] == "problem"
    assert "tcp_fwmark_accept" in seen["fwmark-accept"]["cure"]
    node.settings(vnetbed.UNGUARDED)
    node.vnet("up")
    (instance(node) / "links" / "vnet_setsockopt").unlink()
    seen = {finding["id"]: finding for finding in node.json("doctor", check=False)}
    assert "vnet_setsockopt" in seen["guard-broken"]["what"]


def test_status_of_a_node_that_is_down_is_not_whole_and_loads_nothing(node):
    assert not module.loaded()
    seen = status.look(node.paths)
    assert (seen.up, seen.whole, seen.guard) == (False, False, None)
    assert bpf.instances(node.bpf_dir) == []
