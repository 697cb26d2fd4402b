"""The command on a kernel that cannot load the module, where nothing but the module will do."""

import json

import pytest
import vnetbed

pytestmark = pytest.mark.netns


@pytest.fixture
def node(ns, tmp_path):
    return vnetbed.Node(ns, tmp_path)


def test_up_with_the_module_forced_refuses_with_one_error_and_changes_nothing(node):
    node.settings(vnetbed.UNGUARDED)
    node.slices(web="/web.slice")
    node.ns.run("iptables-nft", "-t", "mangle", "-A", "INPUT", "-j", "ACCEPT")
    files, before = vnetbed.tree(node.base), node.fingerprint()
    refused = node.vnet("up", "--datapath", "module", check=False)
    assert refused.returncode == 1
    assert "module xt_copyxid" in refused.stderr
    assert "try:" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert vnetbed.tree(node.base) == files
    assert node.fingerprint() == before


def test_a_config_error_names_file_line_and_key_and_changes_nothing(node):
    (node.base / "config" / "a.toml").write_text(
        '[[slice]]\nname = "a"\ncgroups = ["/a"]\nxid = 70000\n'
    )
    files = vnetbed.tree(node.base)
    refused = node.vnet("up", check=False)
    assert refused.returncode == 2
    assert f"{node.base}/config/a.toml:4: slice[0].xid: " in refused.stderr
    assert vnetbed.tree(node.base) == files


def test_status_of_a_node_that_is_down_says_so_and_exits_1(node):
    seen = node.vnet("status", "--json", check=False)
    assert seen.returncode == 1
    assert json.loads(seen.stdout)["up"] is False


def test_down_of_a_node_that_is_down_is_no_error(node):
    before = vnetbed.tree(node.base)
    assert "nothing of ours" in node.vnet("down").stdout
    assert vnetbed.tree(node.base) == before


def test_slices_are_added_listed_and_removed_while_the_node_is_down(node, slices):
    added = node.json("slice", "add", "web", "--cgroup", slices.a.rel)
    assert added == {"name": "web", "xid": 256, "applied": False}
    node.vnet("slice", "add", "dns", "--cgroup", "/not/there", "--xid", "512", "--port", "udp/53")
    dns, web = node.json("slice", "ls")
    assert (dns["name"], dns["xid"], dns["cgroups"]) == (
        "dns",
        512,
        [{"path": "/not/there", "id": None}],
    )
    assert web["cgroups"] == [{"path": slices.a.rel, "id": slices.a.id}]
    node.vnet("slice", "rm", "web")
    assert [row["name"] for row in node.json("slice", "ls")] == ["dns"]
    past = node.json("slice", "history", "web")
    assert [(row["xid"], row["until"] is not None) for row in past] == [(256, True)]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["slice", "add", "web", "--cgroup", "/b"], "is there already"),
        (["slice", "add", "b", "--cgroup", "/a"], "also belongs to"),
        (["slice", "add", "b", "--cgroup", "/b", "--xid", "256"], "slice web holds it"),
        (["slice", "add", "b", "--cgroup", "/../b"], "part"),
        (["slice", "add", "b", "--cgroup", "/"], "root"),
        (["slice", "add", "B", "--cgroup", "/b"], "a name is"),
        (["slice", "add", "b", "--cgroup", "/b", "--port", "tcp/0"], "ports go from 1"),
        (["slice", "add", "b", "--cgroup", "/b", "--xid", "0"], "--xid"),
        (["slice", "rm", "b"], "there is none"),
    ],
)
def test_bad_input_is_refused_with_exit_code_2_and_changes_nothing(node, argv, words):
    node.vnet("slice", "add", "web", "--cgroup", "/a")
    files = vnetbed.tree(node.base)
    refused = node.vnet(*argv, check=False)
    assert refused.returncode == 2, refused.stderr
    assert words in refused.stderr
    assert vnetbed.tree(node.base) == files


def test_a_slice_that_shares_its_file_is_not_removed_by_the_command(node):
    node.slices(a="/a", b="/b")
    refused = node.vnet("slice", "rm", "a", check=False)
    assert refused.returncode == 2
    assert "holds other slices too (b)" in refused.stderr


def test_doctor_names_whoever_writes_our_bits(node):
    for variant, rule in (
        ("nft", "-j MARK --set-mark 0x4000/0x4000"),
        ("legacy", "-j CONNMARK --save-mark"),
    ):
        node.ns.run(f"iptables-{variant}", "-t", "mangle", "-A", "FORWARD", *rule.split())
    node.ns.run("nft", "add", "table", "inet", "mine")
    node.ns.run(
        "nft", "add", "chain", "inet", "mine", "c", "{ type filter hook output priority 0; }"
    )
    node.ns.run("nft", "add", "rule", "inet", "mine", "c", "ct", "mark", "set", "1")
    node.ns.run("nft", "add", "rule", "inet", "mine", "c", "udp", "dport", "9", "notrack")
    seen = node.vnet("doctor", "--json", check=False)
    assert seen.returncode == 1
    found = json.loads(seen.stdout)
    whats = [finding["what"] for finding in found if finding["id"].endswith("mark-writer")]
    assert len(whats) == 3, whats
    assert any("0x4000" in what and "packet mark" in what for what in whats)
    assert any("--save-mark" in what and "legacy" in what for what in whats)
    assert any("inet mine c" in what for what in whats)
    ids = {finding["id"] for finding in found}
    assert {"mixed-ipv4", "untracked"} <= ids
    assert all(finding["why"] and finding["cure"] for finding in found)


def test_doctor_tells_who_goes_by_our_bits(node):
    rule = "-A FORWARD -m mark --mark 0x4000/0x4000 -j DROP"
    node.ns.run("iptables-nft", "-t", "mangle", *rule.split())
    node.ns.run("ip", "rule", "add", "fwmark", "0x1", "table", "100")
    seen = {finding["id"]: finding for finding in node.json("doctor", check=False)}
    assert rule in seen["mark-reader"]["what"]
    assert "mark-routing" not in seen
    node.ns.run("sysctl", "-qw", "net.ipv4.tcp_fwmark_accept=1")
    seen = {finding["id"]: finding for finding in node.json("doctor", check=False)}
    assert "fwmark 0x1" in seen["mark-routing"]["what"]


def test_doctor_has_nothing_against_marks_in_the_upper_half(node):
    rule = "-A FORWARD -j MARK --set-mark 0x40000/0x40000"
    node.ns.run("iptables-nft", "-t", "mangle", *rule.split())
    node.ns.run("nft", "add", "table", "ip", "mine")
    node.ns.run("nft", "add", "chain", "ip", "mine", "c", "{ type filter hook output priority 0; }")
    expression = "meta mark set meta mark & 0xffff | 0x10000"
    node.ns.run("nft", "add", "rule", "ip", "mine", "c", *expression.split())
    node.ns.run("iptables-nft", "-A", "FORWARD", "-m", "mark", "--mark", "0x40000/0xf0000")
    found = node.json("doctor", check=False)
    assert [f for f in found if "mark-" in f["id"]] == []


def test_every_shell_gets_its_completion(node):
    for shell, word in (("bash", "_vnet_completion"), ("zsh", "#compdef vnet"), ("fish", "vnet")):
        assert word in node.vnet("completion", shell).stdout
