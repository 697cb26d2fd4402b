"""What would break the marks on this host, why it matters, and the cure."""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vnet import bpf, cgroups, choice, config, guard, marks, module, nodeconfig, rules
from vnet import state as states
from vnet.datapath import OURS, Family
from vnet.errors import ConfigError, ModuleError, NodeError, VnetError
from vnet.paths import Paths

#: A connection that finds no place in the table is not tracked, and is dropped.
_NEARLY_FULL = 0.8


@dataclass(frozen=True)
class Finding:
    """One thing found. ``problem``: something is attributed wrongly or not at all."""

    id: str
    level: Literal["problem", "advice"]
    what: str
    why: str
    cure: str


def examine(paths: Paths) -> list[Finding]:
    """All findings, problems first. Changes nothing."""
    found: list[Finding] = []
    for examination in (_data_path, _foreign, _cgroups, _config, _conntrack, _plugin, _node):
        found += examination(paths)
    if os.geteuid() == 0:
        found += _rules()
    else:
        found.append(
            Finding(
                "not-root",
                "advice",
                "rules were not examined",
                "only root may read them",
                "sudo vnet doctor",
            )
        )
    return sorted(found, key=lambda finding: finding.level != "problem")


def _data_path(paths: Paths) -> Iterator[Finding]:
    """The module, and what stands in for it; the guard's own needs."""
    lacking = bpf.lacking() if os.geteuid() == 0 else []
    for what in lacking:
        yield Finding(
            "guard-missing",
            "problem",
            f"the eBPF programs cannot run here: {what}",
            "without them there is no guard, and `vnet up` refuses",
            "a kernel from 6.1 on with CONFIG_CGROUP_BPF and CONFIG_DEBUG_INFO_BTF, and root",
        )
    try:
        module.loadable()
    except ModuleError as error:
        yield Finding(
            "module-missing",
            "problem" if lacking else "advice",
            error.message,
            "without the module packets are marked by stock rules and eBPF (data path bpf), which "
            "cost more; `vnet status` says what else differs",
            error.cure,
        )
    if os.geteuid() == 0 and (why := bpf.lsm_lacking()):
        unguarded = nodeconfig.load(paths.node_config).packet_sockets == "unguarded"
        yield Finding(
            "packet-sockets",
            "advice" if unguarded else "problem",
            f"packet sockets cannot be refused: {why}",
            "a slice whose processes have CAP_NET_RAW can read and send every packet by AF_PACKET, "
            "AF_XDP or SOCK_PACKET"
            + ("" if unguarded else "; `vnet up` refuses unless that is accepted"),
            choice.packet_cure(paths.node_config),
        )
    if not bpf.is_bpffs(paths.bpf_dir):
        yield Finding(
            "no-bpffs",
            "advice",
            f"{paths.bpf_dir} is not on a bpffs",
            "the eBPF programs are kept there; `vnet up` mounts one on /sys/fs/bpf",
            "mount -t bpf bpf /sys/fs/bpf",
        )
    if module.loaded():
        return
    if module.secure_boot() or module.signatures_enforced():
        yield Finding(
            "secure-boot",
            "advice",
            "Secure Boot (or a kernel lockdown) is on",
            "the kernel then loads only modules signed with a key it trusts, and one you have "
            "built is not, unless DKMS signed it with an enrolled key",
            "mokutil --import /var/lib/dkms/mok.pub, reboot and enroll; check with "
            "`modinfo -F signer xt_copyxid`",
        )


def _foreign(paths: Paths) -> Iterator[Finding]:
    """Programs and settings of others that the guard and the marks meet."""
    if _is_on(Path("/proc/sys/net/ipv4/tcp_fwmark_accept")):
        yield Finding(
            "fwmark-accept",
            "problem",
            "net.ipv4.tcp_fwmark_accept is on",
            "an accepted socket then takes the mark of the packet that opened it, whatever slice "
            "the listener is of, and the guard drops what it sends",
            "sysctl -w net.ipv4.tcp_fwmark_accept=0",
        )
    state = states.load(paths.state)
    if os.geteuid() != 0 or state is None:
        return
    for what in bpf.healthy(Path(state.instance), state.packet_sockets == "guarded"):
        yield Finding(
            "guard-broken",
            "problem",
            what,
            "what that program refuses or marks is refused or marked no more",
            "vnet up; and find who detached it",
        )


def _cgroups(_paths: Paths) -> Iterator[Finding]:
    try:
        root = cgroups.v2_root()
    except NodeError as error:
        yield Finding(
            "no-cgroup2", "problem", error.message, "no slice can be recognised", error.cure
        )
        return
    if cgroups.is_hybrid(root):
        yield Finding(
            "hybrid-cgroups",
            "advice",
            f"cgroup v2 is at {root}, beside v1 hierarchies",
            "vnet goes by v2 and works; nft's `socket cgroupv2` and other tools look under "
            "/sys/fs/cgroup, and a container manager may place its processes in v1 only, "
            "outside every slice",
            "boot with systemd.unified_cgroup_hierarchy=1; else see that each slice's processes "
            "show up in its cgroup.procs under that directory",
        )


