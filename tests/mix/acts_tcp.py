"""TCP: clients, servers, scans, and who speaks on connections of others."""

import socket
from contextlib import suppress

from guardbed import inside

from mix import packets
from mix.acts import ANYONE, FULL, Act, family, other
from mix.packets import ACK, PSH, SYN, TCP, Flow, packed
from mix.sock import CLOSED, LISTENERS, POOL, RESERVED
from mix.world import World

STREAM = socket.SOCK_STREAM
REUSE = (1, 2, 1)
PATIENCE = 10.0
SCANNED_FROM = range(10_000, 30_000)
SCANS_FROM = (4003, 4103)
"""Reserved ports from which no TCP socket speaks."""


class Pair:
    """Both ends of a connection: sockets to be read and written."""

    def __init__(self, w: World, flow: Flow, client: socket.socket, server: socket.socket):
        self.w, self.flow, self.client, self.server = w, flow, client, server
        for sock in (client, server):
            sock.settimeout(PATIENCE)

    def talk(self, there: int, back: int) -> None:
        """So many bytes each way."""
        for one, two, size in ((self.client, self.server, there), (self.server, self.client, back)):
            if size:
                one.sendall(b"d" * size)
                left = size
                while left:
                    left -= len(two.recv(65536))

    def close(self, how: str) -> None:
        """By whom, and with FIN or RST; or unheard, which leaves it held for established."""
        first, second = self.client, self.server
        if "server" in how:
            first, second = second, first
        if "unheard" in how:
            for sock in (first, second):
                sock.setsockopt(TCP, _REPAIR, 1)
                sock.close()
        elif "reset" in how:
            first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            first.close()
            with suppress(ConnectionResetError):
                second.recv(1)
            second.close()
        else:
            flow = self.flow if first is self.client else self.flow.back
            self.w.waits.add(flow[1:])
            first.shutdown(socket.SHUT_WR)
            assert second.recv(1) == b""
            second.close()
            assert first.recv(1) == b""
            first.close()


HOW = ("client", "server", "client reset", "server reset") * 2 + ("unheard",)
_REPAIR = 19  # a socket that is closed then says nothing


def sizes(w: World) -> tuple[int, int]:
    return w.rng.choice(((10, 10), (600, 3000), (0, 500), (40_000, 100), (100, 40_000)))


def client(w: World, who: str, f: int, hold: bool = False) -> Pair | None:
    """Somebody's client of a server of the peer's."""
    port = w.rng.choice(LISTENERS)
    local = w.rng.choice((0, *RESERVED.get(who, ())[:3], *POOL))
    near, _ = w.open(
        who, f, STREAM, options=[REUSE], bind=(w.here(f), local), connect=(w.there(f), port)
    )
    if not near:  # the tuple is in TIME_WAIT
        return None
    flow = Flow(TCP, packed(w.here(f)), near.port, packed(w.there(f)), port)
    w.ends[flow[1:]] = near
    w.truth.begin_tcp(flow, w.owner(near), 0)
    listener = w.peers[f][port]
    listener.settimeout(PATIENCE)
    while True:
        far, name = listener.accept()
        if name[1] == near.port:
            return Pair(w, flow, near.sock, far)
        far.close()  # somebody's scan


def tcp_client(w: World) -> None:
    """A slice asks the peer."""
    pair = client(w, w.rng.choice(ANYONE), family(w))
    if pair:
        pair.talk(*sizes(w))
        pair.close(w.rng.choice(HOW))


def server(w: World, who: str, f: int) -> Pair | None:
    """Somebody's server, and a client at the peer from a port that was used before."""
    wild = w.rng.random() < 0.3
    at = ("::" if f == 6 else "0.0.0.0") if wild else w.here(f)
    port = w.rng.choice((*RESERVED.get(who, ())[:3], *POOL))
    near, _ = w.open(who, f, STREAM, options=[REUSE], bind=(at, port), listen=8)
    if not near:
        return None
    with inside(w.peer):
        far = socket.socket(socket.AF_INET if f == 4 else socket.AF_INET6, STREAM)
    far.setsockopt(*REUSE)
    far.settimeout(PATIENCE)
    port_there = sport(w)
    try:
        far.bind((w.there(f), port_there))
        flow = Flow(TCP, packed(w.there(f)), port_there, packed(w.here(f)), port)
        w.ends[flow.back[1:]] = near
        w.truth.begin_tcp(flow, 0, w.owner(near))
        far.connect((w.here(f), port))
    except OSError:
        far.close()
        near.close()
        return None
    near.sock.settimeout(PATIENCE)
    accepted, _ = near.sock.accept()
    near.sock.close()
    near.sock = accepted
    return Pair(w, flow, far, accepted)


#: The peer's ports as a client: mostly many, now and then few, so that a 5-tuple
#: comes again while it is remembered.
MANY, FEW = range(10_000, 30_000), range(8001, 8017)


