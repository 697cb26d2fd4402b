"""Both data paths in a stock Debian kernel: whose each packet and each record is."""

import pytest
from parity import Case, check, parametrize
from testbed import vm
from thread_bed import Thread, thread

pytestmark = pytest.mark.vm

#: Each path once in each kernel, and each variant of iptables for each path: a
#: guest is slow, and the rules are the same.
VARIANTS = {"module": {"6.1": "nft", "6.12": "legacy"}, "bpf": {"6.1": "legacy", "6.12": "nft"}}


@pytest.fixture(scope="module", params=["module", "bpf"])
def bed(request, tmp_path_factory):
    variant = VARIANTS[request.param].get(vm.running_series(), "nft")
    how = ("--datapath", request.param, "--variant", variant)
    with thread(tmp_path_factory.mktemp("parity"), how, capture=True) as made:
        assert made.datapath == request.param
        yield made


# Both families of each case run on the host (tests/netns/test_parity.py).
@parametrize(one_family=True)
def test_each_packet_and_each_record_has_its_owner(bed: Thread, case: Case, family: int):
    check(bed, case, family)
