"""Slices from TOML. Nothing is read by halves: one bad key refuses the whole set.

Every error names the file, the line and the key. docs/config.md is the
reference of the format.
"""

import ipaddress
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from vnet import cgroups
from vnet.errors import ConfigError

NAME = r"[a-z0-9][a-z0-9_.-]{0,62}"
XID_MAX = 65535

Raw = Literal["deny", "own", "full"]


class _Grants(msgspec.Struct, forbid_unknown_fields=True):
    raw: Raw = "deny"
    ports: list[str] = []


class _Slice(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(pattern=f"^{NAME}$")]
    cgroups: Annotated[list[str], msgspec.Meta(min_length=1)]
    xid: Annotated[int, msgspec.Meta(ge=1, le=XID_MAX)] | None = None
    grants: _Grants = msgspec.field(default_factory=_Grants)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    slice: list[_Slice] = []


@dataclass(frozen=True)
class Port:
    """A reserved port or range, on one local address or on all."""

    proto: Literal["tcp", "udp", "sctp"]
    first: int
    last: int
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = None

    def __str__(self) -> str:
        ports = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        if self.address is None:
            return f"{self.proto}/{ports}"
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{self.proto}/{host}:{ports}"

    def overlaps(self, other: "Port") -> bool:
        """Whether one bind could fall under both."""
        return (
            self.proto == other.proto
            and self.first <= other.last
            and other.first <= self.last
            and (self.address is None or other.address is None or self.address == other.address)
        )


@dataclass(frozen=True)
class Grants:
    """What a slice may do beyond ordinary sockets. Kept; not enforced yet."""

    raw: Raw = "deny"
    ports: tuple[Port, ...] = ()

    @property
    def any(self) -> bool:
        return self.raw != "deny" or bool(self.ports)


@dataclass(frozen=True)
class Slice:
    """One tenant, as its file says."""

    name: str
    cgroups: tuple[str, ...]
    xid: int | None
    grants: Grants
    file: Path
    line: int

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


_PORT = re.compile(
    r"(?P<proto>tcp|udp|sctp)/"
    r"(?:(?:\[(?P<v6>[^\]]+)\]|(?P<v4>[0-9.]+)):)?"
    r"(?P<first>[0-9]{1,5})(?:-(?P<last>[0-9]{1,5}))?"
)


def port(text: str) -> Port:
    """Read ``tcp/80``, ``udp/5000-5010``, ``tcp/[2001:db8::1]:25``, ``udp/192.0.2.1:53``.

    Raises ValueError with the reason.
    """
    match = _PORT.fullmatch(text)
    if match is None:
        raise ValueError(
            "not PROTO/PORT, PROTO/FIRST-LAST or PROTO/ADDRESS:PORT with PROTO tcp, udp or sctp"
        )
    first = int(match["first"])
    last = int(match["last"] or first)
    if not 1 <= first <= last <= 65535:
        raise ValueError("ports go from 1 to 65535, the lower one first")
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = None
    if match["v6"]:
        address = ipaddress.IPv6Address(match["v6"])
    elif match["v4"]:
        address = ipaddress.IPv4Address(match["v4"])
    return Port(match["proto"], first, last, address)  # type: ignore[arg-type]


def files(config_dir: Path) -> list[Path]:
    """The slice files of a directory in the order they are read. No directory: none."""
    if not config_dir.exists():
        return []
    return sorted(path for path in config_dir.glob("*.toml") if not path.name.startswith("."))


def load(config_dir: Path) -> list[Slice]:
    """All slices, in name order. Raises ConfigError with one line per problem."""
    found: list[Slice] = []
    problems: list[str] = []
    for path in files(config_dir):
        try:
            found += parse(path, path.read_text())
        except ConfigError as error:
            problems.append(error.message)
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{path}: cannot be read: {error}")
    if not problems:
        problems = _clashes(found)
    if problems:
        raise ConfigError("\n".join(problems))
    return sorted(found, key=lambda item: item.name)


