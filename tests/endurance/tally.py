"""What rules of the test's own count: packets, and owners that cannot be."""

import json

from vnet.testing.net import Namespace

FIRST_A, FIRST_NODE, LAST = 20_000, 28_000, 31_999
"""Local ports: of slice a's makers from the first on, of the node's from the second."""
SERVER = "17000-17007"

_COUNTERS = ("out", "in", "syn", "asked", "answered", "wrong", "bare", "carried", "reopened")

_TABLE = """
table inet tally {{
    {counters}
    # After mangle (-150), where packets get their marks.
    chain post {{
        type filter hook postrouting priority -140
        counter name out
        {post}
        {syn} tcp dport 17000-17008 counter name syn
        udp dport {server} counter name asked
        udp sport {server} counter name answered
    }}
    chain in {{
        type filter hook input priority -140
        counter name in
        {input}
        {syn} tcp dport {server} meta mark & 0xffff == 0 counter name reopened
        iifname != lo {syn} tcp dport 17000-17008 counter name syn
        iifname != lo udp dport {server} counter name asked
        iifname != lo udp sport {server} counter name answered
    }}
}}
"""


def _ends(side: str, a: int, b: int, match: str = "", name: str = "wrong") -> list[str]:
    """An end's port says who is there: a's makers, the node's, or b's server."""
    rules = []
    for ports, xid in (
        (f"{FIRST_A}-{FIRST_NODE - 1}", a),
        (f"{FIRST_NODE}-{LAST}", 0),
        (SERVER, b),
    ):
        mark = f"{match} meta l4proto {{ tcp, udp }} th {side} {ports} meta mark & 0xffff"
        others = f"!= {{ 0, {xid} }}" if xid else "!= 0"
        rules.append(f"{mark} {others} counter name {name}")
        if xid:
            rules.append(f"{mark} == 0 counter name bare")
    return rules


def lay(ns: Namespace, a: int, b: int) -> None:
    """Begin to count in a namespace. They go with ``lift``."""
    arriving = [
        *_ends("dport", a, b, "iifname != lo"),
        # Without our rules a packet arrives with what its sender's socket gave it.
        *_ends("dport", a, b, "iifname lo", "carried"),
    ]
    text = _TABLE.format(
        counters="\n    ".join(f"counter {name} {{ }}" for name in _COUNTERS),
        post="\n        ".join(_ends("sport", a, b)),
        input="\n        ".join(arriving),
        server=SERVER,
        syn="tcp flags & (syn | ack) == syn",
    )
    ns.run("nft", "-f", "-", input=text)


def lift(ns: Namespace) -> None:
    """Take them out."""
    ns.run("nft", "delete", "table", "inet", "tally")


def read(ns: Namespace) -> dict[str, int]:
    """Packets: ``out`` and ``in`` at each hook; ``syn``, ``asked``, ``answered`` on the wire;
    ``wrong``: with a foreign owner; ``carried``: the same, arrived by loopback; ``bare``: a
    slice's, with none; ``reopened``: the same, a SYN that comes in, maybe over a TIME_WAIT."""
    listed = json.loads(ns.run("nft", "-j", "list", "counters", "table", "inet", "tally").stdout)
    found = [item["counter"] for item in listed["nftables"] if "counter" in item]
    packets = {item["name"]: item["packets"] for item in found}
    packets["bare"] -= packets["reopened"]
    return packets
