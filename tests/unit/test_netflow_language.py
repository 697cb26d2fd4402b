"""What the filter language takes, what it says of what it does not take, and how much."""

import re
from importlib.resources import files
from pathlib import Path

import pytest

from netflow.filters import where
from netflow.language import (
    ALL,
    MAX_DEPTH,
    MAX_LENGTH,
    MAX_TESTS,
    MAX_VALUES,
    And,
    FilterError,
    Not,
    Or,
    Test,
    parse,
    values,
)
from netflow.wire import Filter

pytestmark = pytest.mark.unit

A, B, C = Test("port", (1,)), Test("port", (2,)), Test("port", (3,))


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("port 1 and port 2 or port 3", Or((And((A, B)), C))),
        ("port 1 or port 2 and port 3", Or((A, And((B, C))))),
        ("not port 1 and port 2", And((Not(A), B))),
        ("not (port 1 and port 2)", Not(And((A, B)))),
        ("not not port 1", A),
        ("! ! ! port 1", Not(A)),
        ("(((port 1)))", A),
        ("port 1 and (port 2 and port 3)", And((A, B, C))),
        ("(port 1 or port 2) or port 3", Or((A, B, C))),
        ("port 1&&port 2||port 3", Or((And((A, B)), C))),
        ("PORT 1 AND Port 2", And((A, B))),
        ("port 1 # the first\nand # both\n port 2", And((A, B))),
        ("port in [1 2,3, 1]", Test("port", (1, 2, 3))),
        ("port in [1]", A),
        ("port != 1", Not(A)),
        ("\t\n ", ALL),
    ],
)
def test_words_join_as_in_nfdump(text, tree):
    assert parse(text) == tree
    assert parse(str(tree)) == tree


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("src or dst ip 192.0.2.1", "ip 192.0.2.1"),
        ("initiator or initiator port 5", "src port 5"),
        ("responder and originator slice a_b", "src and dst slice a_b"),
        ("in bytes gt 2k", "bytes > 2000"),
        ("OUT BYTES > 1M", "dst bytes > 1000000"),
        ("total packets le 7", "total packets <= 7"),
        ("duration > 1h30m", "duration > 5400000"),
        ("duration 1.5s", "duration 1500"),
        ("net 10.1.2.3 255.0.0.0", "net 10.0.0.0/8"),
        ("net 2001:db8::1/32", "net 2001:db8::/32"),
        ("ip in [10.0.0.1/32]", "ip 10.0.0.1"),
        ("src xip 10.0.0.1", "src nat ip 10.0.0.1"),
        ("dst xnet 10.0.0.0/8", "dst nat net 10.0.0.0/8"),
        ("dst nport > 5", "dst nat port > 5"),
        ("proto 6 or proto in [ipv6 99]", "proto tcp or proto in [ipv6 99]"),
        ("slice 'port'", 'slice "port"'),
        ('slice in [a_* "b c" \'d"e\']', 'slice in [a_* "b c" \'d"e\']'),
        ("inet and inet6", "ipv4 and ipv6"),
        ("state TIME-WAIT", "state time_wait"),
    ],
)
def test_a_tree_is_written_as_a_filter_again(text, written):
    assert str(parse(text)) == written
    assert parse(written) == parse(text)


