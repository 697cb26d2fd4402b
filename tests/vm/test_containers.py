"""Containers on Debian's kernels: with the module, and without."""

import subprocess

import module_bed
import pytest
from container_cases import *  # noqa: F403
from containerbed import bed as containers_bed

pytestmark = pytest.mark.vm


@pytest.fixture(
    scope="module",
    params=[("module", "routed"), ("module", "bridged"), ("bpf", "bridged")],
    ids="-".join,
)
def bed(request, tmp_path_factory):
    subprocess.run(["modprobe", "nf_conntrack"], check=True)
    if request.param[0] == "module":
        module_bed.load()
    with containers_bed(tmp_path_factory.mktemp("containers"), *request.param) as made:
        yield made
