"""The collector itself: collect, status."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from netflow.cli_options import checked, fail, socket_option, span

STORE = "/var/lib/netflow"
STATE_DIR = "/var/lib/vnet"


def _age(text: str) -> int:
    return 0 if text == "0" else span(text)


def _part(text: str) -> tuple[int, float]:
    from netflow.amounts import parse_part

    return parse_part(text)


@click.command()
@click.option(
    "--store",
    type=click.Path(path_type=Path, readable=False),
    default=STORE,
    envvar="NETFLOW_STORE",
    show_default=True,
    show_envvar=True,
    help="The directory that holds the records.",
)
@click.option(
    "--node",
    metavar="NAME",
    envvar="NETFLOW_NODE",
    show_envvar=True,
    help="This node's name in its records.  [default: the host's name]",
)
@click.option(
    "--domain",
    type=click.IntRange(0, (1 << 32) - 1),
    metavar="N",
    envvar="NETFLOW_DOMAIN",
    show_envvar=True,
    help="Its observation domain.  [default: made of its name]",
)
@socket_option
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
    "--keep",
    callback=checked(_age),
    default="30d",
    show_default=True,
    metavar="SPAN",
    help="Drop records that are older; 0: never.",
)
@click.option(
    "--keep-free",
    callback=checked(_part),
    default="5%",
    show_default=True,
    metavar="AMOUNT",
    help="Drop the oldest while less of the disk is free: 5%, 2G, or 0.",
)
@click.option(
    "--active-timeout",
    callback=checked(span),
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
    node: str | None,
    domain: int | None,
    socket: Path,
    group: str | None,
    state_dir: Path,
    keep: int,
    keep_free: tuple[int, float],
    active_timeout: int,
    receive_buffer: int,
    verbose: bool,
) -> None:
    """Record the connections of this network namespace until SIGTERM or SIGINT."""
    from netflow.collect import Options, run
    from netflow.history import Keeping
    from netflow.node import this_node

    try:
        here = this_node(node, domain)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--node") from None
    if active_timeout < 1_000_000_000:
        raise click.BadParameter("at least 1s", param_hint="--active-timeout")
    sys.exit(
        run(
            Options(
                store=store,
                node=here,
                keeping=Keeping(keep, *keep_free),
                socket=socket,
                group=group,
                registry=state_dir / "registry.db",
                active_timeout=active_timeout,
                receive_buffer=receive_buffer,
                verbose=verbose,
            )
        )
    )


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
@socket_option
def status(as_json: bool, socket: Path) -> None:
    """Say how the collector is, what it holds and what it lost."""
    from netflow.client import ClientError
    from netflow.client import status as ask
    from netflow.output import show_status

    try:
        show_status(ask(socket), as_json)
    except ClientError as error:
        fail(str(error))