def sport(w: World) -> int:
    """A port of the peer's for a client."""
    return w.rng.choice(FEW if w.rng.random() < 1 / 16 else MANY)


def tcp_server(w: World) -> None:
    """The peer asks a slice."""
    pair = server(w, w.rng.choice(ANYONE), family(w))
    if pair:
        pair.talk(*sizes(w))
        pair.close(w.rng.choice(HOW))


def tcp_between(w: World) -> None:
    """One slice asks another, over loopback or the node's own address."""
    asks, answers, f = w.rng.choice(ANYONE), w.rng.choice(ANYONE), family(w)
    at = w.rng.choice((w.here(f), "::1" if f == 6 else "127.0.0.1"))
    port = w.rng.choice((*RESERVED.get(answers, ())[:3], *POOL))
    near, _ = w.open(answers, f, STREAM, options=[REUSE], bind=(at, port), listen=8)
    if not near:
        return
    local = w.rng.choice(POOL) if w.rng.random() < 1 / 8 else 0
    far, _ = w.open(asks, f, STREAM, options=[REUSE], bind=(at, local), connect=(at, port))
    if not far:
        near.close()
        return
    flow = Flow(TCP, packed(at), far.port, packed(at), port)
    w.ends[flow[1:]], w.ends[flow.back[1:]] = far, near
    w.truth.begin_tcp(flow, w.owner(far), w.owner(near))
    near.sock.settimeout(PATIENCE)
    accepted, _ = near.sock.accept()
    near.sock.close()
    near.sock = accepted
    pair = Pair(w, flow, far.sock, accepted)
    pair.talk(*sizes(w))
    pair.close(w.rng.choice(HOW))


def tcp_refused(w: World) -> None:
    """A port that nobody has: there, or here."""
    f, port = family(w), w.rng.choice(CLOSED)
    if w.rng.random() < 0.5:
        who = w.rng.choice(ANYONE)
        sock, _ = w.open(who, f, STREAM, bind=(w.here(f), 0), connect=(w.there(f), port))
        if not sock:
            return
        flow = Flow(TCP, packed(w.here(f)), sock.port, packed(w.there(f)), port)
        w.ends[flow[1:]] = sock
        w.truth.begin_tcp(flow, w.owner(sock), 0)
        w.settle()
        sock.close()
        return
    with inside(w.peer):
        far = socket.socket(socket.AF_INET if f == 4 else socket.AF_INET6, STREAM)
    with far, suppress(OSError):
        far.bind((w.there(f), 0))
        flow = Flow(TCP, packed(w.there(f)), far.getsockname()[1], packed(w.here(f)), port)
        w.ends[flow.back[1:]] = None
        w.truth.begin_tcp(flow, 0, 0)
        far.connect((w.here(f), port))


def scan(w: World) -> None:
    """SYNs of a raw socket to many ports, from one; the kernel resets what answers."""
    who, f = w.rng.choice((*FULL, "c", "node")), family(w)
    sport = w.rng.choice((w.rng.choice(SCANNED_FROM), *SCANS_FROM))
    for port in w.rng.sample((*LISTENERS, *CLOSED), w.rng.randrange(1, 8)):
        flow = Flow(TCP, packed(w.here(f)), sport, packed(w.there(f)), port)
        tag = w.tag()
        if w.truth.refused(who, flow, True):
            w.raw_send(who, flow, packets.tcp(flow, SYN, tag, 0, tag), tag)
            continue
        w.settle()  # what the last one had for an answer decides
        w.truth.syn(flow)
        w.ends[flow[1:]] = None
        w.raw_send(who, flow, packets.tcp(flow, SYN, tag, 0, tag), tag)


def hijack_tcp(w: World) -> None:
    """A raw socket speaks on somebody else's connection: within its window, or outside."""
    victim, f = w.rng.choice(ANYONE), family(w)
    thief = other(w, victim, (*FULL, "c", "node"))
    pair = (client if w.rng.random() < 0.5 else server)(w, victim, f)
    if not pair:
        return
    pair.talk(600, 600)
    w.settle()
    # What has been sent before: new data that the peer would take makes each end
    # acknowledge for ever what the other has not sent.
    ours = pair.flow if pair.flow.src == packed(w.here(f)) else pair.flow.back
    for _ in range(w.rng.randrange(1, 4)):
        seq, ack = w.latest[ours]
        far = w.rng.random() < 0.3
        tag = w.tag()
        segment = packets.tcp(
            ours, PSH | ACK, (seq - 12 + (1 << 30 if far else 0)) & 0xFFFFFFFF, ack, tag
        )
        w.raw_send(thief, ours, segment, tag, holder=True, valid=not far)
        w.settle()
    pair.talk(100, 100)
    pair.close(w.rng.choice(HOW))


ACTS = [
    Act(tcp_client, 12),
    Act(tcp_server, 12),
    Act(tcp_between, 10),
    Act(tcp_refused, 5),
    Act(scan, 6),
    Act(hijack_tcp, 6),
]
