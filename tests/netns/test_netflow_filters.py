"""The filter language on the command line and in a collector: real connections with owners."""

import socket

import pytest
from netflowbed import NETFLOW, accounting, collector, connmark, loads
from vnet.testing.net import HERE

from netflow import client, wire
from vnet import registry

pytestmark = pytest.mark.netns

A, B = 256, 257


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A collector that has recorded a ping to oneself from one slice to the other, v4 and v6."""
    from vnet.testing.net import namespace

    base = tmp_path_factory.mktemp("filters")
    requests = [registry.Request("princeton_codeen", A), registry.Request("inria_p2p", B)]
    registry.assign(base / "registry.db", requests, now_ns=1)
    with namespace() as node:
        node.run("ip", "link", "set", "lo", "up")
        accounting(node, lasting=600)
        connmark(node, B << 16 | A)
        connmark(node, A << 16, tool="ip6tables")
        with collector(node, base, "--node", "alpha") as flows:
            node.run("ping", "-q", "-c", "3", "127.0.0.1")
            node.run("ping", "-q", "-c", "1", "::1")
            flows.records()  # asks until they are there
            yield flows


def found(asked, *words, command="query"):
    """The destinations of what a command finds."""
    told = loads(asked.cli(command, *words, "-o", "json").stdout)
    return sorted({record["dst"] for record in told["records"]})


@pytest.mark.parametrize(
    ("words", "destinations"),
    [
        ("slice princeton_codeen", ["127.0.0.1", "::1"]),
        ("initiator slice princeton_*", ["127.0.0.1"]),
        ("responder slice princeton_* and node al*", ["::1"]),
        ("slice inria_p2p and packets eq 3", ["127.0.0.1"]),
        ("not slice *", []),
        ("icmp-type 8 and src net 127.0.0.0/8", ["127.0.0.1"]),
        ("port 0 or nat", []),
    ],
)
def test_words_on_the_command_line_are_a_filter_quoted_or_not(asked, words, destinations):
    assert found(asked, words) == destinations
    assert found(asked, *words.split()) == destinations


def test_a_filter_narrows_sums_as_well(asked):
    [row] = loads(asked.cli("top", "initiator", "slice", "*", "-o", "json").stdout)["slices"][:1]
    assert row["out_packets"] == 3


def test_a_bad_filter_is_pointed_at_without_a_collector(tmp_path):
    words = ["src", "ip", "10.0.0.1", "and", "prot", "tcp"]
    told = HERE.run(*NETFLOW, "query", *words, "--socket", str(tmp_path / "none"), check=False)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.splitlines() == [
        "netflow: 'prot' is not a word of filters: did you mean `proto`?",
        "  src ip 10.0.0.1 and prot tcp",
        "                      ^~~~",
    ]


def test_a_collector_refuses_what_the_command_would(asked):
    """Whoever writes to the socket himself gets the same words, and the collector goes on."""
    for text in ("src ip 10.0.0.1 and prot tcp", "(" * 30_000, "port 80 \x1b[31m", "slice '"):
        question = wire.Flows(filter=wire.Filter(expression=text))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.connect(str(asked.socket))
            link.sendall(wire.encode(question))
            said = loads(link.makefile().read())
        command = HERE.run(*NETFLOW, "query", text, "--socket", str(asked.socket), check=False)
        assert command.returncode == 2
        assert command.stderr == f"netflow: {said['error']}\n"
    with client.asking(asked.socket, wire.Flows(filter=wire.Filter(expression="any"))) as answer:
        assert len(list(answer)) >= 2


def test_a_slice_can_be_asked_for_by_any_name(asked):
    """Values are parameters: none of these is a name here, and none does anything else."""
    for name in ("'; DROP TABLE segments; --", "x' OR '1'='1", "$p0", "*[!a]", "%"):
        quote = '"' if "'" in name else "'"
        assert len(found(asked, f"slice {quote}{name}{quote}")) == (2 if name == "*[!a]" else 0)
