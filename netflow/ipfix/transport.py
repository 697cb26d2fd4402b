"""How messages get to a receiver: UDP, or TCP of which it is known what has arrived.

RFC 7011 section 10. Over TCP the kernel tells how much of what was sent the
receiver's kernel has not acknowledged (SIOCOUTQ, tcp(7)): what it has is as much
as an exporter can know, since IPFIX itself acknowledges nothing.
"""

from __future__ import annotations

import errno
import fcntl
import select
import socket
import struct
import termios
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from time import monotonic
from typing import Literal

from netflow.ipfix.session import Messages

Kind = Literal["udp", "tcp"]
PORT = 4739
"""IANA's for IPFIX."""
GIVE_UP = 30.0
"""Seconds after which a peer that acknowledges nothing is taken for gone."""
CONNECT = 10.0
PARTING = 5.0
"""Seconds given to a receiver to take what is on its way when the exporter is to end."""
LOOK = 0.5
"""Seconds between looks at what has arrived, while nothing more can be sent."""
BURST = 16
"""Datagrams that go at once: a receive buffer of Linux' default size takes about 90."""
SLACK = 0.001
"""Seconds of a pause that was too long which are made up for."""


class LinkError(Exception):
    """The receiver cannot be reached, or no longer; the message says why."""


class Stopped(Exception):
    """The process is to end."""


@dataclass(frozen=True)
class Target:
    """Where messages go."""

    host: str
    port: int
    kind: Kind

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}/{self.kind}"


@dataclass
class Link:
    """A connected socket. bell: readable when the process is to end.

    rate: records per second, 0: as fast as it goes; due: when the next may go.
    meanwhile: called now and then while the receiver does not read.
    stop_by: when sending must be over, once the bell has rung.
    sent: bytes handed to the kernel. refused: datagrams that came back as
    unreachable (ICMP), each of which was sent once more.
    """

    target: Target
    sock: socket.socket
    bell: socket.socket
    rate: int = 0
    due: float = 0.0
    meanwhile: Callable[[], None] = lambda: None
    stop_by: float = 0.0
    sent: int = 0
    refused: int = 0


def parse_target(text: str, kind: Kind) -> Target:
    """``HOST``, ``HOST:PORT`` or ``[ADDRESS]:PORT``. Raises ValueError, for people."""
    host, port = text, ""
    if text.startswith("["):
        host, closed, port = text[1:].partition("]")
        if not closed or (port and not port.startswith(":")):
            raise ValueError(f"{text!r} is no receiver: write [ADDRESS]:PORT")
        port = port[1:]
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if not host or (port and not (port.isdecimal() and 0 < int(port) < 1 << 16)):
        raise ValueError(f"{text!r} is no receiver: write HOST:PORT, or HOST for port {PORT}")
    return Target(host, int(port or PORT), kind)


def connect(target: Target, bell: socket.socket, rate: int = 0) -> Link:
    """A new transport session. Raises LinkError, and Stopped."""
    kind = socket.SOCK_DGRAM if target.kind == "udp" else socket.SOCK_STREAM
    try:
        found = socket.getaddrinfo(target.host, target.port, type=kind)
    except OSError as error:
        raise LinkError(f"cannot find {target.host}: {error.strerror or error}") from None
    why = ""
    for family, type_, protocol, _, address in found:
        made = socket.socket(family, type_, protocol)
        link = Link(target, made, bell, rate)
        try:
            made.setblocking(False)
            if target.kind == "tcp":
                _options(made)
            if made.connect_ex(address) == errno.EINPROGRESS and not _wait(link, True, CONNECT):
                raise TimeoutError(errno.ETIMEDOUT, "no answer")
            if code := made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, errno.errorcode.get(code, str(code)))
            made.getpeername()
            return link
        except OSError as error:
            why = error.strerror or str(error)
            made.close()
        except Stopped:
            made.close()
            raise
    raise LinkError(f"cannot connect to {target}: {why}")


def _options(made: socket.socket) -> None:
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(GIVE_UP * 1000))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)


