"""What is asked, what the kernel holds, and where they differ. Changes nothing."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vnet import (
    bpf,
    bpfsteps,
    cgroups,
    config,
    containers,
    copyxid,
    guard,
    iptables,
    module,
    nodeconfig,
    owners,
    policy,
    refusals,
    registry,
    rules,
    sysctls,
)
from vnet import state as states
from vnet.config import Slice
from vnet.datapath import DIFFERENCES, Family, counters
from vnet.errors import VnetError
from vnet.iptables import Variant
from vnet.paths import Paths
from vnet.state import State


@dataclass
class Status:
    """All of ``vnet status --json``."""

    up: bool = False  #: `vnet up` ended well, and no `vnet down` came since
    whole: bool = False  #: up, and nothing differs
    since: int | None = None  #: ns UTC
    variant: str | None = None
    datapath: str | None = None
    why: str = ""  #: this data path
    known_differences: list[str] = field(default_factory=list)  #: of this data path
    guard: str | None = None  #: enforce or observe, as the kernel has it
    guard_configured: str | None = None  #: what the next `vnet up` would make it
    packet_sockets: str | None = None  #: guarded, or unguarded: the guard is partial
    instance: str | None = None  #: the eBPF programs' directory
    module: bool = False
    module_users: int = 0  #: rules that use it
    slices: int = 0
    cgroups: int = 0  #: of the slices
    cgroups_present: int = 0
    entries: int = 0  #: of the table the marks go by
    lingering: int = 0  #: of these: of cgroups that are gone
    reserved_ports: int = 0
    reserved_addresses: int = 0
    interfaces_missing: list[str] = field(default_factory=list)  #: of containers, not there yet
    sysctls: dict[str, str | None] = field(default_factory=dict)
    rules: dict[str, bool] = field(default_factory=dict)  #: "IPv4", "IPv6": in place
    counters: dict[str, int] = field(default_factory=dict)  #: packets, all namespaces
    namespaces: list[dict[str, Any]] = field(default_factory=list)
    refusals: list[dict[str, Any]] = field(default_factory=list)  #: by slice and kind
    differences: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def look(paths: Paths) -> Status:
    """Look at everything. What cannot be read is a difference, not an error."""
    found = Status(sysctls=sysctls.read(), module=module.loaded(), module_users=module.users())
    state = states.load(paths.state)
    if paths.journal.exists():
        found.differences.append(
            "a command that changes the node is at work right now"
            if guard.busy(paths)
            else "a command was killed half-way: the next `vnet up` or `vnet down` undoes it first"
        )
    if state is not None:
        found.up, found.since, found.variant = True, state.since, state.variant
        found.datapath, found.why, found.instance = state.datapath, state.why, state.instance
        found.packet_sockets = state.packet_sockets
        found.known_differences = list(DIFFERENCES[state.datapath])
    for look_at in (_slices, _instance, _settings, _rules):
        try:
            look_at(found, paths, state)
        except VnetError as error:
            found.differences.append(error.message)
    found.whole = found.up and not found.differences
    return found


Kind = Literal["policy", "interfaces", "reserved"]
"""What a difference from the slices' files is about: table and policy, the filters of containers'
interfaces, or the ports that the kernel picks for nobody."""
ByKind = dict[Kind, list[str]]


def policy_differences(paths: Paths) -> ByKind:
    """Where the kernel differs from the slices' files."""
    return _by_kind(Status(module=module.loaded()), paths, states.load(paths.state))


def _slices(found: Status, paths: Paths, state: State | None) -> None:
    for lines in _by_kind(found, paths, state).values():
        found.differences += lines


def _by_kind(found: Status, paths: Paths, state: State | None) -> ByKind:
    wrong: ByKind = {"policy": [], "interfaces": [], "reserved": []}
    try:
        _compare(found, wrong, paths, state)
    except VnetError as error:
        wrong["policy"].append(error.message)
    return wrong


