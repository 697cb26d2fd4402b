"""How many records a second `netflow export` encodes, and gets from a collector to a receiver.

``bench_export.py [--records N] [--json FILE]`` as root. The records are of the
benchmark mix (synthetic.py).

* encode: columns in memory become messages, 1400 and 65535 bytes long;
* tcp: a collector's store, the exporter, and a receiver on loopback that throws
  away what it reads: from the hot segment, and from Parquet files;
* udp: a fifth of them to nfcapd, as fast as the exporter goes by itself, and what it counts.

Beside the rate stands the processor time that a million records cost the
collector and the exporter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import synthetic
from bench_ingest import own_namespace
from netflowbed import unread

from netflow import client, history, store
from netflow.history import archive
from netflow.ipfix.elements import Shape
from netflow.ipfix.session import Session, export
from netflow.node import Node
from netflow.when import HOUR

NETFLOW = [sys.executable, "-m", "netflow"]
NODE = Node("bench", 1)


def encode(records: int) -> list[dict[str, Any]]:
    """Messages from columns, a collector's answer at a time."""
    columns = synthetic.mixed(np.random.default_rng(1), records, 500_000)
    columns["start_time"] = columns.pop("start").astype("i8")
    columns["end_time"] = columns.pop("end").astype("i8")
    made = []
    for size in (1400, 65535):
        session, began, done = Session(Shape(), size), time.process_time(), 0
        for first in range(0, records, 16_384):
            part = {name: column[first : first + 16_384] for name, column in columns.items()}
            done += sum(m.records for m in export(session, "bench", 1, part, (), time.time()))
        assert done == records
        seconds = time.process_time() - began
        made.append(
            {"way": f"encode {size}", "records": records, "rate": records / seconds,
             "exporter": seconds}
        )  # fmt: skip
    return made


def fill(where: Path, records: int, closed: bool) -> None:
    """A store of so many records, hot or in files."""
    kept = history.open_store(where, NODE, "256MB")
    now = time.time_ns()
    store.begin_run(kept, store.Mark(now - HOUR))
    rng = np.random.default_rng(1)
    for first in range(0, records, 200_000):
        batch = synthetic.mixed(rng, min(200_000, records - first), now // HOUR - 1)
        batch["reason"][batch["reason"] == 3] = 2  # else the collector looks for their ends
        store.commit(kept, batch, store.Mark(now))
    if closed:
        store.commit(kept, None, store.Mark(now + HOUR))
        maker = archive.Archiver(kept, kept.con.cursor(), history.Keeping(), where / "none.db")
        archive.close_segments(maker)
        maker.con.close()
    store.end_run(kept)
    store.close(kept)


@contextmanager
def collector(where: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``netflow collect`` over that store, once it answers."""
    words = ["collect", "--store", where, "--socket", where / "query.sock", "--keep", "0"]
    with (where / "log").open("w") as log:
        process = subprocess.Popen(
            [*NETFLOW, *words, "--node", NODE.name, "--state-dir", where], stdout=log, stderr=log
        )
    try:
        while True:
            try:
                client.status(where / "query.sock")
                break
            except client.ClientError:
                assert process.poll() is None, (where / "log").read_text()
                time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        process.wait()


def used(pid: int) -> float:
    """Processor seconds of a process, proc(5) stat."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def exported(where: Path, flows: subprocess.Popen[bytes], way: str, *to: str) -> dict[str, Any]:
    """One ``netflow export --once``: how long it took, what it cost."""
    place = where / "position"
    before = used(flows.pid)
    words = ["--begin", "oldest", "--once", "--position", place, "--socket", where / "query.sock"]
    began = time.monotonic()
    process = subprocess.Popen([*NETFLOW, "export", *to, *words], stderr=subprocess.DEVNULL)
    status, memory = 0, 0  # ru_maxrss would be that of the process it was forked from
    while not status:
        text = Path(f"/proc/{process.pid}/status").read_text()
        memory = max(memory, *map(int, re.findall(r"VmHWM:\s+(\d+)", text)), 0)
        done, status, spent = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    seconds, after = time.monotonic() - began, used(flows.pid)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    records = json.loads(place.read_text())["records"]
    place.unlink()
    return {
        "way": way,
        "records": records,
        "rate": records / seconds,
        "exporter": spent.ru_utime + spent.ru_stime,
        "collector": after - before,
        "megabytes": memory / 1000,
    }


def drain(listener: socket.socket) -> None:
    while True:
        link, _ = listener.accept()
        with link:
            while link.recv(1 << 20):
                pass


def over_tcp(records: int) -> list[dict[str, Any]]:
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=drain, args=(listener,), daemon=True).start()
    to = ("--to", f"127.0.0.1:{listener.getsockname()[1]}", "--transport", "tcp", "--rate", "0")
    made = []
    for closed in (False, True):
        with tempfile.TemporaryDirectory() as name:
            where = Path(name)
            fill(where, records, closed)
            with collector(where) as flows:
                way = "tcp, from files" if closed else "tcp, hot"
                made.append(exported(where, flows, way, *to))
                # The collector has seen the export's own connection, too.
                assert made[-1]["records"] in range(records, records + 9), made[-1]
    return made


def over_udp(records: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        fill(where, records, False)
        (files := where / "nfcapd").mkdir()
        words = ["nfcapd", "-w", files, "-b", "127.0.0.1", "-p", "9995", "-t", "3600"]
        with collector(where) as flows:
            peer = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while unread(9995)[0] < 0:
                assert peer.poll() is None
                time.sleep(0.01)
            made = exported(where, flows, "udp, to nfcapd", "--to", "127.0.0.1:9995")
            while unread(9995)[0] > 0:
                time.sleep(0.01)
            made["lost"] = unread(9995)[1]
            made["nfcapd"] = used(peer.pid)
            peer.terminate()
            peer.wait()
        said = subprocess.run(
            ["nfdump", "-R", files, "-I"], capture_output=True, text=True, check=True
        ).stdout
        made["stored"] = int(re.search(r"Flows: (\d+)", said)[1])
        return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    own_namespace()
    ways = [*encode(options.records), *over_tcp(options.records), over_udp(options.records // 5)]
    for way in ways:
        each = 1e6 / way["records"]
        print(
            f"{way['way']:<18}{way['rate']:>12,.0f} records/s"
            f"{way['exporter'] * each:>8.2f} s CPU a million"
            + (f", collector {way['collector'] * each:.2f}" if "collector" in way else "")
            + (f"; {way['stored']:,} of {way['records']:,} stored" if "stored" in way else "")
        )
    if options.json:
        options.json.write_text(json.dumps({"records": options.records, "ways": ways}, indent=1))


if __name__ == "__main__":
    main()
