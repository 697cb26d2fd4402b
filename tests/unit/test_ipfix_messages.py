"""IPFIX messages: what is put in is what independent readers take out."""

import pytest
from hypothesis import given as given_by
from hypothesis import settings
from hypothesis import strategies as st
from ipfixbed import OURS, REVERSE, Reader, expected, facts, given, number, parts, some_rows
from storebed import SEC, T0, flow

from netflow.ipfix import session as ipfix
from netflow.ipfix.elements import Shape
from netflow.ipfix.names import Tenure
from netflow.ipfix.transport import parse_target

pytestmark = pytest.mark.unit

FOREVER = 1 << 62
NOW = 1_772_335_000.0


def made(rows, shape=None, size=1400, tenures=(), **options):
    """The messages of a new session."""
    session = ipfix.Session(shape or Shape(), size, **options)
    return parts(ipfix.export(session, "alpha", 7, given(rows), tenures, NOW))


def read(messages):
    reader = Reader()
    for message in messages:
        reader.message(message)
    assert reader.wrong == []
    return reader


def by_id(records):
    return {fact["flow_id"]: fact for fact in records}


def test_every_kind_of_record_comes_out_as_it_went_in():
    rows = some_rows(500)
    reader = read(made(rows))
    assert len(reader.data) == 500
    found = by_id(facts(record) for _, _, record in reader.data)
    assert found == {row["flow_id"]: expected(row) for row in rows}
    assert {template for _, template, _ in reader.data} == set(range(256, 264))
    assert {domain for domain, _, _ in reader.data} == {7}
    assert reader.nodes == {7: "alpha"}


@pytest.mark.parametrize("size", [576, 1400, 9000, 65535])
def test_no_message_is_longer_than_allowed_and_most_are_full(size):
    messages = made(some_rows(2000), size=size)
    assert max(map(len, messages)) <= size
    assert len(read(messages).data) == 2000
    whole = sum(map(len, messages))
    assert len(messages) <= 2 + 1 + 8 + whole // (size - 160)


def test_sequence_numbers_count_the_records_of_a_domain_and_wrap():
    session = ipfix.Session(Shape(), 1400)
    first = ipfix.export(session, "alpha", 7, given(some_rows(100)), (), NOW)
    other = ipfix.export(session, "beta", 8, given(some_rows(10)), (), NOW)
    session.domains[7].sequence = (1 << 32) - 5
    last = ipfix.export(session, "alpha", 7, given(some_rows(100)), (), NOW)
    reader = read(parts(first) + parts(other))
    assert reader.sequence == {7: 101, 8: 11}  # each node's name is a record too
    assert reader.nodes == {7: "alpha", 8: "beta"}
    reader.sequence[7] = (1 << 32) - 5
    for message in parts(last):
        reader.message(message)
    assert reader.wrong == []
    assert reader.sequence[7] == 95


def test_templates_come_again_after_a_time_and_after_so_many_messages():
    session = ipfix.Session(Shape(), 1400, again_after=60, again_every=50)
    rows = given(some_rows(20))
    tenure = [Tenure(256, "princeton_codeen", 0, 0, FOREVER)]
    reader = read(parts(ipfix.export(session, "alpha", 7, rows, tenure, NOW)))
    assert reader.announced[7, 256] == 1
    for later, times in ((59, 1), (60, 2), (119, 2), (120, 3)):
        for message in parts(ipfix.again(session, NOW + later)):
            reader.message(message)
        assert reader.announced[7, 256] == reader.announced[7, 272] == times
        assert len(reader.named) == times
    many = given(some_rows(2000))
    for message in parts(ipfix.export(session, "alpha", 7, many, tenure, NOW + 121)):
        reader.message(message)
    assert reader.announced[7, 256] == 3
    for message in parts(ipfix.again(session, NOW + 121)):
        reader.message(message)
    assert reader.announced[7, 256] == 4
    assert reader.wrong == []


