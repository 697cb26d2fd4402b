"""Which bits of a mark somebody's rule writes, from what iptables-save and nft print."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

ALL = 0xFFFFFFFF
#: what is ours: the low half of the packet's mark, all of the connection's
OURS = {"packet": 0x0000FFFF, "connection": ALL}

Kind = Literal["packet", "connection"]


@dataclass(frozen=True)
class Write:
    """A rule that writes a mark, and the bits it may change."""

    kind: Kind
    bits: int
    rule: str

    @property
    def hurts(self) -> bool:
        return bool(self.bits & OURS[self.kind])


def _number(text: str) -> int:
    return int(text, 0)


def _pair(text: str) -> tuple[int, int]:
    value, slash, mask = text.partition("/")
    return _number(value), _number(mask) if slash else ALL


def _others(text: str, own: frozenset[str]) -> Iterator[tuple[str, str]]:
    """(table, rule) of iptables-save's text, without the rules in or to chains ``own``."""
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
        # A rule's target comes last, and a chain as target has no options.
        words = line.split()
        if words[:1] == ["-A"] and words[1] not in own and words[-1] not in own:
            yield table, line


def in_save(text: str, own: frozenset[str]) -> Iterator[Write]:
    """Rules of iptables-save's text that write a mark; those in chains ``own`` are ours."""
    for table, line in _others(text, own):
        try:
            words = shlex.split(line)
        except ValueError:
            continue
        for kind, bits in _of_rule(words):
            yield Write(kind, bits, f"-t {table} {line}")


def _of_rule(words: list[str]) -> Iterator[tuple[Kind, int]]:
    def value(option: str, default: str) -> str:
        return words[words.index(option) + 1] if option in words[:-1] else default

    if "--restore-skmark" in words:
        yield "packet", ALL
    target = value("-j", "")
    if target == "MARK" and "--set-xmark" in words:
        number, mask = _pair(value("--set-xmark", "0"))
        yield "packet", number | mask
    elif target == "MARK" and "--copy-xid" not in words:
        yield "packet", ALL
    elif target == "MARK":
        yield "packet", 0  # a rule of ours, placed by hand: it is what we want
    elif target == "CONNMARK" and "--restore-mark" in words:
        yield "packet", _number(value("--nfmask", value("--mask", hex(ALL))))
    elif target == "CONNMARK" and "--save-mark" in words:
        yield "connection", _number(value("--ctmask", value("--mask", hex(ALL))))
    elif target == "CONNMARK":
        number, mask = _pair(value("--set-xmark", hex(ALL)))
        yield "connection", number | mask
    elif target == "TPROXY" and "--tproxy-mark" in words:
        number, mask = _pair(value("--tproxy-mark", "0"))
        yield "packet", number | mask
    elif target == "SET" and "--map-mark" in words:
        yield "packet", ALL


def in_nft(ruleset: dict[str, Any]) -> Iterator[Write]:
    """Statements of ``nft -j list ruleset`` that write a mark.

    What iptables-nft wrote as a compat expression shows here without its
    content, and is found by ``in_save``.
    """
    for item in ruleset.get("nftables", []):
        rule = item.get("rule")
        if rule is None:
            continue
        where = f"{rule['family']} {rule['table']} {rule['chain']} handle {rule['handle']}"
        for statement in rule.get("expr", []):
            mangle = statement.get("mangle") if isinstance(statement, dict) else None
            if mangle is None:
                continue
            kind = _kind(mangle.get("key"))
            if kind is not None:
                yield Write(kind, _written(mangle.get("value"), kind), f"nft rule {where}")


def _kind(key: Any) -> Kind | None:
    if not isinstance(key, dict):
        return None
    if isinstance(key.get("meta"), dict) and key["meta"].get("key") == "mark":
        return "packet"
    if isinstance(key.get("ct"), dict) and key["ct"].get("key") == "mark":
        return "connection"
    return None


def _written(value: Any, kind: Kind) -> int:
    """Bits that differ from the old mark after ``mark set value``, at worst."""
    kept = _kept(value, kind)
    return ALL if kept is None else ALL & ~kept


def _kept(value: Any, kind: Kind) -> int | None:
    """Bits of the old mark that come through an expression; None: not built from it."""
    if _kind(value) == kind:
        return ALL
    if not isinstance(value, dict) or len(value) != 1:
        return None
    operator, operands = next(iter(value.items()))
    if operator not in ("&", "|", "^") or not isinstance(operands, list) or len(operands) < 2:
        return None
    kept = _kept(operands[0], kind)
    for operand in operands[1:]:
        if kept is None or not isinstance(operand, int):
            return None
        kept &= operand if operator == "&" else ALL & ~operand
    return kept


def readers_in_save(text: str, own: frozenset[str]) -> Iterator[str]:
    """Rules of others that match on bits of ours."""
    for table, line in _others(text, own):
        for match, value in re.findall(r"-m (mark|connmark) (?:! )?--mark (\S+)", line):
            mask = _pair(value)[1]
            if mask & OURS["packet" if match == "mark" else "connection"]:
                yield f"-t {table} {line}"


_NOTRACK = re.compile(r"-j (?:NOTRACK|CT .*--notrack)")


def untracked_in_save(text: str) -> list[str]:
    """Rules that keep packets from connection tracking."""
    return [line for line in text.splitlines() if line.startswith("-A ") and _NOTRACK.search(line)]


def untracked_in_nft(ruleset: dict[str, Any]) -> list[str]:
    """The same, of ``nft -j list ruleset``."""
    return [
        f"nft rule {rule['family']} {rule['table']} {rule['chain']} handle {rule['handle']}"
        for rule in (item["rule"] for item in ruleset.get("nftables", []) if "rule" in item)
        if any(isinstance(part, dict) and "notrack" in part for part in rule.get("expr", []))
    ]
