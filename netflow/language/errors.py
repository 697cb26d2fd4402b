"""What is said of a filter that means nothing: which word, what was expected there."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_WIDTH = 72
"""Characters of the text that are shown."""

# Words of nfdump's whose facts connection tracking does not have.
_NOT_RECORDED = {
    "flags": "TCP flags are not recorded; `state` is TCP's state at the end: `state syn_sent` "
    "was never answered, `state established`, `state time_wait`, `state close`",
    "tos": "the type of service is not recorded",
    "as": "AS numbers are not recorded; write the networks: `dst net 192.0.2.0/24`",
    "if": "interfaces are not recorded",
    "vlan": "VLANs are not recorded",
    "mac": "MAC addresses are not recorded",
    "mask": "route masks are not recorded",
    "mpls": "MPLS labels are not recorded",
    "geo": "countries are not recorded",
    "flowdir": "records have both directions: `initiator` and `responder` say which side",
    "flow": "records are not counted together",
    "flows": "`netflow top` counts flows",
    "count": "records have no numbers; `--limit` says how many are wanted",
    "ident": "`node` says who recorded it",
    "router": "`node` says who recorded it",
    "sysid": "`node` says who recorded it",
    "tun": "tunnels are not looked into",
    "tunip": "tunnels are not looked into",
}
_NOT_RECORDED |= dict.fromkeys(
    ("next", "prev", "bgpnext", "engine", "engine-type", "engine-id", "client", "server", "asa",
     "payload", "observation", "ingress", "egress", "pblock", "exporter", "fwdstat", "label"),
    "connection tracking does not have it",
)  # fmt: skip
# Words of tcpdump and of other filters.
_MEANT = {
    "tcp": "proto tcp", "udp": "proto udp", "icmp": "proto icmp", "icmp6": "proto icmp6",
    "sctp": "proto sctp", "gre": "proto gre", "source": "src", "destination": "dst",
    "protocol": "proto", "originated": "initiator", "sport": "src port", "dport": "dst port",
    "addr": "ip", "address": "ip", "network": "net", "saddr": "src ip", "daddr": "dst ip",
    "octets": "bytes", "pkts": "packets", "ip6": "ipv6", "ip4": "ipv4", "all": "any",
}  # fmt: skip
_AFTER = {
    "IP": "an address (192.0.2.1, 2001:db8::1) or in [...]",
    "NET": "a network: 192.0.2.0/24, 2001:db8::/32",
    "PORT": "a port: 80, > 1024, in [80 443]",
    "XID": "an xid: 0 to 65535, in [...]",
    "SLICE": "a slice's name, a pattern such as princeton_*, or in [...]",
    "NODE": "a node's name, a pattern, or in [...]",
    "BYTES": "an amount: > 1m, <= 1500",
    "PACKETS": "a number: > 100, = 1",
    "DURATION": "milliseconds, or a length of time: > 2000, > 2s",
    "PROTO": "a protocol: tcp, udp, icmp, 17, in [...]",
    "REASON": "closed, idle, active, owner, lost or cut",
    "STATE": "a state of TCP, such as established or syn_sent",
}
_AFTER |= {
    "HOST": _AFTER["IP"], "NIP": _AFTER["IP"], "XIP": _AFTER["IP"], "XNET": _AFTER["NET"],
    "NPORT": _AFTER["PORT"], "XPORT": _AFTER["PORT"],
}  # fmt: skip
_SIDE_WORDS = ("SRC", "DST", "INITIATOR", "ORIGINATOR", "RESPONDER")
_OTHER_WORDS = ("$END", "ANDAND", "OROR", "INITIATOR", "ORIGINATOR", "RESPONDER")
"""Not said among what was expected: the end comes last, the others mean what another one does."""


class FilterError(ValueError):
    """A filter cannot be meant; str() is the whole message, with the place in the text.

    position: of the first character that cannot be, from 0; the text's length at its end.
    """

    def __init__(self, message: str, text: str, position: int, length: int = 1) -> None:
        self.message, self.position = message, position
        super().__init__(f"{message}\n{_shown(text, position, length)}")


def _shown(text: str, position: int, length: int) -> str:
    """The line it is in, or a piece of that, and a line that points."""
    begin = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    line, at = text[begin : None if end < 0 else end], position - begin
    length = max(1, min(length, len(line) - at, _WIDTH // 2))
    cut = max(0, at + length - _WIDTH + 10) if len(line) > _WIDTH else 0
    before = "..." if cut else ""
    shown = line[cut : cut + _WIDTH]
    after = "..." if cut + _WIDTH < len(line) else ""
    # What would move the cursor, or a terminal's mind, is one mark.
    plain = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in shown)
    return f"  {before}{plain}{after}\n  {' ' * (len(before) + at - cut)}^{'~' * (length - 1)}"


def unexpected(word: str, kind: str, before: str, expected: dict[str, str]) -> str:
    """A message for a word, or the end (""), of which a parser knows what else could be there.

    kind and before are terminals: of this word and of the one before it.
    expected: terminal to how it is written.
    """
    wanted = _wanted(before, expected)
    if not word:
        if "RPAR" in expected:
            return "a ( is not closed: ) is missing at the end"
        return f"the filter ends too early: expected {wanted}"
    said = _quoted(word)
    if kind == "WORD" and "IP" in expected:
        low = word.lower()
        if low in _NOT_RECORDED:
            return f"{said} cannot be asked: {_NOT_RECORDED[low]}"
        if low in _MEANT:
            return f"{said} is not a word of filters: write `{_MEANT[low]}`"
        words = [text for text in expected.values() if text[:1].isalpha()]
        if close := get_close_matches(low, words, 1, 0.6):
            return f"{said} is not a word of filters: did you mean `{close[0]}`?"
    if "WORD" in expected and word.replace("-", "").isalpha():
        return f"{said} is a word of filters (in quotes it is a name): expected {wanted}"
    if kind == "RPAR" and "$END" in expected:
        return f"{said} closes nothing"
    if "AND" in expected and before not in _SIDE_WORDS and kind not in ("RSQB", "COMMA"):
        return f"{said} is not expected here: join tests by `and` or `or`"
    return f"{said} is not expected here: expected {wanted}"


def unread(character: str) -> str:
    """A message for a character that begins no word."""
    if character in "\"'":
        return "this quote is not closed"
    if character in "&|":
        return f"a single {character} is not a word of filters: write `{character * 2}`"
    return f"{_quoted(character)} cannot be in a filter"


def suggestion(word: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" where a known word is near."""
    close = get_close_matches(word.lower(), list(known), 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _quoted(word: str) -> str:
    return repr(word if len(word) <= 40 else word[:37] + "...")


def _wanted(before: str, expected: dict[str, str]) -> str:
    if "ANY" in expected:
        return "a test (ip, net, port, proto, bytes, slice, xid, ...)"
    if "IP" in expected:
        return "what of it: ip, net, port, slice, xid, nat, bytes or packets"
    if "RSQB" in expected and "WORD" in expected:
        return "a value or ]"
    if "WORD" in expected:
        return _AFTER.get(before, "a value")
    words = sorted(text for kind, text in expected.items() if kind not in _OTHER_WORDS)
    if "$END" in expected:
        words.append("the end")
    return ", ".join(words[:-1]) + " or " + words[-1] if len(words) > 1 else "".join(words)
