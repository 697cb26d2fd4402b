"""What acts are made of: who, over which family, how many, from which socket."""

import socket
from collections.abc import Callable
from typing import NamedTuple

from mix.sock import POOL, SLICES, Sock
from mix.world import World

DGRAM, STREAM = socket.SOCK_DGRAM, socket.SOCK_STREAM
ANYONE = (*SLICES, "node")
FULL = ("a", "b")
"""Slices that may send whatever is not somebody else's."""


class Act(NamedTuple):
    """One kind of action."""

    do: Callable[[World], None]
    weight: int


def family(w: World) -> int:
    return w.rng.choice((4, 4, 6))


def some(w: World, most: int = 24) -> int:
    """How many packets: mostly few."""
    return w.rng.choice((1, 1, 2, 3, 5, 8, most))


def other(w: World, than: str, among: tuple[str, ...] = ANYONE) -> str:
    return w.rng.choice([who for who in among if who != than])


def bound(
    w: World,
    who: str,
    f: int,
    port: int | None = None,
    wild: bool = False,
    options: tuple = (),
    address: str = "",
) -> Sock | None:
    """A UDP socket of somebody's; None where the port is taken."""
    at = ("::" if f == 6 else "0.0.0.0") if wild else address or w.here(f)
    made, _ = w.open(
        who, f, DGRAM, bind=(at, w.rng.choice(POOL) if port is None else port), options=options
    )
    return made