def parse(path: Path, text: str) -> list[Slice]:
    """The slices of one file. Raises ConfigError, which names file, line and key."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"\(at line (\d+), column \d+\)", str(error))
        line = int(at[1]) if at else text.count("\n") + 1
        raise ConfigError(f"{path}:{line}: not TOML: {error}") from error
    try:
        read = msgspec.convert(table, _File)
    except msgspec.ValidationError as error:
        what, at_keys = _explain(str(error))
        where = f"{path}:{locate(text, at_keys)}: {_dotted(at_keys)}"
        raise ConfigError(f"{where}: {what}") from error
    result = []
    lines = _headers(text, len(read.slice))
    for number, item in enumerate(read.slice):
        keys: list[str | int] = ["slice", number]
        for path_text in item.cgroups:
            if wrong := cgroups.problem(path_text):
                raise ConfigError(
                    f"{path}:{locate(text, [*keys, 'cgroups'])}: {_dotted([*keys, 'cgroups'])}: "
                    f'"{path_text}" {wrong}'
                )
        ports = []
        for port_text in item.grants.ports:
            try:
                ports.append(port(port_text))
            except ValueError as error:
                key = [*keys, "grants", "ports"]
                raise ConfigError(
                    f'{path}:{locate(text, key)}: {_dotted(key)}: "{port_text}": {error}'
                ) from error
        result.append(
            Slice(
                name=item.name,
                cgroups=tuple(cgroups.normal(path_text) for path_text in item.cgroups),
                xid=item.xid,
                grants=Grants(item.grants.raw, tuple(ports)),
                file=path,
                line=lines[number],
            )
        )
    return result


_HEADER = re.compile(r"\s*\[\[\s*slice\s*\]\]")


def _headers(text: str, count: int) -> list[int]:
    """The line of each [[slice]]; of slices that are written otherwise: 1."""
    lines = [at for at, line in enumerate(text.splitlines(), 1) if _HEADER.match(line)]
    return lines if len(lines) == count else [1] * count


_REASON = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>[^`]*)`)?$", re.DOTALL)
_FIELD = re.compile(r"^Object contains unknown field `(?P<field>.*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<field>.*)`$")


def _explain(message: str) -> tuple[str, list[str | int]]:
    """msgspec's words into ours, and the keys that lead to the place."""
    match = _REASON.match(message)
    what = match["what"] if match else message
    keys: list[str | int] = []
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


def _dotted(keys: Iterable[str | int]) -> str:
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return text.lstrip(".") or "the file"


def locate(text: str, keys: list[str | int]) -> int:
    """The line (from 1) on which the value at ``keys`` is written, or its nearest parent.

    A reader of lines, not of TOML: it knows headers and ``key =``, which is
    how slice files are written; what is written otherwise (a slice as an
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


def check(slices: list[Slice]) -> None:
    """Raise ConfigError if two slices claim one name, xid, cgroup or port."""
    if problems := _clashes(slices):
        raise ConfigError("\n".join(problems))


def _clashes(slices: list[Slice]) -> list[str]:
    """Names, xids, cgroups and ports that two slices claim."""
    problems: list[str] = []
    names: dict[str, Slice] = {}
    xids: dict[int, Slice] = {}
    paths: dict[str, Slice] = {}
    for item in slices:
        if (other := names.setdefault(item.name, item)) is not item:
            problems.append(f"{_at(item)}: name: also used at {_at(other)}")
            continue
        if item.xid is not None and (other := xids.setdefault(item.xid, item)) is not item:
            problems.append(f"{_key(item, 'xid')}: {item.xid} is also asked for by {_at(other)}")
        for path in item.cgroups:
            if (other := paths.setdefault(path, item)) is not item:
                problems.append(f'{_key(item, "cgroups")}: "{path}" also belongs to {_at(other)}')
    return problems + _port_clashes(slices)


def _port_clashes(slices: list[Slice]) -> list[str]:
    problems = []
    granted = sorted(
        ((grant, item) for item in slices for grant in item.grants.ports),
        key=lambda pair: (pair[0].proto, pair[0].first),
    )
    open_ranges: list[tuple[Port, Slice]] = []
    for grant, item in granted:
        open_ranges = [
            pair
            for pair in open_ranges
            if pair[0].proto == grant.proto and pair[0].last >= grant.first
        ]
        for other, owner in open_ranges:
            if owner is not item and grant.overlaps(other):
                problems.append(
                    f"{_key(item, 'grants', 'ports')}: {grant} overlaps {other} of {_at(owner)}"
                )
        open_ranges.append((grant, item))
    return problems


def _at(item: Slice) -> str:
    return f"{item.where} (slice {item.name})"


def _key(item: Slice, *keys: str) -> str:
    """``file:line: slice NAME: key`` for a value that is valid by itself."""
    try:
        text = item.file.read_text()
        number = [found["name"] for found in tomllib.loads(text)["slice"]].index(item.name)
        line = locate(text, ["slice", number, *keys])
    except (OSError, ValueError, KeyError, TypeError):
        line = item.line
    return f"{item.file}:{line}: slice {item.name}: {'.'.join(keys)}"


def write(item: Slice) -> str:
    """The slice as TOML that ``parse`` reads back to the same."""

    def text(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    lines = ["[[slice]]", f"name = {text(item.name)}"]
    lines.append(f"cgroups = [{', '.join(text(path) for path in item.cgroups)}]")
    if item.xid is not None:
        lines.append(f"xid = {item.xid}")
    if item.grants.any:
        ports = ", ".join(text(str(grant)) for grant in item.grants.ports)
        lines.append(f'grants = {{ raw = "{item.grants.raw}", ports = [{ports}] }}')
    return "\n".join(lines) + "\n"
