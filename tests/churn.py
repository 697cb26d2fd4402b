"""Traffic of which every packet is known: run in a namespace by netflow's tests.

``python -m churn SECONDS_A_CONNECTION RATE`` sends UDP over loopback from a port
of its own for each connection: LONG ones that go on, and short ones that are
taken out of conntrack, so that they end at a known moment. At a line on stdin
(or its end) it stops and says what it sent, as JSON.

``python -m churn storm COUNT`` opens and resets that many TCP connections.
"""

import heapq
import json
import random
import select
import socket
import struct
import sys
import time

from netflowbed import _message, _tuple

LONG = 20
SINK = 9


def remove(link: socket.socket, src: tuple[str, int], dst: tuple[str, int]) -> None:
    """IPCTNL_MSG_CT_DELETE, and the kernel's answer."""
    link.send(_message(2, 1 | 4, _tuple(1, src, dst, socket.IPPROTO_UDP)))
    code = struct.unpack_from("=i", link.recv(4096), 16)[0]
    assert code == 0, code


def main(life: float, rate: float) -> None:
    rng = random.Random(1)
    sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sink.bind(("0.0.0.0", SINK))
    link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    long = []
    for n in range(LONG):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 4000 + n))
        long.append(sock)
    sent = dict.fromkeys(range(4000, 4000 + LONG), 0)
    short: list[tuple[int, str, int, int, int]] = []
    ends: list[tuple[float, int]] = []
    open_ones: dict[int, tuple[socket.socket, str, int, int]] = {}
    number, due = 0, time.monotonic()
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        now = time.monotonic()
        if now < due and (not ends or now < ends[0][0]):
            time.sleep(0.001)
            continue
        if now >= due:
            due = max(due + 1 / rate, now - 1)
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            there = f"127.1.{number >> 8 & 255}.{number & 255}"
            began = time.time_ns()
            packets = 1 + rng.randrange(3)
            for _ in range(packets):
                sock.sendto(b"x", (there, SINK))
            open_ones[number] = sock, there, packets, began
            heapq.heappush(ends, (now + rng.expovariate(1 / life), number))
            number += 1
            which = rng.randrange(LONG)
            long[which].sendto(b"x", ("127.0.0.1", SINK))
            sent[4000 + which] += 1
        while ends and ends[0][0] <= now:
            sock, there, packets, began = open_ones.pop(heapq.heappop(ends)[1])
            port = sock.getsockname()[1]
            remove(link, ("127.0.0.1", port), (there, SINK))
            short.append((port, there, packets, began, time.time_ns()))
            sock.close()
    living = [
        (s.getsockname()[1], there, packets, began)
        for s, there, packets, began in open_ones.values()
    ]
    print(json.dumps({"long": sent, "short": short, "living": living}), flush=True)
    sys.stdin.readline()


def storm(count: int) -> None:
    """Connections one after another, each reset by the client."""
    reset = struct.pack("ii", 1, 0)
    with socket.create_server(("0.0.0.0", 80)) as server:
        for n in range(count):
            # to another address each time: no port is used twice for one peer
            client = socket.create_connection((f"127.2.{n >> 8 & 255}.{n & 255}", 80))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            client.close()
            server.accept()[0].close()


if __name__ == "__main__":
    if sys.argv[1] == "storm":
        storm(int(sys.argv[2]))
    else:
        main(float(sys.argv[1]), float(sys.argv[2]))
