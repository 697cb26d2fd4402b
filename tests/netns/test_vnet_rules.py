"""Rules in a namespace: whole or not at all, and nobody else's touched."""

import json
import sys

import pytest
import vnetbed
from vnet.testing.poll import until

from vnet import guard

pytestmark = pytest.mark.netns

VARIANTS = ("legacy", "nft")
# Also in table raw: a legacy table that is once there stays.
FOREIGN = """*raw
-A OUTPUT -p udp --dport 9 -j ACCEPT
COMMIT
*mangle
:THEIRS - [0:0]
-A INPUT -p tcp --dport 80 -j THEIRS
-A INPUT -j MARK --set-mark 0x10000/0x10000
-A POSTROUTING -j THEIRS
-A THEIRS -j RETURN
COMMIT
*filter
-A INPUT -p udp --dport 9 -j DROP
COMMIT
"""


@pytest.fixture
def node(ns, tmp_path):
    return vnetbed.Node(ns, tmp_path)


def theirs(node, variant):
    for tool in ("iptables", "ip6tables"):
        node.ns.run(f"{tool}-{variant}-restore", "--noflush", input=FOREIGN)


def saved(node, variant, tool="iptables"):
    return node.ns.run(f"{tool}-{variant}-save", "-t", "mangle").stdout


@pytest.mark.parametrize("variant", VARIANTS)
def test_up_puts_our_chains_first_and_down_leaves_the_rules_of_others_byte_for_byte(node, variant):
    theirs(node, variant)
    before = node.fingerprint()
    node.rules_up(variant)
    for tool in ("iptables", "ip6tables"):
        lines = saved(node, variant, tool).splitlines()
        raw = node.ns.run(f"{tool}-{variant}-save", "-t", "raw").stdout.splitlines()
        assert [line for line in raw if line.startswith("-A OUTPUT ")] == [
            "-A OUTPUT -j VNET-OUT",
            "-A OUTPUT -p udp -m udp --dport 9 -j ACCEPT",
        ]
        for base, chain in (("INPUT", "VNET-INPUT"), ("POSTROUTING", "VNET-POST")):
            in_base = [line for line in lines if line.startswith(f"-A {base} ")]
            assert in_base[0] == f"-A {base} -j {chain}"
            assert f"-A {chain} {vnetbed.BODY}" in lines
    node.vnet("down")
    assert node.fingerprint() == before


@pytest.mark.parametrize("variant", VARIANTS)
def test_packets_are_marked_while_up_and_not_after_down(node, variant):
    match = "INPUT -m mark --mark 0x7/0xffff -p udp --dport 9999"
    node.rules_up(variant)
    node.ns.run(f"iptables-{variant}", "-t", "filter", "-A", *match.split())

    def hits():
        send = "import socket; socket.socket(2, 2).sendto(b'x', ('127.0.0.1', 9999))"
        node.ns.run("python3", "-c", send)
        out = node.ns.run(f"iptables-{variant}-save", "-c", "-t", "filter").stdout
        line = next(line for line in out.splitlines() if "9999" in line)
        return int(line[1:].split(":")[0])

    assert hits() == 1
    node.vnet("down")
    assert hits() == 1


def test_down_takes_the_nft_tables_away_that_up_had_to_make(node):
    assert "mangle" not in node.ns.run("nft", "list", "ruleset").stdout
    node.rules_up("nft")
    node.vnet("down")
    assert "mangle" not in node.ns.run("nft", "list", "ruleset").stdout


