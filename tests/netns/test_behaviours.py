"""The behaviours by name, on the host's kernel (module-free)."""

import behaviours
import pytest
from behaviours_bed import Bed, bed
from vnet.testing import net

pytestmark = pytest.mark.netns


@pytest.fixture(scope="module", name="house")
def _house(tmp_path_factory):
    how = ("--datapath", "bpf", "--variant", "nft")
    with net.namespace("node") as ns, bed(tmp_path_factory.mktemp("behaviours"), how, ns) as made:
        yield made


@behaviours.parametrize(without="sctp")  # the host's kernel need not have it: the guests have
def test_that(house: Bed, behaviour: behaviours.Behaviour, family: int):
    behaviours.check(house, behaviour, family)
