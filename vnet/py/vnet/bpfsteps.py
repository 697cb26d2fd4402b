"""The steps of ``up`` that concern the eBPF programs: bpffs, instance, policy, ports, sockets.

As in ``steps``: each finds what is not as asked, notes how to undo it, does it.
"""

import ctypes
import os
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path

from vnet import adopt, bpf, containers, events, owners, policy, sysctls
from vnet.config import Slice
from vnet.errors import BpfError
from vnet.journal import Entry, Journal
from vnet.nodeconfig import Mode
from vnet.paths import Paths
from vnet.policy import PROTOCOLS, Control, Policy, Port
from vnet.state import State

# -- bpffs --------------------------------------------------------------------

#: where systemd mounts one
BPFFS = Path("/sys/fs/bpf")
#: in every bpffs (kernel/bpf/preload)
_KERNELS_OWN = {"maps.debug", "progs.debug"}


def mount(notes: Journal, paths: Paths, new: State) -> list[str]:
    """Have a bpffs, in which the pins live, at its usual place. Raises BpfError."""
    if bpf.is_bpffs(paths.bpf_dir):
        return []
    notes.add("bpffs")
    if not bpf.mount(paths.bpf_dir, BPFFS):
        return []  # somewhere else: ``bpf.load`` says that it is no bpffs
    new.bpffs = True
    return [f"mounted bpffs on {BPFFS}"]


def unmount() -> bool:
    """Unmount the bpffs at its usual place if it is empty. False: it stays."""
    if not bpf.is_bpffs(BPFFS) or {path.name for path in BPFFS.iterdir()} - _KERNELS_OWN:
        return False
    return bool(ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(BPFFS), 0) == 0)


_BATCHES = 20
"""of events: more than a ring holds, if one should be filled meanwhile"""


# -- the instance -------------------------------------------------------------


def load(notes: Journal, paths: Paths, new: State, lsm: bool) -> list[str]:
    """The instance of this version's programs, attached. Raises BpfError.

    One of another version stays beside it until the rules have left it.
    """
    before = bpf.instances(paths.bpf_dir)
    notes.add("instance", before=[str(path) for path in before])
    containers.prepare()
    try:
        instance = bpf.load(paths.bpf_dir, lsm)
    except BpfError as error:
        raise BpfError(
            f"the guard, which every data path needs, cannot be put in place: {error.message}",
            error.cure,
        ) from error
    new.instance = str(instance)
    return [] if instance in before else [f"loaded the eBPF programs into {instance}"]


def _keep_events(paths: Paths) -> None:
    """Write down what the rings still hold: an instance's ring goes with it."""
    with suppress(OSError), closing(events.Drain(paths)) as drain:
        for _ in range(_BATCHES):
            if not drain.drain(wait=True):
                break


def remove_others(paths: Paths, instance: str) -> list[str]:
    """Remove the instances that no rule leads to any more."""
    done = []
    others = [path for path in bpf.instances(paths.bpf_dir) if str(path) != instance]
    if others:
        _keep_events(paths)
    for path in others:
        # Interfaces that only the slices of back then had.
        done += containers.remove(path, Path(instance))
        bpf.remove(path)
        done.append(f"removed the eBPF programs in {path}")
    return done


# -- the policy ---------------------------------------------------------------


def wanted_policy(
    slices: Iterable[Slice], xids: Mapping[str, int], entries: Mapping[int, int], mode: Mode
) -> Policy:
    """What the slices' files ask for. ``entries`` is {cgroup id: xid}."""
    items = [(item.grants, xids[item.name]) for item in slices]
    return Policy(
        slices=dict(entries),
        grants={xid: grants.raw for grants, xid in items if grants.raw != "deny"},
        ports=[
            (Port(PROTOCOLS[port.proto], number, port.address), xid)
            for grants, xid in items
            for port in grants.ports
            for number in range(port.first, port.last + 1)
        ],
        addresses={address: xid for grants, xid in items for address in grants.addresses},
        observe=mode == "observe",
    )


def with_lingering(instance: Path, wanted: Mapping[int, int], xids: set[int]) -> dict[int, int]:
    """The entries wanted, and those in force whose cgroup is gone but not its sockets."""
    found = policy.read(instance).slices
    to_set, to_delete = owners.table_changes(found, wanted, xids)
    return {number: xid for number, xid in {**found, **to_set}.items() if number not in to_delete}