def _compare(found: Status, wrong: ByKind, paths: Paths, state: State | None) -> None:
    slices = config.load(paths.config_dir)
    root = cgroups.v2_root()
    xids = current_xids(paths)
    found.slices = len(slices)
    found.cgroups = sum(len(item.cgroups) for item in slices)
    ids = cgroups.ids(root, [path for item in slices for path in item.cgroups])
    found.cgroups_present = len(ids)
    if found.module and (state is None or state.datapath == "module"):
        with copyxid.connect() as kernel:
            table = {number: entry.xid for number, entry in kernel.table().items()}
            stats = kernel.stats()
        found.entries = len(table)
        found.namespaces = [asdict(item) for item in stats]
        found.counters = {
            name: sum(item.counters.get(name, 0) for item in stats) for name in copyxid.COUNTERS
        }
    if state is None:
        return
    if state.datapath == "module":
        if found.module:
            wrong["policy"] += _compare_table(found, slices, xids, ids, table, root)
        else:
            wrong["policy"].append(f"module {copyxid.MODULE} is not loaded")
    if state.instance:
        _policy(found, wrong, paths, state, slices, xids, ids, root)


def _policy(
    found: Status,
    wrong: ByKind,
    paths: Paths,
    state: State,
    slices: list[Slice],
    xids: dict[str, int],
    ids: dict[str, int],
    root: Path,
) -> None:
    """The policy in force against the slices' files."""
    instance = Path(state.instance)
    now = policy.read(instance)
    found.guard = "observe" if now.observe else "enforce"
    found.guard_configured = nodeconfig.load(paths.node_config).mode
    found.reserved_ports, found.reserved_addresses = len(now.ports), len(now.addresses)
    if state.datapath == "bpf":
        found.entries = len(now.slices)
        wrong["policy"] += _compare_table(found, slices, xids, ids, now.slices, root)
    wrong["policy"] += policy.differences(instance)
    numbered = [item for item in slices if item.name in xids]
    wanted = bpfsteps.wanted_policy(numbered, xids, now.slices, state.mode)
    if now.observe != wanted.observe:
        wrong["policy"].append(f"the guard is in mode {found.guard}, not {state.mode}")
    if now.grants != wanted.grants:
        wrong["policy"].append("the grants of raw sockets in force are not those in the files")
    if set(now.ports) != set(wanted.ports):
        wrong["policy"].append("the reserved ports in force are not those in the files")
    if now.addresses != wanted.addresses:
        wrong["policy"].append("the reserved addresses in force are not those in the files")
    interfaces = bpfsteps.wanted_interfaces(numbered, xids)
    found.interfaces_missing = containers.missing(interfaces)
    wrong["interfaces"] += containers.healthy(instance, interfaces)
    with registry.open_readonly(paths.registry) as known:
        if known.users() != {item.name: sorted(item.users) for item in slices if item.users}:
            wrong["policy"].append("the slices' users in the registry are not those in the files")
    missing = {port.port for port, _xid in now.ports} - sysctls.reserved_ports()
    if missing:
        wrong["reserved"].append(
            f"sysctl {sysctls.RESERVED} lacks {sysctls.format_ports(missing)}: the kernel may pick "
            "these ports for anybody"
        )


def _instance(found: Status, paths: Paths, state: State | None) -> None:
    """The eBPF programs: attached, of this version, alone; and what they refused."""
    instances = bpf.instances(paths.bpf_dir)
    if state is None:
        found.differences += [f"{path} is there, and should not be" for path in instances]
        return
    if not state.instance:
        found.differences.append("an older vnet brought the node up, without the guard")
        return
    instance = Path(state.instance)
    found.differences += [
        f"{path}: programs of another version are there too"
        for path in instances
        if path != instance
    ]
    if instance.name != bpf.version():
        found.differences.append(
            f"the eBPF programs in force are of another version ({instance.name}) than this "
            f"vnet's ({bpf.version()})"
        )
    else:
        found.differences += bpf.healthy(instance, state.packet_sockets == "guarded")
    names = {xid: name for name, xid in current_xids(paths).items()}
    found.refusals = [
        {"slice": names.get(count.xid), **asdict(count)} for count in refusals.read(instance)
    ]


