"""Slices restart, go, come back, and exchange their numbers; sockets live through it."""

import os
from collections.abc import Callable

from mix import acts_tcp
from mix.acts import bound, family
from mix.packets import packed
from mix.sock import SINKS, SLICES, XIDS, Sock
from mix.stage import write_slices
from mix.world import World

SPARE = (600, 601, 9000)
"""Numbers that nobody has at first."""


def _up(w: World, xids: dict[str, int]) -> None:
    """These slices have these numbers from now on."""
    write_slices(w.node.base, w.groups, xids)
    w.node.vnet("up", "--datapath", w.truth.datapath, "--variant", w.variant, "--rest", "0")
    w.truth.xids = dict(xids)


def _live(w: World, who: str) -> list[Sock]:
    """UDP sockets of both families, and what they send and receive now."""
    socks = [s for f in (4, 6) if (s := bound(w, who, f, 0))]
    _use(w, socks)
    return socks


def _use(w: World, socks: list[Sock]) -> None:
    for sock in socks:
        f = 4 if len(sock.address) == 4 else 6
        port = w.rng.choice(SINKS)
        w.udp(sock, packed(w.there(f)), port, 3)
        w.from_peer(f, sock.port, port, 3, to=sock)
        w.reads(sock, 3)
    w.settle()


def _through(w: World, who: str, change: Callable[[], None]) -> None:
    """Sockets and a TCP connection of somebody's live through a change."""
    socks, pair = _live(w, who), acts_tcp.client(w, who, family(w))
    if pair:
        pair.talk(600, 600)
    w.settle()
    change()
    _use(w, socks)
    if pair:
        w.settle()
        pair.talk(600, 600)
        w.settle()
        pair.close("client")
    for sock in socks:
        sock.close()


def another_number(w: World) -> None:
    """A slice gets a number that another may have had."""
    who = w.rng.choice(SLICES)
    free = [x for x in (*SPARE, *XIDS.values()) if x not in w.truth.xids.values()]
    _through(w, who, lambda: _up(w, {**w.truth.xids, who: w.rng.choice(free)}))


def swap(w: World) -> None:
    """Two slices exchange their numbers, by way of a third."""
    one, two = w.rng.sample(SLICES, 2)
    free = [x for x in (*SPARE, *XIDS.values()) if x not in w.truth.xids.values()]

    def change() -> None:
        a, b = w.truth.xids[one], w.truth.xids[two]
        for step in ({one: free[0]}, {two: a}, {one: b}):
            _up(w, {**w.truth.xids, **step})

    _through(w, one, change)


def gone_and_back(w: World) -> None:
    """A slice is no more; its sockets are the node's until it comes back."""
    who = w.rng.choice(SLICES)
    number = w.truth.xids[who]
    socks = _live(w, who)
    drop_raw(w, who)
    _up(w, {name: xid for name, xid in w.truth.xids.items() if name != who})
    _use(w, socks)
    _up(w, {**w.truth.xids, who: number})
    _use(w, socks)
    for sock in socks:
        sock.close()


def restart(w: World) -> None:
    """A slice's processes end; those that come after are as much its own."""
    who = w.rng.choice(SLICES)
    sock = bound(w, who, 4, 0)
    _end(w, who)
    if sock:  # its process is gone, it is not
        _use(w, [sock])
        sock.close()
    for again in _live(w, who):
        again.close()


def another_cgroup(w: World) -> None:
    """The cgroup is removed and made again, as when a unit restarts."""
    who = w.rng.choice(SLICES)
    drop_raw(w, who)
    _end(w, who)
    group = w.groups[who]
    (group.path / "cgroup.kill").write_text("1")
    os.rmdir(group.path)  # noqa: PTH106
    group.path.mkdir()
    w.homes[who] = -group.id  # made, but not known yet: what it makes is the node's
    early = _live(w, who)
    _up(w, w.truth.xids)
    w.homes[who] = group.id
    for sock in early:
        sock.home = group.id
    _use(w, early)
    for sock in early:
        sock.close()


def drop_raw(w: World, who: str) -> None:
    """Close the raw sockets that are kept of somebody's."""
    for key in [key for key in w.raw if key[0] == who]:
        w.raw.pop(key).close()


def _end(w: World, who: str) -> None:
    for key in [key for key in w.people if key[0] == who]:
        w.people.pop(key).end()


ACTS = (another_number, restart, swap, another_cgroup, gone_and_back)
