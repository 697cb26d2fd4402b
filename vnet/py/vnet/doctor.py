"""What would break the marks on this host, why it matters, and the cure."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vnet import doctor_host, iptables, marks, rules, sysctls
from vnet.datapath import OURS, Family
from vnet.errors import VnetError
from vnet.findings import Finding
from vnet.paths import Paths


def examine(paths: Paths) -> list[Finding]:
    """All findings, problems first. Changes nothing."""
    found: list[Finding] = []
    for examination in doctor_host.EXAMINATIONS:
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


def _rules() -> Iterator[Finding]:
    texts: dict[tuple[Family, iptables.Variant], str] = {}
    for family in iptables.families():
        for variant in iptables.VARIANTS:
            try:
                texts[family, variant] = iptables.save_all(family, variant)
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
    texts: dict[tuple[Family, iptables.Variant], str], ruleset: dict[str, Any]
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


def _readers(texts: dict[tuple[Family, iptables.Variant], str]) -> Iterator[Finding]:
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
        if sysctls.is_on(Path("/proc/sys/net", key))
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


def _ip_rules(family: str) -> list[str]:
    try:
        done = subprocess.run(
            ["ip", family, "rule", "show"],
            capture_output=True,
            text=True,
            env=iptables.environment(),
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
    texts: dict[tuple[Family, iptables.Variant], str], ruleset: dict[str, Any]
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


def _mixed(texts: dict[tuple[Family, iptables.Variant], str]) -> Iterator[Finding]:
    for family in iptables.families():
        legacy, nft = (
            any(line.startswith("-A ") for line in texts.get((family, variant), "").splitlines())
            for variant in iptables.VARIANTS
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


def _places(texts: dict[tuple[Family, iptables.Variant], str]) -> Iterator[Finding]:
    for (family, variant), text in texts.items():
        for name, table in rules.read(text).items():
            for base in dict.fromkeys(OURS[name, chain] for chain in table.jumps):
                jumps = sorted(
                    (place, chain)
                    for chain, found in table.jumps.items()
                    for place, _condition in found
                    if OURS[name, chain] == base
                )
                if [place for place, _chain in jumps] == list(range(1, len(jumps) + 1)):
                    continue
                words = ", ".join(f"to {chain} from place {place}" for place, chain in jumps)
                yield Finding(
                    "not-first",
                    "problem",
                    f"IPv{family} ({variant}): {base} in table {name} jumps {words}, not from the "
                    "first",
                    "rules before it that log or classify by mark see packets without an owner",
                    "vnet up puts it first again; order vnet.service after what adds those rules",
                )


def _nft() -> dict[str, Any]:
    try:
        done = subprocess.run(
            ["nft", "-j", "list", "ruleset"],
            capture_output=True,
            text=True,
            env=iptables.environment(),
        )
    except FileNotFoundError:
        return {}  # no nft: then nobody wrote native rules with it either
    if done.returncode != 0 or not done.stdout:
        return {}
    found: dict[str, Any] = json.loads(done.stdout)
    return found
