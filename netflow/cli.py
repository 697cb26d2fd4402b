"""The ``netflow`` command. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from netflow.wire import Filter

F = TypeVar("F", bound=Callable[..., Any])

STORE = "/var/lib/netflow/flows.duckdb"
SOCKET = "/run/netflow/query.sock"
STATE_DIR = "/var/lib/vnet"

_socket_option = click.option(
    "--socket",
    type=click.Path(path_type=Path, readable=False),
    default=SOCKET,
    envvar="NETFLOW_SOCKET",
    show_default=True,
    show_envvar=True,
    help="Where the collector answers questions.",
)
_output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
)


def fail(message: str, code: int = 1) -> NoReturn:
    """Say what went wrong, once, and exit."""
    click.echo(f"netflow: {message}", err=True)
    sys.exit(code)


def _checked(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A click callback from a function that raises ValueError with a message for people."""

    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        try:
            if isinstance(value, tuple):
                return [parse(one) for one in value]
            return None if value is None else parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from None

    return callback


def _time(text: str) -> int:
    from time import time_ns

    from netflow.when import parse_time

    return parse_time(text, time_ns())


def _span(text: str) -> int:
    from netflow.when import parse_span

    return parse_span(text)


def _network(text: str) -> str:
    from netflow.filters import bounds

    bounds(text)
    return text


def _proto(text: str) -> int:
    from netflow.protocols import parse

    return parse(text)


_PORT = click.IntRange(0, 65535)
_WHICH = (
    click.option("--slice", "slices", multiple=True, metavar="NAME", help="Either side is its."),
    click.option(
        "--xid", "xids", multiple=True, type=_PORT, metavar="N", help="Either side has this xid."
    ),
    click.option(
        "--side",
        type=click.Choice(["any", "originator", "responder"]),
        default="any",
        show_default=True,
        help="Which side --slice and --xid mean.",
    ),
    click.option(
        "--src",
        multiple=True,
        callback=_checked(_network),
        metavar="A[/LEN]",
        help="Originator's address or network, before or after NAT.",
    ),
    click.option(
        "--dst",
        multiple=True,
        callback=_checked(_network),
        metavar="A[/LEN]",
        help="Responder's, likewise.",
    ),
    click.option(
        "--addr",
        multiple=True,
        callback=_checked(_network),
        metavar="A[/LEN]",
        help="Either one's, likewise.",
    ),
    click.option("--sport", multiple=True, type=_PORT, metavar="PORT", help="Originator's port."),
    click.option("--dport", multiple=True, type=_PORT, metavar="PORT", help="Responder's port."),
    click.option("--port", multiple=True, type=_PORT, metavar="PORT", help="Either one's port."),
    click.option(
        "--proto",
        multiple=True,
        callback=_checked(_proto),
        metavar="NAME|N",
        help="tcp, udp, icmp, icmp6, sctp, ... or a number.",
    ),
    click.option(
        "--since",
        callback=_checked(_time),
        metavar="T",
        help="Still going at T or later: 2026-03-01T03:12, 03:12, @1772334720, 2h (ago).",
    ),
    click.option("--until", callback=_checked(_time), metavar="T", help="Begun by T."),
    click.option("--last", callback=_checked(_span), metavar="SPAN", help="The last 90s, 2h, 1d."),
    click.option("--at", callback=_checked(_time), metavar="T", help="At T, give or take --skew."),
    click.option(
        "--skew",
        callback=_checked(_span),
        metavar="SPAN",
        help="How far the clocks may differ for --at.  [default: 2m]",
    ),
)


def _which(command: F) -> F:
    """Add the options that choose records."""
    for option in reversed(_WHICH):
        command = option(command)
    return command


def _filter(last: int | None, at: int | None, skew: int | None, **fields: Any) -> Filter:
    """The question as typed; exit 2 where the words contradict each other."""
    from time import time_ns

    from netflow.when import SECOND
    from netflow.wire import Filter

    since, until = fields.pop("since"), fields.pop("until")
    ways = [
        name
        for name, used in (
            ("--at", at is not None),
            ("--last", last is not None),
            ("--since/--until", since is not None or until is not None),
        )
        if used
    ]
    if len(ways) > 1:
        raise click.UsageError(f"{' and '.join(ways)}: give one of them")
    if skew is not None and at is None:
        raise click.UsageError("--skew belongs to --at")
    if fields["side"] != "any" and not fields["slices"] and not fields["xids"]:
        raise click.UsageError("--side belongs to --slice or --xid")
    if last is not None:
        since = max(0, time_ns() - last)
    if at is not None:
        skew = 120 * SECOND if skew is None else skew
        since, until = max(0, at - skew), min(at + skew, (1 << 63) - 1)
    if since is not None and until is not None and since > until:
        raise click.UsageError("the period ends before it begins")
    side = fields.pop("side")
    lists = {key: list(value) for key, value in fields.items()}
    return Filter(since=since, until=until, side=side, **lists)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="vnet")
