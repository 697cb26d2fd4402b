"""The base chains that iptables-nft makes on the way, and taking them away again.

iptables-nft creates ``table ip mangle`` or ``raw`` and a base chain the first time a
rule goes there, and leaves them behind. This goes through netlink rather than
``nft``, because only netlink can say NLM_F_NONREC: delete it *if it is empty*,
in one step, so that a rule somebody adds at that moment is never lost
(nf_tables_delchain and nf_tables_deltable in net/netfilter/nf_tables_api.c).
"""

import errno
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from vnet import netlink
from vnet.errors import NetlinkError

# include/uapi/linux/netfilter/nfnetlink.h and nf_tables.h
_SUBSYSTEM = 10 << 8
_GETTABLE = _SUBSYSTEM | 1
_DELTABLE = _SUBSYSTEM | 2
_GETCHAIN = _SUBSYSTEM | 4
_DELCHAIN = _SUBSYSTEM | 5
_BATCH_BEGIN = 0x10
_BATCH_END = 0x11
_TABLE_NAME = 1
_CHAIN_TABLE = 1
_CHAIN_NAME = 3
_CHAIN_HOOK = 4
_CHAIN_POLICY = 5
_ACCEPT = 1

_PROTO = {4: 2, 6: 10}  # NFPROTO_IPV4, NFPROTO_IPV6
TABLES = ("raw", "mangle")


@dataclass(frozen=True)
class Bases:
    """What exists in one family of the tables that may hold rules of ours."""

    tables: tuple[str, ...]
    chains: tuple[str, ...]  #: base chains, as TABLE/CHAIN, sorted


def _nfgen(family: int, resource: int = 0) -> bytes:
    return struct.pack("=BB", family, 0) + struct.pack(">H", resource)


def _name(kind: int, value: str) -> bytes:
    return netlink.attr(kind, value.encode() + b"\0")


def bases(family: int) -> Bases:
    """What is there now. ``family`` is 4 or 6. Without nf_tables: nothing."""
    proto = _PROTO[family]
    try:
        with netlink.Netlink(netlink.NETLINK_NETFILTER, "listing nftables") as socket:
            tables = socket.dump(netlink.Message(_GETTABLE, 0, _nfgen(proto)))
            chains = socket.dump(netlink.Message(_GETCHAIN, 0, _nfgen(proto)))
    except NetlinkError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT):
            return Bases((), ())
        raise
    names = {_text(netlink.attrs(body[4:]), _TABLE_NAME) for body in tables}
    return Bases(
        tuple(name for name in TABLES if name in names),
        tuple(
            sorted(
                _place(found)
                for found in (netlink.attrs(body[4:]) for body in chains)
                if _text(found, _CHAIN_TABLE) in TABLES and _CHAIN_HOOK in found
            )
        ),
    )


def remove_if_empty(family: int, tables: Iterable[str], chains: Iterable[str]) -> list[str]:
    """Delete those base chains (TABLE/CHAIN), then the tables, that nobody uses.

    Returns what stays. A base chain whose policy is no longer ``accept`` was
    changed by somebody and stays.
    """
    stays = []
    with netlink.Netlink(netlink.NETLINK_NETFILTER, "tidying nftables") as socket:
        policies = {
            _place(found): struct.unpack(">I", found[_CHAIN_POLICY])[0]
            for found in (
                netlink.attrs(body[4:])
                for body in socket.dump(netlink.Message(_GETCHAIN, 0, _nfgen(_PROTO[family])))
            )
            if _CHAIN_POLICY in found
        }
        for place in chains:
            table, _, chain = place.partition("/")
            body = _name(_CHAIN_TABLE, table) + _name(_CHAIN_NAME, chain)
            if policies.get(place, _ACCEPT) != _ACCEPT or not _delete(
                socket, family, _DELCHAIN, body
            ):
                stays.append(place)
        stays += [
            f"table {table}"
            for table in tables
            if not _delete(socket, family, _DELTABLE, _name(_TABLE_NAME, table))
        ]
    return stays


def _place(found: dict[int, bytes]) -> str:
    return f"{_text(found, _CHAIN_TABLE)}/{_text(found, _CHAIN_NAME)}"


def _delete(socket: netlink.Netlink, family: int, kind: int, body: bytes) -> bool:
    """Delete one thing if it is empty. False: it is in use. Absent is as deleted."""
    code = socket.batch(
        netlink.Message(_BATCH_BEGIN, 0, _nfgen(0, _SUBSYSTEM >> 8)),
        [netlink.Message(kind, netlink.NLM_F_NONREC, _nfgen(_PROTO[family]) + body)],
        netlink.Message(_BATCH_END, 0, _nfgen(0, _SUBSYSTEM >> 8)),
    )
    if code in (0, errno.ENOENT):
        return True
    if code == errno.EBUSY:
        return False
    raise NetlinkError(f"tidying nftables in family {family}", code)


def _text(found: dict[int, bytes], kind: int) -> str:
    return found.get(kind, b"").rstrip(b"\0").decode(errors="replace")
