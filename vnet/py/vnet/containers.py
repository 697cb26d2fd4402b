"""Slices with a network namespace of their own: tc filters on the host ends of their veths.

A slice's file names the interfaces. Those that are there get two filters, on
the clsact qdisc, ingress (what the container sends) and egress (what reaches
it), and an entry in the instance's map ``interfaces``; those that come later
get them from ``vnet watch``. An interface that goes takes its filters along.
See vnet/ext/bpf/veth.bpf.c and docs/containers.md.
"""

import errno
import os
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vnet import bpf, netlink
from vnet.bpfmaps import Map, lib, pinned
from vnet.errors import BpfError

#: Ours, by which they are found again. Filters of a lower priority see a
#: packet first, and so without its xid.
PRIORITY = 7
HANDLE = 0x766E6574

#: program: the clsact qdisc's side (linux/pkt_sched.h: TC_H_CLSACT, its minors)
_SIDES = {"vnet_from_veth": 0xFFFFFFF2, "vnet_to_veth": 0xFFFFFFF3}
_ETH_P_ALL = 3  # pyroute2 swaps it

#: struct vnet_interface (veth.h): xid, made_clsact, MAC address
_ENTRY = struct.Struct("=II6s2x")
_KEY = struct.Struct("=I")


@dataclass(frozen=True)
class Entry:
    """What the map says of an interface."""

    xid: int
    made_clsact: bool = False
    mac: bytes = bytes(6)

    def pack(self) -> bytes:
        return _ENTRY.pack(self.xid, self.made_clsact, self.mac)


def _entry(data: bytes) -> Entry:
    xid, made, mac = _ENTRY.unpack(data)
    return Entry(xid, bool(made), mac)


