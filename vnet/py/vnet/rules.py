"""Our rules in the kernel: read, compared, and changed by one text per family.

Chains of our own in the tables raw (the guard) and mangle (the marks), those
that have a base chain jumped to from its first places: before anything that
logs or classifies by mark. What is in them says ``datapath``. They are written
with ``iptables-restore --noflush``, which takes the lock of the other iptables
users; nothing that is somebody else's is ever part of that text.

Each table is one commit (IPT_SO_SET_REPLACE, or one nf_tables transaction):
whole or not at all, and no packet meets half of it. Two tables are two
commits, one after the other, so the text is in an order in which no door is
open in between: the guard first on the way up, and last on the way down.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vnet.datapath import OURS, Chain, Family, is_our_jump
from vnet.errors import RulesError
from vnet.iptables import Variant, legacy_tables, run

#: in the order of the way up
TABLES = ("raw", "mangle")


@dataclass(frozen=True)
class Table:
    """What one table of one family and variant holds of ours."""

    chains: dict[str, list[str]] = field(default_factory=dict)  #: our chain: its rules
    #: our chain: (place in its base chain, from 1; the jump's condition)
    jumps: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)  #: base chain: rules in it
    strangers: tuple[str, ...] = ()  #: somebody else's rules that lead to our chains


#: table: what it holds of ours; one that holds nothing may be absent
Snapshot = Mapping[str, Table]

NOTHING: Snapshot = {}
_NOTHING = Table()


def asked(chains: Iterable[Chain]) -> Snapshot:
    """What is to be there while the node is up."""
    found: dict[str, Table] = {}
    for chain in chains:
        table = found.setdefault(chain.table, Table())
        table.chains[chain.name] = [f"-A {chain.name} {rule}" for rule in chain.rules]
        if chain.base:
            place = 1 + sum(OURS[chain.table, other] == chain.base for other in table.jumps)
            table.jumps[chain.name] = [(place, chain.condition)]
    return found


def is_empty(found: Snapshot) -> bool:
    """Whether nothing of ours is there."""
    return not any(table.chains or any(table.jumps.values()) for table in found.values())


def save(family: Family, variant: Variant) -> str:
    """The tables that may hold ours, as iptables-save prints them; one that is absent, not."""
    tables = set(TABLES)
    if variant == "legacy":
        tables &= set(legacy_tables(family))  # reading one would load it
    return "".join(run("save", family, variant, "-t", name) for name in TABLES if name in tables)


def save_counted(family: Family, variant: Variant) -> str:
    """Table mangle with each rule's packets and bytes; empty where it does not exist."""
    if variant == "legacy" and "mangle" not in legacy_tables(family):
        return ""
    return run("save", family, variant, "-c", "-t", "mangle")


def snapshot(family: Family, variant: Variant) -> Snapshot:
    """What is there of ours. Raises RulesError."""
    return read(save(family, variant))


_DECLARED = re.compile(r":(\S+) (\S+) \[")
_APPENDED = re.compile(r"-A (\S+) ?(.*)")
_LEADS = re.compile(r"(?:^| )-[jg] (\S+)")


def read(text: str) -> Snapshot:
    """Find our chains and jumps in iptables-save's text."""
    found: dict[str, Table] = {}
    for part in re.split(r"^\*", text, flags=re.MULTILINE)[1:]:
        name, _, content = part.partition("\n")
        if name in TABLES:
            found[name] = _read_table(name, content)
    return found


def _read_table(name: str, text: str) -> Table:
    ours = {chain for table, chain in OURS if table == name}
    chains: dict[str, list[str]] = {}
    jumps: dict[str, list[tuple[int, str]]] = {}
    lengths: dict[str, int] = {}
    strangers = []
    for line in text.splitlines():
        if match := _DECLARED.match(line):
            if match[1] in ours:
                chains[match[1]] = []
            continue
        match = _APPENDED.match(line)
        if match is None:
            continue
        chain, rule = match[1], match[2]
        lengths[chain] = lengths.get(chain, 0) + 1
        if chain in ours:
            chains.setdefault(chain, []).append(line)
        elif jump := is_our_jump(name, chain, rule):
            jumps.setdefault(jump[0], []).append((lengths[chain], jump[1]))
        elif (lead := _LEADS.search(rule)) and lead[1] in ours:
            strangers.append(line)
    return Table(chains, jumps, lengths, tuple(strangers))


def script(now: Snapshot, then: Snapshot) -> str:
    """The iptables-restore text that leads from one to the other; empty if they agree."""
    order = reversed(TABLES) if is_empty(then) else TABLES
    return "".join(
        _table_script(name, now.get(name, _NOTHING), then.get(name, _NOTHING)) for name in order
    )


