"""Start a program inside a network namespace and a cgroup.

    python -m vnet.testing.launch --cgroup /sys/fs/cgroup/x --netns NAME -- argv...

The order matters: a socket belongs to the cgroup its maker was in when it was
made, for ever (sock_cgroup_data is set in cgroup_sk_alloc), so the process
enters the cgroup before the program starts. The namespace is entered with
nsenter and not with ``ip netns exec``, which mounts a new /sys over the old
one, without the cgroup hierarchies.
"""

import argparse
import os
from pathlib import Path

_ENTER_CGROUP = 'echo $$ >"$0" && exec "$@"'


def command(argv: list[str], netns: str = "", cgroup: str = "") -> list[str]:
    """The argument list that runs argv in the named namespace and cgroup directory."""
    if netns:
        argv = ["nsenter", f"--net=/run/netns/{netns}", "--", *argv]
    if cgroup:
        argv = ["/bin/sh", "-c", _ENTER_CGROUP, str(Path(cgroup, "cgroup.procs")), *argv]
    return argv


def main() -> None:
    """Replace this process with the program."""
    parser = argparse.ArgumentParser(prog="python -m vnet.testing.launch")
    parser.add_argument("--cgroup", default="", help="directory of a cgroup v2")
    parser.add_argument("--netns", default="", help="as in `ip netns`")
    parser.add_argument("argv", nargs="+")
    given = parser.parse_args()
    argv = command(given.argv, given.netns, given.cgroup)
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    main()
