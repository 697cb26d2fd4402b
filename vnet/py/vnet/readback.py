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
from typing import Any

from vnet import rules


def main(families: list[str]) -> None:
    """Print {family: {chain: [[target, {parameter: [value]}]]}}, of base chains their heads."""
    _find_libraries_fast()
    json.dump({family: _read(family) for family in families}, sys.stdout)


def _find_libraries_fast() -> None:
    """Spare python-iptables ctypes' own search, which runs gcc and ld for what it does not find."""
    listed = subprocess.run(
        ["ldconfig", "-p"], capture_output=True, text=True, env=rules.environment()
    ).stdout
    known: dict[str, str] = {}
    for line in listed.splitlines():
        if match := re.match(r"\s+(lib(\S+?)\.so\S*) \(", line):
            known.setdefault(match[2], match[1])
    ctypes.util.find_library = known.get  # type: ignore[assignment]


def _read(family: str) -> dict[str, list[list[Any]]]:
    import iptc

    table = (iptc.Table if family == "4" else iptc.Table6)(iptc.Table.MANGLE)
    found: dict[str, list[list[Any]]] = {}
    for chain in table.chains:
        if chain.name in rules.CHAINS:
            found[chain.name] = [
                [rule.target.name, rule.target.get_all_parameters()] for rule in chain.rules
            ]
        elif chain.name in rules.CHAINS.values():
            found[chain.name] = [[rule.target.name, {}] for rule in chain.rules[:1]]
    return found


def compare(families: list[rules.Family], body: str = rules.BODY) -> tuple[list[str], str]:
    """(differences from what was asked, why it could not be read if so)."""
    env = rules.environment()
    # Else it searches every library directory of the system for plugins.
    env.setdefault("XTABLES_LIBDIR", ":".join(map(str, rules.system_directories())))
    done = subprocess.run(
        [sys.executable, "-m", "vnet.readback", *map(str, families)],
        capture_output=True,
        text=True,
        env=env,
        close_fds=False,  # see guard.lock
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        return [], f"python-iptables could not read the tables: {last}"
    target, wanted = rules.parameters(body)
    words = []
    for family, found in json.loads(done.stdout).items():
        for chain, base in rules.CHAINS.items():
            reads = f"python-iptables reads (IPv{family})"
            if found.get(chain) != [[target, wanted]]:
                words.append(f"{reads} {found.get(chain)} in {chain}")
            if found.get(base, [])[:1] != [[chain, {}]]:
                words.append(f"{reads} {found.get(base)} at the head of {base}")
    return words, ""


if __name__ == "__main__":
    main(sys.argv[1:])
