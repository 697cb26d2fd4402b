"""The truth table on the host's kernel, without the module."""

import pytest
from truth import cases
from truth.bed import Bed
from truth.bed import bed as truth_bed
from truth.play import Play, Refused

pytest_plugins = ["truth.report"]
pytestmark = pytest.mark.netns

BEDS = {
    "bpf mangle nft": ("bpf", "mangle", "nft"),
    "bpf mangle legacy": ("bpf", "mangle", "legacy"),
    "bpf nat": ("bpf", "nat"),
}


@pytest.fixture(scope="module", params=BEDS)
def bed(request, tmp_path_factory):
    with truth_bed(tmp_path_factory.mktemp("truth"), *BEDS[request.param]) as made:
        yield made


@cases.parametrize()
def test_each_packet_and_each_flow_has_its_owner(bed: Bed, scene: str):
    cases.check(bed, scene)


def test_the_page_says_what_was_seen(bed: Bed, record_property):
    cases.check_page(bed, record_property)


@pytest.mark.parametrize("bed", ["bpf mangle nft", "bpf mangle legacy"], indirect=True)
def test_the_rules_count_packets_by_reason(bed: Bed):
    before = bed.node.json("status")["counters"]
    way = Play(bed, 4).way("out")
    port = way.resp.udp("s", way.dst)
    own = way.orig.udp("c", way.src)
    for _ in range(3):
        way.orig.tell("c", way.dst, port)
        way.resp.hear("s")
        way.resp.tell("s", way.src, own)
        way.orig.hear("c")
    with pytest.raises(Refused, match="ECONNREFUSED"):
        bed.agents["peer"].connect("c", way.src, 9)
    after = bed.node.json("status")["counters"]
    gained = {name: after[name] - before[name] for name in after}
    assert (gained["out-socket"], gained["in-lookup"], gained["filled"]) == (3, 3, 1)
    assert gained["no-socket"] >= 2  # the SYN, and the kernel's RST
    assert (gained["conflict"], gained["intrusion"]) == (0, 0)
