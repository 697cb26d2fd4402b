"""Small TCP and UDP programs that say exactly what they sent and received.

    python -m vnet.testing.traffic tcp-server bind=10.77.1.2 reply=500
    python -m vnet.testing.traffic tcp-client to=10.77.1.2 port=4711 connections=10 send=1000

Each prints JSON lines: ``ready`` with its port, ``connected`` and ``sent`` as
a client gets there, a ``flow`` for each connection or UDP peer with what the
application counted, and ``done`` with the sums. A line on standard input lets
go of a hold, its end stops a server. Only light parts of the standard library
are imported: a guest without KVM feels every import.

tcp-server   bind, port=0, connections=0 (stop after so many; 0: at end of input),
             request=0 (answer after so many bytes; 0: after the end of them),
             reply=0 (bytes), close=fin|rst
tcp-client   to, port, connections=1, send=0 and vary=0 (connection i sends
             send + i % (vary + 1) bytes), receive=0 (bytes to wait for),
             bind and from_port, hold= any of connected,sent (comma-separated),
             close=half (shut down, read to the end) | fin | rst (after receive bytes)
             All connections are made before the first byte is sent.
udp-recv     bind, port=0, count=0 (stop after so many; 0: at end of input),
             reply=0|1 (send each datagram back), to and to_port (connect first)
udp-send     to, port, count=1, size=100, connected=0|1, bind and from_port,
             expect=0 (replies to wait for), refusals=0 (port unreachables to
             wait for), hold=1 (wait for a line before sending), again=0 (seconds
             without a reply after which to send one more)
"""

import errno
import json
import resource
import selectors
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

Options = dict[str, Any]
Peers = dict[tuple[str, int], tuple[int, int]]
CHUNK = bytes(65536)
PATIENCE = 60.0
"""Seconds without any progress after which a program gives up."""


def say(event: str, **facts: Any) -> None:
    """Print one JSON line."""
    print(json.dumps({"event": event, **facts}), flush=True)


def wait_for_line() -> bool:
    """Block until the other side says go (true) or stop, by the end of input (false)."""
    return bool(sys.stdin.readline())


def open_socket(
    kind: int, options: Options, near: str = "bind", near_port: str = "port"
) -> socket.socket:
    """A socket of the family of the addresses given, bound if asked."""
    address = options.get("bind") or options.get("to") or "0.0.0.0"
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, kind)
    if kind == socket.SOCK_STREAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    port = options.get(near_port, 0)
    if near in options or port:
        sock.bind((options.get(near, "::" if family == socket.AF_INET6 else "0.0.0.0"), port))
    return sock


