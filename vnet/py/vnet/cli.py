"""The ``vnet`` command. Imports what a command needs inside the command."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from vnet import __version__
from vnet.cli_events import events
from vnet.errors import VnetError
from vnet.paths import BPF_DIR, CONFIG_DIR, RUN_DIR, STATE_DIR, Paths

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class _Group(click.Group):
    """Keeps the order in which commands are written; one place for our errors."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except VnetError as error:
            _fail(error)
        except OSError as error:
            _fail(VnetError(f"{error.filename or 'the system'}: {error.strerror or error}"))


def _fail(error: VnetError) -> NoReturn:
    click.echo(f"vnet: {error.message}", err=True)
    if error.cure:
        click.echo(f"  try: {error.cure}", err=True)
    sys.exit(error.exit_code)


def _examples(text: str) -> Callable[[click.Command], click.Command]:
    """Examples below a command's help, line for line."""

    def add(command: click.Command) -> click.Command:
        command.epilog = "\b\nExamples:\n" + text.strip("\n")
        return command

    return add


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vnet")
@click.option(
    "--config-dir",
    type=click.Path(path_type=Path),
    default=CONFIG_DIR,
    envvar="VNET_CONFIG_DIR",
    show_default=True,
    help="Slices, *.toml; the node's own vnet.toml lies beside it.",
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=STATE_DIR,
    envvar="VNET_STATE_DIR",
    show_default=True,
    help="The registry of xids.",
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    default=RUN_DIR,
    envvar="VNET_RUN_DIR",
    show_default=True,
    help="What is in place now.",
)
@click.option(
    "--bpf-dir",
    type=click.Path(path_type=Path),
    default=BPF_DIR,
    envvar="VNET_BPF_DIR",
    show_default=True,
    help="On a bpffs: the eBPF programs.",
)
@click.pass_context
def cli(
    ctx: click.Context, config_dir: Path, state_dir: Path, run_dir: Path, bpf_dir: Path
) -> None:
    """Mark every packet of this host with the slice that owns it.

    A slice is a tenant: one or more cgroups (v2). On this node it has a
    number, its xid. `vnet up` makes the kernel write the xid into the mark of
    every packet and connection, and refuse what one slice must not do to
    another; `netflow` then says who sent what.

    \b
    A first time:
      vnet slice add web --cgroup /system.slice/nginx.service
      vnet up
      vnet status

    Exit codes: 0 done or whole; 1 failed, or not in place; 2 bad input, and
    nothing was changed.
    """
    ctx.obj = Paths(config_dir, state_dir, run_dir, bpf_dir)


def _rest(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--rest", "rest_hours", type=click.FloatRange(min=0), default=24.0, show_default=True,
        metavar="HOURS", help="How long an xid rests before another slice may have it.",
    )(function)  # fmt: skip


def _ns(hours: float) -> int:
    return int(hours * 3600 * 10**9)


@_examples("""
  vnet up                    bring the node up, or repair what is not as asked
  vnet up --datapath bpf     mark without the kernel module
  vnet up --variant nft      put the rules into the nft tables
  vnet up --json             what was done, for a program
""")
@cli.command()
@click.option(
    "--variant",
    type=click.Choice(["auto", "legacy", "nft"]),
    default="auto",
    show_default=True,
    help="Where the rules go; auto: legacy on a host that has "
    "legacy tables already, else nft, which costs packets less.",
)
@click.option(
    "--datapath",
    type=click.Choice(["auto", "module", "bpf"]),
    default=None,
    help="What marks packets; auto: the kernel module where it can be loaded, else eBPF. "
    "Without this option vnet.toml says it.",
)
@_rest
@_as_json
@click.pass_obj
def up(paths: Paths, variant: str, datapath: str | None, rest_hours: float, as_json: bool) -> None:
    """Bring the node up: marks, guard, sysctls, rules.

    Whole or not at all: if a step fails, or the command is killed half-way,
    what it did is undone. A second `up` repairs what somebody changed, and
    changes nothing where all is as asked.
    """
    from vnet import node, tables

    outcome = node.up(
        paths,
        None if variant == "auto" else variant,  # type: ignore[arg-type]
        _ns(rest_hours),
        datapath,  # type: ignore[arg-type]
    )
    tables.outcome(
        outcome, as_json, nothing="the node is up already, all as asked", end="the node is up"
    )


@_examples("""
  vnet down
""")
@cli.command()
@_as_json
@click.pass_obj
def down(paths: Paths, as_json: bool) -> None:
    """Take away exactly what `up` put in place.

    Nobody else's rule is touched; a sysctl that was changed after us stays
    as it is; the module is unloaded only if `up` loaded it and nobody else
    uses it. The registry keeps every slice's number.
    """
    from vnet import node, tables

    tables.outcome(
        node.down(paths), as_json, nothing="nothing of ours was in place", end="the node is down"
    )


@_examples("""
  vnet status                and `echo $?`: 0 only if the node is up and whole
  vnet status --verbose      counters of each network namespace
  vnet status --json | jq .counters
""")
@cli.command()
@click.option("-v", "--verbose", is_flag=True, help="Counters of each network namespace.")
@_as_json
@click.pass_obj
def status(paths: Paths, verbose: bool, as_json: bool) -> None:
    """Say what is in place, since when, and what is not as asked."""
    from vnet import node, tables
    from vnet import status as looking

    node.require_root("status")
    found = looking.look(paths)
    tables.status(found, verbose, as_json)
    sys.exit(0 if found.whole else 1)


