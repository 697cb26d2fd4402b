"""The iptables plugin under test: where it lies, and what libxt_MARK.t says of it.

Shared by tests/netns (host kernel, no module) and tests/vm (with the module).
"""

import atexit
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vnet.testing.net import Namespace

PLUGIN = Path(__file__).resolve().parents[1] / "vnet/ext/iptables"
VARIANTS = ("iptables-legacy", "iptables-nft", "ip6tables-legacy", "ip6tables-nft")
TABLES = ("mangle", "raw", "nat", "filter")
COPY_XID = "--copy-xid"


@cache
def system() -> Path:
    """Where iptables keeps its own plugins."""
    asked = subprocess.run(
        ["pkg-config", "--variable=xtlibdir", "xtables"], check=True, capture_output=True, text=True
    )
    return Path(asked.stdout.strip())


def ours(plugin: Path = PLUGIN) -> dict[str, str]:
    """Environment in which MARK is this project's plugin."""
    assert (plugin / "libxt_MARK.so").exists(), f"make -C {plugin}"
    return {"XTABLES_LIBDIR": f"{plugin}:{system()}"}


@cache
def stock() -> dict[str, str]:
    """Environment in which MARK is the distribution's plugin, also where ours is installed."""
    diverted = system() / "libxt_MARK.so.distrib"
    if not diverted.exists():
        return {"XTABLES_LIBDIR": str(system())}
    folder = Path(tempfile.mkdtemp(prefix="stock-xtables-"))
    atexit.register(shutil.rmtree, folder)
    (folder / "libxt_MARK.so").symlink_to(diverted)
    return {"XTABLES_LIBDIR": f"{folder}:{system()}"}


@dataclass(frozen=True)
class Line:
    """One rule of libxt_MARK.t in its table."""

    number: int
    table: str
    chains: tuple[str, ...]
    rule: str
    saved: str
    """What it is saved as; empty where it must be refused."""

    @property
    def words(self) -> list[str]:
        return shlex.split(self.rule)

    @property
    def ok(self) -> bool:
        return bool(self.saved)

    @property
    def is_stock(self) -> bool:
        """Whether the stock plugin knows all its words."""
        return COPY_XID not in self.rule

    @property
    def where(self) -> str:
        return f"libxt_MARK.t:{self.number}: {self.rule}"


@cache
def lines() -> tuple[Line, ...]:
    """libxt_MARK.t, in iptables' own format."""
    found: list[Line] = []
    table, chains = "filter", ()
    for number, text in enumerate((PLUGIN / "libxt_MARK.t").read_text().splitlines(), 1):
        match text[:1]:
            case "" | "#":
                continue
            case "*":
                table = text[1:]
                continue
            case ":":
                chains = tuple(text[1:].split(","))
                continue
        rule, saved, verdict = text.split(";")
        assert verdict in ("OK", "FAIL") and (saved != "") == (verdict == "OK"), text
        found.append(Line(number, table, chains, rule, rule if saved == "=" else saved))
    return tuple(found)


def saved_rules(table_dump: str) -> list[str]:
    """The rules (-A ...) in what -S or -save printed, in order."""
    return [text for text in table_dump.splitlines() if text.startswith("-A ")]


def saved_tables(dump: str) -> dict[str, list[str]]:
    """The rules by table in what -save printed, which has its tables in any order."""
    parts = (part.partition("\n") for part in re.split(r"^\*", dump, flags=re.MULTILINE)[1:])
    found = {table: saved_rules(rest) for table, _, rest in parts}
    return {table: rules for table, rules in found.items() if rules}


def restore_file(chosen: list[Line]) -> str:
    """A file for iptables-restore with each line in each of its chains."""
    text = ""
    for table in TABLES:
        rules = [
            f"-A {c} {each.rule}\n" for each in chosen if each.table == table for c in each.chains
        ]
        if rules:
            text += f"*{table}\n{''.join(rules)}COMMIT\n"
    return text


def expected_after(chosen: list[Line]) -> dict[str, list[str]]:
    """By table, what -S must say after that, its chains in the kernel's order."""
    hooks = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
    return {
        table: [
            f"-A {chain} {each.saved}"
            for chain in hooks
            for each in chosen
            if each.table == table and chain in each.chains
        ]
        for table in TABLES
        if any(each.table == table for each in chosen)
    }


def listings(ns: Namespace, variant: str, env: dict[str, str]) -> dict[str, str]:
    """What the variant says of mangle by -S and -L, and of all tables by -save, undated."""
    said = {
        option: ns.run(variant, "-t", "mangle", *option.split(), env=env).stdout
        for option in ("-S", "-L -v -n")
    }
    return said | {"save": undated(ns.run(f"{variant}-save", env=env).stdout)}


def undated(dump: str) -> str:
    """What -save printed, without its comments, which say when."""
    return re.sub(r"^#.*\n", "", dump, flags=re.MULTILINE)
