"""How long a command takes to say its help: what every shell completion waits for.

``bench_start.py [--rounds N] [--json FILE]``. Python itself, and Python with the library that reads
the arguments, are measured by turns with it: they are what cannot be saved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

PYTHON = sys.executable
BIN = Path(PYTHON).parent
WAYS = {
    "python3": (PYTHON, "-c", "pass"),
    "python3, with click": (PYTHON, "-c", "import click"),
    "vnet --help": (str(BIN / "vnet"), "--help"),
    "netflow --help": (str(BIN / "netflow"), "--help"),
}


def took(words: tuple[str, ...]) -> float:
    """Milliseconds from start to end."""
    began = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - began) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rounds = [{name: took(words) for name, words in WAYS.items()} for _ in range(options.rounds)]
    ways = []
    for name in WAYS:
        ratios = (row[name] / row["python3"] for row in rounds)
        middle = statistics.median(row[name] for row in rounds)
        ways.append({"way": name, "ms": middle, "ratio": statistics.median(ratios)})
        print(f"{name:<22}{middle:>8.1f} ms{ways[-1]['ratio']:>8.2f}")
    if options.json:
        options.json.write_text(json.dumps(ways, indent=1))


if __name__ == "__main__":
    main()
