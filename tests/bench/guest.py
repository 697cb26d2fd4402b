"""Measure instructions per packet inside the guest: every rule set in turn, in one boot.

Run as root by tools/bench in a throw-away VM under ``-icount shift=0`` only: it takes over the
packet filter of the whole machine. Writes one JSON object to the file it is given: per case
(conntrack on or off, home, hook, rules) and path (see pktcost.c) the median batch of every round,
in instructions per packet, and what the module's counters said about those packets.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import peers

PARENT = Path("/sys/fs/cgroup/bench.slice")
# As many as the largest case; the sender and the receiver are the first two.
SLICES = 10_000
SENDER, RECEIVER = PARENT / "s1", PARENT / "s2"
# In a hash table some slices stand behind others: senders to take the mean of.
SENDERS = [PARENT / f"s{i}" for i in range(1, SLICES + 1, SLICES // 16)]

OUT = ("udp-out", "udp-out-new")
IN = ("udp-in", "udp-in-new", "udp-in-wild", "udp-in-wild-new", "tcp-in", "tcp-in-new")
# With rules in both hooks: packets of known connections, and between two slices of the host.
BOTH = ("udp-out", "udp-in", "tcp-in", "udp-lo", "tcp-lo")

# A connection's socket buffers settle in one of a few states, which differ by some hundred
# instructions a packet: the cheapest of several connections is the comparable one.
CONNECTIONS = {"tcp-in": 3, "tcp-in-new": 2, "tcp-lo": 3}

# A regular chain nothing jumps to: conntrack is switched on, and no hook of ours is added.
CONNTRACK_ON = "table ip bench_conntrack {\n chain unused {\n  ct state new\n }\n}\n"

# Rules by their name, as lines for one chain.
EMPTY = "empty table"
BARE = "a rule without a target"
SET_MARK = "MARK --set-mark"
COPY_XID = "MARK --copy-xid"
INSTALLED = "as vnet up installs it"
CGROUP = "-m cgroup --path"
NFT_MAP = "nft socket cgroupv2 map"
SKB_MARK = "BPF cgroup_skb mark"
UP_MODULE, UP_BPF = "vnet up --datapath module", "vnet up --datapath bpf"
BPF_MARKS = "vnet up --datapath bpf, marks of sockets alone"
UPS = {UP_MODULE: "module", UP_BPF: "bpf", BPF_MARKS: "bpf"}

# How many slices the peers and whole nodes are measured with.
COUNTS = (1, 10, 100, 1_000, SLICES)
# Commands of `vnet` take most of the time here; that of a node is flat in between, too.
UP_COUNTS = (1, 100, SLICES)
# A thousand rules are long: they need no more than that.
ROUNDS, FEW = 3, 1


@dataclass(frozen=True)
class Case:
    """One set of rules.

    ``home`` is none, legacy or nft. ``hooks`` are mangle's base chains that have it. ``n`` counts
    rules, or slices in the table or the map.
    """

    conntrack: bool
    home: str
    hooks: tuple[str, ...]
    rules: str
    n: int = 0


@dataclass
class Result:
    """Instructions per packet of one case on one path, one figure a round."""

    case: Case
    path: str
    rounds: list[float] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)


def run(*argv: str, stdin: str | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command; its standard output, or an error that shows what it said."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        sys.exit(f"{' '.join(argv)}: {done.returncode}\n{stdin or ''}{done.stdout}{done.stderr}")
    return done.stdout


def no_rules() -> None:
    """Back to a kernel without any hook: legacy tables unloaded, nft empty, conntrack off."""
    run("nft", "flush", "ruleset")
    names = Path("/proc/net/ip_tables_names")
    for table in names.read_text(encoding="ascii").split() if names.exists() else ():
        run("iptables-legacy-restore", stdin=f"*{table}\nCOMMIT\n")
        run("rmmod", f"iptable_{table}")


def xtables(home: str, text: str) -> None:
    """Put rules into mangle, in the legacy or the nft variant.

    Our plugin is shown only where it is needed: stock rules are to be stock's own.
    """
    env = None
    if "--copy-xid" in text:
        from vnet.iptables import environment

        env = environment()
    run(f"iptables-{home}-restore", "--noflush", stdin=f"*mangle\n{text}COMMIT\n", env=env)


def base_chain(hook: str) -> str:
    return f"type filter hook {hook.lower()} priority mangle; policy accept;"


def empty(home: str, hooks: tuple[str, ...]) -> None:
    """The table without rules. Legacy hooks all five places whatever is in it."""
    if home == "legacy":
        run("iptables-legacy", "-t", "mangle", "-S")
        return
    for hook in hooks:
        run("nft", f"add table ip mangle; add chain ip mangle {hook} {{ {base_chain(hook)} }}")


def nft_map(hook: str, n: int) -> None:
    """The native way: one look-up of the socket's cgroup in a map of ``n`` slices."""
    pairs = ",\n".join(f'"bench.slice/s{i}" : {i}' for i in range(1, n + 1))
    text = (
        f"table ip mangle {{\n chain {hook} {{\n  {base_chain(hook)}\n"
        f"  meta mark set socket cgroupv2 level 2 map {{ {pairs} }}\n }}\n}}\n"
    )
    run("nft", "-f", "-", stdin=text)


