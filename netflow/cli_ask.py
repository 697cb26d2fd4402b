"""The commands that ask: query, top, history; and import, which gives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from netflow.cli_options import (
    checked,
    fail,
    made_filter,
    network,
    output_option,
    socket_option,
    span,
    which_records,
)
from netflow.cli_output import answer_options, ask, last_hour, split


@click.command()
@which_records
@click.option(
    "--limit",
    type=click.IntRange(0),
    metavar="N",
    help="The newest N, 0 for all.  [default: 1000 in a table, else all]",
)
@answer_options
@socket_option
def query(limit: int | None, socket: Path, **rest: Any) -> None:
    """Show the records that match all of the options and the filter, in order of time.

    An option given more than once matches any of its values.
    """
    from netflow.shapes import FLOWS

    how, which = split(rest)
    if limit is None:
        limit = 1000 if how["output"] == "table" else 0
    ask(socket, {"type": "flows", "filter": made_filter(**which), "limit": limit}, FLOWS, **how)


@click.command()
@which_records
@click.option(
    "--of",
    type=click.Choice(["slice", "peer", "port", "proto", "node"]),
    default="slice",
    show_default=True,
    help="What is summed up; a peer is the other end.",
)
@click.option(
    "--by", type=click.Choice(["bytes", "packets", "flows"]), default="bytes", show_default=True
)
@click.option(
    "--inside",
    multiple=True,
    callback=checked(network),
    metavar="A[/LEN]",
    help="Peers in there are inside, all others outside: told apart.",
)
@click.option(
    "--only",
    type=click.Choice(["inside", "outside"]),
    help="Only traffic with peers there; needs --inside.",
)
@click.option(
    "-n",
    "number",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="How many; 0: all, but 100,000.",
)
@click.option(
    "-f",
    "--follow",
    is_flag=False,
    flag_value="5s",
    default=None,
    callback=checked(span),
    metavar="[SPAN]",
    help="Ask again every 5s, or as said.",
)
@answer_options
@socket_option
def top(
    of: Any,
    by: Any,
    inside: list[str],
    only: Any,
    number: int,
    follow: int | None,
    socket: Path,
    **rest: Any,
) -> None:
    """Show who used the network most: slices, peers, ports; by default in the last hour.

    "Out" is what a slice sent, "in" what was sent to it. Traffic between two
    slices counts for both, and once in the total.
    """
    from netflow import shapes
    from netflow.client import ClientError
    from netflow.top import show

    how, which = split(rest)
    if follow is not None and (how["output"] not in ("table", "json") or how["to_file"]):
        raise click.UsageError("--follow gives tables or JSON lines on stdout (-o json)")
    if follow is not None and follow < 1_000_000_000:
        raise click.UsageError("--follow: 1s or more")
    if only and not inside:
        raise click.UsageError("--only needs --inside")
    last_hour(which)

    def made() -> dict[str, Any]:
        return {
            "type": "top",
            "filter": made_filter(**which),
            "of": of,
            "by": by,
            "inside": inside,
            "only": only or "all",
            "limit": number,
        }

    shape = shapes.top(of, bool(inside))
    if follow is None:
        ask(socket, made(), shape, **how)
        return
    try:
        show(socket, made, shape, follow, how["output"])
    except ClientError as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(0)


@click.command("import")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@socket_option
def import_(paths: tuple[Path, ...], socket: Path) -> None:
    """Take in files of records, of other nodes too; of directories, all files below.

    Each file is checked whole. One that is here already changes nothing. Only
    root may.
    """
    from netflow.filelist import take_in

    sys.exit(take_in(paths, socket))


@click.command()
@click.option("--node", "nodes", multiple=True, metavar="NAME", help="Files of this node only.")
@output_option
@socket_option
def history(nodes: tuple[str, ...], output: str, socket: Path) -> None:
    """List the files that hold closed records."""
    from netflow.client import ClientError, asking
    from netflow.filelist import show_files
    from netflow.wire import Files

    try:
        with asking(socket, Files(nodes=list(nodes))) as answer:
            show_files(answer, output)
    except ClientError as error:
        fail(str(error))
