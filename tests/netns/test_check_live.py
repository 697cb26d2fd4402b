"""``vnet check --live`` on a node that runs: what the command says, leaves, and finds missing.

Every protection, one at a time, is in test_check_breaks.py; here are those that
canaries mend by coming, as any new slice does.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import breaks
import pytest
from vnet.check import run, sandbox, traces
from vnet.check.bed import FILE, Bed, canaries
from vnet.paths import Paths
from vnet.testing import cgroup, net
from vnet.testing.net import HERE
from vnet.testing.poll import until

from vnet import bpf, config, guard, node, owners, policy, state, status, sysctls

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(bpf.lacking()), reason="this kernel cannot run the eBPF programs"),
]


@pytest.fixture(scope="module")
def live() -> Iterator[Paths]:
    """A node without canaries."""
    with sandbox.sandbox("bpf") as paths:
        yield paths


def command(paths: Paths, *words: str) -> list[str]:
    """``vnet check --live`` on this node."""
    dirs = {"config": paths.config_dir, "state": paths.state_dir, "run": paths.run_dir,
            "bpf": paths.bpf_dir}  # fmt: skip
    options = [word for name, path in dirs.items() for word in (f"--{name}-dir", str(path))]
    return [sys.executable, "-m", "vnet.cli", *options, "check", "--live", *words]


def check(paths: Paths) -> tuple[int, list[str], str]:
    """(exit code, what fell, standard error) of ``vnet check --live``."""
    allow = ["--allow-skip", "packet-sockets"] if bpf.lsm_lacking() else []
    done = subprocess.run(command(paths, "--json", *allow), capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)["fell"], done.stderr


#: What canaries mend by coming, as any new slice does, is told as well.
LIVE = {
    "link vnet_bind4": ["port-reserved", "address-reserved"],
    "link vnet_ingress": ["raw-own-receive"],
    "sysctl net.ipv4.ip_local_reserved_ports": ["port-autobind"],
    "policy slices": ["policy-in-force"],
    "policy ports": ["policy-in-force"],
    "policy levels": ["policy-in-force"],
}


def test_canaries_say_what_they_do_and_leave_the_node_as_it_was(live):
    before = (live.config_dir / "slices.toml").read_text()
    files = sorted(live.config_dir.iterdir())
    code, fell, said = check(live)
    assert (code, fell) == (0, []), said
    assert "slices named vnet-check-" in said
    assert sorted(live.config_dir.iterdir()) == files
    assert (live.config_dir / "slices.toml").read_text() == before


@pytest.mark.parametrize("name", LIVE)
def test_the_command_on_a_live_node_without(name, live):
    known = {each.name: each for each in breaks.every(live)}
    for _ in range(3):  # `vnet watch` may still be busy with the check before, and mend it
        with known[name].broken():
            code, fell, said = check(live)
        if fell == LIVE[name]:
            break
    assert (code, fell) == (1, LIVE[name]), said


@pytest.mark.parametrize(
    ("change", "says"),
    [({"levels": 0}, "at the depth"), ({"cookie": 1}, "another network namespace"),
     ({"ports": 0}, "the numbers of"), ({"addresses": 0}, "the numbers of")],
)  # fmt: skip
def test_what_programs_look_at_before_the_tables_is_compared_with_them(change, says, live):
    instance = Path(state.load(live.state).instance)
    assert status.policy_differences(live)["policy"] == []
    with guard.lock(live):  # or `vnet watch` may mend it
        breaks.set_facts(instance, **change)
        try:
            [said] = status.policy_differences(live)["policy"]
        finally:
            policy.write(instance, policy.read(instance))
    assert says in said
    assert status.policy_differences(live)["policy"] == []


def test_a_quick_copy_that_names_another_owner_is_told(live):
    instance = Path(state.load(live.state).instance)
    [(number, xid)] = policy.read(instance).slices.items()
    with guard.lock(live), policy._maps(instance) as maps:
        wrong = {number: xid + 1, number + 1: xid}
        owners.fill(maps.directory, maps.control().generation, wrong)
        try:
            said = status.policy_differences(live)["policy"]
        finally:
            policy.write(instance, policy.read(instance))
    assert sorted(line.split()[-1] for line in said) == [f"{number}", f"{number + 1}"]
    assert status.policy_differences(live)["policy"] == []


def test_a_difference_is_told_by_what_it_is_about_and_not_by_the_slices_name(live):
    file = live.config_dir / "interface.toml"
    with cgroup.cgroup("interface") as home:
        slice_ = config.Slice("user-interface", (home.rel,), None, config.Grants(), file, 1)
        node.add_slices(live, [slice_])
        try:
            with ExitStack() as stack:
                with guard.lock(live):  # which `vnet watch` may hold, and would to the end
                    stack.enter_context(breaks.watch_stopped(live))
                    policy.Slices(Path(state.load(live.state).instance)).delete_many([home.id])
                found = run.live(live, ["policy-in-force", "containers"], [], lambda _: None)
        finally:
            node.remove_file(live, file)
    assert found.fallen() == ["policy-in-force"]


@pytest.mark.parametrize(("family", "other"), [(4, "net__ipv6__conf__all__forwarding"),
                                               (6, "net__ipv4__ip_forward")])  # fmt: skip
def test_a_node_that_forwards_one_family_is_asked_about_that_one(family, other, live):
    HERE.sysctl(**{other: 0})
    try:
        found = run.live(live, ["forwarded"], [], lambda _: None)
    finally:
        HERE.sysctl(**{other: 1})
    assert {(o.family, o.verdict) for o in found.outcomes} == {(family, "held")}, found.outcomes


def test_containers_that_cannot_be_tried_are_skipped_and_not_held(live):
    HERE.run("ip", "route", "add", "blackhole", "203.0.113.0/24")  # as against bogons
    try:
        found = run.live(live, ["containers"], [], lambda _: None)
    finally:
        HERE.run("ip", "route", "del", "blackhole", "203.0.113.0/24")
    assert (found.good, found.skipped(), found.fallen()) == (False, ["containers"], [])


def test_a_property_that_was_named_and_has_nothing_to_check_is_no_success(live):
    HERE.sysctl(net__ipv4__ip_forward=0, net__ipv6__conf__all__forwarding=0)
    try:
        found = run.live(live, ["forwarded", "raw-deny"], [], lambda _: None)
    finally:
        HERE.sysctl(net__ipv4__ip_forward=1, net__ipv6__conf__all__forwarding=1)
    assert (found.good, found.skipped()) == (False, ["forwarded"])
    assert "forwarding" in found.of("forwarded")[0].happened


def _a_table_is_there(paths: Paths) -> bool:
    return "vnt_nflog" in HERE.run("nft", "list", "tables").stdout


def _canaries_are_there(paths: Paths) -> bool:
    return (paths.config_dir / FILE).exists()


#: what has been seen, in this order, when the checker is asked to stop
MOMENTS = (
    (_a_table_is_there,),
    (_canaries_are_there,),
    (_canaries_are_there, lambda paths: not _canaries_are_there(paths)),
)


@pytest.mark.parametrize("seen", MOMENTS)
def test_a_check_of_a_live_node_that_is_asked_to_stop_leaves_no_trace(seen, live):
    before = traces.look(live)
    with subprocess.Popen(
        command(live, "raw-deny"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        for moment in seen:
            until(lambda moment=moment: process.poll() is not None or moment(live))
        process.send_signal(signal.SIGINT)
        process.wait(120)
    until(lambda: traces.look(live) == before, 10, "the node as before")
    assert not list(cgroup.root().glob(f"vnt-{process.pid}"))


#: what is done by whom, and whether the signal comes before or after that
WORST: dict[str, tuple[object, str, Callable[..., bool], str]] = {
    "a table has come": (net.Namespace, "run", lambda _, *argv: argv[:2] == ("nft", "-f"), "after"),
    "canaries have come": (node, "add_slices", lambda *_: True, "after"),
    "canaries are about to go": (node, "remove_file", lambda *_: True, "before"),
}


@pytest.mark.parametrize("moment", WORST)
def test_nothing_is_left_by_a_signal_at_the_worst_moment(moment, live, monkeypatch):
    of, name, meant, when = WORST[moment]
    does = getattr(of, name)

    def interrupted(*args: Any, **more: Any) -> Any:
        if when == "before" and meant(*args):
            signal.raise_signal(signal.SIGINT)
        done = does(*args, **more)
        if when == "after" and meant(*args):
            signal.raise_signal(signal.SIGINT)
        return done

    before = traces.look(live)
    monkeypatch.setattr(of, name, interrupted)
    with pytest.raises(KeyboardInterrupt), canaries(live):
        pass
    monkeypatch.undo()
    until(lambda: traces.look(live) == before, 10, "the node as before")


def _number() -> int:
    """Of a cgroup that is no slice's."""
    return cgroup.leftovers()[0].stat().st_ino


