"""What a filter matches, on records in a store and in closed files alike."""

from contextlib import closing

import pytest
from storebed import SEC, T0, flow, put, tenures

from netflow import history, names, store
from netflow.filters import implied, where
from netflow.history import archive
from netflow.node import Node
from netflow.wire import Filter

pytestmark = pytest.mark.unit

HOUR = 3600
RECORDS = {
    "web": flow("10.0.0.1", "192.0.2.7", sport=40000, dport=80, opackets=10, obytes=5000,
                rpackets=20, rbytes=2_000_000, oxid=7, start=0, end=2, tcp_state=7),
    "mail": flow("10.0.0.2", "198.51.100.9", sport=40001, dport=25, opackets=3, obytes=180,
                 oxid=8, start=1, end=1, reason=1, tcp_state=1, zone=5),
    "dns": flow("10.0.0.1", "192.0.2.53", proto=17, sport=50000, dport=53, opackets=1, obytes=60,
                rpackets=1, rbytes=200, oxid=7, start=2, end=2.25, reason=1),
    "nat": flow("10.0.0.3", "203.0.113.5", sport=1234, dport=443, nsrc="192.0.2.200", nsport=61000,
                opackets=4, obytes=2**40, rpackets=2, rbytes=2**64 - 1, oxid=9, start=3, end=13),
    "dnat": flow("198.51.100.77", "192.0.2.200", sport=5555, dport=8080, ndst="10.0.0.4",
                 ndport=80, opackets=5, obytes=500, rxid=7, start=4, end=5),
    "six": flow("2001:db8::1", "2001:db8:1::80", sport=33333, dport=80, opackets=7, obytes=700,
                oxid=8, rxid=0, start=5, end=6, reason=3, tcp_state=3),
    "ping": flow("10.0.0.2", "192.0.2.7", proto=1, sport=80, dport=8 << 8, opackets=2, obytes=168,
                 rpackets=2, rbytes=168, oxid=8, start=6, end=7, reason=1),
    "ping6": flow("2001:db8::1", "2001:db8::2", proto=58, sport=9, dport=128 << 8 | 0, opackets=1,
                  obytes=104, oxid=8, start=7, end=7, reason=1),
    "local": flow("10.0.0.1", "10.0.0.2", sport=2000, dport=22, opackets=9, obytes=900,
                  rpackets=9, rbytes=900, oxid=7, rxid=8, start=8, end=9, reason=2),
    "gre": flow("10.0.0.9", "192.0.2.9", proto=47, sport=0, dport=0, opackets=1, obytes=99,
                oxid=99, start=9, end=10, reason=6),
}  # fmt: skip
NAMES = tenures((7, "princeton_web", -100, None), (8, "princeton_mail", -100, None),
                (9, "inria_p2p", -100, None))  # fmt: skip


class Asked:
    """The same records twice: in the database, and in a file."""

    def __init__(self, path):
        self.beds = []
        for kind in ("hot", "closed"):
            kept = history.open_store(path / kind, Node("alpha", 1))
            store.begin_run(kept, store.Mark(T0))
            put(kept, *(r | {"flow_id": n + 1} for n, r in enumerate(RECORDS.values())))
            if kind == "closed":
                store.commit(kept, None, store.Mark(T0 + 2 * HOUR * SEC))
                cursor = kept.con.cursor()
                keeping = history.Keeping()
                made = archive.Archiver(kept, cursor, keeping, path / "registry.db")
                assert archive.close_segments(made) == 1
            self.beds.append(kept)

    def __call__(self, text, **more):
        condition, params = where(Filter(expression=text, **more))
        answers = []
        for kept in self.beds:
            with closing(kept.con.cursor()) as con, history.reading(con):
                records = history.source(con)
                rows = con.execute(
                    f"WITH {names.CTE} SELECT epoch_ns(start_time), src_lo, sport"
                    f" FROM ({records.sql}) f {names.join('o', 'o')} {names.join('r', 'r')}"
                    f" WHERE {condition}",
                    params | records.params | NAMES.params,
                ).fetchall()
            answers.append(sorted(_NAMED[row] for row in rows))
        assert answers[0] == answers[1]
        return answers[0]


