"""How commands that ask take the form of their answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from netflow.cli_options import fail

if TYPE_CHECKING:
    from netflow.client import Plain
    from netflow.shapes import Shape

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json", "ndjson", "csv", "parquet"]),
        default="table",
        show_default=True,
    ),
    click.option(
        "-O",
        "--to-file",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Write the answer there, not to stdout.",
    ),
    click.option("--no-pager", is_flag=True, help="Long tables do not go through $PAGER."),
)


def answer_options(command: F) -> F:
    """Add -o, -O and --no-pager."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def ask(
    socket: Path,
    request: Plain,
    shape: Shape,
    output: str,
    to_file: Path | None,
    no_pager: bool,
) -> None:
    """Ask and show; one line on stderr and exit 1 where that fails."""
    from netflow.client import ClientError
    from netflow.show import How, ShowError, show

    try:
        show(socket, request, shape, How(output, to_file, not no_pager))
    except ShowError as error:
        fail(str(error), 2)
    except ClientError as error:
        fail(str(error))
    except BrokenPipeError:
        _quiet_stdout()
        fail("nobody reads the answer any more")
    except OSError as error:
        fail(f"cannot write {to_file or 'the answer'}: {error.strerror}")


def _quiet_stdout() -> None:
    """What is still buffered for a reader that went away must not fail again at exit."""
    import os
    import sys

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def split(words: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a command was given: the form of the answer (for ask), and which records."""
    form = {name: words.pop(name) for name in ("output", "to_file", "no_pager")}
    return form, words


def last_hour(which: dict[str, Any]) -> None:
    """Where no time is given, the last hour is meant."""
    if all(which[name] is None for name in ("since", "until", "last", "at")):
        which["last"] = 3600 * 1_000_000_000