def prepare() -> None:
    """To be called before programs are loaded: have nf_conntrack there.

    They write into connections by a function of that module (bpf_skb_ct_lookup,
    net/netfilter/nf_conntrack_bpf.c), and are loaded without where it is not
    there yet. No error: it may be built in, or cannot be had; then rules fail.
    """
    if not Path("/proc/sys/net/netfilter/nf_conntrack_count").exists():
        with suppress(FileNotFoundError):
            subprocess.run(
                ["modprobe", "--quiet", "nf_conntrack"],
                env={**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"},
                check=False,
                close_fds=False,  # guard.lock
            )


def apply(instance: Path, wanted: Mapping[str, int]) -> list[str]:
    """Have every wanted interface ({name: xid}) that is there marked, and no other.

    Returns what was done, in words; doing it again does nothing. An interface
    that is not there is no error: it may come. Raises BpfError.
    """
    done: list[str] = []
    with _interfaces(instance) as table:
        known = _entries(table)
        if not wanted and not known:
            return done  # pyroute2 is slow to import
        with _kernel(instance) as kernel:
            there = kernel.indexes()
            xids = {there[name]: xid for name, xid in wanted.items() if name in there}
            names = {index: name for name, index in there.items()}
            for index in [index for index in known if index not in xids]:
                if kernel.leave(index, known[index].made_clsact) and index in names:
                    done.append(f"took the filters off {names[index]}")
                table.try_delete(_KEY.pack(index))
            refused: list[BpfError] = []
            for index, xid in xids.items():
                try:
                    done += kernel.mark(names[index], index, xid, known.get(index), table)
                except BpfError as error:  # the others are marked all the same
                    refused.append(error)
            if refused:
                raise BpfError("; ".join(error.message for error in refused), refused[0].cure)
    return done


def remove(instance: Path, successor: Path | None = None) -> list[str]:
    """Take away what ``apply`` has made, with whatever version's programs.

    But for what the successor has taken over. An instance whose entries cannot
    be read says not where its filters are: they are looked for on every
    interface, and a qdisc then stays, empty. Returns what was done, in words.
    Raises BpfError.
    """
    done: list[str] = []
    path = instance / "maps" / "interfaces"
    if not path.exists():
        return done
    with pinned(path) as table:
        known = _entries(table) if table.value_size == _ENTRY.size else None
    if known == {}:
        return done  # pyroute2 is slow to import
    kept: Mapping[int, Entry] = {}
    if successor is not None:
        with _interfaces(successor) as table:
            kept = _entries(table)
    with _route() as route:
        kernel = _Kernel(instance, route, {})
        for name, index in kernel.indexes().items():
            entry = Entry(0) if known is None else known.get(index)
            if entry and index not in kept and kernel.leave(index, entry.made_clsact):
                done.append(f"took the filters off {name}")
    return done


def healthy(instance: Path, wanted: Mapping[str, int]) -> list[str]:
    """What is not as ``apply`` would leave it, in words. Raises BpfError."""
    wrong: list[str] = []
    with _interfaces(instance) as table:
        known = _entries(table)
        if not wanted and not known:
            return wrong
        with _kernel(instance) as kernel:
            there = kernel.indexes()
            xids = {there[name]: xid for name, xid in wanted.items() if name in there}
            for name, index in there.items():
                if index not in xids:
                    if index in known:
                        wrong.append(f"interface {name} is still marked")
                    continue
                entry = known.get(index)
                if entry is None or entry.xid != xids[index]:
                    wrong.append(f"interface {name} is not known as that of xid {xids[index]}")
                for program in _SIDES:
                    if kernel.filter_name(index, program) != kernel.label(program):
                        wrong.append(f"interface {name}: the tc filter {program} is missing")
    return wrong


def missing(wanted: Mapping[str, int]) -> list[str]:
    """The wanted interfaces that are not there (yet), sorted."""
    return sorted(set(wanted) - {name for _, name in socket.if_nameindex()})


# -- interfaces that come ----------------------------------------------------

_RTNLGRP_LINK = 1
_RTM_NEWLINK = 16
_IFLA_IFNAME = 3
_IFINFOMSG = 16


def listen() -> socket.socket:
    """A socket that becomes readable when an interface of this namespace comes or changes."""
    return netlink.listen(netlink.NETLINK_ROUTE, _RTNLGRP_LINK)


def changed(heard: socket.socket) -> set[str] | None:
    """The names of the interfaces that came or changed since the last call.

    None: the kernel had more to tell than the socket holds; look at all.
    """
    told = list(netlink.notices(heard))
    if None in told:
        return None
    names = set[str]()
    for kind, body in filter(None, told):
        if kind == _RTM_NEWLINK:
            found = netlink.attrs(body[_IFINFOMSG:])
            names.add(found.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"))
    return names


# -- the kernel's side -------------------------------------------------------


@contextmanager
def _interfaces(instance: Path) -> Iterator[Map]:
    with pinned(instance / "maps" / "interfaces") as table:
        if table.value_size != _ENTRY.size:
            raise BpfError(
                f"{instance}/maps/interfaces: entries of {table.value_size} bytes instead of "
                f"{_ENTRY.size}: made by another version",
                "vnet up",
            )
        yield table


def _entries(table: Map) -> dict[int, Entry]:
    return {_KEY.unpack(key)[0]: _entry(value) for key, value in table.items().items()}


@contextmanager
def _kernel(instance: Path) -> Iterator["_Kernel"]:
    programs = {name: bpf.program(instance, name) for name in _SIDES}
    try:
        with _route() as route:
            yield _Kernel(instance, route, programs)
    finally:
        for fd in programs.values():
            os.close(fd)


def _route() -> Any:
    from pyroute2 import IPRoute

    return IPRoute()


@dataclass(frozen=True)
class _Kernel:
    """An open rtnetlink socket, and the programs to be put on interfaces."""

    instance: Path
    route: Any  # pyroute2 has no types
    programs: Mapping[str, int]  #: name: descriptor

    def indexes(self) -> dict[str, int]:
        """The interfaces of this namespace: name: ifindex."""
        return {name: index for index, name in socket.if_nameindex()}

    def label(self, program: str) -> str:
        """A filter's name: which program it holds, by the kernel's number for it.

        pyroute2 does not read TCA_BPF_ID. A number is not used twice, so a
        filter with a program of an instance that is gone is told apart.
        """
        return f"{program}#{lib.vnet_prog_id(self.programs[program])}"

    def mark(self, name: str, index: int, xid: int, entry: Entry | None, table: Map) -> list[str]:
        """Bring one interface in step."""
        todo = [p for p in _SIDES if self.filter_name(index, p) != self.label(p)]
        if not todo and entry is not None and entry.xid == xid:
            return []
        try:
            ours = len(todo) < len(_SIDES)
            made = self._clsact(name, index) or self._made_before(index, entry if ours else None)
            mac = entry.mac if entry else bytes(6)
            # The entry first: a filter without one marks nothing.
            table.set(_KEY.pack(index), Entry(xid, made, mac).pack())
            for program in todo:
                self.route.tc(
                    "replace-filter",
                    "bpf",
                    index,
                    handle=HANDLE,
                    fd=self.programs[program],
                    name=self.label(program),
                    parent=_SIDES[program],
                    direct_action=True,
                    protocol=_ETH_P_ALL,
                    prio=PRIORITY,
                )
        except self._refusal() as refused:
            if refused.code == errno.ENODEV:  # it went away just now
                table.try_delete(_KEY.pack(index))
                return []
            raise BpfError(
                f"interface {name}: tc filter of priority {PRIORITY}: the kernel says: "
                f"{os.strerror(refused.code)}",
                "CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS are needed, and no filter of "
                f"another kind with that priority: tc filter show dev {name} ingress",
            ) from refused
        return [f"marked interface {name} as xid {xid}"]

    def leave(self, index: int, made_clsact: bool) -> bool:
        """Take our filters off, and the qdisc if it was ours and nobody uses it."""
        ours = False
        refusal = self._refusal()
        for program, side in _SIDES.items():
            if not self.filter_name(index, program):
                continue
            ours = True
            try:
                self.route.tc(
                    "del-filter",
                    "bpf",
                    index,
                    handle=HANDLE,
                    parent=side,
                    protocol=_ETH_P_ALL,
                    prio=PRIORITY,
                )
            except refusal as refused:
                if refused.code not in (errno.ENOENT, errno.ENODEV):
                    raise BpfError(
                        f"interface {index}: removing a tc filter: {os.strerror(refused.code)}"
                    ) from refused
        if ours and made_clsact and not any(self._filters(index, s) for s in _SIDES.values()):
            with suppress(refusal):  # somebody else has taken it away
                self.route.tc("del", "clsact", index)
        return ours

    def filter_name(self, index: int, program: str) -> str:
        """The name of our filter on one side of an interface; "" if there is none."""
        for found in self._filters(index, _SIDES[program]):
            options = found.get_attr("TCA_OPTIONS")
            if found["handle"] == HANDLE and found["info"] >> 16 == PRIORITY and options:
                name = str(options.get_attr("TCA_BPF_NAME") or "")
                if name.startswith(f"{program}#"):
                    return name
        return ""

    def _filters(self, index: int, side: int) -> list[Any]:
        try:
            return [f for f in self.route.get_filters(index, parent=side) if f["handle"]]
        except self._refusal():  # no such interface, or no clsact on it
            return []

    def _clsact(self, name: str, index: int) -> bool:
        """Have the qdisc there. Returns whether it was made now.

        Raises BpfError where ``ingress`` has its place, which takes filters for both ways and
        has them see one (ingress_bind_filter() in net/sched/sch_ingress.c).
        """
        try:
            self.route.tc("add", "clsact", index)
        except self._refusal() as refused:
            if refused.code != errno.EEXIST:
                raise
            kinds = {qdisc.get_attr("TCA_KIND") for qdisc in self.route.get_qdiscs(index)}
            if "ingress" in kinds:
                raise BpfError(
                    f"interface {name}: somebody's qdisc ingress is where clsact has to be",
                    f"tc qdisc del dev {name} ingress, or have its owner use clsact",
                ) from refused
            return False
        return True

    def _made_before(self, index: int, entry: Entry | None) -> bool:
        """Whether the qdisc is ours from before, perhaps of another version's instance."""
        if entry is not None:
            return entry.made_clsact
        for other in bpf.instances(self.instance.parent):
            path = other / "maps" / "interfaces"
            if other == self.instance or not path.exists():
                continue
            with pinned(path) as table:
                data = table.get(_KEY.pack(index)) if table.value_size == _ENTRY.size else None
            if data is not None and _entry(data).made_clsact:
                return True
        return False

    @staticmethod
    def _refusal() -> type[Any]:
        from pyroute2.netlink.exceptions import NetlinkError

        return NetlinkError  # type: ignore[no-any-return]
