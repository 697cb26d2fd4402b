"""Bring the node up and down, and keep its table in step with its slices."""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from vnet import (
    bpf,
    bpfsteps,
    cgroups,
    config,
    copyxid,
    guard,
    iptables,
    module,
    nftables,
    nodeconfig,
    registry,
    rules,
    steps,
    sysctls,
)
from vnet import choice as choosing
from vnet import state as states
from vnet.choice import Choice
from vnet.config import Slice
from vnet.datapath import Family
from vnet.errors import NodeError, UsageError
from vnet.iptables import Variant, families
from vnet.journal import Journal
from vnet.nodeconfig import Asked, Mode, NodeConfig
from vnet.paths import Paths
from vnet.registry import Assignment, Request
from vnet.state import State


@dataclass
class Outcome:
    """What a command did, for people and for ``--json``."""

    done: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    variant: str = ""
    datapath: str = ""
    why: str = ""  #: this data path


def up(
    paths: Paths,
    variant: Variant | None = None,
    rest_ns: int = registry.REST_NS,
    datapath: Asked | None = None,
) -> Outcome:
    """Bring the node up, or repair it; whole or not at all.

    ``datapath``: rather than what vnet.toml says. Raises ConfigError,
    ConflictError, ModuleError, BpfError, RulesError, NodeError.
    """
    # All that can be refused is, before anything is made.
    config.load(paths.config_dir)
    settings = nodeconfig.load(paths.node_config)
    require_root("up")
    root = cgroups.v2_root()
    before, choice = settings, _choose(paths, settings, variant, datapath)
    state = states.text(paths.state)
    with guard.lock(paths):
        recovered = steps.undo(paths)
        # As it is now that nobody else changes it.
        slices = config.load(paths.config_dir)
        settings = nodeconfig.load(paths.node_config)
        if recovered or (settings, states.text(paths.state)) != (before, state):
            choice = _choose(paths, settings, variant, datapath)
        result = guard.guarded(
            lambda: _up(paths, slices, root, settings.mode, choice, rest_ns),
            lambda: steps.undo(paths),
        )
        outcome = Outcome(result["done"], result["remarks"])
        outcome.variant, outcome.datapath, outcome.why = choice.variant, choice.datapath, choice.why
        outcome.done += _leave_behind(paths)
    if recovered:
        outcome.remarks.insert(0, "what a killed command had done half-way was undone first")
    return outcome


def _choose(
    paths: Paths, settings: NodeConfig, variant: Variant | None, datapath: Asked | None
) -> Choice:
    old = states.load(paths.state)
    return choosing.choose(
        datapath or settings.datapath,
        variant or (old.variant if old else iptables.suitable()),
        settings.packet_sockets,
        paths,
    )


def _up(
    paths: Paths, slices: list[Slice], root: Path, mode: Mode, choice: Choice, rest_ns: int
) -> guard.Result:
    """The steps, in order; runs in the guarded worker."""
    old, old_text = states.load(paths.state), states.text(paths.state)
    new = states.load(paths.state) or State(since=time.time_ns(), variant=choice.variant)
    new.variant, new.datapath, new.why = choice.variant, choice.datapath, choice.why
    new.mode, new.packet_sockets = mode, "guarded" if choice.lsm else "unguarded"
    notes = Journal(paths.journal)
    assignment = steps.assign(notes, paths, requests(slices), rest_ns)
    wanted, xids = entries(root, slices, assignment)
    # Of the kernel's side the programs first: they are what it may refuse.
    done = bpfsteps.mount(notes, paths, new)
    done += bpfsteps.load(notes, paths, new, choice.lsm)
    if new.datapath == "module":
        done += steps.load_module(notes, new)
        done += steps.fill_table(notes, wanted, xids)
    done += _guard(notes, old, new, slices, assignment, wanted, root)
    # What is made from now on is marked from birth; what is older must be
    # marked before the rules come, since they drop what has no mark (vnet_gate).
    adopted, _unreached = bpfsteps.adopt_sockets(Path(new.instance), notes)
    done += adopted
    done += steps.set_sysctls(notes, new)
    installed, remarks = _rules(notes, new)
    done += installed
    # And what was on its way then: accepted meanwhile, or handed over.
    adopted, unreached = bpfsteps.adopt_sockets(Path(new.instance), notes)
    done += adopted
    remarks += unreached
    steps.write_state(notes, paths, new, old_text)
    steps.release(paths, assignment)
    steps.finish(paths, notes)
    if 6 not in families():
        remarks.append("this kernel has no IPv6: rules for IPv4 only")
    if not choice.lsm:
        remarks.append(
            "the guard is partial: packet sockets are not refused on this kernel, as "
            f"{paths.node_config} allows"
        )
    if mode == "observe":
        remarks.append("the guard observes: it reports, and refuses nothing")
    return {"done": done, "remarks": remarks}


def _rules(notes: Journal, new: State) -> tuple[list[str], list[str]]:
    """The data path's chains: (what was done, remarks)."""
    return steps.install_rules(
        notes,
        new,
        new.variant,
        {family: states.chains(new, family) for family in families()},
    )


