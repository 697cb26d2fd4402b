"""An agent that stands at one place and does with sockets what it is told.

    python -I -S agent.py

One line in, [[what, arguments...], {named ones}] in JSON; one line out, ["ok", value] or
["error", errno's name]. Sockets have names and live until they are closed or
their name is used again. One process for all scenes: a guest without KVM takes
half a second to start another.
"""

import errno
import json
import os
import socket
import struct
import sys
from typing import Any

PATIENCE = 60.0
"""Seconds for anything that another place is to do."""
ECHO = {4: 8, 6: 128}
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_DONT = 10, 23, 0
IP_RECVERR, IPV6_RECVERR = 11, 25
UDP_SEGMENT = 103
IPV6_FLOWINFO_SEND = 33
SO_MARK = 36

sockets: dict[str, socket.socket] = {}


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _open(name: str, address: str, kind: int, proto: int = 0) -> socket.socket:
    close(name)
    sock = sockets[name] = socket.socket(_family(address), kind, proto)
    sock.settimeout(PATIENCE)
    if kind == socket.SOCK_STREAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


def _port(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


# -- connections ---------------------------------------------------------------------------


def listen(name: str, address: str, port: int = 0, proto: int = 0) -> int:
    """A listening socket; its port."""
    sock = _open(name, address, socket.SOCK_STREAM, proto)
    sock.bind((address, port))
    sock.listen(16)
    return _port(sock)


def connect(
    name: str,
    to: str,
    port: int,
    bind: str = "",
    from_port: int = 0,
    proto: int = 0,
    mark: int = 0,
) -> int:
    """Connect and wait for it; the own port."""
    sock = _open(name, to, socket.SOCK_STREAM, proto)
    if mark:
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
    if bind:
        sock.bind((bind, from_port))
    sock.connect((to, port))
    return _port(sock)


def accept(name: str, listener: str) -> None:
    """Accept the connection that waits, under another name."""
    close(name)
    sockets[name], _ = sockets[listener].accept()
    sockets[name].settimeout(PATIENCE)


def send(name: str, size: int = 10) -> None:
    """Send so many bytes."""
    sockets[name].sendall(bytes(size))


def read(name: str, size: int = 10) -> None:
    """Read so many bytes."""
    while size > 0:
        got = len(sockets[name].recv(65536))
        if not got:
            raise OSError(errno.EPIPE, "the end came early")
        size -= got


def end(name: str) -> None:
    """Read to the other side's end."""
    while sockets[name].recv(65536):
        pass


def shut(name: str) -> None:
    """Send FIN, or what the protocol has for it."""
    sockets[name].shutdown(socket.SHUT_WR)


def reset(name: str) -> None:
    """Close with RST."""
    sockets[name].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    close(name)


def close(*names: str) -> None:
    """Close sockets, if they are there."""
    for name in names:
        if sock := sockets.pop(name, None):
            sock.close()


# -- datagrams -----------------------------------------------------------------------------


def udp(name: str, bind: str, port: int = 0, to: str = "", to_port: int = 0, mark: int = 0) -> int:
    """A bound socket, maybe connected; its port."""
    sock = _open(name, bind, socket.SOCK_DGRAM)
    # An unconnected socket, too, is told of ICMP errors.
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_DONT)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DONT)
    if mark:
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
    sock.bind((bind, port))
    if to:
        sock.connect((to, to_port))
    return _port(sock)


