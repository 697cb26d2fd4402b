"""What ``make demo`` shows: each command above its output.

Two slices on this host talk to a peer in a network namespace and are talked
to; then the records are asked. Files go to a directory that is removed, the
cgroups and the namespace too, and ``vnet down`` takes the rules away.
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
    "index.html": "hello\n" * 2000,
}


def say(text: str) -> None:
    print(f"\n{BOLD}{textwrap.fill(text, 96)}{PLAIN}", flush=True)


def in_cgroup(cgroup: Path, *argv: str) -> list[str]:
    """The command that runs argv as a process of that slice, from its first socket on."""
    return ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(cgroup), *argv]


def show(*argv: str, cgroup: Path | None = None) -> None:
    """Print a command (and the slice it runs in), run it, print what it says."""
    print(f"{DIM}{cgroup.name if cgroup else ''}${PLAIN} {shlex.join(argv)}", flush=True)
    done = subprocess.run(
        in_cgroup(cgroup, *argv) if cgroup else argv,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(textwrap.indent(done.stdout.rstrip("\n"), "  "), flush=True)
    if done.returncode:
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
    say("coral asks the peer over UDP, and runs a web server that the peer fetches from")
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


def tell(paths: dict[str, Path]) -> None:
    say("1. Name two slices. Each gets a number, its xid, which is stable from now on")
    for name, path in paths.items():
        show("vnet", "slice", "add", name, "--cgroup", f"/{path.relative_to(cgroup_root())}")
    show("vnet", "slice", "ls")
    say("2. Node init: the module's table, the sysctls, the rules; all of it or nothing")
    show("vnet", "up")
    say("3. The collector: connection tracking's events become flow records")
    print(f"{DIM}${PLAIN} netflow collect &", flush=True)
    collector = start("netflow", "collect")
    try:
        wait_for("netflow", "status")
        say("4. Real traffic")
        traffic(paths["codeen"], paths["coral"])
        show("vnet", "status")
        say("5. Who used the network?")
        show("netflow", "top")
        say("6. What did codeen do?")
        show("netflow", "query", "--slice", "codeen")
        port, at = complaint()
        say(
            f"7. A complaint comes in: '{at}: your address {NODE4}, port {port}, fetched from "
            f"{PEER4}, port 80.' Who sent this?"
        )
        show("netflow", "query", "--dst", PEER4, "--dport", "80", "--sport", port, "--at", at)
    finally:
        stop(collector)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="vnet-demo-") as files:
        for name, text in PROGRAMS.items():
            Path(files, name).write_text(textwrap.dedent(text))
        os.environ.update(
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            VNET_CONFIG_DIR=f"{files}/slices.d",
            VNET_STATE_DIR=f"{files}/state",
            VNET_RUN_DIR=f"{files}/run",
            NETFLOW_STORE=f"{files}/flows.duckdb",
            NETFLOW_SOCKET=f"{files}/query.sock",
        )
        os.chdir(files)
        with cgroups() as paths, peer():
            try:
                tell(paths)
            finally:
                say("8. Everything of ours goes away again")
                show("vnet", "down")


if __name__ == "__main__":
    main()
