"""docs/truth.md: written from what the runs have seen, and read back by them.

    python -m truth.page DIRECTORY PAGE

``truth.report`` leaves a file in the directory for each kernel and each set of rules.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from truth.table import COLUMNS, FAMILIES, REASONS, ROWS, expected, key

PAGE = Path(__file__).resolve().parents[2] / "docs" / "truth.md"
AGAIN = "`make truth-table` writes docs/truth.md anew"
PROPERTY = "truth"
"""Of the report of the test that has a whole run to tell of."""
KERNELS = ("6.1", "6.12", "host")
BLOCKS = {
    "module mangle": "The module, with all that `vnet up` installs",
    "bpf mangle": "Without the module, with all that `vnet up` installs",
    "module nat": "The module, and `-t nat -A POSTROUTING -j MARK --copy-xid` alone",
    "bpf nat": "Without the module: marks of sockets, and one stock rule in table nat",
}
_WORDS = {
    "module mangle": "Mangle INPUT and POSTROUTING, the guard, `netflow collect`.",
    "bpf mangle": "The same from stock parts and eBPF programs ([datapaths.md](datapaths.md)).",
    "module nat": "No guard and no other rule. It stamps the connections that slices start, for "
    "accounting; their later packets and what others start it does not see.",
    "bpf nat": "`-t nat -A POSTROUTING -j CONNMARK --save-mark --nfmask 0xffff --ctmask 0xffff`, "
    "with the programs that give each socket its slice's mark. Every packet of a slice's socket "
    "carries the mark from birth; the connections are stamped as with the module.",
}
_INTRODUCTION = """\
# The truth table

Written by `make truth-table` from what the tests have seen; do not edit. Every CI run plays all of
it again and fails where what it sees is not what this page says.

Slices a and b are on the node. *out*: a packet of a's as it leaves (the end of POSTROUTING); *in*:
one for a, as it arrives (the end of INPUT); *slice to slice*: over loopback, where a began and b
was asked. A cell says

- ✓ if it is as [meanings.md](meanings.md) and [datapaths.md](datapaths.md) have it, else ✗ and
  what was seen;
- whose the packet is: `a`, `b`, nobody `-`; `b>a` is b's as it is sent and a's as it is received;
  `l` is a third slice's; `^` a bit of the mark's upper half, which is somebody else's;
- whose the connection's ends are, by the flow record: `a/-` was begun by a, with nobody of this
  host at the other end; `a/-,b/-` are two records, one after the other;
- why something is nobody's, or is not there, as a letter: see [reasons](#reasons).

