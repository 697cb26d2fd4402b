"""The steps of ``up``: each finds what is not as asked, notes how to undo it, does it.

``undo`` reads those notes. Every step works on what it finds, so a second
``up`` changes nothing, and every undo may be done twice.
"""

import errno
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

import msgspec

from vnet import (
    bpfsteps,
    cgroups,
    copyxid,
    guard,
    journal,
    module,
    nftables,
    owners,
    readback,
    registry,
    rules,
    state,
    sysctls,
)
from vnet.datapath import Chain, Family
from vnet.errors import NetlinkError, NodeError, RulesError, VnetError
from vnet.iptables import Variant
from vnet.journal import Entry, Journal
from vnet.paths import Paths
from vnet.registry import Assignment, Request, Tenure
from vnet.rules import Snapshot
from vnet.state import Made, State


def assign(notes: Journal, paths: Paths, requests: Iterable[Request], rest_ns: int) -> Assignment:
    """The slices' numbers, held from now on. Raises ConflictError, RegistryError."""

    def note(found: Assignment) -> None:
        notes.add(
            "registry",
            opened=[astuple(one) for one in found.opened],
            ended=[astuple(one) for one in found.ended],
            members=found.members[0],
        )

    return registry.assign(paths.registry, requests, time.time_ns(), rest_ns, note)


def release(paths: Paths, found: Assignment) -> None:
    """End what ``assign`` found to be over, now that nothing is marked with it; its note holds."""
    if found.ended:
        registry.release(paths.registry, found.ended, time.time_ns())


def add_file(notes: Journal, path: Path, content: str) -> None:
    """A slice file that was not there. Raises OSError."""
    notes.add("file", path=str(path), content=content)
    state.replace(path, content)


def put_aside(notes: Journal, path: Path) -> None:
    """Take a slice file away, so that it can come back as it was. Raises OSError."""
    notes.add("file", path=str(path), content=None)
    path.rename(aside(path))


def aside(path: Path) -> Path:
    """Where ``put_aside`` puts a file; no name that slices are read from."""
    return path.with_name(f".{path.name}.old")


def load_module(notes: Journal, new: State) -> list[str]:
    """Load xt_copyxid unless it is there. Raises ModuleError, NodeError."""
    done = []
    if not module.loaded():
        notes.add("module")
        module.load()
        new.module_loaded = True
        done.append(f"loaded module {copyxid.MODULE}")
    if not copyxid.present():
        raise NodeError(
            f"module {copyxid.MODULE} is loaded, but does not answer here",
            "run this in the host's own (initial) network namespace",
        )
    return done


def wanted_entries(root: Path, paths: Mapping[str, int]) -> dict[int, int]:
    """{cgroup id: xid} for the cgroups that exist, of {path: xid}."""
    return {number: paths[path] for path, number in cgroups.ids(root, list(paths)).items()}


def fill_table(notes: Journal, wanted: Mapping[int, int], xids: set[int]) -> list[str]:
    """Make the module's table what the slices say. Raises NetlinkError."""
    with copyxid.connect() as kernel:
        found = {number: entry.xid for number, entry in kernel.table().items()}
        to_set, to_delete = owners.table_changes(found, wanted, xids)
        if not to_set and not to_delete:
            return []
        touched = [*to_set, *to_delete]
        notes.add("table", before={str(number): found.get(number) for number in touched})
        _write_table(kernel, to_set, to_delete)
    done = []
    if to_set:
        done.append(f"set {len(to_set)} entries of the slices table")
    if to_delete:
        done.append(f"removed {len(to_delete)} entries of the slices table")
    return done


def _write_table(kernel: copyxid.Module, to_set: Mapping[int, int], to_delete: list[int]) -> None:
    refused = kernel.set_many(to_set) | kernel.delete_many(to_delete)
    for number, code in refused.items():
        # A cgroup that went away a moment ago has no packets to mark.
        if code != errno.ENOENT:
            raise NetlinkError(
                f"slices table: cgroup id {number}: the kernel says: {os.strerror(code)}", code
            )


def set_sysctls(notes: Journal, new: State) -> list[str]:
    """Switch conntrack's accounting on. Raises NodeError."""
    now = sysctls.read()
    wrong = {key: value for key, value in now.items() if value != sysctls.WANTED[key]}
    if not wrong:
        return []
    notes.add("sysctls", before={key: value for key, value in wrong.items() if value is not None})
    for key, value in wrong.items():
        sysctls.write(key, sysctls.WANTED[key])
        if value is not None:
            new.sysctls.setdefault(key, value)
    return [f"sysctl {key} = {sysctls.WANTED[key]} (was {value})" for key, value in wrong.items()]


#: family: the chains asked for
Wanted = Mapping[Family, Sequence[Chain]]


def install_rules(
    notes: Journal, new: State, variant: Variant, wanted: Wanted
) -> tuple[list[str], list[str]]:
    """Our chains in ``variant``, family by family, then out of the other variant.

    Returns (what was done, remarks). Raises RulesError.
    """
    done: list[str] = []
    remarks: list[str] = []
    changed: dict[Family, Sequence[Chain]] = {}
    for family, chains in wanted.items():
        then = rules.asked(chains)
        if not lead(notes, new, family, variant, then):
            continue
        done.append(f"rules for IPv{family} in tables {' and '.join(then)} ({variant})")
        if wrong := rules.differences(rules.snapshot(family, variant), then):
            raise RulesError(f"IPv{family} ({variant}), read back: " + "; ".join(wrong))
        changed[family] = chains
    if changed and variant == "legacy":
        differing, remark = readback.compare(changed)
        if differing:
            raise RulesError("; ".join(differing))
        remarks += [remark] if remark else []
    other: Variant = "nft" if variant == "legacy" else "legacy"
    for family in wanted:
        if lead(notes, new, family, other, rules.NOTHING):
            done.append(f"removed the rules for IPv{family} from the other variant ({other})")
    return done, remarks