def test_templates_go_once_where_nothing_asks_for_more():
    session = ipfix.Session(Shape(), 65535)
    for n in range(3):
        last = parts(ipfix.export(session, "alpha", 7, given(some_rows(50)), (), NOW + n * 1e6))
    assert all(message[16:18] not in (b"\0\2", b"\0\3") for message in last)
    assert ipfix.again(session, NOW + 1e9) == []


def test_a_name_is_told_before_the_first_record_that_it_holds_for():
    at = [T0 + n * 100 * SEC for n in range(5)]
    tenures = [
        Tenure(256, "first", 0, at[0], at[1]),
        Tenure(256, "second", at[1], at[2], FOREVER),
        Tenure(300, "other", 0, at[0], FOREVER),
    ]
    rows = [
        flow(start=50, end=51, oxid=256, flow_id=1),
        flow(start=250, end=251, oxid=256, flow_id=2),
        flow(start=60, end=61, oxid=256, rxid=300, flow_id=3),
        flow(start=260, end=261, oxid=7, flow_id=4),
    ]
    reader = read(made(rows, tenures=tenures))
    assert reader.named == [
        (0, 256, "first"), (1, 256, "second"), (2, 256, "first"), (2, 300, "other"),
    ]  # fmt: skip
    session = ipfix.Session(Shape(), 1400)
    for _ in range(2):
        again = parts(ipfix.export(session, "alpha", 7, given(rows[1:2]), tenures, NOW))
    assert len(again) == 1  # what a receiver knows it is not told again


def test_xids_go_in_vrf_ids_and_names_with_them_where_that_is_switched_on():
    tenures = [Tenure(256, "princeton_codeen", 0, 0, FOREVER)]
    rows = [flow(oxid=256, rxid=300)]
    reader = read(made(rows, Shape(vrf=True), tenures=tenures))
    ((_, _, record),) = reader.data
    assert (number(record, 0, 234), number(record, 0, 235)) == (256, 300)
    assert reader.told[7, "vrf", 256] == "princeton_codeen"
    ((_, _, record),) = read(made(rows)).data
    assert (0, 234) not in record


def test_an_enterprise_number_can_be_given():
    ((_, _, record),) = read(made([flow(oxid=256, rxid=300)], Shape(pen=4_000_000_000))).data
    assert facts(record, 4_000_000_000)["xids"] == (256, 300)
    assert (OURS, 1) not in record


def test_each_direction_is_a_record_for_receivers_that_know_no_biflows():
    row = flow("10.0.0.1", "192.0.2.1", nsrc="198.51.100.1", sport=1000, dport=80, nsport=4000,
               opackets=3, obytes=300, rpackets=2, rbytes=200, oxid=256, rxid=300)  # fmt: skip
    silent = flow(opackets=1, obytes=60, flow_id=2)
    reader = read(made([row, silent], Shape(uniflow=True, vrf=True)))
    out, back, alone = sorted(
        (facts(r) | {"turned": number(r, 0, 239), "vrf": number(r, 0, 234)}
         for _, _, r in reader.data), key=lambda f: (f["flow_id"], f["turned"]),
    )  # fmt: skip
    assert (out["src"], out["dst"], out["ports"]) == ("10.0.0.1", "192.0.2.1", (1000, 80))
    assert (out["nsrc"], out["nports"], out["counts"]) == ("198.51.100.1", (4000, 80), (3, 300))
    assert (back["src"], back["dst"], back["ports"]) == ("192.0.2.1", "198.51.100.1", (80, 4000))
    assert (back["ndst"], back["nports"], back["counts"]) == ("10.0.0.1", (80, 1000), (2, 200))
    assert (out["turned"], back["turned"], out["vrf"], back["vrf"]) == (1, 2, 256, 300)
    assert back["xids"] == out["xids"] == (256, 300)
    assert alone["counts"] == (1, 60)
    assert all((REVERSE, 1) not in record for _, _, record in reader.data)


