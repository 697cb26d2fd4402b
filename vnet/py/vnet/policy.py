"""Which cgroup is which slice, and who holds what: into the eBPF maps at once.

The maps have room for two policies (generations). ``write`` makes the other
one and puts it in force by one store, so that every packet meets a whole
policy, the old or the new. Writers take turns by vnet's lock (``guard.lock``).
"""

import errno
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Literal

from vnet import owners
from vnet.bpfmaps import Map, Pairs, lib, pinned, table
from vnet.copyxid import Entry

Address = IPv4Address | IPv6Address
Raw = Literal["deny", "own", "full"]

RAW: dict[Raw, int] = {
    "deny": lib.VNET_RAW_DENY,
    "own": lib.VNET_RAW_OWN,
    "full": lib.VNET_RAW_FULL,
}
PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": socket.IPPROTO_SCTP}

_U32, _U64 = struct.Struct("=I"), struct.Struct("=Q")
_PORT = struct.Struct("=BBH16s")  # struct vnet_port
_FACTS = struct.Struct("=QQII")  # struct vnet_facts
_SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h, 5.14

#: room for entries that are added one by one, until the next ``write``
_ROOM = 1024


@dataclass(frozen=True)
class Port:
    """One reserved port."""

    proto: int  #: IPPROTO_TCP, IPPROTO_UDP, IPPROTO_SCTP
    port: int
    address: Address | None = None  #: None: on every address


@dataclass
class Policy:
    """All that the programs go by."""

    slices: dict[int, int] = field(default_factory=dict)  #: cgroup id: xid
    grants: dict[int, Raw] = field(default_factory=dict)  #: xid: raw sockets; absent: deny
    ports: list[tuple[Port, int]] = field(default_factory=list)  #: and the xid that holds it
    addresses: dict[Address, int] = field(default_factory=dict)  #: and the xid that holds it
    observe: bool = False  #: report, refuse nothing


@dataclass(frozen=True)
class Control:
    """What is in force."""

    generation: int
    observe: bool


def control(instance: Path) -> Control:
    """What is in force. Raises BpfError."""
    with _maps(instance) as maps:
        return maps.control()


def set_control(instance: Path, value: Control) -> None:
    """Put in force: one store, seen by every program at its next start. Raises BpfError."""
    with _maps(instance) as maps:
        maps.set_control(value)


def write(instance: Path, policy: Policy) -> list[int]:
    """Put a policy in force in place of the present one. Raises BpfError.

    Called in the node's network namespace: ports and addresses are reserved
    there. Returns the cgroup ids that do not exist and were left out; one that
    was there in the old policy stays, for what is left of its sockets. Killed
    at any point, it leaves the old policy or the new one.
    """
    with _maps(instance) as maps:
        return maps.write(policy)


def read(instance: Path) -> Policy:
    """The policy in force. Raises BpfError."""
    with _maps(instance) as maps:
        now = maps.control()
        held = {name: maps.inner(name, now.generation) for name in _TABLES}
        return Policy(
            slices={_U64.unpack(k)[0]: _U32.unpack(v)[0] for k, v in held["slices"].items()},
            grants=_grants_back(held["grants"]),
            ports=_ports_back(held["ports"]),
            addresses={_address_back(k): _U32.unpack(v)[0]
                       for k, v in held["addresses"].items()},
            observe=now.observe,
        )  # fmt: skip


def differences(instance: Path) -> list[str]:
    """Where what programs look at before the tables does not fit the tables. Raises BpfError."""
    with _maps(instance) as maps:
        return list(maps.differences())


def read_grants(instance: Path) -> dict[int, Raw]:
    """{xid: its grant} of the policy in force; absent: deny. Raises BpfError."""
    with _maps(instance) as maps:
        return _grants_back(maps.inner("grants", maps.control().generation))


