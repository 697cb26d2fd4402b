"""Query parameters, and the requests they become. Their descriptions are the API's reference."""

from __future__ import annotations

from time import time_ns
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from netflow import language
from netflow.networks import bounds
from netflow.when import SECOND, parse_span, parse_time
from netflow.wire import Coverage, Filter, Flows, Scans, Series, Spoofed, Top, Who

HOUR = 3600 * SECOND

Time = Annotated[
    str,
    Field(
        max_length=64,
        description="ISO 8601 with a zone, `@` and seconds since the epoch, or an age: `2h`.",
        examples=["2026-03-01T03:12:30Z", "@1772334720", "2h"],
    ),
]
Span = Annotated[
    str,
    Field(max_length=64, description="A length of time.", examples=["90s", "15m", "2h", "1h30m"]),
]
Network = Annotated[
    str,
    Field(
        max_length=64,
        description="An IPv4 or IPv6 address or network.",
        examples=["198.51.100.7", "2001:db8::/32"],
    ),
]
Port = Annotated[int, Field(ge=0, le=65535)]
Limit = Annotated[int, Field(ge=0, le=1 << 40, description="Rows at most; 0: all, but 100,000.")]
Count = Annotated[int, Field(ge=1, le=1 << 31)]


class Which(BaseModel):
    """Which records, and in which form."""

    model_config = ConfigDict(extra="forbid")

    q: str = Field(
        "",
        max_length=language.MAX_LENGTH,
        description="A filter (docs/filter.md).",
        examples=["dst port 25 and slice princeton_*"],
    )
    node: list[Annotated[str, Field(max_length=255)]] = Field(
        [], max_length=100, description="Records of this node only; may be repeated."
    )
    since: Time | None = Field(None, description="Records still going at that time, or later.")
    until: Time | None = Field(None, description="Records begun by that time.")
    last: Span | None = Field(None, description="From so long ago to now.")
    at: Time | None = Field(None, description="That time, give or take `skew`.")
    skew: Span | None = Field(
        None, description="For `at`: how far clocks may differ, 2m if unsaid."
    )
    format: Literal["json", "ndjson"] = Field(
        "json",
        description="One JSON object, or a line for each row between a head and an end line.",
    )

    def moment(self, now: int) -> int | None:
        """`at`, ns UTC."""
        return None if self.at is None else parse_time(self.at, now)

    def filter(self, default: int | None = None) -> Filter:
        """Raises ValueError; default: the length of the period (ns) where none is given."""
        now = time_ns()
        ways = [
            name
            for name, used in (
                ("at", self.at is not None),
                ("last", self.last is not None),
                ("since and until", self.since is not None or self.until is not None),
            )
            if used
        ]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways)}: give one of them")
        if self.skew is not None and self.at is None:
            raise ValueError("skew belongs to at")
        since = None if self.since is None else parse_time(self.since, now)
        until = None if self.until is None else parse_time(self.until, now)
        if self.last is not None:
            since = max(0, now - parse_span(self.last))
        elif (at := self.moment(now)) is not None:
            skew = 120 * SECOND if self.skew is None else parse_span(self.skew)
            since, until = max(0, at - skew), min(at + skew, (1 << 63) - 1)
        elif not ways and default is not None:
            since = now - default
        if since is not None and until is not None and since > until:
            raise ValueError("the period ends before it begins")
        language.parse(self.q)
        return Filter(nodes=self.node, expression=self.q, since=since, until=until)


class FlowsOf(Which):
    limit: Limit = Field(1000, description="The newest so many; 0: all.")

    def request(self) -> Flows:
        return Flows(filter=self.filter(), limit=self.limit)


class TopOf(Which):
    """Without a period: of the last hour."""

    of: Literal["slice", "peer", "port", "proto", "node"] = Field(
        "slice", description="What is summed up; a peer is the other end."
    )
    by: Literal["bytes", "packets", "flows"] = Field("bytes", description="Largest first by this.")
    inside: list[Network] = Field(
        [], max_length=100, description="Peers in there are inside, all others outside: told apart."
    )
    only: Literal["all", "inside", "outside"] = Field(
        "all", description="Only traffic with peers there; needs `inside`."
    )
    limit: Limit = 10

    def request(self) -> Top:
        if self.only != "all" and not self.inside:
            raise ValueError("only needs inside")
        for network in self.inside:
            bounds(network)
        return Top(
            filter=self.filter(HOUR), of=self.of, by=self.by, inside=self.inside, only=self.only,
            limit=self.limit,
        )  # fmt: skip


class WhoWas(Which):
    """Without a period: in the last hour."""

    peer: Network | None = Field(None, description="The other end, before or after NAT.")
    peer_port: Port | None = None
    own: Network | None = Field(None, description="Our end, before or after NAT.")
    own_port: Port | None = None
    limit: Limit = 100

    def request(self) -> Who:
        for network in (self.peer, self.own):
            if network is not None:
                bounds(network)
        if self.peer is None and self.own is None and self.peer_port is self.own_port is None:
            raise ValueError("who sent to whom? give peer, peer_port, own or own_port")
        return Who(
            filter=self.filter(HOUR), peer=self.peer or "", peer_port=self.peer_port,
            own=self.own or "", own_port=self.own_port, at=self.moment(time_ns()),
            limit=self.limit,
        )  # fmt: skip


def _step(text: str | None) -> int:
    return 0 if text is None else parse_span(text)


class SeriesOf(Which):
    """Without a period: of the last hour."""

    step: Span | None = Field(None, description="How long a step is; if unsaid, what suits.")

    def request(self) -> Series:
        return Series(filter=self.filter(HOUR), step=_step(self.step))


class ScansBy(Which):
    """Without a period: in the last hour."""

    hosts: Count = Field(50, description="So many hosts tried at one port are a scan.")
    ports: Count = Field(50, description="So many ports tried of one host are one.")
    packets: int = Field(
        3, ge=0, le=1 << 31, description="TCP with at most so many packets each way was a try."
    )
    window: Span = Field("10m", description="Within so long a time.")
    limit: Limit = 100

    def request(self) -> Scans:
        return Scans(
            filter=self.filter(HOUR), hosts=self.hosts, ports=self.ports, packets=self.packets,
            window=parse_span(self.window), limit=self.limit,
        )  # fmt: skip


class SpoofedBy(Which):
    """Without a period: in the last hour."""

    limit: Limit = 100

    def request(self) -> Spoofed:
        return Spoofed(filter=self.filter(HOUR), limit=self.limit)


class CoverageOf(Which):
    """Without a period: of the last hour."""

    step: Span | None = Field(None, description="How long a step is; if unsaid, what suits.")

    def request(self) -> Coverage:
        return Coverage(filter=self.filter(HOUR), step=_step(self.step))