def test_the_answer_to_a_ping_goes_as_an_answer():
    asked = {"sport": 77, "opackets": 1, "rpackets": 1}
    pings = [
        flow(proto=1, dport=8 << 8, flow_id=1, **asked),
        flow("fe80::1", "fe80::2", proto=58, dport=128 << 8, flow_id=2, **asked),
        flow(proto=1, dport=3 << 8 | 1, flow_id=3, **asked),
    ]
    reader = read(made(pings, Shape(uniflow=True)))
    told = {(f["flow_id"], f["src"]): f["icmp"] for f in (facts(r) for _, _, r in reader.data)}
    assert told == {
        (1, "10.0.0.1"): (8 << 8,), (1, "10.0.0.2"): (0,),
        (2, "fe80::1"): (128 << 8,), (2, "fe80::2"): (129 << 8,),
        (3, "10.0.0.1"): (3 << 8 | 1,), (3, "10.0.0.2"): (3 << 8 | 1,),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("192.0.2.9", "192.0.2.9", 4739),
        ("192.0.2.9:2055", "192.0.2.9", 2055),
        ("collector.example:1", "collector.example", 1),
        ("2001:db8::9", "2001:db8::9", 4739),
        ("[2001:db8::9]", "2001:db8::9", 4739),
        ("[2001:db8::9]:2055", "2001:db8::9", 2055),
    ],
)
def test_a_receiver_is_a_host_and_perhaps_a_port(text, host, port):
    target = parse_target(text, "tcp")
    assert (target.host, target.port) == (host, port)


@pytest.mark.parametrize(
    "text", ["", ":1", "host:0", "host:65536", "host:x", "host:-1", "[::1", "[::1]x", "[]"]
)
def test_what_is_no_receiver_is_refused(text):
    with pytest.raises(ValueError, match="is no receiver"):
        parse_target(text, "udp")


U64 = st.integers(0, (1 << 64) - 1)
U16 = st.integers(0, (1 << 16) - 1)
MS = st.integers(0, (1 << 63) - 1)


@st.composite
def any_row(draw):
    """Whatever columns can hold."""
    row = flow(proto=draw(st.sampled_from([1, 6, 17, 58, 255])), reason=draw(st.integers(1, 6)))
    four = draw(st.booleans())
    for name in ("src", "dst", "nsrc", "ndst"):
        row[f"{name}_hi"] = 0 if four else draw(st.integers(1, (1 << 64) - 1))
        low = draw(U64)
        row[f"{name}_lo"] = 0xFFFF << 32 | low & 0xFFFFFFFF if four else low
    for name in ("sport", "dport", "nsport", "ndport", "oxid", "rxid"):
        row[name] = draw(U16)
    for name in ("opackets", "obytes", "rpackets", "rbytes"):
        row[name] = draw(U64)
    return row | {"start": draw(MS), "end": draw(MS), "flow_id": draw(st.integers(0, 2**32 - 1))}


