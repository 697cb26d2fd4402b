"""A reader of IPFIX that has nothing in common with the exporter, and what it is checked with."""

import ipaddress
import socket
import struct
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from storebed import flow

REVERSE, OURS = 29305, 32473


@dataclass
class Reader:
    """One transport session as a collecting process sees it; RFC 7011 throughout.

    data: for each data record its domain, template and elements (pen, number)
    -> bytes. told: names by domain and xid. wrong: what must not be.
    """

    data: list = field(default_factory=list)
    told: dict = field(default_factory=dict)
    nodes: dict = field(default_factory=dict)
    wrong: list = field(default_factory=list)
    templates: dict = field(default_factory=dict)
    announced: Counter = field(default_factory=Counter)
    sequence: dict = field(default_factory=dict)
    messages: int = 0
    named: list = field(default_factory=list)

    def message(self, data):
        version, length, _, sequence, domain = struct.unpack_from(">HHIII", data)
        if version != 10 or length != len(data):
            self.wrong.append(f"version {version}, length {length} of {len(data)}")
            return
        expected = self.sequence.setdefault(domain, sequence)
        if sequence != expected:
            self.wrong.append(f"sequence {sequence}, not {expected}")
        self.messages += 1
        count, at = 0, 16
        while at < length:
            number, size = struct.unpack_from(">HH", data, at)
            body = data[at + 4 : at + size]
            if number in (2, 3):
                self._templates(domain, body, number == 3)
            elif (domain, number) not in self.templates:
                self.wrong.append(f"data of template {number}, which is not known")
            else:
                count += self._records(domain, number, body)
            at += size
        self.sequence[domain] = (sequence + count) & 0xFFFFFFFF

    def _templates(self, domain, body, options):
        at = 0
        while at + 4 <= len(body):
            number, count = struct.unpack_from(">HH", body, at)
            at += 4 + 2 * options
            elements = []
            for _ in range(count):
                element, size = struct.unpack_from(">HH", body, at)
                at, pen = at + 4, 0
                if element & 0x8000:
                    (pen,) = struct.unpack_from(">I", body, at)
                    at += 4
                elements.append((pen, element & 0x7FFF, size))
            known = self.templates.setdefault((domain, number), elements)
            if known != elements:
                self.wrong.append(f"template {number} changed")
            self.announced[domain, number] += 1

    def _records(self, domain, number, body):
        at = count = 0
        while at < len(body):
            record = {}
            for pen, element, size in self.templates[domain, number]:
                if size == 0xFFFF:
                    size, at = body[at], at + 1
                    if size == 255:
                        (size,) = struct.unpack_from(">H", body, at)
                        at += 2
                record[pen, element] = body[at : at + size]
                at += size
            self._take(domain, number, record)
            count += 1
        if at != len(body):
            self.wrong.append(f"a record of template {number} does not end with its set")
        return count

    def _take(self, domain, number, record):
        if (0, 371) in record:
            xid = int.from_bytes(record[OURS, 1])
            self.told[domain, xid] = record[0, 371].decode()
            self.named.append((len(self.data), xid, record[0, 371].decode()))
        elif (0, 300) in record:
            self.nodes[int.from_bytes(record[0, 149])] = record[0, 300].decode()
        elif (0, 236) in record:
            self.told[domain, "vrf", int.from_bytes(record[0, 234])] = record[0, 236].decode()
        else:
            self.data.append((domain, number, record))


def number(record, *key):
    return int.from_bytes(record[key])


def address(record, *elements):
    """The one of some IANA elements that it has, as text."""
    found = [record[0, element] for element in elements if (0, element) in record]
    return str(ipaddress.ip_address(found[0])) if found else None


def facts(record, pen=OURS):
    """A biflow record of ours as plain values, by the names of the store."""
    return {
        "src": address(record, 8, 27),
        "dst": address(record, 12, 28),
        "nsrc": address(record, 225, 281),
        "ndst": address(record, 226, 282),
        "ports": tuple(number(record, 0, e) for e in (7, 11) if (0, e) in record),
        "icmp": tuple(number(record, 0, e) for e in (32, 139) if (0, e) in record),
        "nports": tuple(number(record, 0, e) for e in (227, 228) if (0, e) in record),
        "proto": number(record, 0, 4),
        "start": number(record, 0, 152),
        "end": number(record, 0, 153),
        "counts": tuple(
            number(record, *e) for e in ((0, 2), (0, 1), (REVERSE, 2), (REVERSE, 1)) if e in record
        ),
        "reason": number(record, 0, 136),
        "xids": (number(record, pen, 1), number(record, pen, 2)),
        "flow_id": number(record, 0, 148),
    }