def close(sock: socket.socket, how: str) -> None:
    """Close with FIN, or with RST (SO_LINGER of zero seconds)."""
    if how == "rst":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Conn:
    """A TCP connection and what was counted on it."""

    def __init__(self, sock: socket.socket, to_send: int) -> None:
        self.sock, self.to_send = sock, to_send
        self.sent = self.received = 0
        self.local, self.remote = sock.getsockname()[:2], sock.getpeername()[:2]
        self.end = ""

    def send_some(self) -> bool:
        """Send until the socket is full; true once all is sent."""
        try:
            while self.to_send > self.sent:
                self.sent += self.sock.send(CHUNK[: self.to_send - self.sent])
        except BlockingIOError:
            return False
        except ConnectionError as e:
            self.end = errno.errorcode[e.errno or 0]
        return True

    def half_close(self) -> None:
        """Send FIN, unless the other side has reset the connection by now."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as e:
            if e.errno != errno.ENOTCONN:
                raise

    def receive_some(self) -> bool:
        """Read what is there; true once the other side has ended."""
        try:
            while data := self.sock.recv(65536):
                self.received += len(data)
        except BlockingIOError:
            return False
        except ConnectionError as e:
            self.end = errno.errorcode[e.errno or 0]
            return True
        self.end = self.end or "fin"
        return True

    def report(self) -> None:
        """Print the counts."""
        say(
            "flow",
            local=self.local,
            remote=self.remote,
            sent=self.sent,
            received=self.received,
            end=self.end,
        )


def done(conns: list[Conn]) -> None:
    """Print the sums."""
    say(
        "done",
        flows=len(conns),
        sent=sum(c.sent for c in conns),
        received=sum(c.received for c in conns),
    )


def tcp_server(options: Options) -> None:
    """Accept, read the request, answer, close; for each connection."""
    listener = open_socket(socket.SOCK_STREAM, {"bind": "0.0.0.0", **options})
    listener.listen(4096)
    listener.setblocking(False)
    say("ready", port=listener.getsockname()[1])
    wanted, request = options.get("connections", 0), options.get("request", 0)
    poller = selectors.DefaultSelector()
    poller.register(listener, selectors.EVENT_READ)
    poller.register(sys.stdin, selectors.EVENT_READ)
    finished: list[Conn] = []
    stop = False

    def finish(conn: Conn) -> None:
        poller.unregister(conn.sock)
        close(conn.sock, options.get("close", "fin"))
        conn.report()
        finished.append(conn)

    while not (stop or (wanted and len(finished) >= wanted)):
        for key, _ in poller.select(None if not finished or not wanted else PATIENCE):
            if key.fileobj is sys.stdin:
                stop = not wait_for_line()
            elif key.fileobj is listener:
                accept_all(listener, poller, options.get("reply", 0))
            else:
                conn = key.data
                ended = conn.receive_some()
                if conn.end not in ("", "fin"):
                    finish(conn)
                elif ended or (request and conn.received >= request):
                    if not conn.send_some():
                        poller.modify(conn.sock, selectors.EVENT_WRITE, conn)
                    elif ended or options.get("close") == "rst":
                        finish(conn)
                    else:
                        poller.modify(conn.sock, selectors.EVENT_READ, conn)
    done(finished)


def accept_all(listener: socket.socket, poller: Any, reply: int) -> None:
    """Accept whoever waits."""
    while True:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        sock.setblocking(False)
        poller.register(sock, selectors.EVENT_READ, Conn(sock, reply))


def tcp_client(options: Options) -> None:
    """Connect all, send on all, read on all, close all."""
    holds = str(options.get("hold", "")).split(",")
    how, receive = options.get("close", "half"), options.get("receive", 0)
    size, vary = options.get("send", 0), options.get("vary", 0)
    conns = []
    for i, sock in enumerate(connect_all(options)):
        conns.append(Conn(sock, size + i % (vary + 1)))
    say("connected", port=conns[0].local[1], flows=len(conns))
    if "connected" in holds:
        wait_for_line()
    each(conns, selectors.EVENT_WRITE, Conn.send_some)
    if receive and how != "half":
        each(conns, selectors.EVENT_READ, lambda c: c.receive_some() or c.received >= receive)
    say("sent", port=conns[0].local[1])
    if "sent" in holds:
        wait_for_line()
    if how == "half":
        for conn in conns:
            conn.half_close()
        each(conns, selectors.EVENT_READ, Conn.receive_some)
    for conn in conns:
        close(conn.sock, how)
        conn.report()
    done(conns)


def connect_all(options: Options) -> list[socket.socket]:
    """All connections, established and non-blocking."""
    socks, poller = [], selectors.DefaultSelector()
    for _ in range(options.get("connections", 1)):
        sock = open_socket(socket.SOCK_STREAM, options, "bind", "from_port")
        sock.setblocking(False)
        sock.connect_ex((options["to"], options["port"]))
        poller.register(sock, selectors.EVENT_WRITE, sock)
        socks.append(sock)
    waiting = len(socks)
    while waiting:
        ready = poller.select(PATIENCE)
        if not ready:
            raise TimeoutError(f"{waiting} of {len(socks)} connections not made")
        for key, _ in ready:
            poller.unregister(key.fileobj)
            waiting -= 1
            if code := key.data.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, f"connect: {errno.errorcode[code]}")
    return socks


def each(conns: list[Conn], event: int, step: Callable[[Conn], bool]) -> None:
    """Step each connection, whenever it is ready, until its step is done."""
    poller = selectors.DefaultSelector()
    waiting = 0
    for conn in conns:
        if not step(conn):
            poller.register(conn.sock, event, conn)
            waiting += 1
    while waiting:
        ready = poller.select(PATIENCE)
        if not ready:
            raise TimeoutError(f"no progress on {waiting} connections")
        for key, _ in ready:
            if step(key.data):
                poller.unregister(key.fileobj)
                waiting -= 1


def udp_recv(options: Options) -> None:
    """Count datagrams by sender."""
    sock = open_socket(socket.SOCK_DGRAM, {"bind": "0.0.0.0", **options})
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    if "to" in options:
        sock.connect((options["to"], options["to_port"]))
    sock.setblocking(False)
    say("ready", port=sock.getsockname()[1])
    poller = selectors.DefaultSelector()
    poller.register(sock, selectors.EVENT_READ)
    poller.register(sys.stdin, selectors.EVENT_READ)
    seen: Peers = {}
    total, stop = 0, False
    wanted = options.get("count", 0)
    while not (stop or (wanted and total >= wanted)):
        for key, _ in poller.select():
            if key.fileobj is sys.stdin:
                stop = not wait_for_line()
            total += drain(sock, seen, options.get("reply", 0))
    for remote, (packets, size) in seen.items():
        say("flow", remote=remote, packets=packets, received=size, local=sock.getsockname()[:2])
    done_udp(seen)


def drain(sock: socket.socket, seen: Peers, reply: int) -> int:
    """Read all datagrams that wait; how many there were."""
    got = 0
    while True:
        try:
            data, remote = sock.recvfrom(65536)
        except BlockingIOError:
            return got
        except ConnectionRefusedError:
            continue
        packets, size = seen.get(remote[:2], (0, 0))
        seen[remote[:2]] = packets + 1, size + len(data)
        got += 1
        if reply:
            sock.sendto(data, remote)


def done_udp(seen: Peers) -> None:
    """Print the sums."""
    say(
        "done",
        flows=len(seen),
        packets=sum(p for p, _ in seen.values()),
        received=sum(s for _, s in seen.values()),
    )


def udp_send(options: Options) -> None:
    """Send datagrams, count replies and refusals."""
    sock = open_socket(socket.SOCK_DGRAM, options, "bind", "from_port")
    # With RECVERR an unconnected socket, too, is told of ICMP errors.
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, 25, 1)  # IPV6_RECVERR
    else:
        sock.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR
    target = (options["to"], options["port"])
    if options.get("connected"):
        sock.connect(target)
    say("ready", port=sock.getsockname()[1])
    if options.get("hold"):
        wait_for_line()
    data = bytes(options.get("size", 100))
    sent = refused = 0
    while sent < options.get("count", 1):
        try:
            if options.get("connected"):
                sock.send(data)
            else:
                sock.sendto(data, target)
            sent += 1
        except ConnectionRefusedError:  # of an earlier one; this one was not sent
            refused += 1
    replies = received = 0
    sock.settimeout(0.2)
    give_up = time.monotonic() + PATIENCE
    again, waited = options.get("again", 0), 0.0
    while replies < options.get("expect", 0) or refused < options.get("refusals", 0):
        try:
            received += len(sock.recv(65536))
            replies += 1
        except ConnectionRefusedError:
            refused += 1
        except TimeoutError:
            if time.monotonic() > give_up:
                break
            waited += 0.2
            if again and waited >= again:
                sock.sendto(data, target)
                sent, waited = sent + 1, 0.0
    say(
        "done",
        local=sock.getsockname()[:2],
        sent=sent * len(data),
        packets=sent,
        replies=replies,
        received=received,
        refused=refused,
    )


KINDS = {
    "tcp-server": tcp_server,
    "tcp-client": tcp_client,
    "udp-recv": udp_recv,
    "udp-send": udp_send,
}


def main() -> None:
    """Run the program named by the first argument."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    options: Options = {}
    for word in sys.argv[2:]:
        key, _, value = word.partition("=")
        options[key] = int(value) if value.isdigit() else value
    KINDS[sys.argv[1]](options)


if __name__ == "__main__":
    main()
