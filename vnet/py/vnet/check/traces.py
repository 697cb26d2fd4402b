"""What a check leaves behind: the node as it was, and nothing of its own.

Others go on with their work meanwhile: what they add is no trace, and what a
restarting unit sets right a moment later is waited for.
"""

import os
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from vnet import config, copyxid, policy, status, sysctls
from vnet.check.bed import CANARY, FILE, Bed
from vnet.check.facts import Outcome, Property
from vnet.errors import VnetError
from vnet.paths import Paths
from vnet.testing import cgroup, net
from vnet.testing.net import HERE
from vnet.testing.poll import until

AS_BEFORE = Property(
    "node-as-before",
    "Who checks a node that people use must leave it as it was.",
    lambda t: None,  # asked when the canaries are gone: outcomes()
    families=(),
)


@dataclass(frozen=True)
class Traces:
    """What may not be otherwise after a check."""

    files: dict[str, bytes] = field(default_factory=dict)
    """The slices' files, by their names."""
    xids: dict[str, int] = field(default_factory=dict)
    differences: frozenset[str] = frozenset()
    """What of rules, settings, programs, policy and table is not as asked."""
    reserved: frozenset[int] = frozenset()
    """Ports that the kernel gives to nobody who asks for none."""
    ours: frozenset[str] = frozenset()
    """Cgroups, namespaces, interfaces and tables of this process."""


def look(paths: Paths) -> Traces:
    """Look at a node, and change nothing."""
    return Traces(
        {path.name: path.read_bytes() for path in config.files(paths.config_dir)},
        status.current_xids(paths),
        frozenset(status.look(paths).differences),
        frozenset(sysctls.reserved_ports()),
        frozenset(_ours()),
    )


def _ours() -> Iterable[str]:
    yield from (f"cgroup {path}" for path in cgroup.leftovers())
    yield from (f"namespace {name}" for name in net.leftovers())
    for _, name in socket.if_nameindex():
        if name.startswith(f"vnt{os.getpid()}"):
            yield f"interface {name}"
    listed = HERE.run("nft", "list", "tables", check=False).stdout
    yield from (f"nft table {name}" for name in re.findall(r"\bvnt_nflog_\d+", listed))


def outcomes(paths: Paths, before: Traces, bed: Bed) -> list[Outcome]:
    """What of the node is not as it was before the canaries came; they are gone."""
    found: list[tuple[str, list[str]]] = []

    def as_before() -> bool:
        found[:] = _compared(before, look(paths)) + _canaries(before, bed)
        return not any(wrong for _, wrong in found)

    with suppress(AssertionError):
        until(as_before, bed.patience)
    return [
        Outcome(AS_BEFORE.name, "node", 0, "fell" if wrong else "held", f"look at {what}",
                "as before", "; ".join(wrong) or "as before")
        for what, wrong in found
    ]  # fmt: skip


def _compared(before: Traces, after: Traces) -> list[tuple[str, list[str]]]:
    files = [name for name, was in before.files.items()
             if name != FILE and after.files.get(name) != was]  # fmt: skip
    files += [FILE] if FILE in after.files else []
    xids = [f"{name}: {xid}, and now {after.xids.get(name, 'none')}"
            for name, xid in before.xids.items()
            if not name.startswith(CANARY) and after.xids.get(name) != xid]  # fmt: skip
    xids += [name for name in after.xids if name.startswith(CANARY)]
    return [
        ("the slices' files", files),
        ("the slices' numbers", xids),
        ("rules, settings, programs and policy", sorted(after.differences - before.differences)),
        ("cgroups, namespaces, interfaces and tables", sorted(after.ours - before.ours)),
    ]


def _canaries(before: Traces, bed: Bed) -> list[tuple[str, list[str]]]:
    """What the kernel still holds of the canaries."""
    theirs = set(bed.xids.values()) - {0}
    held = []
    try:
        now = policy.read(bed.instance)
        held += [f"cgroup {number}: {xid}" for number, xid in now.slices.items() if xid in theirs]
        held += [f"a grant of {xid}" for xid in now.grants if xid in theirs]
        held += [f"port {port.port}: {xid}" for port, xid in now.ports if xid in theirs]
        held += [f"{address}: {xid}" for address, xid in now.addresses.items() if xid in theirs]
        if bed.datapath == "module":
            with copyxid.connect() as module:
                table = module.table().values()
            held += [f"cgroup {each.cgroup_id}: {each.xid}" for each in table if each.xid in theirs]
    except VnetError as error:
        held.append(str(error))
    now_reserved = sysctls.reserved_ports()
    ports = sorted((now_reserved - before.reserved) & bed.ports.granted)
    if not sysctls.fits(before.reserved):
        ports = []  # a smaller set cannot be written in one piece: it stays until `vnet down`
    return [
        ("the canaries' cgroups, grants, ports and addresses in the kernel", held),
        (f"sysctl {sysctls.RESERVED}", [str(port) for port in ports]),
    ]
