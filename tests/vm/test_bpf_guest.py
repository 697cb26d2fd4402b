"""The base programs on Debian's kernels, and BPF LSM, which they have."""

import pytest
from adopt_cases import *  # noqa: F403
from bpf_cases import *  # noqa: F403
from bpf_instances import *  # noqa: F403

from vnet import bpf

pytestmark = pytest.mark.vm


def test_bpf_lsm_can_be_had():
    assert bpf.lsm_lacking() == ""
