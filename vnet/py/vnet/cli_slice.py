"""``vnet slice``. Imports what it needs inside the command, like ``vnet.cli``."""

from collections.abc import Callable
from typing import Any

import click

from vnet.cli_common import (
    Group,
    complete_slice,
    examples,
    json_option,
    nanoseconds,
    rest_option,
)
from vnet.paths import Paths


@click.group(cls=Group, name="slice")
def slice_() -> None:
    """Add, remove and list slices."""


@examples("""
  vnet slice add web --cgroup /system.slice/nginx.service
  vnet slice add princeton_codeen --cgroup /vnet.slice/codeen --xid 512
  vnet slice add dns --cgroup /dns.slice --port udp/53 --port tcp/53
  vnet slice add probe --cgroup /probe.slice --raw own
  vnet slice add mail --cgroup /mail.slice --address 192.0.2.7 --address 2001:db8::7
  vnet slice add box --cgroup /lxc.payload.box --interface veth-box
  vnet slice add lab --cgroup /lab.slice --user alice --user 1005
""")
@slice_.command("add")
@click.argument("name")
@click.option(
    "--cgroup",
    "cgroup_paths",
    multiple=True,
    required=True,
    metavar="PATH",
    help="A cgroup, from the v2 root; it need not exist yet. May be repeated.",
)
@click.option(
    "--xid", type=click.IntRange(1, 65535), help="A fixed number; else the registry chooses."
)
@click.option(
    "--raw",
    type=click.Choice(["deny", "own", "full"]),
    default="deny",
    show_default=True,
    help="Raw sockets: none; only for its own ports and addresses; all.",
)
@click.option(
    "--port",
    "ports",
    multiple=True,
    metavar="SPEC",
    help="A reserved port: tcp/80, udp/5000-5010, tcp/[2001:db8::1]:25. May be repeated.",
)
@click.option(
    "--address",
    "addresses",
    multiple=True,
    metavar="ADDRESS",
    help="A reserved local address: nobody else uses it. May be repeated.",
)
@click.option(
    "--interface",
    "interfaces",
    multiple=True,
    metavar="NAME",
    help="The host end of its container's veth. May be repeated.",
)
@click.option(
    "--user",
    "users",
    multiple=True,
    metavar="NAME|UID",
    help="May ask netflow about this slice's flows. May be repeated.",
)
@rest_option
@json_option
@click.pass_obj
def slice_add(paths: Paths, /, name: str, rest_hours: float, as_json: bool, **asked: Any) -> None:
    """Add a slice; on a node that is up it is marked at once."""
    from vnet import node, tables

    given, is_up = node.add_slice(paths, _new_slice(paths, name, **asked), nanoseconds(rest_hours))
    tables.slice_changed("added", name, given, is_up, as_json)


def _new_slice(
    paths: Paths,
    name: str,
    cgroup_paths: tuple[str, ...],
    xid: int | None,
    raw: str,
    ports: tuple[str, ...],
    addresses: tuple[str, ...],
    interfaces: tuple[str, ...],
    users: tuple[str, ...],
) -> Any:
    import re

    from vnet import cgroups, config
    from vnet.errors import UsageError

    if not re.fullmatch(config.NAME, name):
        raise UsageError(
            f"slice {name!r}: a name is 1 to 63 of a-z 0-9 _ . - and starts with a letter or digit"
        )
    for path in cgroup_paths:
        if wrong := cgroups.problem(path):
            raise UsageError(f'--cgroup "{path}" {wrong}')
    granted = config.Grants(
        raw,  # type: ignore[arg-type]
        _each("--port", ports, config.port),
        _each("--address", addresses, config.address),
    )
    return config.Slice(
        name, tuple(cgroups.normal(path) for path in cgroup_paths), xid, granted,
        paths.config_dir / f"{name}.toml", 1, _each("--interface", interfaces, config.interface),
        _each("--user", users, lambda text: config.user(int(text) if text.isdecimal() else text)),
    )  # fmt: skip


def _each(option: str, values: tuple[str, ...], read: Callable[[str], Any]) -> tuple[Any, ...]:
    """Read every value of an option. Raises UsageError, which names it."""
    from vnet.errors import UsageError

    found = []
    for value in values:
        try:
            found.append(read(value))
        except ValueError as error:
            raise UsageError(f'{option} "{value}": {error}') from error
    return tuple(found)


@examples("""
  vnet slice rm web          its xid then rests before another slice gets it
""")
@slice_.command("rm")
@click.argument("name", shell_complete=complete_slice)
@rest_option
@json_option
@click.pass_obj
def slice_rm(paths: Paths, name: str, rest_hours: float, as_json: bool) -> None:
    """Remove a slice; its history stays."""
    from vnet import node, tables

    xid, is_up = node.remove_slice(paths, name, nanoseconds(rest_hours))
    tables.slice_changed("removed", name, xid, is_up, as_json)


@examples("""
  vnet slice ls
  vnet slice ls --json | jq '.[] | select(.cgroups | any(.id == null)) | .name'
""")
@slice_.command("ls")
@json_option
@click.pass_obj
def slice_ls(paths: Paths, as_json: bool) -> None:
    """List slices with their numbers, cgroups, grants, interfaces and users."""
    from vnet import status as looking
    from vnet import tables

    tables.slices(looking.listing(paths), as_json)


@examples("""
  vnet slice history                 every number, who held it when
  vnet slice history web             the numbers of one slice
  vnet slice history --xid 512       the holders of one number
""")
@slice_.command("history")
@click.argument("name", required=False, shell_complete=complete_slice)
@click.option("--xid", type=click.IntRange(1, 65535), help="Of this number.")
@json_option
@click.pass_obj
def slice_history(paths: Paths, name: str | None, xid: int | None, as_json: bool) -> None:
    """Say which slice held which number when (UTC)."""
    from vnet import registry, tables
    from vnet.errors import NodeError

    try:
        with registry.open_readonly(paths.registry) as known:
            rows = known.tenures(name, xid)
    except FileNotFoundError as error:
        raise NodeError(str(error)) from error
    tables.history(rows, as_json)