def test_down_leaves_an_nft_chain_into_which_somebody_has_put_a_rule_since(node):
    node.rules_up("nft")
    node.ns.run("iptables-nft", "-t", "mangle", "-A", "INPUT", "-j", "ACCEPT")
    node.vnet("down")
    ruleset = node.ns.run("nft", "list", "ruleset").stdout
    assert "chain INPUT" in ruleset
    assert "POSTROUTING" not in ruleset
    assert "-A INPUT -j ACCEPT" in saved(node, "nft")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_second_up_changes_nothing(node, variant):
    node.rules_up(variant)
    before = node.fingerprint()
    tools = node.base / "tools"
    for tool in (f"iptables-{variant}-restore", f"ip6tables-{variant}-restore"):
        vnetbed.shim(tools, tool, "fail", call=0)
    assert json.loads(node.rules_up(variant, path=tools).stdout)["done"] == []
    assert node.fingerprint() == before
    assert vnetbed.calls(tools, f"iptables-{variant}-restore") == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "damage",
    [
        "-D INPUT -j VNET-INPUT",
        "-I INPUT -p tcp -j ACCEPT",
        "-A INPUT -j VNET-INPUT",
        "-F VNET-POST",
        "-A VNET-POST -j ACCEPT",
    ],
)
def test_up_repairs_what_somebody_changed(node, variant, damage):
    node.rules_up(variant)
    whole = saved(node, variant, "ip6tables")
    node.ns.run(f"ip6tables-{variant}", "-t", "mangle", *damage.split())
    node.rules_up(variant)
    again = saved(node, variant, "ip6tables")
    ours = [line for line in again.splitlines() if "VNET" in line]
    assert ours == [line for line in whole.splitlines() if "VNET" in line]
    first = next(line for line in again.splitlines() if line.startswith("-A INPUT"))
    assert first == "-A INPUT -j VNET-INPUT"


@pytest.mark.parametrize("variant", VARIANTS)
def test_when_v6_is_refused_after_v4_was_taken_all_is_undone(node, variant):
    theirs(node, variant)
    before = node.fingerprint()
    tools = vnetbed.shim(node.base / "tools", f"ip6tables-{variant}-restore", "fail")
    failed = node.rules_up(variant, check=False, path=tools)
    assert failed.returncode == 1
    assert "refused by the test" in failed.stderr
    assert node.fingerprint() == before


KILLS = [
    (tool, f"{when}-{whom}")
    for tool in ("iptables", "ip6tables")
    for when in ("before", "after")
    for whom in ("worker", "guard", "both")
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("tool", "what"), KILLS)
def test_an_up_killed_half_way_leaves_nothing_behind(node, variant, tool, what):
    theirs(node, variant)
    before = node.fingerprint()
    tools = vnetbed.shim(node.base / "tools", f"{tool}-{variant}-restore", what)
    assert node.rules_up(variant, check=False, path=tools).returncode != 0
    if what.endswith("both"):  # nobody was left to undo it: the next command does
        until(lambda: not guard.busy(node.paths), what="the worker is dead too")
        assert (node.base / "run" / "journal").exists()
        seen = node.json("status", check=False)
        assert any("killed half-way" in words for words in seen["differences"])
        node.vnet("down")
    until(lambda: node.fingerprint() == before, what="all undone")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("whom", ["worker", "guard", "both"])
def test_a_repair_killed_half_way_goes_back_to_the_damaged_node_not_to_none(node, variant, whom):
    node.rules_up(variant)
    for tool in ("iptables", "ip6tables"):
        node.ns.run(f"{tool}-{variant}", "-t", "mangle", "-I", "INPUT", "-j", "ACCEPT")
    node.ns.run("sysctl", "-qw", "net.netfilter.nf_conntrack_acct=0")
    before = node.fingerprint()
    tools = vnetbed.shim(node.base / "tools", f"ip6tables-{variant}-restore", f"after-{whom}")
    assert node.rules_up(variant, check=False, path=tools).returncode != 0
    if whom == "both":
        until(lambda: not guard.busy(node.paths), what="the worker is dead too")
        assert node.fingerprint(files=False) != before
        node.rules_up(variant)  # undoes first, then repairs
        assert saved(node, variant).count("-A INPUT -j VNET-INPUT") == 1
    else:
        until(lambda: node.fingerprint() == before, what="back to what was there")


