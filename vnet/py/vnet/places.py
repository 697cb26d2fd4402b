"""Read TOML into a structure; where in the file a value is; msgspec's complaints in our words."""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from vnet.errors import ConfigError

T = TypeVar("T")
Keys = list[str | int]

_REASON = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>[^`]*)`)?$", re.DOTALL)
_FIELD = re.compile(r"^Object contains unknown field `(?P<field>.*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<field>.*)`$")


def convert(path: Path, text: str, kind: type[T]) -> T:
    """A file's TOML as ``kind``. Raises ConfigError, which names file, line and key."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"\(at line (\d+), column \d+\)", str(error))
        line = int(at[1]) if at else text.count("\n") + 1
        raise ConfigError(f"{path}:{line}: not TOML: {error}") from error
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        what, keys = explain(str(error))
        raise ConfigError(f"{path}:{locate(text, keys)}: {dotted(keys)}: {what}") from error


def explain(message: str) -> tuple[str, Keys]:
    """A msgspec.ValidationError's words into ours, and the keys that lead to the place."""
    match = _REASON.match(message)
    what = match["what"] if match else message
    keys: Keys = []
    for name, index in re.findall(r"\.([A-Za-z0-9_]+)|\[(\d+)\]", (match and match["path"]) or ""):
        keys.append(name or int(index))
    if unknown := _FIELD.match(what):
        return "unknown key", [*keys, unknown["field"]]
    if missing := _MISSING.match(what):
        return "this key is missing", [*keys, missing["field"]]
    if keys[-1:] == ["name"] and "regex" in what:
        return "a name is 1 to 63 of a-z 0-9 _ . - and starts with a letter or digit", keys
    what = what.replace("Expected `int` >=", "expected a number >=")
    return what[:1].lower() + what[1:], keys


def dotted(keys: Iterable[str | int]) -> str:
    """``slice[0].grants.ports``."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return text.lstrip(".") or "the file"


def locate(text: str, keys: Keys) -> int:
    """The line (from 1) on which the value at ``keys`` is written, or its nearest parent.

    A reader of lines, not of TOML: it knows headers and ``key =``, which is
    how our files are written; what is written otherwise (a slice as an
    inline table) gets the line of its table.
    """
    wanted = [key for key in keys if isinstance(key, str)]
    number = next((key for key in keys if isinstance(key, int)), None)
    seen = -1
    header: list[str] = []
    best, depth = 1, 0
    for at, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if table := re.match(r"\[\[?\s*([A-Za-z0-9_.\"' -]+?)\s*\]\]?\s*(#.*)?$", stripped):
            header = [part.strip().strip("\"'") for part in table[1].split(".")]
            if stripped.startswith("[["):
                seen += 1
            here = header
        elif pair := re.match(r"([A-Za-z0-9_.\"'-]+)\s*=\s*(.*)$", stripped):
            here = header + [part.strip("\"'") for part in pair[1].split(".")]
            # an inline table: grants = { raw = "own" }
            for key in wanted[len(here) :]:
                if not re.search(rf"\b{re.escape(key)}\b\s*=", pair[2]):
                    break
                here = [*here, key]
        else:
            continue
        if number is not None and here[:1] == ["slice"] and header and seen != number:
            continue
        common = 0
        while common < min(len(here), len(wanted)) and here[common] == wanted[common]:
            common += 1
        if common > depth:
            best, depth = at, common
    return best