BAD = {
    "prot tcp": (0, "did you mean `proto`?"),
    "src ip 10.0.0.1 and slcie x": (20, "did you mean `slice`?"),
    "tcp": (0, "write `proto tcp`"),
    "dport 80": (0, "write `dst port`"),
    "proto tpc": (6, "did you mean tcp?"),
    "state establishd": (6, "did you mean established?"),
    "reason close": (7, "did you mean closed?"),
    "flags S and not flags AFRPU": (0, "TCP flags are not recorded; `state` is"),
    "as 559": (0, "AS numbers are not recorded"),
    "tos 4": (0, "is not recorded"),
    "src ip 10.0.0.1 port 80": (16, "join tests by `and` or `or`"),
    "port 80 81": (8, "join tests by `and` or `or`"),
    "port 80)": (7, "')' closes nothing"),
    "(port 80": (8, "a ( is not closed"),
    "()": (1, "expected a test (ip, net,"),
    "port": (4, "expected a port: 80, > 1024, in [80 443]"),
    "port and any": (5, "expected a port"),
    "bytes > or": (8, "expected a value"),
    "any and": (7, "the filter ends too early: expected a test"),
    "src": (3, "expected what of it: ip, net, port"),
    "src proto tcp": (4, "expected what of it: ip, net, port"),
    "src or ip 10.0.0.1": (7, "expected dst or src"),
    "in port 80": (3, "expected bpp, bps, bytes, packets or pps"),
    "slice port": (6, "'port' is a word of filters (in quotes it is a name)"),
    "src or dst bytes > 5": (11, "`total bytes` is of both sides"),
    "port in 80": (8, "expected ["),
    "port in []": (9, "expected a value"),
    "port in [80": (11, "expected a value or ]"),
    "port 65536": (5, "'65536' is not a port: write 0 to 65535"),
    "port 0x50": (5, "is not a port"),
    "port http": (5, "is not a port"),
    "port -1": (5, "is not a port"),
    "port ٣": (5, "is not a port"),
    "xid 99999": (4, "is not an xid: write 0 to 65535"),
    "proto 256": (6, "is not a protocol"),
    "icmp-type 256": (10, "is not an icmp-type: write 0 to 255"),
    "port in [80 443 99999]": (16, "'99999' is not a port"),
    "bytes > 1.5k": (8, "is not an amount: write 1500, 10k"),
    "bytes > 18446744073709551616": (8, "more than is ever counted"),
    "bytes > 99999999t": (8, "more than is ever counted"),
    "duration > 5m": (11, "a million milliseconds: write 5m0s"),
    "duration > soon": (11, "is not a length of time"),
    "ip 10.0.0": (3, "is not an address or a network"),
    "ip www.example.com": (3, "names are not looked up"),
    "ip 10.0.0.0/8": (3, "is a network: write `net 10.0.0.0/8`"),
    "net 10.0.0.0/33": (4, "is not an address or a network"),
    "net 10.0.0.0 255.0.255.0": (4, "is not an address or a network"),
    "ip fe80::1%eth0": (3, "without %"),
    "ip 127.1": (3, "is not an address"),
    "slice ''": (6, "an empty name is nobody's"),
    "slice a[bc]": (7, "join tests by"),
    "slice 'a[bc'": (6, "a [ has no ] that closes it"),
    "slice '[z-a]'": (6, "z-a is the wrong way round"),
    "slice 'a": (6, "this quote is not closed"),
    "port 5 & port 6": (7, "write `&&`"),
    "port 5 | port 6": (7, "write `||`"),
    "port 5; DROP TABLE x": (8, "join tests by `and` or `or`"),
    "port 5;": (5, "'5;' is not a port"),
    "\x00": (0, "expected a test"),
    "a\nb": (0, "expected a test"),
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_filter_points_at_the_word_and_says_what_was_expected(text):
    position, message = BAD[text]
    with pytest.raises(FilterError) as error:
        parse(text)
    said = str(error.value)
    assert (error.value.position, message in said) == (position, True), said
    first, shown, pointer = said.splitlines()
    assert len(first) < 300
    assert pointer.index("^") - 2 == position - (text.rfind("\n", 0, position) + 1)
    assert shown[2:].isprintable()
    # What refuses it in the collector says the same.
    with pytest.raises(FilterError) as refused:
        where(Filter(expression=text))
    assert str(refused.value) == said


def test_the_caret_stands_below_the_word_also_in_later_lines_and_long_ones():
    with pytest.raises(FilterError) as error:
        parse("port 80 and\n\tprotocol tcp\nand any")
    assert str(error.value).splitlines()[1:] == ["   protocol tcp", "   ^~~~~~~~"]
    with pytest.raises(FilterError) as error:
        parse("any and " * 40 + "prot tcp" + " and any" * 40)
    _, shown, pointer = str(error.value).splitlines()
    assert shown[pointer.index("^") :].startswith("prot tcp")
    assert len(pointer.strip()) == len("prot")
    assert shown.startswith("  ...") and shown.endswith("...") and len(shown) < 90


@pytest.mark.parametrize(
    "hostile",
    [
        "(" * MAX_LENGTH,
        "(" * (MAX_DEPTH + 1) + "any" + ")" * (MAX_DEPTH + 1),
        "not " * (MAX_LENGTH // 4),
        "!" * MAX_LENGTH,
        "not (" * (MAX_LENGTH // 5),
        "any or " * (MAX_LENGTH // 8) + "any",
        "port in [" + "1 " * (MAX_VALUES + 1) + "]",
        "[" * MAX_LENGTH,
        "a" * (MAX_LENGTH + 1),
        "port " + "9" * (MAX_LENGTH - 10),
        "bytes > " + "9" * (MAX_LENGTH - 10) + "k",
        "duration > " + "9" * 5000 + "h",
        "net 10.0.0.0/" + "9" * (MAX_LENGTH - 20),
        "\n" * (MAX_LENGTH - 1) + "a",
        "# " + "a" * (MAX_LENGTH - 10) + "\nb",
    ],
    ids=lambda text: text[:12],
)
def test_no_filter_exhausts_anything(hostile):
    with pytest.raises(FilterError) as error:
        parse(hostile)
    assert len(str(error.value)) < 1000


def test_the_limits_leave_room():
    assert parse("(" * MAX_DEPTH + "any" + ")" * MAX_DEPTH) == ALL
    assert len(parse(" or ".join(f"port {n}" for n in range(MAX_TESTS - 1))).parts) == MAX_TESTS - 1
    assert len(parse(f"port in [{' '.join(map(str, range(MAX_VALUES)))}]").values) == MAX_VALUES
    deep = "any"
    for n in range(MAX_DEPTH):
        deep = f"not (port {n} or {deep})" if n % 2 else f"(port {n} and {deep})"
    assert parse(str(parse(deep))) == parse(deep)


def test_every_word_and_every_example_is_in_the_manual():
    page = (Path(__file__).parents[2] / "docs" / "filter.md").read_text()
    grammar = files("netflow.language").joinpath("grammar.lark").read_text()
    words = re.findall(r'^[A-Z0-9_]+: "([a-z0-9-]+)"i$', grammar, re.MULTILINE)
    assert len(words) > 40
    code = " ".join(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL)))
    assert [word for word in words if not re.search(rf"(?<![\w-]){word}(?![\w-])", code)] == []
    examples = page.split("## Examples")[1].split("##")[0]
    for example in re.findall(r"^\| `(.+?)` \|", examples, re.MULTILINE):
        assert parse(example) != ALL


NASTY = ["'; DROP TABLE flows; --", "a' OR '1'='1", "$p0", "%", "\\", "{0}", "$$", "a_b%", "✓"]


@pytest.mark.parametrize("value", NASTY)
def test_values_are_parameters_and_never_part_of_the_text(value):
    quoted = f'"{value}"'
    condition, params = where(Filter(expression=f"slice {quoted} and not node {quoted}"))
    assert value not in condition or value in ("$p0", "$$")
    assert condition == where(Filter(expression="slice x and not node y"))[0]
    assert set(params.values()) == {value}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a*", r"a.*"),
        ("a**?", r"a.*."),
        ("a.b", r"a\.b"),
        ("[a-c]x", r"[a-c]x"),
        ("[!ab]", r"[^ab]"),
        ("[a^-]", r"[a\^\-]"),
        ("a\\b", r"a\\b"),
    ],
)
def test_patterns_become_expressions_that_take_no_more_than_linear_time(pattern, expected):
    assert values.regex(pattern) == expected
