"""The decoder on messages built by hand: every field, every kind, every lie."""

import struct
from ipaddress import ip_address

import pytest
from fuzz import ctmsg
from fuzz.ctmsg import ICMP, ICMPV6, TCP, UDP, Conn, attr, nest, tuple_
from hypothesis import given, settings
from hypothesis import strategies as st

from netflow.ct import Batch, Decoded, Has, Msg, decode, get_request

pytestmark = pytest.mark.unit

WEB = tuple_("192.0.2.7", "198.51.100.9", TCP, 40212, 80)
DNS6 = tuple_("2001:db8::7", "2001:db8:1::53", UDP, 5353, 53)
PING = tuple_("192.0.2.7", "198.51.100.9", ICMP, 0xBEEF, 8 << 8)
PING6 = tuple_("2001:db8::7", "2001:db8::9", ICMPV6, 0x1234, 128 << 8)


def read(data: bytes, capacity: int = 64) -> tuple[Batch, Decoded]:
    batch = Batch(capacity)
    return batch, decode(data, batch)


def one(data: bytes) -> dict[str, int]:
    batch, met = read(data)
    assert len(batch) == 1 and met.used == len(data) and not met.malformed
    return {name: int(column[0]) for name, column in batch.columns().items()}


def address(row: dict[str, int], which: str) -> str:
    wide = ip_address(row[f"{which}_hi"] << 64 | row[f"{which}_lo"])
    return str(wide.ipv4_mapped or wide)


def test_every_field_of_a_destroy_is_decoded():
    conn = Conn(
        WEB,
        reply=tuple_("198.51.100.9", "203.0.113.1", TCP, 80, 61000),
        id=0xFEDCBA98,
        mark=0x00020001,
        zone=7,
        counters=(2**40 + 1, 2**63 + 2, 3, 4),
        start=1_700_000_000_123_456_789,
        stop=1_700_000_001_987_654_321,
        state=7,
        status=0x1CE,
    )
    row = one(conn.destroy())
    assert Has(row["has"]) == Has.COUNTERS | Has.MARK | Has.START | Has.STOP | Has.REPLY
    assert [address(row, a) for a in ("src", "dst", "rsrc", "rdst")] == [
        "192.0.2.7",
        "198.51.100.9",
        "198.51.100.9",
        "203.0.113.1",
    ]
    assert {k: v for k, v in row.items() if not k.endswith(("_hi", "_lo"))} == {
        "msg": Msg.DESTROY,
        "has": row["has"],
        "family": 2,
        "proto": TCP,
        "tcp_state": 7,
        "zone": 7,
        "id": 0xFEDCBA98,
        "mark": 0x00020001,
        "status": 0x1CE,
        "sport": 40212,
        "dport": 80,
        "rsport": 80,
        "rdport": 61000,
        "opackets": 2**40 + 1,
        "obytes": 2**63 + 2,
        "rpackets": 3,
        "rbytes": 4,
        "start": 1_700_000_000_123_456_789,
        "stop": 1_700_000_001_987_654_321,
    }


def test_an_ipv6_address_fills_both_halves():
    row = one(Conn(DNS6).new())
    assert row["family"] == 10
    assert (address(row, "src"), address(row, "dst")) == ("2001:db8::7", "2001:db8:1::53")
    assert (address(row, "rsrc"), address(row, "rdst")) == ("2001:db8:1::53", "2001:db8::7")


def test_an_ipv4_address_is_mapped():
    row = one(Conn(WEB).new())
    assert (row["src_hi"], row["src_lo"]) == (0, 0xFFFF_C000_0207)


@pytest.mark.parametrize("ping", [PING, PING6], ids=["icmp", "icmpv6"])
def test_icmp_gives_its_id_as_sport_and_type_and_code_as_dport(ping):
    row = one(Conn(ping).new())
    assert (row["sport"], row["dport"]) == (ping.sport, ping.dport)
    assert (row["rsport"], row["rdport"]) == (ping.sport, ping.turned().dport)


def test_a_gre_key_comes_as_ports():
    row = one(Conn(tuple_("10.0.0.1", "10.0.0.2", ctmsg.GRE, 0x11, 0x22)).new())
    assert (row["proto"], row["sport"], row["dport"]) == (47, 0x11, 0x22)


def test_a_protocol_without_ports_has_ports_0():
    row = one(Conn(tuple_("10.0.0.1", "10.0.0.2", 50)).new())
    assert (row["proto"], row["sport"], row["dport"], row["rsport"]) == (50, 0, 0, 0)


