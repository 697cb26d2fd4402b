"""One table for every data path: traffic, and whose each packet and each record must be.

What a case expects is what docs/meanings.md says. Where a data path cannot
help doing otherwise, the case says what it gets there, and
``vnet.datapath.DIFFERENCES`` says why.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import parity_traffic as traffic
import pytest
from netflowbed import owners
from parity_traffic import Found
from thread_bed import A, B, Thread, xids

from netflow.output import iso

Hooks = dict[str, set[int]]
"""{hook: xids seen there}."""
OUT, IN = "postrouting", "input"


def both(xid: int) -> Hooks:
    """All packets of both directions are this slice's."""
    return {OUT: {xid}, IN: {xid}}


@dataclass(frozen=True)
class Case:
    """Traffic, and the owners that it must have."""

    name: str
    traffic: Callable[..., Found]
    packets: dict[str, Hooks]
    """Of each group of packets that the traffic tells apart."""
    records: tuple[tuple[int, int], ...] = ()
    """(originator's, responder's) xid of the records, by time; those of one owner as one."""
    families: tuple[int, ...] = (4, 6)
    how: tuple[Any, ...] = ()
    """More arguments of the traffic."""
    bpf: tuple[dict[str, Hooks], tuple[tuple[int, int], ...]] | None = None
    """Instead of packets and records, where the module-free path differs."""


CASES = [
    # -- TCP --
    Case("a client owns all from SYN to last ACK", traffic.client, {"all": both(A)}, ((A, 0),)),
    Case("a server owns all from SYN to last ACK", traffic.server, {"all": both(B)}, ((0, B),)),
    Case("a wildcard server owns all", traffic.server, {"all": both(B)}, ((0, B),), how=(True,)),
    Case(
        "a v6 socket owns its v4 connections", traffic.v4_at_v6, {"all": both(B)}, ((0, B),), (4,)
    ),
    Case("SYN cookies are the server's", traffic.cookies, {"all": both(B)}, ((0, B),)),
    Case(
        "between two slices each owns its end, TCP",
        traffic.between_slices,
        {"to b": {OUT: {A}, IN: {B}}, "to a": {OUT: {B}, IN: {A}}},
        ((A, B),),
    ),
    Case(
        "the node's own connections are nobody's",
        traffic.client,
        {"all": both(0)},
        ((0, 0),),
        how=(False,),
    ),
    Case(
        "a refused connection is the client's to its RST",
        traffic.refused,
        {"all": both(A)},
        ((A, 0),),
    ),
    Case("a RST on close is the slice's", traffic.reset, {"all": both(A)}, ((A, 0),), (4,)),
    Case(
        "a RST after the socket is gone is the former owner's",
        traffic.late_reset,
        {"RST": {OUT: {A}}},
        ((A, 0),),
    ),
    Case(
        "the RST of a port that nobody has is nobody's",
        traffic.reset_of_nobody,
        {"all": both(0)},
        ((0, 0),),
    ),
    Case(
        "TIME_WAIT answers in its former owner's name",
        traffic.time_wait,
        {"ACK": {OUT: {A}}},
        ((A, 0),),
    ),
    Case(
        "a SYN over a TIME_WAIT is its new listener's",
        traffic.over_time_wait,
        {"SYN": {IN: {B}}, "rest": both(B)},
        ((0, A), (0, B)),
        (4,),
        bpf=({"SYN": {IN: {0}}, "rest": both(B)}, ((0, A), (0, B))),
    ),
    # -- UDP --
    *(
        Case(
            f"who only receives owns what it receives, {bound}",
            traffic.receiver,
            {"all": {IN: {B}}},
            ((0, B),),
            how=(bound,),
        )
        for bound in ("bound", "wildcard", "connected")
    ),
    *(
        Case(
            f"a sender owns what it sends and the answers, {how}",
            traffic.sender,
            {"all": both(B)},
            ((B, 0),),
            how=(how == "connected",),
        )
        for how in ("connected", "unconnected")
    ),
    Case(
        "between two slices each owns its end, UDP",
        traffic.between_slices,
        {"to b": {OUT: {A}, IN: {B}}, "to a": {OUT: {B}, IN: {A}}},
        ((A, B),),
        how=(False,),
    ),
    Case(
        "a port that changes hands ends with its new receiver",
        traffic.receivers_change,
        {"first": {IN: {A}}, "then": {IN: {B}}},
        ((0, A), (0, B)),
        (4,),
    ),
    Case(
        "a port that changes hands ends with its new sender",
        traffic.senders_change,
        {"first": {OUT: {A}}, "then": {OUT: {B}}},
        ((A, 0), (B, 0)),
        (4,),
    ),
    Case(
        "the node on a slice's connection is itself and erases nothing",
        traffic.node_between,
        {"slice": {OUT: {A}}, "node": {OUT: {0}}, "slice again": {OUT: {A}}},
        ((A, 0),),
        (4,),
    ),
    Case(
        "multicast is the sender's as it loops back, then the receiver's",
        traffic.multicast,
        {"all": {OUT: {A}, IN: {B}}},
        ((A, B),),
        (4,),
    ),
    # -- ICMP --
    *(
        Case(
            f"a ping and its replies are the pinger's, {kind}",
            traffic.ping,
            {"a": both(A), "b": both(B)},
            ((A, 0), (B, 0)),
            how=(kind == "raw socket",),
        )
        for kind in ("ping socket", "raw socket")
    ),
    Case("the kernel's echo reply is nobody's", traffic.echo_reply, {"all": both(0)}, ((0, 0),)),
    Case(
        "an error from outside is the slice's that sent",
        traffic.error_from_outside,
        {"error": {IN: {A}}},
        ((A, 0),),
    ),
    Case(
        "an error about a TCP connection is its owner's",
        traffic.error_about_tcp,
        {"error": {IN: {A}}},
        ((A, 0),),
    ),
    Case(
        "the kernel's own error is the former receiver's",
        traffic.error_of_our_own,
        {"error": {OUT: {B}}},
        ((0, B),),
    ),
    # -- raw --
    Case(
        "TCP over a raw socket is its speaker's, and so is the kernel's RST",
        traffic.raw_syn,
        {"SYN": {OUT: {B}}, "SYN-ACK": {IN: {B}}, "RST": {OUT: {B}}},
        ((B, 0),),
    ),
    Case(
        "a raw answer from one's own port owns its end",
        traffic.raw_answer,
        {"answer": {OUT: {A}}},
        ((0, A),),
        how=(True,),
    ),
    Case(
        "a raw answer where nobody else is owns its end",
        traffic.raw_answer,
        {"answer": {OUT: {A}}},
        ((0, A),),
        how=(False,),
        bpf=({"answer": {OUT: {A}}}, ((0, 0),)),
    ),
    Case(
        "a raw answer in the name of the node's server takes nothing",
        traffic.raw_in_nodes_name,
        {"answer": {OUT: {B}}},
        ((0, 0),),
    ),
    Case(
        "a raw packet into another's connection is not sent and takes nothing",
        traffic.forged_packet,
        {"all": {OUT: {A}}},
        ((A, 0),),
    ),
    Case(
        "a forged error takes nothing",
        traffic.forged_error,
        {"error": {OUT: {B}}},
        ((0, 0),),
        (4,),
    ),
    # -- whose socket it is --
    Case("a sub-cgroup is its slice's", traffic.sub_cgroup, {"all": both(A)}, ((0, A),), (4,)),
    Case(
        "sockets older than their slice are its",
        traffic.older_sockets,
        {"before": both(0), "after": both(traffic.LATE)},
        ((0, 0), (0, traffic.LATE)),
        (4,),
    ),
    # -- others' bits --
    Case(
        "the upper half stays as the sender set it",
        traffic.upper_bits_out,
        {"all": {OUT: {traffic.UPPER | A}}},
        ((A, 0),),
    ),
    Case(
        "the upper half of what comes in stays as it is",
        traffic.upper_bits_in,
        {"SYN": {IN: {traffic.UPPER | B}}, "rest": {IN: {traffic.UPPER | B}, OUT: {B}}},
        ((0, B),),
        bpf=(
            {"SYN": {IN: {traffic.UPPER}}, "rest": {IN: {traffic.UPPER | B}, OUT: {B}}},
            ((0, B),),
        ),
    ),
    Case("what passes through is nobody's", traffic.passing, {"all": {OUT: {0}}}, ((0, 0),)),
]