def apply(notes: Journal, instance: Path, wanted: Policy) -> list[str]:
    """Put a policy in force by one store. Raises BpfError.

    The one before it stays whole in the other generation: undoing is one
    store too.
    """
    if "own" in wanted.grants.values():
        _guard_hearing(notes, instance, True)
    if same(policy.read(instance), wanted):
        return []
    notes.add("policy", instance=str(instance), control=asdict(policy.control(instance)))
    policy.write(instance, wanted)
    return [
        f"put a policy in force: {len(wanted.slices)} cgroups, {len(wanted.ports)} ports and "
        f"{len(wanted.addresses)} addresses reserved"
    ]


def _guard_hearing(notes: Journal | None, instance: Path, on: bool) -> None:
    before = bpf.is_hearing_guarded(instance)
    if notes and before != on:
        notes.add("hearing", instance=str(instance), before=before)
    bpf.guard_hearing(instance, on)


def same(found: Policy, wanted: Policy) -> bool:
    """Whether two policies are one, in whatever order their ports are."""
    return replace(found, ports=sorted(found.ports, key=repr)) == replace(
        wanted, ports=sorted(wanted.ports, key=repr)
    )


# -- reserved ports -----------------------------------------------------------


def reserve(notes: Journal, new: State, slices: Iterable[Slice]) -> list[str]:
    """Keep the kernel from picking reserved ports by itself. Raises NodeError.

    Before the policy that reserves them is in force: then nobody gets one in
    between. What others reserved stays.
    """
    now = sysctls.reserved_ports()
    missing = _numbers(slices) - now
    if not missing:
        return []
    notes.add("reserved", before=sysctls.format_ports(now))
    sysctls.add_reserved(missing)
    new.reserved = sysctls.format_ports(sysctls.parse_ports(new.reserved) | missing)
    return [f"reserved {len(missing)} ports from being picked by the kernel"]


def release(notes: Journal, new: State, slices: Iterable[Slice]) -> list[str]:
    """Give back the ports that no slice reserves any more, after their policy is gone.

    Where what is left does not fit into one write, all stay until ``down``:
    otherwise reserved ones would be free for a moment.
    """
    extra = sysctls.parse_ports(new.reserved) - _numbers(slices)
    if not extra:
        return []
    now = sysctls.reserved_ports()
    if not sysctls.fits(now - extra):
        return []
    notes.add("reserved", before=sysctls.format_ports(now))
    sysctls.set_reserved(now - extra)
    new.reserved = sysctls.format_ports(sysctls.parse_ports(new.reserved) - extra)
    return [f"gave {len(extra)} ports back to the kernel"]


def _numbers(slices: Iterable[Slice]) -> set[int]:
    return {
        number
        for item in slices
        for port in item.grants.ports
        for number in range(port.first, port.last + 1)
    }


# -- interfaces of containers -------------------------------------------------


def wanted_interfaces(slices: Iterable[Slice], xids: Mapping[str, int]) -> dict[str, int]:
    """{host end of a veth: xid} that the slices' files ask for."""
    return {name: xids[item.name] for item in slices for name in item.interfaces}


def mark_interfaces(
    notes: Journal, new: State, wanted: dict[str, int], before: State | None
) -> list[str]:
    """Filters on the containers' veths that are there. Raises BpfError.

    ``before``: the state that the last ``up`` left, whose filters another
    version's replace.
    """
    instance = Path(new.instance)
    old = (before.instance, before.interfaces) if before else ("", {})
    if wanted or old[1]:
        notes.add("interfaces", instance=new.instance, before=old)
    new.interfaces = wanted
    return containers.apply(instance, wanted)


# -- sockets, mode, and down --------------------------------------------------


