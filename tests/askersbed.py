"""A collector that has seen flows of two slices, each with a user, and people to ask it."""

import grp
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from netflowbed import Collector, accounting, collector, connmark
from vnet.registry import Request
from vnet.testing import net
from vnet.testing.apps import start

from vnet import registry

ALICE, BOB, NOBODY = 64997, 64998, 64999  # no names, no groups
MINE, YOURS = 300, 400
GROUP = "games"
GAMES = grp.getgrnam(GROUP).gr_gid


def assign(base: Path, **users: list[str]) -> None:
    """Say who the users of the slices "mine" and "yours" are."""
    xids = {"mine": MINE, "yours": YOURS}
    wanted = [Request(name, xids[name], users=tuple(called)) for name, called in users.items()]
    registry.assign(base / "registry.db", wanted, 1)


@contextmanager
def open_way() -> Iterator[Path]:
    """A directory that other users can reach: not below pytest's, which each run closes to them."""
    with TemporaryDirectory(prefix="netflow-askers-") as made:
        base = Path(made)
        base.chmod(0o755)
        yield base


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that has seen a flow of each slice (from ports 4001, 4002), one between them."""
    with open_way() as base, ExitStack() as stack:
        assign(base, mine=[str(ALICE)], yours=[str(BOB)])
        ns = stack.enter_context(net.namespace())
        accounting(ns, lasting=600)
        for port, mark in ((4001, MINE), (4002, YOURS), (4003, MINE | YOURS << 16)):
            connmark(ns, mark, "-p", "udp", "--sport", str(port))
        flows = stack.enter_context(collector(ns, base, "--group", GROUP))
        stack.enter_context(start(ns, "udp-recv", bind="127.0.0.1", port=9))
        for port in (4001, 4002, 4003):
            options = {"to": "127.0.0.1", "port": 9, "from_port": port}
            with start(ns, "udp-send", count=1, size=10, **options) as sender:
                sender.result()
        assert {r["sport"] for r in flows.records()} == {4001, 4002, 4003}
        yield flows


@contextmanager
def being(uid: int, group: int | None = None) -> Iterator[None]:
    """This process is somebody else to whom it connects."""
    before = os.getgroups()
    os.setgroups([] if group is None else [group])
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)
