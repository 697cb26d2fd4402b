"""The commands that give to other programs: metrics, serve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from netflow.cli_options import checked, fail, socket_option

if TYPE_CHECKING:
    from netflow.metrics import Source

SOCKET = "/run/netflow-serve/http.sock"

F = TypeVar("F", bound=Callable[..., Any])

_FOR_METRICS = (
    click.option(
        "--run-dir",
        type=click.Path(path_type=Path, file_okay=False, readable=False),
        default="/run/vnet",
        envvar="VNET_RUN_DIR",
        show_default=True,
        show_envvar=True,
        help="Where vnet says what is up, for the guard's counters.",
    ),
    click.option(
        "--state-dir",
        type=click.Path(path_type=Path, file_okay=False, readable=False),
        default="/var/lib/vnet",
        envvar="VNET_STATE_DIR",
        show_default=True,
        show_envvar=True,
        help="Where vnet's registry of names is, for theirs.",
    ),
    click.option(
        "--export-dir",
        type=click.Path(path_type=Path, file_okay=False, readable=False),
        default="/var/lib/netflow-export",
        envvar="NETFLOW_EXPORT_DIR",
        show_default=True,
        show_envvar=True,
        help="Where netflow export keeps its positions, for their counts.",
    ),
)


def _for_metrics(command: F) -> F:
    for option in reversed(_FOR_METRICS):
        command = option(command)
    return command


def _source(socket: Path, run_dir: Path, state_dir: Path, export_dir: Path) -> Source:
    from netflow.metrics import Source

    return Source(socket, run_dir, state_dir, export_dir)


@click.command()
@click.option(
    "--write",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Replace this file by them, whole: for node_exporter's textfile collector.",
)
@_for_metrics
@socket_option
def metrics(
    file: Path | None, socket: Path, run_dir: Path, state_dir: Path, export_dir: Path
) -> None:
    """Print metrics in Prometheus' text format.

    Without a collector netflow_up is 0, and most others are missing.
    """
    from netflow.client import ClientError
    from netflow.metrics import text

    try:
        said = text(_source(socket, run_dir, state_dir, export_dir))
    except ClientError as error:
        fail(str(error))
    if file is None:
        click.echo(said, nl=False)
        return
    new = file.with_name(f".{file.name}.new")
    try:
        new.touch()
        if file.exists():
            new.chmod(file.stat().st_mode & 0o777)
        new.write_bytes(said)
        new.replace(file)
    except OSError as error:
        new.unlink(missing_ok=True)
        fail(f"cannot write {file}: {error.strerror}")


def _address(text: str) -> tuple[str, int]:
    """ADDR:PORT, an IPv6 address in brackets. Raises ValueError."""
    from ipaddress import ip_address

    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host[:1] + host[-1:] == "[]" else host
    try:
        address = ip_address(bare)
        if (address.version == 6) == (bare == host) or not 0 < int(port) < 65536:
            raise ValueError
    except ValueError:
        raise ValueError(f"{text!r} is not ADDR:PORT: write 127.0.0.1:9477 or [::1]:9477") from None
    return str(address), int(port)


@click.command()
@click.option(
    "--http-socket",
    type=click.Path(path_type=Path, readable=False),
    default=SOCKET,
    envvar="NETFLOW_HTTP_SOCKET",
    show_default=True,
    show_envvar=True,
    help="The unix socket to listen on; anybody may connect.",
)
@click.option(
    "--listen",
    callback=checked(_address),
    metavar="ADDR:PORT",
    help="Listen there too, for who has the token. It is not encrypted.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="For --listen: the token, in a file that only its owner can read.",
)
@click.option(
    "--listen-metrics",
    callback=checked(_address),
    metavar="ADDR:PORT",
    help="Give metrics there, to anybody, and nothing else.",
)
@_for_metrics
@socket_option
def serve(
    http_socket: Path,
    listen: tuple[str, int] | None,
    token_file: Path | None,
    listen_metrics: tuple[str, int] | None,
    socket: Path,
    run_dir: Path,
    state_dir: Path,
    export_dir: Path,
) -> None:
    """Answer questions over HTTP, on a unix socket, until SIGTERM or SIGINT.

    A process of its own beside the collector, as root: it passes on who asks,
    and the collector decides what that may see. No other address is listened
    on unless asked for.

    \b
    Examples:
      netflow serve
      curl --unix-socket /run/netflow-serve/http.sock http://netflow/v1/top?last=2h
      netflow serve --listen-metrics 127.0.0.1:9477
    """
    import sys

    if (listen is None) != (token_file is None):
        raise click.UsageError("--listen and --token-file go together")
    try:
        from netflow.serve.listen import Options, run
    except ModuleNotFoundError as error:
        fail(
            f"netflow serve needs {error.name}, which is not installed: "
            "pip install 'vnet[serve]' into netflow's environment"
        )
    options = Options(
        _source(socket, run_dir, state_dir, export_dir),
        http_socket,
        listen,
        token_file,
        listen_metrics,
    )
    sys.exit(run(options))
