"""Make the attempts of the properties asked for, one after the other."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vnet.check import attribution, granted, guarding, handover, lasting, outside, passing, traces
from vnet.check.bed import Bed, canaries
from vnet.check.facts import LACKING, ROLES, Outcome, Property, Report
from vnet.check.trial import Trial
from vnet.errors import UsageError
from vnet.paths import Paths

PROPERTIES: tuple[Property, ...] = (
    *(*granted.PROPERTIES, *guarding.PROPERTIES),
    *(*attribution.PROPERTIES, *handover.PROPERTIES),
    *(*passing.PROPERTIES, *lasting.PROPERTIES),
    traces.AS_BEFORE,
)

Tell = Callable[[str], None]
"""Says to people what is going on."""

ANNOUNCEMENT = (
    "vnet check --live does this now, and undoes it at the end:",
    "  slices named vnet-check-... with cgroups below /vnt-PID and a few reserved ports; their "
    "numbers rest afterwards, and stay in the history",
    "  a network namespace for a peer, joined by a veth with addresses of the documentation ranges",
    "  an nft table vnt_nflog_N that logs the packets of that veth, and nobody else's",
)
"""What --live says before it does it."""


def chosen(names: Sequence[str]) -> list[Property]:
    """The properties of these names; all where none is named. Raises UsageError."""
    known = {each.name: each for each in PROPERTIES}
    for name in names:
        if name not in known:
            raise UsageError(f"vnet check: there is no property {name!r}", "vnet check --list")
    return [each for each in PROPERTIES if not names or each.name in names]


def live(paths: Paths, names: Sequence[str], allowed: Sequence[str], tell: Tell) -> Report:
    """Check the node that is up in this network namespace, by canaries beside its slices.

    Raises UsageError, NodeError, and what adding a slice raises.
    """
    wanted = chosen(names)
    chosen(allowed)
    outside.scapy()
    begun = time.monotonic()
    report = Report(live=True, kernel=os.uname().release, allowed_skips=list(allowed))
    report.properties = [each.name for each in wanted]
    before = traces.look(paths)
    with canaries(paths) as bed:
        report.datapath = bed.datapath
        numbers = ", ".join(f"{xid} ({role})" for role, xid in bed.xids.items())
        tell(f"canaries are in place: data path {bed.datapath}, xids {numbers}")
        for number, each in enumerate(wanted, 1):
            tell(f"{number} of {len(wanted)}: {each.name}")
            report.outcomes += attempts(bed, each)
    if traces.AS_BEFORE in wanted:
        tell("the canaries are gone: is the node as before?")
        report.outcomes += traces.outcomes(paths, before, bed)
    for each in wanted if names else []:  # who names one wants to know that it holds
        if not report.of(each.name):
            lacks = ", ".join(what for what in each.where if what not in bed.has)
            report.outcomes += _skipped(each, f"there is nothing to check: this node lacks {lacks}")
    report.seconds = round(time.monotonic() - begun, 2)
    return report


def attempts(bed: Bed, wanted: Property) -> list[Outcome]:
    """All attempts of one property."""
    found: list[Outcome] = []
    if any(what not in bed.has for what in wanted.where):
        return found
    for need in wanted.needs:
        if need not in bed.has:
            return _skipped(wanted, LACKING[need])
    for family in wanted.families:
        if family == 6 and not Path("/proc/net/if_inet6").exists():
            continue
        trial = Trial(bed, wanted, family)
        try:
            wanted.attempts(trial)
        except (AssertionError, OSError, RuntimeError) as error:
            trial.note("node", False, "make all attempts", "all can be made", str(error))
        found += trial.outcomes
    return found


def _skipped(wanted: Property, why: str) -> list[Outcome]:
    return [Outcome(wanted.name, role, 0, "skipped", wanted.why, "", why) for role in ROLES]
