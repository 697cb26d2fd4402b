"""Every protection of a node, and how to break it; for the tests of ``vnet check``.

The list is made from what the node is made of: the programs of the objects, the
rules of its data path, the sysctls, the tables of its policy, its containers'
filters. What is broken is put back as it was.
"""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from vnet.bpfmaps import lib
from vnet.check.bed import Bed, look_before
from vnet.check.facts import Outcome
from vnet.check.run import PROPERTIES, attempts
from vnet.paths import Paths

from vnet import (
    bpf,
    bpfobjects,
    containers,
    copyxid,
    datapath,
    eventlog,
    guard,
    iptables,
    owners,
    policy,
    rules,
    state,
    sysctls,
)


@dataclass(frozen=True)
class Break:
    """One protection, and a block during which it is not there."""

    name: str
    broken: Callable[[], AbstractContextManager[None]]


def every(paths: Paths) -> list[Break]:
    """All protections of the node that is up in this namespace."""
    now = state.load(paths.state)
    assert now
    instance = Path(now.instance)
    return [
        *_links(paths, instance, now.packet_sockets == "guarded"),
        *_rules(paths, now, instance),
        *_sysctls(),
        *_policy(paths, instance),
        *(_module() if now.datapath == "module" else []),
        *_filters(instance),
        Break("watch", lambda: watch_stopped(paths)),
        Break("log of events", lambda: _log_not_written(paths)),
    ]


# -- programs -------------------------------------------------------------------


def programs(lsm: bool) -> list[bpfobjects.Program]:
    """Of every object."""
    return [each for name in bpfobjects.names(lsm) for each in bpfobjects.programs(name)]


def _links(paths: Paths, instance: Path, lsm: bool) -> list[Break]:
    return [
        Break(f"link {each.name}", lambda each=each: _unlinked(paths, instance, each, lsm))
        for each in programs(lsm)
        if each.attached
    ]


@contextmanager
def _unlinked(paths: Paths, instance: Path, each: bpfobjects.Program, lsm: bool) -> Iterator[None]:
    path = instance / "links" / each.name
    # `vnet watch` attaches one of them itself, once it has seen to older sockets.
    with guard.lock(paths):
        fd = lib.bpf_obj_get(os.fsencode(path))
        assert fd >= 0
        path.unlink()
        lib.bpf_link_detach(fd)  # not of an LSM program (EOPNOTSUPP): that goes with its descriptor
        os.close(fd)
    try:
        yield
    finally:
        with guard.lock(paths):
            if each.name == bpf.HEARING:  # not an attachment that is always there
                bpf.guard_hearing(instance, True)
            bpf._attach(instance, lsm)
            assert bpf.healthy(instance, lsm) == []


# -- rules ----------------------------------------------------------------------


def _rules(paths: Paths, now: state.State, instance: Path) -> list[Break]:
    found = []
    chains = datapath.wanted(now.datapath, instance, 4, containers=bool(now.interfaces))
    asked = rules.asked(chains)
    for chain in chains:
        for place, _condition in asked[chain.table].jumps.get(chain.name, []):
            jump = (chain.table, chain.base, place, chain.jump)
            name = f"rule {chain.base} {short(chain.jump)}"
            found.append(Break(name, _without(paths, now, jump)))
        for number, rule in enumerate(chain.rules, 1):
            if not re.search(r"(^| )-[jg] ", rule):
                continue  # it counts, and does nothing
            if rule == "-j RETURN" and number == len(chain.rules):
                continue  # so does this
            at = (chain.table, chain.name, number, rule)
            found.append(Break(f"rule {chain.name} {short(rule)}", _without(paths, now, at)))
    return found


def short(rule: str) -> str:
    """A rule without the instance's path."""
    return re.sub(r"--object-pinned \S+/", "", rule)


def _without(
    paths: Paths, now: state.State, at: tuple[str, str, int, str]
) -> Callable[[], AbstractContextManager[None]]:
    table, chain, number, rule = at

    @contextmanager
    def broken() -> Iterator[None]:
        with _unrepaired(paths):
            for tool in _tools(now):
                _run(tool, "-w", "-t", table, "-D", chain, str(number))
            try:
                yield
            finally:
                for tool in _tools(now):
                    _run(tool, "-w", "-t", table, "-I", chain, str(number), *rule.split())

    return broken


@contextmanager
def _unrepaired(paths: Paths) -> Iterator[None]:
    """``vnet watch`` puts no rule back while a command is half-way, as its journal says."""
    gone = paths.journal.with_name("broken")
    # Not in the middle of a repair, which would take the journal for its own and undo it.
    with guard.lock(paths, seconds=30):
        ours = not paths.journal.exists()
        paths.journal.touch()
    try:
        yield
    finally:
        if ours:
            # Under another name: a journal that goes has it fill all tables anew, which
            # may be what the next break is about.
            paths.journal.rename(gone)
            gone.unlink()


def _tools(now: state.State) -> list[str]:
    names = {4: "iptables", 6: "ip6tables"}
    return [f"{names[family]}-{now.variant}" for family in iptables.families()]


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, env=iptables.environment(), capture_output=True, text=True)


# -- settings --------------------------------------------------------------------