Kernels: Debian's 6.1 and 6.12, and the host's ({host}), which can load no module. Where they
differ, there is a line for each. Packets were read by NFLOG, behind all other rules; the records
are those of `netflow collect`."""
_HEAD = {"out": "out", "in": "in", "local": "slice to slice"}


@dataclass(frozen=True)
class Run:
    """What one run has seen."""

    kernel: str
    """One of KERNELS."""
    block: str
    """One of BLOCKS."""
    release: str
    lacking: frozenset[str]
    seen: dict[str, str]

    def must(self) -> dict[str, str]:
        """What is expected."""
        return expected(*self.block.split(), self.lacking)

    def missing(self) -> list[str]:
        """Cells that were to be played, and were not."""
        return [k for k, text in self.must().items() if text not in REASONS and k not in self.seen]

    def cell(self, name: str) -> str:
        """A cell as the page has it."""
        must, seen = self.must()[name], self.seen.get(name, "")
        if must in REASONS and not seen:
            return must
        if seen.split()[:2] == must.split()[:2]:
            return f"✓ {must}"
        return f"✗ {seen}"

    def to_json(self) -> str:
        """For ``from_json``."""
        return json.dumps({**vars(self), "lacking": sorted(self.lacking)}, indent=1, sort_keys=True)


def from_json(text: str) -> Run:
    """A run that was kept."""
    facts = json.loads(text)
    return Run(**{**facts, "lacking": frozenset(facts["lacking"])})


# -- writing -------------------------------------------------------------------------------


def write(runs: list[Run]) -> str:
    """The page."""
    return "\n".join(_page(runs)) + "\n"


def _page(runs: list[Run]) -> Iterator[str]:
    host = next((r.release for r in runs if r.kernel == "host"), "none")
    yield _INTRODUCTION.format(host=host)
    used: set[str] = set()
    for block, title in BLOCKS.items():
        of = sorted((r for r in runs if r.block == block), key=lambda r: KERNELS.index(r.kernel))
        if of:
            yield from _block(title, block, of, used)
    yield ""
    yield "## Reasons"
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield from (f"| {letter} | {text} |" for letter, text in REASONS.items() if letter in used)


def _block(title: str, block: str, runs: list[Run], used: set[str]) -> Iterator[str]:
    yield f"\n## {title}\n"
    yield _WORDS[block] + "\n"
    total = {run.kernel: sum(c.startswith("✓") for c in _cells(run)) for run in runs}
    wrong = sum(c.startswith("✗") for run in runs for c in _cells(run))
    counts = ", ".join(f"{n} on {kernel}" for kernel, n in total.items())
    yield f"Cells as expected: {counts}; others: {wrong}.\n"
    heads = [f"{_HEAD[c]} v{f}" for c in COLUMNS for f in FAMILIES]
    yield f"| {' | '.join(['packet', *heads])} |"
    yield "|---" * (1 + len(heads)) + "|"
    for group, rows in groupby(ROWS, lambda row: row.group):
        yield f"| **{group}** |" + " |" * len(heads)
        for row in rows:
            cells = [_cell(runs, key(row.name, c, f)) for c in COLUMNS for f in FAMILIES]
            used.update(text.split()[-1] for cell in cells for text in cell.split("<br>"))
            yield f"| {' | '.join([row.name, *cells])} |"


def _cells(run: Run) -> list[str]:
    return [run.cell(name) for name in run.must()]


def _cell(runs: list[Run], name: str) -> str:
    """The same on all kernels, or a line for each answer."""
    answers: dict[str, list[str]] = {}
    for run in runs:
        answers.setdefault(run.cell(name), []).append(run.kernel)
    if len(answers) == 1:
        return next(iter(answers))
    return "<br>".join(f"{', '.join(kernels)}: {text}" for text, kernels in answers.items())


# -- reading -------------------------------------------------------------------------------


def read(text: str, block: str, kernel: str) -> dict[str, str]:
    """What the page says of a kernel under some rules, by cell."""
    _, _, part = text.partition(f"\n## {BLOCKS[block]}\n")
    part = part.partition("\n## ")[0]
    names = {row.name for row in ROWS}
    places = [(column, family) for column in COLUMNS for family in FAMILIES]
    found = {}
    for line in part.splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if name not in names or len(cells) != len(places):
            continue
        for (column, family), cell in zip(places, cells, strict=True):
            found[key(name, column, family)] = _of_kernel(cell, kernel)
    return found


def _of_kernel(cell: str, kernel: str) -> str:
    """One kernel's part of a cell.

    A guest's kernel that has not been played when the page was written is
    expected to do as the other one does.
    """
    parts = re.findall(r"(?:^|<br>)([\w., ]+): ([^<]*)", cell)
    said = {name: text for names, text in parts for name in names.split(", ")}
    if not said or kernel in said:
        return said.get(kernel, cell)
    others = (name for name in said if kernel != "host" and name != "host")
    return said.get(next(others, ""), "")


def differences(text: str, run: Run) -> list[str]:
    """Where the page does not say what the run has seen."""
    said = read(text, run.block, run.kernel)
    names = sorted(said.keys() | run.must().keys())
    must = run.must()
    return [
        f"{name}: the page says {said.get(name, 'nothing')!r}, seen was {run.cell(name)!r}"
        for name in names
        if name not in must or said.get(name) != run.cell(name)
    ]


def main(directory: str, page: str) -> None:
    """Write the page, if every block has been played."""
    runs = [from_json(path.read_text()) for path in sorted(Path(directory).glob("*.json"))]
    have = {(run.block, run.kernel) for run in runs}
    wanted = {(block, kernel) for block in BLOCKS for kernel in KERNELS} - {
        ("module mangle", "host"),
        ("module nat", "host"),
    }
    if missing := wanted - have:
        print(f"not played: {sorted(missing)}", file=sys.stderr)
    Path(page).write_text(write(runs))


if __name__ == "__main__":
    main(*sys.argv[1:])
