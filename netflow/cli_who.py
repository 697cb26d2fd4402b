"""``netflow who``: the abuse desk's question. On its own: nothing else is imported to answer it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from netflow.cli_options import checked, made_filter, number_option, socket_option, which_records
from netflow.cli_output import answer_options, ask, last_hour, split


def _end(text: str) -> tuple[str, int | None]:
    """An address (or a network), perhaps with a port. Raises ValueError."""
    from netflow.networks import bounds

    address, port = text, ""
    if text.startswith("["):
        address, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"{text!r}: write [2001:db8::1]:443")
        port = rest[1:]
        if rest == ":":
            raise ValueError(f"{text!r} has no port after the colon")
    elif text.count(":") == 1:
        address, _, port = text.partition(":")
        if not port:
            raise ValueError(f"{text!r} has no port after the colon")
    if address:
        bounds(address)
    if not port:
        return address, None
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{port!r} is not a port: 0 to 65535")
    return address, int(port)


@click.command()
@click.option(
    "--to",
    "peer",
    callback=checked(_end),
    metavar="ADDR[:PORT]",
    help="The other end, before or after NAT: 198.51.100.7:80, [2001:db8::7]:80, a network.",
)
@click.option(
    "--from",
    "own",
    callback=checked(_end),
    metavar="ADDR[:PORT]",
    help="Our end, likewise; :PORT for a port only.",
)
@which_records
@number_option
@answer_options
@socket_option
def who(
    peer: tuple[str, int | None] | None,
    own: tuple[str, int | None] | None,
    number: int,
    socket: Path,
    **rest: Any,
) -> None:
    """Say which slice had to do with an address and port at a time.

    What fits best comes first: nearest to --at, then by how sure its owner is.
    OWNER BY says how: socket (its sockets marked the connection), connection
    (known by the connection's mark only), changed (it had another owner, too),
    none (WHY says why).

    \b
    Examples:
      netflow who --to 198.51.100.7:80 --at 2026-03-01T03:12Z
      netflow who --to 198.51.100.7 --from 192.0.2.1:40212 --at 03:12 --skew 10m
    """
    from netflow.shapes import WHO

    how, which = split(rest)
    if peer is None and own is None:
        raise click.UsageError("who sent to whom? give --to, or --from, or both")
    if not (
        (peer and (peer[0] or peer[1] is not None)) or (own and (own[0] or own[1] is not None))
    ):
        raise click.UsageError("--to and --from: an address, a port, or both")
    last_hour(which)
    at = which["at"]
    asked = made_filter(**which)
    to, port = peer or ("", None)
    own_address, own_port = own or ("", None)
    question = {
        "type": "who",
        "filter": asked,
        "peer": to,
        "peer_port": port,
        "own": own_address,
        "own_port": own_port,
        "at": at,
        "limit": number,
    }
    ask(socket, question, WHO, **how)