def lines(case: Case, hook: str) -> str:
    """The case's rules for one base chain, in iptables-restore's words."""
    if case.rules == BARE:
        return f"-A {hook}\n"
    if case.rules == SET_MARK:
        return f"-A {hook} -j MARK --set-mark 0x200\n"
    if case.rules == COPY_XID:
        return f"-A {hook} -j MARK --copy-xid\n"
    if case.rules == CGROUP:
        # The sender's and the receiver's own are the first two, but all are tried anyway.
        return "".join(
            f"-A {hook} -m cgroup --path bench.slice/s{i} -j MARK --set-mark {i}\n"
            for i in range(1, case.n + 1)
        )
    return ""


def vnet_environment() -> dict[str, str]:
    """Directories of vnet's own for the benchmark."""
    return {
        **os.environ,
        "VNET_CONFIG_DIR": "/run/bench/etc/slices.d",
        "VNET_STATE_DIR": "/run/bench/state",
        "VNET_RUN_DIR": "/run/bench/run",
        "VNET_BPF_DIR": "/sys/fs/bpf/vnet-bench",
    }


def vnet(*argv: str) -> None:
    """Run ``vnet`` with directories of its own."""
    run(sys.executable, "-m", "vnet.cli", *argv, env=vnet_environment())


def up(case: Case) -> None:
    """A whole node: the data path and the guard, with ``n`` slices that have a port each."""
    directory = Path(vnet_environment()["VNET_CONFIG_DIR"])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "slices.toml").write_text(
        peers.configuration(f"/{PARENT.name}", case.n), encoding="ascii"
    )
    vnet("up", "--datapath", UPS[case.rules], "--variant", case.home)
    if case.rules == BPF_MARKS:
        run("nft", "flush", "ruleset")
        instance = next(Path(vnet_environment()["VNET_BPF_DIR"]).glob("*/links")).parent
        peers.detach(instance, peers.MARKS)
        run("nft", "-f", "-", stdin=CONNTRACK_ON)


def install(case: Case) -> None:
    """Bring the kernel from no rules at all to this case."""
    if case.rules in UPS:
        up(case)
        return
    if case.conntrack:
        run("nft", "-f", "-", stdin=CONNTRACK_ON)
    if case.home == "none":
        return
    if case.rules == NFT_MAP:
        nft_map(case.hooks[0], case.n)
        return
    empty(case.home, case.hooks)
    if case.rules == INSTALLED:
        from vnet.datapath import Chain

        from vnet import iptables, rules

        home: iptables.Variant = "legacy" if case.home == "legacy" else "nft"
        marks = ("-j MARK --copy-xid",)
        chains = (
            Chain("mangle", "INPUT", "VNET-INPUT", marks),
            Chain("mangle", "POSTROUTING", "VNET-POST", marks),
        )
        rules.change(4, home, rules.snapshot(4, home), rules.asked(chains))
    elif case.rules != EMPTY:
        xtables(case.home, "".join(lines(case, hook) for hook in case.hooks))


