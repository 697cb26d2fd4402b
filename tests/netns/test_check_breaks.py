"""``vnet check`` on a node that lacks one protection names the property that fell, and no other.

What can be broken is listed from what a node is made of (tests/breaks.py), and
EXPECTED says of each what must fall: a protection that is not in there fails the
first test.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import breaks
import pytest
from vnet.check import sandbox
from vnet.check.bed import Bed, canaries
from vnet.check.facts import Property
from vnet.check.trial import Trial
from vnet.testing.net import HERE
from vnet.testing.packets import UDP, ip, udp
from vnet.testing.steps import raw

from vnet import bpf, containers, datapath, state

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(bpf.lacking()), reason="this kernel cannot run the eBPF programs"),
]

_ORIGINAL, _REPLY = datapath._ORIGINAL, datapath._REPLY
_SAVE_LOW, _SAVE_HIGH = datapath._SAVE_LOW, datapath._SAVE_HIGH
_RESTORE_LOW, _RESTORE_HIGH = datapath._RESTORE_LOW, datapath._RESTORE_HIGH
_LOW_EMPTY, _HIGH_EMPTY = datapath._LOW_EMPTY, datapath._HIGH_EMPTY
_CLEAR, _CLEAR_ABOVE = datapath._CLEAR, datapath._CLEAR_ABOVE
_SOMEBODYS, _NOBODYS = datapath._SOMEBODYS, datapath._NOBODYS
_UNTRACKED, _SYN = datapath._UNTRACKED, datapath._SYN
_LOW_FILLED = datapath._LOW_FILLED
_FOUND = f"{datapath._NOTHING_ABOVE} -m bpf vnet_whole {datapath._SOCKET}"

_BIND = {"port-reserved", "address-reserved"}
_GATE = {"port-raw-source", "address-source", "raw-own-send", "mark-setsockopt", "mark-cmsg"}
_SENDS = {"port-autobind", "port-raw-source", "address-source", "raw-own-send", "raw-full-send",
          "mark-setsockopt", "connection-hijack"}  # fmt: skip
_FLOWS = {"egress-tcp", "ingress-tcp", "egress-udp", "echo", "between-slices", "kernel-replies",
          "errors-from-outside", "flow-owners", "port-changes-hands", "node-erases-nothing",
          "others-bits", "containers", "flow-accounting", "restart"}  # fmt: skip

#: protection: the properties that fall with it, and no others
EXPECTED: dict[str, set[str]] = {
    # Sockets without their slice's mark: the gate drops what they send.
    "link vnet_sock_create": {"raw-deny", "kernel-made-sockets", "refusals-reported",
                              "ingress-udp"} | _SENDS | _FLOWS,
    "link vnet_setsockopt": {"mark-setsockopt", "others-bits"},
    "link vnet_bind4": _BIND,
    "link vnet_bind6": _BIND,
    "link vnet_ingress": {"raw-own-receive"},
    # -- raw
    "rule OUTPUT -m bpf vnet_odd -j VNET-OUT": _GATE | {"source-local"},
    "rule VNET-OUT -m bpf vnet_gate -j DROP": _GATE,
    # Nothing goes round the question for the source: everything of slices is dropped.
    f"rule VNET-OUT {_SOMEBODYS} -m addrtype --src-type LOCAL -m bpf vnet_local -j RETURN":
        {"mark-cmsg"} | _SENDS | _FLOWS,
    f"rule VNET-OUT {_SOMEBODYS} -m bpf vnet_spoof -j DROP": {"source-local"},
    # -- POSTROUTING
    "rule POSTROUTING -m bpf vnet_unsettled -j VNET-POST":
        {"connection-hijack", "echo", "kernel-replies", "flow-owners", "others-bits",
         "port-changes-hands"},
    f"rule VNET-SAVE {_ORIGINAL} {_SAVE_LOW}":
        {"connection-hijack", "echo", "flow-owners", "others-bits", "port-changes-hands"},
    f"rule VNET-SAVE {_REPLY} {_SAVE_HIGH}": {"flow-owners", "others-bits"},
    "rule VNET-FILL -m conntrack --ctstate RELATED --ctstatus CONFIRMED -j RETURN": {"containers"},
    f"rule VNET-FILL {_ORIGINAL} {_LOW_EMPTY} {_SAVE_LOW}": {"containers"},
    "rule VNET-PASS -m bpf vnet_contained -g VNET-FILL": {"containers"},
    f"rule VNET-PASS {_CLEAR}": {"forwarded"},
    f"rule VNET-PASS {_ORIGINAL} {_RESTORE_HIGH}": {"containers"},
    f"rule VNET-PASS {_REPLY} {_RESTORE_LOW}": {"containers"},
    "rule VNET-CONN -m bpf vnet_passing -g VNET-PASS": {"containers"},
    f"rule VNET-CONN {_ORIGINAL} {_RESTORE_LOW}": {"kernel-replies"},
    f"rule VNET-CONN {_REPLY} {_RESTORE_HIGH}": {"kernel-replies"},
    f"rule VNET-CONN {_UNTRACKED} {_CLEAR}": {"kernel-replies"},
    "rule VNET-RAW -m bpf vnet_join -j DROP": {"connection-hijack"},
    f"rule VNET-RAW {_ORIGINAL} {_LOW_EMPTY} -m bpf vnet_may_fill -g VNET-SAVE":
        {"echo", "flow-owners"},
    f"rule VNET-RAW {_REPLY} {_HIGH_EMPTY} -m bpf vnet_may_fill -g VNET-SAVE": {"flow-owners"},
    "rule VNET-POST -m bpf vnet_unowned -g VNET-CONN": {"kernel-replies"},
    f"rule VNET-POST {_SYN} {_NOBODYS} {_LOW_FILLED} {_ORIGINAL} -m bpf vnet_holds -g VNET-SAVE":
        {"port-changes-hands"},
    f"rule VNET-POST {_NOBODYS} -j RETURN": {"node-erases-nothing"},
    "rule VNET-POST -m bpf vnet_holds -g VNET-SAVE":
        {"connection-hijack", "echo", "flow-owners", "others-bits"},
    "rule VNET-POST -m bpf vnet_raw -g VNET-RAW": {"connection-hijack", "echo", "flow-owners"},
    # -- INPUT
    f"rule VNET-RECV {_CLEAR_ABOVE}": {"others-bits"},
    f"rule VNET-RECV -p udp {_NOBODYS} -j RETURN": {"node-erases-nothing"},
    f"rule VNET-RECV {_ORIGINAL} {_SAVE_HIGH}":
        {"kernel-replies", "flow-owners", "port-changes-hands", "containers"},
    f"rule VNET-RECV {_REPLY} {_SAVE_LOW}": {"port-changes-hands"},
    f"rule INPUT {datapath._VETH} -m bpf vnet_contained -j VNET-VETH": {"containers"},
    "rule VNET-VETH -g VNET-FILL": {"containers"},
    f"rule VNET-ABOVE {_CLEAR_ABOVE}": {"others-bits"},
    "rule INPUT -m bpf vnet_incoming -j VNET-INPUT":
        {"ingress-tcp", "echo", "between-slices", "kernel-replies", "errors-from-outside",
         "flow-owners", "port-changes-hands", "others-bits", "containers"},
    f"rule VNET-INPUT -p udp {_FOUND} -g VNET-RECV":
        {"ingress-udp", "between-slices", "kernel-replies", "flow-owners", "port-changes-hands",
         "others-bits", "containers"},
    f"rule VNET-INPUT {_SYN} {_FOUND} -g VNET-RECV": {"port-changes-hands"},
    f"rule VNET-TCP {_CLEAR_ABOVE}": {"others-bits"},
    f"rule VNET-TCP {_SOMEBODYS} -g VNET-RECV": {"port-changes-hands"},
    f"rule VNET-INPUT -p tcp {_FOUND} -j VNET-TCP": {"port-changes-hands"},
    f"rule VNET-INPUT {_CLEAR}": {"between-slices", "kernel-replies", "containers"},
    f"rule VNET-INPUT {_ORIGINAL} {_RESTORE_HIGH}":
        {"ingress-tcp", "between-slices", "others-bits", "port-changes-hands", "containers"},
    f"rule VNET-INPUT {_REPLY} {_RESTORE_LOW}":
        {"echo", "kernel-replies", "errors-from-outside", "others-bits"},
    # -- FORWARD
    "rule FORWARD -j VNET-FORWARD": {"containers"},
    "rule VNET-FORWARD -j VNET-PASS": {"containers"},
    # -- what is no rule
    "sysctl net.netfilter.nf_conntrack_acct": {"flow-accounting"},
    "sysctl net.netfilter.nf_conntrack_timestamp": {"flow-accounting"},
    "sysctl net.netfilter.nf_conntrack_events": {"flow-accounting"},
    "sysctl net.ipv4.ip_local_reserved_ports": {"port-autobind"},
    "policy slices": {"port-reserved", "port-raw-source", "address-reserved", "address-source",
                      "raw-deny", "raw-own-send", "raw-own-receive", "mark-setsockopt",
                      "mark-cmsg", "source-local", "connection-hijack", "kernel-made-sockets",
                      "refusals-reported", "egress-tcp", "ingress-tcp", "egress-udp",
                      "ingress-udp", "echo", "between-slices", "kernel-replies",
                      "errors-from-outside", "flow-owners", "port-changes-hands",
                      "node-erases-nothing", "others-bits", "containers", "policy-in-force"},
    "policy grants": {"port-raw-source", "address-source", "raw-deny", "raw-own-send",
                      "raw-own-receive", "raw-full-send", "source-local", "connection-hijack",
                      "refusals-reported", "echo", "flow-owners", "policy-in-force"},
    "policy ports": {"port-reserved", "port-raw-source", "address-source", "raw-own-send",
                     "raw-own-receive", "flow-owners", "policy-in-force"},
    "policy addresses": {"address-reserved", "address-source", "policy-in-force"},
    "policy observe": {"port-reserved", "port-raw-source", "address-reserved", "address-source",
                       "raw-deny", "raw-own-send", "raw-own-receive", "mark-setsockopt",
                       "mark-cmsg", "source-local", "connection-hijack", "kernel-made-sockets",
                       "refusals-reported", "policy-in-force"},
    "filter vnet_from_veth": {"containers"},
    "filter vnet_to_veth": {"containers"},
    "watch": {"restart"},
    "log of events": {"refusals-reported"},
}  # fmt: skip

# They are in the table, and nobody looks for them.
EXPECTED["policy levels"] = EXPECTED["policy slices"]

#: what may fall with it or not: where nearly nothing is sent any more
MAYBE = {"link vnet_sock_create": {"mark-setsockopt", "refusals-reported", "port-autobind"}}

#: rules whose absence nobody sees, and why
UNSEEN: dict[str, str] = {
    f"rule VNET-FILL {_REPLY} {_HIGH_EMPTY} {_SAVE_HIGH}":
        "the filter vnet_to_veth has filled it as the first packet reached the container",
    f"rule VNET-PASS {_SOMEBODYS} -j RETURN": "counts: the next one returns, too",
    f"rule VNET-CONN {_UNTRACKED} -j RETURN": "counts: the rules behind it return, too",
    f"rule VNET-CONN {_SOMEBODYS} -j RETURN": "counts: the next one returns, too",
    f"rule VNET-RECV {_NOBODYS} {_HIGH_EMPTY} {_ORIGINAL} -j RETURN":
        "saves time: what follows writes 0 over 0",
    f"rule VNET-RECV {_NOBODYS} {_LOW_EMPTY} {_REPLY} -j RETURN":
        "saves time: what follows writes 0 over 0",
    f"rule INPUT {datapath._RECEIVER} -j VNET-ABOVE":
        "saves time: VNET-INPUT looks the socket up again",
    f"rule VNET-INPUT -p tcp {_FOUND} -g VNET-RECV":
        "a slice's has been found two rules before; for the node's it writes 0 over 0",
    f"rule VNET-INPUT {_SOMEBODYS} -j RETURN": "saves time: the socket says the same",
    f"rule VNET-INPUT {_UNTRACKED} -j RETURN": "counts: the next one returns, too",
}  # fmt: skip


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """A node, with canaries."""
    with sandbox.sandbox("bpf") as paths, canaries(paths) as made:
        yield made


def test_every_protection_that_a_node_is_made_of_is_in_the_table(bed):
    names = [each.name for each in breaks.every(bed.paths)]
    assert sorted(names) == sorted([*EXPECTED, *UNSEEN])
    # a program is linked, or a rule names it, or it is a container's filter
    now = state.load(bed.paths.state)
    rules = " ".join(
        f"{chain.jump} {' '.join(chain.rules)}"
        for kind in ("bpf", "module")
        for chain in datapath.wanted(kind, Path(now.instance), 4, containers=True)
    )
    for each in breaks.programs(lsm=True):
        named = re.search(rf"/{each.name}\b", rules)
        assert each.attached or named or each.name in containers._SIDES, each.name


def test_on_the_whole_node_nothing_falls(bed):
    assert breaks.fell(bed, patience=6) == {}


@pytest.mark.parametrize("name", EXPECTED)
def test_without(name, bed):
    known = {each.name: each for each in breaks.every(bed.paths)}
    maybe = MAYBE.get(name, set())
    expected = EXPECTED[name] - maybe
    # On a machine that does much else, packets come late; and so does `vnet watch`, which
    # attaches what raw sockets hear through again when it sees to older sockets.
    for patience in (1.5, 6, 6):
        with known[name].broken():
            found = breaks.fell(bed, patience=patience)
        if set(found) - maybe == expected:
            break
    assert set(found) - maybe == expected, found
    # of both families, or of the one that it is about
    families = {outcome.family for outcomes in found.values() for outcome in outcomes}
    about = re.search(r"bind([46])$", name)
    assert families >= {int(about[1])} if about else families & {4, 6}


@pytest.mark.parametrize("family", [4, 6])
def test_what_a_route_forbids_is_not_taken_for_what_the_guard_drops(bed, family):
    """It fails with EACCES, and says nothing of what the guard would have done."""
    nowhere = bed.nowhere[family]
    where = ("route", "add", "prohibit", nowhere)
    of = Property("made-up", "For the test.", lambda trial: None)
    bed.patience = 6
    trial = Trial(bed, of, family)
    HERE.run("ip", f"-{family}", *where)
    try:
        trial.drops(
            ("own",),
            "datagram that a route forbids",
            lambda w: [["socket", w.af, "SOCK_DGRAM"], ["send", w.token.hex(), nowhere, w.sink]],
        )
    finally:
        HERE.run("ip", f"-{family}", "route", "del", "prohibit", nowhere)
    [outcome] = trial.outcomes
    assert (outcome.verdict, outcome.happened) == ("fell", "send: EACCES")
    # the same, dropped by the guard
    trial = Trial(bed, of, family)
    trial.drops(("own",), "raw packet", raw(lambda w: ip(w, UDP, udp(w, bed.ports.reserved))))
    [outcome] = trial.outcomes
    assert outcome.verdict == "held" and outcome.happened.startswith("send: EPERM"), outcome


#: a property: the protections without which every attempt falls that is about them
ATTEMPTS: dict[str, tuple[list[str], set[tuple[str, int, str]]]] = {
    # A tracked packet has its connection's owner, which is nobody.
    "raw-own-send": (
        ["rule VNET-OUT -m bpf vnet_gate -j DROP"],
        {(role, family, tried) for role in ("own", "holder") for family in (4, 6) for tried in (
            "raw packet from a port that nobody has",
            "raw echo reply",
            f"raw packet of a protocol without ports ({'GRE' if role == 'own' else 'ESP'})",
            "a later fragment, which has no ports")
         if family == 4 or "fragment" not in tried},
    ),
    "forwarded": (
        [f"rule VNET-PASS {_ORIGINAL} {_RESTORE_HIGH}", f"rule VNET-PASS {_CLEAR}"],
        {("node", family, tried) for family in (4, 6) for tried in (
            "datagram that passes through, with a mark of somebody else's",
            "reset without a connection that passes through, with such a mark")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTEMPTS)
def test_every_attempt_falls(name, bed):
    protections, expected = ATTEMPTS[name]
    known = {each.name: each for each in breaks.every(bed.paths)}
    with ExitStack() as stack:
        for each in protections:
            stack.enter_context(known[each].broken())
        found = breaks.fell(bed, [name], patience=6)
    assert {(o.role, o.family, o.tried) for o in found.get(name, [])} == expected
