"""What must hold over time: counts, restarts, and a policy that is the one in the files."""

import errno
import struct

from vnet.check import flows
from vnet.check.bed import AGAIN, in_table
from vnet.check.facts import Property
from vnet.check.flows import Flow
from vnet.check.trial import NotTried, Trial
from vnet.testing import agents, cgroup
from vnet.testing.net import HERE
from vnet.testing.poll import PATIENCE


def flow_accounting(t: Trial) -> None:
    import socket

    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as events:
        tried = "a connection's packets, bytes, start and end"
        with t.attempt("deny", tried):
            flow = flows.udp_out(t, "deny")
            # Listened to only now: a collector may start after a connection.
            events.bind((0, 1 << 2))  # NFNLGRP_CONNTRACK_DESTROY
            events.settimeout(t.bed.patience * PATIENCE)
            events.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 << 20)
            listed = HERE.run("conntrack", "-G", *flow.words, check=False).stdout
            for what in ("packets=", "bytes="):
                happened = listed.strip() or "no such connection"
                tried = f"its {what[:-1]} are counted"
                t.note("deny", what in listed, tried, f"{what}N in `conntrack -G`", happened)
            HERE.run("conntrack", "-D", *flow.words)
            told = _told_of_the_end(events, flow)
            t.note("deny", told is not None, "its end is told, though nobody listened when it "
                   "began", "an event", "none came" if told is None else "it came")  # fmt: skip
            if told is not None:
                t.note("deny", _TIMESTAMP in told, "the event has its start",
                       "CTA_TIMESTAMP", f"attributes {sorted(told)}")  # fmt: skip


_SO_RCVBUFFORCE = 33
_TIMESTAMP = 20
"""CTA_TIMESTAMP, linux/netfilter/nfnetlink_conntrack.h."""


def _told_of_the_end(events: "object", flow: Flow) -> set[int] | None:
    """The attributes of the event about this connection."""
    from vnet import netlink

    port = struct.pack(">H", flow.dport)
    try:
        while True:
            data = events.recv(1 << 16)  # type: ignore[attr-defined]
            if port in data and struct.pack(">H", flow.sport) in data:
                return set(netlink.attrs(data[20:]))
    except TimeoutError:
        return None
    except OSError as error:
        if error.errno != errno.ENOBUFS:
            raise
        return _told_of_the_end(events, flow)  # others' ends: more than the socket holds


_WATCH = 5
"""How many times as long as a packet `vnet watch` may take: it may be at work on something else."""


def restart(t: Trial) -> None:
    tried = "the slice's cgroup is removed and made again, as when a unit restarts; then a datagram"
    path = t.bed.slices[AGAIN].path
    with t.attempt("deny", tried):
        cgroup.remove(path)
        path.mkdir()
        patience = t.bed.patience * _WATCH
        if not in_table(t.bed, path.stat().st_ino, patience):
            seconds = patience * PATIENCE
            raise NotTried("nobody has told the kernel of the new cgroup within "
                           f"{seconds:.0f} s: is vnet-watch.service running?")  # fmt: skip
        w = t.world
        with t.watching() as seen, agents.begin(AGAIN, HERE, cgroup.Cgroup(path)) as agent:
            agent.answer(0)
            agent.tries([["socket", w.af, "SOCK_DGRAM"],
                         ["send", w.token.hex(), w.there, w.sink]])  # fmt: skip
            mine = [p for p in seen() if w.token in p.payload]
            t.owned("deny", tried, mine, "postrouting", AGAIN)


def policy_in_force(t: Trial) -> None:
    wrong = t.bed.before.policy
    if "containers" not in t.bed.has:  # else those are another property's
        wrong = wrong + t.bed.before.interfaces
    tried = "compare what the kernel goes by with the slices' files, before the canaries came"
    for line in wrong or [""]:
        t.note("node", not line, tried, "all cgroups, grants, ports and addresses", line or "all")


PROPERTIES = (
    Property("flow-accounting", "Without counts, start and end there is no flow record.",
             flow_accounting, families=(4,)),
    Property("restart", "A unit that restarts has a new cgroup, and is the same slice.", restart,
             families=(4,)),
    Property("policy-in-force", "Canaries say nothing of slices that the kernel has not been told "
             "of.", policy_in_force, families=(4,)),
)  # fmt: skip
