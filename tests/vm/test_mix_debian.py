"""The adversarial mix in Debian's kernels, with the module (tests/netns/test_mix.py: without)."""

import pytest
from mix.play import replay, run
from vnet.testing.net import HERE

pytestmark = pytest.mark.vm

PACKETS, LIVES = 6_000, 2
SEEDS = {"6.1": 2011, "6.12": 20080}
VARIANTS = {"6.1": "legacy", "6.12": "nft"}


@pytest.mark.limit(600)
def test_no_packet_and_no_record_has_a_wrong_owner(kernel, tmp_path):
    outcome = run(
        *(tmp_path, HERE, "module", PACKETS, SEEDS.get(kernel, 1), LIVES),
        variant=VARIANTS.get(kernel, "auto"),
    )
    print(outcome.text())
    problems = outcome.problems()
    assert not problems, "\n".join([*problems, replay(outcome, PACKETS, LIVES)])