def expected(row):
    """What facts() must say of one of storebed's rows."""

    def text(name):
        whole = row[f"{name}_hi"] << 64 | row[f"{name}_lo"]
        ip = ipaddress.ip_address(whole.to_bytes(16))
        return str(ip.ipv4_mapped or ip)

    icmp = row["proto"] in (1, 58)
    nat = [text("nsrc"), text("ndst"), (row["nsport"], row["ndport"])]
    plain = [text("src"), text("dst"), (row["sport"], row["dport"])]
    translated = nat != plain
    return {
        "src": plain[0],
        "dst": plain[1],
        "nsrc": nat[0] if translated else None,
        "ndst": nat[1] if translated else None,
        "ports": () if icmp else plain[2],
        "icmp": (row["dport"],) if icmp else (),
        "nports": nat[2] if translated and not icmp else (),
        "proto": row["proto"],
        "start": row["start"] // 1_000_000,
        "end": row["end"] // 1_000_000,
        "counts": tuple(row[c] for c in ("opackets", "obytes", "rpackets", "rbytes")),
        "reason": {1: 1, 2: 3, 3: 2, 4: 4, 5: 5, 6: 4}[row["reason"]],
        "xids": (row["oxid"], row["rxid"]),
        "flow_id": row["flow_id"],
    }


def given(rows):
    """Rows of storebed as the exporter gets them."""
    kinds = {
        "start_time": "i8",
        "end_time": "i8",
        "flow_start": "i8",
        "proto": "u1",
        "reason": "u1",
    }
    names = {"start_time": "start", "end_time": "end"}
    columns = {}
    for name in (*rows[0], "start_time", "end_time"):
        if name not in ("start", "end"):
            values = [row[names.get(name, name)] for row in rows]
            wide = name.endswith(("_hi", "_lo", "bytes", "packets"))
            kind = kinds.get(name, "u8" if wide else "u4")
            columns[name] = np.array(values, dtype=kind)
    return columns


def parts(messages):
    """Each message's bytes."""
    return [bytes(block.data[a:b]) for block in messages for a, b in pairwise(block.bounds)]


def some_rows(count, seed=1, reasons=(1, 2, 3, 4, 5, 6)):
    """Records of every kind, with counts that are all different."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        six, proto = bool(rng.integers(2)), int(rng.choice([1, 6, 17, 132]))
        base = "2001:db8::{:x}" if six else "10.0.{}.{}"
        a, b, c = (
            base.format(x + 1) if six else base.format(x >> 8, x & 255)
            for x in map(int, rng.integers(0, 60000, 3))
        )
        icmp = {"sport": n & 0xFFFF, "dport": 8 << 8} if proto == 1 else {}
        rows.append(
            flow(
                a, b, start=n / 7, end=n / 7 + 1.5, proto=58 if six and proto == 1 else proto,
                opackets=n + 1000, obytes=100 * n + 60, rpackets=n // 2, rbytes=(n // 2) * 90,
                oxid=256 + n % 5, rxid=(n % 3) and 300, reason=reasons[n % len(reasons)],
                flow_id=n + 7,
                **({"nsrc": c} if rng.integers(4) == 0 else {}), **icmp,
            )
        )  # fmt: skip
    return rows


@dataclass
class Receiver:
    """A collecting process over TCP in this process; each connection is a session."""

    listener: socket.socket
    sessions: list = field(default_factory=list)
    links: list = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def port(self):
        return self.listener.getsockname()[1]

    def counts(self):
        """How often each record came, over all sessions, by the packets of its originator."""
        with self.lock:
            return Counter(number(r, 0, 2) for s in self.sessions for _, _, r in s.data)

    def wrong(self):
        with self.lock:
            return [why for s in self.sessions for why in s.wrong]


def receiver(port=0):
    """Listen and read until close() of the listener."""
    listener = socket.create_server(("127.0.0.1", port))
    made = Receiver(listener)
    threading.Thread(target=_accept, args=(made,), daemon=True).start()
    return made


def leave(made):
    """Stop listening, and break off what is connected."""
    made.listener.shutdown(socket.SHUT_RDWR)
    made.listener.close()
    for link in made.links:
        with suppress(OSError):
            link.shutdown(socket.SHUT_RDWR)


def _accept(made):
    while True:
        try:
            link, _ = made.listener.accept()
        except OSError:
            return
        session = Reader()
        made.links.append(link)
        made.sessions.append(session)
        threading.Thread(target=_read, args=(made, link, session), daemon=True).start()


def _read(made, link, session):
    with link, link.makefile("rb") as stream:
        try:
            while len(head := stream.read(4)) == 4:
                size = struct.unpack(">HH", head)[1]
                rest = stream.read(size - 4)
                if len(rest) == size - 4:  # else it was cut off, and is none
                    with made.lock:
                        session.message(head + rest)
        except OSError:
            pass
