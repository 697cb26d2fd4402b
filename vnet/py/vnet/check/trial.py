"""How an attempt is made and judged. Properties are functions of a ``Trial``."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vnet.check.bed import Bed
from vnet.check.facts import Outcome, Property, Verdict
from vnet.testing.nflog import Seen
from vnet.testing.packets import World
from vnet.testing.poll import until
from vnet.testing.steps import Maker, Steps

PATIENCE = (4.0, 0.2)
"""Seconds for what takes milliseconds when all is well: at first, and at least.

Each wait in vain halves it, so that a node on which nothing comes through is
told soon, and a busy one is waited for."""
_GIVE_UP = 2
"""So many waits in vain, and the rest of a property's attempts is not made."""
_AGAIN = [0.02 * n for n in range(10)]
"""Seconds before each attempt at a port that is in use: `vnet watch`, as it sees to older
sockets, holds one for a moment after its end."""
_SENDS = ("send", "sendif", "connect")
_DROPPED = "EPERM"
"""What a sender is told of a packet that a hook dropped, if anything (of an IPv6 ping nothing).
With any other error, EACCES by a route that forbids it for one, it has not come that far."""
T = TypeVar("T")
Before = tuple[str, Maker]
"""Who does what first, and holds on to it."""


class NotTried(Exception):
    """What must go well before an attempt can be made did not."""


