"""What the modules of the ``vnet`` command share."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from vnet.errors import VnetError

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Group(click.Group):
    """Keeps the order in which commands are written; one place for our errors."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except VnetError as error:
            fail(error)
        except OSError as error:
            fail(VnetError(f"{error.filename or 'the system'}: {error.strerror or error}"))


def fail(error: VnetError) -> NoReturn:
    """Say it, and end with its exit code."""
    click.echo(f"vnet: {error.message}", err=True)
    if error.cure:
        click.echo(f"  try: {error.cure}", err=True)
    sys.exit(error.exit_code)


def examples(text: str) -> Callable[[click.Command], click.Command]:
    """Examples below a command's help, line for line."""

    def add(command: click.Command) -> click.Command:
        command.epilog = "\b\nExamples:\n" + text.strip("\n")
        return command

    return add


def rest_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--rest HOURS``, as rest_hours."""
    return click.option(
        "--rest", "rest_hours", type=click.FloatRange(min=0), default=24.0, show_default=True,
        metavar="HOURS", help="How long an xid rests before another slice may have it.",
    )(function)  # fmt: skip


def nanoseconds(hours: float) -> int:
    """Hours as ns."""
    return int(hours * 3600 * 10**9)


def complete_slice(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of slices, for the shell."""
    from vnet import config

    try:
        names = [item.name for item in config.load(ctx.find_root().params["config_dir"])]
    except (VnetError, KeyError):
        return []
    return [name for name in names if name.startswith(incomplete)]
