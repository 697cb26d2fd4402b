"""Record conntrack's own messages, in namespaces made for it, as seeds for the decoder's fuzzer.

``record_seeds.py DIRECTORY`` (as root). Each file is a byte of the fuzz
target's own (how it batches), then datagrams as the kernel wrote them: events
of real TCP, UDP and pings over IPv4 and IPv6 with NAT, zones and marks, a dump,
the answers to a GET.
"""

import ctypes
import os
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from netflow.ct import Batch, decode, get_request

_CLONE_NEWNET = 0x40000000
_RULES = (
    "-t raw -A OUTPUT -d ::/0 -j CT --zone-orig 9",
    "-t mangle -A POSTROUTING -j CONNMARK --set-mark 0x20001",
)
_NAT = "-t nat -A OUTPUT -p tcp --dport 81 -j DNAT --to-destination 127.0.0.2:80"
_LATER = "-t mangle -A POSTROUTING -j CONNMARK --set-mark 0x20003"


def _setup() -> None:
    ctypes.CDLL(None).unshare(_CLONE_NEWNET)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for name in ("acct", "timestamp", "events"):
        Path(f"/proc/sys/net/netfilter/nf_conntrack_{name}").write_text("1")
    for rule in _RULES:
        subprocess.run(["ip6tables", *rule.split()], check=True)
    for rule in (_RULES[1], _NAT):
        subprocess.run(["iptables", *rule.split()], check=True)


def _traffic() -> None:
    for family, host, there in (
        (socket.AF_INET, "127.0.0.1", "127.0.0.2"),
        (socket.AF_INET6, "::1", "::1"),
    ):
        server = socket.create_server((there, 80), family=family)
        port = 81 if family == socket.AF_INET else 80
        client = socket.create_connection((host, port))
        client.send(b"hello")
        server.accept()[0].recv(5)
        client.close()
        udp = socket.socket(family, socket.SOCK_DGRAM)
        udp.sendto(b"x", (host, 53))
        subprocess.run(["ping", "-c1", host], check=True, stdout=subprocess.DEVNULL)


def _netlink(groups: int) -> socket.socket:
    link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    link.bind((0, groups))
    link.setblocking(False)
    return link


def _take(link: socket.socket) -> list[bytes]:
    taken = []
    while True:
        try:
            taken.append(link.recv(65536))
        except BlockingIOError:
            return taken


def main(where: Path) -> None:
    _setup()
    events, asks = _netlink(7), _netlink(0)
    _traffic()
    subprocess.run(["iptables", *_LATER.split()], check=True)
    _traffic_again = subprocess.run(["ping", "-c1", "127.0.0.1"], stdout=subprocess.DEVNULL)
    assert _traffic_again.returncode == 0
    dump = bytes.fromhex("14000000 0101 0103 07000000 00000000 00000000")
    asks.send(dump)
    rows = _take(asks)
    batch = Batch(256)
    decode(rows[0], batch)
    answers = []
    for row in range(len(batch)):
        asks.send(get_request(batch, row, seq=row + 1))
        answers += _take(asks)
    subprocess.run(["conntrack", "-D"], check=True, capture_output=True)
    asks.send(get_request(batch, 0, seq=99))
    answers += _take(asks)
    told = _take(events)
    where.mkdir(parents=True, exist_ok=True)
    seeds = {"dump": rows, "answers": answers[:4] + answers[-1:], "events": told}
    for name, parts in seeds.items():
        (where / name).write_bytes(b"\xe3" + b"".join(parts))
    for n, part in enumerate(told[:: max(1, len(told) // 12)]):
        (where / f"event{n}").write_bytes(b"\0" + part)
    print({name: sum(map(len, parts)) for name, parts in seeds.items()})


if __name__ == "__main__":
    assert os.geteuid() == 0, "namespaces are root's"
    main(Path(sys.argv[1]))
