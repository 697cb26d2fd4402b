"""Every flow record against the truth.

Connections are taken by their 5-tuple: whether connection tracking has seen one or two
behind each other (TCP after a reset) is its own affair, whose they were is not. What must
hold: no connection without a record, no record without a connection; all counts, to
the byte; no owner who was not; their order. A change of owner is told without counts, so what
passes before netflow has read them counts for the owner before (docs/netflow.md): such
packets are counted here as ``late``, and only beside a real change.
"""

import ipaddress
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from mix.packets import ICMP, ICMPV6, Flow
from mix.truth import Conn, Owners, Share, Truth
from mix.world import World
from netflow.protocols import parse

_OTHERS = {parse("igmp")}
"""What the kernel itself says, and the mix does not."""

CEILINGS = {
    "late": ("packets", 0.2, 200),
    "aged": ("packets", 0.05, 100),
    "lost": ("packets", 0.002, 50),
    "overlooked": ("packets", 0.01, 20),
    "unsaid": ("flows", 0.01, 10),
    "mixed": ("flows", 0.02, 10),
    "reversed": ("flows", 0.005, 5),
}
"""{what is let pass: (of what, the share of them, how many whatever the share)}, docs/mix.md."""


@dataclass
class Records:
    """What came of the comparison."""

    records: int = 0
    flows: int = 0
    packets: int = 0
    late: int = 0
    """Packets that a record counts for the owner before a change."""
    unsaid: int = 0
    """Owners of packets whom no record names: all that passed is late."""
    mixed: int = 0
    """Connections of which both halves change at once: a record shows one of each."""
    aged: int = 0
    """Of these, in records that the active timeout ended before their half had an owner."""
    lost: int = 0
    """Multicast packets under a half that was not written when it should have been (`bpf`)."""
    overlooked: int = 0
    """SYNs on a connection that connection tracking holds for closed: it does not count them."""
    reversed: int = 0
    """TCP from b to a while a to b is remembered: to connection tracking it is invalid."""

    def problems(self) -> list[str]:
        """What is let pass and is too much of it."""
        return [
            f"records: {count} {name}, more than {share:.1%} of {whole} {of} and than {few}"
            for name, (of, share, few) in CEILINGS.items()
            if (count := getattr(self, name)) > max(few, share * (whole := getattr(self, of)))
        ]


def compare_records(w: World) -> Records:
    """All records since the beginning; what is wrong goes to w.wrong."""
    rows = read(w)
    told, wrong = compare(w.truth, rows)
    for text in wrong:
        w.fail(text)
    return told


def read(w: World) -> list[dict[str, Any]]:
    """All records since the beginning, once every connection has ended."""
    w.node.ns.run("conntrack", "-F")
    rows, gaps = w.flows.ask(since=w.since)
    if gaps:
        w.fail(f"netflow has gaps: {gaps}")
    return sorted(rows, key=lambda r: (r["flow_start"], r["start"], r["end"]))


def compare(known: Truth, rows: list[dict[str, Any]]) -> tuple[Records, list[str]]:
    """Records, in their order, against the truth; and what is wrong."""
    truth: dict[Flow, list[Share]] = defaultdict(list)
    conns: dict[Flow, list[Conn]] = defaultdict(list)
    for conn in known.past:
        for share in conn.shares:
            _append(truth[conn.flow], share, empty=True)
        conns[conn.flow].append(conn)
    found: dict[Flow, list[Share]] = defaultdict(list)
    told, wrong = Records(flows=len(truth)), []
    for row in rows:
        flow = flow_of(row)
        if flow.proto in _OTHERS:
            continue
        told.records += 1
        _append(found[flow], _share(row), empty=True)
    for flow in found.keys() - truth.keys():
        wrong.append(f"records: {flow} has one, of {found[flow][0]}: nothing of the sort was sent")
    for flow, shares in truth.items():
        if any(conn.reversed for conn in conns[flow]):
            told.reversed += 1
            continue
        # two CPUs, or a copy that looped back: CONNMARK is not atomic
        lossy = known.datapath == "bpf" and ipaddress.ip_address(flow.dst).is_multicast
        if why := _compare(shares, found.get(flow, []), told, len(conns[flow]) - 1, lossy):
            wrong.append(
                f"records: {flow}, {conns[flow][-1].act} and {len(conns[flow]) - 1} before: "
                f"{why}\n  truth   {_text(shares)}\n  records {_text(found.get(flow, []))}"
            )
    return told, wrong


def _compare(truth: list[Share], found: list[Share], told: Records, again: int, lossy: bool) -> str:
    sums = [_sums(shares) for shares in (truth, found)]
    told.packets += sum(sums[1][:2])
    less = [a - b for a, b in zip(*sums, strict=True)]
    overlooked = 0 < less[0] <= again and less[2] in (60 * less[0], 80 * less[0])
    if overlooked and less[1] == less[3] == 0:
        told.overlooked += less[0]
    elif any(less):
        return f"packets and bytes each way are {sums[1]}, must be {sums[0]}"
    named = {share.owners for share in found}
    told.unsaid += sum(1 for share in truth if sum(share.packets) and share.owners not in named)
    rest = iter([share.owners for share in truth])
    if not all(share.owners in rest for share in found):
        halves = [{share.owners[half] for share in truth} for half in (0, 1)]
        known = True
        for share in found:
            for half in (0, 1):
                if share.owners[half] in halves[half]:
                    continue
                known = False
                if share.owners[half] == 0 and share.aged:
                    told.aged += sum(share.packets)
                elif share.owners[half] == 0 and lossy:
                    told.lost += sum(share.packets)
                else:
                    return "an owner who never was"
        told.mixed += known
    told.late += _late(truth, found)
    return ""


def _late(truth: list[Share], found: list[Share]) -> int:
    """How many packets are counted for somebody else."""
    mine: Counter[Owners] = Counter()
    for share in truth:
        mine[share.owners] += sum(share.packets)
    for share in found:
        mine[share.owners] -= sum(share.packets)
    return sum(abs(n) for n in mine.values()) // 2


def _append(shares: list[Share], share: Share, empty: bool = False) -> None:
    """Behind the others, or into the last one where that is of the same owners.

    empty: although it has no packets. Late ones may count for it.
    """
    if not sum(share.packets) and not empty:
        return
    if not shares or shares[-1].owners != share.owners:
        shares.append(Share(share.owners, aged=share.aged))
    shares[-1].aged &= share.aged
    for way in (0, 1):
        shares[-1].packets[way] += share.packets[way]
        shares[-1].size[way] += share.size[way]


def _sums(shares: list[Share]) -> tuple[int, ...]:
    return tuple(
        sum(values) for values in zip(*((*s.packets, *s.size) for s in shares), strict=True)
    ) or (0, 0, 0, 0)


def _text(shares: list[Share]) -> str:
    return ", ".join(f"{s.owners}: {s.packets} {s.size}" for s in shares) or "none"


def flow_of(row: dict[str, Any]) -> Flow:
    """The 5-tuple that a record is of."""
    proto = parse(row["proto"])
    src, dst = (ipaddress.ip_address(row[side]).packed for side in ("src", "dst"))
    if proto in (ICMP, ICMPV6):
        return Flow(proto, src, row["icmp"]["id"], dst, 0)
    return Flow(proto, src, row["sport"], dst, row["dport"])


def _share(row: dict[str, Any]) -> Share:
    one, two = row["originator"], row["responder"]
    return Share(
        (one["xid"], two["xid"]),
        [one["packets"], two["packets"]],
        [one["bytes"], two["bytes"]],
        aged=row["reason"] == "active",
    )