@pytest.mark.parametrize("whom", ["worker", "guard"])
def test_an_up_that_is_asked_to_stop_undoes_all_and_says_so(node, whom):
    theirs(node, "nft")
    before = node.fingerprint()
    tools = vnetbed.shim(node.base / "tools", "ip6tables-nft-restore", f"after-{whom}-TERM")
    stopped = node.rules_up("nft", check=False, path=tools)
    assert stopped.returncode == 1
    assert "interrupted; what it had done is undone" in stopped.stderr
    assert node.fingerprint() == before


def test_up_in_the_other_variant_moves_the_rules(node):
    node.rules_up("nft")
    node.rules_up("legacy")
    assert "VNET" not in node.ns.run("nft", "list", "ruleset").stdout
    assert "-A INPUT -j VNET-INPUT" in saved(node, "legacy")
    node.vnet("down")
    assert "VNET" not in saved(node, "legacy")


def test_down_refuses_where_a_rule_of_somebody_else_leads_to_our_chain(node):
    node.rules_up("nft")
    rule = ("-t", "mangle", "-A", "FORWARD", "-p", "tcp", "-j", "VNET-INPUT")
    node.ns.run("iptables-nft", *rule)
    refused = node.vnet("down", check=False)
    assert refused.returncode == 1
    assert "-A FORWARD -p tcp -j VNET-INPUT" in refused.stderr
    node.ns.run("iptables-nft", "-t", "mangle", "-D", *rule[3:])
    node.vnet("down")
    assert "VNET" not in node.ns.run("nft", "list", "ruleset").stdout


def test_down_leaves_a_sysctl_that_was_changed_after_us(node):
    node.ns.run("sysctl", "-qw", "net.netfilter.nf_conntrack_events=0")
    node.rules_up("nft")
    node.ns.run("sysctl", "-qw", "net.netfilter.nf_conntrack_timestamp=0")
    node.ns.run("sysctl", "-qw", "net.netfilter.nf_conntrack_timestamp=1")
    node.ns.run("sysctl", "-qw", "net.netfilter.nf_conntrack_acct=0")
    node.vnet("down")
    values = node.ns.run(
        "sysctl",
        "-n",
        *(f"net.netfilter.nf_conntrack_{key}" for key in ("acct", "timestamp", "events")),
    ).stdout.split()
    assert values == ["0", "0", "0"]


def test_two_ups_at_once_end_with_one_set_of_rules(node):
    env = dict(node.env, PYTHONPATH=":".join([str(vnetbed.PY), *sys.path]))
    argv = (sys.executable, "-m", "vnetbed", "up", "nft")
    running = [node.ns.popen(*argv, env=env) for _ in range(4)]
    assert [process.wait(240) for process in running] == [0, 0, 0, 0]
    assert saved(node, "nft").count("-A INPUT -j VNET-INPUT") == 1
    assert not (node.base / "run" / "journal").exists()


def test_the_second_witness_tells_when_a_legacy_table_holds_something_else(node):
    node.rules_up("legacy")
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from vnet import readback\n"
        "import vnetbed\n"
        "chains = [vnetbed.Chain(c.table, c.base, c.name, c.rules[:-1] + (sys.argv[1],))"
        " if c.table == 'mangle' else c for c in vnetbed.CHAINS]\n"
        "print(*readback.compare({4: chains, 6: chains}), sep='\\n')\n"
    )

    def witness(body):
        done = node.ns.run(sys.executable, "-c", code, body, str(vnetbed.PY), *sys.path)
        return done.stdout.splitlines()

    assert witness(vnetbed.BODY) == ["[]", ""]
    words, trouble = witness("-j MARK --set-xmark 0x8/0xffff")
    assert trouble == ""
    assert "IPv4" in words
    assert "IPv6" in words
    assert "0x7/0xffff" in words
