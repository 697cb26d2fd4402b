"""The adversarial mix in its short form, on the host's kernel without the module.

``make truth`` plays the long form, under both data paths and with a new seed each time.
"""

from copy import deepcopy

import pytest
from mix import records
from mix.play import MUST, play, replay, run
from mix.stage import world
from vnet.testing import net

pytestmark = pytest.mark.netns

PACKETS, SEED = 100_000, 20080


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """One run, of which every test asks something else."""
    with net.namespace("mix") as ns:
        played = run(tmp_path_factory.mktemp("mix"), ns, "bpf", PACKETS, SEED)
    print(played.text())
    return played


def test_no_packet_and_no_record_has_a_wrong_owner(outcome):
    assert not outcome.wrong, "\n".join([*outcome.wrong, replay(outcome, PACKETS, 5)])


def test_what_is_unattributed_or_late_has_a_reason_and_is_rare(outcome):
    assert outcome.problems() == [], replay(outcome, PACKETS, 5)


def test_the_mix_has_everything_in_it(outcome):
    assert outcome.packets >= PACKETS
    for word in MUST:
        assert any(word in kind for kind in outcome.kinds), word
    for why in ("connection", "foreign", "port", "bind", "mark", "spoof"):
        assert outcome.refused[why] > 0, why


def nameless(rows):
    """No record has an owner."""
    for row in rows:
        row["originator"]["xid"] = row["responder"]["xid"] = 0


def undivided(rows):
    """No change of owner is seen: all records of a 5-tuple are of its last owners."""
    last = {records.flow_of(row): row for row in rows}
    for row in rows:
        for side in ("originator", "responder"):
            row[side]["xid"] = last[records.flow_of(row)][side]["xid"]


def test_records_without_owners_or_without_changes_of_owner_are_seen(tmp_path):
    with net.namespace("mix") as ns, world(tmp_path, ns, "bpf", 2011) as w:
        play(w, 6_000, 2)
        rows = records.read(w)
    told, wrong = records.compare(w.truth, rows)
    assert (wrong, told.problems()) == ([], [])
    for spoil in nameless, undivided:
        spoilt = deepcopy(rows)
        spoil(spoilt)
        told, wrong = records.compare(w.truth, spoilt)
        assert wrong or told.problems(), (spoil.__name__, told)
    assert any("unsaid" in text for text in told.problems()), told