def _config(paths: Paths) -> Iterator[Finding]:
    try:
        slices = config.load(paths.config_dir)
        nodeconfig.load(paths.node_config)
        root = cgroups.v2_root()
    except ConfigError as error:
        yield Finding(
            "config",
            "problem",
            error.message,
            "`vnet up` refuses until every file is right",
            "correct the line",
        )
        return
    except NodeError:
        return
    missing = [
        f"{path} (slice {item.name})"
        for item in slices
        for path in item.cgroups
        if cgroups.cgroup_id(root, path) is None
    ]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        yield Finding(
            "cgroup-missing",
            "advice",
            f"cgroups that do not exist: {', '.join(missing[:5])}{more}",
            "nothing is marked for them until they do; `vnet watch` notices when they appear",
            "start their units, or correct the paths; `systemctl start vnet-watch` if it is not "
            "running",
        )


def _conntrack(paths: Paths) -> Iterator[Finding]:
    folder = Path("/proc/sys/net/netfilter")
    up = paths.state.exists()
    try:
        count = int((folder / "nf_conntrack_count").read_text())
        room = int((folder / "nf_conntrack_max").read_text())
        accounts = (folder / "nf_conntrack_acct").read_text().strip() == "1"
    except FileNotFoundError:
        if up:
            yield Finding(
                "no-conntrack",
                "problem",
                "connection tracking is not loaded",
                "packets without a socket (TIME_WAIT, ICMP errors) cannot be attributed, and "
                "there is nothing to account",
                "modprobe nf_conntrack, then `vnet up`",
            )
        return
    if count > room * _NEARLY_FULL:
        yield Finding(
            "conntrack-full",
            "problem",
            f"the connection table is nearly full: {count} of {room}",
            "what finds no place is dropped, and never accounted",
            f"sysctl -w net.netfilter.nf_conntrack_max={room * 2}",
        )
    if up and not accounts:
        yield Finding(
            "conntrack-acct",
            "problem",
            "net.netfilter.nf_conntrack_acct is off",
            "new connections are tracked without packets and bytes",
            "vnet up; and find who switched it off (grep -r nf_conntrack_acct /etc/sysctl.d)",
        )


def _plugin(_paths: Paths) -> Iterator[Finding]:
    try:
        module.loadable()
    except ModuleError:
        return  # then no rule of ours says --copy-xid
    directories = rules.system_directories()
    for directory in directories:
        plugin = directory / "libxt_MARK.so"
        if plugin.exists():
            if rules.is_ours(plugin):
                return
            break
    target = directories[0] if directories else Path("/usr/lib/xtables")
    yield Finding(
        "plugin-not-system-wide",
        "advice",
        f"the system's libxt_MARK.so in {target} does not know --copy-xid",
        "while our rules are in place, others' `iptables-save` and `iptables -S` stop at them "
        "half-way, and what they restore later may lack rules",
        f"dpkg-divert --local --rename --add {target}/libxt_MARK.so && "
        f"install -m 644 {rules.PLUGIN} {target}/",
    )


def _node(paths: Paths) -> Iterator[Finding]:
    if paths.journal.exists() and not guard.busy(paths):
        yield Finding(
            "half-done",
            "problem",
            "an `up` was killed half-way, and what it did is still there",
            "some packets may be marked and others not",
            "vnet up, or vnet down: either undoes it first",
        )


def _rules() -> Iterator[Finding]:
    texts: dict[tuple[Family, rules.Variant], str] = {}
    for family in rules.families():
        for variant in rules.VARIANTS:
            try:
                texts[family, variant] = rules.save_all(family, variant)
            except VnetError as error:
                yield Finding(
                    "rules-unreadable",
                    "problem",
                    f"IPv{family} ({variant}): {error.message}",
                    "what is in these tables cannot be judged, by us or by other tools",
                    error.cure or "run that command by hand",
                )
    ruleset = _nft()
    yield from _writers(texts, ruleset)
    yield from _readers(texts)
    yield from _routing()
    yield from _untracked(texts, ruleset)
    yield from _mixed(texts)
    yield from _places(texts)


def _writers(
    texts: dict[tuple[Family, rules.Variant], str], ruleset: dict[str, Any]
) -> Iterator[Finding]:
    own = frozenset(chain for _table, chain in OURS)
    writes = [
        (f"IPv{family} ({variant}): ", write)
        for (family, variant), text in texts.items()
        for write in marks.in_save(text, own)
    ]
    # iptables-nft's tables show in both listings; its MARK is a native
    # statement on newer releases.
    known = {("ip" if family == 4 else "ip6") for family, variant in texts if variant == "nft"}
    for write in marks.in_nft(ruleset):
        words = write.rule.split()
        if words[2] in known and words[3] in ("raw", "mangle", "nat", "filter", "security"):
            continue
        writes.append(("", write))
    for where, write in writes:
        if not write.hurts:
            continue
        if write.kind == "packet":
            yield Finding(
                "mark-writer",
                "problem",
                f"{where}{write.rule} writes bits {write.bits & 0xFFFF:#x} of the packet mark",
                "the low 16 bits say whose packet it is; after that rule they say something else",
                "give it bits of the upper half, with a mask (--set-xmark 0x10000/0x10000, "
                "nft: meta mark set meta mark | 0x10000); Kubernetes: kube-proxy "
                "--iptables-masquerade-bit=16 or higher",
            )
        else:
            yield Finding(
                "connmark-writer",
                "problem",
                f"{where}{write.rule} writes bits {write.bits:#x} of the connection mark",
                "all 32 bits of it hold the two owners of the connection; what is overwritten is "
                "charged to somebody else",
                "use a connection label (-m connlabel, nft: ct label) or the upper half of the "
                "packet mark instead",
            )