def tell(
    name: str,
    to: str = "",
    port: int = 0,
    size: int = 10,
    segment: int = 0,
    fill: int = 0,
    label: int = 0,
) -> None:
    """Send a datagram, full of a number of 16 bits.

    segment: to be cut up (UDP_SEGMENT); label: IPv6's flow label.
    """
    sock = sockets[name]
    if label and sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FLOWINFO_SEND, 1)
        sock.sendto(struct.pack(">H", fill) * (size // 2), (to, port, label, 0))
        return
    if segment:
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, segment)
    data = struct.pack(">H", fill) * (size // 2)
    if to:
        sock.sendto(data, (to, port))
    else:
        sock.send(data)


def hear(name: str, size: int = 10) -> None:
    """Wait for datagrams of that size in all."""
    while size > 0:
        size -= len(sockets[name].recv(65536))


def refused(name: str) -> None:
    """Wait until the socket is told that the port is closed."""
    try:
        sockets[name].recv(65536)
    except ConnectionRefusedError:
        return
    raise OSError(errno.EPROTO, "it was not refused")


def member(name: str, group: str, port: int, interface: str) -> None:
    """A socket that has joined a group."""
    sock = _open(name, group, socket.SOCK_DGRAM)
    sock.bind((group, port))
    index = socket.if_nametoindex(interface)
    packed = socket.inet_pton(sock.family, group)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(
            socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, packed + struct.pack("=I", index)
        )
    else:
        request = packed + bytes(4) + struct.pack("=i", index)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)


def address_all(name: str, group: str, port: int, interface: str, loop: int) -> None:
    """Send to a group."""
    sock = _open(name, group, socket.SOCK_DGRAM)
    index = socket.if_nametoindex(interface)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, loop)
    else:
        through = bytes(8) + struct.pack("=i", index)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, through)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, loop)
    sock.sendto(bytes(10), (group, port))


# -- ICMP, raw and packet sockets ----------------------------------------------------------


def _sum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ping(to: str, ident: int, kind: int = socket.SOCK_DGRAM) -> int:
    """Ask for an echo and wait for it; the id that was used."""
    family = 6 if ":" in to else 4
    proto = socket.IPPROTO_ICMPV6 if family == 6 else socket.IPPROTO_ICMP
    sock = _open("ping", to, kind, proto)
    if kind == socket.SOCK_DGRAM:
        sock.bind(("::" if family == 6 else "0.0.0.0", ident))
    else:
        sock.connect((to, 0))
    asked = struct.pack(">BBHHH", ECHO[family], 0, 0, ident, 1) + b"truth..."
    asked = asked[:2] + struct.pack(">H", _sum(asked)) + asked[4:]
    sock.sendto(asked, (to, 0))
    while True:
        got = sock.recv(1024)
        if kind == socket.SOCK_RAW and family == 4:
            got = got[(got[0] & 15) * 4 :]
        if got[0] != ECHO[family] and got.endswith(b"truth..."):
            return ident


def raw(*packets: str) -> None:
    """Send whole IP packets through a raw socket."""
    for packet in map(bytes.fromhex, packets):
        six = packet[0] >> 4 == 6
        to = socket.inet_ntop(
            socket.AF_INET6 if six else socket.AF_INET, packet[24:40] if six else packet[16:20]
        )
        _open("raw", to, socket.SOCK_RAW, socket.IPPROTO_RAW).sendto(packet, (to, 0))


def protocol(name: str, address: str, proto: int) -> None:
    """A raw socket for one protocol, bound to an address."""
    _open(name, address, socket.SOCK_RAW, proto).bind((address, 0))


def utter(name: str, to: str, data: str) -> None:
    """Send what is above the IP header."""
    sockets[name].sendto(bytes.fromhex(data), (to, 0))


def frame(interface: str, data: str) -> None:
    """Send a whole frame through a packet socket."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.sendto(bytes.fromhex(data), (interface, 0))


def tap(name: str, interface: str) -> None:
    """A packet socket that gets all frames of an interface."""
    close(name)
    sockets[name] = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    sockets[name].settimeout(PATIENCE)
    sockets[name].bind((interface, 0))


def taps(name: str, words: str) -> None:
    """Wait until a tap has got a frame with these bytes in it."""
    while bytes.fromhex(words) not in sockets[name].recv(65536):
        pass


# -- the place itself ----------------------------------------------------------------------


def sysctl(name: str, value: str) -> str:
    """Set a sysctl of the network namespace; what it was."""
    path = "/proc/sys/" + name.replace(".", "/")
    with open(path) as file:  # noqa: PTH123  # pathlib takes longer to import than this program
        was = file.read().strip()
    with open(path, "w") as file:  # noqa: PTH123
        file.write(value)
    return was


def main() -> None:
    """Do what each line says."""
    for line in sys.stdin:
        (what, *arguments), named = json.loads(line)
        try:
            answer: list[Any] = ["ok", globals()[what](*arguments, **named)]
        except OSError as e:
            answer = ["error", errno.errorcode.get(e.errno or 0, repr(e))]
        os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
