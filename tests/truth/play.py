"""The ways a packet can go, and what was seen of it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from thread_bed import A, B
from vnet.testing.nflog import ICMP, Seen
from vnet.testing.poll import until

from netflow.output import iso
from truth.bed import Agent, Bed, Refused
from truth.table import key

LATE = 777
"""The xid of a slice that comes later."""
UPPER = 0x40000
"""A bit of the mark that is somebody else's."""
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
_NAMES = {0: "-", A: "a", B: "b", LATE: "l"}


def token(mark: int) -> str:
    """A mark as the table writes it."""
    name = _NAMES.get(mark & 0xFFFF, f"{mark & 0xFFFF:#x}")
    upper = mark & ~0xFFFF
    return name + ("^" if upper == UPPER else f"^{upper:#x}" if upper else "")


@dataclass
class Play:
    """One scene for one family."""

    bed: Bed
    family: int
    began: int = field(default_factory=time.time_ns)
    """Flows that began before this are not meant."""
    found: dict[str, str] = field(default_factory=dict)
    """What was seen, by cell."""
    pending: list[tuple[str, str, "Flow"]] = field(default_factory=list)
    """Cells whose packets were seen: key, owners, connection."""
    twin: "Play | None" = None
    """The same for the other family, for a scene that plays both at once."""

    def now(self) -> None:
        """From here on only flows that begin now are meant."""
        self.began = time.time_ns()

    @property
    def here(self) -> str:
        """The node's address."""
        return self.bed.here(self.family)

    @property
    def there(self) -> str:
        """The peer's address."""
        return self.bed.there(self.family)

    def agent(self, name: str) -> Agent:
        """Who stands at a place: a, b, node, peer."""
        return self.bed.agents[name]

    def way(self, name: str) -> "Way":
        """One way: out (slice a begins, the peer answers), in, or local (a begins, b answers)."""
        agent = self.agent
        here, there, loopback = self.here, self.there, LOOPBACK[self.family]
        ends = {
            "out": (agent("a"), agent("peer"), here, there, agent("node"), agent("peer")),
            "in": (agent("peer"), agent("a"), there, here, agent("peer"), agent("node")),
            "local": (agent("a"), agent("b"), loopback, loopback, agent("node"), agent("node")),
        }[name]
        return Way(self, name, *ends, len(self.bed.log.seen()))

    def ways(self, *names: str) -> Iterator["Way"]:
        """Some ways one after another, or all."""
        for name in names or ("out", "in", "local"):
            self.now()  # another way may have had the same port
            yield self.way(name)

    def put(self, row: str, column: str, owners: str, flow: "Flow | None" = None) -> None:
        """Note what was seen of a cell; without a flow it is all that there is to say."""
        name = key(row, column, self.family)
        if flow:
            self.pending.append((name, owners, flow))
        else:
            self.found[name] = owners

    def settle(self, records: list[dict[str, Any]]) -> dict[str, str]:
        """What was seen, with the owners of the flows."""
        for name, owners, flow in self.pending:
            found = dict.fromkeys(flow.owners(records, self.family))
            self.found[name] = f"{owners} {','.join(found) or 'none'}"
        return self.found


def began(record: dict[str, Any]) -> tuple[str, str]:
    """Between which moments its connection began: flow_start has whole milliseconds."""
    within = record["flow_start"][:23]
    if record["start"][:23] == within:  # its first share
        return record["start"], record["start"]
    return within + "000000Z", within + "999999Z"


@dataclass(frozen=True)
class Flow:
    """Which connection is meant."""

    which: dict[str, int | str]
    since: str
    until: str

    def owners(self, records: list[dict[str, Any]], family: int) -> Iterator[str]:
        """Of its records, one after the other, as the table writes them."""
        for record in records:
            # Ports come again: what began earlier with the same ones is not meant.
            first, last = began(record)
            if first <= self.until and self.since <= last and self._is(record, family):
                yield "/".join(token(record[side]["xid"]) for side in ("originator", "responder"))

    def _is(self, record: dict[str, Any], family: int) -> bool:
        facts = record | {"ident": record.get("icmp", {}).get("id")}
        same = all(facts.get(name) == value for name, value in self.which.items())
        return same and (":" in record["src"]) == (family == 6)


@dataclass
class Way:
    """Who talks to whom, and what the hooks see of it."""

    play: Play
    name: str
    orig: Agent
    resp: Agent
    src: str
    """Address of who begins."""
    dst: str
    orig_root: Agent
    """The node's or the peer's root on the side that begins."""
    resp_root: Agent
    start: int

    def seen(self) -> list[Seen]:
        """All packets since the beginning of this way."""
        return self.play.bed.log.seen()[self.start :]

    def of_port(self, port: int) -> list[Seen]:
        """Those to or from a port; ICMP has none, though its type and code are read as one."""
        seen = (p for p in self.seen() if p.proto not in ICMP)
        return [p for p in seen if port in (p.sport, p.dport)]

    @property
    def hooks(self) -> int:
        """How many a packet passes."""
        return 2 if self.name == "local" else 1

    def last(self, packets: list[Seen]) -> list[Seen]:
        """Those of them at the last hook that they pass: there they have arrived."""
        return [p for p in packets if p.prefix == "input"] if self.name == "local" else packets

    def wait(self, pick: Callable[[Seen], object], what: str = "") -> list[Seen]:
        """Wait until a packet of this kind has passed its last hook."""

        def found() -> list[Seen]:
            packets = list(filter(pick, self.seen()))
            return packets if self.last(packets) else []

        return until(found, what=what)

    def flows(self, **which: int | str) -> Flow:
        """The connection, by proto (its name), sport, dport of who began, ident of an echo."""
        return Flow(which, iso(self.play.began), iso(time.time_ns()))

    def saw(self, row: str, packets: list[Seen], flows: Flow) -> None:
        """Note whose these packets were."""
        sent = _owners([p for p in packets if p.prefix == "postrouting"])
        got = _owners([p for p in packets if p.prefix == "input"])
        if self.name == "local":
            self.play.put(row, "local", f"{sent}>{got}", flows)
            return
        for owners, column in ((sent, "out"), (got, "in")):
            if owners != "none":
                self.play.put(row, column, owners, flows)
        if sent == got == "none":
            self.play.put(row, self.name, "none", flows)


def _owners(packets: list[Seen]) -> str:
    return "+".join(sorted({token(p.mark) for p in packets})) or "none"


__all__ = ["LATE", "LOOPBACK", "UPPER", "Play", "Refused", "Way", "token"]
