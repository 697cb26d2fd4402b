"""The module-free data path on the host's kernel: whose each packet and each record is."""

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
