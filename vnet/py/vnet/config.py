"""Slices from TOML. Nothing is read by halves: one bad key refuses the whole set.

Every error names the file, the line and the key. docs/config.md is the
reference of the format.
"""

import ipaddress
import json
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from vnet import cgroups
from vnet.errors import ConfigError
from vnet.places import Keys, convert, dotted, locate

T = TypeVar("T")
V = TypeVar("V", bound=str | int)

NAME = r"[a-z0-9][a-z0-9_.-]{0,62}"
XID_MAX = 65535

#: of an interface's name, without the NUL that ends it (IFNAMSIZ, linux/if.h)
INTERFACE_MAX = 15

Raw = Literal["deny", "own", "full"]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class _Grants(msgspec.Struct, forbid_unknown_fields=True):
    raw: Raw = "deny"
    ports: list[str] = []
    addresses: list[str] = []


class _Slice(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(pattern=f"^{NAME}$")]
    cgroups: Annotated[list[str], msgspec.Meta(min_length=1)]
    xid: Annotated[int, msgspec.Meta(ge=1, le=XID_MAX)] | None = None
    interfaces: list[str] = []
    users: list[str | int] = []
    grants: _Grants = msgspec.field(default_factory=_Grants)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    slice: list[_Slice] = []


@dataclass(frozen=True)
class Port:
    """A reserved port or range, on one local address or on all."""

    proto: Literal["tcp", "udp", "sctp"]
    first: int
    last: int
    address: Address | None = None

    def __str__(self) -> str:
        ports = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        if self.address is None:
            return f"{self.proto}/{ports}"
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{self.proto}/{host}:{ports}"


@dataclass(frozen=True)
class Grants:
    """What a slice may do beyond ordinary sockets, and what nobody else may use."""

    raw: Raw = "deny"
    ports: tuple[Port, ...] = ()
    addresses: tuple[Address, ...] = ()

    @property
    def any(self) -> bool:
        return self.raw != "deny" or bool(self.ports) or bool(self.addresses)


@dataclass(frozen=True)
class Slice:
    """One tenant, as its file says."""

    name: str
    cgroups: tuple[str, ...]
    xid: int | None
    grants: Grants
    file: Path
    line: int
    interfaces: tuple[str, ...] = ()  #: host ends of its containers' veths
    users: tuple[str, ...] = ()  #: who may ask about its flows: names, or uids in decimal

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
    if match["v6"] and ":" not in match["v6"]:
        raise ValueError("an IPv4 address stands without brackets")
    written = match["v6"] or match["v4"]
    found = _address(written) if written else None
    if found is not None and found.is_unspecified:
        raise ValueError(f"{written} is every address: leave it out")
    return Port(match["proto"], first, last, found)  # type: ignore[arg-type]


def address(text: str) -> Address:
    """Read a local address that a slice reserves; an IPv4-mapped one is the IPv4 address.

    Raises ValueError with the reason.
    """
    found = _address(text)
    if found.is_unspecified or found.is_multicast or str(found) == "255.255.255.255":
        raise ValueError("not the address of one interface")
    if str(found) in ("127.0.0.1", "::1"):
        raise ValueError("everybody on this node needs it")
    return found


def _address(text: str) -> Address:
    """Raises ValueError with the reason."""
    found = ipaddress.ip_address(text)
    if isinstance(found, ipaddress.IPv4Address):
        return found
    if found.scope_id is not None:
        # the kernel's sockets keep the interface beside the address, and so do packets
        raise ValueError("an address is reserved on all interfaces: leave out what follows %")
    return found.ipv4_mapped or found


def interface(text: str) -> str:
    """Check a network interface's name as the kernel does (dev_valid_name, net/core/dev.c).

    Raises ValueError with the reason.
    """
    if not 1 <= len(text.encode()) <= INTERFACE_MAX:
        raise ValueError(f"an interface's name has 1 to {INTERFACE_MAX} bytes")
    if text in (".", "..") or re.search(r"[/:\s\x00-\x1f\x7f]", text):
        raise ValueError("an interface's name has no /, no : and no space, and is not . or ..")
    if text == "lo":
        raise ValueError("is the node's own loopback, not the host end of a veth")
    return text