def cases(module: bool) -> Iterator[Case]:
    """Every case, grouped so that the module's table is filled seldom."""
    for conntrack in (False, True):
        yield Case(conntrack, "none", (), "")
    one_hook = (("POSTROUTING",), ("INPUT",))
    both = ("INPUT", "POSTROUTING")
    for home in ("legacy", "nft"):
        for hooks in one_hook:
            for conntrack in (False, True):
                yield Case(conntrack, home, hooks, EMPTY)
                yield Case(conntrack, home, hooks, SET_MARK, 1)
            yield Case(True, home, hooks, BARE, 1)
            for n in COUNTS[:-1]:
                yield Case(True, home, hooks, CGROUP, n)
        yield Case(True, home, both, EMPTY)
        yield Case(True, home, both, SET_MARK, 1)
    # Native nft has no socket expression in POSTROUTING.
    yield Case(True, "nft", ("OUTPUT",), EMPTY)
    for hook in ("OUTPUT", "INPUT"):
        for n in COUNTS:
            yield Case(True, "nft", (hook,), NFT_MAP, n)
    for n in COUNTS:
        yield Case(True, "none", (), SKB_MARK, n)
    if not module:
        return
    for n in (0, *COUNTS):
        for home in ("legacy", "nft"):
            for hooks in one_hook:
                yield Case(True, home, hooks, COPY_XID, n)
    for home in ("legacy", "nft"):
        yield Case(True, home, both, COPY_XID, SLICES)
        yield Case(True, home, both, INSTALLED, SLICES)
    for rules in (UP_MODULE, UP_BPF):
        for n in UP_COUNTS:
            yield Case(True, "nft", both, rules, n)
    yield Case(True, "legacy", both, UP_MODULE, 2)
    yield Case(True, "legacy", both, UP_BPF, 2)
    # The last: what it took down, `vnet down` would miss.
    yield Case(True, "nft", both, BPF_MARKS, 2)


def paths(case: Case) -> tuple[str, ...]:
    """Which ways of a packet the case's hooks lie on."""
    if case.home == "none" and not case.rules:
        return (*OUT, *IN, "udp-lo", "tcp-lo")
    if len(case.hooks) == 2 or case.rules == SKB_MARK:
        return BOTH
    return IN if case.hooks == ("INPUT",) else OUT


def measure(case: Case, path: str, pktcost: Path) -> Result:
    """Run pktcost, each time on an empty connection table."""
    result = Result(case, path)
    # Where there is one slice, both ends are in it; where there is none, they are the node's.
    receiver = SENDER if case.rules in (COPY_XID, *UPS) and case.n == 1 else RECEIVER
    for _ in range(CONNECTIONS.get(path, 1)):
        if case.conntrack:
            run("conntrack", "-F")
        before = counters(case)
        rounds = FEW if case.rules == CGROUP and case.n == max(COUNTS[:-1]) else ROUNDS
        ends = ("-t", str(SENDER), "-u", str(receiver))
        said = json.loads(run(str(pktcost), path, "-r", str(rounds), *ends))
        after = counters(case)
        result.rounds += said["rounds"]
        for name, count in after.items():
            if count > before[name]:
                result.counters[name] = result.counters.get(name, 0) + count - before[name]
    return result


def many_senders(case: Case, pktcost: Path) -> Result:
    """The path udp-out from many of the slices; one figure a sender, not a round."""
    result = Result(case, "udp-out-senders")
    for sender in SENDERS:
        said = json.loads(run(str(pktcost), "udp-out", "-r", "2", "-t", str(sender)))
        result.rounds.append(min(said["rounds"]))
    return result


def counters(case: Case) -> dict[str, int]:
    """The module's counters, where it has part in the case."""
    if case.rules not in (COPY_XID, INSTALLED):
        return {}
    from vnet import copyxid

    with copyxid.connect() as module:
        return module.stats()[0].counters


def fill(n: int) -> None:
    """Make the module's table hold ``n`` slices, the sender's first, then the receiver's."""
    from vnet import copyxid

    with copyxid.connect() as module:
        module.flush()
        refused = module.set_many({(PARENT / f"s{i}").stat().st_ino: i for i in range(1, n + 1)})
    if refused:
        sys.exit(f"the module refused {len(refused)} of {n} slices: {refused}")