class Slices:
    """The slices of the policy in force, with the methods of ``copyxid.Module``."""

    def __init__(self, instance: Path) -> None:
        self._instance = instance

    def table(self) -> dict[int, Entry]:
        """All entries by cgroup id; level 0: that cgroup is gone. Raises BpfError."""
        with _maps(self._instance) as maps:
            found = maps.inner("slices", maps.control().generation)
        ids = [(_U64.unpack(k)[0], _U32.unpack(v)[0]) for k, v in found.items()]
        levels = owners.levels(number for number, _xid in ids)
        return {n: Entry(n, xid, levels.get(n, 0)) for n, xid in ids}

    def set_many(self, entries: Mapping[int, int]) -> dict[int, int]:
        """Add or change {cgroup id: xid}. Returns {cgroup id: errno} of the refused.

        ENOENT there means that the cgroup is gone, which is nobody's mistake.
        """
        levels = owners.levels(entries)
        refused = {number: errno.ENOENT for number in entries if number not in levels}
        good = {number: xid for number, xid in entries.items() if number in levels}
        with _maps(self._instance) as maps:
            now = maps.control().generation
            with maps.open_inner("slices", now) as slices:
                if slices is not None:
                    # The level first: an entry whose level is not looked at is none.
                    maps.add_levels(now, owners.bits(levels[number] for number in good))
                    owners.clear(maps.directory, now, good)
                    left = {
                        number: code
                        for number, xid in good.items()
                        if (code := slices.try_set(_U64.pack(number), _U32.pack(xid)))
                    }
                    added = {n: xid for n, xid in good.items() if n not in left}
                    owners.add(maps.directory, now, added)
                else:
                    left = dict.fromkeys(good, errno.E2BIG)
            if errno.E2BIG in left.values():  # full: into a bigger table, by a new policy
                policy = read(self._instance)
                policy.slices |= {number: good[number] for number in left}
                maps.write(policy)
                left = {}
        return refused | left

    def delete_many(self, ids: Sequence[int]) -> dict[int, int]:
        """Remove entries. Returns {cgroup id: errno}; absent ones are no error."""
        with _maps(self._instance) as maps, maps.in_force("slices") as slices:
            if slices is None:
                return {}
            owners.clear(maps.directory, maps.control().generation, ids)
            codes = {number: slices.try_delete(_U64.pack(number)) for number in ids}
        return {number: code for number, code in codes.items() if code not in (0, errno.ENOENT)}

    def flush(self) -> None:
        """Empty the table. Raises BpfError."""
        self.delete_many(list(self.table()))


# -- maps -----------------------------------------------------------------

#: maps of maps, with the sizes of the inner ones' keys; values are all u32. An
#: inner one is pinned, too, as NAME_GENERATION: opening it by the number that the
#: outer one holds would take CAP_SYS_ADMIN (bpf_map_get_fd_by_id,
#: kernel/bpf/syscall.c).
_TABLES = {"slices": 8, "grants": 4, "ports": _PORT.size, "addresses": 16}


class _Maps:
    def __init__(self, directory: Path, maps: dict[str, Map]) -> None:
        self.directory = directory
        self.maps = maps

    def control(self) -> Control:
        word = _U64.unpack(self.maps["control"].get(_U32.pack(0)) or bytes(8))[0]
        return Control(word & lib.VNET_CONTROL_GENERATION, bool(word & lib.VNET_CONTROL_OBSERVE))

    def set_control(self, value: Control) -> None:
        word = value.generation | (lib.VNET_CONTROL_OBSERVE if value.observe else 0)
        self.maps["control"].set(_U32.pack(0), _U64.pack(word))

    @contextmanager
    def open_inner(self, name: str, generation: int) -> Iterator[Map | None]:
        path = self._pin(name, generation)
        if not path.exists():  # no policy has been written yet
            yield None
            return
        with pinned(path) as inner:
            yield inner

    def _pin(self, name: str, generation: int) -> Path:
        return self.directory / f"{name}_{generation}"

    def in_force(self, name: str) -> AbstractContextManager[Map | None]:
        return self.open_inner(name, self.control().generation)

    def inner(self, name: str, generation: int) -> Pairs:
        with self.open_inner(name, generation) as inner:
            return inner.items() if inner is not None else {}

    def facts(self, generation: int) -> list[int]:
        return list(_FACTS.unpack(self.maps["facts"].get(_U32.pack(generation)) or b""))

    def add_levels(self, generation: int, bits: int) -> None:
        levels, *rest = self.facts(generation)
        if bits & ~levels:
            self.maps["facts"].set(_U32.pack(generation), _FACTS.pack(levels | bits, *rest))

    def differences(self) -> Iterator[str]:
        now = self.control().generation
        copied = owners.read(self.directory, now)
        held = {_U64.unpack(k)[0]: _U32.unpack(v)[0] for k, v in self.inner("slices", now).items()}
        for number in [n for n, xid in copied if held.get(n) != xid][:10]:
            yield f"the quick copy of the slices has another owner of cgroup id {number}"
        levels, cookie, *counts = self.facts(now)
        if owners.bits(owners.levels(held).values()) & ~levels:
            yield "the guard does not look for slices at the depth of all of their cgroups"
        if cookie != _netns_cookie():
            yield "ports and addresses are reserved in another network namespace than this one"
        if counts != [len(self.inner(name, now)) for name in ("ports", "addresses")]:
            yield "the numbers of reserved ports and addresses are not those of their tables"

    def write(self, policy: Policy) -> list[int]:
        now = self.control().generation
        other = 1 - now
        levels = owners.levels(policy.slices)
        bits = owners.bits(levels.values())
        left_out = [number for number in policy.slices if number not in levels]
        kept: list[int] = []
        if left_out:  # a cgroup that is gone may still have sockets
            known = self.inner("slices", now)
            kept = [number for number in left_out if _U64.pack(number) in known]
            bits |= self.facts(now)[0] if kept else 0
        ports, addresses = _ports(policy.ports), _addresses(policy.addresses)
        filling: dict[str, Pairs] = {
            "slices": {
                _U64.pack(number): _U32.pack(policy.slices[number]) for number in (*levels, *kept)
            },
            "grants": {_U32.pack(xid): _U32.pack(RAW[raw]) for xid, raw in policy.grants.items()},
            "ports": ports,
            "addresses": addresses,
        }
        with ExitStack() as stack:
            made = {}
            for name, pairs in filling.items():
                size = _TABLES[name]
                room = 2 * len(pairs) + _ROOM
                made[name] = stack.enter_context(table(name, size, _U32.size, room))
                made[name].fill(pairs)
            for name, inner in made.items():
                self.maps[name].set(_U32.pack(other), _U32.pack(inner.fd))
                inner.pin(self._pin(name, other))
            owners.fill(self.directory, other, {n: policy.slices[n] for n in (*levels, *kept)})
            facts = _FACTS.pack(bits, _netns_cookie(), len(ports), len(addresses))
            self.maps["facts"].set(_U32.pack(other), facts)
            self.set_control(Control(other, policy.observe))
            # A program that began before that store goes by the old generation to
            # its end, and the next write() changes that one. The kernel waits for
            # all running programs when a map of maps is written to
            # (maybe_wait_bpf_programs, kernel/bpf/syscall.c): writing the same again.
            name, inner = next(iter(made.items()))
            self.maps[name].set(_U32.pack(other), _U32.pack(inner.fd))
        return [number for number in left_out if number not in kept]


