"""The filter language with made-up texts and trees: what is read, written, and matched."""

import operator
import re
from contextlib import closing
from ipaddress import IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storebed import T0, flow, put, tenures

from netflow import history, names, protocols, store
from netflow.filters import where
from netflow.history import archive
from netflow.language import ALL, All, And, FilterError, Not, Or, Test, parse, values
from netflow.language.sql import bounds, condition
from netflow.language.tree import COUNTERS, joined, negated
from netflow.node import Node
from netflow.wire import Filter

pytestmark = pytest.mark.unit

HERE = "alpha"
MAX = (1 << 64) - 1
SLICES = {7: "princeton_web", 8: "princeton_mail", 9: "inria_p2p"}
FOUR = ["10.0.0.1", "10.0.0.2", "10.1.2.3", "192.0.2.7", "192.0.2.200", "255.255.255.255"]
SIX = ["2001:db8::1", "2001:db8:0:1::", "fe80::ffff:ffff:ffff:ffff", "::1", "::ffff:0:0:1"]
# -- records, and what a filter means for one of them: the plain way ---------------------------

EDGE = [0, 1, 2, 40, 1000, 1500, 10**6, 2**40, MAX]
ports = st.sampled_from([0, 1, 22, 80, 443, 1024, 40000, 65535])


@st.composite
def records(draw):
    addresses = draw(st.sampled_from([FOUR, SIX]))
    address = st.sampled_from(addresses)
    src, dst = draw(address), draw(address)
    proto = draw(st.sampled_from([1, 6, 6, 17, 47, 58]))
    start = draw(st.sampled_from([0, 1, 5]))
    dport = draw(ports)
    if proto in (1, 58):
        dport = draw(st.sampled_from([0, 1, 8, 128])) << 8 | draw(st.sampled_from([0, 1, 4]))
    one = flow(
        src, dst, proto=proto, sport=draw(ports), dport=dport, start=start,
        end=start + draw(st.sampled_from([0, 0.25, 1, 2, 60])),
        nsrc=draw(address) if draw(st.booleans()) else src,
        ndst=draw(address) if draw(st.booleans()) else dst,
        opackets=draw(st.sampled_from(EDGE)), obytes=draw(st.sampled_from(EDGE)),
        rpackets=draw(st.sampled_from(EDGE)), rbytes=draw(st.sampled_from(EDGE)),
        oxid=draw(st.sampled_from([0, 7, 8, 9, 99])), rxid=draw(st.sampled_from([0, 7, 8, 99])),
        reason=draw(st.integers(1, 6)), tcp_state=draw(st.integers(0, 9)),
        zone=draw(st.sampled_from([0, 0, 5, 65535])),
    )  # fmt: skip
    if draw(st.booleans()):
        one |= {"nsport": draw(ports)}
    return one


COMPARE = {"=": operator.eq, "<": operator.lt, "<=": operator.le, ">": operator.gt,
           ">=": operator.ge}  # fmt: skip
ICMP = (1, 58)