def user(value: str | int) -> str:
    """Check who may ask about a slice's flows: a user's name, or a uid; as text.

    That the user exists is not asked: on some nodes the network must be up
    for that. Raises ValueError with the reason.
    """
    if isinstance(value, int):
        # -1, as the kernel writes it, is no uid
        if not 0 <= value < (1 << 32) - 1:
            raise ValueError("a uid goes from 0 to 4294967294")
        return str(value)
    if not re.fullmatch(r"[^\s:/,\x00-\x1f\x7f-][^\s:/,\x00-\x1f\x7f]{0,255}", value):
        raise ValueError(
            "a user's name has 1 to 256 characters, no space, no : / or comma, no - first"
        )
    if value.isdecimal():
        raise ValueError("a uid stands without quotes")
    return value


def files(config_dir: Path) -> list[Path]:
    """The slice files of a directory in the order they are read. No directory: none."""
    try:
        found = list(config_dir.glob("*.toml"))
    except FileNotFoundError:  # or it goes in this moment
        return []
    return sorted(path for path in found if not path.name.startswith("."))


def load(config_dir: Path) -> list[Slice]:
    """All slices, in name order. Raises ConfigError with one line per problem."""
    texts: list[tuple[Path, str]] = []
    problems: list[str] = []
    for path in files(config_dir):
        try:
            texts.append((path, path.read_text()))
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{path}: cannot be read: {error}")
    return list(_read(tuple(texts), tuple(problems)))


@lru_cache(maxsize=1)
def _read(texts: tuple[tuple[Path, str], ...], unread: tuple[str, ...]) -> tuple[Slice, ...]:
    """What is in the files; once, however often one command asks (10,000 slices take a second)."""
    found: list[Slice] = []
    problems = list(unread)
    for path, text in texts:
        try:
            found += parse(path, text)
        except ConfigError as error:
            problems.append(error.message)
    if not problems:
        problems = _clashes(found)
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(sorted(found, key=lambda item: item.name))


def parse(path: Path, text: str) -> list[Slice]:
    """The slices of one file. Raises ConfigError, which names file, line and key."""
    read = convert(path, text, _File)
    lines = _headers(text, len(read.slice))
    return [
        _slice(item, path, lines[number], _Place(path, text, ["slice", number]))
        for number, item in enumerate(read.slice)
    ]


@dataclass(frozen=True)
class _Place:
    """A table of a file, to say where in it something is wrong."""

    path: Path
    text: str
    keys: Keys

    def error(self, key: Keys, value: object, reason: object) -> ConfigError:
        keys = [*self.keys, *key]
        where = f"{self.path}:{locate(self.text, keys)}: {dotted(keys)}"
        return ConfigError(f'{where}: "{value}"{reason}')

    def each(self, key: Keys, values: Iterable[V], read: Callable[[V], T]) -> tuple[T, ...]:
        """Read every value of a list. Raises ConfigError at the first that cannot be read."""
        found = []
        for value in values:
            try:
                found.append(read(value))
            except ValueError as error:
                raise self.error(key, value, f": {error}") from error
        return tuple(found)


def _slice(item: _Slice, path: Path, line: int, place: _Place) -> Slice:
    for path_text in item.cgroups:
        if wrong := cgroups.problem(path_text):
            raise place.error(["cgroups"], path_text, f" {wrong}")
    return Slice(
        name=item.name,
        cgroups=tuple(cgroups.normal(path_text) for path_text in item.cgroups),
        xid=item.xid,
        grants=Grants(
            item.grants.raw,
            place.each(["grants", "ports"], item.grants.ports, port),
            place.each(["grants", "addresses"], item.grants.addresses, address),
        ),
        file=path,
        line=line,
        interfaces=place.each(["interfaces"], item.interfaces, interface),
        users=place.each(["users"], item.users, user),
    )


_HEADER = re.compile(r"\s*\[\[\s*slice\s*\]\]")


def _headers(text: str, count: int) -> list[int]:
    """The line of each [[slice]]; of slices that are written otherwise: 1."""
    lines = [at for at, line in enumerate(text.splitlines(), 1) if _HEADER.match(line)]
    return lines if len(lines) == count else [1] * count


def check(slices: list[Slice]) -> None:
    """Raise ConfigError if two slices claim one name, xid, cgroup, port, address or interface."""
    if problems := _clashes(slices):
        raise ConfigError("\n".join(problems))


