"""Containers on Debian's kernels, with the module; those of the host have none."""

import pytest
from container_cases import *  # noqa: F403
from containerbed import bed as containers_bed
from testbed.net import HERE

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module", params=["routed", "bridged"])
def bed(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("containers")
    with containers_bed(base, "module", request.param, HERE) as made:
        yield made


@pytest.fixture
def family(bed):
    """Each once: the host's kernel takes them all, and a guest is slow."""
    return {"routed": 6, "bridged": 4}[bed.layout]
