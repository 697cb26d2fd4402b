"""What ``vnet doctor`` finds in the host itself: kernel, cgroups, files, connection tracking."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from vnet import bpf, cgroups, choice, config, guard, iptables, module, nodeconfig, sysctls
from vnet import state as states
from vnet.datapath import OURS
from vnet.errors import ConfigError, ModuleError, NodeError
from vnet.findings import Finding
from vnet.paths import Paths

#: A connection that finds no place in the table is not tracked, and is dropped.
_NEARLY_FULL = 0.8


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
            "mount -t bpf -o mode=700 bpf /sys/fs/bpf",
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
    if sysctls.is_on(Path("/proc/sys/net/ipv4/tcp_fwmark_accept")):
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
    directories = iptables.system_directories()
    for directory in directories:
        plugin = directory / "libxt_MARK.so"
        if plugin.exists():
            if iptables.is_ours(plugin):
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
        f"install -m 644 {iptables.PLUGIN} {target}/",
    )


def _node(paths: Paths) -> Iterator[Finding]:
    if paths.journal.exists() and not guard.busy(paths):
        yield Finding(
            "half-done",
            "problem",
            "a command was killed half-way, and what it did is still there",
            "some packets may be marked and others not",
            "vnet up, or vnet down: either undoes it first",
        )


#: what is loaded before `vnet up`: of netfilter-persistent, of iptables-services, of nftables
_SAVED = (
    "iptables/rules.v4",
    "iptables/rules.v6",
    "sysconfig/iptables",
    "sysconfig/ip6tables",
    "nftables.conf",
)


def saved_rules(_paths: Paths) -> Iterator[Finding]:
    """Rules of ours in files from which a host loads its own at boot."""
    ours = re.compile(rf"\b({'|'.join({chain for _table, chain in OURS})})\b")
    for name in _SAVED:
        file = Path("/etc", name)
        try:
            text = file.read_text(errors="replace")
        except OSError:
            continue
        if ours.search(text):
            yield Finding(
                "saved-rules",
                "problem",
                f"{file} holds rules of ours, saved while the node was up",
                "at boot it is loaded before `vnet up`: the programs that they name are not there, "
                "and so nothing of the file is loaded; the host is left without its own rules",
                "take out the chains VNET-* and the rules that jump to them"
                if file.suffix == ".conf"
                else f"sed -i /VNET-/d {file}; after each time that they are saved",
            )


EXAMINATIONS: tuple[Callable[[Paths], Iterator[Finding]], ...] = (
    _data_path,
    _foreign,
    _cgroups,
    _config,
    _conntrack,
    _plugin,
    saved_rules,
    _node,
)