def lead(notes: Journal, new: State, family: Family, variant: Variant, then: Snapshot) -> bool:
    """Lead one family of one variant to ``then``. False: it was so already."""
    now = rules.snapshot(family, variant)
    if not rules.script(now, then):
        return False
    if variant == "legacy":
        notes.add("rules", family=family, variant=variant, before=_plain(now))
        rules.change(family, variant, now, then)
        return True
    before = nftables.bases(family)
    notes.add(
        "rules",
        family=family,
        variant=variant,
        before=_plain(now),
        bases={"tables": list(before.tables), "chains": list(before.chains)},
    )
    rules.change(family, variant, now, then)
    made = new.made.get(str(family), Made())
    if rules.is_empty(then):
        nftables.remove_if_empty(family, made.tables, made.chains)
        new.made.pop(str(family), None)
    else:
        after = nftables.bases(family)
        tables = {*made.tables, *after.tables} - set(before.tables) | set(made.tables)
        chains = {*made.chains, *after.chains} - set(before.chains) | set(made.chains)
        new.made[str(family)] = Made(sorted(tables), sorted(chains))
    return True


def write_state(notes: Journal, paths: Paths, new: State, old_text: str | None) -> None:
    """Write state.json if it changes."""
    content = state.dump(new)
    if content != old_text:
        notes.add("state", before=old_text)
        state.replace(paths.state, content)


# -- and back -----------------------------------------------------------------


def _plain(snapshot: Snapshot) -> dict[str, object]:
    return {
        name: {"chains": table.chains, "jumps": table.jumps} for name, table in snapshot.items()
    }


#: after these packets may have the numbers that ``assign`` gave
_MARKING = {"table", "policy", "interfaces"}


def _undo_registry(paths: Paths, entry: Entry) -> None:
    noted = {one["step"] for one in journal.read(paths.journal)}
    registry.take_back(
        paths.registry,
        [Tenure(*row) for row in entry["opened"]],
        [Tenure(*row) for row in entry["ended"]],
        [(name, user) for name, user in entry["members"]],
        time.time_ns() if noted & _MARKING else None,
    )


def _undo_file(_paths: Paths, entry: Entry) -> None:
    """What somebody has written there since stays."""
    path, old = Path(entry["path"]), aside(Path(entry["path"]))
    # Looked at first: a file system that is read-only by now refuses to take nothing away.
    if entry["content"] is None:
        if os.path.lexists(old):
            if os.path.lexists(path):
                old.unlink()
            else:
                old.rename(path)
        return
    draft = state.draft_of(path)
    if draft.exists():
        draft.unlink()
    if path.exists() and path.read_bytes() == entry["content"].encode():
        path.unlink()


def _undo_module(_paths: Paths, _entry: Entry) -> None:
    module.unload()


def _undo_table(_paths: Paths, entry: Entry) -> None:
    if not module.loaded():
        return
    before: dict[str, int | None] = entry["before"]
    with copyxid.connect() as kernel:
        _write_table(
            kernel,
            {int(number): xid for number, xid in before.items() if xid is not None},
            [int(number) for number, xid in before.items() if xid is None],
        )


def _undo_sysctls(_paths: Paths, entry: Entry) -> None:
    sysctls.restore(entry["before"])


def _undo_rules(_paths: Paths, entry: Entry) -> None:
    family, variant = entry["family"], entry["variant"]
    then = msgspec.convert(entry["before"], dict[str, rules.Table])
    rules.change(family, variant, rules.snapshot(family, variant), then)
    if variant == "nft":
        before, now = entry["bases"], nftables.bases(family)
        nftables.remove_if_empty(
            family,
            [table for table in now.tables if table not in before["tables"]],
            [chain for chain in now.chains if chain not in before["chains"]],
        )


def _undo_state(paths: Paths, entry: Entry) -> None:
    state.draft_of(paths.state).unlink(missing_ok=True)
    if entry["before"] is None:
        paths.state.unlink(missing_ok=True)
    else:
        state.replace(paths.state, entry["before"])


_UNDO: dict[str, Callable[[Paths, Entry], None]] = bpfsteps.UNDO | {
    "registry": _undo_registry,
    "file": _undo_file,
    "module": _undo_module,
    "table": _undo_table,
    "sysctls": _undo_sysctls,
    "rules": _undo_rules,
    "state": _undo_state,
    "down": lambda _paths, _entry: None,  # it goes by what it finds, and is run again
}


def finish(paths: Paths, notes: Journal) -> None:
    """All is in place: without a journal nothing will be undone."""
    guard.ignore_stops()  # or what is done would be said to be undone
    notes.close()
    paths.journal.unlink(missing_ok=True)


def undo(paths: Paths) -> bool:
    """Undo what the journal says, the last first. False: there is no journal.

    Raises NodeError if some of it cannot be undone; the journal then stays.
    """
    if not paths.journal.exists():
        return False
    problems: list[str] = []
    for entry in reversed(journal.read(paths.journal)):
        if problems and entry["step"] == "registry":
            continue  # what may still be marked keeps its name
        if entry["step"] not in _UNDO:
            problems.append(f"{entry['step']}: another version of vnet has begun that")
            continue
        try:
            _UNDO[entry["step"]](paths, entry)
        except (VnetError, OSError) as error:
            problems.append(f"{entry['step']}: {getattr(error, 'message', error)}")
    if problems:
        raise NodeError(
            "what was begun could not be undone:\n  " + "\n  ".join(problems),
            f"cure that, then run `vnet down`; {paths.journal} knows what is left",
        )
    paths.journal.unlink()
    return True
