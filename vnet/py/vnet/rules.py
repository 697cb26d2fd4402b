"""Our rules in the kernel: read, compared, and changed in one step per family.

Two chains of our own in table mangle, each with one rule, each jumped to from
the first place of a base chain: before anything that logs or classifies by
mark. They are written with ``iptables-restore --noflush``, which commits a
whole text or nothing and takes the lock of the other iptables users; nothing
that is somebody else's is ever part of that text.
"""

import os
import re
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vnet.errors import RulesError

Variant = Literal["legacy", "nft"]
Family = Literal[4, 6]
VARIANTS: tuple[Variant, ...] = ("legacy", "nft")
FAMILIES: tuple[Family, ...] = (4, 6)

#: our chain: the base chain that jumps to it. INPUT, because early demux has
#: found most receiving sockets by then; POSTROUTING and not OUTPUT, because a
#: mark changed in OUTPUT costs every packet a second route look-up
#: (ip_route_me_harder in iptable_mangle.c).
CHAINS: dict[str, str] = {"VNET-INPUT": "INPUT", "VNET-POST": "POSTROUTING"}
BODY = "-j MARK --copy-xid"

PLUGIN = Path(__file__).parent / "xtables" / "libxt_MARK.so"


@dataclass(frozen=True)
class Snapshot:
    """What table mangle of one family and variant holds of ours."""

    chains: dict[str, list[str]] = field(default_factory=dict)  #: our chain: its rules
    jumps: dict[str, list[int]] = field(default_factory=dict)  #: our chain: places, from 1
    lengths: dict[str, int] = field(default_factory=dict)  #: base chain: rules in it
    strangers: tuple[str, ...] = ()  #: somebody else's rules that lead to our chains

    @property
    def ours(self) -> tuple[dict[str, list[str]], dict[str, list[int]]]:
        """The part that is asked for and compared."""
        return self.chains, {chain: places for chain, places in self.jumps.items() if places}

    @property
    def empty(self) -> bool:
        return self.ours == ({}, {})


def asked(body: str = BODY) -> Snapshot:
    """What is to be there while the node is up."""
    return Snapshot(
        chains={chain: [f"-A {chain} {body}"] for chain in CHAINS},
        jumps={chain: [1] for chain in CHAINS},
    )


NOTHING = Snapshot()


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
        return done.stdout
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
    """Table mangle as iptables-save prints it; empty where it does not exist."""
    if variant == "legacy" and "mangle" not in legacy_tables(family):
        return ""  # reading it would load it
    return _run("save", family, variant, "-t", "mangle")


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
    chains: dict[str, list[str]] = {}
    jumps: dict[str, list[int]] = {}
    lengths: dict[str, int] = {}
    strangers = []
    for line in text.splitlines():
        if match := _DECLARED.match(line):
            if match[1] in CHAINS:
                chains[match[1]] = []
            continue
        match = _APPENDED.match(line)
        if match is None:
            continue
        chain, rule = match[1], match[2]
        lengths[chain] = lengths.get(chain, 0) + 1
        if chain in CHAINS:
            chains.setdefault(chain, []).append(line)
            continue
        lead = _LEADS.search(rule)
        if lead is None or lead[1] not in CHAINS:
            continue
        if rule == f"-j {lead[1]}" and chain == CHAINS[lead[1]]:
            jumps.setdefault(lead[1], []).append(lengths[chain])
        else:
            strangers.append(line)
    return Snapshot(chains, jumps, lengths, tuple(strangers))


def script(now: Snapshot, then: Snapshot) -> str:
    """The iptables-restore text that leads from one to the other; empty if they agree."""
    lines = []
    for chain, rules in then.chains.items():
        if now.chains.get(chain) != rules:
            lines += [f":{chain} - [0:0]", *rules]  # made, or emptied, then filled
    for chain, base in CHAINS.items():
        before, after = now.jumps.get(chain, []), then.jumps.get(chain, [])
        if before == after:
            continue
        lines += [f"-D {base} -j {chain}"] * len(before)
        room = now.lengths.get(base, 0) - len(before)
        for at, place in enumerate(after):
            lines.append(f"-I {base} {min(place, room + at + 1)} -j {chain}")
    for chain in now.chains:
        if chain not in then.chains:
            lines += [f"-F {chain}", f"-X {chain}"]
    return "\n".join(["*mangle", *lines, "COMMIT", ""]) if lines else ""


def change(family: Family, variant: Variant, now: Snapshot, then: Snapshot) -> bool:
    """Lead the kernel from ``now`` to ``then`` in one commit. False: nothing to do.

    Raises RulesError; then nothing was changed.
    """
    gone = [chain for chain in now.chains if chain not in then.chains]
    for stranger in now.strangers:
        lead = _LEADS.search(stranger)
        if lead and lead[1] in gone:
            raise RulesError(
                f"table mangle (IPv{family}, {variant}) has a rule of somebody else's that leads "
                f"to our chain: {stranger}",
                "delete that rule, then try again",
            )
    text = script(now, then)
    if text:
        _run("restore", family, variant, "--noflush", "--wait=60", text=text)
    return bool(text)


def differences(found: Snapshot, wanted: Snapshot) -> list[str]:
    """What is not as asked, in words."""
    words = []
    for chain, base in CHAINS.items():
        here, there = found.chains.get(chain), wanted.chains.get(chain)
        if here != there:
            if here is None:
                words.append(f"chain {chain} is missing")
            elif there is None:
                words.append(f"chain {chain} is there, and should not be")
            else:
                words.append(f"chain {chain} holds {here or 'nothing'} instead of {there}")
        places, place = found.jumps.get(chain, []), wanted.jumps.get(chain, [])
        if places != place:
            if not places:
                words.append(f"{base} does not jump to {chain}")
            elif not place:
                words.append(f"{base} jumps to {chain}, and should not")
            elif len(places) > 1:
                words.append(f"{base} jumps to {chain} {len(places)} times")
            else:
                words.append(f"{base} jumps to {chain} from place {places[0]} instead of the first")
    return words


def parameters(body: str) -> tuple[str, dict[str, list[str]]]:
    """A rule's body as python-iptables gives it back: the target and its parameters."""
    words = shlex.split(body)
    target = words[words.index("-j") + 1]
    found: dict[str, list[str]] = {}
    name = ""
    for word in words[words.index("-j") + 2 :]:
        if word.startswith("--"):
            name = word[2:]
            found[name] = []
        else:
            found[name].append(word)
    return target, found