def set_up(pktcost: Path) -> None:
    """Devices and cgroups.

    A dummy device swallows packets right after POSTROUTING; a veth pair leads to a namespace
    without rules, whose addresses 10.97.0.0/16 serve as ever new senders.
    """
    peer = ("ip", "-n", "bench-peer")
    for words in (
        "ip link set lo up",
        "modprobe -a dummy veth",
        "ip link add dummy0 type dummy",
        "ip addr add 10.99.0.1/24 dev dummy0",
        "ip link set dummy0 up",
        "ip netns add bench-peer",
        "ip link add bench0 type veth peer name bench1 netns bench-peer",
        "ip addr add 10.98.0.1/24 dev bench0",
        "ip link set bench0 up",
    ):
        run(*words.split())
    run(*peer, "addr", "add", "10.98.0.2/24", "dev", "bench1")
    run(*peer, "link", "set", "bench1", "up")
    run(*peer, "link", "set", "lo", "up")
    run(*peer, "route", "add", "local", "10.97.0.0/16", "dev", "lo")
    run("ip", "route", "add", "10.97.0.0/16", "via", "10.98.0.2")
    # Known for good: no ARP in between.
    here, there = (
        json.loads(run(*words, "-j", "link", "show", device))[0]["address"]
        for words, device in ((("ip",), "bench0"), (peer, "bench1"))
    )
    run("ip", "neigh", "replace", "10.98.0.2", "lladdr", there, "dev", "bench0")
    run(*peer, "neigh", "replace", "10.98.0.1", "lladdr", here, "dev", "bench1")
    PARENT.mkdir(exist_ok=True)
    run(str(pktcost), "mkdirs", str(PARENT), str(SLICES))


def machine() -> dict[str, str]:
    """What the figures depend on: the kernel and its mitigations."""
    spectre = Path("/sys/devices/system/cpu/vulnerabilities/spectre_v2")
    return {
        "kernel": platform.release(),
        "version": platform.version(),
        "spectre_v2": spectre.read_text(encoding="ascii").strip(),
    }


@contextmanager
def rules(case: Case) -> Iterator[None]:
    """The case's rules, and none before and after."""
    with ExitStack() as stack:
        stack.callback(no_rules)
        install(case)
        if case.rules in (UP_MODULE, UP_BPF):
            stack.callback(vnet, "down")
        if case.rules == SKB_MARK:
            owners = {(PARENT / f"s{i}").stat().st_ino: i for i in range(1, case.n + 1)}
            stack.enter_context(peers.cgroup_skb(PARENT.parent, owners))
        yield


def main() -> None:
    """See the module's text."""
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--out", type=Path, required=True, help="JSON file to write")
    ask.add_argument("--pktcost", type=Path, required=True)
    ask.add_argument("--module", type=Path, help="this .ko; default: modprobe xt_copyxid")
    ask.add_argument("--stock", action="store_true", help="without our module and its cases")
    ask.add_argument("--only", default="", help="only rules that contain this, and the baselines")
    args = ask.parse_args()
    set_up(args.pktcost)
    # x_tables asks for no module where any revision of a target is there, ours for one.
    run("modprobe", "xt_mark")
    if args.module:
        needs = run("modinfo", "-F", "depends", str(args.module)).strip().split(",")
        run("modprobe", "-a", *needs)
        run("insmod", str(args.module))
    elif not args.stock:
        run("modprobe", "xt_copyxid")
    if not args.stock:
        # Does it answer, and does the plugin? Better known now than after minutes.
        fill(1)
        for home in ("legacy", "nft"):
            with rules(Case(True, home, ("INPUT",), COPY_XID)):
                pass
    results: list[Result] = []
    todo = [
        case
        for case in cases(module=not args.stock)
        if case.rules in ("", EMPTY) or args.only in case.rules
    ]
    filled = -1
    for number, case in enumerate(todo, 1):
        hooks = "+".join(case.hooks)
        count = f" x{case.n}" if case.n else ""
        tracked = "" if case.conntrack else ", no conntrack"
        print(
            f"bench: {number:2}/{len(todo)} {case.home:6} {hooks:11} {case.rules}{count}{tracked}",
            flush=True,
        )
        if case.rules in (COPY_XID, INSTALLED) and case.n != filled:
            fill(case.n)
            filled = case.n
        with rules(case):
            results += [measure(case, path, args.pktcost) for path in paths(case)]
            if (case.hooks, case.rules, case.n) == (("POSTROUTING",), COPY_XID, SLICES):
                results.append(many_senders(case, args.pktcost))
    args.out.write_text(
        json.dumps({"machine": machine(), "results": [asdict(r) for r in results]}),
        encoding="ascii",
    )


if __name__ == "__main__":
    os.environ["LC_ALL"] = "C"
    main()