@settings(max_examples=120, deadline=None, derandomize=True)
@given_by(
    st.lists(any_row(), min_size=1, max_size=40),
    st.integers(300, 65535),
    st.lists(st.tuples(st.integers(0, 65535), st.text(max_size=400), MS, MS, MS), max_size=5),
    st.booleans(),
)
def test_whatever_goes_in_comes_out(rows, size, names, vrf):
    tenures = [
        Tenure(xid, name[: size // 8], after, since, until)
        for xid, name, after, since, until in names
        if name.isprintable()
    ]
    # Half of them about xids that are there.
    tenures += [t._replace(xid=row["oxid"]) for t, row in zip(tenures, rows, strict=False)]
    messages = made(rows, Shape(vrf=vrf), size=size, tenures=tenures)
    reader = read(messages)
    key = str
    assert sorted((facts(r) for _, _, r in reader.data), key=key) == sorted(
        map(expected, rows), key=key
    )


def test_scapy_reads_the_same():
    """Its dissector knows no enterprises in records: their elements get numbers of their own."""
    from scapy.layers import netflow as dissect

    rows = some_rows(300, seed=2)
    messages = made(rows, Shape(vrf=True))
    sets = [int.from_bytes(message[16:18]) for message in messages]
    packets = [
        dissect.NetflowHeader(message)
        for message, number in zip(messages, sets, strict=True)
        if number == 2 or number in range(256, 264)  # no options: see above
    ]
    moved = {0: 0, REVERSE: 10_000, OURS: 20_000}
    for flowset in packets[0][dissect.NetflowFlowsetV9].templates:
        for element in flowset.template_fields:
            if element.enterpriseBit:
                at = element.fieldType + moved[element.enterpriseNumber]
                dissect.NetflowV910TemplateFieldTypes[at] = f"moved_{at}"
                element.fieldType = at
    dissect.ipfix_defragment(packets, verb=0)
    found = []
    for packet in packets[1:]:
        assert packet.version == 10
        assert packet.ObservationDomainID == 7
        for record in packet[dissect.NetflowDataflowsetV9].records:
            values = {name: record.getfieldval(name) for name in record.fields}
            found.append(values)
    assert len(found) == 300

    def whole(value):
        return int.from_bytes(value) if isinstance(value, bytes) else value

    seen = {
        (v["IPV4_SRC_ADDR"] if "IPV4_SRC_ADDR" in v else v["IPV6_SRC_ADDR"],
         v["IPV4_DST_ADDR"] if "IPV4_DST_ADDR" in v else v["IPV6_DST_ADDR"],
         whole(v["IN_PKTS"]), whole(v["IN_BYTES"]), whole(v["moved_10002"]),
         whole(v["moved_10001"]), whole(v["moved_20001"]), whole(v["moved_20002"]))
        for v in found
    }  # fmt: skip
    wanted = {(e["src"], e["dst"], *e["counts"], *e["xids"]) for e in map(expected, rows)}
    assert seen == wanted


def test_scapy_reads_options_templates_and_their_records():
    """It takes no enterprise's element for a scope, so it is taught to; lengths it leaves to us."""
    from scapy import fields
    from scapy.layers import netflow as dissect
    from scapy.packet import Packet

    class Element(Packet):
        fields_desc = (
            fields.BitField("enterpriseBit", 0, 1),
            fields.BitField("type", 0, 15),
            fields.ShortField("size", 0),
            fields.ConditionalField(fields.IntField("pen", 0), lambda p: p.enterpriseBit),
        )

        def extract_padding(self, rest):
            return b"", rest

    def elements(name, count):
        return fields.PacketListField(name, [], Element, count_from=count)

    class Taught(Packet):
        fields_desc = (
            *dissect.NetflowOptionsFlowset10.fields_desc[:5],
            elements("scopes", lambda p: p.scope_field_count),
            elements("options", lambda p: p.field_count - p.scope_field_count),
        )

    rows = some_rows(20, seed=3)
    tenures = [Tenure(rows[0]["oxid"], "codeen", 0, 0, FOREVER)]
    packets = [
        (int.from_bytes(message[16:18]), dissect.NetflowHeader(message), message)
        for message in made(rows, Shape(vrf=True), tenures=tenures)
    ]
    plain, taught = {}, {}
    for _, packet, message in (one for one in packets if one[0] == 3):
        read = packet[dissect.NetflowOptionsFlowset10]
        plain[read.templateID] = [(e.scopeFieldType, e.scopeFieldlength) for e in read.scopes] + [
            (e.optionFieldType, e.optionFieldlength) for e in read.options
        ]
        read = Taught(message[16:])
        taught[read.templateID] = [(e.pen, e.type, e.size) for e in (*read.scopes, *read.options)]
    assert taught == {
        272: [(OURS, 1, 2), (None, 371, 65535)],
        273: [(None, 234, 4), (None, 236, 65535)],
        274: [(None, 149, 4), (None, 300, 65535)],
    }
    # As it comes; the enterprise's number it takes for an element.
    assert plain[273] == [(234, 4), (236, 65535)]
    assert plain[274] == [(149, 4), (300, 65535)]
    records = {
        number: packet[dissect.NetflowDataflowsetV9].records[0].fieldValue
        for number, packet, _ in packets
        if number in taught
    }
    xid = rows[0]["oxid"]
    assert records == {
        272: xid.to_bytes(2) + b"\x06codeen",
        273: xid.to_bytes(4) + b"\x06codeen",
        274: (7).to_bytes(4) + b"\x05alpha",
    }
