"""Which cgroups have sockets left: asked of the kernel by their ids (sock_diag(7)).

A socket keeps the cgroup that it was made in, for good, also after the cgroup's
directory is removed (sock_cgroup_data, include/linux/cgroup-defs.h). Nothing in
the file system tells of such a cgroup any more.
"""

import errno
import socket
import struct
from collections.abc import Collection

from vnet.errors import NetlinkError
from vnet.netlink import Message, Netlink, attr, attrs

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
# include/uapi/linux/inet_diag.h
_INET_DIAG_REQ_BYTECODE = 1
_INET_DIAG_CGROUP_ID = 21
_BC_JMP, _BC_CGROUP_COND = 1, 13
_REQUEST = struct.Struct("=BBBxI48x")
_ANSWER = 72  # struct inet_diag_msg
_OP = struct.Struct("=BBH")
_ID = struct.Struct("=Q")

_PROTOCOLS = (
    *(socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_UDPLITE),
    *(socket.IPPROTO_RAW, socket.IPPROTO_SCTP),
)
_AT_ONCE = 1000
"""Ids in one question: a jump reaches 64 KiB far."""


def holding(ids: Collection[int]) -> set[int]:
    """Those of these cgroup ids of which this network namespace has a socket left.

    IPv4 and IPv6; a protocol whose sockets the kernel cannot list (ping; raw
    and SCTP where their modules are missing) counts as having none. Raises
    NetlinkError if the kernel does not answer.
    """
    found: set[int] = set()
    wanted = sorted(ids)
    with Netlink(_NETLINK_SOCK_DIAG, "sockets") as kernel:
        for start in range(0, len(wanted), _AT_ONCE):
            condition = attr(_INET_DIAG_REQ_BYTECODE, any_of(wanted[start : start + _AT_ONCE]))
            for family in (socket.AF_INET, socket.AF_INET6):
                for protocol in _PROTOCOLS:
                    body = _REQUEST.pack(family, protocol, 0, 0xFFFFFFFF) + condition
                    found |= _ask(kernel, body)
    return found & set(wanted)


def _ask(kernel: Netlink, body: bytes) -> set[int]:
    try:
        answers = kernel.dump(Message(_SOCK_DIAG_BY_FAMILY, 0, body))
    except NetlinkError as error:
        if error.errno == errno.ENOENT:  # it cannot list this protocol
            return set()
        raise
    ids = (attrs(answer[_ANSWER:]).get(_INET_DIAG_CGROUP_ID) for answer in answers)
    return {_ID.unpack(number)[0] for number in ids if number}


def any_of(ids: Collection[int]) -> bytes:
    """The filter program "its cgroup's id is one of these".

    inet_diag_bc_run() in net/ipv4/inet_diag.c runs it. A condition goes ``yes``
    bytes on where it holds, ``no`` bytes where not; to end exactly behind the
    program is to accept, beyond that to refuse.
    """
    program = b""
    for number in reversed(list(ids)):
        if program:
            # not this one: over the jump, to the next; this one: the jump, which
            # always takes its ``no``, leads to the end
            program = _OP.pack(_BC_JMP, 4, 4 + len(program)) + program
        condition = _OP.pack(_BC_CGROUP_COND, 4 + _ID.size, 4 + _ID.size + 4)
        program = condition + _ID.pack(number) + program
    return program
