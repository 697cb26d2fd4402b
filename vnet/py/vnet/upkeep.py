"""Our rules stay while the node is up: notice when somebody flushes them, and put them back.

nf_tables tells of each change (NFNLGRP_NFTABLES). Of the legacy tables the
kernel tells nobody; how many rules they hold, and where, is asked every few
seconds (IPT_SO_GET_INFO), and twice a minute they are read, since a rule may
have taken the place of one of its length.

Rules that are flushed again and again are put back at longer and longer
intervals, and so is tried what does not succeed.
"""

import ctypes
import math
import socket
import sys
import time
from dataclasses import dataclass

from vnet import guard, iptables, netlink, rules, status, steps
from vnet import state as states
from vnet.datapath import OURS, Family
from vnet.errors import LockError, VnetError
from vnet.journal import Journal
from vnet.paths import Paths

# include/uapi/linux/netfilter/nfnetlink.h; nf_tables.h
_NFNLGRP_NFTABLES = 7
_NEWRULE = 10 << 8 | 6
_DELRULE = 10 << 8 | 8
_RULE_TABLE = 1
_RULE_CHAIN = 2
# include/uapi/linux/netfilter_ipv4/ip_tables.h: struct ipt_getinfo; IPv6 has the same
_GET_INFO = 64
_INFO_SIZE = 84

_SOON = 0.2
"""s from a notice to the look: who changes one rule may be about to change more."""
_SHARE = 0.05
"""of our time that looking takes at most, however often others change their rules"""
_EVERY = 5.0
"""s from one look at the legacy tables to the next"""
_READ_EVERY = 30.0
"""s after which their rules are read even if the kernel says that they are as long as before"""
_PAUSE = 1.0
"""s from putting rules back, or trying to, to doing so again"""
_LONGEST = 10.0
"""s that it becomes when each time it is soon necessary again"""

#: (family, table): how many rules a legacy table holds, where, and how long
Sizes = dict[tuple[Family, str], bytes]


@dataclass
class Upkeep:
    """When to look at the rules next, and what was found the last time. Times: monotonic s."""

    heard: socket.socket  #: readable when nf_tables has changed
    due: float = 0.0  #: when to look
    rested: float = 0.0  #: no notice makes us look before then
    tried: float = -math.inf  #: when rules were put back last, or that was tried
    pause: float = _PAUSE  #: s from then to the next time
    whole: Sizes | None = None  #: of the legacy tables when nothing was missing
    read: float = -math.inf  #: when that was
    complaint: str = ""  #: that was made; not made again until it is cured


def listen() -> socket.socket:
    """A socket that becomes readable when somebody changes nf_tables in this namespace."""
    return netlink.listen(netlink.NETLINK_NETFILTER, _NFNLGRP_NFTABLES)


def hear(kept: Upkeep) -> None:
    """Take what the kernel tells; if it may be about rules of ours, look soon."""
    if _changed(kept.heard):
        soon = max(time.monotonic() + _SOON, kept.rested, kept.tried + kept.pause)
        kept.due = min(kept.due, soon)


def _changed(heard: socket.socket) -> bool:
    changed = False
    for notice in netlink.notices(heard):  # to the last one, or it stays readable
        changed = changed or notice is None or _is_near_ours(*notice)
    return changed


def _is_near_ours(kind: int, body: bytes) -> bool:
    """Whether a notice is of a rule in a chain of ours, or in one that leads there.

    No table or chain goes without its rules going first.
    """
    if kind not in (_NEWRULE, _DELRULE) or body[0] not in (socket.AF_INET, socket.AF_INET6):
        return False
    found = netlink.attrs(body[4:])
    table, chain = (
        found.get(one, b"").rstrip(b"\0").decode(errors="replace")
        for one in (_RULE_TABLE, _RULE_CHAIN)
    )
    return any(table == one and chain in (ours, base) for (one, ours), base in OURS.items())


def tend(kept: Upkeep, paths: Paths) -> None:
    """If it is time, look, and put back what is missing. Says on stderr what it has done."""
    began = time.monotonic()
    if began < kept.due or (state := states.load(paths.state)) is None:
        return
    legacy = state.variant == "legacy"
    kept.due = began + _EVERY if legacy else math.inf
    sizes = _sizes() if legacy else {}
    if legacy and sizes == kept.whole and began < kept.read + _READ_EVERY:
        return
    kept.whole = None
    try:
        wrong = _repair(paths)
    except LockError:  # a command is at work, which may be about to remove them
        kept.due = began + _PAUSE
        return
    except VnetError as error:
        _rest(kept)
        kept.due = kept.tried + kept.pause
        if kept.complaint != error.message:
            kept.complaint = error.message
            _say(f"rules of ours are gone, and cannot be put back: {error}")
        return
    if wrong:
        _rest(kept)
        _say("rules of ours were changed, and are as they were again: " + "; ".join(wrong))
    else:
        now = time.monotonic()
        kept.rested = now + (now - began) / _SHARE
        kept.whole, kept.read, kept.complaint = sizes, now, ""


def _rest(kept: Upkeep) -> None:
    now = time.monotonic()
    again = now < kept.tried + 3 * kept.pause
    kept.tried, kept.pause = now, min(2 * kept.pause, _LONGEST) if again else _PAUSE


def _say(words: str) -> None:
    print(f"vnet watch: {words}", file=sys.stderr, flush=True)


def _repair(paths: Paths) -> list[str]:
    """Put the rules in place that the last ``up`` has put there. Returns what was missing.

    Raises LockError while a command is at work, or what a killed one has begun
    waits to be undone; RulesError, NodeError.
    """
    _leave_to_others(paths)
    with guard.lock(paths, seconds=0):
        _leave_to_others(paths)
        state = states.load(paths.state)
        if state is None:
            return []
        wrong = [
            words
            for family in iptables.families()
            for words in status.rule_differences(state, family, state.variant)
        ]
        if wrong:
            guard.guarded(lambda: _put_back(paths), lambda: steps.undo(paths))
        return wrong


def _leave_to_others(paths: Paths) -> None:
    if paths.journal.exists():
        raise LockError(f"{paths.journal} is there")


def _put_back(paths: Paths) -> guard.Result:
    """As ``vnet up`` does it; runs in the guarded worker."""
    state, before = states.load(paths.state), states.text(paths.state)
    assert state
    notes = Journal(paths.journal)
    wanted = {family: states.chains(state, family) for family in iptables.families()}
    steps.install_rules(notes, state, state.variant, wanted)
    steps.write_state(notes, paths, state, before)
    steps.finish(paths, notes)
    return {}


# -- legacy tables -----------------------------------------------------------


def _sizes() -> Sizes:
    return {
        (family, table): _size(family, table)
        for family in iptables.families()
        for table in iptables.legacy_tables(family)  # asking for another would make it
        if table in rules.TABLES
    }


def _size(family: Family, table: str) -> bytes:
    """What the kernel says of a legacy table; nothing if it is gone by now."""
    kind, level = {
        4: (socket.AF_INET, socket.SOL_IP),
        6: (socket.AF_INET6, socket.IPPROTO_IPV6),
    }[family]
    found, length = (
        ctypes.create_string_buffer(table.encode(), _INFO_SIZE),
        ctypes.c_uint(_INFO_SIZE),
    )
    with socket.socket(kind, socket.SOCK_DGRAM) as asked:
        ctypes.CDLL(None).getsockopt(asked.fileno(), level, _GET_INFO, found, ctypes.byref(length))
    return found.raw
