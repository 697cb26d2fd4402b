"""The ``netflow`` command. A command's module is imported when it is asked for, nothing before."""

from __future__ import annotations

import gc
from importlib import import_module

# What is imported stays: to look through it for garbage takes 3 ms of a question's 90.
gc.disable()
import click  # noqa: E402

gc.enable()

_COMMANDS = {
    "collect": "netflow.cli_collect",
    "coverage": "netflow.cli_questions",
    "export": "netflow.cli_export",
    "history": "netflow.cli_ask",
    "import": "netflow.cli_ask",
    "metrics": "netflow.cli_serve",
    "query": "netflow.cli_ask",
    "report": "netflow.cli_questions",
    "scans": "netflow.cli_questions",
    "series": "netflow.cli_questions",
    "serve": "netflow.cli_serve",
    "spoofed": "netflow.cli_questions",
    "status": "netflow.cli_collect",
    "top": "netflow.cli_ask",
    "who": "netflow.cli_who",
}


class _Group(click.Group):
    """Finds a command in its module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        name = "import_" if cmd_name == "import" else cmd_name
        gc.disable()
        try:
            found: click.Command = getattr(import_module(_COMMANDS[cmd_name]), name)
        finally:
            gc.enable()
        return found


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="vnet")
def main() -> None:
    """Who sent what, to whom, when: flow records of a host that slices share."""
