"""The guard beside the module, which writes the marks that some of its rules go by.

Whatever is refused by bind() or socket() is refused by the same programs as
under the other data path (tests/vm/test_guard_debian.py): here is what goes
by packets, connections and marks.
"""

import guard_attempts
import guard_cases
import guard_flows
import guard_scenarios
import pytest
from guardbed import Guarded, guarded
from vnet.testing.net import HERE

pytestmark = pytest.mark.vm
FAMILIES = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    with guarded(tmp_path_factory.mktemp("guard"), HERE, "module") as made:
        yield made


@pytest.mark.parametrize(
    ("case", "family"),
    [row for row in guard_cases.table() if row.values[0].how == guard_attempts.UNSEEN],
)
def test_attempt(bed: Guarded, case: guard_attempts.Case, family: int):
    bed.check(case, family)


@FAMILIES
@pytest.mark.parametrize("scenario", guard_scenarios.BY_PACKET, ids=lambda s: s.__name__)
def test_that(bed: Guarded, scenario: guard_scenarios.Scenario, family: int):
    scenario(bed, family)


@FAMILIES
@pytest.mark.parametrize("proto", guard_flows.HEARD)
def test_raw_sockets_hear_their_own_flows_only(bed: Guarded, proto: str, family: int):
    guard_flows.raw_sockets_hear_their_own_flows_only(bed, family, proto)