def _its_cgroup_stays(paths: Paths, bed: Bed) -> None:
    policy.Slices(bed.instance).set_many({_number(): bed.xids["own"]})


def _its_port_stays(paths: Paths, bed: Bed) -> None:
    sysctls.add_reserved([bed.ports.own])


def _its_file_stays(paths: Paths, bed: Bed) -> None:
    (paths.config_dir / FILE).write_text("")


def _its_table_stays(paths: Paths, bed: Bed) -> None:
    HERE.run("nft", "add", "table", "inet", "vnt_nflog_1")


def _a_setting_is_gone(paths: Paths, bed: Bed) -> None:
    HERE.sysctl(net__netfilter__nf_conntrack_acct=0)


def _a_file_is_another(paths: Paths, bed: Bed) -> None:
    with (paths.config_dir / "slices.toml").open("a") as file:
        file.write("# somebody was here\n")


TRACES = {
    _its_cgroup_stays: {"the canaries' cgroups, grants, ports and addresses in the kernel",
                        "rules, settings, programs and policy"},
    _its_port_stays: {"sysctl net.ipv4.ip_local_reserved_ports"},
    _its_file_stays: {"the slices' files"},
    _its_table_stays: {"cgroups, namespaces, interfaces and tables"},
    _a_setting_is_gone: {"rules, settings, programs and policy"},
    _a_file_is_another: {"the slices' files"},
}  # fmt: skip


def test_a_check_that_leaves_a_trace_is_told_of(live):
    before = traces.look(live)
    with canaries(live) as bed:
        bed.patience = 0.1
        during = traces.outcomes(live, before, bed)
        assert "fell" in {each.verdict for each in during}
    bed.patience = 60.0  # what it takes where much else goes on
    assert {each.verdict for each in traces.outcomes(live, before, bed)} == {"held"}
    bed.patience = 0.1
    for leave, where in TRACES.items():
        before = traces.look(live)
        with guard.lock(live):  # or `vnet watch` may set it right at once
            leave(live, bed)
            fell = {each.tried for each in traces.outcomes(live, before, bed)
                    if each.verdict == "fell"}  # fmt: skip
        assert fell == {f"look at {what}" for what in where}, leave
        (live.config_dir / FILE).unlink(missing_ok=True)
        policy.Slices(bed.instance).delete_many([_number()])