def test_the_state_of_sctp_is_read_too():
    assert (
        one(Conn(tuple_("10.0.0.1", "10.0.0.2", ctmsg.SCTP, 1, 2), state=4).new())["tcp_state"] == 4
    )


def test_a_zone_of_one_direction_comes_from_inside_the_tuple():
    orig = ctmsg.Tuple(WEB.src, WEB.dst, TCP, 1, 2, zone=12)
    assert one(Conn(orig, reply=WEB.turned()).new())["zone"] == 12


def test_counters_of_one_direction_alone_are_none():
    half = nest(9, attr(1, bytes(8)), attr(2, bytes(8)))
    assert Has.COUNTERS not in Has(one(Conn(WEB, extra=(half,)).new())["has"])


@pytest.mark.parametrize(
    ("data", "msg"),
    [
        (Conn(WEB).new(), Msg.NEW),
        (Conn(WEB).update(), Msg.UPDATE),
        (Conn(WEB).destroy(), Msg.DESTROY),
        (Conn(WEB).row(), Msg.DUMP),
        (Conn(WEB).row(flags=0), Msg.DUMP),
        (Conn(WEB).row(flags=ctmsg.MULTI | 0x20), Msg.DUMP),
        # `conntrack -U` and `-D` put their port id into the event they cause
        (Conn(WEB).update(pid=4711), Msg.UPDATE),
        (Conn(WEB).destroy(pid=4711), Msg.DESTROY),
    ],
    ids=["new", "update", "destroy", "dump", "get", "filtered dump", "update by", "destroy by"],
)
def test_each_kind_of_message_is_told(data, msg):
    assert one(data)["msg"] == msg


def test_messages_that_are_not_conntracks_are_skipped():
    other = (
        ctmsg.message(0x100 | 4, bytes(8)) + ctmsg.message(0x200, bytes(8)) + ctmsg.message(1, b"")
    )
    batch, met = read(other + Conn(WEB).new())
    assert (len(batch), met.skipped, met.malformed) == (1, 3, 0)


def test_unknown_attributes_are_passed_over():
    extra = (attr(200, b"later"), attr(5, b"helper\0"), nest(15, attr(1, b"")))
    assert one(Conn(WEB, mark=3, extra=extra).new())["mark"] == 3


def test_a_full_batch_stops_at_a_message_boundary_and_goes_on():
    rows = [Conn(WEB, id=n).row() for n in range(5)]
    data = b"".join(rows)
    batch, met = read(data, capacity=2)
    assert met.used == len(rows[0]) * 2 and len(batch) == 2
    seen = list(batch["id"])
    while met.used:
        data = data[met.used :]
        batch.clear()
        met = decode(data, batch)
        seen += list(batch["id"])
    assert seen == [0, 1, 2, 3, 4]


def test_the_end_of_a_dump_is_told_even_to_a_full_batch():
    batch, met = read(Conn(WEB).row() + ctmsg.done(9), capacity=1)
    assert met.done and len(batch) == 1


def test_a_dump_with_holes_is_told():
    assert read(Conn(WEB).row(flags=ctmsg.MULTI | ctmsg.DUMP_INTR))[1].interrupted
    assert not read(Conn(WEB).row())[1].interrupted


def test_each_error_is_told_with_its_request():
    data = ctmsg.error(0, 1) + ctmsg.error(2, 5) + Conn(WEB).row(flags=0) + ctmsg.error(1, 6)
    batch, met = read(data)
    assert (met.error, met.error_seq) == (2, 5)
    batch, met = read(data[met.used :])
    assert (met.error, met.error_seq, len(batch)) == (1, 6, 1)


def test_a_dump_that_failed_says_so_in_its_end():
    met = read(ctmsg.done(3, code=12))[1]
    assert (met.done, met.error, met.error_seq) == (True, 12, 3)


