"""``vnet check`` on a node of its own, as CI uses it."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from vnet.check.run import PROPERTIES
from vnet.testing import cgroup, names
from vnet.testing.poll import until

from vnet import bpf

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(bool(bpf.lacking()), reason="this kernel cannot run the eBPF programs"),
]
#: what this kernel cannot be asked for
SKIPPED = ["packet-sockets"] if bpf.lsm_lacking() else []
ALLOWED = [word for name in SKIPPED for word in ("--allow-skip", name)]


def check(*words: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [sys.executable, "-m", "vnet.cli", "check", *words], capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def leftovers() -> list[str]:
    """What checkers have left on this machine, of whatever process."""
    found = [str(path) for path in Path("/run").glob(f"{names.PREFIX}*check*")]
    found += [p.name for p in Path("/run/netns").glob(f"{names.PREFIX}*")]
    return found + [str(path) for path in cgroup.root().glob(f"{names.PREFIX}*")]


def of(pid: int) -> list[str]:
    return [name for name in leftovers() if f"{names.PREFIX}{pid}" in name]


def test_on_a_whole_node_every_property_holds_and_nothing_is_left(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "vnet.cli", "check", "--json", *ALLOWED,
         "--junit", tmp_path / "report.xml"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert of(process.pid) == []
    found = json.loads(out)
    assert (found["good"], found["fell"], found["skipped"]) == (True, [], [])
    assert found["properties"] == [each.name for each in PROPERTIES]
    assert found["datapath"] == "bpf"
    for each in PROPERTIES:
        made = [o for o in found["outcomes"] if o["property"] == each.name]
        if each.name in SKIPPED:
            assert {o["verdict"] for o in made} == {"skipped"}
        elif not each.where:
            assert made, each.name
    # one case for each cell of the matrix
    [suite] = ElementTree.parse(tmp_path / "report.xml").getroot()
    cells = {(o["property"], o["role"]) for o in found["outcomes"]}
    cases = {(c.get("classname").removeprefix("vnet.check."), c.get("name")) for c in suite}
    assert cases == cells
    assert (suite.get("failures"), suite.get("tests")) == ("0", str(len(cells)))


def test_what_cannot_be_checked_here_fails_unless_it_is_allowed_by_name():
    if not SKIPPED:
        pytest.skip("this kernel has all there is")
    done = check("packet-sockets", code=1)
    assert "--allow-skip packet-sockets" in done.stdout
    check("packet-sockets", *ALLOWED)


def test_one_property_alone_and_each_attempt_if_asked():
    done = check("raw-deny", "-v")
    assert "1 properties" in done.stdout
    assert re.search(r"ok +deny, IPv6: raw socket of protocol tcp", done.stdout)
    assert "socket: EACCES" in done.stdout


@pytest.mark.parametrize(
    "words",
    [("nonsense",), ("--allow-skip", "nonsense"), ("--live", "--datapath", "bpf"),
     ("--datapath", "module"), ("--datapath", "fast")],
)  # fmt: skip
def test_bad_words_are_told_before_anything_is_made(words):
    done = check(*words, code=2)
    assert done.stderr


def test_the_list_names_every_property_with_a_sentence():
    found = json.loads(check("--list", "--json").stdout)
    assert list(found) == [each.name for each in PROPERTIES]
    assert all(why.endswith(".") for why in found.values())
    assert len(set(found.values())) == len(found)


def test_what_a_killed_checker_left_is_taken_away_by_the_next():
    process = subprocess.Popen(
        [sys.executable, "-m", "vnet.cli", "check"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: any("node" in name for name in of(process.pid)), what="a sandbox")
    until(lambda: cgroup.root().joinpath(f"{names.PREFIX}{process.pid}", "deny").exists())
    process.kill()
    process.wait()
    assert of(process.pid)
    check("raw-deny")
    assert of(process.pid) == []


def test_a_checker_that_is_asked_to_stop_leaves_nothing():
    process = subprocess.Popen(
        [sys.executable, "-m", "vnet.cli", "check"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: cgroup.root().joinpath(f"{names.PREFIX}{process.pid}", "deny").exists())
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) != 0
    assert of(process.pid) == []