def check(bed: Thread, case: Case, family: int) -> None:
    """Make the traffic and compare."""
    if bed.datapath == "bpf" and case.bpf:
        packets, records = case.bpf
        case = replace(case, packets=packets, records=records)
    began = iso(time.time_ns())
    found = case.traffic(bed, family, *case.how)
    seen = {name: xids(group, whole=found.whole) for name, group in found.packets.items()}
    assert seen == case.packets
    # Ports come again: what an earlier case left with the same ones is not meant.
    records = [record for record in found.records if record["flow_start"] >= began]
    records.sort(key=lambda record: (record["start"], record["end"]))
    # A long connection has more than one record: what counts is who follows whom.
    found_owners = tuple(who for who, _ in groupby(owners(record) for record in records))
    assert found_owners == case.records, records


def _id(case: Case, family: int) -> str:
    return re.sub(r"\W+", "-", f"{case.name} IPv{family}")


def parametrize(one_family: bool = False) -> pytest.MarkDecorator:
    """Every case, for each family; or for one of them, now this and now that."""
    chosen = [
        (case, family)
        for number, case in enumerate(CASES)
        for family in (
            case.families[number % len(case.families) :][:1] if one_family else case.families
        )
    ]
    params = [pytest.param(case, family, id=_id(case, family)) for case, family in chosen]
    return pytest.mark.parametrize(("case", "family"), params)