def _readers(texts: dict[tuple[Family, rules.Variant], str]) -> Iterator[Finding]:
    own = frozenset(chain for _table, chain in OURS)
    found = [
        f"IPv{family} ({variant}): {line}"
        for (family, variant), text in texts.items()
        for line in marks.readers_in_save(text, own)
    ]
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        yield Finding(
            "mark-reader",
            "advice",
            f"rules match on bits that hold the owner: {'; '.join(found[:5])}{more}",
            "right if they mean slices; if they mean a mark of their own, they now also match "
            "slices whose xid has these bits",
            "leave those that mean slices; let the others use the upper half: "
            "-m mark --mark 0x10000/0x10000",
        )


def _routing() -> Iterator[Finding]:
    """Marks that come back as a route: replies and accepted sockets may take ours along."""
    switches = [
        key
        for key in ("ipv4/fwmark_reflect", "ipv4/tcp_fwmark_accept", "ipv6/fwmark_reflect")
        if _is_on(Path("/proc/sys/net", key))
    ]
    found = [
        line.strip() for family in ("-4", "-6") for line in _ip_rules(family) if _low_fwmark(line)
    ]
    if switches and found:
        yield Finding(
            "mark-routing",
            "problem",
            f"{' and '.join(switches)} on, and routing goes by our bits: {'; '.join(found[:3])}",
            "replies of the kernel and accepted connections take over the mark of what they "
            "answer, which is the owner, and may then be routed by it",
            "let the routing rules use the upper half with a mask: fwmark 0x10000/0x10000",
        )


def _is_on(path: Path) -> bool:
    try:
        return path.read_text().strip() != "0"
    except OSError:
        return False


def _ip_rules(family: str) -> list[str]:
    try:
        done = subprocess.run(
            ["ip", family, "rule", "show"], capture_output=True, text=True, env=rules.environment()
        )
    except FileNotFoundError:
        return []
    return done.stdout.splitlines()


def _low_fwmark(line: str) -> bool:
    words = line.split()
    if "fwmark" not in words[:-1]:
        return False
    _value, slash, mask = words[words.index("fwmark") + 1].partition("/")
    return bool((int(mask, 0) if slash else marks.ALL) & marks.OURS["packet"])


def _untracked(
    texts: dict[tuple[Family, rules.Variant], str], ruleset: dict[str, Any]
) -> Iterator[Finding]:
    found = [line for text in texts.values() for line in marks.untracked_in_save(text)]
    found += marks.untracked_in_nft(ruleset)
    if found:
        yield Finding(
            "untracked",
            "advice",
            f"rules keep packets from connection tracking: {'; '.join(found[:3])}",
            "those packets are marked by their socket only, and no flow record is made of them",
            "narrow the rules to what need not be accounted for",
        )


def _mixed(texts: dict[tuple[Family, rules.Variant], str]) -> Iterator[Finding]:
    for family in rules.families():
        legacy, nft = (
            any(line.startswith("-A ") for line in texts.get((family, variant), "").splitlines())
            for variant in rules.VARIANTS
        )
        if legacy and nft:
            yield Finding(
                f"mixed-ipv{family}",
                "advice",
                f"IPv{family} has rules in both the legacy and the nft tables",
                "both run, each tool shows only its own, and which comes first depends on which "
                "was made first: a rule that logs by mark may run before ours",
                "move all rules to one of them (update-alternatives --config iptables), then "
                "`vnet up --variant` that one",
            )


def _places(texts: dict[tuple[Family, rules.Variant], str]) -> Iterator[Finding]:
    for (family, variant), text in texts.items():
        for name, table in rules.read(text).items():
            for chain, places in table.jumps.items():
                if places != [1]:
                    yield Finding(
                        "not-first",
                        "problem",
                        f"IPv{family} ({variant}): {OURS[name, chain]} in table {name} jumps to "
                        f"{chain} from place {', '.join(map(str, places))}, not from the first",
                        "rules before it that log or classify by mark see packets without an owner",
                        "vnet up puts it first again; order vnet.service after what adds those "
                        "rules",
                    )


def _nft() -> dict[str, Any]:
    try:
        done = subprocess.run(
            ["nft", "-j", "list", "ruleset"],
            capture_output=True,
            text=True,
            env=rules.environment(),
        )
    except FileNotFoundError:
        return {}  # no nft: then nobody wrote native rules with it either
    if done.returncode != 0 or not done.stdout:
        return {}
    found: dict[str, Any] = json.loads(done.stdout)
    return found
