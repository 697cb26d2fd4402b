"""What netflow's commands have in common: the options that choose records, and one way to fail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from netflow.client import Plain

F = TypeVar("F", bound=Callable[..., Any])

SOCKET = "/run/netflow/query.sock"

socket_option = click.option(
    "--socket",
    type=click.Path(path_type=Path, readable=False),
    default=SOCKET,
    envvar="NETFLOW_SOCKET",
    show_default=True,
    show_envvar=True,
    help="Where the collector answers questions.",
)
output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
)

number_option = click.option(
    "-n",
    "number",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    help="How many; 0: all, but 100,000.",
)


def fail(message: str, code: int = 1) -> NoReturn:
    """Say what went wrong, once, and exit."""
    click.echo(f"netflow: {message}", err=True)
    sys.exit(code)


def checked(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A click callback from a function that raises ValueError with a message for people."""

    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        try:
            if isinstance(value, tuple):
                return [parse(one) for one in value]
            return None if value is None else parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from None

    return callback


def moment(text: str) -> int:
    from time import time_ns

    from netflow.when import parse_time

    return parse_time(text, time_ns())


def span(text: str) -> int:
    from netflow.when import parse_span

    return parse_span(text)


def network(text: str) -> str:
    from netflow.networks import bounds

    bounds(text)
    return text


def _proto(text: str) -> int:
    from netflow.protocols import parse

    return parse(text)


_PORT = click.IntRange(0, 65535)
_WHICH = (
    click.option("--node", "nodes", multiple=True, metavar="NAME", help="This node recorded it."),
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
        callback=checked(network),
        metavar="A[/LEN]",
        help="Originator's address or network, before or after NAT.",
    ),
    click.option(
        "--dst",
        multiple=True,
        callback=checked(network),
        metavar="A[/LEN]",
        help="Responder's, likewise.",
    ),
    click.option(
        "--addr",
        multiple=True,
        callback=checked(network),
        metavar="A[/LEN]",
        help="Either one's, likewise.",
    ),
    click.option("--sport", multiple=True, type=_PORT, metavar="PORT", help="Originator's port."),
    click.option("--dport", multiple=True, type=_PORT, metavar="PORT", help="Responder's port."),
    click.option("--port", multiple=True, type=_PORT, metavar="PORT", help="Either one's port."),
    click.option(
        "--proto",
        multiple=True,
        callback=checked(_proto),
        metavar="NAME|N",
        help="tcp, udp, icmp, icmp6, sctp, ... or a number.",
    ),
    click.option(
        "--since",
        callback=checked(moment),
        metavar="T",
        help="Still going at T or later: 2026-03-01T03:12, 03:12, @1772334720, 2h (ago).",
    ),
    click.option("--until", callback=checked(moment), metavar="T", help="Begun by T."),
    click.option("--last", callback=checked(span), metavar="SPAN", help="The last 90s, 2h, 1d."),
    click.option("--at", callback=checked(moment), metavar="T", help="At T, give or take --skew."),
    click.option(
        "--skew",
        callback=checked(span),
        metavar="SPAN",
        help="How far the clocks may differ for --at.  [default: 2m]",
    ),
)


_FILTER = click.argument("words", nargs=-1, metavar="[FILTER]...")
_FILTER_HELP = """

FILTER is nfdump's grammar, and words for slices: docs/filter.md. Quote what a
shell takes for itself, such as > ( [ * and !.

\b
  netflow query slice princeton_codeen and dst port 25 --last 2h
  netflow query 'src net 192.0.2.0/24 and not (proto udp or bytes < 1k)'
  netflow query --since 03:00 'responder slice princeton_* and port in [80 443]'
"""


def which_records(command: F) -> F:
    """Add the options that choose records, and the words of a filter; the help says how."""
    for option in reversed((*_WHICH, _FILTER)):
        command = option(command)
    command.__doc__ = cleandoc(command.__doc__ or "") + _FILTER_HELP
    return command


def _expression(words: tuple[str, ...]) -> str:
    """The words as one text, once they are known to mean something; else exit 2.

    Here, before a collector is asked: a bad word needs none to be pointed at.
    """
    text = " ".join(words)
    if text.strip():
        from netflow.language import FilterError, parse

        try:
            parse(text)
        except FilterError as error:
            fail(str(error), 2)
    return text


def made_filter(last: int | None, at: int | None, skew: int | None, **fields: Any) -> Plain:
    """A netflow.wire.Filter as typed; exit 2 where the words contradict each other."""
    from time import time_ns

    from netflow.when import SECOND

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
    words = _expression(fields.pop("words"))
    said = {key: value for key, value in fields.items() if value}
    return {**said, "since": since, "until": until, "expression": words}
