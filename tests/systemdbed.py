"""A machine within this one, whose process 1 is systemd: to run units under it.

Its root is this machine's, under an overlay in memory. It has its own mounts,
processes and network, and this kernel; of its cgroups systemd has a part of
this machine's tree, since a cgroup namespace would hide how deep they are. No
unit of this machine runs in it but journald and dbus.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vnet.testing.cgroup import Cgroup, cgroup
from vnet.testing.net import HERE
from vnet.testing.poll import until

ROOT = Path(__file__).resolve().parents[1]
TREE = "/opt/tree"
"""Where the box has this project, whichever ProtectHome= would hide."""
SYSTEMD = "/lib/systemd/systemd"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What would change the kernel that we share, or look for hardware.
_MASKED = (
    "systemd-udevd.service systemd-udev-trigger.service systemd-sysctl.service "
    "systemd-modules-load.service systemd-udevd-control.socket systemd-udevd-kernel.socket "
    "systemd-journald-audit.socket sys-kernel-debug.mount sys-kernel-tracing.mount "
    "sys-fs-fuse-connections.mount dev-hugepages.mount dev-mqueue.mount"
)

_TARGET = """[Unit]
Requires=sysinit.target basic.target
After=sysinit.target basic.target
AllowIsolate=yes
"""

_COMMAND = """#!/bin/sh
PYTHONPATH={tree}:{tree}/vnet/py exec {tree}/.venv/bin/python -c \
'from {name}.cli import main; main()' "$@"
"""

# $1: an empty directory, $2: the tree. The bpffs, as systemd mounts it on a
# machine, but in no container.
_BOOT = """
mount -t tmpfs -o mode=755 box "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" box "$1/root"
cd "$1/root"
rm -rf etc/systemd/system etc/vnet var/lib/vnet var/lib/netflow var/log/journal
rm -rf usr/local/sbin/vnet usr/local/sbin/netflow
mkdir -p etc/systemd/system opt/tree usr/local/sbin etc/vnet/slices.d
: >etc/machine-id
for unit in $masked; do ln -s /dev/null etc/systemd/system/$unit; done
printf %s "$target" >etc/systemd/system/box.target
mount --bind "$2" opt/tree
cp opt/tree/systemd/*.service etc/systemd/system/
mkdir etc/systemd/system/nftables.service.d
cp opt/tree/systemd/firewall.conf etc/systemd/system/nftables.service.d/vnet.conf
printf %s "$vnet" >usr/local/sbin/vnet
printf %s "$netflow" >usr/local/sbin/netflow
chmod 755 usr/local/sbin/vnet usr/local/sbin/netflow
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t bpf bpf sys/fs/bpf
mount -t tmpfs -o mode=755 dev dev
for d in null zero full random urandom tty; do : >dev/$d; mount --bind /dev/$d dev/$d; done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs run run
mount -t tmpfs tmp tmp
mkdir run/lock
ip link set lo up
pivot_root . mnt
exec chroot . sh -c 'umount -l /mnt; exec env -i container=box PATH=$PATH "$@"' sh "$3" \
    --unit=box.target --log-target=null --show-status=no
"""


def missing() -> str:
    """What is not installed here; "" if all is."""
    tools = ("systemctl", "unshare", "nsenter", "ip", "pivot_root")
    found = [tool for tool in tools if not shutil.which(tool)]
    return ", ".join([*found, *([] if Path(SYSTEMD).exists() else [SYSTEMD])])


@dataclass(frozen=True)
class Box:
    """The machine; pid is its process 1, seen from here."""

    pid: int
    cgroup: Cgroup

    def popen(self, *argv: str, **kw: int) -> subprocess.Popen[str]:
        """Start a program in it, in no unit of its."""
        return HERE.popen(*self._enter, *argv, **kw)

    def run(self, *argv: str, check: bool = True, timeout: float = 60) -> str:
        """Run one to its end; what it printed."""
        return HERE.run(*self._enter, *argv, check=check, timeout=timeout).stdout

    def exits(self, *argv: str) -> int:
        """Run one to its end; its exit code."""
        return HERE.run(*self._enter, *argv, check=False).returncode

    def units(self, verb: str, *names: str) -> None:
        """Ask systemctl. Raises AssertionError with the journal's end where it says no."""
        done = HERE.run(*self._enter, "systemctl", verb, *names, check=False, timeout=200)
        assert done.returncode == 0, f"{verb} {names}: {done.stderr}\n{self.journal()}"

    def shows(self, unit: str, what: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--property", what, "--value", unit).strip()

    def journal(self, *options: str) -> str:
        """The journal's last 60 lines."""
        return self.run("journalctl", "--no-pager", "-o", "cat", "-n", "60", *options)

    @property
    def _enter(self) -> tuple[str, ...]:
        inside = ("env", "-i", f"PATH={PATH}", "LANG=C.UTF-8", "HOME=/root")
        return ("nsenter", f"--target={self.pid}", "-m", "-u", "-i", "-n", "-p", "--", *inside)


@contextmanager
def box() -> Iterator[Box]:
    """Boot one. All its processes are killed at the end, and its mounts are gone with them."""
    texts = {
        "masked": _MASKED,
        "target": _TARGET,
        **{name: _COMMAND.format(tree=TREE, name=name) for name in ("vnet", "netflow")},
    }
    kinds = ("--mount", "--uts", "--ipc", "--net", "--pid", "--fork")
    with cgroup() as its, tempfile.TemporaryDirectory(prefix="vnet-box") as base:
        boot = HERE.popen(
            *("unshare", *kinds, "sh", "-ec", _BOOT, "sh", base, str(ROOT), SYSTEMD),
            cgroup=its,
            env=texts,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            made = Box(until(lambda: _systemd(boot), 30, "systemd runs"), its)
            until(lambda: _up(made), 60, "systemd has booted")
            yield made
        finally:
            (its.path / "cgroup.kill").write_text("1")
            boot.communicate()


def _systemd(boot: subprocess.Popen[str]) -> int:
    assert boot.poll() is None, f"the box did not boot: {boot.communicate()[0]}"
    children = Path(f"/proc/{boot.pid}/task/{boot.pid}/children").read_text().split()
    programs = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return next((pid for pid, line in programs.items() if line.startswith(SYSTEMD.encode())), 0)


def _up(made: Box) -> bool:
    os.kill(made.pid, 0)
    said = made.run("systemctl", "is-system-running", check=False).strip()
    return said in ("running", "degraded")
