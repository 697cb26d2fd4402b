"""The units under systemd itself: what their sandboxes leave them is enough for their work."""

import json
import subprocess

import pytest
from systemdbed import TREE, box, missing
from vnet.testing.poll import PATIENCE, until

pytestmark = pytest.mark.netns

EXPORT = "netflow-export@127.0.0.1:4739.service"
DAEMONS = ("vnet-watch.service", "netflow.service", "netflow-serve.service", EXPORT)

# A connection to itself, of 5000 bytes, and a raw socket, which is refused.
TALK = """
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
    with socket.create_connection(listener.getsockname()) as link:
        link.sendall(b"x" * 5000)
        link.shutdown(socket.SHUT_WR)
        with listener.accept()[0] as other:
            while other.recv(9999): pass
try:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
except PermissionError:
    print("refused")
"""

# Reads IPFIX until it has all of a flow to a port, and the slices' names.
TAKE = """
import json, socket, sys
from ipfixbed import Reader, facts
reader, port = Reader(), int(sys.argv[1])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
    link.bind(("127.0.0.1", 4739))
    print("ready", flush=True)
    while True:
        reader.message(link.recv(65535))
        found = [facts(record) for _, _, record in reader.data]
        found = [fact for fact in found if fact["ports"][1:] == (port,)]
        if sum(fact["counts"][1] for fact in found) > 5000 and reader.told:
            break
print(json.dumps([found, reader.wrong, sorted(set(reader.told.values()))]))
"""

NOT_THEIRS = (
    "/etc/x", "/usr/x", "/var/lib/x", "/opt/tree/x", "/sys/fs/cgroup/x/",
    "/proc/sys/net/ipv4/ip_forward", "/proc/sysrq-trigger", "/sys/power/state",
)  # fmt: skip


@pytest.fixture(scope="module")
def machine():
    """A machine with one slice, on which all the units run."""
    if lacks := missing():
        pytest.skip(f"not installed: {lacks}")
    with box() as made:
        # This kernel may have no BPF LSM.
        toml = '[guard]\npacket_sockets = "unguarded"\n'
        made.run("sh", "-c", f"printf '{toml}' >/etc/vnet/vnet.toml")
        made.run("vnet", "slice", "add", "web", "--cgroup", f"{made.cgroup.rel}/web.slice")
        made.units("start", "vnet.service", *DAEMONS)
        made.run("systemd-run", "-q", "--slice=web.slice", "sleep", "600")
        until(lambda: status(made, check=False)["entries"], 20, "watch has seen the cgroup")
        yield made


@pytest.fixture
def up(machine):
    """The same, as it is while nothing has been stopped."""
    for unit in ("vnet.service", *DAEMONS):
        assert machine.shows(unit, "ActiveState") == "active", machine.journal()
    return machine


def talk(made, port):
    """The slice talks to itself; what the kernel said to its raw socket."""
    words = ("systemd-run", "-q", "--slice=web.slice", "--wait", "--pipe", "--collect")
    return made.run(*words, "/usr/bin/python3", "-c", TALK, str(port)).strip()


def status(made, check=True):
    return json.loads(made.run("vnet", "status", "--json", check=check))


def records(made, port):
    text = made.run("netflow", "query", "slice", "web", "and", "port", str(port), "-o", "json")
    return json.loads(text)["records"]


def test_node_is_up_and_doctor_has_no_complaint(up):
    said = status(up)
    assert said["up"] and said["whole"] and said["differences"] == []
    found = json.loads(up.run("vnet", "doctor", "--json", check=False))
    assert [finding for finding in found if finding["level"] == "problem"] == []


def test_a_slices_flow_is_recorded_and_answered_on_both_sockets(up):
    assert talk(up, 8001) == "refused"
    shares = records(up, 8001)  # two, where the minute's dump comes in between
    assert {(r["originator"]["slice"], r["responder"]["slice"]) for r in shares} == {("web", "web")}
    assert sum(share["originator"]["bytes"] for share in shares) > 5000
    [flow] = {share["flow_id"] for share in shares}
    curl = ("curl", "-sS", "--unix-socket", "/run/netflow-serve/http.sock")
    answer = json.loads(up.run(*curl, "http://x/v1/flows?q=port%208001"))
    assert {record["flow_id"] for record in answer["records"]} == {flow}
    metrics = up.run(*curl, "http://x/metrics")
    assert "netflow_up 1.0" in metrics
    # Read from the eBPF programs' pinned map.
    assert 'vnet_refusals_total{kind="raw",slice="web"}' in metrics
    until(lambda: '"kind":"raw"' in up.journal("-u", "vnet-watch"), what="the event is told")


