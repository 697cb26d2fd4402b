"""A node to bring up and down in a namespace, its fingerprint, and tools that kill.

``python -m vnetbed up`` takes ``vnet up``'s own steps that put rules in place,
with ordinary rules instead of a data path's, so that the rules are tested by
themselves: lock, guard, journal, sysctls, rules, read-back and state are the
product's.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vnet.datapath import Chain
from vnet.testing.net import Namespace

BODY = "-j MARK --set-xmark 0x7/0xffff"
CHAINS = (
    Chain("raw", "OUTPUT", "VNET-OUT", ("-m addrtype ! --src-type LOCAL -j DROP",)),
    Chain("mangle", "INPUT", "VNET-INPUT", (BODY,)),
    Chain("mangle", "POSTROUTING", "VNET-POST", ("-m mark ! --mark 0x0/0xffff -j RETURN", BODY)),
)
PY = Path(__file__).resolve().parent.parent / "vnet" / "py"

#: everything a ``vnet up`` could leave behind, as text that only changes if it does
_LOOK = r"""
for tool in iptables ip6tables; do
  for variant in legacy nft; do
    echo "== $tool $variant"
    $tool-$variant-save -c 2>/dev/null | grep -v '^#'
  done
done
echo "== nft"; nft list ruleset 2>/dev/null
echo "== sysctls"
sysctl net.netfilter.nf_conntrack_acct net.netfilter.nf_conntrack_timestamp \
  net.netfilter.nf_conntrack_events net.ipv4.ip_local_reserved_ports 2>/dev/null
exit 0
"""


@dataclass
class Node:
    """A namespace (or the guest itself) with its own vnet directories.

    Its eBPF programs need ``bpffs(base)``.
    """

    ns: Namespace
    base: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("config", "state", "run"):
            self.env[f"VNET_{name.upper()}_DIR"] = str(self.base / name)
        self.env["VNET_BPF_DIR"] = str(self.bpf_dir)
        (self.base / "config").mkdir(parents=True, exist_ok=True)

    @property
    def paths(self):
        """As the product's functions want them."""
        from vnet.paths import Paths

        return Paths(self.base / "config", self.base / "state", self.base / "run", self.bpf_dir)

    @property
    def bpf_dir(self) -> Path:
        return self.base / "bpf" / "vnet"

    def settings(self, text):
        """Write vnet.toml."""
        (self.base / "vnet.toml").write_text(text)

    def vnet(self, *argv, check=True, path=None, timeout=240):
        """Run the command ``vnet``; ``path``: a directory whose tools come first."""
        return self.python("-m", "vnet.cli", *argv, check=check, path=path, timeout=timeout)

    def json(self, *argv, check=True):
        """Run ``vnet ... --json`` and return what it printed."""
        return json.loads(self.vnet(*argv, "--json", check=check).stdout)

    def rules_up(self, variant, check=True, path=None):
        """``vnet up`` without the module: see this file's head."""
        return self.python("-m", "vnetbed", "up", variant, check=check, path=path)

    def python(self, *argv, check=True, path=None, timeout=240):
        """Run Python here, with this node's directories."""
        env = dict(self.env, PATH=os.environ["PATH"])
        env["PYTHONPATH"] = os.pathsep.join([str(PY), *sys.path])
        if path:
            env["PATH"] = f"{path}:{env['PATH']}"
        return self.ns.run(sys.executable, *argv, check=check, env=env, timeout=timeout)

    def slices(self, **cgroups):
        """Write slices.toml: name=cgroup path, or name=(path, xid)."""
        lines = []
        for name, value in cgroups.items():
            path, xid = value if isinstance(value, tuple) else (value, None)
            lines += ["[[slice]]", f'name = "{name}"', f'cgroups = ["{path}"]']
            lines += [f"xid = {xid}"] if xid else []
        (self.base / "config" / "slices.toml").write_text("\n".join(lines) + "\n")

    def fingerprint(self, files=True):
        """Rules, sysctls, eBPF instances, and (without the locks) the run directory's files."""
        text = self.ns.run("sh", "-c", _LOOK).stdout
        run = self.base / "run"
        for path in sorted(run.iterdir()) if files and run.exists() else []:
            if not path.name.endswith("lock"):
                text += f"== {path.name}\n{path.read_text()}\n"
        text += "".join(f"{path}\n" for path in sorted(self.bpf_dir.glob("*")))
        # Packet counters move with the packets of the test itself.
        return re.sub(r"\[\d+:\d+\]|packets \d+ bytes \d+", "", text)


#: for a kernel that has no BPF LSM
UNGUARDED = '[guard]\npacket_sockets = "unguarded"\n'


@contextmanager
def bpffs(base: Path) -> Iterator[Path]:
    """A bpffs for one node below its directory; what is pinned there goes with it."""
    place = base / "bpf"
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "bpf", "bpf", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@contextmanager
def bpf_node(ns: Namespace, base: Path, settings: str = UNGUARDED) -> Iterator[Node]:
    """A node that may load eBPF programs; down again at the end."""
    with bpffs(base):
        made = Node(ns, base)
        made.settings(settings)
        try:
            yield made
        finally:
            made.vnet("down")


