"""Names of IP protocols (IANA), of TCP states (kernel: enum tcp_conntrack), of reasons."""

ICMP = 1
ICMPV6 = 58

NAMES = {
    1: "icmp",
    2: "igmp",
    4: "ipip",
    6: "tcp",
    17: "udp",
    33: "dccp",
    41: "ipv6",
    47: "gre",
    50: "esp",
    51: "ah",
    58: "icmp6",
    103: "pim",
    112: "vrrp",
    132: "sctp",
    136: "udplite",
}
_NUMBERS = {name: number for number, name in NAMES.items()} | {"icmpv6": ICMPV6, "ipv6-icmp": 58}

TCP_STATES = (
    "none",
    "syn_sent",
    "syn_recv",
    "established",
    "fin_wait",
    "close_wait",
    "last_ack",
    "time_wait",
    "close",
    "syn_sent2",
)


REASON_ACTIVE, REASON_OWNER = 3, 4
"""The connection goes on: this is the share up to now; it goes on under another owner."""
REASONS = {1: "idle", 2: "closed", REASON_ACTIVE: "active", REASON_OWNER: "owner", 5: "lost",
           6: "cut"}  # fmt: skip
"""Why a record was closed (netflow.ct.Reason)."""


def parse(text: str) -> int:
    """A protocol's number from its name or number; ValueError for neither."""
    number = _NUMBERS.get(text.lower())
    if number is None and text.isascii() and text.isdigit() and int(text) <= 255:
        number = int(text)
    if number is None:
        known = ", ".join(NAMES.values())
        raise ValueError(f"{text!r} is not a protocol: write one of {known}, or its number")
    return number


def name(number: int) -> str:
    """The name, or the number where there is none."""
    return NAMES.get(number, str(number))


def tcp_state(number: int) -> str:
    """The kernel's name of a TCP state, in lower case."""
    return TCP_STATES[number] if number < len(TCP_STATES) else str(number)