def _compare_table(
    found: Status,
    slices: list[Slice],
    xids: dict[str, int],
    ids: dict[str, int],
    table: dict[int, int],
    root: Path,
) -> list[str]:
    """Where a table of slices is not as the files say; counts what lingers in it."""
    wanted: dict[int, int] = {}
    wrong: list[str] = []
    for item in slices:
        xid = xids.get(item.name)
        if xid is None or (item.xid is not None and item.xid != xid):
            wrong.append(f"slice {item.name} has no number yet")
            continue
        for path in item.cgroups:
            if (number := ids.get(path)) is None:
                continue
            wanted[number] = xid
            if number not in table:
                wrong.append(f"slice {item.name}: {path} (id {number}) is not in the table")
            elif table[number] != xid:
                wrong.append(f"slice {item.name}: {path} is marked {table[number]}, not {xid}")
    _set, extra = owners.table_changes(table, wanted, set(xids.values()))
    wrong += [f"the table has cgroup id {number}, which is no slice's" for number in extra]
    found.lingering = len(set(table) - set(wanted)) - len(extra)
    return wrong[:10] + ([f"and {len(wrong) - 10} more in the table"] if len(wrong) > 10 else [])


def _settings(found: Status, _paths: Paths, state: State | None) -> None:
    if state is None:
        return
    for key, value in found.sysctls.items():
        if value != sysctls.WANTED[key]:
            found.differences.append(f"sysctl {key} is {value}, not {sysctls.WANTED[key]}")


def _rules(found: Status, _paths: Paths, state: State | None) -> None:
    for family in iptables.families():
        for variant in iptables.VARIANTS:
            wrong = rule_differences(state, family, variant)
            if state is not None and state.variant == variant:
                found.rules[f"IPv{family}"] = not wrong
            found.differences += wrong
    if state is not None and state.datapath == "bpf":
        found.counters = counters(
            (rules.save_counted(family, state.variant) for family in iptables.families()),
            bpf.settled(Path(state.instance)),
        )


def rule_differences(state: State | None, family: Family, variant: Variant) -> list[str]:
    """How rules of ours, in one family and variant, are not as a node in this state has them."""
    asked = rules.NOTHING
    if state is not None and state.variant == variant:
        asked = rules.asked(states.chains(state, family))
    wrong = rules.differences(rules.snapshot(family, variant), asked)
    return [f"IPv{family} ({variant}): {words}" for words in wrong]


def current_xids(paths: Paths) -> dict[str, int]:
    """{slice: xid} as the registry has it now; empty before the first ``up``."""
    try:
        with registry.open_readonly(paths.registry) as known:
            return {name: tenure.xid for name, tenure in known.held().items()}
    except FileNotFoundError:
        return {}


def listing(paths: Paths) -> list[dict[str, Any]]:
    """``vnet slice ls``: every slice with its number, its cgroups and their ids."""
    slices = config.load(paths.config_dir)
    root = cgroups.v2_root()
    try:
        with registry.open_readonly(paths.registry) as known:
            held = known.held()
    except FileNotFoundError:
        held = {}
    rows = []
    for item in slices:
        tenure = held.get(item.name)
        rows.append(
            {
                "name": item.name,
                "xid": tenure.xid if tenure else item.xid,
                "since": tenure.since if tenure else None,
                "cgroups": [
                    {"path": path, "id": cgroups.cgroup_id(root, path)} for path in item.cgroups
                ],
                "raw": item.grants.raw,
                "ports": [str(grant) for grant in item.grants.ports],
                "addresses": [str(address) for address in item.grants.addresses],
                "interfaces": list(item.interfaces),
                "users": list(item.users),
                "file": str(item.file),
            }
        )
    return rows


def age(since_ns: int) -> str:
    """How long ago, for people."""
    seconds = max(0, time.time_ns() - since_ns) // 10**9
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
