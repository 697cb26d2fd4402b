"""The commands for an operator's questions: scans, series, spoofed, coverage, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from netflow.cli_options import (
    checked,
    fail,
    made_filter,
    moment,
    number_option,
    socket_option,
    span,
    which_records,
)
from netflow.cli_output import answer_options, ask, last_hour, split

_SECOND = 1_000_000_000

step_option = click.option(
    "--step",
    callback=checked(span),
    metavar="SPAN",
    help="How long one step is.  [default: what suits the period]",
)


@click.command()
@which_records
@click.option(
    "--hosts",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="So many hosts tried at one port are a scan.",
)
@click.option(
    "--ports",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="So many ports tried of one host are one.",
)
@click.option(
    "--packets",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="TCP with at most so many packets each way is a try, even if answered.",
)
@click.option(
    "--window",
    callback=checked(span),
    default="10m",
    show_default=True,
    metavar="SPAN",
    help="Within this time.",
)
@number_option
@answer_options
@socket_option
def scans(
    hosts: int, ports: int, packets: int, window: int, number: int, socket: Path, **rest: Any
) -> None:
    """Show slices that tried many hosts or many ports; by default in the last hour.

    A try is a flow to which nothing came back, or TCP of a few packets.
    """
    from netflow.shapes import SCANS

    how, which = split(rest)
    last_hour(which)
    question = {
        "type": "scans",
        "filter": made_filter(**which),
        "hosts": hosts,
        "ports": ports,
        "packets": packets,
        "window": window,
        "limit": number,
    }
    ask(socket, question, SCANS, **how)


@click.command()
@which_records
@step_option
@answer_options
@socket_option
def series(step: int | None, socket: Path, **rest: Any) -> None:
    """Show what was sent and received in each step of time; by default of the last hour."""
    from netflow.shapes import SERIES

    how, which = split(rest)
    last_hour(which)
    question = {"type": "series", "filter": made_filter(**which), "step": step or 0}
    ask(socket, question, SERIES, **how)


@click.command()
@which_records
@number_option
@answer_options
@socket_option
def spoofed(number: int, socket: Path, **rest: Any) -> None:
    """Show who sent, or tried to send, as somebody else; by default in the last hour.

    From the guard's events (vnet events), and from records: flows that a slice
    began from an address that is not this node's. Of the options, the guard's
    events answer to times, --slice and --xid.
    """
    from netflow.shapes import SPOOFED

    how, which = split(rest)
    last_hour(which)
    question = {"type": "spoofed", "filter": made_filter(**which), "limit": number}
    ask(socket, question, SPOOFED, **how)


@click.command()
@which_records
@click.option(
    "--step",
    callback=checked(span),
    metavar="SPAN",
    help="Step by step.  [default: the whole period at once]",
)
@answer_options
@socket_option
def coverage(step: int | None, socket: Path, **rest: Any) -> None:
    """Show what share of the traffic is attributed, and why the rest is not.

    \b
    slice          a slice owns an end of it
    unnamed        an xid that nobody held then, by the registry
    before-slices  no slice was registered yet
    node           the node's own: an end is one of its addresses
    forwarded      passing through: no end is
    other-node     imported: that node's addresses are not known here
    gap            time in which records may be missing

    By default of the last hour.
    """
    from netflow.shapes import COVERAGE

    how, which = split(rest)
    last_hour(which)
    question = {"type": "coverage", "filter": made_filter(**which), "step": step or 0}
    ask(socket, question, COVERAGE, **how)


@click.command()
@click.option("--slice", "name", required=True, metavar="NAME", help="Whose report.")
@click.option(
    "--last",
    callback=checked(span),
    metavar="SPAN",
    help="Of the last 90m, 2h, 7d.  [default: 7d]",
)
@click.option("--since", callback=checked(moment), metavar="T", help="From then.")
@click.option("--until", callback=checked(moment), metavar="T", help="Up to then.")
@click.option(
    "--to",
    "file",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where the page is written, FILE.html.",
)
@socket_option
def report(
    name: str,
    last: int | None,
    since: int | None,
    until: int | None,
    file: Path,
    socket: Path,
) -> None:
    """Write a page about a slice: its traffic, peers, ports, scans, and what may be missing.

    One file of HTML with its plots in it: it loads nothing, and can be mailed
    or kept. It needs matplotlib.
    """
    from time import time_ns

    from netflow.client import ClientError
    from netflow.wire import Filter

    if last is not None and (since is not None or until is not None):
        raise click.UsageError("--last and --since/--until: give one of them")
    now = time_ns()
    end = now if until is None else until
    begin = since if since is not None else end - (last or 7 * 86400 * _SECOND)
    if begin > end:
        raise click.UsageError("the period ends before it begins")
    from netflow.report import gather
    from netflow.report_page import page
    from netflow.report_plot import PlotError
    from netflow.show import patience, written

    try:
        with patience():
            made = page(gather(socket, name, Filter(since=max(0, begin), until=end)))
        with written(file) as out:
            out.write(made)
    except (ClientError, PlotError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot write {file}: {error.strerror}")
