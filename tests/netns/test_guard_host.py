"""The guard on the host's own kernel: every attempt of the table, and the longer stories.

There is no module here and no BPF LSM: packet sockets are left to the guests
(tests/vm/test_guard_debian.py), and so is SCTP.
"""

import guard_attempts
import guard_cases
import guard_flows
import guard_scenarios
import guard_updates
import pytest
from guardbed import Guarded, guarded
from vnet.testing import net

pytestmark = pytest.mark.netns
FAMILIES = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    with net.namespace("node") as ns, guarded(tmp_path_factory.mktemp("guard"), ns) as made:
        yield made


@pytest.mark.parametrize(("case", "family"), guard_cases.table(without=("lsm", "sctp")))
def test_attempt(bed: Guarded, case: guard_attempts.Case, family: int):
    bed.check(case, family)


def test_in_observe_mode_every_attempt_succeeds_and_is_reported(bed: Guarded):
    guard_updates.nothing_is_refused_in_observe_mode(bed, ("lsm", "sctp"))


def test_no_door_opens_while_other_slices_come_and_go(bed: Guarded):
    guard_updates.no_door_opens_while_others_come_and_go(bed)


@FAMILIES
@pytest.mark.parametrize("scenario", guard_scenarios.SCENARIOS, ids=lambda s: s.__name__)
def test_that(bed: Guarded, scenario: guard_scenarios.Scenario, family: int):
    scenario(bed, family)


@FAMILIES
@pytest.mark.parametrize("proto", guard_flows.HEARD)
def test_raw_sockets_hear_their_own_flows_only(bed: Guarded, proto: str, family: int):
    guard_flows.raw_sockets_hear_their_own_flows_only(bed, family, proto)


@pytest.mark.parametrize("header", ["none", "routing", "options"])
def test_a_later_fragment_has_no_ports(bed: Guarded, header: str):
    guard_flows.a_later_fragment_has_no_ports(bed, header)


def test_ten_thousand_slices_with_a_port_each_apply_at_once(bed: Guarded):
    guard_updates.ten_thousand_slices_apply_at_once(bed)
