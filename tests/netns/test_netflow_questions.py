"""The operator's questions at the command line, of real traffic and a real collector."""

import csv
import io
import json
import os
import pty
import signal
import subprocess
import threading
from contextlib import suppress

import duckdb
import pytest
from netflowbed import NETFLOW, accounting, collector, connmark, loads
from vnet.testing.apps import start
from vnet.testing.net import namespace
from vnet.testing.poll import until

from vnet import registry

pytestmark = pytest.mark.netns

A, B = 256, 257
QUESTIONS = {
    "who": ["who", "--to", "127.0.0.1"],
    "query": ["query"],
    "top": ["top", "--of", "port"],
    "scans": ["scans"],
    "series": ["series"],
    "spoofed": ["spoofed"],
    "coverage": ["coverage"],
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A collector that has seen a connection of slice a to slice b, one of nobody, and a scan."""
    base = tmp_path_factory.mktemp("questions")
    with namespace() as node:
        yield from _seen(node, base)


def _seen(node, base):
    accounting(node, lasting=600)
    registry.assign(
        base / "registry.db", [registry.Request("a", A), registry.Request("b", B)], now_ns=1
    )
    (base / "events.jsonl").write_text("")
    connmark(node, B << 16 | A, "-p", "tcp")
    connmark(node, 0, "-p", "tcp", "--dport", "7777")
    with (
        collector(node, base, "--node", "alpha") as flows,
        start(node, "tcp-server", bind="127.0.0.1", reply=5000) as server,
        start(node, "tcp-client", to="127.0.0.1", port=server.port, send=100_000) as client,
    ):
        client.result()
        node.run(
            "python3", "-c",
            "import socket\n"
            "for port in [7777, *range(20000, 20060)]:\n"
            "    s = socket.socket()\n"
            "    assert s.connect_ex(('127.0.0.1', port)) == 111\n"
            "    s.close()\n",
        )  # fmt: skip
        flows.server_port, flows.client_port = server.port, client.port
        flows.records()  # asks until they are there
        yield flows


def ask(asked, *words):
    return loads(asked.cli(*words, "-o", "json").stdout)


def test_who_says_the_slice_its_tenure_and_how_its_owner_is_known(asked):
    to = f"127.0.0.1:{asked.server_port}"
    answer = ask(asked, "who", "--to", to, "--at", "now")
    [row] = answer["flows"]
    assert (row["slice"], row["xid"], row["confidence"]) == ("a", A, "socket")
    assert (row["since"], row["until"]) == ("1970-01-01T00:00:00.000000001Z", None)
    assert (row["own"], row["own_port"], row["node"]) == ("127.0.0.1", asked.client_port, "alpha")
    assert row["sent_bytes"] > 100_000
    assert row["got_bytes"] > 5000
    assert answer["gaps"][0]["what"] == "before-first"
    table = asked.cli("who", "--to", to, "--at", "now")
    assert "socket" in table.stdout
    assert f"127.0.0.1:{asked.client_port} -> {to}" in table.stdout
    assert "nothing was collected yet" in table.stderr


def test_who_from_our_end_and_with_a_filter(asked):
    own = ["who", "--from", f"127.0.0.1:{asked.client_port}", "--last", "1h"]
    [row] = ask(asked, *own, "slice", "a")["flows"]
    assert row["peer_slice"] == "b"
    assert ask(asked, *own, "slice", "nobody")["flows"] == []


def test_who_says_what_is_nobodys_and_why(asked):
    [row] = ask(asked, "who", "--to", "127.0.0.1:7777", "--last", "1h")["flows"]
    assert (row["slice"], row["confidence"]) == (None, "none")
    assert "node itself" in row["why"]


def test_who_without_a_match_is_an_answer_that_says_what_may_be_the_cause(asked):
    done = asked.cli("who", "--to", f"127.0.0.1:{asked.server_port}", "--at", "30m")
    assert done.stdout == ""
    assert "nothing matches" in done.stderr
    assert "if the clocks differ" in done.stderr
    assert "a gap touches" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["who"], "give --to"), (["who", "--to", "x"], "not an address"),
        (["who", "--to", "10.0.0.1:70000"], "not a port"), (["who", "--to", ":"], "no port"),
        (["who", "--to", "[::1"], "write [2001"), (["top", "--only", "inside"], "--inside"),
        (["scans", "--hosts", "0"], "0"), (["top", "-f", "-o", "csv"], "--follow"),
        (["series", "--step", "x"], "length of time"),
    ],
)  # fmt: skip
def test_words_that_cannot_be_meant_ask_nothing(asked, words, said):
    done = asked.cli(*words, check=False)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_scan_of_ports_is_found(asked):
    [row] = ask(asked, "scans")["scans"]
    assert (row["slice"], row["kind"], row["host"]) == ("a", "ports", "127.0.0.1")
    assert row["most"] >= 60
    assert "60 ports of 127.0.0.1" in asked.cli("scans").stdout
    assert ask(asked, "scans", "--ports", "1000")["scans"] == []


def test_top_by_peer_port_protocol_and_node(asked):
    answer = ask(asked, "top", "--of", "peer", "--inside", "127.0.0.0/8")
    assert [(r["peer"], r["place"]) for r in answer["peers"]] == [("127.0.0.1", "inside")]
    ports = ask(asked, "top", "--of", "port", "-n", "1")
    assert ports["ports"][0]["port"] == asked.server_port
    assert ports["more"]
    assert [r["proto"] for r in ask(asked, "top", "--of", "proto")["protocols"]] == ["tcp"]
    assert [r["node"] for r in ask(asked, "top", "--of", "node")["nodes"]] == ["alpha"]
    none = ask(asked, "top", "--inside", "127.0.0.0/8", "--only", "outside")
    assert (none["slices"], none["total"]["flows"]) == ([], 0)


def test_coverage_tells_slices_from_the_node(asked):
    answer = ask(asked, "coverage")
    begun = {}
    for row in answer["steps"]:
        begun[row["what"]] = begun.get(row["what"], 0) + row["begun"]
    assert begun["node"] == 1
    assert begun["slice"] >= 61
    assert answer["total"]["begun"] == answer["total"]["attributed_begun"] + 1


def test_a_series_adds_up_to_the_records(asked):
    rows = ask(asked, "series", "--slice", "a", "--step", "1m")["steps"]
    [top] = ask(asked, "top", "--slice", "a")["slices"][:1]
    for key in ("out_bytes", "in_bytes", "out_packets"):
        assert sum(row[key] for row in rows) == top[key]


@pytest.mark.parametrize("name", QUESTIONS)
def test_each_question_has_each_form(asked, tmp_path, name):
    words = QUESTIONS[name]
    answer = ask(asked, *words)
    lists = [key for key, value in answer.items() if isinstance(value, list)]
    [key] = set(lists) - {"gaps", "notes"}
    rows = answer[key]
    assert rows or name == "spoofed"
    lines = asked.cli(*words, "-o", "ndjson").stdout.splitlines()
    assert len(lines) == len(rows)
    if rows:
        assert json.loads(lines[0]).keys() == rows[0].keys()
    table = list(csv.reader(io.StringIO(asked.cli(*words, "-o", "csv").stdout)))
    assert len(table) == 1 + len(rows)
    file = tmp_path / "x.parquet"
    done = asked.cli(*words, "-o", "parquet", "-O", str(file))
    assert done.stdout == ""
    with duckdb.connect() as con:
        columns = con.execute(f"DESCRIBE SELECT * FROM '{file}'").fetchall()
        read = con.execute(f"SELECT * FROM '{file}'").fetchall()
        about = con.execute(f"SELECT value FROM parquet_kv_metadata('{file}')").fetchall()
    assert [column[0] for column in columns] == table[0]
    assert len(read) == len(rows)
    types = {column[0]: column[1] for column in columns}
    for time in {"start", "first", "flow_start"} & types.keys():
        assert types[time] == "TIMESTAMP_NS"
    for count in {"out_bytes", "sent_bytes", "begun", "originator_bytes"} & types.keys():
        assert types[count] == "UBIGINT"
    gaps = json.loads(about[0][0])["gaps"]
    assert [gap["what"] for gap in gaps] == [gap["what"] for gap in answer["gaps"]]
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"]


def on_terminal(asked, *words, env=None):
    """Run a command whose stdout, stdin and stderr are a terminal; what it wrote, and how to
    stop waiting for it."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*NETFLOW, *words, "--socket", str(asked.socket)],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **(env or {})},
    )  # fmt: skip
    os.close(theirs)
    seen = bytearray()

    def read():
        with suppress(OSError):  # EIO: the other end is closed
            while part := os.read(ours, 65536):
                seen.extend(part)

    thread = threading.Thread(target=read)
    thread.start()
    return process, seen, thread