def _sysctls() -> list[Break]:
    found = [Break(f"sysctl {key}", lambda key=key: _set_to_0(key)) for key in sysctls.WANTED]
    return [*found, Break(f"sysctl {sysctls.RESERVED}", _nothing_reserved)]


@contextmanager
def _set_to_0(key: str) -> Iterator[None]:
    sysctls.write(key, "0")
    try:
        yield
    finally:
        sysctls.write(key, sysctls.WANTED[key])


@contextmanager
def _nothing_reserved() -> Iterator[None]:
    before = sysctls.reserved_ports()
    sysctls.set_reserved(set())
    try:
        yield
    finally:
        sysctls.set_reserved(before)


# -- policy -----------------------------------------------------------------------


def _policy(paths: Paths, instance: Path) -> list[Break]:
    empty = policy.Policy()
    fields = ("slices", "grants", "ports", "addresses")
    found = [
        Break(
            f"policy {name}",
            lambda name=name: _other(paths, instance, {name: getattr(empty, name)}),
        )
        for name in fields
    ]
    return [
        *found,
        Break("policy observe", lambda: _other(paths, instance, {"observe": True})),
        Break("policy levels", lambda: _not_looked_for(paths, instance)),
    ]


def set_facts(instance: Path, **change: int) -> None:
    """Change what the programs look at before they look into the tables."""
    with policy._maps(instance) as maps:
        now = maps.control().generation
        facts = dict(zip(("levels", "cookie", "ports", "addresses"), maps.facts(now), strict=True))
        maps.maps["facts"].set(
            policy._U32.pack(now), policy._FACTS.pack(*(facts | change).values())
        )


@contextmanager
def _not_looked_for(paths: Paths, instance: Path) -> Iterator[None]:
    """The tables are whole, and no program looks for anybody's slice in them."""
    with guard.lock(paths), policy._maps(instance) as maps:
        set_facts(instance, levels=0)
        owners.fill(maps.directory, maps.control().generation, {})
    try:
        yield
    finally:
        with guard.lock(paths):
            policy.write(instance, policy.read(instance))


@contextmanager
def _other(paths: Paths, instance: Path, change: dict[str, object]) -> Iterator[None]:
    with guard.lock(paths):
        before = policy.read(instance)
        policy.write(instance, replace(before, **change))
    try:
        yield
    finally:
        with guard.lock(paths):
            now = policy.read(instance)
            back = {name: getattr(before, name) for name in change}
            if "slices" in change:  # a cgroup may have been made again meanwhile
                back["slices"] = before.slices | now.slices
            policy.write(instance, replace(now, **back))


def _module() -> list[Break]:
    return [Break("table of the module", _no_table)]


@contextmanager
def _no_table() -> Iterator[None]:
    with copyxid.connect() as kernel:
        before = {number: entry.xid for number, entry in kernel.table().items()}
        kernel.flush()
    try:
        yield
    finally:
        with copyxid.connect() as kernel:
            kernel.set_many(before)


def _filters(instance: Path) -> list[Break]:
    return [
        Break(f"filter {name}", lambda name=name: _unfiltered(instance, name))
        for name in containers._SIDES
    ]


@contextmanager
def _unfiltered(instance: Path, program: str) -> Iterator[None]:
    with containers._interfaces(instance) as table:
        wanted = containers._entries(table)
    names = {}
    with containers._kernel(instance) as kernel:
        names = {index: name for name, index in kernel.indexes().items()}
        for index in wanted:
            kernel.route.tc(
                "del-filter",
                "bpf",
                index,
                handle=containers.HANDLE,
                parent=containers._SIDES[program],
                protocol=containers._ETH_P_ALL,
                prio=containers.PRIORITY,
            )
    try:
        yield
    finally:
        containers.apply(instance, {names[index]: entry.xid for index, entry in wanted.items()})


@contextmanager
def watch_stopped(paths: Paths) -> Iterator[None]:
    """SIGSTOP: it is there, and does nothing."""
    found = subprocess.run(
        ["pgrep", "-f", f"{paths.run_dir} .* watch$"], capture_output=True, text=True, check=True
    ).stdout.split()
    for pid in found:
        with suppress(ProcessLookupError):  # a child of its own that has ended
            os.kill(int(pid), signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGCONT)


@contextmanager
def _log_not_written(paths: Paths) -> Iterator[None]:
    """What is in it can still be read."""
    log = eventlog.path(paths)
    log.touch()
    _run("mount", "--bind", str(log), str(log))
    try:
        _run("mount", "-o", "remount,bind,ro", str(log))
        yield
    finally:
        _run("umount", str(log))


# -- what the checker says ----------------------------------------------------------


def fell(bed: Bed, names: Sequence[str] = (), patience: float = 1.5) -> dict[str, list[Outcome]]:
    """The properties (all, or of these) that do not hold now, with what fell of them."""
    bed.patience = patience
    _run("conntrack", "-F")  # what was begun before is not meant
    bed.before = look_before(bed.paths, bed.instance)
    found = {}
    for each in PROPERTIES:
        if names and each.name not in names:
            continue
        if bad := [o for o in attempts(bed, each) if o.verdict == "fell"]:
            found[each.name] = bad
    return found
