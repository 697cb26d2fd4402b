"""iptables' own programs, of both variants and families: found, run, and what they said.

And its words: a rule as text, taken apart.
"""

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vnet.datapath import Family
from vnet.errors import RulesError

Variant = Literal["legacy", "nft"]
VARIANTS: tuple[Variant, ...] = ("legacy", "nft")
FAMILIES: tuple[Family, ...] = (4, 6)

PLUGIN = Path(__file__).parent / "xtables" / "libxt_MARK.so"


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


def run(name: str, family: Family, variant: Variant, *options: str, text: str = "") -> str:
    return call(name, family, variant, *options, text=text).stdout


def call(
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


def test(family: Family, variant: Variant, text: str) -> None:
    """Have iptables-restore read a text without committing it. Raises RulesError.

    It looks every extension up in the kernel, which loads its module, but only
    warns (and exits 0) where the kernel has none.
    """
    done = call("restore", family, variant, "--test", "--noflush", "--wait=60", text=text)
    if missing := re.findall(r"Extension (\S+) revision \d+ not supported", done.stderr):
        raise RulesError(
            f"the kernel does not have iptables' {', '.join(dict.fromkeys(missing))}",
            "load or build the kernel's xt_* modules of those names",
        )


def save_all(family: Family, variant: Variant) -> str:
    """Every table as iptables-save prints it; of the legacy ones, those in use."""
    if variant == "legacy" and not legacy_tables(family):
        return ""
    return run("save", family, variant)


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
