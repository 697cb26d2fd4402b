"""Let scapy build the templates: ``python -m mix.templates`` writes templates.json.

They are kept in a file because importing scapy takes twenty seconds in a guest;
tests/unit/test_mix_packets.py compares the two.
"""

import json
from pathlib import Path

FILE = Path(__file__).with_name("templates.json")


def build() -> dict[str, str]:
    """{name: hex}."""
    from scapy.all import ICMP, IP, SCTP, TCP, UDP, ICMPv6DestUnreach, ICMPv6EchoRequest, IPv6, raw
    from scapy.layers.l2 import GRE
    from scapy.layers.sctp import SCTPChunkInit

    v6 = IPv6(src="::1", dst="::1")
    layers = {
        "ip4": (IP(src="127.0.0.1", dst="127.0.0.1"), 0),
        "ip6": (v6, 0),
        "udp": (IP() / UDP(), 20),
        "tcp": (IP() / TCP(window=64000), 20),
        "echo4": (IP() / ICMP(type=8), 20),
        "echo6": (v6 / ICMPv6EchoRequest(), 40),
        "error4": (IP() / ICMP(type=3, code=3), 20),
        "error6": (v6 / ICMPv6DestUnreach(code=4), 40),
        "gre": (IP() / GRE(proto=0x88BE), 20),
        "sctp": (IP() / SCTP() / SCTPChunkInit(init_tag=1, n_out_streams=1, n_in_streams=1), 20),
    }
    return {name: raw(packet)[start:].hex() for name, (packet, start) in layers.items()}


if __name__ == "__main__":
    FILE.write_text(json.dumps(build(), indent=1) + "\n")