def test_a_flow_is_exported(up):
    words = ("env", f"PYTHONPATH={TREE}/tests:{TREE}:{TREE}/vnet/py", f"{TREE}/.venv/bin/python")
    # The names are told when a session begins, over UDP: here. Nothing of the last one is heard.
    up.units("stop", EXPORT)
    with up.popen(*words, "-c", TAKE, "8002", stdout=subprocess.PIPE) as taker:
        try:
            assert taker.stdout.readline() == "ready\n"
            up.units("start", EXPORT)
            talk(up, 8002)
            records(up, 8002)  # an answer has what is still open, and stores it
            found, wrong, told = json.loads(taker.communicate(timeout=60 * PATIENCE)[0])
        finally:
            taker.kill()
    assert found and wrong == [] and "web" in told


@pytest.mark.parametrize("unit", DAEMONS)
def test_a_daemon_cannot_write_where_it_has_nothing_to_do(up, unit):
    pid = up.shows(unit, "MainPID")
    for path in NOT_THEIRS:
        # Nothing is written even where it could be: only opened.
        test = f"mkdir {path}" if path.endswith("/") else f": >>{path}"
        words = ("nsenter", "-t", pid, "-m", "sh", "-c", test)
        assert up.exits(*words) != 0, f"{unit} may write to {path}"


def test_reloaded_they_go_on(up):
    up.units("reload", "vnet.service", "vnet-watch.service")
    assert status(up)["whole"]
    talk(up, 8003)
    assert {flow["originator"]["slice"] for flow in records(up, 8003)} == {"web"}


@pytest.mark.parametrize("verb", ["start", "restart", "stop"])
def test_a_firewall_that_flushes_all_tables_does_not_leave_the_node_without_rules(up, verb):
    up.units(verb, "nftables.service")
    until(lambda: not up.run("systemctl", "list-jobs", "--no-legend"), what="vnet's reload")
    # Or `vnet watch` was faster, and is at it.
    until(lambda: up.exits("vnet", "status") == 0, what="the node is whole")


FLUSHES = {
    "nft": ("nft", "flush", "ruleset"),
    "legacy": ("sh", "-c", "for t in raw mangle; do iptables-legacy -w -t $t -F; done"),
}


@pytest.mark.parametrize("variant", ["legacy", "nft"])  # and is as it was
def test_rules_flushed_by_hand_are_put_back_within_the_sandbox(up, variant):
    def told() -> int:
        # Not which table: they are read one by one, and its look may have begun before.
        return up.journal("-u", "vnet-watch").count(f"({variant}): ")

    up.run("vnet", "up", "--variant", variant)
    before = told()
    up.run(*FLUSHES[variant])
    until(lambda: told() > before, what="watch says what was missing")
    until(lambda: up.exits("vnet", "status") == 0, what="the node is whole")


def test_rules_of_ours_in_what_the_host_loads_at_boot_are_reported(up):
    def told():
        said = json.loads(up.run("vnet", "doctor", "--json", check=False))
        return {found["what"].split()[0] for found in said if found["id"] == "saved-rules"}

    v4, v6, nft = "/etc/iptables/rules.v4", "/etc/iptables/rules.v6", "/etc/nftables.conf"
    up.run("mkdir", "-p", "/etc/iptables")
    up.run("cp", nft, f"{nft}.old")
    up.run("sh", "-c", f"iptables-save >{v4}; ip6tables-save >{v6}; nft list ruleset >{nft}")
    # After a boot, and after an upgrade, no programs are where they were.
    up.run("sed", "-i", "s,/sys/fs/bpf/vnet/[0-9a-f]*/,/sys/fs/bpf/vnet/000000000000/,", v4, v6)
    tries = (
        ("iptables-restore", "--test", v4),
        ("ip6tables-restore", "--test", v6),
        ("nft", "--check", "-f", nft),
    )
    assert all(up.exits(*words) for words in tries)
    assert told() == {v4, v6, nft}
    remarks = json.loads(up.run("vnet", "up", "--json"))["remarks"]
    assert any(f"{v4} holds rules of ours" in words for words in remarks)
    up.run("sed", "-i", "/VNET-/d", v4, v6)  # as it says
    up.run("mv", f"{nft}.old", nft)
    assert not any(up.exits(*words) for words in tries)
    assert told() == set()


