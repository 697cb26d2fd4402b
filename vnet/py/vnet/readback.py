"""Read our chains of the legacy tables back with python-iptables, as JSON.

Run as a child process (``python -m vnet.readback 4 6``): python-iptables loads
iptables' own plugins, and one that fails takes its process along; it also
keeps a table it has read once. As a second witness it shares no code with
iptables-save's text, by which ``rules`` compares.
"""

import ctypes.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vnet import iptables, rules
from vnet.datapath import OURS, Chain, Family

#: protocol, matches, target, its parameters
Rule = list[Any]


def main(families: list[str]) -> None:
    """Print {family: {table: {chain: [Rule]}}} of our chains; of base chains their heads."""
    _find_libraries_fast()
    json.dump({family: _read(family) for family in families}, sys.stdout)


def _find_libraries_fast() -> None:
    """Spare python-iptables ctypes' own search, which runs gcc and ld for what it does not find."""
    listed = subprocess.run(
        ["ldconfig", "-p"], capture_output=True, text=True, env=iptables.environment()
    ).stdout
    known: dict[str, str] = {}
    for line in listed.splitlines():
        if match := re.match(r"\s+(lib(\S+?)\.so\S*) \(", line):
            known.setdefault(match[2], match[1])
    ctypes.util.find_library = known.get  # type: ignore[assignment]


def _read(family: str) -> dict[str, dict[str, list[Rule]]]:
    import iptc

    kind = iptc.Table if family == "4" else iptc.Table6
    found: dict[str, dict[str, list[Rule]]] = {}
    # To tell a chain from a target it reads all tables it knows, and a legacy
    # table that is read is made.
    kind.ALL = iptables.legacy_tables(4 if family == "4" else 6)
    for name in kind.ALL:
        if name not in rules.TABLES:
            continue
        bases = {base for (table, _chain), base in OURS.items() if table == name}
        chains = found.setdefault(name, {})
        for chain in kind(name).chains:
            if (name, chain.name) in OURS:
                chains[chain.name] = [_rule(rule) for rule in chain.rules]
            elif chain.name in bases:
                chains[chain.name] = [_rule(rule) for rule in chain.rules[: len(OURS)]]
    return found


def _rule(rule: Any) -> Rule:
    matches = [[match.name, match.get_all_parameters()] for match in rule.matches]
    return [rule.protocol, matches, rule.target.name, rule.target.get_all_parameters()]


def compare(wanted: Mapping[Family, Sequence[Chain]]) -> tuple[list[str], str]:
    """(differences from what was asked, why it could not be read if so)."""
    env = iptables.environment()
    # Else it searches every library directory of the system for plugins.
    env.setdefault("XTABLES_LIBDIR", ":".join(map(str, iptables.system_directories())))
    done = subprocess.run(
        [sys.executable, "-m", "vnet.readback", *map(str, wanted)],
        capture_output=True,
        text=True,
        env=env,
        close_fds=False,  # see guard.lock
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        return [], f"python-iptables could not read the tables: {last}"
    found = json.loads(done.stdout)
    words = []
    for family, chains in wanted.items():
        heads: dict[tuple[str, str], list[Rule]] = {}
        for chain in chains:
            table = found[str(family)].get(chain.table, {})
            reads = f"python-iptables reads (IPv{family}, {chain.table})"
            here = table.get(chain.name)
            if here != [_expected(rule) for rule in chain.rules]:
                words.append(f"{reads} {here} in {chain.name}")
            if chain.base:
                heads.setdefault((chain.table, chain.base), []).append(_expected(chain.jump))
        for (name, base), rules_wanted in heads.items():
            head = found[str(family)].get(name, {}).get(base, [])[: len(rules_wanted)]
            if head != rules_wanted:
                words.append(
                    f"python-iptables reads (IPv{family}, {name}) {head} at the head of {base}"
                )
    return words, ""


def _expected(text: str) -> Rule:
    rule = iptables.parsed(text)
    matches = [[name, parameters] for name, parameters in rule.matches]
    return [rule.protocol, matches, rule.target, rule.parameters]


if __name__ == "__main__":
    main(sys.argv[1:])
