"""The module-free data path on the host's kernel: whose each packet and each record is."""

import parity_traffic
import pytest
from parity import Case, check, parametrize
from testbed import net
from thread_bed import Thread, thread

pytestmark = pytest.mark.netns


@pytest.fixture(scope="module", params=["nft", "legacy"])
def bed(request, tmp_path_factory):
    how = ("--datapath", "bpf", "--variant", request.param)
    with (
        net.namespace("node") as ns,
        thread(tmp_path_factory.mktemp("parity"), how, ns, capture=True) as made,
    ):
        yield made


@parametrize()
def test_each_packet_and_each_record_has_its_owner(bed: Thread, case: Case, family: int):
    check(bed, case, family)


def test_the_rules_count_packets_by_reason(bed: Thread):
    before = bed.node.json("status")["counters"]
    parity_traffic.sender(bed, 4, connected=True)  # three questions, three answers
    parity_traffic.reset_of_nobody(bed, 4)
    after = bed.node.json("status")["counters"]
    gained = {name: after[name] - before[name] for name in after}
    assert (gained["out-socket"], gained["in-lookup"], gained["filled"]) == (3, 3, 1)
    assert gained["no-socket"] >= 2  # the SYN, and the kernel's RST
    assert (gained["conflict"], gained["intrusion"]) == (0, 0)