_NAMED = {(r["start"], r["src_lo"], r["sport"]): name for name, r in RECORDS.items()}


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    made = Asked(tmp_path_factory.mktemp("language"))
    yield made
    for kept in made.beds:
        kept.con.close()


ALL = sorted(RECORDS)
FOUR = sorted(set(ALL) - {"six", "ping6"})
MATCHES = {
    # everything
    "": ALL,
    "any": ALL,
    "not any": [],
    "# a comment alone": ALL,
    # addresses, before or after translation
    "ip 10.0.0.1": ["dns", "local", "web"],
    "host 10.0.0.1 and not ip 10.0.0.2": ["dns", "web"],
    "src ip 10.0.0.2": ["mail", "ping"],
    "dst ip 10.0.0.2": ["local"],
    "initiator ip 10.0.0.2": ["mail", "ping"],
    "originator host 10.0.0.2": ["mail", "ping"],
    "responder ip 10.0.0.2": ["local"],
    "src or dst ip 10.0.0.2": ["local", "mail", "ping"],
    "src and dst net 10.0.0.0/24": ["local"],
    "ip 192.0.2.200": ["dnat", "nat"],
    "src ip 192.0.2.200": ["nat"],
    "src ip 10.0.0.3": ["nat"],
    "dst ip 10.0.0.4": ["dnat"],
    "dst ip 192.0.2.200": ["dnat"],
    "nat ip 192.0.2.200": ["nat"],
    "src nat ip 192.0.2.200": ["nat"],
    "dst nat ip 192.0.2.200": [],
    "nat ip 10.0.0.4": ["dnat"],
    "nip 10.0.0.4": ["dnat"],
    "dst xip 10.0.0.4": ["dnat"],
    "nat ip 10.0.0.1": [],
    "not nat ip 10.0.0.4": sorted(set(ALL) - {"dnat"}),
    "nat": ["dnat", "nat"],
    "not nat": sorted(set(ALL) - {"dnat", "nat"}),
    "nat net 192.0.2.0/24": ["nat"],
    "xnet 10.0.0.0/8": ["dnat"],
    "ip in [10.0.0.9, 198.51.100.9 2001:db8::2]": ["gre", "mail", "ping6"],
    "ip in [198.51.100.0/24]": ["dnat", "mail"],
    "dst net 192.0.2.0/26": ["dns", "gre", "ping", "web"],
    "dst net 192.0.2.0 255.255.255.192": ["dns", "gre", "ping", "web"],
    "net 192.0.2.99/24": ["dnat", "dns", "gre", "nat", "ping", "web"],
    "net 2001:db8::/32": ["ping6", "six"],
    "net 2001:db8:1::/48": ["six"],
    "net 2001:db8::/126": ["ping6", "six"],
    "net ::/0": ["ping6", "six"],
    "net 0.0.0.0/0": FOUR,
    "ip ::ffff:10.0.0.9": ["gre"],
    "inet": FOUR,
    "ipv4": FOUR,
    "inet6": ["ping6", "six"],
    "ipv6 and proto tcp": ["six"],
    # ports: never ICMP's
    "port 80": ["dnat", "six", "web"],
    "dst port 80": ["dnat", "six", "web"],
    "src port 80": [],
    "port 8080": ["dnat"],
    "nat port 80": ["dnat"],
    "src nport 61000": ["nat"],
    "dst nport 61000": [],
    "port in [22 25,53]": ["dns", "local", "mail"],
    "port > 60000": ["nat"],
    "src port < 1024": ["gre"],
    "src port lt 1 ": ["gre"],
    "dst port >= 443": ["dnat", "nat"],
    "src and dst port > 1000": ["dnat"],
    "dst port <= 22": ["gre", "local"],
    "not port >= 0": ["ping", "ping6"],
    "port != 80": sorted(set(ALL) - {"dnat", "six", "web"}),
    "port ne 80": sorted(set(ALL) - {"dnat", "six", "web"}),
    # protocols
    "proto tcp": ["dnat", "local", "mail", "nat", "six", "web"],
    "proto 17": ["dns"],
    "proto UDP": ["dns"],
    "proto in [icmp icmp6 gre]": ["gre", "ping", "ping6"],
    "proto = ipv6-icmp": ["ping6"],
    "icmp-type 8": ["ping"],
    "icmp-type in [8 128]": ["ping", "ping6"],
    "icmp-type > 100": ["ping6"],
    "icmp-code 0": ["ping", "ping6"],
    "not icmp-code 0": sorted(set(ALL) - {"ping", "ping6"}),
    # counters
    "bytes > 1k": ["nat", "web"],
    "bytes > 1g": ["nat"],
    "bytes = 5k": ["web"],
    "bytes eq 5000": ["web"],
    "in bytes >= 5000": ["nat", "web"],
    "initiator bytes >= 5000": ["nat", "web"],
    "out bytes > 1m": ["nat", "web"],
    "responder bytes = 18446744073709551615": ["nat"],
    "dst bytes 0 and packets 1": ["gre", "ping6"],
    "total bytes in [260 1800]": ["dns", "local"],
    "total bytes > 18446744073709551615": ["nat"],
    "packets > 8": ["local", "web"],
    "out packets > 8": ["local", "web"],
    "total packets >= 18": ["local", "web"],
    "duration 0": ["mail", "ping6"],
    "duration = 250": ["dns"],
    "duration > 1s": ["nat", "web"],
    "duration <= 250ms": ["dns", "mail", "ping6"],
    "duration ge 10s": ["nat"],
    "bps = 20000": ["web"],
    "bps > 100g": ["nat"],
    "pps 5": ["dnat", "web"],
    "out pps 10": ["web"],
    "total pps = 15": ["web"],
    "bpp 500": ["web"],
    "bpp 0": [],
    "out bpp 0": sorted(set(ALL) - {"web", "dns", "nat", "ping", "local"}),
    # owners
    "slice princeton_web": ["dnat", "dns", "local", "web"],
    "src slice princeton_web": ["dns", "local", "web"],
    "initiator slice princeton_web": ["dns", "local", "web"],
    "dst slice princeton_web": ["dnat"],
    "responder slice princeton_*": ["dnat", "local"],
    "src and dst slice princeton_*": ["local"],
    "slice *_p2p": ["nat"],
    "slice *": sorted(set(ALL) - {"gre"}),
    "not slice *": ["gre"],
    "slice princeton_????": ["local", "mail", "ping", "ping6", "six"],
    'slice "princeton_[a-m]*"': ["local", "mail", "ping", "ping6", "six"],
    'slice "princeton_[!m]*"': ["dnat", "dns", "local", "web"],
    "slice in [inria_p2p, princeton_w*]": ["dnat", "dns", "local", "nat", "web"],
    "slice PRINCETON_WEB": [],
    "slice princeton": [],
    "slice '%'": [],
    "xid 7": ["dnat", "dns", "local", "web"],
    "responder xid 0": sorted(set(ALL) - {"dnat", "local"}),
    "xid > 9": ["gre"],
    "src xid in [9 99]": ["gre", "nat"],
    "src and dst xid > 0": ["local"],
    "xid != 0": ["local"],
    "node alpha": ALL,
    "node al*": ALL,
    "node beta": [],
    "not node in [beta gamma]": ALL,
    # how it ended
    "reason idle": ["dns", "mail", "ping", "ping6"],
    "reason in [active, cut]": ["gre", "six"],
    "state syn_sent": ["mail"],
    "state syn-sent": ["mail"],
    "state none": ["dnat", "local", "nat"],
    "zone 5": ["mail"],
    "zone > 0": ["mail"],
    # joined
    "port 80 or port 25 and proto udp": ["dnat", "six", "web"],
    "(port 80 or port 53) and proto udp": ["dns"],
    "not proto tcp and not proto udp": ["gre", "ping", "ping6"],
    "! proto tcp && (proto udp || proto 47)": ["dns", "gre"],
    "not (slice inria_* or nat ip 10.0.0.4) and proto tcp": ["local", "mail", "six", "web"],
    "NOT PROTO TCP AND SRC IP 10.0.0.1": ["dns"],
    "proto udp or # first\n proto gre # second": ["dns", "gre"],
}


