"""The outcomes for people, and for CI."""

from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from vnet.check.facts import ROLES, Outcome, Report, verdict

if TYPE_CHECKING:
    from rich.table import Table

_SIGNS = {"held": ("ok", "green"), "fell": ("FELL", "bold red"), "skipped": ("skipped", "yellow")}


def matrix(report: Report, verbose: bool) -> None:
    """Print property x who tries, then what was tried where it was not well; or all of it."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    console.print(_grid(report))
    for name in report.properties:
        worth = [o for o in report.of(name) if verbose or o.verdict != "held"]
        if worth and worth[0].verdict == "skipped":
            worth = worth[:1]  # of everybody for the same reason
        if worth:
            console.print(f"{name}", style="bold", markup=False)
        for outcome in worth:
            sign, style = _SIGNS[outcome.verdict]
            console.print(f"  {sign:7} {_line(outcome)}", style=style, markup=False, soft_wrap=True)
    console.print(_last_line(report), markup=False, soft_wrap=True)


def _grid(report: Report) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("property", *ROLES):
        table.add_column(column)
    table.add_column("attempts", justify="right")
    for name in report.properties:
        cells = []
        for role in ROLES:
            found = verdict(report.of(name, role))
            sign, style = _SIGNS[found] if found else ("", "")
            cells.append(Text(sign, style))
        table.add_row(name, *cells, str(len(report.of(name)) or "nothing to check"))
    return table


def _line(outcome: Outcome) -> str:
    who = f"{outcome.role}, IPv{outcome.family}" if outcome.family else outcome.role
    if outcome.verdict == "skipped":
        return outcome.happened
    return (
        f"{who}: {outcome.tried}\n"
        f"          expected: {outcome.expected}\n"
        f"          happened: {outcome.happened}"
    )


def _last_line(report: Report) -> str:
    what = f"data path {report.datapath}, kernel {report.kernel}, {report.seconds} s"
    count = f"{len(report.properties)} properties, {len(report.outcomes)} attempts"
    words = [f"{count} ({what}):"]
    fell, skipped = report.fallen(), report.skipped()
    if fell:
        words.append(f"{len(fell)} FELL: {', '.join(fell)}.")
    if skipped:
        allow = " ".join(f"--allow-skip {name}" for name in skipped)
        words.append(f"Skipped: {', '.join(skipped)} (if that is all right here: {allow}).")
    if report.good:
        words.append("all held.")
    return " ".join(words)


def junit(report: Report, file: Path) -> None:
    """Write JUnit's XML: one suite, a case for each cell. Raises OSError."""
    suite = ElementTree.Element("testsuite", name="vnet check", time=str(report.seconds))
    count = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for name in report.properties:
        for role in ROLES:
            outcomes = report.of(name, role)
            found = verdict(outcomes)
            if found is None:
                continue
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"vnet.check.{name}", name=role, time="0"
            )
            count["tests"] += 1
            bad = [o for o in outcomes if o.verdict == found]
            text = "\n".join(map(_line, bad))
            if found == "fell":
                count["failures"] += 1
                said = ElementTree.SubElement(case, "failure", message=f"{len(bad)} attempts")
                said.text = text
            elif found == "skipped":
                element = "skipped" if name in report.allowed_skips else "error"
                count["skipped" if element == "skipped" else "errors"] += 1
                ElementTree.SubElement(case, element, message=text)
    for key, value in count.items():
        suite.set(key, str(value))
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    ElementTree.ElementTree(suites).write(file, encoding="utf-8", xml_declaration=True)
