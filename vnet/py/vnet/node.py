"""Bring the node up and down, and keep its table in step with its slices."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from vnet import cgroups, config, copyxid, guard, module, nftables, registry, rules, steps, sysctls
from vnet import state as states
from vnet.config import Slice
from vnet.errors import NodeError, UsageError, VnetError
from vnet.journal import Journal
from vnet.paths import Paths
from vnet.registry import Assignment, Request
from vnet.rules import Variant
from vnet.state import State

NOT_ENFORCED = (
    "grants (raw, ports) are recorded, not yet enforced: nothing stops a slice from more today"
)


@dataclass
class Outcome:
    """What a command did, for people and for ``--json``."""

    done: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    variant: str = ""


def up(paths: Paths, variant: Variant | None = None, rest_ns: int = registry.REST_NS) -> Outcome:
    """Bring the node up, or repair it; whole or not at all.

    Raises ConfigError, ConflictError, ModuleError, RulesError, NodeError.
    """
    config.load(paths.config_dir)  # all that can be refused is, before anything is made
    require_root("up")
    root = cgroups.v2_root()
    module.loadable()
    _require_plugin()
    with guard.lock(paths):
        recovered = steps.undo(paths)
        slices = config.load(paths.config_dir)  # as it is now that nobody else changes it
        result = guard.guarded(
            lambda: _up(paths, slices, root, variant, rest_ns), lambda: _undo(paths)
        )
        outcome = Outcome(result["done"], result["remarks"], result["variant"])
        ended = [registry.Tenure(*row) for row in result["ended"]]
        if ended:
            registry.release(paths.registry, ended, time.time_ns())
    if recovered:
        outcome.remarks.insert(0, "an `up` that had been killed half-way was undone first")
    return outcome


def _undo(paths: Paths) -> None:
    steps.undo(paths)


def _up(
    paths: Paths, slices: list[Slice], root: Path, variant: Variant | None, rest_ns: int
) -> guard.Result:
    """The steps, in order; runs in the guarded worker."""
    old = states.load(paths.state)
    old_text = states.text(paths.state)
    new = states.load(paths.state) or State(since=time.time_ns(), variant="nft")
    new.variant = variant or (old.variant if old else rules.suitable())
    assignment = registry.assign(paths.registry, requests(slices), time.time_ns(), rest_ns)
    notes = Journal(paths.journal)
    done = steps.load_module(notes, new)
    wanted, xids = entries(root, slices, assignment)
    done += steps.fill_table(notes, wanted, xids, root)
    done += steps.set_sysctls(notes, new)
    installed, remarks = steps.install_rules(notes, new, new.variant)
    done += installed
    steps.write_state(notes, paths, new, old_text)
    # From here on the node is up: without a journal nothing will be undone.
    notes.close()
    paths.journal.unlink(missing_ok=True)
    if 6 not in rules.families():
        remarks.append("this kernel has no IPv6: rules for IPv4 only")
    if any(item.grants.any for item in slices):
        remarks.append(NOT_ENFORCED)
    ended = [[t.xid, t.slice, t.since, t.until] for t in assignment.ended]
    return {"done": done, "remarks": remarks, "variant": new.variant, "ended": ended}


def down(paths: Paths) -> Outcome:
    """Take away exactly what ``up`` put in place. May be run again if it fails half-way."""
    require_root("down")
    outcome = Outcome()
    if not paths.run_dir.exists() and not module.loaded() and not _rules_left():
        return outcome
    with guard.lock(paths):
        if steps.undo(paths):
            outcome.done.append("undid an `up` that had been killed half-way")
        old = states.load(paths.state)
        for family, variant in _rules_left():
            rules.change(family, variant, rules.snapshot(family, variant), rules.NOTHING)
            outcome.done.append(f"removed the rules for IPv{family} ({variant})")
        if old is not None:
            _tidy_nft(old)
            outcome.done += [f"sysctl {key} restored" for key in sysctls.restore(old.sysctls)]
        if module.loaded() and copyxid.present():
            with copyxid.connect() as kernel:
                if kernel.table():
                    kernel.flush()
                    outcome.done.append("emptied the slices table")
        if old is not None and old.module_loaded and module.loaded():
            if module.unload():
                outcome.done.append(f"unloaded module {copyxid.MODULE}")
            else:
                outcome.remarks.append(
                    f"module {copyxid.MODULE} stays loaded: {module.users()} rules of somebody "
                    "else's use it"
                )
        paths.state.unlink(missing_ok=True)
    return outcome


def _rules_left() -> list[tuple[rules.Family, Variant]]:
    return [
        (family, variant)
        for family in rules.families()
        for variant in rules.VARIANTS
        if not rules.snapshot(family, variant).empty
    ]


def _tidy_nft(old: State) -> None:
    for family in rules.FAMILIES:
        if made := old.made.get(str(family)):
            nftables.remove_if_empty(family, made.table, tuple(made.chains))


# -- slices -------------------------------------------------------------------


def requests(slices: Iterable[Slice]) -> list[Request]:
    """What the registry is asked for these slices."""
    return [Request(item.name, item.xid, item.where) for item in slices]


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
    with guard.lock(paths):
        steps.undo(paths)
        present = config.load(paths.config_dir)
        for item in present:
            if item.name == new.name:
                raise UsageError(
                    f"slice {new.name}: is there already: {item.where}",
                    "edit that file, then `vnet up`",
                )
        if new.file.exists():
            raise UsageError(
                f"{new.file}: is there already", "name the slice otherwise, or move that file away"
            )
        config.check([*present, new])
        paths.config_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        assignment = _apply(paths, [*present, new], rest_ns)
        # Last, since `vnet watch` reads the file as soon as it is there and
        # looks the number up.
        states.replace(new.file, config.write(new))
    return assignment.xids[new.name], paths.state.exists()


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
        content = found.file.read_text()
        found.file.unlink()
        try:
            assignment = _apply(paths, [item for item in present if item.name != name], rest_ns)
        except VnetError:
            states.replace(found.file, content)
            raise
    xid = next((tenure.xid for tenure in assignment.ended if tenure.slice == name), None)
    return xid, paths.state.exists()


def _apply(paths: Paths, slices: list[Slice], rest_ns: int) -> Assignment:
    """Registry and, on a node that is up, the table, in step with these slices."""
    assignment = registry.assign(paths.registry, requests(slices), time.time_ns(), rest_ns)
    if paths.state.exists():
        root = cgroups.v2_root()
        notes = Journal(paths.journal)
        wanted, xids = entries(root, slices, assignment)
        try:
            steps.fill_table(notes, wanted, xids, root)
        except VnetError:
            steps.undo(paths)
            raise
        finally:
            notes.close()
        paths.journal.unlink(missing_ok=True)
    if assignment.ended:
        registry.release(paths.registry, assignment.ended, time.time_ns())
    return assignment


def require_root(what: str) -> None:
    if os.geteuid() != 0:
        raise NodeError(f"vnet {what}: only root may change the node", f"sudo vnet {what}")


def _require_plugin() -> None:
    directories = [rules.PLUGIN.parent, *rules.system_directories()]
    for directory in directories:
        plugin = directory / "libxt_MARK.so"
        if plugin.exists() and rules.is_ours(plugin):
            return
    raise NodeError(
        "iptables' plugin libxt_MARK.so with --copy-xid is in none of "
        + ", ".join(map(str, directories)),
        "build it: make -C vnet/ext/iptables, or install the package again",
    )
