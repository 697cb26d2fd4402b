"""The scenes as tests, for the host's and the guests' test files."""

import os
import re
import time
from collections.abc import Callable

import pytest

from truth import icmp, others, page, tcp, udp
from truth.bed import Bed
from truth.play import Play
from truth.table import FAMILIES, expected

SCENES = {
    f"{module.__name__.rpartition('.')[2]} {scene.__name__}": scene
    for module in (tcp, udp, icmp, others)
    for scene in module.SCENES
}


def parametrize() -> pytest.MarkDecorator:
    """Every scene."""
    ids = [re.sub(r"\W+", "-", name) for name in SCENES]
    return pytest.mark.parametrize("scene", SCENES, ids=ids)


def check(bed: Bed, scene: str) -> None:
    """Play a scene for both families, and compare what was seen with what must be."""
    bed.played.add(scene)
    began = time.time_ns()
    four, six = (Play(bed, family) for family in FAMILIES)
    four.twin, six.twin = six, four
    for play in (four, six):
        SCENES[scene](play)
    # Asked for once: it takes as long as all the traffic of a scene.
    records = bed.records(began) if four.pending or six.pending else []
    seen = four.settle(records) | six.settle(records)
    bed.observed.update(seen)
    must = expected(bed.datapath, bed.rules, bed.lacking)
    wrong = {
        cell: f"seen {text!r}, expected {must[cell]!r}"
        for cell, text in seen.items()
        if text.split()[:2] != must[cell].split()[:2]
    }
    assert not wrong, "\n".join(f"{cell}: {what}" for cell, what in wrong.items())


def check_page(bed: Bed, record: Callable[[str, object], None]) -> None:
    """Compare all that was seen with what docs/truth.md says, and keep it for the next page."""
    if len(bed.played) < len(SCENES):
        pytest.skip("not every scene was played")
    run = page.Run(bed.kernel, bed.name, os.uname().release, bed.lacking, bed.observed)
    assert not run.missing(), f"never seen: {run.missing()}"
    record(page.PROPERTY, run.to_json())
    text = page.PAGE.read_text() if page.PAGE.exists() else ""
    different = page.differences(text, run)
    assert not different, "\n".join([*different, page.AGAIN])