def _guard(
    notes: Journal,
    old: State | None,
    new: State,
    slices: list[Slice],
    assignment: Assignment,
    wanted: dict[int, int],
    root: Path,
) -> list[str]:
    """Ports, policy and interfaces, in an order that leaves no door open."""
    instance = Path(new.instance)
    kept = bpfsteps.with_lingering(instance, wanted, set(assignment.xids.values()))
    done = bpfsteps.reserve(notes, new, slices)
    policy = bpfsteps.wanted_policy(slices, assignment.xids, kept, new.mode)
    done += bpfsteps.apply(notes, instance, policy)
    done += bpfsteps.release(notes, new, slices)
    interfaces = bpfsteps.wanted_interfaces(slices, assignment.xids)
    done += bpfsteps.mark_interfaces(notes, new, interfaces, old)
    return done


def _leave_behind(paths: Paths) -> list[str]:
    """Take away what the node no longer uses: another version's programs, the module.

    Not part of the steps: nothing leads there any more, and the next ``up``
    does it if this one is killed here.
    """
    new = states.load(paths.state)
    if new is None:
        return []
    done = bpfsteps.remove_others(paths, new.instance)
    if new.datapath == "bpf":
        done += _empty_table()
    if new.datapath == "bpf" and new.module_loaded:
        if module.loaded() and module.unload():
            done.append(f"unloaded module {copyxid.MODULE}")
        new.module_loaded = module.loaded()
        states.replace(paths.state, states.dump(new))
    return done


def _empty_table() -> list[str]:
    if module.loaded() and copyxid.present():
        with copyxid.connect() as kernel:
            if kernel.table():
                kernel.flush()
                return ["emptied the slices table"]
    return []


def down(paths: Paths) -> Outcome:
    """Take away exactly what ``up`` put in place. May be run again if it fails half-way."""
    require_root("down")
    outcome = Outcome()
    there = paths.run_dir.exists() or module.loaded() or bpf.instances(paths.bpf_dir)
    if not there and not _rules_left():
        return outcome
    with guard.lock(paths):
        if steps.undo(paths):
            outcome.done.append("undid what a killed command had done half-way")
        old = states.load(paths.state)
        notes = Journal(paths.journal)
        if old is not None:
            # While it stands, `vnet watch` puts nothing back: killed half-way, without its
            # programs, a node with our rules would send nothing of any slice.
            notes.add("down")
        for family, variant in _rules_left():
            rules.change(family, variant, rules.snapshot(family, variant), rules.NOTHING)
            outcome.done.append(f"removed the rules for IPv{family} ({variant})")
        if old is not None:
            _tidy_nft(old)
            outcome.done += [f"sysctl {key} restored" for key in sysctls.restore(old.sysctls)]
        outcome.done += bpfsteps.take_away(paths, old)
        outcome.done += _empty_table()
        if old is not None and old.module_loaded and module.loaded():
            if module.unload():
                outcome.done.append(f"unloaded module {copyxid.MODULE}")
            else:
                outcome.remarks.append(
                    f"module {copyxid.MODULE} stays loaded: {module.users()} rules of somebody "
                    "else's use it"
                )
        paths.state.unlink(missing_ok=True)
        notes.close()
        paths.journal.unlink(missing_ok=True)
    return outcome


def _rules_left() -> list[tuple[Family, Variant]]:
    return [
        (family, variant)
        for family in families()
        for variant in iptables.VARIANTS
        if not rules.is_empty(rules.snapshot(family, variant))
    ]


def _tidy_nft(old: State) -> None:
    for family in iptables.FAMILIES:
        if made := old.made.get(str(family)):
            nftables.remove_if_empty(family, made.tables, made.chains)


# -- the guard's mode ---------------------------------------------------------


def guard_mode(paths: Paths, wanted: Mode | None = None) -> tuple[Mode, Mode]:
    """(the guard's mode, what vnet.toml says); ``wanted``: switch to it first, by one store.

    Raises NodeError, BpfError, ConfigError.
    """
    require_root("guard")
    settings = nodeconfig.load(paths.node_config)
    with guard.lock(paths):
        steps.undo(paths)
        state = states.load(paths.state)
        if state is None:
            raise NodeError("vnet guard: the node is down", "vnet up")
        instance = Path(state.instance)
        if wanted is not None:
            bpfsteps.switch(instance, wanted)
            state.mode = wanted
            states.replace(paths.state, states.dump(state))
        return bpfsteps.mode(instance), settings.mode


# -- slices -------------------------------------------------------------------


def requests(slices: Iterable[Slice]) -> list[Request]:
    """What the registry is asked for these slices."""
    return [Request(item.name, item.xid, item.where, item.users) for item in slices]


