"""The base programs on Debian's kernels, and BPF LSM, which they have."""

import pytest
from adopt_cases import *  # noqa: F403
from bpf_cases import *  # noqa: F403
from bpf_instances import (  # noqa: F401 (the rest is the same on every kernel)
    bpf_dir,
    own_bed,
    test_an_attachment_that_fails_leaves_nothing,
    test_removing_leaves_nothing,
    test_the_lsm_programs_come_and_go_with_their_instance_or_nothing_comes,
    test_this_kernel_has_all_that_the_base_needs,
    test_what_is_wrong_with_an_instance_is_told_and_mended,
)

from vnet import bpf

pytestmark = pytest.mark.vm


def test_bpf_lsm_can_be_had():
    assert bpf.lsm_lacking() == ""
