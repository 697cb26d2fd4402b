"""A slice's users, from the command line and files to the registry."""

import pytest
import vnetbed

from vnet import bpf, registry

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(bpf.lacking()), reason="this kernel cannot run the eBPF programs"),
]


@pytest.fixture
def node(ns, tmp_path):
    with vnetbed.bpf_node(ns, tmp_path) as made:
        yield made


def known(node):
    with registry.open_readonly(node.paths.registry) as book:
        return book.users()


def test_users_come_with_a_slice_and_go_with_it(node, slices):
    node.vnet("slice", "add", "lab", "--cgroup", slices.a.rel, "--user", "alice", "--user", "1005")
    assert known(node) == {"lab": ["1005", "alice"]}
    [row] = node.json("slice", "ls")
    assert row["users"] == ["alice", "1005"]
    assert "alice" in node.vnet("slice", "ls").stdout
    refused = node.vnet("slice", "add", "x", "--cgroup", "/x", "--user", "a b", check=False)
    assert refused.returncode == 2
    assert '--user "a b"' in refused.stderr
    node.vnet("slice", "rm", "lab")
    assert known(node) == {}


def test_a_changed_file_is_a_difference_until_the_node_goes_by_it(node, slices):
    node.vnet("slice", "add", "lab", "--cgroup", slices.a.rel, "--user", "alice")
    node.vnet("up", "--datapath", "bpf")
    assert node.json("status")["differences"] == []
    file = node.paths.config_dir / "lab.toml"
    file.write_text(file.read_text().replace('"alice"', '"bob"'))
    [difference] = node.json("status", check=False)["differences"]
    assert "users in the registry" in difference
    node.vnet("up")
    assert known(node) == {"lab": ["bob"]}
    assert node.json("status")["differences"] == []