@contextmanager
def _maps(instance: Path) -> Iterator[_Maps]:
    with ExitStack() as stack:
        directory = instance / "maps"
        names = ("control", "facts", *_TABLES)
        yield _Maps(
            directory, {name: stack.enter_context(pinned(directory / name)) for name in names}
        )


# -- keys and values ------------------------------------------------------


def _netns_cookie() -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_socket:
        found = any_socket.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    return int(_U64.unpack(found)[0])


def mapped(address: Address | None) -> bytes:
    """An address as the maps have it: IPv4 as IPv4-mapped IPv6; none: all zero."""
    if address is None:
        return bytes(16)
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


def _address_back(data: bytes) -> Address:
    address = IPv6Address(data)
    return address.ipv4_mapped or address


def _grants_back(pairs: Pairs) -> dict[int, Raw]:
    names = {_U32.pack(number): name for name, number in RAW.items()}
    return {_U32.unpack(key)[0]: names[value] for key, value in pairs.items()}


def _addresses(addresses: Mapping[Address, int]) -> Pairs:
    return {mapped(address): _U32.pack(xid) for address, xid in addresses.items()}


def _ports(ports: Iterable[tuple[Port, int]]) -> Pairs:
    """struct vnet_port: xid, with the entries that say who may bind to all addresses."""
    pairs: Pairs = {}
    holders: dict[tuple[int, int], set[int]] = {}
    some: set[tuple[int, int]] = set()
    for port, xid in ports:
        scope = lib.VNET_PORT_ANY if port.address is None else lib.VNET_PORT_ADDR
        pairs[_PORT.pack(port.proto, scope, port.port, mapped(port.address))] = _U32.pack(xid)
        holders.setdefault((port.proto, port.port), set()).add(xid)
        if port.address is not None:
            some.add((port.proto, port.port))
    for proto, number in some:
        held = holders[proto, number]
        sole = next(iter(held)) if len(held) == 1 else 0
        key = _PORT.pack(proto, lib.VNET_PORT_WILD, number, bytes(16))
        pairs[key] = _U32.pack(sole)
    return pairs


def _ports_back(pairs: Pairs) -> list[tuple[Port, int]]:
    found = []
    for key, value in pairs.items():
        proto, scope, number, address = _PORT.unpack(key)
        if scope != lib.VNET_PORT_WILD:
            where = None if scope == lib.VNET_PORT_ANY else _address_back(address)
            found.append((Port(proto, number, where), _U32.unpack(value)[0]))
    return found