def finished(process, seen, thread):
    assert process.wait(60) == 0
    thread.join()
    return seen.decode()


def test_a_long_table_goes_through_the_pager_on_a_terminal_only(asked, tmp_path):
    paged = tmp_path / "paged"
    pager = tmp_path / "pager"
    pager.write_text(f"#!/bin/sh\ncat >> {paged}\n")
    pager.chmod(0o755)
    env = {"PAGER": str(pager), "TERM": "xterm", "LINES": "24"}
    finished(*on_terminal(asked, "query", env=env))
    text = paged.read_text()
    assert text.count("127.0.0.1:") >= 120
    assert "\x1b[1m" in text
    paged.unlink()
    shown = finished(*on_terminal(asked, "query", "--no-pager", env=env))
    assert shown.count("127.0.0.1:") >= 120
    finished(*on_terminal(asked, "top", env=env))
    assert "\x1b" not in asked.cli("query").stdout
    assert not paged.exists()


def test_on_a_terminal_a_long_wait_is_said(asked):
    os.kill(asked.process.pid, signal.SIGSTOP)
    try:
        process, seen, thread = on_terminal(asked, "top", env={"TERM": "xterm"})
        until(lambda: b"looking through" in seen, what="it says that it takes a while")
    finally:
        os.kill(asked.process.pid, signal.SIGCONT)
    assert "all, each flow once" in finished(process, seen, thread)


def test_parquet_is_not_for_terminals(asked):
    process, seen, thread = on_terminal(asked, "top", "-o", "parquet")
    assert process.wait(60) == 2
    thread.join()
    assert b"not for terminals" in seen


def test_a_file_that_cannot_be_written_is_said(asked, tmp_path):
    done = asked.cli("top", "-o", "json", "-O", str(tmp_path / "no" / "x"), check=False)
    assert done.returncode == 1
    assert "No such file" in done.stderr


def test_a_report_is_one_page_of_what_the_questions_say(asked, tmp_path):
    file = tmp_path / "a.html"
    asked.cli("report", "--slice", "a", "--last", "2h", "--to", str(file))
    text = file.read_text()
    assert "<svg" in text
    assert f'<td class="n">{asked.server_port}</td>' in text
    assert "60 ports of 127.0.0.1" in text
    assert "Records may be missing" in text
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]
    done = asked.cli("report", "--slice", "a", "--to", str(tmp_path / "no" / "x"), check=False)
    assert done.returncode == 1
    assert "cannot write" in done.stderr
