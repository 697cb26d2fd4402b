"""Netlink messages as bytes, a socket to ask by, and one to hear notices by.

Only what this package needs, and fast: 10,000 table entries go
out in a few dozen system calls. Layout: RFC 3549 section 2.2 and the kernel's
include/uapi/linux/netlink.h.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from types import TracebackType

from vnet.errors import NetlinkError

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12
NETLINK_GENERIC = 16

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_NONREC = 0x100
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400

NLMSG_ERROR = 2
NLMSG_DONE = 3

_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_NETLINK_CAP_ACK = 10
_SO_RCVBUFFORCE = 33
_HEADER = struct.Struct("=IHHII")
_ATTR = struct.Struct("=HH")
_INT = struct.Struct("=i")

# Each refused message is answered by an error message of its own, and an
# answer takes about 1 KiB of the receive buffer whatever its length.
_BATCH = 256
_RECEIVE_BUFFER = 1 << 20


def attr(kind: int, data: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    return _ATTR.pack(4 + len(data), kind) + data + b"\0" * (-len(data) % 4)


def attrs(data: bytes) -> dict[int, bytes]:
    """The attributes in ``data`` by type, nesting and byte-order bits cut off."""
    found: dict[int, bytes] = {}
    at = 0
    while at + 4 <= len(data):
        length, kind = _ATTR.unpack_from(data, at)
        if length < 4 or at + length > len(data):
            break
        found[kind & 0x3FFF] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


def listen(protocol: int, group: int) -> socket.socket:
    """A socket that becomes readable when the kernel tells a multicast group something."""
    heard = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    heard.bind((0, 0))
    heard.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
    heard.setblocking(False)
    return heard


def notices(heard: socket.socket) -> Iterator[tuple[int, bytes] | None]:
    """Kind and body of each message that waits; None: there were more than the socket holds."""
    while True:
        try:
            data = heard.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            yield None
            continue
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, *_ = _HEADER.unpack_from(data, at)
            if length < _HEADER.size:
                break
            yield kind, data[at + _HEADER.size : at + length]
            at += (length + 3) & ~3


class Message:
    """A request before it has a sequence number."""

    __slots__ = ("body", "flags", "kind")

    def __init__(self, kind: int, flags: int, body: bytes) -> None:
        self.kind = kind
        self.flags = flags
        self.body = body

    def encode(self, seq: int, ack: bool = False) -> bytes:
        flags = self.flags | NLM_F_REQUEST | (NLM_F_ACK if ack else 0)
        return _HEADER.pack(16 + len(self.body), self.kind, flags, seq, 0) + self.body


class Netlink:
    """One netlink socket; a context manager."""

    def __init__(self, protocol: int, what: str) -> None:
        self._what = what
        self._seq = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        # Errors then carry only the request's header, not all of it.
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        # The kernel answers while it handles the request: this long means never.
        self._socket.settimeout(20)
        self._socket.bind((0, 0))

    def __enter__(self) -> "Netlink":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def request(self, messages: Sequence[Message]) -> dict[int, int]:
        """Send many requests; return {position: errno} of those refused.

        The kernel handles the messages of one datagram in order and goes on
        after a refusal. Raises NetlinkError if it does not answer.
        """
        refused: dict[int, int] = {}
        for start in range(0, len(messages), _BATCH):
            batch = messages[start : start + _BATCH]
            first = self._seq + 1
            self._seq += len(batch)
            self._send(
                b"".join(
                    message.encode(first + i, ack=i == len(batch) - 1)
                    for i, message in enumerate(batch)
                )
            )
            waiting = True
            while waiting:
                for kind, _flags, seq, body in self._receive():
                    if kind != NLMSG_ERROR or not first <= seq <= self._seq:
                        continue
                    if code := -_INT.unpack_from(body)[0]:
                        refused[start + seq - first] = code
                    if seq == self._seq:
                        waiting = False
        return refused

    def one(self, message: Message) -> bytes:
        """Send one request and return the body of its answer."""
        self._seq += 1
        self._send(message.encode(self._seq))
        for kind, _flags, seq, body in self._receive():
            if seq != self._seq:
                continue
            if kind == NLMSG_ERROR:
                raise self._error(-_INT.unpack_from(body)[0])
            return body
        raise self._error(errno.ENODATA)

    def dump(self, message: Message) -> list[bytes]:
        """All answers to a dump request; asked again if it changed meanwhile."""
        for _attempt in range(20):
            answers, whole = self._dump_once(message)
            if whole:
                return answers
        # It changes faster than it can be read; what was read is the best there is.
        return answers

    def batch(self, begin: Message, messages: Sequence[Message], end: Message) -> int:
        """One nfnetlink transaction; return the first errno, 0 if it was taken."""
        first = self._seq + 1
        self._seq += len(messages) + 2
        parts = [begin.encode(first)]
        parts += [m.encode(first + 1 + i, ack=True) for i, m in enumerate(messages)]
        parts.append(end.encode(self._seq))
        self._send(b"".join(parts))
        answered = 0
        code = 0
        while answered < len(messages):
            for kind, _flags, seq, body in self._receive():
                if kind != NLMSG_ERROR or seq < first:
                    continue
                answered += 1
                code = code or -_INT.unpack_from(body)[0]
                if seq == first:  # the batch as a whole was refused
                    return code
        return code

    def _dump_once(self, message: Message) -> tuple[list[bytes], bool]:
        self._seq += 1
        self._send(
            Message(message.kind, message.flags | NLM_F_DUMP, message.body).encode(self._seq)
        )
        answers: list[bytes] = []
        whole = True
        while True:
            for kind, flags, seq, body in self._receive():
                if seq != self._seq:
                    continue
                whole = whole and not flags & NLM_F_DUMP_INTR
                if kind in (NLMSG_DONE, NLMSG_ERROR):
                    code = -_INT.unpack_from(body)[0] if len(body) >= 4 else 0
                    if code:
                        raise self._error(code)
                    return answers, whole
                answers.append(body)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            raise self._error(error.errno or errno.EIO) from error

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        try:
            data = self._socket.recv(1 << 17)
        except TimeoutError as error:
            raise self._error(errno.ETIMEDOUT) from error
        except OSError as error:
            raise self._error(error.errno or errno.EIO) from error
        at = 0
        while at + 16 <= len(data):
            length, kind, flags, seq, _port = _HEADER.unpack_from(data, at)
            if length < 16:
                break
            yield kind, flags, seq, data[at + 16 : at + length]
            at += (length + 3) & ~3

    def _error(self, code: int) -> NetlinkError:
        cure = "run it as root" if code == errno.EPERM else ""
        return NetlinkError(f"{self._what}: the kernel says: {os.strerror(code)}", code, cure)
