"""The chains of the data paths, as data."""

import re
from pathlib import Path

import pytest

from vnet import datapath

pytestmark = pytest.mark.unit
INSTANCE = Path("/sys/fs/bpf/vnet/0123456789ab")
ALL = [
    pytest.param(datapath.wanted(kind, INSTANCE, family, containers), id=f"{kind}-{family}")
    for kind in ("module", "bpf")
    for family in (4, 6)
    for containers in (False, True)
]


@pytest.mark.parametrize("chains", ALL)
def test_every_chain_is_known_as_ours_and_comes_after_those_it_leads_to(chains):
    seen = set()
    for chain in chains:
        assert datapath.OURS[chain.table, chain.name] == chain.base
        for rule in chain.rules:
            assert set(re.findall(r"VNET-\S+", rule)) <= seen, rule
        seen.add(chain.name)


@pytest.mark.parametrize("chains", ALL)
def test_no_rule_writes_the_upper_half_of_a_mark_but_where_a_socket_s_was_put_there(chains):
    for chain in chains:
        for rule in (*chain.rules, chain.jump):
            if "MARK --set-xmark" in rule:
                above = chain.name in ("VNET-TCP", "VNET-RECV", "VNET-ABOVE")
                assert rule.endswith("0x0/0xffff0000" if above else "0x0/0xffff"), rule
            if "CONNMARK" in rule:
                assert "--nfmask 0xffff " in rule, rule
            if "--restore-skmark" in rule:  # which writes the whole mark
                assert "-m mark --mark 0x0/0xffff0000" in rule, rule


def test_each_packet_is_counted_for_one_reason():
    saved = """
[5:500] -A POSTROUTING -m bpf --object-pinned /x/progs/vnet_unsettled -j VNET-POST
[2:200] -A VNET-POST -m bpf --object-pinned /x/progs/vnet_unowned -g VNET-CONN
[0:0] -A VNET-POST -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -g VNET-SAVE
[1:100] -A VNET-POST -m mark --mark 0x0/0xffff -j RETURN
[2:200] -A VNET-POST -m bpf --object-pinned /x/progs/vnet_holds -g VNET-SAVE
[0:0] -A VNET-SAVE -m conntrack --ctdir ORIGINAL -m connmark ! --mark 0x0/0xffff
[2:200] -A VNET-SAVE -m conntrack --ctdir ORIGINAL -j CONNMARK --save-mark
"""
    found = datapath.counters([saved, saved], settled=(8, 5))
    assert (found["out-socket"], found["node-socket"], found["filled"]) == (12, 2, 4)
    assert found["in-lookup"] == 5
    assert found["conflict"] == found["intrusion"] == 0


def test_the_counters_have_the_modules_names():
    from vnet import copyxid

    assert set(datapath.counters([])) <= set(copyxid.COUNTERS)
