"""What ``make demo`` shows: each command above its output.

Two slices talk to a peer in a network namespace and are talked to, one tries
what it must not; then the records are asked. Run by tools/demo: here, in
network and mount namespaces of its own (``demo.py bpf``), or in a guest, which
is all its own (``demo.py auto``). Files go to a directory that is removed, the
cgroups and the namespace too, and ``vnet down`` takes the rest away. The bpffs
and /run are the mount namespace's: if this is killed they go all the same, and
with them the eBPF programs.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

PEER = "vnet-demo-peer"
IN_PEER = ("ip", "netns", "exec", PEER)
NODE4, PEER4 = "10.77.0.1", "10.77.0.2"
NODE6, PEER6 = "fd77::1", "fd77::2"
SLICES = ("codeen", "coral")
BOLD, DIM, PLAIN = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")

# The programs that make the traffic, by file name.
PROGRAMS = {
    "web.py": """
        import http.server as h, socket, sys
        h.ThreadingHTTPServer.address_family = socket.AF_INET6  # and IPv4 with it
        h.ThreadingHTTPServer(("::", int(sys.argv[1])), h.SimpleHTTPRequestHandler).serve_forever()
    """,
    "udp.py": """
        import socket
        s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        s.bind(("::", 53))
        while True:
            data, who = s.recvfrom(2048)
            s.sendto(data, who)
    """,
    "fetch.py": """
        import sys, urllib.request
        print(len(urllib.request.urlopen(sys.argv[1], timeout=20).read()), "bytes")
    """,
    "ask.py": """
        import socket, sys
        family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
        s = socket.socket(family, socket.SOCK_DGRAM)
        s.settimeout(20)
        for _ in range(5):
            s.sendto(b"who am I?", (sys.argv[1], 53))
            s.recv(2048)
        print("5 questions, 5 answers")
    """,
    "bind.py": """
        import socket, sys
        try:
            socket.socket().bind(("0.0.0.0", int(sys.argv[1])))
        except OSError as error:
            sys.exit(f"bind: {error.strerror}")
        print("bound to port", sys.argv[1])
    """,
    "raw.py": """
        import socket, sys
        try:
            socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
        except OSError as error:
            sys.exit(f"socket: {error.strerror}")
        print("got a raw socket")
    """,
    "index.html": "hello\n" * 2000,
}


def say(text: str) -> None:
    print(f"\n{BOLD}{textwrap.fill(text, 96)}{PLAIN}", flush=True)


def in_cgroup(cgroup: Path, *argv: str) -> list[str]:
    """The command that runs argv as a process of that slice, from its first socket on."""
    return ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(cgroup), *argv]


def show(*argv: str, cgroup: Path | None = None, fails: bool = False) -> None:
    """Print a command (and the slice it runs in), run it, print what it says.

    SystemExit if it fails, or does not although it must.
    """
    print(f"{DIM}{cgroup.name if cgroup else ''}${PLAIN} {shlex.join(argv)}", flush=True)
    done = subprocess.run(
        in_cgroup(cgroup, *argv) if cgroup else argv,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(textwrap.indent(done.stdout.rstrip("\n"), "  "), flush=True)
    if bool(done.returncode) is not fails:
        raise SystemExit(f"demo: that ended with exit code {done.returncode}")


def quiet(*argv: str) -> None:
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def start(*argv: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def stop(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait(timeout=60)


def wait_for(*argv: str) -> None:
    """Try a command until it succeeds, two minutes at most."""
    deadline = time.monotonic() + 120
    while subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        if time.monotonic() > deadline:
            raise SystemExit(f"demo: gave up waiting for: {shlex.join(argv)}")
        time.sleep(0.1)


def cgroup_root() -> Path:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise SystemExit("demo: no cgroup v2 hierarchy is mounted")


@contextlib.contextmanager
def cgroups() -> Iterator[dict[str, Path]]:
    base = cgroup_root() / "vnet-demo.slice"
    paths = {name: base / name for name in SLICES}
    try:
        for path in paths.values():
            path.mkdir(parents=True)
        yield paths
    finally:
        for path in (*paths.values(), base):
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def peer() -> Iterator[None]:
    """A neighbour on a wire: a namespace with a web and a UDP server."""
    quiet("ip", "netns", "add", PEER)
    servers: list[subprocess.Popen[bytes]] = []
    try:
        quiet(
            *("ip", "link", "add", "vnet-demo0", "type", "veth"),
            *("peer", "name", "eth0", "netns", PEER),
        )
        here, there = ("ip",), ("ip", "-n", PEER)
        for ip, dev, a4, a6 in (
            (here, "vnet-demo0", NODE4, NODE6),
            (there, "eth0", PEER4, PEER6),
        ):
            quiet(*ip, "addr", "add", f"{a4}/24", "dev", dev)
            quiet(*ip, "addr", "add", f"{a6}/64", "dev", dev, "nodad")
            quiet(*ip, "link", "set", dev, "up")
        quiet(*there, "link", "set", "lo", "up")
        servers = [
            start(*IN_PEER, sys.executable, "web.py", "80"),
            start(*IN_PEER, sys.executable, "udp.py"),
        ]
        for port in ("-t", "-u"):
            wait_for(*IN_PEER, "sh", "-c", f"ss -Hln {port} | grep -q .")
        yield
    finally:
        stop(*servers)
        quiet("ip", "netns", "del", PEER)


def traffic(codeen: Path, coral: Path) -> None:
    """HTTP, UDP and ping out of both slices, and HTTP in to one of them."""
    say("codeen fetches a page from the peer, over IPv4 and IPv6, and pings it")
    show("python3", "fetch.py", f"http://{PEER4}/", cgroup=codeen)
    show("python3", "fetch.py", f"http://[{PEER6}]/", cgroup=codeen)
    show("ping", "-q", "-c", "3", "-i", "0.2", PEER4, cgroup=codeen)
    say(
        "coral asks the peer over UDP, and runs a web server on its port that the peer fetches from"
    )
    show("python3", "ask.py", PEER4, cgroup=coral)
    show("python3", "ask.py", PEER6, cgroup=coral)
    server = start(*in_cgroup(coral, sys.executable, "web.py", "8080"))
    try:
        wait_for("sh", "-c", "ss -Hltn sport = :8080 | grep -q .")
        show(*IN_PEER, "python3", "fetch.py", f"http://{NODE4}:8080/")
    finally:
        stop(server)


def complaint() -> tuple[str, str]:
    """What the remote side's log would say: a source port of codeen's, and when."""
    answer = subprocess.run(
        ("netflow", "query", "--slice", "codeen", "--proto", "tcp", "--dst", PEER4, "-o", "json"),
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    record = json.loads(answer.stdout)["records"][0]
    return str(record["sport"]), record["start"]


def refusals(codeen: Path) -> None:
    """What codeen must not do."""
    say("5. codeen wants coral's port, and a raw socket, which it has no grant for")
    show("python3", "bind.py", "8080", cgroup=codeen, fails=True)
    show("python3", "raw.py", cgroup=codeen, fails=True)
    wait_for("sh", "-c", "vnet events --kind raw | grep -q codeen")
    show("vnet", "events")


def tell(paths: dict[str, Path], datapath: str) -> None:
    below = {name: f"/{path.relative_to(cgroup_root())}" for name, path in paths.items()}
    say(
        "1. Name two slices. Each gets a number, its xid, which is stable from now on. Coral also "
        "gets a port that nobody else may use"
    )
    show("vnet", "slice", "add", "codeen", "--cgroup", below["codeen"])
    show("vnet", "slice", "add", "coral", "--cgroup", below["coral"], "--port", "tcp/8080")
    show("vnet", "slice", "ls")
    say("2. Node init: the marks, the guard, the sysctls, the rules; all of it or nothing")
    show("vnet", "up", "--datapath", datapath)
    say("3. The collector: connection tracking's events become flow records")
    print(f"{DIM}${PLAIN} vnet watch & netflow collect &", flush=True)
    background = [start("vnet", "watch"), start("netflow", "collect")]
    try:
        wait_for("netflow", "status")
        say("4. Real traffic")
        traffic(paths["codeen"], paths["coral"])
        refusals(paths["codeen"])
        show("vnet", "status")
        say("6. Who used the network?")
        show("netflow", "top")
        say("7. What did codeen do?")
        show("netflow", "query", "--slice", "codeen")
        port, at = complaint()
        say(
            f"8. A complaint comes in: '{at}: your address {NODE4}, port {port}, fetched from "
            f"{PEER4}, port 80.' Who sent this?"
        )
        show("netflow", "query", "--dst", PEER4, "--dport", "80", "--sport", port, "--at", at)
    finally:
        stop(*background)


def own_house() -> None:
    """Have a loopback, a bpffs and a /run that nobody else sees."""
    quiet("ip", "link", "set", "lo", "up")
    quiet("mount", "-t", "tmpfs", "tmpfs", "/run")
    Path("/run/netns").mkdir()
    quiet("mount", "-t", "bpf", "bpf", "/sys/fs/bpf")


def lacking() -> str:
    """What the module-free data path lacks here; asked in namespaces of its own."""
    from vnet.errors import VnetError

    from vnet import bpf, choice

    own_house()
    if missing := bpf.lacking():
        return "; ".join(missing)
    try:
        cgroup_root()
        choice.probe("bpf", "nft")
    except (VnetError, SystemExit) as error:
        return str(error).splitlines()[0]
    return ""


def main() -> None:
    where = sys.argv[1]
    if where == "lacking":
        raise SystemExit(lacking() or 0)
    if where == "bpf":
        own_house()
    with tempfile.TemporaryDirectory(prefix="vnet-demo-") as files:
        for name, text in PROGRAMS.items():
            Path(files, name).write_text(textwrap.dedent(text))
        # Only the kernel says whether packet sockets can be refused, too.
        Path(files, "vnet.toml").write_text('[guard]\npacket_sockets = "unguarded"\n')
        os.environ.update(
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            VNET_CONFIG_DIR=f"{files}/slices.d",
            VNET_STATE_DIR=f"{files}/state",
            VNET_RUN_DIR=f"{files}/run",
            NETFLOW_STORE=f"{files}/records",
            NETFLOW_SOCKET=f"{files}/query.sock",
        )
        os.chdir(files)
        # As Debian has it: without, ping needs a raw socket.
        quiet("sysctl", "-w", "net.ipv4.ping_group_range=0 2147483647")
        with cgroups() as paths, peer():
            try:
                tell(paths, where)
            finally:
                say("9. Everything of ours goes away again")
                show("vnet", "down")


if __name__ == "__main__":
    main()