@dataclass
class Trial:
    """One property over one family; the outcomes of its attempts."""

    bed: Bed
    of: Property
    family: int
    outcomes: list[Outcome] = field(default_factory=list)
    stuck: int = 0
    """Waits in vain."""

    # -- judging ---------------------------------------------------------------

    def note(self, role: str, held: bool, tried: str, expected: str, happened: str) -> None:
        """An attempt was made."""
        self._note(role, "held" if held else "fell", tried, expected, happened)

    def skip(self, role: str, tried: str, why: str) -> None:
        """An attempt could not be made here."""
        self._note(role, "skipped", tried, "", why)

    def _note(self, role: str, verdict: Verdict, tried: str, expected: str, happened: str) -> None:
        self.outcomes.append(
            Outcome(self.of.name, role, self.family, verdict, tried, expected, happened)
        )

    def equal(self, role: str, tried: str, expected: Any, found: Any) -> None:
        """An attempt was made, and what came of it is compared."""
        self.note(role, expected == found, tried, _words(expected), _words(found))

    @contextmanager
    def attempt(self, role: str, tried: str) -> Iterator[None]:
        """Whatever goes wrong in here is an attempt that fell, with what was heard last."""
        try:
            yield
        except (AssertionError, NotTried, OSError) as error:
            self.note(role, False, tried, "it can be tried", f"{error or type(error).__name__}")

    # -- attempts of slices ------------------------------------------------------

    @property
    def world(self) -> World:
        """Addresses, and a token and a port that no other attempt uses."""
        return self.bed.world(self.family)

    def refuses(
        self,
        roles: Sequence[str],
        tried: str,
        steps: Maker,
        at: str,
        errno: str,
        before: Before | None = None,
    ) -> None:
        """Each fails at this step with this error."""
        for role in roles:
            with self.attempt(role, tried):
                _, said, _ = self._take(role, steps, before, look=False)
                held = not said["ok"] and (said["at"], said["errno"]) == (at, errno)
                self.note(role, held, tried, f"{at}: {errno}", _said(said))

    def drops(
        self,
        roles: Sequence[str],
        tried: str,
        steps: Maker,
        before: Before | None = None,
    ) -> None:
        """What each sends does not come out at the peer."""
        for role in roles:
            with self.attempt(role, tried):
                _, said, seen = self._take(role, steps, before)
                if not (said["ok"] or (said["at"] in _SENDS and said["errno"] == _DROPPED)):
                    self.note(role, False, tried, "it can be tried", _said(said))
                    continue
                happened = f"{_said(said)}; {_came_out(seen)}"
                self.note(role, not seen, tried, "nothing comes out at the peer", happened)

    def allows(
        self,
        roles: Sequence[str],
        tried: str,
        steps: Maker,
        before: Before | None = None,
        seen: bool = False,
    ) -> None:
        """Each succeeds; ``seen``: and what it sends comes out at the peer."""
        for role in roles:
            with self.attempt(role, tried):
                _, said, out = self._take(role, steps, before, look=seen)
                held = said["ok"] and (bool(out) or not seen)
                expected = "comes out at the peer" if seen else "succeeds"
                happened = _said(said) + (f"; {_came_out(out)}" if seen else "")
                self.note(role, held, tried, expected, happened)

    def _take(
        self, role: str, steps: Maker, before: Before | None, look: bool = True
    ) -> tuple[World, dict[str, Any], list[Seen]]:
        world = self.world
        with ExitStack() as stack:
            if before:
                who, first = before
                stack.enter_context(self.going(who, first(world)))
            said = self._bound(lambda: self.tries(role, steps(world)))
            seen = self.came_out(world.token) if look else []
        return world, said, seen

    @staticmethod
    def _bound(attempt: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """An attempt, made again while the port that it binds is in use."""
        for again in _AGAIN:
            time.sleep(again)
            said = attempt()
            if said.get("errno") != "EADDRINUSE":
                break
        return said

    def tries(self, role: str, steps: Steps) -> dict[str, Any]:
        """Let somebody take steps. Raises NotTried where too many before got no answer."""
        if self.stuck >= _GIVE_UP:
            raise NotTried(f"not tried any more: {_GIVE_UP} before it got no answer")
        said = self.bed.agents[role].tries(steps, self.bed.patience)
        return self._heard(said)

    def _heard(self, said: dict[str, Any]) -> dict[str, Any]:
        if said.get("errno") in ("ETIMEDOUT", "TimeoutError"):
            self.in_vain()
        return said

    def in_vain(self) -> None:
        """Somebody has waited in vain: wait less from now on."""
        self.stuck += 1
        self.bed.patience = max(self.bed.patience / 2, PATIENCE[1])

    def until(self, found: Callable[[], T], what: str) -> T:
        """What comes, if it comes. Raises NotTried."""
        with suppress(AssertionError):
            return until(found, self.bed.patience, what)
        self.in_vain()
        raise NotTried(f"waited in vain for {what}")

    def does(self, role: str, steps: Steps) -> dict[str, Any]:
        """What leads to an attempt. Raises NotTried if it fails."""
        said = self.tries(role, steps)
        if not said["ok"]:
            raise NotTried(f"{role}: {_said(said)}")
        return said

    @contextmanager
    def going(self, role: str, steps: Steps) -> Iterator[tuple[list[Any], Callable[[], Any]]]:
        """Steps with ``go`` or ``hold``: what was got until then, and how to get the rest."""
        if self.stuck >= _GIVE_UP:
            raise NotTried(f"not tried any more: {_GIVE_UP} before it got no answer")
        agent = self.bed.agents[role]

        def begin() -> dict[str, Any]:
            said = agent.answer(agent.begins(steps, patience=self.bed.patience))
            if not said["ok"]:
                agent.drops(said["id"])
            return said

        said = self._bound(begin)
        number = said["id"]
        if not said["ok"]:
            raise NotTried(f"{role}: {_said(said)}")

        def rest() -> dict[str, Any]:
            return self._heard(agent.answer(number))

        try:
            yield said["got"], rest
        finally:
            agent.drops(number)

    # -- what was seen -----------------------------------------------------------

    def came_out(self, token: bytes) -> list[Seen]:
        """What has come out at the peer with this token in it."""
        last = self.world
        # Sent after it through the same queues.
        self.does("node", [["socket", last.af, "SOCK_DGRAM"],
                           ["send", last.token.hex(), last.there, last.sink]])  # fmt: skip
        far = self.bed.far

        def arrived() -> list[Seen]:
            return [packet for packet in far.seen() if last.token in packet.payload]

        self.until(arrived, "a packet of the node's own at the peer")
        return [packet for packet in far.seen() if token in packet.payload]

    @contextmanager
    def watching(self) -> Iterator[Callable[[], list[Seen]]]:
        """What the node's hooks see from now on, of this family."""
        first = len(self.bed.near.seen())
        yield lambda: [p for p in self.bed.near.seen()[first:] if p.family == self.family]

    def owned(self, role: str, tried: str, seen: Sequence[Seen], hook: str, owner: str) -> None:
        """Every one of these packets, and there is one, had this owner at this hook."""
        marks = [packet.xid for packet in seen if packet.prefix == hook]
        xid = self.bed.xids[owner]
        expected = f"xid {xid} ({owner}) on every packet in {hook}"
        wrong = sorted(set(marks) - {xid})
        happened = f"{len(marks)} packets, of xid {', '.join(map(str, sorted(set(marks))))}"
        if wrong:
            first = next(p for p in seen if p.prefix == hook and p.xid == wrong[0])
            happened += f"; the first wrong one: {packet(first)}"
        self.note(role, bool(marks) and not wrong, tried, expected, happened)

    def halves(self, words: Sequence[str]) -> tuple[int, int] | None:
        """The two owners of a connection, by its tuple in ``conntrack``'s words."""
        import re

        from vnet.testing.net import HERE

        done = HERE.run("conntrack", "-G", *words, check=False)
        if not (found := re.search(r"\bmark=(\d+)", done.stdout)):
            return None
        return int(found[1]) & 0xFFFF, int(found[1]) >> 16


def packet(seen: Seen) -> str:
    """One packet for people."""
    names = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp", 47: "gre"}
    what = names.get(seen.proto, f"protocol {seen.proto}")
    flags = f" [{seen.tcp_flags}]" if seen.tcp_flags else ""
    return f"{what} {seen.src} {seen.sport} > {seen.dst} {seen.dport}{flags}"


def _said(said: dict[str, Any]) -> str:
    return "it succeeded" if said["ok"] else f"{said['at']}: {said['errno']}"


def _came_out(seen: list[Seen]) -> str:
    return f"{len(seen)} at the peer ({packet(seen[0])})" if seen else "nothing at the peer"


def _words(value: Any) -> str:
    return "none" if value is None else str(value)