def matches(tree, r):
    """Whether a record, as a store was given it, is one that a filter means."""
    match tree:
        case All():
            return True
        case Not(part):
            return not matches(part, r)
        case And(parts):
            return all(matches(part, r) for part in parts)
        case Or(parts):
            return any(matches(part, r) for part in parts)
    what, side = tree.what, tree.side

    def either(of):
        if side in ("src", "dst"):
            return of(side)
        return (all if side == "both" else any)(of(one) for one in ("src", "dst"))

    def number(value):
        return any(COMPARE[tree.comparison](value, wanted) for wanted in tree.values)

    def named(name):
        return name is not None and any(re.fullmatch(glob(v), name) for v in tree.values)

    def address(column):
        found = r[f"{column}_hi"] << 64 | r[f"{column}_lo"]
        for network in tree.values:
            low, high = bounds(network)
            is_four = found >> 32 == 0xFFFF
            if low <= found <= high and is_four == (network.version == 4):
                return True
        return False

    def changed(side):
        return any(r[f"n{side}_{half}"] != r[f"{side}_{half}"] for half in ("hi", "lo"))

    def xid(side):
        return r["oxid" if side == "src" else "rxid"]

    def counter(kind):
        sides = {"src": "o", "dst": "r", "total": "or"}[side]
        return sum(r[f"{one}{kind}"] for one in sides)

    def port(n):
        return either(lambda s: number(r[f"{n}{s[0]}port"]))

    ms = r["end"] // 10**6 - r["start"] // 10**6
    icmp = r["proto"] in ICMP
    match what:
        case "ip":
            return either(lambda s: address(s) or address(f"n{s}"))
        case "nat ip":
            return either(lambda s: address(f"n{s}") and changed(s))
        case "port":
            return not icmp and either(
                lambda s: number(r[f"{s[0]}port"]) or number(r[f"n{s[0]}port"])
            )
        case "nat port":
            return not icmp and either(
                lambda s: number(r[f"n{s[0]}port"]) and r[f"n{s[0]}port"] != r[f"{s[0]}port"]
            )
        case "nat":
            moved = any(r[f"n{s}port"] != r[f"{s}port"] for s in "sd")
            return changed("src") or changed("dst") or (not icmp and moved)
        case "xid":
            return either(lambda s: number(xid(s)))
        case "slice":
            return either(lambda s: named(SLICES.get(xid(s))))
        case "node":
            return named(HERE)
        case "state":
            return r["proto"] == 6 and number(r["tcp_state"])
        case "icmp-type":
            return icmp and number(r["dport"] >> 8)
        case "icmp-code":
            return icmp and number(r["dport"] & 255)
        case "family":
            return tree.values == (4 if r["src_hi"] == 0 and r["src_lo"] >> 32 == 0xFFFF else 6,)
        case "duration":
            return number(ms)
        case "bytes" | "packets":
            return number(counter(what))
        case "bps":
            return number(8000 * counter("bytes") // ms if ms else 0)
        case "pps":
            return number(1000 * counter("packets") // ms if ms else 0)
        case "bpp":
            packets = counter("packets")
            return number(counter("bytes") // packets if packets else 0)
    return number(r[what])


def glob(pattern):
    return "".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in pattern)


# -- trees -----------------------------------------------------------------------------------


def several(element, most=4):
    return st.lists(element, min_size=1, max_size=most, unique=True).map(tuple)


networks = st.one_of(
    st.builds(lambda a, n: values.network(f"{a}/{n}"), st.sampled_from(FOUR), st.integers(0, 32)),
    st.builds(lambda a, n: values.network(f"{a}/{n}"), st.sampled_from(SIX), st.integers(0, 128)),
    st.sampled_from([ip_network(a) for a in FOUR + SIX]),
)
no_side = st.just("any")


def alike(pool, bits):
    """Many networks of one length, of which some are likely to hold something."""
    address = st.sampled_from(pool).map(ip_address) | st.integers(0, 2**bits - 1).map(
        ip_address if bits == 32 else IPv6Address
    )
    return st.integers(1, bits).flatmap(
        lambda n: several(address.map(lambda a: values.network(f"{a}/{n}")), 9)
    )


sides = st.sampled_from(["any", "src", "dst", "both"])
slices = st.sampled_from([*SLICES.values(), "*", "princeton_*", "*_p2p", "inria_?2*", "x", "any",
                          "AND", "a b", "it's", 'say "x"', "%", "icmp-type", "_", "("])  # fmt: skip


def numbers(what, element, side=no_side):
    one = st.builds(
        lambda value, comparison, side: Test(what, (value,), comparison, side),
        element, st.sampled_from(["=", "<", "<=", ">", ">="]), side,
    )  # fmt: skip
    return one | st.builds(lambda few, side: Test(what, few, "=", side), several(element), side)


def named(what, element, side=no_side):
    return st.builds(lambda few, side: Test(what, few, "=", side), several(element), side)


port = st.integers(0, 65535) | ports
tests = st.one_of(
    named("ip", networks, sides),
    st.builds(
        lambda few, side: Test("ip", few, "=", side), alike(FOUR, 32) | alike(SIX, 128), sides
    ),
    named("nat ip", networks, sides),
    numbers("port", port, sides),
    numbers("nat port", port, sides),
    st.just(Test("nat")),
    numbers("xid", st.sampled_from([0, 7, 8, 9, 99, 65535]), sides),
    named("slice", slices, sides),
    named("node", st.sampled_from([HERE, "al*", "beta"])),
    numbers("duration", st.sampled_from([0, 249, 250, 1000, 60_000, MAX])),
    named("proto", st.sampled_from(sorted(protocols.NAMES)) | st.integers(0, 255)),
    numbers("icmp-type", st.integers(0, 255)),
    numbers("icmp-code", st.sampled_from([0, 1, 4, 255])),
    st.sampled_from([4, 6]).map(lambda version: Test("family", (version,))),
    named("reason", st.sampled_from(sorted(protocols.REASONS))),
    named("state", st.integers(0, len(protocols.TCP_STATES) - 1)),
    numbers("zone", st.sampled_from([0, 5, 65535])),
    *(
        numbers(what, st.sampled_from(EDGE) | st.integers(0, MAX), st.sampled_from(
            ["src", "dst", "total"]
        ))
        for what in COUNTERS
    ),
)  # fmt: skip
trees = st.recursive(
    tests | tests.map(Not) | st.just(ALL),
    lambda inner: st.one_of(
        inner.map(negated),
        st.lists(inner, min_size=2, max_size=4).map(lambda parts: joined(And, parts)),
        st.lists(inner, min_size=2, max_size=4).map(lambda parts: joined(Or, parts)),
    ),
    max_leaves=12,
)
fuzzed = settings(deadline=None, derandomize=True, database=None)


@settings(fuzzed, max_examples=400)
@given(trees)
def test_what_is_written_is_read_back_the_same(tree):
    assert parse(str(tree)) == tree


# -- texts -----------------------------------------------------------------------------------

WORDS = r"""
any not and or ! && || ( ) [ ] , = == != < <= > >= eq ne lt le gt ge in out total src dst initiator
originator responder inet ipv4 inet6 ipv6 nat ip host net port nip xip xnet nport xport xid slice
node bytes packets bps pps bpp duration proto icmp-type icmp-code reason state zone flags tcp udp
10.0.0.1 10.0.0.0/8 2001:db8::/32 255.0.0.0 :: 1 80 443 65536 1k 2m 3g 1.5k 2s 1h30m 5ms closed
established a* "x y" 'z' " ' & | # \ % $p0 é 0 -1
"""
likely = st.lists(st.sampled_from(WORDS.split()), max_size=25).map(" ".join)
mangled = st.builds(
    lambda tree, at, junk: (text := str(tree))[: at % (len(text) + 1)] + junk + text[at:],
    trees, st.integers(0, 200), st.text(max_size=3),
)  # fmt: skip


@settings(fuzzed, max_examples=800)
@given(st.one_of(st.text(max_size=200), likely, mangled))
def test_any_text_is_a_filter_or_is_refused_at_a_place_in_it(text):
    try:
        tree = parse(text)
    except FilterError as error:
        assert 0 <= error.position <= len(text)
        [message, shown, pointer] = str(error).rsplit("\n", 2)
        assert message and shown.isprintable() and re.fullmatch(r" *\^~*", pointer)
        with pytest.raises(FilterError):
            where(Filter(expression=text or " "))
    else:
        assert parse(str(tree)) == tree
        sql, params = where(Filter(expression=text))
        assert set(re.findall(r"\$(p\d+)\b", sql)) == set(params)


# -- both meanings ---------------------------------------------------------------------------

COUNT = 160
HOUR = 3600 * 10**9


def sample():
    """Records that are the same in each run; each is a later part of its connection."""
    rows = []

    @settings(fuzzed, max_examples=COUNT)
    @given(records())
    def collect(row):
        rows.append(row)

    collect()
    return [row | {"flow_id": n + 1, "flow_start": row["start"] - 1} for n, row in enumerate(rows)]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The records, half of them in the database and half in a file; and a way to ask."""
    rows, path = sample(), tmp_path_factory.mktemp("fuzz")
    kept = history.open_store(path, Node(HERE, 1))
    store.begin_run(kept, store.Mark(T0))
    put(kept, *rows[::2])
    store.commit(kept, None, store.Mark(T0 + 2 * HOUR))
    cursor = kept.con.cursor()
    made = archive.Archiver(kept, cursor, history.Keeping(), path / "registry.db")
    assert archive.close_segments(made) == 1
    put(kept, *rows[1::2])
    known = tenures(*((xid, name, -100, None) for xid, name in SLICES.items())).params

    def ask(asked):
        """For each tree, the numbers of the records that it matches: in one go."""
        params = {}

        def keep(value):
            params[f"p{len(params)}"] = value
            return f"$p{len(params) - 1}"

        tests = ", ".join(f"({condition(parse(str(tree)), keep)}) IS TRUE" for tree in asked)
        with closing(kept.con.cursor()) as con, history.reading(con):
            found = history.source(con)
            sql = (
                f"WITH {names.CTE} SELECT flow_id, {tests} FROM ({found.sql}) f"
                f" {names.join('o', 'o')} {names.join('r', 'r')}"
            )
            answer = con.execute(sql, params | found.params | known).fetchall()
        assert len(answer) == len(rows)
        return [{row[0] for row in answer if row[n + 1]} for n in range(len(asked))]

    yield rows, ask
    kept.con.close()


@settings(fuzzed, max_examples=60)
@given(st.lists(trees, min_size=8, max_size=8))
def test_sql_matches_what_the_plain_meaning_matches(stored, asked):
    rows, ask = stored
    for tree, found in zip(asked, ask(asked), strict=True):
        assert found == {row["flow_id"] for row in rows if matches(tree, row)}, str(tree)