@contextmanager
def watching(node: Node, *options: str) -> Iterator[subprocess.Popen[str]]:
    """``vnet watch``, ready."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(str(node.base / "notify"))
        ready.settimeout(120)
        env = node.env | {
            "NOTIFY_SOCKET": str(node.base / "notify"),
            "PYTHONPATH": os.pathsep.join([str(PY), *sys.path]),
        }
        argv = (sys.executable, "-m", "vnet.cli", "watch", *options)
        with node.ns.popen(*argv, env=env, stderr=subprocess.PIPE) as process:
            try:
                assert ready.recv(100) == b"READY=1"
                yield process
                process.terminate()
                assert process.wait(60) == 0
            finally:
                process.kill()
    (node.base / "notify").unlink()


def shim(directory: Path, tool: str, what: str, call: int = 1) -> Path:
    """Put a ``tool`` into ``directory`` that does ``what`` at its n-th call.

    ``what``: fail; or WHEN-WHOM, where WHEN is before or after the real tool
    has run and WHOM, killed with -9, is worker, guard or both; or WHEN-WHOM-TERM,
    which asks them to stop and then hangs.
    """
    directory.mkdir(parents=True, exist_ok=True)
    real = shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    when, whom, signal_ = (*what.split("-"), "", "", "")[:3]
    victims = {
        "worker": "$PPID",
        "guard": "$(cut -d' ' -f4 /proc/$PPID/stat)",
        "both": "$PPID $(cut -d' ' -f4 /proc/$PPID/stat)",
    }
    act = "echo 'refused by the test' >&2; exit 4"
    if whom:
        first = f'{real} "$@"' if when == "after" else ":"
        act = f"{first}\nset -- {victims[whom]}\n"
        # The guard is stopped first, or it would undo what the dead worker did; and
        # the worker dies first, or the guard's death would tell it to undo.
        act += "kill -STOP $2\n" if whom == "both" else ""
        act += f"kill -{signal_ or 'KILL'} $*\n"
        act += "exec sleep 600" if signal_ else "exit 0"
    (directory / tool).write_text(f"""#!/bin/sh
echo x >>{directory}/{tool}.calls
if [ $(wc -l <{directory}/{tool}.calls) = {call} ]; then
{act}
fi
exec {real} "$@"
""")
    (directory / tool).chmod(0o755)
    return directory


def killed(
    node: Node,
    variant: str,
    step: int,
    whom: str,
    datapath: str | None = None,
    argv: Sequence[str] = (),
) -> int:
    """``vnet up`` in a child of ours that is killed when its n-th step is noted, not yet done.

    Returns how the child ended, as in subprocess. ``whom``: worker, guard or both.
    ``argv``: another command's, with this process's environment.
    """
    from vnet.cli import cli

    from vnet import journal
    from vnet import node as nodes

    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    add, seen = journal.Journal.add, []

    def deadly(self, name, **how):
        add(self, name, **how)
        seen.append(name)
        if len(seen) == step:
            if whom == "both":  # or it would begin to undo when the guard dies
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            for pid in {"worker": (), "guard": (os.getppid(),), "both": (os.getppid(),)}[whom]:
                os.kill(pid, signal.SIGKILL)
            if whom != "guard":
                os.kill(os.getpid(), signal.SIGKILL)
            # The kernel tells us of the guard's death. Not pause(): a signal that comes
            # just before it would be slept through.
            while True:
                time.sleep(0.05)

    journal.Journal.add = deadly
    try:
        if argv:
            cli(list(argv), standalone_mode=False)
        else:
            nodes.up(node.paths, variant, datapath=datapath)
        os._exit(0)
    except BaseException as error:  # what undoing it met, and no more than that
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def tree(base: Path) -> dict[str, bytes]:
    """Every file below a directory with its content."""
    return {str(path): path.read_bytes() for path in sorted(base.rglob("*")) if path.is_file()}


def paths_from_env():
    """The directories of the node for which this process was started."""
    from vnet.paths import Paths

    return Paths(
        *(Path(os.environ[f"VNET_{name}_DIR"]) for name in ("CONFIG", "STATE", "RUN", "BPF"))
    )


def main(argv: list[str]) -> int:
    """``up VARIANT``: bring up what needs no module."""
    from vnet.errors import VnetError
    from vnet.journal import Journal

    from vnet import guard, iptables, state, steps

    paths = paths_from_env()

    def work():
        new = state.load(paths.state) or state.State(since=time.time_ns(), variant="nft")
        old_text = state.text(paths.state)
        new.variant = argv[1]
        notes = Journal(paths.journal)
        done = steps.set_sysctls(notes, new)
        wanted = dict.fromkeys(iptables.families(), CHAINS)
        done += steps.install_rules(notes, new, argv[1], wanted)[0]
        steps.write_state(notes, paths, new, old_text)
        notes.close()
        paths.journal.unlink(missing_ok=True)
        return {"done": done}

    try:
        with guard.lock(paths):
            steps.undo(paths)
            print(json.dumps(guard.guarded(work, lambda: steps.undo(paths) and None)))
    except VnetError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def calls(directory: Path, tool: str) -> int:
    """How often a shim was called."""
    path = directory / f"{tool}.calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


def run_here(*argv: str) -> str:
    """Run a tool of the host and return what it printed."""
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
