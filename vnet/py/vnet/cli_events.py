"""``vnet events``. Imports what it needs inside the command, like ``vnet.cli``."""

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from vnet.cli_common import complete_slice
from vnet.paths import Paths

if TYPE_CHECKING:
    from vnet.eventlog import Asked, Tail
    from vnet.events import Drain

#: events in the table, and before those to come, where --limit says nothing
_IN_TABLE = 100
_BEFORE_FOLLOWING = 10


def _complete_kind(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from vnet.events import KINDS

    return [kind for kind in KINDS if kind.startswith(incomplete)]


@click.command(
    epilog="\b\nExamples:\n"
    "  vnet events --since 10m              what was refused in the last ten minutes\n"
    "  vnet events --slice web --follow     as it happens\n"
    "  vnet events --kind bind --json | jq -r .owner | sort | uniq -c\n"
    "  vnet events --counters               how often, by slice and kind\n"
    "  vnet events --kinds                  what the kinds mean"
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes.")
@click.option(
    "--since", metavar="TIME", help="From then on: 30s, 10m, 2h, 7d ago, or ISO 8601 (local time)."
)
@click.option(
    "--slice", "slice_name", metavar="NAME", shell_complete=complete_slice,
    help="Who was refused.",
)  # fmt: skip
@click.option("--kind", shell_complete=_complete_kind, help="What was refused, see --kinds.")
@click.option(
    "-n", "--limit", type=click.IntRange(min=0), metavar="N",
    help="The newest N; 0: all. By default 100, with --follow 10, with --json all.",
)  # fmt: skip
@click.option("--counters", is_flag=True, help="How often, instead: also what got no event.")
@click.option("--kinds", is_flag=True, help="What the kinds mean, instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one line an event.")
@click.pass_obj
def events(
    paths: Paths,
    follow: bool,
    since: str | None,
    slice_name: str | None,
    kind: str | None,
    limit: int | None,
    counters: bool,
    kinds: bool,
    as_json: bool,
) -> None:
    """Say what the guard refused, to whom, and whose it was.

    A slice that is refused again and again gets ten events a second of each
    kind and CPU; the rest is counted. Times are UTC.
    """
    from vnet import eventlog
    from vnet.errors import NodeError, UsageError
    from vnet.events import KINDS

    if counters and (follow or since or limit is not None):
        raise UsageError("--counters are of now: not with --follow, --since or --limit")
    if kind not in (None, *KINDS):
        raise UsageError(f"--kind {kind}: not one of {', '.join(KINDS)}")
    asked = eventlog.Asked(_since(since), slice_name, kind)
    try:
        if kinds:
            _print_kinds(as_json)
            return
        if os.geteuid() != 0:
            raise NodeError("vnet events: only root may read what was refused", "sudo vnet events")
        _check_slice(paths, slice_name)
        if counters:
            _print_counters(paths, slice_name, kind, as_json)
        else:
            _print_events(paths, asked, limit, follow, as_json)
    except BrokenPipeError:  # `vnet events | head`: nobody reads on, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:  # the way out of --follow
        pass


def _since(text: str | None) -> str | None:
    import time

    from vnet import events
    from vnet.errors import UsageError

    if text is None:
        return None
    try:
        return events.iso(events.moment(text, time.time_ns()))
    except ValueError as error:
        raise UsageError(f"--since {text}: {error}") from error


def _check_slice(paths: Paths, name: str | None) -> None:
    """Raise UsageError for a name that no slice ever had: a typing error is no empty answer."""
    from vnet import registry
    from vnet.errors import UsageError

    if name is None or not paths.registry.exists():
        return
    with registry.open_readonly(paths.registry) as known:
        if not known.tenures(name):
            raise UsageError(f"--slice {name}: no slice on this node ever had this name")


def _print_kinds(as_json: bool) -> None:
    from vnet import tables
    from vnet.events import KINDS

    if as_json:
        click.echo(json.dumps(KINDS, indent=2))
        return
    tables.rows(["kind", "refused is"], list(KINDS.items()))


def _print_counters(paths: Paths, slice_name: str | None, kind: str | None, as_json: bool) -> None:
    import time
    from dataclasses import asdict

    from vnet import bpf, events, refusals, tables
    from vnet.errors import NodeError

    instances = bpf.instances(paths.bpf_dir)
    if not instances:
        raise NodeError("no guard is in place, and so there are no counters", "vnet up")
    with events.naming(paths) as name:
        found = [
            {"slice": name(count.xid, time.time_ns()), **asdict(count)}
            for instance in instances
            for count in refusals.read(instance)
        ]
    found = [
        count
        for count in found
        if kind in (None, count["kind"]) and slice_name in (None, count["slice"])
    ]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    tables.rows(
        ["slice", "kind", ">refused", ">observed", ">without an event"],
        [
            (_who(count["slice"], count["xid"]), count["kind"],
             *(f"{count[key]:,}" for key in ("refused", "observed", "suppressed")))
            for count in found
        ],
    )  # fmt: skip


def _print_events(
    paths: Paths, asked: "Asked", limit: int | None, follow: bool, as_json: bool
) -> None:
    from contextlib import closing

    from vnet import eventlog, events, tables

    if limit is None:
        limit = None if as_json else _BEFORE_FOLLOWING if follow else _IN_TABLE
    elif limit == 0:
        limit = None
    with closing(events.Drain(paths)) as drain:
        while drain.drain(wait=True) >= events.BATCH:
            pass
        # Nobody writes meanwhile: no event is told twice, and none left out.
        with events.reading(paths, wait=True):
            tail = eventlog.Tail(paths, asked)
            found, count = eventlog.read(paths, asked, limit)
        with closing(tail):
            if lost := events.unwritten(paths):
                click.echo(f"note: {lost} more could not be written to {eventlog.path(paths)}",
                           err=True)  # fmt: skip
            if as_json or follow:
                _print_lines(found, as_json)
            else:
                if found:
                    tables.rows(_COLUMNS, [cells(event) for event in found])
                else:
                    click.echo("no such event")
                if count > len(found):
                    click.echo(f"and {count - len(found):,} older ones: --limit 0 shows all")
            if follow:
                _follow(paths, drain, tail, as_json)


def _follow(paths: Paths, drain: "Drain", tail: "Tail", as_json: bool) -> None:
    """Print what comes, whoever reads the ring: we, `vnet watch` or another."""
    import select

    from inotify_simple import INotify, flags

    with INotify() as inotify:
        inotify.add_watch(paths.state_dir, flags.MODIFY | flags.CREATE | flags.MOVED_TO)
        waiting = select.poll()
        waiting.register(inotify, select.POLLIN)
        waiting.register(drain, select.POLLIN)
        while True:
            _print_lines(tail.new(), as_json)
            waiting.poll(1000)  # ms; a node that comes up wakes nobody
            inotify.read(timeout=0)
            drain.drain()


def _print_lines(found: list[dict[str, Any]], as_json: bool) -> None:
    for event in found:
        if as_json:
            sys.stdout.write(json.dumps(event, separators=(",", ":")) + "\n")
        else:
            time, who, what, source, target, owner, process = cells(event)
            parts = [time, f"{who:<12}", what, source, target and f"to {target}",
                     owner and f"of {owner}", process and f"by {process}"]  # fmt: skip
            sys.stdout.write(" ".join(part for part in parts if part) + "\n")
    sys.stdout.flush()


_COLUMNS = ("time", "slice", "what was refused", "from", "to", "owner", "process")
_WORDS = {
    "raw": "raw socket",
    "packet": "packet socket",
    "bind": "bind to a reserved port",
    "address": "use of a reserved address",
    "port": "packet from a reserved port",
    "foreign": "packet from what is not its own",
    "mark": "mark of another slice",
    "spoof": "packet from a foreign address",
    "connection": "packet into a connection",
    "snoop": "another's packet at a raw socket",
    "mptcp": "MPTCP socket",
}


def cells(event: dict[str, Any]) -> tuple[str, ...]:
    """An event as a row for people. What an older version did not write is left out."""
    time = str(event["time"])[:19].replace("T", " ") + "Z"
    kind = str(event["kind"])
    if kind == "lost":
        return (time, "-", f"{event.get('count')} events could not be written here", *[""] * 4)
    what = _WORDS.get(kind, kind)
    if kind == "mark":
        what += f" ({event.get('mark')})"
    elif kind == "raw" and event.get("pid"):
        what += f" ({event.get('family')} {event.get('proto')})"
    elif kind in ("packet", "mptcp") and event.get("family") not in ("ipv4", "ipv6"):
        what = f"{event.get('family')} socket"
    if not event.get("refused"):
        what += ", let through"
    if event.get("suppressed"):
        what += f", {event['suppressed']} more before"
    pid, owner = event.get("pid"), event.get("owner_xid")
    return (
        time,
        _who(event.get("slice"), event.get("xid")),
        _printable(what),
        _end(event, "src", "sport"),
        _end(event, "dst", "dport"),
        _who(event.get("owner"), owner) if owner else "",
        f"{_printable(event.get('comm') or '')}[{pid}]" if pid else "",
    )


def _who(name: str | None, xid: int | None) -> str:
    return name or (f"xid {xid}" if xid else "the node")


def _end(event: dict[str, Any], address: str, port: str) -> str:
    """One end of a packet, or what was asked for: ``udp/192.0.2.1:53``."""
    host = event.get(address)
    if host is None:
        return ""
    if event.get(port) is None:
        return str(host)
    host = f"[{host}]" if ":" in host else host
    return f"{event.get('proto')}/{host}:{event[port]}"


def _printable(text: str) -> str:
    """A process names itself: no escape sequence of its reaches a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)
