"""The command before it asks anything, names, and what people are shown."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from netflow import cli, client, metrics, names, output, protocols, questions, shapes, show, top
from netflow.wire import Gap, Header, Trailer
from vnet import refusals, registry, state

pytestmark = pytest.mark.unit

HEAVY = {
    "duckdb",
    "matplotlib",
    "numpy",
    "rich",
    "msgspec",
    "sqlite3",
    "pyroute2",
    "iptc",
    "scapy",
    "netflow.ct",
}


def test_the_command_line_loads_nothing_heavy():
    code = "import sys, netflow.cli; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not HEAVY & set(loaded)


def test_asking_who_loads_nothing_but_what_it_takes():
    code = (
        "import sys; from netflow.cli import main\n"
        "try: main(['who', '--to', '192.0.2.1:80', '--at', '03:00', '--socket', '/nonexistent'])\n"
        "finally: print(*sys.modules)"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "no collector answers" in done.stderr
    loaded = set(done.stdout.split())
    assert "netflow.show" in loaded
    assert not (HEAVY | {"csv", "lark", "netflow.cli_ask", "netflow.wire"}) & loaded


def test_every_command_is_in_the_help_and_found_by_its_name():
    context = click.Context(cli.main)
    listed = cli.main.list_commands(context)
    assert listed == sorted(listed)
    assert len(listed) == 15
    for name in listed:
        assert cli.main.get_command(context, name).name == name
    said = CliRunner().invoke(cli.main, ["--help"]).output
    assert re.findall(r"^  ([a-z]+)  ", said, re.M) == listed


@pytest.mark.parametrize("command", ["collect", "who", "query", "top", "scans", "report", "status"])
def test_each_command_has_help(command):
    done = subprocess.run(
        [sys.executable, "-m", "netflow", command, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--socket" in done.stdout


def flow_row(**given):
    row = dict.fromkeys(questions.FLOW_COLUMNS, 0)
    row |= {"proto": 6, "src": "10.0.0.1", "dst": "10.0.0.2", "sport": 1000, "dport": 80}
    row |= {"nsrc": "10.0.0.1", "ndst": "10.0.0.2", "nsport": 1000, "ndport": 80, "reason": 2}
    row |= {"oslice": None, "rslice": None} | given
    assert list(row) == list(questions.FLOW_COLUMNS)
    return output.record(list(row), list(row.values()))


def test_a_record_says_nat_only_where_there_was_some():
    assert flow_row()["nat"] is None
    assert flow_row(nsport=1)["nat"] == {
        "src": "10.0.0.1", "dst": "10.0.0.2", "sport": 1, "dport": 80
    }  # fmt: skip
    assert flow_row(proto=1, ndst="10.9.9.9")["nat"] == {"src": "10.0.0.1", "dst": "10.9.9.9"}


def test_an_icmp_record_has_type_code_and_id_in_place_of_ports():
    made = flow_row(proto=58, dport=128 << 8 | 1, sport=77)
    assert made["icmp"] == {"type": 128, "code": 1, "id": 77}
    assert "sport" not in made
    assert made["proto"] == "icmp6"
    assert made["tcp_state"] is None


def test_a_record_is_json_and_says_why_it_was_closed():
    made = flow_row(reason=4, tcp_state=3, oxid=7, oslice="a", opackets=2**64 - 1)
    assert json.loads(json.dumps(made)) == made
    assert (made["reason"], made["tcp_state"]) == ("owner", "established")
    assert made["originator"] == {"xid": 7, "slice": "a", "packets": 2**64 - 1, "bytes": 0}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0k"), (99_949, "99.9k"), (99_950, "100k"),
     (999_499, "999k"), (999_500, "1.0M"), (2**64, "18.4E")],
)  # fmt: skip
def test_bytes_for_people(count, text):
    assert output.amount(count) == text


def test_each_kind_of_gap_has_its_own_words():
    kinds = ("before-first", "not-running", "overrun", "unreadable")
    words = {output.gap_text(Gap(since=0, until=10**9, what=kind, events=9)) for kind in kinds}
    assert len(words) >= 3
    assert any("about 9 events lost" in text for text in words)


def test_who_follows_is_told_each_gap_once_and_a_new_one_alone(monkeypatch, capsys):
    first = {"since": 0, "until": 10**9, "what": "before-first"}
    second = {"since": 20 * 10**9, "until": 30 * 10**9, "what": "overrun", "events": 9}
    header = {"columns": ["slice"], "since": 10**9, "until": 40 * 10**9, "as_of": 40 * 10**9}
    answers = iter([[first], [first], [first, second], [first, second]])

    @contextmanager
    def asking(*_):
        try:
            lines = [header | {"gaps": next(answers)}, {"rows": 0}]
        except StopIteration:
            raise KeyboardInterrupt from None
        yield client.Answer(f"{json.dumps(line)}\n".encode() for line in lines)

    monkeypatch.setattr(top, "asking", asking)
    with pytest.raises(KeyboardInterrupt):
        top.show(Path(), lambda: None, shapes.SCANS, 1, "table")
    once, later = capsys.readouterr().err.splitlines()
    assert "nothing was collected yet" in once and "1 gap touches" in once
    assert "about 9 events lost" in later and "1 gap touches" in later


def test_protocols_have_names_both_ways():
    assert {protocols.parse(protocols.name(n)) for n in range(256)} == set(range(256))
    assert protocols.parse("ICMPv6") == 58
    for bad in ("", "tpc", "256", "-1", "²"):
        with pytest.raises(ValueError, match="not a protocol"):
            protocols.parse(bad)


def held(known, now):
    params = names.tenures(known, now)
    return list(zip(params["t_slice"], params["t_xid"], strict=True))


def test_the_registry_is_read_again_when_it_appears_and_when_it_changes(tmp_path):
    path = tmp_path / "registry.db"
    known = names.Names(path)
    now = time.time_ns()
    assert held(known, now) == []
    registry.assign(path, [registry.Request("a", 300)], now_ns=1)
    os.utime(path, ns=(1, 1))  # long ago: what is read then need not be read again
    assert held(known, now) == [("a", 300)]
    assert held(known, now) == [("a", 300)]
    registry.assign(path, [registry.Request("a", 300), registry.Request("b", 301)], now_ns=2)
    assert held(known, now) == [("a", 300), ("b", 301)]


def test_a_registry_that_could_not_be_read_for_a_moment_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "registry.db"
    registry.assign(path, [registry.Request("a", 300)], now_ns=1)
    os.utime(path, ns=(1, 1))
    known, now = names.Names(path), time.time_ns()

    def fails(_path):
        raise OSError("Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(names, "open_readonly", fails)
        assert held(known, now) == held(known, now) == []
    assert held(known, now) == [("a", 300)]


def test_a_broken_registry_names_nothing(tmp_path):
    path = tmp_path / "registry.db"
    path.write_bytes(b"not a database" * 100)
    assert held(names.Names(path), 0) == []


def test_a_name_cannot_drive_the_terminal(capsys):
    columns = list(shapes.top("slice", False).columns)
    row = ["a\x1b]0;owned\x07\u202eb", 7, 1, 2, 3, 4, 5]
    header = Header(columns=columns, since=0, until=1, as_of=1, gaps=[])
    total = Trailer(rows=1, total={"bytes": 3, "packets": 7, "flows": 5})
    made = dict(zip(columns, row, strict=True))
    output.print_table(shapes.top("slice", False).table(header, [made], total))
    assert "a?]0;owned??b" in capsys.readouterr().out
    gap = Gap(since=0, until=10**9, what="overrun", note="\x1b[2J")
    assert "?[2J" in output.gap_text(gap)


def test_a_file_keeps_its_mode_and_a_new_one_is_not_for_others(tmp_path, monkeypatch):
    def mode(file):
        return file.stat().st_mode & 0o777

    monkeypatch.setattr(metrics, "text", lambda source: b"netflow_up 0\n")
    before = os.umask(0o022)
    try:
        answer, numbers = tmp_path / "answer", tmp_path / "numbers"
        for file, new in ((answer, 0o640), (numbers, 0o644)):
            for expected in (new, 0o600, 0o666):
                if file.exists():
                    file.chmod(expected)
                if file is answer:
                    with show.written(file) as out:
                        out.write("flows")
                else:
                    assert not CliRunner().invoke(cli.main, ["metrics", "--write", file]).exit_code
                assert mode(file) == expected
    finally:
        os.umask(before)


def test_a_damaged_registry_takes_names_away_from_metrics_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "registry.db").write_bytes(b"garbage" * 1000)
    count = SimpleNamespace(xid=7, kind="spoof", refused=3, observed=0)
    monkeypatch.setattr(state, "load", lambda path: SimpleNamespace(instance="/programs"))
    monkeypatch.setattr(refusals, "read", lambda instance: [count])
    source = metrics.Source(tmp_path / "none.sock", tmp_path, tmp_path, tmp_path)
    text = metrics.text(source).decode()
    assert 'vnet_refusals_total{kind="spoof",slice="xid 7"} 3.0' in text