def _clashes(slices: list[Slice]) -> list[str]:
    """Names, xids, cgroups, ports, addresses and interfaces that two slices claim."""
    problems: list[str] = []
    names: dict[str, Slice] = {}
    xids: dict[int, Slice] = {}
    paths: dict[str, Slice] = {}
    interfaces: dict[str, Slice] = {}
    for item in slices:
        if (other := names.setdefault(item.name, item)) is not item:
            problems.append(f"{_at(item)}: name: also used at {_at(other)}")
            continue
        if item.xid is not None and (other := xids.setdefault(item.xid, item)) is not item:
            problems.append(f"{_key(item, 'xid')}: {item.xid} is also asked for by {_at(other)}")
        for path in item.cgroups:
            if (other := paths.setdefault(path, item)) is not item:
                problems.append(f'{_key(item, "cgroups")}: "{path}" also belongs to {_at(other)}')
        for name in item.interfaces:
            if (other := interfaces.setdefault(name, item)) is not item:
                problems.append(
                    f'{_key(item, "interfaces")}: "{name}" also belongs to {_at(other)}'
                )
    return problems + _address_clashes(slices) + _port_clashes(slices)


def _address_clashes(slices: list[Slice]) -> list[str]:
    """Addresses that two slices reserve, whole or by a port on them."""
    problems = []
    holders: dict[Address, Slice] = {}
    for item in slices:
        for found in item.grants.addresses:
            if (other := holders.setdefault(found, item)) is not item:
                problems.append(
                    f"{_key(item, 'grants', 'addresses')}: {found} is also reserved by {_at(other)}"
                )
    for item in slices:
        for grant in item.grants.ports:
            holder = holders.get(grant.address) if grant.address else None
            if holder is not None and holder is not item:
                problems.append(
                    f"{_key(item, 'grants', 'ports')}: {grant} is on an address that is "
                    f"reserved by {_at(holder)}"
                )
    return problems


def _port_clashes(slices: list[Slice]) -> list[str]:
    """Ports of two slices that one bind could fall under.

    In order of the first port; those that reach as far as the next are kept by
    address, so that one port on 10,000 addresses costs 10,000 steps.
    """
    problems = []
    granted = sorted(
        ((grant, item) for item in slices for grant in item.grants.ports),
        key=lambda pair: (pair[0].proto, pair[0].first),
    )
    reaching: dict[tuple[str, Address | None], list[tuple[Port, Slice]]] = {}
    for grant, item in granted:
        if grant.address is None:
            near = [key for key in reaching if key[0] == grant.proto]
        else:
            near = [(grant.proto, grant.address), (grant.proto, None)]
        for key in near:
            kept = [pair for pair in reaching.get(key, []) if pair[0].last >= grant.first]
            if kept:
                reaching[key] = kept
            else:
                reaching.pop(key, None)
            problems += [
                f"{_key(item, 'grants', 'ports')}: {grant} overlaps {other} of {_at(owner)}"
                for other, owner in kept
                if owner is not item
            ]
        reaching.setdefault((grant.proto, grant.address), []).append((grant, item))
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

    lines = ["[[slice]]", f"name = {_text(item.name)}"]
    lines.append(f"cgroups = {_texts(item.cgroups)}")
    if item.xid is not None:
        lines.append(f"xid = {item.xid}")
    if item.interfaces:
        lines.append(f"interfaces = {_texts(item.interfaces)}")
    if item.users:
        # What is all digits was a uid, and is one again.
        users = ", ".join(name if name.isdecimal() else _text(name) for name in item.users)
        lines.append(f"users = [{users}]")
    if item.grants.any:
        grants = [f'raw = "{item.grants.raw}"']
        if item.grants.ports:
            grants.append(f"ports = {_texts(item.grants.ports)}")
        if item.grants.addresses:
            grants.append(f"addresses = {_texts(item.grants.addresses)}")
        lines.append(f"grants = {{ {', '.join(grants)} }}")
    return "\n".join(lines) + "\n"


def _text(value: object) -> str:
    # Every escape that JSON writes is one of TOML's; DEL is the one character
    # that TOML wants escaped and JSON does not (toml.io/en/v1.0.0#string).
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _texts(values: Iterable[object]) -> str:
    return f"[{', '.join(_text(value) for value in values)}]"
