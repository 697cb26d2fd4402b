"""What ``vnet check`` makes of outcomes: verdicts, exit code, JUnit's XML, and its words."""

from xml.etree import ElementTree

import pytest
from vnet.check import report as reports
from vnet.check.facts import ROLES, Outcome, Report, verdict
from vnet.check.run import PROPERTIES, chosen
from vnet.errors import UsageError

pytestmark = pytest.mark.unit


def outcome(name, how, role="deny"):
    return Outcome(name, role, 4, how, f"try {name}", "EACCES", "it succeeded")


def of(*outcomes, allowed=()):
    names = list(dict.fromkeys(o.property for o in outcomes))
    return Report(properties=names, outcomes=list(outcomes), allowed_skips=list(allowed))


def test_a_cell_is_as_good_as_its_worst_attempt():
    assert verdict([]) is None
    assert verdict([outcome("a", "held")]) == "held"
    assert verdict([outcome("a", "held"), outcome("a", "skipped")]) == "skipped"
    assert verdict([outcome("a", "skipped"), outcome("a", "fell"), outcome("a", "held")]) == "fell"


def test_one_attempt_that_fell_makes_the_whole_report_bad():
    found = of(outcome("a", "held"), outcome("b", "held"), outcome("b", "fell"))
    assert (found.fallen(), found.skipped(), found.good) == (["b"], [], False)


def test_a_skip_is_good_only_if_it_was_allowed_by_name():
    outcomes = [outcome("a", "held"), outcome("b", "skipped")]
    assert not of(*outcomes).good
    assert not of(*outcomes, allowed=["a"]).good
    assert of(*outcomes, allowed=["b"]).good
    assert not of(*outcomes, outcome("b", "fell"), allowed=["b"]).good


def test_a_property_with_nothing_to_check_is_no_skip():
    found = of(outcome("a", "held"))
    found.properties.append("sctp-port-reserved")
    assert found.good
    assert found.as_dict()["summary"]["sctp-port-reserved"] == "nothing to check"


def test_junit_has_a_case_for_each_cell_with_what_was_tried(tmp_path):
    found = of(outcome("a", "held"), outcome("a", "fell", "full"), outcome("b", "skipped", "node"),
               outcome("c", "skipped", "node"), allowed=["c"])  # fmt: skip
    reports.junit(found, tmp_path / "r.xml")
    [suite] = ElementTree.parse(tmp_path / "r.xml").getroot()
    cases = {(case.get("classname"), case.get("name")): list(case) for case in suite}
    assert cases["vnet.check.a", "deny"] == []
    [failure] = cases["vnet.check.a", "full"]
    assert failure.tag == "failure"
    assert "try a" in failure.text
    assert [case.tag for case in cases["vnet.check.b", "node"]] == ["error"]
    assert [case.tag for case in cases["vnet.check.c", "node"]] == ["skipped"]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors"),
            suite.get("skipped")) == ("4", "1", "1", "1")  # fmt: skip


def test_people_see_the_matrix_and_only_what_was_not_well(capsys):
    found = of(outcome("a", "held"), outcome("b", "fell"))
    reports.matrix(found, verbose=False)
    said = capsys.readouterr().out
    assert all(role in said for role in ROLES)
    assert "try b" in said
    assert "try a" not in said
    assert "1 FELL: b" in said
    reports.matrix(found, verbose=True)
    assert "try a" in capsys.readouterr().out


def test_properties_have_names_of_one_kind_and_a_sentence_each():
    names = [each.name for each in PROPERTIES]
    assert len(set(names)) == len(names)
    for each in PROPERTIES:
        assert each.name == each.name.lower().replace("_", "-")
        assert each.why.endswith(".")
        assert len(each.why) > 30


def test_chosen_properties_come_in_the_one_order_and_unknown_ones_are_refused():
    assert [each.name for each in chosen(["raw-deny", "port-reserved"])] == [
        "port-reserved",
        "raw-deny",
    ]
    assert chosen([]) == list(PROPERTIES)
    with pytest.raises(UsageError, match="nonsense"):
        chosen(["nonsense"])