@_examples("""
  vnet doctor                exit code 1 if something needs curing
  vnet doctor --json
""")
@cli.command()
@_as_json
@click.pass_obj
def doctor(paths: Paths, as_json: bool) -> None:
    """Look for what would break the marks, and say the cure.

    Rules of others that write our mark bits, legacy and nft rules mixed, a
    module that cannot load, Secure Boot, connection tracking off or full,
    cgroups that do not exist, and the like.
    """
    from vnet import doctor as surgery
    from vnet import tables

    findings = surgery.examine(paths)
    tables.findings(findings, as_json)
    sys.exit(1 if any(finding.level == "problem" for finding in findings) else 0)


@_examples("""
  vnet watch                 in the foreground; vnet-watch.service runs it
""")
@cli.command()
@click.option(
    "--linger",
    "linger_minutes",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    metavar="MINUTES",
    help="How long the id of a cgroup that is gone stays in the table.",
)
@click.pass_obj
def watch(paths: Paths, linger_minutes: float) -> None:
    """Keep slices whose cgroups come and go.

    A cgroup that is removed and made again (a unit restarts) has a new id:
    it is put into the table at once. Slice files are read again when they
    change, and on SIGHUP.
    """
    from vnet import watch as watching

    watching.run(paths, linger_minutes * 60)


cli.add_command(events)


@_examples("""
  vnet guard                 enforce or observe
  vnet guard observe         refuse nothing more, report what would be refused
  vnet guard enforce
""")
@cli.command()
@click.argument("mode", type=click.Choice(["show", "enforce", "observe"]), default="show")
@_as_json
@click.pass_obj
def guard(paths: Paths, mode: str, as_json: bool) -> None:
    """Switch the guard's mode at once, for every slice.

    The switch is one store that every program in the kernel reads. No file is
    changed: the next `vnet up` goes by vnet.toml again.
    """
    from vnet import node, tables

    wanted = None if mode == "show" else mode
    tables.guard(*node.guard_mode(paths, wanted), paths.node_config, as_json)  # type: ignore[arg-type]


@cli.group(cls=_Group, name="slice")
def slice_() -> None:
    """Add, remove and list slices."""


@_examples("""
  vnet slice add web --cgroup /system.slice/nginx.service
  vnet slice add princeton_codeen --cgroup /vnet.slice/codeen --xid 512
  vnet slice add dns --cgroup /dns.slice --port udp/53 --port tcp/53
  vnet slice add probe --cgroup /probe.slice --raw own
  vnet slice add mail --cgroup /mail.slice --address 192.0.2.7 --address 2001:db8::7
  vnet slice add box --cgroup /lxc.payload.box --interface veth-box
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
@_rest
@_as_json
@click.pass_obj
def slice_add(
    paths: Paths,
    name: str,
    cgroup_paths: tuple[str, ...],
    xid: int | None,
    raw: str,
    ports: tuple[str, ...],
    addresses: tuple[str, ...],
    interfaces: tuple[str, ...],
    rest_hours: float,
    as_json: bool,
) -> None:
    """Add a slice; on a node that is up it is marked at once."""
    from vnet import node, tables

    new = _new_slice(paths, name, cgroup_paths, xid, raw, ports, addresses, interfaces)
    given, is_up = node.add_slice(paths, new, _ns(rest_hours))
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


def _complete_slice(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from vnet import config

    try:
        names = [item.name for item in config.load(ctx.find_root().params["config_dir"])]
    except (VnetError, KeyError):
        return []
    return [name for name in names if name.startswith(incomplete)]


@_examples("""
  vnet slice rm web          its xid then rests before another slice gets it
""")
@slice_.command("rm")
@click.argument("name", shell_complete=_complete_slice)
@_rest
@_as_json
@click.pass_obj
def slice_rm(paths: Paths, name: str, rest_hours: float, as_json: bool) -> None:
    """Remove a slice; its history stays."""
    from vnet import node, tables

    xid, is_up = node.remove_slice(paths, name, _ns(rest_hours))
    tables.slice_changed("removed", name, xid, is_up, as_json)


@_examples("""
  vnet slice ls
  vnet slice ls --json | jq '.[] | select(.cgroups | any(.id == null)) | .name'
""")
@slice_.command("ls")
@_as_json
@click.pass_obj
def slice_ls(paths: Paths, as_json: bool) -> None:
    """List slices with their numbers, cgroups, grants and interfaces."""
    from vnet import status as looking
    from vnet import tables

    tables.slices(looking.listing(paths), as_json)


@_examples("""
  vnet slice history                 every number, who held it when
  vnet slice history web             the numbers of one slice
  vnet slice history --xid 512       the holders of one number
""")
@slice_.command("history")
@click.argument("name", required=False, shell_complete=_complete_slice)
@click.option("--xid", type=click.IntRange(1, 65535), help="Of this number.")
@_as_json
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


@_examples("""
  vnet completion bash > /etc/bash_completion.d/vnet
  vnet completion zsh > /usr/local/share/zsh/site-functions/_vnet
  vnet completion fish > ~/.config/fish/completions/vnet.fish
""")
@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "vnet", "_VNET_COMPLETE").source())


def main() -> None:
    """The entry point."""
    cli(prog_name="vnet")


if __name__ == "__main__":
    main()
