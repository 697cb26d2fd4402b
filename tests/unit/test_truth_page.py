"""docs/truth.md says what was seen, and tells where something else is seen."""

from dataclasses import replace

import pytest
from truth import page
from truth.table import COLUMNS, FAMILIES, REASONS, ROWS, key

pytestmark = pytest.mark.unit
CELL = key("SYN", "in", 6)


def seen_as_expected(kernel: str, block: str, lacking: frozenset[str] = frozenset()) -> page.Run:
    """A run that has seen what it must."""
    run = page.Run(kernel, block, "1.2.3", lacking, {})
    return replace(run, seen={k: v for k, v in run.must().items() if v not in REASONS})


RUNS = [
    seen_as_expected("host", "bpf mangle", frozenset({"sctp", "gre"})),
    seen_as_expected("6.1", "bpf mangle"),
    seen_as_expected("6.1", "module nat"),
]


def test_what_is_written_is_read_back():
    text = page.write(RUNS)
    for run in RUNS:
        assert page.differences(text, page.from_json(run.to_json())) == []
        assert run.missing() == []


def test_a_cell_that_is_seen_otherwise_is_named():
    text = page.write(RUNS)
    other = replace(RUNS[1], seen=RUNS[1].seen | {CELL: "- -/a"})
    assert page.differences(text, other) == [f"{CELL}: the page says '✓ a -/a', seen was '✗ - -/a'"]
    assert "6.1: ✗ - -/a<br>host: ✓ a -/a" in page.write([RUNS[0], other])


def test_a_cell_that_is_not_played_is_missing():
    less = {k: v for k, v in RUNS[1].seen.items() if k != CELL}
    assert replace(RUNS[1], seen=less).missing() == [CELL]


def test_every_row_has_a_name_of_its_own_and_every_reason_is_explained():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    for block in page.BLOCKS:
        for text in page.Run("6.1", block, "", frozenset(), {}).must().values():
            assert text in REASONS or len(text.split()) == 2 or text.split()[2] in REASONS, text


@pytest.mark.parametrize("block", page.BLOCKS)
def test_the_page_has_every_cell_of_every_kernel(block: str):
    text = page.PAGE.read_text()
    for kernel in page.KERNELS[: 2 if block.startswith("module") else 3]:
        said = page.read(text, block, kernel)
        cells = {key(row.name, c, f) for row in ROWS for c in COLUMNS for f in FAMILIES}
        assert said.keys() == cells
        wrong = {name: cell for name, cell in said.items() if not (cell and "✗" not in cell)}
        assert not wrong, page.AGAIN
