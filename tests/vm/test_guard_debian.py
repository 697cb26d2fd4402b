"""The guard in Debian's kernels, packet sockets and SCTP included.

The same attempts and stories as on the host (tests/netns/test_guard_host.py),
with the node in the guest's own namespace, as on a real one.
"""

import guard_attempts
import guard_cases
import guard_flows
import guard_scenarios
import guard_updates
import pytest
from guardbed import Guarded, guarded
from vnet.testing.net import HERE

pytestmark = pytest.mark.vm
FAMILIES = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    with guarded(tmp_path_factory.mktemp("guard"), HERE, "bpf") as made:
        yield made


@pytest.mark.parametrize(("case", "family"), guard_cases.table())
def test_attempt(bed: Guarded, case: guard_attempts.Case, family: int):
    bed.check(case, family)


@pytest.mark.limit(900)
def test_in_observe_mode_every_attempt_succeeds_and_is_reported(bed: Guarded):
    guard_updates.nothing_is_refused_in_observe_mode(bed, ())


def test_no_door_opens_while_other_slices_come_and_go(bed: Guarded):
    guard_updates.no_door_opens_while_others_come_and_go(bed, rounds=24)


def test_slices_have_sockets_of_families_whose_packets_are_their_own(bed: Guarded):
    if "lsm" not in bed.has:
        pytest.skip("this kernel has no lsm")
    guard_scenarios.slices_have_families_whose_packets_are_their_own(bed)


@FAMILIES
@pytest.mark.parametrize("scenario", guard_scenarios.SCENARIOS, ids=lambda s: s.__name__)
def test_that(bed: Guarded, scenario: guard_scenarios.Scenario, family: int):
    scenario(bed, family)


@FAMILIES
@pytest.mark.parametrize("proto", guard_flows.HEARD)
def test_raw_sockets_hear_their_own_flows_only(bed: Guarded, proto: str, family: int):
    guard_flows.raw_sockets_hear_their_own_flows_only(bed, family, proto)
