"""The C decoder and table under ASan and UBSan: recorded seeds, and thousands of mutations."""

import shutil
import subprocess
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parent.parent / "fuzz"
MUTATIONS = {"fuzz_decode": 1000, "fuzz_story": 100}

CLANG = next((name for name in ("clang-14", "clang") if shutil.which(name)), None)

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(CLANG is None, reason="clang is not installed (apt-get install clang-14)"),
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sanitized")
    subprocess.run(
        ["make", "-s", "-j2", "-C", FUZZ, "replay", f"OUT={out}", f"CC={CLANG}"], check=True
    )
    return out


@pytest.mark.parametrize("target", MUTATIONS)
def test_seeds_and_their_mutations_break_no_rule_and_no_bound(built, target):
    seeds = sorted((FUZZ / "seeds" / target).iterdir())
    assert seeds
    done = subprocess.run(
        [built / f"replay_{target}", str(MUTATIONS[target]), *seeds],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr[-4000:]