@pytest.mark.parametrize("text", MATCHES)
def test_a_filter_matches_these_records_and_no_others(asked, text):
    assert asked(text) == MATCHES[text]


def test_every_way_to_narrow_a_question_counts(asked):
    assert asked("port 80", proto=[6], src=["10.0.0.0/8"]) == ["web"]
    assert asked("port 80 or port 53", slices=["princeton_web"], side="responder") == ["dnat"]
    assert asked("port 80 or any", dport=[25]) == ["mail"]


def test_long_lists_match_as_short_ones_do(asked):
    many = [f"172.{16 + n // 200}.{n % 200}.0/{24 + n % 9}" for n in range(800)]
    assert asked(f"ip in [{' '.join(many)}]") == []
    assert asked(f"ip in [{' '.join(many)} 10.0.0.9 192.0.2.53/32]") == ["dns", "gre"]
    assert asked(f"not src ip in [{' '.join([*many, '10.0.0.0/8'])}]") == ["dnat", "ping6", "six"]
    six = [f"2001:db8:{n:x}::/{length}" for n in range(2, 202) for length in (48, 60, 64, 96)]
    assert asked(f"ip in [{' '.join(six)}]") == []
    assert asked(f"ip in [{' '.join(six)} 2001:db8:1::/48]") == ["six"]
    assert asked(f"ip in [{' '.join(six)} 2001:db8::2]") == ["ping6"]
    # on both sides of the largest number with a sign
    local = " ".join(f"fe80::{n}" for n in range(1, 9))
    assert asked(f"ip in [{local} ffff:: 2001:db8::2]") == ["ping6"]
    assert asked(f"ip in [{local} ffff:: 2001:db8::3]") == []
    # As much as fits into a filter, within the memory that a question may take.
    lists = [
        " ".join(f"10.{n}.{k}.{k}/{length}" for n in range(2, 142))
        for k, length in enumerate(range(24, 31))
    ]
    assert asked(" or ".join(f"ip in [{few}]" for few in lists)) == []
    lists = [" ".join(f"10.{k}.{n // 200}.{n % 200}" for n in range(490)) for k in (1, 2)]
    assert asked(" or ".join(f"ip in [{few}]" for few in lists)) == []
    ports = " ".join(map(str, range(81, 1000)))
    assert asked(f"dst port in [{ports}]") == ["nat"]


