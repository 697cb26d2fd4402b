"""The behaviours by name, in Debian's kernels.

Those that the truth table shows have run in test_truth_debian.py. A guest is
slow: each of the others runs once in each kernel, under the module in 6.1 and
without it in 6.12.
"""

import behaviours
import pytest
from behaviours_bed import Bed, bed
from testbed import vm

pytestmark = pytest.mark.vm

#: The data path, and of the variants of iptables the one that the truth table has not there.
HOW = {"6.1": ("module", "legacy"), "6.12": ("bpf", "legacy")}


@pytest.fixture(scope="module", name="house")
def _house(tmp_path_factory):
    path, variant = HOW.get(vm.running_series(), ("module", "nft"))
    how = ("--datapath", path, "--variant", variant)
    with bed(tmp_path_factory.mktemp("behaviours"), how) as made:
        assert made.thread.datapath == path
        yield made


@behaviours.parametrize_guests()
def test_that(house: Bed, behaviour: behaviours.Behaviour, family: int):
    behaviours.check(house, behaviour, family)
