"""``vnet check``. Imports what it needs inside the command, like ``vnet.cli``."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vnet.paths import Paths

if TYPE_CHECKING:
    from vnet.check.facts import Report


def _complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from vnet.check.run import PROPERTIES

    return [each.name for each in PROPERTIES if each.name.startswith(incomplete)]


@click.command(
    epilog="\b\nExamples:\n"
    "  vnet check                           a node of its own, in a namespace\n"
    "  vnet check --live                    this node, by canaries beside its slices\n"
    "  vnet check port-reserved raw-deny -v what was tried, and what happened\n"
    "  vnet check --junit report.xml        in CI\n"
    "  vnet check --list                    all properties, and why each matters"
)
@click.argument("properties", nargs=-1, metavar="[PROPERTY]...", shell_complete=_complete)
@click.option("--live", is_flag=True, help="Check the node that is up here, not one of its own.")
@click.option(
    "--datapath", type=click.Choice(["bpf", "module"]), default=None,
    help="Of its own node. The module's can be checked with --live only.",
)  # fmt: skip
@click.option(
    "--allow-skip", "allowed", multiple=True, metavar="PROPERTY", shell_complete=_complete,
    help="This one may be skipped where it cannot be had. May be repeated.",
)  # fmt: skip
@click.option(
    "--junit", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Write JUnit's XML there, too.",
)  # fmt: skip
@click.option("-v", "--verbose", is_flag=True, help="All attempts, not only those that fell.")
@click.option("--list", "as_list", is_flag=True, help="Name the properties, and try nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def check(
    paths: Paths,
    properties: tuple[str, ...],
    live: bool,
    datapath: str | None,
    allowed: tuple[str, ...],
    junit: Path | None,
    verbose: bool,
    as_list: bool,
    as_json: bool,
) -> None:
    """Attack a node from inside slices, and say which of its promises held.

    Slices of its own, one for each grant, try what is forbidden and what is
    allowed, with real sockets and packets. Without --live they do so on a node
    that is made for this, in a network namespace, and taken away. With --live
    they stand as canaries beside the slices of this node: nobody else's
    slices, rules or ports are touched.

    Exit codes: 0 every property held, and none was skipped but those that
    --allow-skip names; 1 one fell, was skipped, or could not be tried; 2 bad
    input, and nothing was tried.
    """
    if as_list:
        _list(properties, as_json)
        return
    from vnet.check import report as reports

    found = _check(paths, properties, allowed, live, datapath)
    if junit is not None:
        reports.junit(found, junit)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
    else:
        reports.matrix(found, verbose)
    sys.exit(0 if found.good else 1)


def _list(properties: tuple[str, ...], as_json: bool) -> None:
    from vnet import tables
    from vnet.check.run import chosen

    named = [(each.name, each.why) for each in chosen(properties)]
    if as_json:
        click.echo(json.dumps(dict(named), indent=2))
    else:
        tables.rows(("property", "why it matters"), named)


def _check(
    paths: Paths,
    properties: tuple[str, ...],
    allowed: tuple[str, ...],
    live: bool,
    datapath: str | None,
) -> "Report":
    import time

    from vnet import node
    from vnet.check import outside, run, sandbox
    from vnet.errors import UsageError

    run.chosen(properties)  # bad words are told before anything is made
    run.chosen(allowed)
    if live and datapath:
        raise UsageError(
            "vnet check: with --live the data path is the one in place",
            "leave --datapath out, or `vnet up --datapath` first",
        )
    node.require_root("check")
    outside.scapy()
    begun = time.monotonic()

    def tell(what: str) -> None:
        if time.monotonic() - begun > 2:
            click.echo(f"vnet check: {what}", err=True)

    with sandbox.stoppable():
        if live:
            for line in run.ANNOUNCEMENT:
                click.echo(line, err=True)
            return run.live(paths, properties, allowed, tell)
        with sandbox.sandbox(datapath) as own:  # type: ignore[arg-type]
            found = run.live(own, properties, allowed, tell)
    found.live = False
    found.seconds = round(time.monotonic() - begun, 2)
    return found
