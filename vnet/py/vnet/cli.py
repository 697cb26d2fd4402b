"""The ``vnet`` command. Imports what a command needs inside the command."""

import sys
from pathlib import Path

import click

from vnet import __version__
from vnet.cli_check import check
from vnet.cli_common import Group, examples, json_option, nanoseconds, rest_option
from vnet.cli_events import events
from vnet.cli_slice import slice_
from vnet.paths import BPF_DIR, CONFIG_DIR, RUN_DIR, STATE_DIR, Paths


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
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


@examples("""
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
@rest_option
@json_option
@click.pass_obj
def up(paths: Paths, variant: str, datapath: str | None, rest_hours: float, as_json: bool) -> None:
    """Bring the node up: marks, guard, sysctls, rules.

    Whole or not at all: if a step fails, or the command is killed half-way,
    what it did is undone. A second `up` repairs what somebody changed, and
    changes nothing where all is as asked.
    """
    from vnet import doctor_host, node, tables

    outcome = node.up(
        paths,
        None if variant == "auto" else variant,  # type: ignore[arg-type]
        nanoseconds(rest_hours),
        datapath,  # type: ignore[arg-type]
    )
    saved = doctor_host.saved_rules(paths)
    outcome.remarks += [f"{found.what}: see `vnet doctor`" for found in saved]
    tables.outcome(
        outcome, as_json, nothing="the node is up already, all as asked", end="the node is up"
    )


@examples("""
  vnet down
""")
@cli.command()
@json_option
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


@examples("""
  vnet status                and `echo $?`: 0 only if the node is up and whole
  vnet status --verbose      counters of each network namespace
  vnet status --json | jq .counters
""")
@cli.command()
@click.option("-v", "--verbose", is_flag=True, help="Counters of each network namespace.")
@json_option
@click.pass_obj
def status(paths: Paths, verbose: bool, as_json: bool) -> None:
    """Say what is in place, since when, and what is not as asked."""
    from vnet import node, tables
    from vnet import status as looking

    node.require_root("status")
    found = looking.look(paths)
    tables.status(found, verbose, as_json)
    sys.exit(0 if found.whole else 1)


@examples("""
  vnet doctor                exit code 1 if something needs curing
  vnet doctor --json
""")
@cli.command()
@json_option
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


@examples("""
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
    """Keep slices whose cgroups come and go, and rules that somebody flushes.

    A cgroup that is removed and made again (a unit restarts) has a new id:
    it is put into the table at once. Slice files are read again when they
    change, and on SIGHUP. Rules of ours that are gone are put back.
    """
    from vnet import watch as watching

    watching.run(paths, linger_minutes * 60)


cli.add_command(events)
cli.add_command(check)


@examples("""
  vnet guard                 enforce or observe
  vnet guard observe         refuse nothing more, report what would be refused
  vnet guard enforce
""")
@cli.command()
@click.argument("mode", type=click.Choice(["show", "enforce", "observe"]), default="show")
@json_option
@click.pass_obj
def guard(paths: Paths, mode: str, as_json: bool) -> None:
    """Switch the guard's mode at once, for every slice.

    The switch is one store that every program in the kernel reads. No file is
    changed: the next `vnet up` goes by vnet.toml again.
    """
    from vnet import node, tables

    wanted = None if mode == "show" else mode
    tables.guard(*node.guard_mode(paths, wanted), paths.node_config, as_json)  # type: ignore[arg-type]


cli.add_command(slice_)


@examples("""
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
