"""What commands print: tables for people, JSON for programs."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table

    from vnet.findings import Finding
    from vnet.node import Outcome
    from vnet.registry import Tenure
    from vnet.status import Status


def _json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def _table(*columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column[0] == ">" else "left",
                         overflow="fold")  # fmt: skip
    return table


def _print(table: "Table") -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe has no width: never cut a path
        console = Console(highlight=False, width=200)
    console.print(table)


def rows(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> None:
    """Any table; a column that begins with > is right-justified.

    Cells are text as it is, whoever chose it: no markup in [brackets].
    """
    from rich.text import Text

    table = _table(*columns)
    for row in cells:
        table.add_row(*map(Text, row))
    _print(table)


def outcome(found: "Outcome", as_json: bool, nothing: str, end: str) -> None:
    """What ``up`` or ``down`` did."""
    if as_json:
        _json(asdict(found))
        return
    for line in found.done:
        click.echo(f"  {line}")
    for line in found.remarks:
        click.echo(f"note: {line}", err=True)
    click.echo(end if found.done else nothing)
    if found.datapath:
        click.echo(
            f"  data path {found.datapath}: {found.why}; rules in the {found.variant} tables"
        )


def guard(mode: str, configured: str, node_config: Path, as_json: bool) -> None:
    """``vnet guard``."""
    if as_json:
        _json({"mode": mode, "configured": configured})
        return
    click.echo(f"the guard is in mode {mode}")
    if mode != configured:
        click.echo(
            f"note: {node_config} says {configured}; the next `vnet up` goes by it", err=True
        )


def slice_changed(what: str, name: str, xid: int | None, is_up: bool, as_json: bool) -> None:
    """After ``slice add`` and ``slice rm``."""
    if as_json:
        _json({"name": name, "xid": xid, "applied": is_up})
        return
    number = "" if xid is None else f" (xid {xid})"
    click.echo(f"{what} slice {name}{number}" + ("" if is_up else "; the node is down: `vnet up`"))


def slices(rows: list[dict[str, Any]], as_json: bool) -> None:
    """``vnet slice ls``."""
    from vnet.registry import moment

    if as_json:
        _json(rows)
        return
    table = _table("slice", ">xid", "since", "cgroup", ">id", "raw", "only its own", "users")
    for row in rows:
        own = "\n".join([*row["ports"], *row["addresses"], *row["interfaces"]])
        rest = row["raw"], own, "\n".join(row["users"])
        for at, cgroup in enumerate(row["cgroups"]):
            head = (
                row["name"],
                str(row["xid"] or "-"),
                moment(row["since"]) if row["since"] else "-",
            )
            table.add_row(*(head if at == 0 else ("", "", "")), cgroup["path"],
                          str(cgroup["id"] or "not there"),
                          *(rest if at == 0 else ("", "", "")))  # fmt: skip
    _print(table)


def history(rows: "list[Tenure]", as_json: bool) -> None:
    """``vnet slice history``."""
    from vnet.registry import moment

    if as_json:
        _json([asdict(row) for row in rows])
        return
    table = _table(">xid", "slice", "since", "until")
    for row in rows:
        table.add_row(str(row.xid), row.slice, moment(row.since),
                      "now" if row.until is None else moment(row.until))  # fmt: skip
    _print(table)


#: What each counter means to a reader; the names are the kernel header's.
_REASONS = {
    "out-socket": "sent by a slice, by its socket",
    "out-conn": "sent by a slice, by its connection",
    "in-socket": "received by a slice, by its socket",
    "in-lookup": "received by a slice, by its socket (looked up)",
    "in-conn": "received by a slice, by its connection",
    "through-interface": "sent by a slice's container",
    "through-conn": "on its way to a slice's container, by its connection",
    "node-socket": "the node's own: a socket outside every slice",
    "no-socket": "nobody's: no socket, and no owner on the connection",
    "no-conntrack": "nobody's: neither a socket nor a connection",
    "other-netns": "nobody's: the socket is another namespace's",
    "forwarded": "passed through: of no slice",
    "filled": "connections that got an owner",
    "conflict": "connections that changed owner",
    "intrusion": "raw packets into another slice's connection",
}


def status(found: "Status", verbose: bool, as_json: bool) -> None:
    """``vnet status``."""
    from vnet.registry import moment
    from vnet.status import age

    if as_json:
        _json(found.as_dict())
        return
    if found.up and found.since is not None:
        click.echo(f"up since {moment(found.since)} ({age(found.since)})")
        click.echo(f"  path     {found.datapath}: {found.why}")
    else:
        click.echo("the node is down")
    if found.guard:
        configured = ""
        if found.guard != found.guard_configured:
            configured = f" (vnet.toml: {found.guard_configured}, from the next `vnet up` on)"
        partial = (
            "" if found.packet_sockets == "guarded" else "; partial: packet sockets are not refused"
        )
        click.echo(f"  guard    {found.guard}{configured}, {found.reserved_ports} ports and "
                   f"{found.reserved_addresses} addresses reserved{partial}")  # fmt: skip
    if found.module or found.datapath == "module":
        users = f", used by {found.module_users} rules" if found.module else ""
        click.echo(f"  module   {'loaded' if found.module else 'not loaded'}{users}")
    lingering = f", {found.lingering} of cgroups that are gone" if found.lingering else ""
    click.echo(f"  slices   {found.slices}, {found.cgroups_present} of {found.cgroups} cgroups "
               f"present; {found.entries} entries in the table{lingering}")  # fmt: skip
    if found.interfaces_missing:
        click.echo(f"  veths    not there yet: {', '.join(found.interfaces_missing)}")
    short = ", ".join(f"{key.rsplit('.', 1)[1]} = {value}" for key, value in found.sysctls.items())
    click.echo(f"  sysctls  {short}")
    if found.rules:
        places = ", ".join(f"{family} {'in place' if ok else 'NOT as asked'}"
                           for family, ok in found.rules.items())  # fmt: skip
        click.echo(f"  rules    {places}, in the {found.variant} tables")
    for line in found.differences:
        click.echo(f"  NOT as asked: {line}")
    for line in found.known_differences:
        click.echo(f"  of this data path: {line}")
    if found.refusals:
        rows(
            ["slice", "kind", ">refused", ">observed", ">without an event"],
            [
                (count["slice"] or f"xid {count['xid']}", count["kind"],
                 *(f"{count[key]:,}" for key in ("refused", "observed", "suppressed")))
                for count in found.refusals
            ],
        )  # fmt: skip
    if any(found.counters.values()):
        table = _table(">packets", "counter", "meaning")
        for name, number in found.counters.items():
            table.add_row(f"{number:,}", name, _REASONS.get(name, ""))
        _print(table)
    if verbose and found.namespaces:
        table = _table("network namespace", "counter", ">packets")
        for space in found.namespaces:
            for name, number in space["counters"].items():
                if number:
                    table.add_row(f"net:[{space['netns']}]", name, f"{number:,}")
        _print(table)


def findings(found: "list[Finding]", as_json: bool) -> None:
    """``vnet doctor``."""
    if as_json:
        _json([asdict(finding) for finding in found])
        return
    for finding in found:
        click.secho(f"{finding.level}: {finding.what}",
                    fg="red" if finding.level == "problem" else "yellow", bold=True)  # fmt: skip
        click.echo(f"  why:  {finding.why}\n  cure: {finding.cure}")
    if not found:
        click.echo("nothing found that would break the marks")