IMPLIED = {
    "dst ip 192.0.2.7 and bytes > 5": {"dst": ["192.0.2.7/32"]},
    "src net 10.0.0.0/8 and port in [80 443]": {"src": ["10.0.0.0/8"], "port": [80, 443]},
    "host 2001:db8::1 and proto udp": {"addr": ["2001:db8::1/128"], "proto": [17]},
    "responder slice princeton_web": {"slices": ["princeton_web"], "side": "responder"},
    "xid 7 and node alpha and dst port 80": {"xids": [7], "nodes": ["alpha"], "dport": [80]},
    "(slice a and slice b) and xid 5": {"slices": ["a"]},
    "dst ip 192.0.2.7 or dst ip 192.0.2.8": {"dst": ["192.0.2.7/32", "192.0.2.8/32"]},
    "proto udp and (port 53 or port 123)": {"proto": [17], "port": [53, 123]},
    "dst ip 192.0.2.7 or src ip 192.0.2.8": {},
    "port 53 or port > 123": {},
    "port > 53 or port > 123": {},
    "not dst ip 192.0.2.7": {},
    "slice princeton_*": {},
    "port > 80": {},
    "src and dst ip 10.0.0.1": {},
    "nat ip 10.0.0.1 and src nat port 5": {},
}


@pytest.mark.parametrize("text", IMPLIED)
def test_what_a_filter_says_of_all_its_records_counts_as_options(asked, text):
    assert implied(Filter(expression=text)) == Filter(expression=text, **IMPLIED[text])
    assert set(asked(text)) <= set(asked("any", **IMPLIED[text]))


def test_options_given_stay_as_they_are():
    given = Filter(expression="dst ip 10.0.0.1 and slice a and port 5", dst=["10.0.0.2"], xids=[3])
    assert implied(given) == Filter(
        expression=given.expression, dst=["10.0.0.2"], xids=[3], port=[5]
    )