def main() -> None:
    """Who sent what, to whom, when: flow records of a host that slices share."""


@main.command()
@click.option(
    "--store",
    type=click.Path(path_type=Path, dir_okay=False, readable=False),
    default=STORE,
    envvar="NETFLOW_STORE",
    show_default=True,
    show_envvar=True,
    help="The file that holds the records.",
)
@_socket_option
@click.option("--group", metavar="NAME", help="Its members may ask, besides root.")
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False, readable=False),
    default=STATE_DIR,
    envvar="VNET_STATE_DIR",
    show_default=True,
    show_envvar=True,
    help="Where vnet's registry of names is.",
)
@click.option(
    "--active-timeout",
    callback=_checked(_span),
    default="60s",
    show_default=True,
    metavar="SPAN",
    help="How often a connection that goes on is recorded.",
)
@click.option(
    "--receive-buffer",
    type=click.IntRange(4096, 1 << 30),
    default=64 << 20,
    show_default=True,
    metavar="BYTES",
    help="How much the kernel may hold for us; a burst that does not fit is a counted loss.",
)
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
def collect(
    store: Path,
    socket: Path,
    group: str | None,
    state_dir: Path,
    active_timeout: int,
    receive_buffer: int,
    verbose: bool,
) -> None:
    """Record the connections of this network namespace until SIGTERM or SIGINT."""
    from netflow.collect import Options, run

    if active_timeout < 1_000_000_000:
        raise click.BadParameter("at least 1s", param_hint="--active-timeout")
    sys.exit(
        run(
            Options(
                store=store,
                socket=socket,
                group=group,
                registry=state_dir / "registry.db",
                active_timeout=active_timeout,
                receive_buffer=receive_buffer,
                verbose=verbose,
            )
        )
    )


@main.command()
@_which
@click.option(
    "--limit",
    type=click.IntRange(0),
    metavar="N",
    help="The newest N, 0 for all.  [default: 1000 in a table, else all]",
)
@_output_option
@_socket_option
def query(limit: int | None, output: str, socket: Path, **which: Any) -> None:
    """Show the records that match all of the options, in order of time.

    An option given more than once matches any of its values.
    """
    from netflow.client import ClientError, asking
    from netflow.output import show_flows
    from netflow.wire import Flows

    asked = _filter(**which)
    if limit is None:
        limit = 1000 if output == "table" else 0
    try:
        with asking(socket, Flows(filter=asked, limit=limit)) as answer:
            show_flows(answer, output)
    except ClientError as error:
        fail(str(error))


@main.command()
@_which
@click.option(
    "--by", type=click.Choice(["bytes", "packets", "flows"]), default="bytes", show_default=True
)
@click.option(
    "-n", "number", type=click.IntRange(0), default=10, show_default=True, help="How many; 0: all."
)
@click.option(
    "-f",
    "--follow",
    is_flag=False,
    flag_value="5s",
    default=None,
    callback=_checked(_span),
    metavar="[SPAN]",
    help="Ask again every 5s, or as said.",
)
@_output_option
@_socket_option
def top(by: str, number: int, follow: int | None, output: str, socket: Path, **which: Any) -> None:
    """Show which slices used the network most; by default in the last hour.

    "Out" is what a slice sent, "in" what was sent to it. Traffic between two
    slices counts for both, and once in the total.
    """
    from netflow.client import ClientError
    from netflow.top import show

    if follow is not None and output == "csv":
        raise click.UsageError("--follow gives tables or JSON lines, not CSV")
    if follow is not None and follow < 1_000_000_000:
        raise click.UsageError("--follow: 1s or more")
    if all(which[name] is None for name in ("since", "until", "last", "at")):
        which["last"] = 3600 * 1_000_000_000
    _filter(**which)
    try:
        show(socket, lambda: _filter(**which), by, number, follow, output)
    except ClientError as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(0 if follow is not None else 130)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
@_socket_option
def status(as_json: bool, socket: Path) -> None:
    """Say how the collector is, what it holds and what it lost."""
    from netflow.client import ClientError
    from netflow.client import status as ask
    from netflow.output import show_status

    try:
        show_status(ask(socket), as_json)
    except ClientError as error:
        fail(str(error))
