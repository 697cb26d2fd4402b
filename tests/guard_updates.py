"""Policies replace each other and the guard observes or enforces: scenarios of a guarded node."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import guard_cases
from guard_attempts import PORT
from guardbed import Guarded, inside
from vnet.testing import cgroup

from vnet import bpf, policy


def instance(bed: Guarded) -> Path:
    """Where the guard is pinned."""
    [found] = bpf.instances(Path(bed.node.env["VNET_BPF_DIR"]))
    return found


def apply(bed: Guarded, wanted: policy.Policy) -> list[int]:
    """Put a policy in force: that is done in the node's namespace."""
    with inside(bed.node.ns):
        return policy.write(instance(bed), wanted)


def no_door_opens_while_others_come_and_go(bed: Guarded, rounds: int = 200) -> None:
    """In a guest fewer rounds do: the one CPU is shared with two who never rest."""
    w = bed.world(4)
    before = policy.read(instance(bed))
    hammer = ["hammer", w.af, "SOCK_DGRAM", w.wild, PORT]
    running = {role: bed.agents[role].begins([hammer]) for role in ("c", "node")}
    for role, number in running.items():
        assert bed.agents[role].answer(number)["ok"]
    try:
        with spare_cgroups(7) as spare:
            for n in range(rounds):
                apply(bed, with_more(before, spare[: n % 8]))
    finally:
        apply(bed, before)
        for role, number in running.items():
            bed.agents[role].drops(number)
    for role, number in running.items():
        [results] = bed.agents[role].answer(number)["got"]
        assert set(results) == {"EACCES"}, (role, results)
        assert results["EACCES"] > 100


def with_more(base: policy.Policy, ids: list[int]) -> policy.Policy:
    """The policy, and a slice with a port beside it for each of these cgroups."""
    number = socket.IPPROTO_TCP
    return replace(
        base,
        slices={**base.slices, **{at: 1000 + n for n, at in enumerate(ids)}},
        ports=[
            *base.ports,
            *((policy.Port(number, 20000 + n), 1000 + n) for n in range(len(ids))),
        ],
    )


@contextmanager
def spare_cgroups(count: int) -> Iterator[list[int]]:
    """The ids of so many empty cgroups."""
    with cgroup.cgroup() as parent:
        made = [parent.path / f"s{n}" for n in range(count)]
        try:
            for path in made:
                path.mkdir()
            yield [path.stat().st_ino for path in made]
        finally:
            for path in made:
                with suppress(FileNotFoundError):
                    path.rmdir()


@contextmanager
def observing(bed: Guarded) -> Iterator[None]:
    """The guard reports, and refuses nothing."""
    where = instance(bed)
    before = policy.control(where)
    policy.set_control(where, replace(before, observe=True))
    try:
        yield
    finally:
        policy.set_control(where, before)


def nothing_is_refused_in_observe_mode(bed: Guarded, without: tuple[str, ...]) -> None:
    failed = []
    with observing(bed):
        for case in guard_cases.cases():
            if case.needs in without or (case.needs and case.needs not in bed.has):
                continue
            for family in case.families:
                try:
                    bed.check_observed(case, family)
                except AssertionError as error:
                    failed.append(f"{case.name}, v{family}: {error}")
    assert not failed, "\n".join(failed)


def switching_between_observe_and_enforce_takes_effect_at_once(bed: Guarded, family: int) -> None:
    w = bed.world(family)
    c = bed.agents["c"]
    mine = [["socket", w.af, "SOCK_STREAM"], ["bind", w.wild, PORT]]
    for _ in range(20):
        with observing(bed):
            assert c.tries(mine)["ok"]
        assert c.tries(mine).get("errno") == "EACCES"
    # whoever is in the middle of something meets the one or the other
    hammer = c.begins([["hammer", w.af, "SOCK_DGRAM", w.wild, PORT]])
    assert c.answer(hammer)["ok"]
    for _ in range(100):
        with observing(bed):
            pass
    c.drops(hammer)
    [results] = c.answer(hammer)["got"]
    assert set(results) <= {"ok", "EACCES"}, results
    assert policy.read(instance(bed)).observe is False


def ten_thousand_slices_apply_at_once(bed: Guarded) -> float:
    """Put them in force, and return how many seconds that took."""
    w = bed.world(4)
    before = policy.read(instance(bed))
    try:
        with spare_cgroups(10_000) as spare:
            many = with_more(before, spare)
            start = time.monotonic()
            assert apply(bed, many) == []
            took = time.monotonic() - start
        steps = [["socket", w.af, "SOCK_STREAM"], ["bind", w.wild, 20000 + 9_999]]
        assert bed.agents["a"].tries(steps).get("errno") == "EACCES"
    finally:
        apply(bed, before)
    assert bed.agents["a"].tries(steps)["ok"]
    return took
