"""The guard in Debian's kernels, packet sockets and SCTP included.

The same attempts and stories as on the host (tests/netns/test_guard_host.py),
with the node in the guest's own namespace, as on a real one.
"""

import guard_cases
import guard_scenarios
import pytest
from guardbed import Guarded, guarded
from testbed.net import HERE

pytestmark = pytest.mark.vm
FAMILIES = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    with guarded(tmp_path_factory.mktemp("guard"), HERE, "bpf") as made:
        yield made


@pytest.mark.parametrize(("case", "family"), guard_cases.table())
def test_attempt(bed: Guarded, case: guard_cases.Case, family: int):
    bed.check(case, family)


def test_in_observe_mode_every_attempt_succeeds_and_is_reported(bed: Guarded):
    guard_scenarios.nothing_is_refused_in_observe_mode(bed, ())


def test_no_door_opens_while_other_slices_come_and_go(bed: Guarded):
    guard_scenarios.no_door_opens_while_others_come_and_go(bed)


@FAMILIES
@pytest.mark.parametrize("scenario", guard_scenarios.SCENARIOS, ids=lambda s: s.__name__)
def test_that(bed: Guarded, scenario: guard_scenarios.Scenario, family: int):
    scenario(bed, family)


@FAMILIES
@pytest.mark.parametrize("proto", guard_scenarios.HEARD)
def test_raw_sockets_hear_their_own_flows_only(bed: Guarded, proto: str, family: int):
    guard_scenarios.raw_sockets_hear_their_own_flows_only(bed, family, proto)
