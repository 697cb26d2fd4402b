"""Metrics in Prometheus' text format: the collector's numbers, and the guard's counters.

Nothing is kept here: each scrape asks the collector once. Without a collector
``netflow_up`` is 0, and the rest is missing. docs/metrics.md lists them all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from netflow import client
from netflow.access import Peer, trusted
from netflow.ipfix import position
from netflow.names import MAX_NAMED, NODE, OTHER

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
GAPS = ("overrun", "unreadable", "clock-step", "not-running", "rebooted", "store-lost", "disk-full")
"""Kinds of gaps that are told with 0 before there is one, so that an alert meets a number."""
SECOND = 1e9
MAX_EXPORTS = 100
"""Receivers that are told of, by name."""


@dataclass(frozen=True)
class Source:
    """Where metrics come from: the collector's socket; vnet's directories, for the guard's.

    export_dir: where exporters keep their positions.
    """

    socket: Path
    run_dir: Path
    state_dir: Path
    export_dir: Path


def text(source: Source, who: Peer | None = None) -> bytes:
    """All metrics, as Prometheus reads them; who asks, if not we. Raises client.Refused."""
    registry = CollectorRegistry()
    registry.register(Figures(source, who))
    return generate_latest(registry)


class Figures(Collector):
    """For a registry of prometheus_client."""

    def __init__(self, source: Source, who: Peer | None = None) -> None:
        self.source = source
        self.who = who

    def describe(self) -> Iterable[Metric]:
        return []  # so that registering asks nobody

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("netflow_up", "Whether the collector answers.")
        try:
            figures = client.figures(self.source.socket, self.who)
        except client.Refused:
            raise
        except client.ClientError:
            up.add_metric([], 0)
            yield up
        else:
            up.add_metric([], 1)
            yield up
            yield from _plain(figures)
            yield from _by_slice(figures["slices"])
            yield from _gaps(figures["losses"])
            yield from _store(figures)
        # Without the collector nobody says who may see the others' counters but root.
        if up.samples[0].value or self.who is None or trusted(self.who):
            yield from _exports(self.source)
            yield from _refusals(self.source)


def _plain(figures: dict[str, Any]) -> Iterator[Metric]:
    """One number each."""
    info = GaugeMetricFamily("netflow_node_info", "Always 1.", labels=["node"])
    info.add_metric([figures["node"]], 1)
    yield info
    for name, help_, value in (
        ("start_time_seconds", "When this collector began.", figures["since"] / SECOND),
        (
            "recorded_time_seconds",
            "Up to when live connections are recorded too; what had ended is, a second later.",
            figures["as_of"] / SECOND,
        ),
        ("live_connections", "Connections that are being followed.", figures["live"]),
        ("waiting_records", "Closed records that are not being written yet.", figures["waiting"]),
        ("writing", "Whether a batch of records is being written.", figures["writing"]),
        ("memory_bytes", "Resident memory of the collector.", figures["memory"]),
    ):
        yield GaugeMetricFamily(f"netflow_{name}", help_, value=value)
    for name, help_, value in (
        ("events", "Conntrack's messages that were read.", figures["events"]),
        ("cpu_seconds", "Processor time of the collector.", figures["cpu"]),
    ):
        yield CounterMetricFamily(f"netflow_{name}", help_, value=value)
    for key, name, help_ in (
        ("entries", "entries", "Connections in the kernel's table."),
        ("limit", "limit", "Connections that the kernel's table may have."),
    ):
        if key in figures["conntrack"]:
            yield GaugeMetricFamily(
                f"netflow_conntrack_{name}", help_, value=figures["conntrack"][key]
            )
    records = CounterMetricFamily(
        "netflow_records", "Records written, by why they were closed.", labels=["reason"]
    )
    for reason, count in figures["reasons"].items():
        records.add_metric([reason], count)
    yield records


def _by_slice(slices: dict[str, dict[str, int]]) -> Iterator[Metric]:
    for what, help_ in (
        ("bytes", "Bytes that a slice sent (out), and that were sent to it (in)."),
        ("packets", "Packets that a slice sent (out), and that were sent to it (in)."),
        ("flows", "Connections that a slice began (out), and that began towards it (in)."),
    ):
        family = CounterMetricFamily(f"netflow_slice_{what}", help_, labels=["slice", "direction"])
        for name, counts in slices.items():
            for direction in ("out", "in"):
                family.add_metric([name, direction], counts[f"{direction}_{what}"])
        yield family


def _gaps(losses: list[list[Any]]) -> Iterator[Metric]:
    gaps = CounterMetricFamily(
        "netflow_gaps", "Spans of time whose records may be missing.", labels=["what"]
    )
    events = CounterMetricFamily(
        "netflow_gap_events", "Conntrack's messages that were lost in them.", labels=["what"]
    )
    missing = GaugeMetricFamily(
        "netflow_gap_missing_records", "Records thought missing for them.", labels=["what"]
    )
    seconds = GaugeMetricFamily("netflow_gap_seconds", "Their length.", labels=["what"])
    found = dict.fromkeys(GAPS, (0, 0, 0, 0)) | {what: tuple(n) for what, *n in losses}
    for what, (count, lost, estimate, length) in found.items():
        gaps.add_metric([what], count)
        events.add_metric([what], lost)
        missing.add_metric([what], estimate)
        seconds.add_metric([what], length / SECOND)
    yield from (gaps, events, missing, seconds)


def _store(figures: dict[str, Any]) -> Iterator[Metric]:
    size = GaugeMetricFamily(
        "netflow_store_bytes", "Bytes on disk: of the database (hot), of closed hours' files.",
        labels=["part"],
    )  # fmt: skip
    records = GaugeMetricFamily("netflow_store_records", "Records in it.", labels=["part"])
    for part, in_bytes, count in (
        ("hot", figures["store_bytes"], figures["hot"]),
        ("closed", figures["files_bytes"], figures["closed"]),
    ):
        size.add_metric([part], in_bytes)
        records.add_metric([part], count)
    yield size
    yield records
    yield GaugeMetricFamily(
        "netflow_store_full",
        "Whether nothing can be stored because the disk is full.",
        value=int(figures["full_since"] > 0),
    )
    yield GaugeMetricFamily(
        "netflow_store_full_since_seconds",
        "Up to when all is stored, while the disk is full; else 0.",
        figures["full_since"] / SECOND,
    )
    yield GaugeMetricFamily("netflow_store_files", "Files of closed hours.", figures["files"])
    yield GaugeMetricFamily(
        "netflow_store_oldest_time_seconds",
        "When the oldest record that is kept begins.",
        figures["oldest"] / SECOND,
    )
    yield CounterMetricFamily(
        "netflow_store_retired_records",
        "Records that retention dropped, ever.",
        figures["retired"],
    )


def _exports(source: Source) -> Iterator[Metric]:
    """What each exporter counts, as of when it last saved its position; they go on counting."""
    exports = list(position.known(source.export_dir).items())[:MAX_EXPORTS]
    if not exports:
        return
    for name, help_ in (
        ("records", "Records sent to a receiver, again those that went twice."),
        ("messages", "Messages sent."),
        ("sessions", "Connections to the receiver, and over UDP starts."),
        ("again", "Records that went, or may have gone, once more."),
        ("lost", "Segments of records that were gone before they were sent."),
        ("refused", "Datagrams that nobody took."),
    ):
        family = CounterMetricFamily(f"netflow_export_{name}", help_, labels=["to"])
        for to, progress in exports:
            family.add_metric([to], getattr(progress, name))
        yield family
    saved = GaugeMetricFamily(
        "netflow_export_saved_time_seconds", "When the position was last saved.", labels=["to"]
    )
    for to, progress in exports:
        saved.add_metric([to], progress.saved / SECOND)
    yield saved


def _refusals(source: Source) -> Iterator[Metric]:
    """What the guard counted, if this process may read it (CAP_BPF); else nothing."""
    import sqlite3

    from vnet.errors import VnetError
    from vnet.paths import Paths
    from vnet.registry import open_readonly

    from vnet import refusals, state

    paths = Paths(run_dir=source.run_dir, state_dir=source.state_dir)
    try:
        up = state.load(paths.state)
        counts = refusals.read(Path(up.instance)) if up and up.instance else None
    except (VnetError, OSError):
        counts = None
    if counts is None:
        return
    try:
        with open_readonly(paths.registry) as known:
            names = {tenure.xid: name for name, tenure in known.held().items()}
    except (OSError, sqlite3.Error):
        names = {}
    sums: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    named: set[str] = set()
    for count in counts:
        name = names.get(count.xid, f"xid {count.xid}") if count.xid else NODE
        if name not in named and len(named) >= MAX_NAMED:
            name = OTHER
        named.add(name)
        sums[name, count.kind][0] += count.refused
        sums[name, count.kind][1] += count.observed
    refused = CounterMetricFamily(
        "vnet_refusals", "What the guard refused a slice.", labels=["slice", "kind"]
    )
    observed = CounterMetricFamily(
        "vnet_observed",
        "What the guard would have refused, but for its mode observe.",
        labels=["slice", "kind"],
    )
    for key, (first, second) in sums.items():
        refused.add_metric(list(key), first)
        observed.add_metric(list(key), second)
    yield refused
    yield observed