def _wait(link: Link, writing: bool, seconds: float | None) -> bool:
    """Until the socket is ready; False: it was not in time. Raises Stopped."""
    wanted = [link.sock]
    reading = [link.bell] if writing else [link.bell, *wanted]
    ready, writable, _ = select.select(reading, wanted if writing else [], [], seconds)
    if link.bell in ready:
        raise Stopped
    return bool(writable) or link.sock in ready


def _room(link: Link) -> None:
    """Wait until more can be sent. Raises Stopped, if the end has long been asked for."""
    while True:
        bell = [] if link.stop_by else [link.bell]
        ready, writable, _ = select.select(bell, [link.sock], [], LOOK)
        if ready:
            link.stop_by = monotonic() + PARTING
        if writable:
            return
        if link.stop_by and monotonic() > link.stop_by:
            raise Stopped
        link.meanwhile()


def send(link: Link, blocks: Iterable[Messages]) -> int:
    """Send messages; returns how many. Raises LinkError, and Stopped.

    Over TCP it waits while the receiver does not read: that is its to decide.
    When the bell rings it sends on, PARTING seconds at most.
    """
    count = 0
    for block in blocks:
        messages = len(block.bounds) - 1
        each = block.records / messages
        if link.target.kind == "udp":
            for number, (first, last) in enumerate(pairwise(block.bounds), 1):
                _datagram(link, block.data[first:last])
                if number % BURST == 0 or number == messages:
                    _pace(link, (number % BURST or BURST) * each)
        else:
            _stream(link, block.data)
            _pace(link, block.records)
        link.sent += len(block.data)
        count += messages
    return count


def _pace(link: Link, records: float) -> None:
    """Wait until more may go. A receiver's buffer takes a burst, and not much more."""
    if not link.rate:
        if not link.stop_by and select.select([link.bell], [], [], 0)[0]:
            link.stop_by = monotonic() + PARTING
        return
    link.due = max(link.due, monotonic() - SLACK) + records / link.rate
    while (pause := link.due - monotonic()) > 0:
        if link.stop_by:  # what has been begun is sent, at the same pace
            pause = min(pause, link.stop_by - monotonic())
            if pause <= 0:
                raise Stopped
        if select.select([] if link.stop_by else [link.bell], [], [], pause)[0]:
            link.stop_by = monotonic() + PARTING


def _stream(link: Link, data: memoryview) -> None:
    while data:
        try:
            data = data[link.sock.send(data) :]
        except BlockingIOError:
            _room(link)
        except OSError as error:
            raise LinkError(f"{link.target} broke off: {error.strerror}") from None


def _datagram(link: Link, data: memoryview) -> None:
    """Fire and forget. A refusal that came back was an earlier one's; it is counted."""
    for _ in range(3):
        try:
            link.sock.send(data)
            return
        except BlockingIOError:
            _room(link)
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                raise LinkError(
                    f"{len(data)} bytes: {error.strerror}: give --message-size"
                ) from None
            if error.errno not in (errno.ECONNREFUSED, errno.ENOBUFS, errno.EHOSTUNREACH):
                raise LinkError(f"cannot send to {link.target}: {error.strerror}") from None
            link.refused += 1


def waiting(link: Link) -> int:
    """Bytes that the receiver's kernel has not acknowledged; over UDP always 0."""
    if link.target.kind == "udp":
        return 0
    size: int = struct.unpack("i", fcntl.ioctl(link.sock, termios.TIOCOUTQ, bytes(4)))[0]
    return size


def rest(link: Link, seconds: float) -> None:
    """Wait for something to do. Raises LinkError if the receiver has gone, Stopped if we are to."""
    if _wait(link, False, seconds):
        check(link)


def check(link: Link) -> None:
    """See that the receiver is there, as far as it has been heard of. Raises LinkError."""
    try:
        heard = link.sock.recv(4096)
    except BlockingIOError:
        return
    except OSError as error:
        if link.target.kind == "udp":
            link.refused += 1
            return
        raise LinkError(f"{link.target} broke off: {error.strerror}") from None
    if not heard and link.target.kind == "tcp":
        raise LinkError(f"{link.target} closed the connection")


def close(link: Link) -> None:
    """End the session; what waits still goes out."""
    with suppress(OSError):
        if link.target.kind == "tcp":
            link.sock.shutdown(socket.SHUT_WR)
    link.sock.close()