def _table_script(name: str, now: Table, then: Table) -> str:
    changed = {
        chain: rules for chain, rules in then.chains.items() if now.chains.get(chain) != rules
    }
    # Declared: made, or emptied. All of them before the first rule, which may
    # lead to any of them; what is no longer asked goes when none leads there.
    lines = [f":{chain} - [0:0]" for chain in changed]
    lines += [rule for rules in changed.values() for rule in rules]
    for base, ours in _jumping(name).items():
        before, after = _in_base(ours, now), _in_base(ours, then)
        if before == after:
            continue
        # iptables finds no rule that names a program: it compares with the
        # descriptor that the rule was made through (xt_bpf_info_v1.fd).
        if any("--object-pinned" in rule for _place, rule in before):
            lines += [f"-D {base} {place}" for place, _rule in reversed(before)]
        else:
            lines += [f"-D {base} {rule}" for _place, rule in before]
        room = now.lengths.get(base, 0) - len(before)
        for at, (place, rule) in enumerate(after):
            lines.append(f"-I {base} {min(place, room + at + 1)} {rule}")
    gone = [chain for chain in now.chains if chain not in then.chains]
    lines += [f"-F {chain}" for chain in gone] + [f"-X {chain}" for chain in gone]
    return "\n".join([f"*{name}", *lines, "COMMIT", ""]) if lines else ""


def _jumping(name: str) -> dict[str, list[str]]:
    """{base chain: our chains to which it leads} of one table."""
    found: dict[str, list[str]] = {}
    for (table, chain), base in OURS.items():
        if table == name and base:
            found.setdefault(base, []).append(chain)
    return found


def _in_base(ours: list[str], table: Table) -> list[tuple[int, str]]:
    """(place, rule) of a base chain's rules that lead to ``ours``, in order."""
    return sorted(
        (place, f"{condition} -j {chain}".lstrip())
        for chain in ours
        for place, condition in table.jumps.get(chain, [])
    )


def change(family: Family, variant: Variant, now: Snapshot, then: Snapshot) -> bool:
    """Lead the kernel from ``now`` to ``then``. False: nothing to do.

    Raises RulesError; then the table it names and those after it are as they
    were, and one before it may have been changed.
    """
    for name, table in now.items():
        wanted = then.get(name, _NOTHING).chains
        for stranger in table.strangers:
            lead = _LEADS.search(stranger)
            if lead and lead[1] in table.chains and lead[1] not in wanted:
                raise RulesError(
                    f"table {name} (IPv{family}, {variant}) has a rule of somebody else's that "
                    f"leads to our chain: {stranger}",
                    "delete that rule, then try again",
                )
    text = script(now, then)
    if not text:
        return False
    if not _BY_PLACE.search(text):
        run("restore", family, variant, "--noflush", "--wait=60", text=text)
        return True
    # By its place a rule is only to be found as long as nobody puts another
    # before it: so by the places of this moment, and looking afterwards.
    before = save(family, variant)
    text = script(read(before), then)
    run("restore", family, variant, "--noflush", "--wait=60", text=text)
    if lost := _lost(before, save(family, variant)):
        run("restore", family, variant, "--noflush", "--wait=60", text=lost)
        raise RulesError(
            f"somebody changed the rules of IPv{family} ({variant}) at the same moment",
            "what was theirs is as it was; try again",
        )
    return True


_BY_PLACE = re.compile(r"^-D \S+ \d+$", re.MULTILINE)


def _lost(before: str, after: str) -> str:
    """The iptables-restore text that puts back what was others' in our base chains."""
    text = ""
    for name in TABLES:
        missing = _others(name, before)
        for line in _others(name, after):
            if line in missing:
                missing.remove(line)
        lines = [line.replace("-A ", "-I ", 1) for line in reversed(missing)]
        text += "\n".join([f"*{name}", *lines, "COMMIT", ""]) if lines else ""
    return text


def _others(name: str, text: str) -> list[str]:
    """The rules of one table's base chains, as far as they are not ours."""
    bases, found, table = set(_jumping(name)), [], ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif (match := _APPENDED.match(line)) and table == name and match[1] in bases:
            found += [line] if is_our_jump(name, match[1], match[2]) is None else []
    return found


def differences(found: Snapshot, wanted: Snapshot) -> list[str]:
    """What is not as asked, in words."""
    words = []
    for (table, chain), base in OURS.items():
        here, there = found.get(table, _NOTHING), wanted.get(table, _NOTHING)
        words += _rules_differ(chain, here.chains.get(chain), there.chains.get(chain))
        if base:
            words += _jumps_differ(
                chain, base, here.jumps.get(chain, []), there.jumps.get(chain, [])
            )
    return words


def _rules_differ(chain: str, here: list[str] | None, there: list[str] | None) -> list[str]:
    if here == there:
        return []
    if here is None:
        return [f"chain {chain} is missing"]
    if there is None:
        return [f"chain {chain} is there, and should not be"]
    if len(here) != len(there):
        return [f"chain {chain} holds {len(here)} rules instead of {len(there)}"]
    return [
        f"rule {at} of chain {chain} is {is_!r} instead of {should!r}"
        for at, (is_, should) in enumerate(zip(here, there, strict=True), 1)
        if is_ != should
    ]


def _jumps_differ(
    chain: str, base: str, here: list[tuple[int, str]], there: list[tuple[int, str]]
) -> list[str]:
    if here == there:
        return []
    if not here:
        return [f"{base} does not jump to {chain}"]
    if not there:
        return [f"{base} jumps to {chain}, and should not"]
    if len(here) > 1:
        return [f"{base} jumps to {chain} {len(here)} times"]
    (place, condition), (right, wanted) = here[0], there[0]
    if condition != wanted:
        return [f"{base} jumps to {chain} if {condition!r} instead of {wanted!r}"]
    return [f"{base} jumps to {chain} from place {place} instead of {right}"]