def test_stopped_they_leave_nothing_and_started_again_they_know_what_was(up):
    talk(up, 8004)
    before = records(up, 8004)
    up.units("stop", "vnet.service", *DAEMONS)
    try:
        up.units("restart", "nftables.service")  # which brings nothing up that is down
        for unit in ("vnet.service", *DAEMONS):
            assert up.shows(unit, "Result") == "success", up.journal("-u", unit)
            assert up.shows(unit, "ActiveState") == "inactive"
            assert up.shows(unit, "NRestarts") == "0"
        assert up.exits("vnet", "status") == 1
        assert "VNET" not in up.run("iptables-save") + up.run("ip6tables-save")
        assert up.run("find", "/sys/fs/bpf", "-name", "vnet_*") == ""
        assert up.run("find", "/run", "-path", "/run/netflow*") == ""
    finally:
        up.units("start", "vnet.service", *DAEMONS)
    assert status(up)["whole"]
    after = records(up, 8004)
    assert [flow for flow in before if flow not in after] == []


#: instead of what installs packages and builds, and the installed commands
FAKES = f"""
cd /usr/local/sbin
for tool in dkms dpkg-divert apt-get; do printf '#!/bin/sh\n' >$tool; done
printf '#!/bin/sh\necho installed\n' >dpkg-query
mkdir -p /opt/vnet/bin /opt/vnet/lib/python3/site-packages/vnet/xtables
cp {TREE}/vnet/py/vnet/xtables/libxt_MARK.so /opt/vnet/lib/python3/site-packages/vnet/xtables/
printf '#!/bin/sh\n' | tee /opt/vnet/bin/python >/opt/vnet/bin/pip
cp vnet netflow /opt/vnet/bin/
chmod 755 dkms dpkg-divert apt-get dpkg-query /opt/vnet/bin/*
"""
NO_FAKES = """
cd /usr/local/sbin
cp --remove-destination /opt/vnet/bin/vnet /opt/vnet/bin/netflow .
rm -r dkms dpkg-divert apt-get dpkg-query /opt/vnet
"""


def test_installed_again_what_runs_is_restarted_and_nothing_else(up):
    def pids() -> list[str]:
        return [up.shows(unit, "MainPID") for unit in DAEMONS]

    up.units("stop", "netflow-serve.service")
    before = pids()
    up.run("sh", "-ec", FAKES)
    try:
        said = up.run("sh", "-c", f"{TREE}/tools/install 2>&1", timeout=200)
    finally:
        up.run("sh", "-ec", NO_FAKES)
    order = ("vnet up, for the node", *(f"restarting {unit}" for unit in DAEMONS))
    told = [said.find(words) for words in order if "serve" not in words]
    assert told == sorted(told) and -1 not in told, said
    assert "serve" not in said.partition("vnet up")[2]
    assert status(up)["whole"]
    for unit, old, new in zip(DAEMONS, before, pids(), strict=True):
        assert (new == "0") == (unit == "netflow-serve.service") and (new != old or new == "0")
    up.units("start", "netflow-serve.service")


def test_uninstalling_takes_down_a_node_that_no_unit_has_brought_up(up):
    """The last one here: the units are gone afterwards."""

    def remove() -> int:
        return up.exits("sh", f"{TREE}/tools/install", "--remove")

    up.units("stop", "vnet.service", *DAEMONS)
    up.run("vnet", "up")
    up.run("mkdir", "-p", "/opt/vnet/bin")
    up.run("ln", "-s", "/bin/false", "/opt/vnet/bin/vnet")
    assert remove() == 1
    assert status(up)["whole"]
    up.run("ln", "-sf", "/usr/local/sbin/vnet", "/opt/vnet/bin/vnet")
    assert remove() == 0
    assert "VNET" not in up.run("iptables-save") + up.run("ip6tables-save")
    assert up.run("find", "/sys/fs/bpf", "-name", "vnet_*") == ""
    units = up.run("find", "/etc/systemd/system", "-type", "f").split()
    assert units == ["/etc/systemd/system/box.target"]
    assert up.exits("test", "-e", "/opt/vnet") == 1