BAD = {
    "no tuple": ctmsg.message(ctmsg.NEW, bytes(4)),
    "no nfgenmsg": ctmsg.message(ctmsg.NEW, b"\2\0"),
    "one address": ctmsg.message(
        ctmsg.NEW, bytes(4) + nest(1, nest(1, attr(1, bytes(4))), nest(2, attr(1, b"\6")))
    ),
    "two families": ctmsg.message(
        ctmsg.NEW, bytes(4) + nest(1, nest(1, attr(1, bytes(4)), attr(4, bytes(16))))
    ),
    "long address": ctmsg.message(
        ctmsg.NEW, bytes(4) + nest(1, nest(1, attr(1, bytes(16)), attr(2, bytes(4))))
    ),
    "short mark": Conn(WEB, extra=(attr(8, b"\1\2"),)).new(),
    "short counters": Conn(WEB, extra=(nest(9, attr(1, bytes(8)), attr(2, bytes(2))),)).new(),
    "bytes missing": Conn(WEB, extra=(nest(9, attr(1, bytes(8))),)).new(),
    "attribute too long": Conn(WEB, extra=(struct.pack("=HH", 99, 8),)).new(),
    "attribute too short": Conn(WEB, extra=(struct.pack("=HH", 3, 8),)).new(),
    "bytes left over": Conn(WEB, extra=(b"\0\0",)).new(),
    "nest too long": Conn(WEB, extra=(attr(20, struct.pack("=HH", 12, 1) + bytes(4)),)).new(),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_attributes_that_do_not_add_up_cost_their_message_only(bad):
    bad += bytes(-len(bad) % 4)
    batch, met = read(Conn(WEB, id=1).new() + bad + Conn(WEB, id=2).new())
    assert list(batch["id"]) == [1, 2]
    assert met.malformed == 1


def test_a_lying_length_ends_the_buffer():
    good = Conn(WEB).new()
    for length in (0, 15, len(good) + 1, 2**32 - 1):
        data = good + struct.pack("=I", length) + good[4:]
        batch, met = read(data)
        assert (len(batch), met.malformed, met.used) == (1, 1, len(data))


def test_every_truncation_is_noticed():
    good = Conn(WEB, mark=1, counters=(1, 2, 3, 4), start=5, state=3).row()
    for cut in range(1, len(good)):
        batch, met = read(good[:cut])
        assert (len(batch), met.malformed, met.used) == (0, 1, cut)


def test_an_empty_buffer_is_nothing():
    assert read(b"")[1] == Decoded(0, 0, 0, False, False, 0, 0, False)


SAMPLES = [
    Conn(WEB, mark=0x10002, counters=(1, 2, 3, 4), start=5, stop=6, state=7).destroy(),
    Conn(DNS6, zone=3).row(),
    Conn(PING).new(),
    Conn(PING6, mark=9).update(),
    ctmsg.error(2, 5),
    ctmsg.done(4),
]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_mutation_is_believed_beyond_its_own_message(data):
    """Flip bytes of one message: those around it are read all the same, or the rest is given up."""
    middle = bytearray(data.draw(st.sampled_from(SAMPLES)))
    for _ in range(data.draw(st.integers(1, 4))):
        middle[data.draw(st.integers(0, len(middle) - 1))] = data.draw(st.integers(0, 255))
    first, last = Conn(WEB, id=11).new(), Conn(WEB, id=12).new()
    buffer = first + bytes(middle) + last
    batch, met = read(buffer)
    assert batch["id"][0] == 11
    if not met.error and not met.malformed and len(batch) == 3:
        assert batch["id"][2] == 12
    assert met.used == len(buffer) or met.error


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_consumed_or_stop_at_an_error(data):
    _, met = read(data)
    assert met.used == len(data) or met.error


@pytest.mark.parametrize("conn", [WEB, DNS6, PING, PING6], ids=["tcp", "udp6", "icmp", "icmpv6"])
@pytest.mark.parametrize("zone", [None, 7])
def test_a_request_names_the_connection_it_was_made_of(conn, zone):
    batch, _ = read(Conn(conn, zone=zone).new())
    request = get_request(batch, 0, seq=0xABCD)
    length, kind, flags, seq, pid = struct.unpack_from("=IHHII", request)
    assert (length, kind, flags, seq, pid) == (len(request), ctmsg.GET, 1, 0xABCD, 0)
    # the kernel reads the request by the layout it writes: so does the decoder
    answer = ctmsg.message(ctmsg.NEW, request[16:], seq=1)
    row, asked = one(answer), {k: int(v[0]) for k, v in batch.columns().items()}
    names = ("src_hi", "src_lo", "dst_hi", "dst_lo", "sport", "dport", "proto", "zone", "family")
    assert [row[n] for n in names] == [asked[n] for n in names]


def test_a_request_for_no_row_is_refused():
    with pytest.raises(IndexError):
        get_request(Batch(4), 0, seq=1)