def entries(
    root: Path, slices: Iterable[Slice], assignment: Assignment
) -> tuple[dict[int, int], set[int]]:
    """({cgroup id: xid} of the cgroups that exist, every xid in use)."""
    paths = {path: assignment.xids[item.name] for item in slices for path in item.cgroups}
    return steps.wanted_entries(root, paths), set(assignment.xids.values())


def add_slice(paths: Paths, new: Slice, rest_ns: int = registry.REST_NS) -> tuple[int, bool]:
    """Write the slice's file and, on a node that is up, mark it at once.

    Returns (its xid, whether the node is up). Raises UsageError, ConfigError,
    ConflictError; then nothing was changed.
    """
    require_root("slice add")
    xids, is_up = add_slices(paths, [new], rest_ns)
    return xids[new.name], is_up


def add_slices(
    paths: Paths, new: list[Slice], rest_ns: int = registry.REST_NS
) -> tuple[dict[str, int], bool]:
    """Several slices at once, all in one file. Returns ({name: xid}, whether the node is up).

    Raises UsageError, ConfigError, ConflictError; then nothing was changed.
    """
    [file] = {item.file for item in new}
    names = {item.name for item in new}
    with guard.lock(paths):
        steps.undo(paths)
        present = config.load(paths.config_dir)
        for item in present:
            if item.name in names:
                raise UsageError(
                    f"slice {item.name}: is there already: {item.where}",
                    "edit that file, then `vnet up`",
                )
        if file.exists():
            raise UsageError(
                f"{file}: is there already", "name the slice otherwise, or move that file away"
            )
        config.check([*present, *new])
        paths.config_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        content = "".join(map(config.write, new))
        result = _change(
            paths, [*present, *new], rest_ns, lambda notes: steps.add_file(notes, file, content)
        )
    return {name: result["xids"][name] for name in names}, paths.state.exists()


def remove_slice(
    paths: Paths, name: str, rest_ns: int = registry.REST_NS
) -> tuple[int | None, bool]:
    """Remove a slice whose file is its own. Returns (the xid that rests now, node is up)."""
    require_root("slice rm")
    with guard.lock(paths):
        steps.undo(paths)
        present = config.load(paths.config_dir)
        found = next((item for item in present if item.name == name), None)
        if found is None:
            raise UsageError(
                f"slice {name}: there is none in {paths.config_dir}", "see `vnet slice ls`"
            )
        others = [item.name for item in present if item.file == found.file and item.name != name]
        if others:
            raise UsageError(
                f"{found.where}: holds other slices too ({', '.join(others[:5])})",
                f"take slice {name} out of that file, then `vnet up`",
            )
        result = _without(paths, present, found.file, rest_ns)
    return result["ended"].get(name), paths.state.exists()


def remove_file(paths: Paths, file: Path, rest_ns: int = registry.REST_NS) -> None:
    """Remove all slices of a file. Raises ConfigError and what the kernel's side raises."""
    with guard.lock(paths):
        steps.undo(paths)
        _without(paths, config.load(paths.config_dir), file, rest_ns)


def _without(paths: Paths, present: list[Slice], file: Path, rest_ns: int) -> guard.Result:
    """Take a file and its slices away."""
    file.lstat()  # FileNotFoundError: somebody else has
    left = [item for item in present if item.file != file]
    result = _change(paths, left, rest_ns, lambda notes: steps.put_aside(notes, file))
    steps.aside(file).unlink(missing_ok=True)
    return result


def _change(
    paths: Paths, slices: list[Slice], rest_ns: int, file: Callable[[Journal], None]
) -> guard.Result:
    """Registry, ``file`` and, on a node that is up, the kernel's side, in step; or none of them.

    Returns {"xids": {slice: xid}, "ended": the same of those that are no more}.
    """
    return guard.guarded(lambda: _apply(paths, slices, rest_ns, file), lambda: steps.undo(paths))


def _apply(
    paths: Paths, slices: list[Slice], rest_ns: int, file: Callable[[Journal], None]
) -> guard.Result:
    """The steps, in order; runs in the guarded worker."""
    notes = Journal(paths.journal)
    assignment = steps.assign(notes, paths, requests(slices), rest_ns)
    file(notes)
    new = states.load(paths.state)
    if new is not None:
        root, old_text = cgroups.v2_root(), states.text(paths.state)
        old = states.load(paths.state)
        wanted, xids = entries(root, slices, assignment)
        _guard(notes, old, new, slices, assignment, wanted, root)
        if old and bool(old.interfaces) != bool(new.interfaces):
            _rules(notes, new)  # FORWARD counts from now on, or no more
        if new.datapath == "module":
            steps.fill_table(notes, wanted, xids)
        bpfsteps.adopt_sockets(Path(new.instance), notes)
        steps.write_state(notes, paths, new, old_text)
    steps.release(paths, assignment)
    steps.finish(paths, notes)
    return {
        "xids": assignment.xids,
        "ended": {tenure.slice: tenure.xid for tenure in assignment.ended},
    }


def require_root(what: str) -> None:
    if os.geteuid() != 0:
        raise NodeError(f"vnet {what}: only root may change the node", f"sudo vnet {what}")
