"""A node of the checker's own: a network namespace in which ``vnet up`` has run."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from vnet import bpf, node
from vnet.datapath import DataPath
from vnet.errors import NodeError, UsageError
from vnet.paths import Paths
from vnet.testing import cgroup, names, net
from vnet.testing.poll import until

_WHERE = Path("/run")

_SLICES = """
[[slice]]
name = "resident"
cgroups = ["{cgroup}"]
interfaces = ["{interface}"]
[slice.grants]
raw = "own"
ports = ["tcp/1080", "udp/1080-1083"]
addresses = ["192.88.99.7"]
"""


@contextmanager
def sandbox(datapath: DataPath | None) -> Iterator[Paths]:
    """Be in a namespace with a node that is up, one slice, and ``vnet watch``; then take it away.

    Raises UsageError, NodeError, and what ``vnet up`` raises.
    """
    node.require_root("check")
    if datapath == "module":
        raise UsageError(
            "vnet check: the module's table is set from the host's own network namespace only, so "
            "a namespace of the checker's cannot have that data path",
            "vnet up --datapath module, then vnet check --live",
        )
    sweep()
    with ExitStack() as stack:
        enter = stack.enter_context
        base = Path(tempfile.mkdtemp(prefix=f"{names.fresh('check')}-", dir=_WHERE))
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        ns, box = enter(net.namespace("node")), enter(net.namespace("box"))
        home, resident = enter(cgroup.cgroup("resident")), enter(net.veth(ns, box))
        enter(_inside(ns))
        # What depends on how much the kernel has said of late is not of this node's making.
        net.HERE.sysctl(net__ipv4__icmp_ratelimit=0, net__ipv6__icmp__ratelimit=0)
        net.HERE.sysctl(net__ipv4__ping_group_range="0 2147483647", net__ipv4__ip_forward=1,
                        net__ipv6__conf__all__forwarding=1)  # fmt: skip
        bpffs = base / "bpf"
        bpffs.mkdir()
        subprocess.run(["mount", "-t", "bpf", "bpf", bpffs], check=True)
        stack.callback(_unmount, bpffs)
        paths = Paths(base / "slices.d", base / "state", base / "run", bpffs / "vnet")
        paths.config_dir.mkdir()
        text = _SLICES.format(cgroup=home.rel, interface=resident.a_if)
        (paths.config_dir / "slices.toml").write_text(text)
        guarded = "unguarded" if bpf.lsm_lacking() else "guarded"
        paths.node_config.write_text(f'[guard]\npacket_sockets = "{guarded}"\n')
        node.up(paths, datapath=datapath or "bpf")
        stack.callback(node.down, paths)
        enter(_watch(paths))
        yield paths


@contextmanager
def _inside(ns: net.Namespace) -> Iterator[None]:
    """This process is in a namespace (os.setns exists from Python 3.12 on)."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(f"/run/netns/{ns.name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(there, 0):
            raise OSError(ctypes.get_errno(), "setns")
        yield
    finally:
        libc.setns(home, 0)
        os.close(home)
        os.close(there)


@contextmanager
def _watch(paths: Paths) -> Iterator[None]:
    """``vnet watch`` beside us, from when it says that it watches (sd_notify(3))."""
    # A checker that is killed takes it along: nobody else would end it.
    argv = ["setpriv", "--pdeathsig", "TERM", "--",
            sys.executable, "-m", "vnet.cli", "--config-dir", str(paths.config_dir),
            "--state-dir", str(paths.state_dir), "--run-dir", str(paths.run_dir),
            "--bpf-dir", str(paths.bpf_dir), "watch"]  # fmt: skip
    door = paths.run_dir / "watch.ready"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(str(door))
        ready.settimeout(30)
        env = {**os.environ, "NOTIFY_SOCKET": str(door)}
        quiet = subprocess.DEVNULL
        with subprocess.Popen(argv, env=env, stdout=quiet, stderr=quiet) as process:
            try:
                with suppress(TimeoutError):  # then `restart` tells
                    ready.recv(100)
                yield
            finally:
                process.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()


@contextmanager
def stoppable() -> Iterator[None]:
    """The whole life of a checking process: what it made goes when it is asked to stop, too."""

    def stop(*_: object) -> None:
        for number in _STOPS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in _STOPS:
        signal.signal(number, stop)
    try:
        yield
    finally:
        # A signal between making something and noting it leaves it behind.
        with whole():
            _remove([base for base in _WHERE.glob(f"{names.PREFIX}*") if names.is_mine(base.name)])
            for path in cgroup.leftovers():
                cgroup.remove(path)
            for name in net.leftovers():
                net.delete(net.Namespace(name))


@contextmanager
def whole() -> Iterator[None]:
    """Who asks us to stop meanwhile is heard at the end."""
    asked: list[int] = []
    before = {n: signal.signal(n, lambda number, _: asked.append(number)) for n in _STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if asked:
            signal.raise_signal(asked[0])


_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def sweep() -> None:
    """Take away what killed checkers have left of their sandboxes."""
    _remove([base for base in _WHERE.glob(f"{names.PREFIX}*") if names.is_orphan(base.name)])
    cgroup.sweep()
    net.sweep()


def _remove(bases: Iterable[Path]) -> None:
    for base in bases:
        for instance in bpf.instances(base / "bpf" / "vnet"):
            bpf.remove(instance)
        _unmount(base / "bpf")
        # `vnet watch` of a killed checker may still be writing to it, on its way out
        try:
            until(partial(_is_removed, base))
        except AssertionError as error:
            raise NodeError(f"{base} cannot be removed", f"rm -r {base}") from error


def _is_removed(base: Path) -> bool:
    shutil.rmtree(base, ignore_errors=True)
    return not base.exists()


def _unmount(bpffs: Path) -> None:
    if not os.path.ismount(bpffs):
        return
    done = subprocess.run(["umount", bpffs], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NodeError(f"{bpffs} cannot be unmounted: {done.stderr.strip()}", f"umount {bpffs}")
