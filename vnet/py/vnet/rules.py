"""Our rules in the kernel: read, compared, and changed by one text per family.

Chains of our own in the tables raw (the guard) and mangle (the marks), those
that have a base chain jumped to from its first place: before anything that
logs or classifies by mark. What is in them says ``datapath``. They are written
with ``iptables-restore --noflush``, which takes the lock of the other iptables
users; nothing that is somebody else's is ever part of that text.

Each table is one commit (IPT_SO_SET_REPLACE, or one nf_tables transaction):
whole or not at all, and no packet meets half of it. Two tables are two
commits, one after the other, so the text is in an order in which no door is
open in between: the guard first on the way up, and last on the way down.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vnet.datapath import OURS, Chain, Family
from vnet.errors import RulesError

Variant = Literal["legacy", "nft"]
VARIANTS: tuple[Variant, ...] = ("legacy", "nft")
FAMILIES: tuple[Family, ...] = (4, 6)

#: in the order of the way up
TABLES = ("raw", "mangle")

PLUGIN = Path(__file__).parent / "xtables" / "libxt_MARK.so"


@dataclass(frozen=True)
class Table:
    """What one table of one family and variant holds of ours."""

    chains: dict[str, list[str]] = field(default_factory=dict)  #: our chain: its rules
    jumps: dict[str, list[int]] = field(default_factory=dict)  #: our chain: places, from 1
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
            table.jumps[chain.name] = [1]
    return found


def is_empty(found: Snapshot) -> bool:
    """Whether nothing of ours is there."""
    return not any(table.chains or any(table.jumps.values()) for table in found.values())


def families() -> tuple[Family, ...]:
    """IPv4, and IPv6 unless the kernel has none (or was booted with ipv6.disable=1)."""
    return FAMILIES if Path("/proc/net/if_inet6").exists() else (4,)


def legacy_tables(family: Family) -> list[str]:
    """The legacy tables in use in this network namespace; asking loads none."""
    name = {4: "ip_tables_names", 6: "ip6_tables_names"}[family]
    try:
        return Path("/proc/net", name).read_text().split()
    except (FileNotFoundError, PermissionError):
        return []


def suitable() -> Variant:
    """The cheaper home that suits the host.

    A legacy mangle table costs every packet at five hooks, an nft base chain
    only where we have one: legacy only where the host lives there already.
    """
    return "legacy" if any(legacy_tables(family) for family in FAMILIES) else "nft"


def environment() -> dict[str, str]:
    """The environment in which iptables finds our libxt_MARK.so.

    libxtables takes a name's first hit in XTABLES_LIBDIR, and only looks
    there: ours first, then the system's. Where the system's is ours already
    (a node on which the plugin is installed) nothing needs saying.
    """
    result = dict(os.environ)
    result["PATH"] = result.get("PATH", "") + ":/usr/sbin:/sbin"
    result["LC_ALL"] = "C"
    directories = system_directories()
    for directory in directories:
        plugin = directory / "libxt_MARK.so"
        if plugin.exists():
            if is_ours(plugin):
                return result
            break
    if PLUGIN.exists():
        result["XTABLES_LIBDIR"] = ":".join(map(str, [PLUGIN.parent, *directories]))
    return result


def system_directories() -> list[Path]:
    """Where iptables looks for plugins when nobody tells it, as far as can be found."""
    if said := os.environ.get("XTABLES_LIBDIR"):
        return [Path(part) for part in said.split(":") if part]
    places = [
        Path("/usr/lib"),
        Path("/usr/lib64"),
        Path("/lib"),
        *Path("/usr/lib").glob("*-linux-*"),
    ]
    found: list[Path] = []
    for place in places:
        directory = place / "xtables"
        if (directory / "libxt_standard.so").exists() and not any(
            directory.samefile(other) for other in found
        ):
            found.append(directory)
    return found


def is_ours(plugin: Path) -> bool:
    """Whether a libxt_MARK.so knows --copy-xid."""
    return b"copy-xid" in plugin.read_bytes()


def _run(name: str, family: Family, variant: Variant, *options: str, text: str = "") -> str:
    return _call(name, family, variant, *options, text=text).stdout


def _call(
    name: str, family: Family, variant: Variant, *options: str, text: str
) -> "subprocess.CompletedProcess[str]":
    tool = f"{'iptables' if family == 4 else 'ip6tables'}-{variant}-{name}"
    try:
        # close_fds: see guard.lock
        done = subprocess.run(
            [tool, *options],
            input=text,
            capture_output=True,
            text=True,
            env=environment(),
            close_fds=False,
        )
    except FileNotFoundError as error:
        raise RulesError(f"{tool}: not found", "install iptables 1.8 or later") from error
    if done.returncode == 0:
        return done
    reason = done.stderr.strip() or f"exit code {done.returncode}"
    raise RulesError(f"{tool} refused: {reason}", _cure(reason))


def _cure(reason: str) -> str:
    if "incompatible, use 'nft' tool" in reason:
        return "table mangle holds rules only nft understands: use `--variant legacy`"
    if "Permission denied" in reason or "you must be root" in reason:
        return "run it as root"
    if "xtables lock" in reason:
        return "another program holds /run/xtables.lock for a minute already: fuser -v it"
    if "does not exist" in reason and "able" in reason:
        return "this kernel has no such tables: try the other `--variant`"
    return ""


def save(family: Family, variant: Variant) -> str:
    """The tables that may hold ours, as iptables-save prints them; one that is absent, not."""
    tables = set(TABLES)
    if variant == "legacy":
        tables &= set(legacy_tables(family))  # reading one would load it
    return "".join(_run("save", family, variant, "-t", name) for name in TABLES if name in tables)


def save_counted(family: Family, variant: Variant) -> str:
    """Table mangle with each rule's packets and bytes; empty where it does not exist."""
    if variant == "legacy" and "mangle" not in legacy_tables(family):
        return ""
    return _run("save", family, variant, "-c", "-t", "mangle")


