"""Places to measure in: a network namespace and cgroups each, with one set of rules and programs.

A place has a cgroup of its own as the root of all cgroups that ``vnet up`` knows: it is mounted
over the real root for the time of a command. So the programs are attached there, cost the sockets
of that place only, and many places can be measured by turns.
"""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vnet.testing import cgroup as cgroups
from vnet.testing.net import Namespace, namespace

ROOT = Path(__file__).resolve().parent.parent.parent
PORTS_FROM = 20_000  #: reserved ports, one for each slice
Variant = Literal["nft", "legacy"]

_UNDER = 'mount --bind "$0" "$1" && shift && exec "$@"'


def run(*argv: str | Path, text: str | None = None, env: dict[str, str] | None = None) -> str:
    """Run a program. Exits with its words if it fails."""
    done = subprocess.run(
        argv, input=text, capture_output=True, text=True, check=False, env={**os.environ, **env}
        if env else None,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, argv))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


@dataclass(frozen=True)
class Place:
    """A namespace, its cgroups, and vnet's directories for it."""

    ns: Namespace
    root: Path  #: the cgroup that is the root here
    base: Path
    bpffs: Path
    slices: int  #: how many there are: s1 sends, s2 receives if there is one, else s1
    near: str  #: its own address on the way to the peer
    far: str  #: the peer's, a namespace without rules

    @property
    def sender(self) -> Path:
        return self.root / "s1"

    @property
    def receiver(self) -> Path:
        return self.root / f"s{min(2, self.slices)}"

    def inside(self, *argv: str | Path, text: str | None = None) -> str:
        """Run a program in the namespace."""
        return run("nsenter", f"--net=/run/netns/{self.ns.name}", "--", *argv, text=text)

    def restore(self, variant: Variant, table: str, *rules: str) -> None:
        """Put rules, as iptables-save writes them, into an IPv4 table."""
        text = "\n".join([f"*{table}", *rules, "COMMIT", ""])
        self.inside(f"iptables-{variant}-restore", "-n", text=text)

    def vnet(self, *argv: str) -> str:
        """Run ``vnet`` where this place is all there is."""
        return self.python("-m", "vnet.cli", *argv)

    def python(self, *argv: str) -> str:
        """Run Python with the package there."""
        env = {f"VNET_{name.upper()}_DIR": str(self.base / name) for name in ("state", "run")}
        env["VNET_CONFIG_DIR"] = str(self.base / "etc/slices.d")
        env["VNET_BPF_DIR"] = str(self.bpffs / self.ns.name)
        env["PYTHONPATH"] = str(ROOT / "vnet/py")
        return run(
            "unshare", "-m", "--propagation", "private", "sh", "-c", _UNDER, self.root,
            cgroups.root(), "nsenter", f"--net=/run/netns/{self.ns.name}", "--",
            sys.executable, *argv,
            env=env,
        )  # fmt: skip

    def instance(self) -> Path:
        """What ``vnet up`` pinned."""
        return next(path.parent for path in (self.bpffs / self.ns.name).glob("*/progs"))

    def strip(self, tables: Collection[str], links: Collection[str]) -> None:
        """Take down all but these tables and links of what ``vnet up`` put in place."""
        for table in {"raw", "mangle"} - set(tables):
            for family in ("ip", "ip6"):
                self.inside("nft", "delete", "table", family, table)
        from vnet.bpfmaps import lib

        for path in (self.instance() / "links").iterdir():
            if path.name not in links:
                fd = lib.bpf_obj_get(os.fsencode(path))
                lib.bpf_link_detach(fd)
                os.close(fd)
                path.unlink()


def configure(place: Place, raw: str = "deny") -> None:
    """Write a place's slices, each with a reserved port, and what the node says of itself."""
    directory = place.base / "etc/slices.d"
    directory.mkdir(parents=True)
    lines = []
    for i in range(1, place.slices + 1):
        lines += ["[[slice]]", f'name = "s{i}"', f"xid = {i}", f'cgroups = ["/s{i}"]']
        lines += ["[slice.grants]", f'ports = ["udp/{PORTS_FROM + i}"]']
        lines += [f'raw = "{raw}"'] if i == 1 else []
    (directory / "slices.toml").write_text("\n".join(lines) + "\n", encoding="ascii")
    (place.base / "etc/vnet.toml").write_text('[guard]\npacket_sockets = "unguarded"\n')


_numbers = itertools.count(1)


def _wire(ns: Namespace, peer: Namespace) -> tuple[str, str]:
    """Join two namespaces by a veth pair; returns the two addresses."""
    number = next(_numbers)
    near, far = f"10.98.{number}.1", f"10.98.{number}.2"
    link = f"near{number}"
    run("ip", "link", "add", link, "netns", ns.name, "type", "veth",
        "peer", "name", f"far{number}", "netns", peer.name)  # fmt: skip
    for where, name, address in ((ns, link, near), (peer, f"far{number}", far)):
        run("ip", "-n", where.name, "address", "add", f"{address}/30", "dev", name)
        run("ip", "-n", where.name, "link", "set", name, "up")
    return near, far


@contextmanager
def place(base: Path, bpffs: Path, peer: Namespace, slices: int = 2) -> Iterator[Place]:
    """Make a place, with nothing in it but its cgroups and a way to the peer."""
    with namespace("bench") as ns, cgroups.cgroup() as root:
        made = Place(ns, root.path, base / ns.name, bpffs, slices, *_wire(ns, peer))
        made.base.mkdir()
        for i in range(1, slices + 1):
            (root.path / f"s{i}").mkdir()
        # what a namespace inherits is not the same on every machine
        ns.sysctl(net__netfilter__nf_conntrack_acct=0, net__netfilter__nf_conntrack_timestamp=0)
        yield made


@contextmanager
def bpffs(base: Path) -> Iterator[Path]:
    """A bpffs; what is pinned in it goes with it."""
    top = base / "bpffs"
    top.mkdir()
    run("mount", "-t", "bpf", "bpf", top)
    try:
        yield top
    finally:
        for link in top.rglob("links/*"):
            link.unlink()
        run("umount", top)


def timed(place: Place, *argv: str) -> float:
    """Seconds of processor time that a whole ``vnet`` command takes, its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    place.vnet(*argv)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
