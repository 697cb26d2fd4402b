"""The behaviours by name: what went wrong once, or would, and the test that it does not here.

Some have their own story (behaviours_icmp, behaviours_sockets, behaviours_wire);
of the others the rows of the truth table (tests/truth) that show them are named.
docs/behaviours.md has each in two lines.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest

pytest.register_assert_rewrite("behaviours_icmp", "behaviours_sockets", "behaviours_wire")

import behaviours_icmp as icmp  # noqa: E402
import behaviours_sockets as sockets  # noqa: E402
import behaviours_wire as wire  # noqa: E402
from behaviours_bed import Bed  # noqa: E402

from netflow.output import iso  # noqa: E402


@dataclass(frozen=True)
class Behaviour:
    """One thing that must hold."""

    name: str
    run: Callable[[Bed, int], None] | None = None
    families: tuple[int, ...] = (4, 6)
    rows: tuple[str, ...] = ()
    """Rows of truth.table that show it."""
    needs: str = ""
    """sctp: what the host's kernel does not have."""


BEHAVIOURS = [
    # -- the ten that PlanetLab met --
    Behaviour(
        "a UDP socket that only receives owns what it receives",
        rows=(
            "connected",
            "unconnected, to a wildcard socket",
            "to who only receives",
        ),
    ),
    Behaviour(
        "SYN-ACK, last ACK and FIN are the slice's",
        rows=(
            "SYN-ACK",
            "FIN of who began",
            "FIN of the other",
            "last ACK",
            "SYN-ACK that is a cookie",
        ),
    ),
    Behaviour(
        "an ICMP error belongs to the connection it is about",
        rows=(
            "port unreachable, of a port that was a slice's",
            "error about a TCP connection",
        ),
    ),
    Behaviour(
        "two slices ping one host and each gets its own replies",
        rows=(
            "the kernel's echo reply to it",
            "the kernel's echo reply to a raw socket",
        ),
    ),
    Behaviour("two slices ping one host with one id and each gets its own replies", icmp.same_id),
    Behaviour(
        "TIME_WAIT is its former owner's",
        rows=(
            "ACK out of TIME_WAIT",
            "SYN over a TIME_WAIT, to b",
            "b's answers to it",
        ),
    ),
    *(
        Behaviour(
            f"a connection that a front end of {whose} re-owns is split in the log",
            partial(sockets.reowned, front=front),
        )
        for front, whose in (("slice", "a slice"), ("node", "the node"))
    ),
    Behaviour(
        "TCP over a raw socket is its speaker's",
        rows=(
            "SYN over a raw socket",
            "SYN-ACK to it",
            "the kernel's RST about it",
        ),
    ),
    Behaviour(
        "under load a tap hears all of one's own packets and none of the others'",
        wire.tap_under_load,
    ),
    Behaviour("no socket reference stays", sockets.no_reference_stays),
    Behaviour("a socket of another network namespace is nobody's here", wire.other_namespace),
    # -- and beyond --
    *(
        Behaviour(
            f"a traceroute ({kind}) to the node gets its answers, with the guard on",
            partial(icmp.traceroute_to_the_node, kind=kind),
        )
        for kind in ("udp", "tcp", "icmp")
    ),
    *(
        Behaviour(
            f"a traceroute ({kind}) by a slice works and its errors are the slice's",
            partial(icmp.traceroute_by_a_slice, kind=kind),
        )
        for kind in ("udp", "tcp", "icmp")
    ),
    Behaviour("a socket that is handed on stays its maker's", sockets.handed_on),
    Behaviour(
        "a UDP port that changes hands ends with its new owner",
        rows=(
            "of a port that changes hands: before",
            "after",
        ),
    ),
    Behaviour("a unit restarts and keeps its slice", sockets.unit_restarts, (4,)),
    Behaviour(
        "a service whose socket was made outside its slice is nobody's",
        sockets.activated_by_the_node,
    ),
    Behaviour(
        "a service whose socket was made in its slice is the slice's",
        sockets.activated_in_its_slice,
    ),
    Behaviour("a socket outlives its cgroup and stays its slice's", sockets.outlives_its_cgroup),
    *(
        Behaviour(
            f"behind {what} a slice owns what it sends and the answers",
            partial(wire.source_nat, what=what),
        )
        for what in ("snat", "masquerade")
    ),
    Behaviour("a redirected port is the server's that it leads to", wire.destination_nat),
    Behaviour(
        "a slice's connection that DNAT turns to another slice is both's",
        wire.destination_nat_of_the_nodes_own,
    ),
    Behaviour("what the node masquerades for others is nobody's", wire.masqueraded_for_others),
    Behaviour(
        "multicast is the sender's, then the receiver's",
        rows=("multicast",),
    ),
    Behaviour("GRE that comes in is the slice's from its first answer on", wire.gre),
    Behaviour("SCTP that comes in is the server's", wire.sctp, needs="sctp"),
]


def check(bed: Bed, behaviour: Behaviour, family: int) -> None:
    """Make it happen."""
    assert behaviour.run
    bed.began = iso(time.time_ns() // 10**6 * 10**6)  # as records have it
    behaviour.run(bed, family)


def parametrize(without: str = "") -> pytest.MarkDecorator:
    """Every behaviour with a story, for each family."""
    params = [
        pytest.param(one, family, id=_id(one, family))
        for one in _stories()
        if not (one.needs and one.needs == without)
        for family in one.families
    ]
    return pytest.mark.parametrize(("behaviour", "family"), params)


def parametrize_guests() -> pytest.MarkDecorator:
    """Each once, now for this family and now for that."""
    params = [
        (one, one.families[number % len(one.families)]) for number, one in enumerate(_stories())
    ]
    return pytest.mark.parametrize(
        ("behaviour", "family"),
        [pytest.param(one, family, id=_id(one, family)) for one, family in params],
    )


def _stories() -> list[Behaviour]:
    return [one for one in BEHAVIOURS if one.run]


def _id(one: Behaviour, family: int) -> str:
    return re.sub(r"\W+", "-", f"{one.name} IPv{family}")
