"""A container of Debian's lxc, whose host end of the veth is in a namespace of the tests.

lxc-start looks for bridges in /sys/class/net, so it gets a /sys of that
namespace, with the cgroups as they are. The container's root is busybox.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vnet.testing import names
from vnet.testing.net import Namespace
from vnet.testing.poll import until

TOOLS = ("lxc-start", "lxc-attach", "lxc-stop", "lxc-info")

_SYS = """
mount --rbind /sys/fs/cgroup "$1"; mount -t sysfs sysfs /sys; mount --rbind "$1" /sys/fs/cgroup
shift; exec "$@"
"""

_CONFIG = """
lxc.uts.name = {name}
lxc.rootfs.path = dir:{base}/rootfs
lxc.init.cmd = /bin/httpd -f -p 80 -h /
lxc.mount.auto = proc:mixed
lxc.autodev = 1
lxc.apparmor.profile = unconfined
lxc.cgroup.dir.container = {name}/container
lxc.cgroup.dir.monitor = {name}/monitor
lxc.cgroup.dir.monitor.pivot = {name}/pivot
lxc.net.0.type = veth
lxc.net.0.name = eth0
lxc.net.0.veth.pair = {veth}
lxc.net.0.flags = up
lxc.net.0.ipv4.address = {v4}/24
lxc.net.0.ipv6.address = {v6}/64
{network}
"""


def missing() -> str:
    """What is not installed here; "" if all is."""
    found = [tool for tool in (*TOOLS, "busybox") if not shutil.which(tool)]
    return ", ".join(found)


@dataclass(frozen=True)
class Container:
    """A running container."""

    name: str
    base: Path
    node: Namespace
    veth: str
    v4: str
    v6: str

    def popen(self, *argv: str) -> subprocess.Popen[str]:
        """Start a program of busybox in it."""
        return self.node.popen(*self._attach, *argv)

    def run(self, *argv: str) -> str:
        """Run one to its end."""
        return self.node.run(*self._attach, *argv).stdout

    @property
    def _attach(self) -> tuple[str, ...]:
        return ("lxc-attach", "-P", str(self.base.parent), "-n", self.name, "--")


@contextmanager
def container(node: Namespace, veth: str, v4: str, v6: str, network: str) -> Iterator[Container]:
    """Start a container; ``network``: the rest of lxc.net.0."""
    name = names.fresh("lxc")
    with tempfile.TemporaryDirectory(prefix="vnet-lxc") as top:
        base = Path(top, name)
        _root(base / "rootfs")
        text = _CONFIG.format(name=name, base=base, veth=veth, v4=v4, v6=v6, network=network)
        (base / "config").write_text(text)
        (log, cgroups) = (Path(top, "log"), Path(top, "cgroup"))
        cgroups.mkdir()
        start = ("lxc-start", "-P", top, "-n", name, "-d", "-o", str(log), "-l", "INFO")
        try:
            # Our own /sys is right where the node is ourselves, and cannot be had twice.
            its_sys = ("unshare", "-m", "sh", "-ec", _SYS, "sh", str(cgroups)) if node.name else ()
            started = node.run(*its_sys, *start, check=False)
            said = log.read_text() if log.exists() else ""
            errors = "\n".join(line for line in said.splitlines() if "ERROR" in line)
            assert started.returncode == 0, f"lxc-start: {started.stderr}\n{errors}"
            yield Container(name, base, node, veth, v4, v6)
        finally:
            node.run("lxc-stop", "-P", top, "-n", name, "-k", check=False)
            until(lambda: _cgroups_gone(name), what=f"the cgroups of {name} are gone")


def _root(root: Path) -> None:
    for part in ("bin", "proc", "sys", "dev", "tmp", "etc", "run"):
        (root / part).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "", root / "bin" / "busybox")
    for applet in ("sh", "ping", "ping6", "nc", "httpd", "wget", "true"):
        (root / "bin" / applet).symlink_to("busybox")
    (root / "index.html").write_text("hello\n")


def _cgroups_gone(name: str) -> bool:
    """lxc leaves those that it puts its monitor into."""
    left = False
    lines = Path("/proc/self/mounts").read_text().splitlines()
    for mount in {line.split()[1] for line in lines if line.split()[2].startswith("cgroup")}:
        top = Path(mount, name)
        for path in [*sorted(top.rglob("*/"), reverse=True), top]:
            with suppress(OSError):
                path.rmdir()
        left = left or top.exists()
    return not left