def adopt_sockets(instance: Path, notes: Journal | None = None) -> tuple[list[str], list[str]]:
    """Give sockets that are older than the policy in force the marks it gives.

    Raw sockets among them that may not hear everything are kept from it, as
    long as there are any: slices with ``deny`` get no new ones. Returns (what
    was done, remarks). Called with the lock held.
    """
    found = adopt.adopt()
    grants = policy.read_grants(instance)
    _guard_hearing(
        notes,
        instance,
        "own" in grants.values()
        or found.unreached > 0
        or found.cut
        or any(xid and grants.get(xid) != "full" for xid in found.raw),
    )
    done = [f"marked {found.sockets} sockets that were older"] if found.sockets else []
    remarks = []
    if found.refused:
        pids = ", ".join(map(str, sorted(found.refused)[:5]))
        remarks.append(
            f"the sockets of {len(found.refused)} processes ({pids}) could not be reached; older "
            "ones of a slice keep the mark they have: see /proc/sys/kernel/yama/ptrace_scope"
        )
    if found.cut:
        remarks.append(
            "there are too many open files and sockets on this machine to look at all of them in "
            "time: some sockets that are older than their slice may keep the mark they have, and "
            "the guard then stops what they send; `vnet up` tries again"
        )
    if found.locked:
        which = [f"socket:[{inode}] of process {pid}" for inode, pid in found.locked.items()]
        more = f" and {len(which) - 5} more" if len(which) > 5 else ""
        remarks.append(
            f"somebody keeps {', '.join(which[:5])}{more} locked, sending from memory that does "
            "not come (FUSE, userfaultfd): until that ends, or the process is killed, it keeps "
            "the mark it has"
        )
    return done, remarks


def switch(instance: Path, mode: Mode) -> None:
    """Have the guard enforce or observe from now on: one store. Raises BpfError."""
    now = policy.control(instance)
    policy.set_control(instance, replace(now, observe=mode == "observe"))


def mode(instance: Path) -> Mode:
    """What the guard does now. Raises BpfError."""
    return "observe" if policy.control(instance).observe else "enforce"


def take_away(paths: Paths, old: State | None) -> list[str]:
    """Everything of ours, after the rules that led to it. May be done again."""
    done = []
    bpf.sweep(paths.bpf_dir)
    # Perhaps another version's: of its maps we may know nothing.
    instances = bpf.instances(paths.bpf_dir)
    for instance in instances:
        done += containers.remove(instance)
        bpf.detach(instance)
    if instances:
        # Nothing gives a socket its xid any more, and so none keeps one.
        adopt.adopt()
        _keep_events(paths)
    for instance in instances:
        bpf.remove(instance)
        done.append(f"removed the eBPF programs in {instance}")
    if old is None:
        return done
    if ours := sysctls.parse_ports(old.reserved):
        sysctls.set_reserved(sysctls.reserved_ports() - ours)
        done.append(f"gave {len(ours)} ports back to the kernel")
    if old.bpffs and unmount():
        done.append(f"unmounted bpffs from {BPFFS}")
    return done


# -- and back -----------------------------------------------------------------


def _undo_bpffs(_paths: Paths, _entry: Entry) -> None:
    unmount()


def _undo_instance(paths: Paths, entry: Entry) -> None:
    bpf.sweep(paths.bpf_dir)
    for path in bpf.instances(paths.bpf_dir):
        if str(path) not in entry["before"]:
            bpf.remove(path)
    with suppress(OSError):  # it is a mount's root, or holds something
        paths.bpf_dir.rmdir()


def _undo_policy(_paths: Paths, entry: Entry) -> None:
    instance = Path(entry["instance"])
    if instance.exists():
        policy.set_control(instance, Control(**entry["control"]))
        adopt.adopt()


def _undo_hearing(_paths: Paths, entry: Entry) -> None:
    instance = Path(entry["instance"])
    if instance.exists():
        bpf.guard_hearing(instance, entry["before"])


def _undo_interfaces(_paths: Paths, entry: Entry) -> None:
    instance, (old, before) = Path(entry["instance"]), entry["before"]
    if instance.exists():
        containers.apply(instance, before if old == entry["instance"] else {})
    if old and old != entry["instance"] and Path(old).exists():
        containers.apply(Path(old), before)


def _undo_reserved(_paths: Paths, entry: Entry) -> None:
    sysctls.set_reserved(sysctls.parse_ports(entry["before"]))


UNDO = {
    "bpffs": _undo_bpffs,
    "instance": _undo_instance,
    "policy": _undo_policy,
    "hearing": _undo_hearing,
    "reserved": _undo_reserved,
    "interfaces": _undo_interfaces,
}
