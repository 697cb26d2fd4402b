"""The kernel module's slices table and counters, over generic netlink.

The family and every number in it come from vnet/ext/kernel/xt_copyxid.h, by
way of ``vnet._abi``. It exists in the initial network namespace only.
"""

import errno
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from vnet import netlink
from vnet._abi import ffi, lib
from vnet.errors import NetlinkError

MODULE = "xt_copyxid"
FAMILY = ffi.string(lib.COPYXID_GENL_NAME).decode()

# include/uapi/linux/genetlink.h: the controller, which knows the families.
_GENL_ID_CTRL = 0x10
_CTRL_CMD_GETFAMILY = 3
_CTRL_ATTR_FAMILY_ID = 1
_CTRL_ATTR_FAMILY_NAME = 2
_GENL_HEADER = struct.Struct("=BBH")

#: counter names by their place in the kernel's array
COUNTERS: tuple[str, ...] = tuple(
    name.removeprefix("COPYXID_CNT_").lower().replace("_", "-")
    for _value, name in sorted(
        (getattr(lib, name), name)
        for name in dir(lib)
        if name.startswith("COPYXID_CNT_") and name != "COPYXID_CNT_MAX"
    )
)


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    cgroup_id: int
    xid: int
    level: int


@dataclass(frozen=True)
class Stats:
    """What the target did in one network namespace since the module was loaded."""

    netns: int  #: inode of /proc/PID/ns/net
    counters: dict[str, int]  #: packets, by COUNTERS


@dataclass(frozen=True)
class Module:
    """An open connection to the module."""

    socket: netlink.Netlink
    family: int

    def _message(self, command: int, flags: int, body: bytes = b"") -> netlink.Message:
        header = _GENL_HEADER.pack(command, lib.COPYXID_GENL_VERSION, 0)
        return netlink.Message(self.family, flags, header + body)

    def set_many(self, entries: Mapping[int, int]) -> dict[int, int]:
        """Add or change {cgroup id: xid}. Returns {cgroup id: errno} of the refused.

        ENOENT there means that the cgroup is gone, which is nobody's mistake.
        """
        ids = list(entries)
        refused = self.socket.request(
            [
                self._message(
                    lib.COPYXID_CMD_SLICE_SET, netlink.NLM_F_CREATE, _entry(i, entries[i])
                )
                for i in ids
            ]
        )
        return {ids[position]: code for position, code in refused.items()}

    def delete_many(self, ids: Sequence[int]) -> dict[int, int]:
        """Remove entries. Returns {cgroup id: errno}; absent ones are no error."""
        refused = self.socket.request(
            [self._message(lib.COPYXID_CMD_SLICE_DEL, 0, _cgroup_id(i)) for i in ids]
        )
        return {ids[p]: code for p, code in refused.items() if code != errno.ENOENT}

    def flush(self) -> None:
        """Empty the table. Raises NetlinkError."""
        refused = self.socket.request([self._message(lib.COPYXID_CMD_SLICE_FLUSH, 0)])
        for code in refused.values():
            raise NetlinkError(f"emptying the slices table: {os.strerror(code)}", code)

    def table(self) -> dict[int, Entry]:
        """All entries by cgroup id. Raises NetlinkError."""
        found = {}
        for body in self.socket.dump(self._message(lib.COPYXID_CMD_SLICE_GET, 0)):
            values = netlink.attrs(body[4:])
            cgroup_id = struct.unpack("=Q", values[lib.COPYXID_A_CGROUP_ID])[0]
            found[cgroup_id] = Entry(
                cgroup_id,
                struct.unpack("=I", values[lib.COPYXID_A_XID])[0],
                struct.unpack("=I", values[lib.COPYXID_A_LEVEL])[0],
            )
        return found

    def stats(self) -> list[Stats]:
        """Counters of every network namespace in which the target is in use."""
        found = []
        for body in self.socket.dump(self._message(lib.COPYXID_CMD_STATS_GET, 0)):
            values = netlink.attrs(body[4:])
            numbers = struct.iter_unpack("=Q", values[lib.COPYXID_A_COUNTERS])
            counters = dict(zip(COUNTERS, (number for (number,) in numbers), strict=False))
            found.append(Stats(struct.unpack("=I", values[lib.COPYXID_A_NETNS])[0], counters))
        return found


@contextmanager
def connect() -> Iterator[Module]:
    """Talk to the module. Raises NetlinkError (ENOENT: it is not loaded)."""
    with netlink.Netlink(netlink.NETLINK_GENERIC, "the module's slices table") as socket:
        name = netlink.attr(_CTRL_ATTR_FAMILY_NAME, FAMILY.encode() + b"\0")
        body = _GENL_HEADER.pack(_CTRL_CMD_GETFAMILY, 1, 0) + name
        try:
            answer = socket.one(netlink.Message(_GENL_ID_CTRL, 0, body))
        except NetlinkError as error:
            if error.errno != errno.ENOENT:
                raise
            raise NetlinkError(
                f"module {MODULE} is not loaded, or this is not the initial network namespace",
                errno.ENOENT,
                "vnet up",
            ) from error
        family = struct.unpack("=H", netlink.attrs(answer[4:])[_CTRL_ATTR_FAMILY_ID])[0]
        yield Module(socket, family)


def present() -> bool:
    """Whether the module answers here, in this network namespace."""
    try:
        with connect():
            return True
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return False
        raise


def _cgroup_id(value: int) -> bytes:
    return netlink.attr(lib.COPYXID_A_CGROUP_ID, struct.pack("=Q", value))


def _entry(cgroup_id: int, xid: int) -> bytes:
    return _cgroup_id(cgroup_id) + netlink.attr(lib.COPYXID_A_XID, struct.pack("=I", xid))
