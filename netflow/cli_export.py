"""``netflow export``: records to other people's collectors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click

from netflow.cli_options import checked, socket_option, span

PLACE = "/var/lib/netflow-export"


@click.command("export")
@click.option("--to", required=True, metavar="HOST[:PORT]", help="The receiver.  [port: 4739]")
@click.option("--transport", type=click.Choice(["udp", "tcp"]), default="udp", show_default=True)
@click.option(
    "--begin",
    type=click.Choice(["now", "oldest"]),
    default="now",
    show_default=True,
    help="Where to begin the first time; later it goes on where it was.",
)
@click.option("--once", is_flag=True, help="End once all records that there are have been sent.")
@click.option(
    "--position",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help=f"Keeps how far it is.  [default: {PLACE}/HOST-PORT-TRANSPORT]",
)
@click.option(
    "--message-size",
    type=click.IntRange(512, 65535),
    metavar="BYTES",
    help="The most of a message.  [default: 1400 over UDP, 65535 over TCP]",
)
@click.option(
    "--template-interval",
    callback=checked(span),
    default="60s",
    show_default=True,
    metavar="SPAN",
    help="Over UDP templates and names are sent so often,",
)
@click.option(
    "--template-messages",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    metavar="N",
    help="and after so many messages.",
)
@click.option(
    "--pen",
    type=click.IntRange(1, (1 << 32) - 1),
    default=32473,
    show_default=True,
    metavar="N",
    help="The private enterprise number of xids' elements.",
)
@click.option("--vrf", is_flag=True, help="Xids as ingressVRFID and egressVRFID too.")
@click.option("--uniflow", is_flag=True, help="A record for each direction, instead of biflows.")
@click.option(
    "--rate",
    type=click.IntRange(0),
    metavar="N",
    help="The most records in a second; 0: no bound.  [default: 20000 over UDP, 100000 over TCP]",
)
@socket_option
def export(
    to: str,
    transport: Literal["udp", "tcp"],
    begin: Literal["now", "oldest"],
    once: bool,
    position: Path | None,
    message_size: int | None,
    template_interval: int,
    template_messages: int,
    pen: int,
    vrf: bool,
    uniflow: bool,
    rate: int | None,
    socket: Path,
) -> None:
    """Send records to a collector of IPFIX as they are stored, until SIGTERM or SIGINT.

    Goes on where it stopped, whatever ended it. Over TCP a receiver that was
    away gets what it missed; over UDP nobody knows what arrives.
    """
    from netflow.ipfix.elements import Shape
    from netflow.ipfix.export import Options, run
    from netflow.ipfix.transport import parse_target
    from netflow.when import SECOND

    try:
        target = parse_target(to, transport)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--to") from None
    sys.exit(
        run(
            Options(
                to=target,
                socket=socket,
                position=position or Path(PLACE) / f"{target.host}-{target.port}-{transport}",
                begin=begin,
                once=once,
                shape=Shape(pen, vrf, uniflow),
                size=message_size or (1400 if transport == "udp" else 65535),
                again_after=template_interval / SECOND,
                again_every=template_messages,
                rate=(20_000 if transport == "udp" else 100_000) if rate is None else rate,
            )
        )
    )
