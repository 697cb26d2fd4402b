"""Events out of a ring buffer's bytes, and into words."""

import json
import mmap
import struct
from datetime import UTC, datetime
from ipaddress import ip_address

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.text import Text
from vnet.bpfmaps import ffi, lib

from vnet import cli, cli_events, events, ring

pytestmark = pytest.mark.unit

PAGE = mmap.PAGESIZE
SIZE = 2 * PAGE
EVENT = ffi.sizeof("struct vnet_event")
BUSY, DISCARD = 1 << 31, 1 << 30
NOBODY = {}


def packed(address: str) -> bytes:
    """An address as the programs have it: IPv4 is IPv4-mapped."""
    found = ip_address(address)
    return found.packed if found.version == 6 else b"\0" * 10 + b"\xff\xff" + found.packed


def event(kind: str, **values) -> bytes:
    """A struct vnet_event."""
    made = ffi.new("struct vnet_event *")
    made.kind = getattr(lib, f"VNET_KIND_{kind.upper()}")
    for name, value in values.items():
        if name in ("saddr", "daddr"):
            value = packed(value)
        setattr(made, name, value)
    return bytes(ffi.buffer(made))


def memory(position: int, records: list[tuple[int, bytes]]) -> tuple[bytes, int]:
    """The kernel's pages with records (flags, data) from a position on; and the end of them."""
    data = bytearray(SIZE)
    at = position
    for bits, payload in records:
        record = struct.pack("II", len(payload) | bits, 0) + payload
        for offset, byte in enumerate(record):
            data[(at + offset) % SIZE] = byte
        at += -(-len(record) // 8) * 8
    head = struct.pack("L", at).ljust(PAGE, b"\0")
    return head + bytes(data) * 2, at


def told(data: bytes, names=NOBODY, boot: int = 0) -> dict:
    """The line of one event."""
    pages, _ = memory(0, [(0, data)])
    (raw,) = ring.read(pages, SIZE, 0, 9).events
    return events.describe(raw, boot, lambda xid, _at: names.get(xid))


def test_every_kind_of_the_header_has_a_name_and_a_sentence():
    numbers = [getattr(lib, f"VNET_KIND_{kind.upper()}") for kind in events.KINDS]
    assert sorted(numbers) == list(range(1, lib.VNET_KIND_MAX))
    assert [events.kind_name(number) for number in numbers] == list(events.KINDS)
    for kind, sentence in events.KINDS.items():
        assert sentence.endswith("."), kind
        assert kind in cli_events._WORDS


def test_a_bind_is_told_with_who_asked_for_what_and_whose_it_was():
    line = told(
        event("bind", when=5 * 10**9, xid=256, owner=300, pid=42, comm=b"nc", family=2, type=1,
              proto=6, sport=80, saddr="192.0.2.1", suppressed=7),
        names={256: "a", 300: "b"},
        boot=1_700_000_000 * 10**9,
    )  # fmt: skip
    assert line == {
        "time": "2023-11-14T22:13:25.000000000Z",
        "kind": "bind",
        "refused": True,
        "slice": "a",
        "xid": 256,
        "owner": "b",
        "owner_xid": 300,
        "family": "ipv4",
        "type": "stream",
        "proto": "tcp",
        "src": "192.0.2.1",
        "sport": 80,
        "dst": None,
        "dport": None,
        "icmp": None,
        "mark": 0,
        "pid": 42,
        "comm": "nc",
        "suppressed": 7,
    }


@pytest.mark.parametrize(
    ("family", "address", "shown"),
    [(2, "0.0.0.0", "0.0.0.0"), (10, "::", "::"), (10, "192.0.2.1", "192.0.2.1")],
)
def test_a_bind_to_every_address_says_so(family, address, shown):
    line = told(event("bind", family=family, proto=17, sport=53, saddr=address))
    assert (line["src"], line["sport"], line["proto"]) == (shown, 53, "udp")


def test_a_refused_socket_has_no_addresses():
    line = told(event("raw", family=10, type=3, proto=58, pid=1, comm=b"ping"))
    assert (line["family"], line["type"], line["proto"]) == ("ipv6", "raw", "icmpv6")
    assert {line[key] for key in ("src", "sport", "dst", "dport", "icmp")} == {None}


def test_a_packet_sockets_protocol_is_not_taken_for_ips():
    line = told(event("packet", family=17, type=3, proto=6))
    assert (line["family"], line["proto"]) == ("packet", None)


def test_an_icmp_packet_is_told_by_type_code_and_id():
    line = told(
        event("snoop", family=2, proto=1, sport=0x0301, dport=77, saddr="192.0.2.1",
              daddr="192.0.2.2")
    )  # fmt: skip
    assert line["icmp"] == {"type": 3, "code": 1, "id": 77}
    assert (line["sport"], line["dport"]) == (None, None)


def test_what_was_let_through_says_so():
    line = told(event("spoof", observed=1, family=2, proto=17, saddr="192.0.2.1"))
    assert line["refused"] is False
    assert "let through" in " ".join(cli_events.cells(line))


def test_a_kind_and_a_family_of_a_later_version_are_numbers():
    data = bytearray(event("raw"))
    data[ffi.offsetof("struct vnet_event", "kind")] = 200
    data[ffi.offsetof("struct vnet_event", "family")] = 99
    line = told(bytes(data))
    assert (line["kind"], line["family"]) == ("200", "99")
    cli_events.cells(line)


def test_a_process_cannot_write_escape_sequences_to_a_terminal():
    line = told(event("raw", pid=1, comm=b"\x1b[2J\x9b\xff[red]\n"))
    assert events._line(line).isascii()
    assert events._line(line).count("\n") == 1
    (process,) = [cell for cell in cli_events.cells(line) if cell.endswith("[1]")]
    assert process.isprintable()
    assert Text(process).plain == process


def test_records_are_read_up_to_the_one_that_is_being_written():
    one, two = event("raw", xid=1), event("raw", xid=2)
    pages, _ = memory(0, [(0, one), (DISCARD, two), (0, b"x" * 24), (0, two), (BUSY, one)])
    batch = ring.read(pages, SIZE, 0, 9)
    assert [raw.xid for raw in batch.events] == [1, 2]
    assert batch.unknown == 1
    assert batch.end == 3 * (8 + EVENT) + 8 + 24


def test_a_reader_that_takes_few_at_a_time_reads_all():
    pages, end = memory(0, [(0, event("raw", xid=n)) for n in range(5)])
    at, found = 0, []
    while at < end:
        batch = ring.read(pages, SIZE, at, 2)
        assert len(batch.events) <= 2
        found += [raw.xid for raw in batch.events]
        at = batch.end
    assert found == [0, 1, 2, 3, 4]


@settings(deadline=None)
@given(st.integers(0, 2**40), st.lists(st.sampled_from(["event", "discarded", "other"])))
def test_reading_goes_on_over_the_end_of_the_ring(start, what):
    position = start // 8 * 8
    payload = {"event": (0, event("raw")), "discarded": (DISCARD, b""), "other": (0, b"abc")}
    records, room = [], SIZE
    for word in what:
        room -= 8 + -(-len(payload[word][1]) // 8) * 8
        if room < 0:
            break
        records.append(payload[word])
    pages, end = memory(position, records)
    batch = ring.read(pages, SIZE, position, 1000)
    assert batch.end == end
    assert len(batch.events) == records.count(payload["event"])
    assert batch.unknown == records.count(payload["other"])


NOW = 1_700_000_000 * 10**9


@pytest.mark.parametrize(
    ("text", "ago"), [("30s", 30), ("10m", 600), ("2h", 7200), ("7d", 604800), ("0s", 0)]
)
def test_a_time_may_be_an_age(text, ago):
    assert events.moment(text, NOW) == NOW - ago * 10**9


def test_a_time_may_be_a_date_with_a_zone_or_in_the_local_one():
    assert events.moment("2023-11-14T22:13:20Z", 0) == NOW
    assert events.moment("2023-11-14T23:13:20+01:00", 0) == NOW
    local = datetime.fromtimestamp(NOW // 10**9).isoformat()
    assert events.moment(local, 0) == NOW


@pytest.mark.parametrize("text", ["", "10", "10y", "-5m", "yesterday", "9" * 30 + "d", "24:00"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="not 30s, 10m"):
        events.moment(text, NOW)


@settings(deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 2**62))
def test_times_sort_as_their_texts_do(one, two):
    assert (one < two) == (events.iso(one) < events.iso(two))
    at = datetime.fromisoformat(events.iso(one)[:26] + "+00:00")
    assert at.tzinfo is UTC or at.utcoffset().total_seconds() == 0


@pytest.mark.parametrize(
    "words",
    [
        ("--kind", "bnid"),
        ("--since", "yesterday"),
        ("--limit", "-1"),
        ("--counters", "--follow"),
        ("--counters", "--since", "1h"),
        ("--counters", "--limit", "3"),
    ],
)
def test_what_cannot_be_meant_is_refused(words):
    done = CliRunner().invoke(cli.cli, ["events", *words])
    assert done.exit_code == 2
    assert words[0] in done.output


def test_the_kinds_are_explained_to_anybody():
    done = CliRunner().invoke(cli.cli, ["events", "--kinds", "--json"])
    assert json.loads(done.stdout) == events.KINDS