def test(family: Family, variant: Variant, text: str) -> None:
    """Have iptables-restore read a text without committing it. Raises RulesError.

    It looks every extension up in the kernel, which loads its module, but only
    warns (and exits 0) where the kernel has none.
    """
    done = _call("restore", family, variant, "--test", "--noflush", "--wait=60", text=text)
    if missing := re.findall(r"Extension (\S+) revision \d+ not supported", done.stderr):
        raise RulesError(
            f"the kernel does not have iptables' {', '.join(dict.fromkeys(missing))}",
            "load or build the kernel's xt_* modules of those names",
        )


def save_all(family: Family, variant: Variant) -> str:
    """Every table as iptables-save prints it; of the legacy ones, those in use."""
    if variant == "legacy" and not legacy_tables(family):
        return ""
    return _run("save", family, variant)


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
    bases = {chain: base for (table, chain), base in OURS.items() if table == name}
    chains: dict[str, list[str]] = {}
    jumps: dict[str, list[int]] = {}
    lengths: dict[str, int] = {}
    strangers = []
    for line in text.splitlines():
        if match := _DECLARED.match(line):
            if match[1] in bases:
                chains[match[1]] = []
            continue
        match = _APPENDED.match(line)
        if match is None:
            continue
        chain, rule = match[1], match[2]
        lengths[chain] = lengths.get(chain, 0) + 1
        if chain in bases:
            chains.setdefault(chain, []).append(line)
            continue
        lead = _LEADS.search(rule)
        if lead is None or lead[1] not in bases:
            continue
        if rule == f"-j {lead[1]}" and chain == bases[lead[1]]:
            jumps.setdefault(lead[1], []).append(lengths[chain])
        else:
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
    for chain, base in _jumping(name):
        before, after = now.jumps.get(chain, []), then.jumps.get(chain, [])
        if before == after:
            continue
        lines += [f"-D {base} -j {chain}"] * len(before)
        room = now.lengths.get(base, 0) - len(before)
        for at, place in enumerate(after):
            lines.append(f"-I {base} {min(place, room + at + 1)} -j {chain}")
    gone = [chain for chain in now.chains if chain not in then.chains]
    lines += [f"-F {chain}" for chain in gone] + [f"-X {chain}" for chain in gone]
    return "\n".join([f"*{name}", *lines, "COMMIT", ""]) if lines else ""


def _jumping(name: str) -> list[tuple[str, str]]:
    """(our chain, the base chain that jumps to it) of one table."""
    return [(chain, base) for (table, chain), base in OURS.items() if table == name and base]


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
    if text:
        _run("restore", family, variant, "--noflush", "--wait=60", text=text)
    return bool(text)


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


def _jumps_differ(chain: str, base: str, places: list[int], wanted: list[int]) -> list[str]:
    if places == wanted:
        return []
    if not places:
        return [f"{base} does not jump to {chain}"]
    if not wanted:
        return [f"{base} jumps to {chain}, and should not"]
    if len(places) > 1:
        return [f"{base} jumps to {chain} {len(places)} times"]
    return [f"{base} jumps to {chain} from place {places[0]} instead of the first"]


@dataclass(frozen=True)
class Parsed:
    """A rule as python-iptables gives it back; a "!" stands before negated values."""

    protocol: str
    matches: list[tuple[str, dict[str, list[str]]]]
    target: str
    parameters: dict[str, list[str]]


def parsed(rule: str) -> Parsed:
    """Take a rule apart: protocol, matches, target; addresses and interfaces are left out."""
    protocol, target = "ip", ""
    matches: list[tuple[str, dict[str, list[str]]]] = []
    parameters: dict[str, list[str]] = {}
    found: dict[str, list[str]] = {}  # where options go
    values: list[str] = []  # where values go
    negated: list[str] = []
    words = iter(shlex.split(rule))
    for word in words:
        if word == "!":
            negated = ["!"]
        elif word in ("-m", "-p", "-j", "-g"):
            name = next(words)
            found = {}
            if word == "-m":
                matches.append((name, found))
            elif word == "-p":
                protocol = "".join(negated) + name
            else:
                target, parameters = name, found
            negated = []
        elif word.startswith("--"):
            values, negated = negated, []
            found[word[2:]] = values
        elif word.startswith("-"):
            next(words)
            negated = []
        else:
            values.append(word)
    return Parsed(protocol, matches, target, parameters)
