"""What passes through the node: others' packets, and those of containers."""

from vnet.check import flows, outside
from vnet.check.facts import Property
from vnet.check.trial import Trial
from vnet.testing.net import HERE

_OUT, _IN = "postrouting", "input"


def forwarded(t: Trial) -> None:
    if f"forwarding{t.family}" not in t.bed.has:
        return
    w = t.world
    net = f"{w.nowhere}/{32 if t.family == 4 else 128}"
    HERE.run("ip", f"-{t.family}", "route", "replace", net, "via", w.there, "dev", w.interface)
    t.bed.peer.run("ip", f"-{t.family}", "route", "replace", net, "via", w.here)
    try:
        tried = "datagram that passes through, with a mark of somebody else's"
        with t.attempt("node", tried), t.watching() as seen:
            t.does("peer", [["socket", w.af, "SOCK_DGRAM"],
                            ["send", w.token.hex(), w.nowhere, w.sink]])  # fmt: skip
            # The node says things of its own there: redirects, neighbours.
            after = t.until(lambda: [p for p in seen() if p.prefix == _OUT and p.dst == w.nowhere
                                     and w.token in p.payload], "it passes")  # fmt: skip
            t.owned("node", tried, after, _OUT, "node")
        tried = "reset without a connection that passes through, with such a mark"
        with t.attempt("node", tried), t.watching() as seen:
            w = t.world
            data = outside.passes(w, w.nowhere)
            t.does("peer", [["socket", w.af, "SOCK_RAW", 255],
                            ["send", data.hex(), w.nowhere, 0]])  # fmt: skip
            after = t.until(lambda: [p for p in seen() if p.prefix == _OUT and p.dst == w.nowhere
                                     and "R" in p.tcp_flags], "it passes")  # fmt: skip
            t.owned("node", tried, after, _OUT, "node")
    finally:
        HERE.run("ip", f"-{t.family}", "route", "del", net, "dev", w.interface, check=False)


def containers(t: Trial) -> None:
    for line in t.bed.before.interfaces or [""]:
        t.note("node", not line, "look at the interfaces of the slices' containers",
               "both tc filters on each", line or "as they should be")  # fmt: skip
    box = t.bed.box
    if box is None:
        t.skip("deny", "a container of the checker's", "no container of the checker's can be made: "
               "only two documentation ranges (RFC 5737) are not in use on this node")  # fmt: skip
        return
    xid = t.bed.xids
    gateway, inside = (box.a4, box.b4) if t.family == 4 else (box.a6, box.b6)
    tried = "tcp connection from a container to the slice 'deny'"
    with t.attempt("deny", tried):
        flow = flows.tcp(t, "box", "deny", gateway)
        t.owned("deny", f"{tried}: as it comes", flow.there(), _IN, "deny")
        t.owned("deny", f"{tried}: the answers", flow.back(), _OUT, "deny")
        t.equal("deny", f"{tried}: owners", (xid["box"], xid["deny"]), t.halves(flow.words))
    tried = "datagram from a container to the slice 'deny', which answers nothing"
    with t.attempt("deny", tried):
        flow = flows.udp_between(t, "box", "deny", gateway)
        t.owned("deny", f"{tried}: as it comes", flow.there(), _IN, "deny")
        t.equal("deny", f"{tried}: owners", (xid["box"], xid["deny"]), t.halves(flow.words))
    if f"forwarding{t.family}" not in t.bed.has:
        return
    tried = "tcp connection from a container to the peer"
    with t.attempt("deny", tried):
        flow = flows.tcp(t, "box", "peer", t.world.there)
        for hook in ("forward", _OUT):
            t.owned("deny", f"{tried}: what it sends", flow.there(), hook, "box")
            t.owned("deny", f"{tried}: the answers", flow.back(), hook, "box")
        t.equal("deny", f"{tried}: owners", (xid["box"], 0), t.halves(flow.words))
    tried = "tcp connection from the peer to a container"
    with t.attempt("deny", tried):
        flow = flows.tcp(t, "peer", "box", inside)
        # Where the first one will leave is not known yet (docs/containers.md).
        behind = [p for p in flow.there() if p.prefix == _OUT][1:]
        t.owned("deny", f"{tried}: behind the first packet", behind, _OUT, "box")
        t.owned("deny", f"{tried}: the answers", flow.back(), _OUT, "box")
        t.equal("deny", f"{tried}: owners", (0, xid["box"]), t.halves(flow.words))
    tried = "datagram from the peer to a container that answers nothing"
    with t.attempt("deny", tried):
        flow = flows.udp_passing(t, "box", inside)
        t.equal("deny", f"{tried}: owners", (0, xid["box"]), t.halves(flow.words))
    tried = "a container's ICMP error about a connection of the node's"
    with t.attempt("node", tried), t.watching() as seen:
        flow = flows.udp_in(t, "node")
        w = t.world
        data = outside.error_from(w, inside, flow.sport, flow.dport)
        t.does("box", [["socket", w.af, "SOCK_RAW", 255], ["send", data.hex(), w.there, 0]])
        t.until(lambda: [p for p in flows.unreachable(seen()) if p.prefix == _OUT], "it passes")
        t.equal("node", f"{tried}: owners", (0, 0), t.halves(flow.words))


PROPERTIES = (
    Property("forwarded", "What only passes through is no slice's, whatever mark it brings.",
             forwarded, where=("forwarding",)),
    Property("containers", "A container's packets lose their socket on the way: its interface "
             "says whose they are.", containers, where=("containers",)),
)  # fmt: skip
