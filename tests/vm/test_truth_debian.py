"""The truth table in a stock Debian kernel, with the module and without."""

import pytest
from testbed import vm
from truth import cases
from truth.bed import Bed
from truth.bed import bed as truth_bed

pytest_plugins = ["truth.report"]
pytestmark = pytest.mark.vm

#: Each data path once in each kernel, and each variant of iptables for each path:
#: a guest is slow, and the rules are the same.
VARIANTS = {"module": {"6.1": "nft", "6.12": "legacy"}, "bpf": {"6.1": "legacy", "6.12": "nft"}}


@pytest.fixture(scope="module", params=["module mangle", "bpf mangle", "module nat", "bpf nat"])
def bed(request, tmp_path_factory):
    datapath, rules = request.param.split()
    variant = VARIANTS[datapath].get(vm.running_series(), "nft")
    with truth_bed(tmp_path_factory.mktemp("truth"), datapath, rules, variant) as made:
        if vm.IN_GUEST:
            assert made.lacking == frozenset()
        yield made


@cases.parametrize()
def test_each_packet_and_each_flow_has_its_owner(bed: Bed, scene: str):
    cases.check(bed, scene)


def test_the_page_says_what_was_seen(bed: Bed, record_property):
    cases.check_page(bed, record_property)
