"""Containers on Debian's kernels, with the module; those of the host have none."""

import pytest
from container_cases import *  # noqa: F403
from containerbed import bed as containers_bed
from vnet.testing.net import HERE

pytestmark = pytest.mark.vm

# The host's kernel runs it; the module cannot tell it from any other namespace.
del test_an_lxc_container_is_known_both_ways_by_its_veth  # noqa: F821


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    """Bridged: the module does not look at interfaces, and a guest is slow."""
    base = tmp_path_factory.mktemp("containers")
    with containers_bed(base, "module", "bridged", HERE) as made:
        yield made


@pytest.fixture
def family():
    """Some cases are IPv4's by themselves; the host's kernel takes each with both."""
    return 6
