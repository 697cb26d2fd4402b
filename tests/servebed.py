"""``netflow serve``, running."""

import socket
from contextlib import contextmanager

from netflowbed import NETFLOW
from vnet.testing.net import HERE
from vnet.testing.poll import until


@contextmanager
def serving(base, query, *options, under=()):
    """``netflow serve`` at base/http.sock, perhaps under a program."""
    path = base / "http.sock"
    words = [
        *under,
        *NETFLOW,
        "serve",
        "--http-socket",
        str(path),
        "--socket",
        str(query),
        *options,
    ]
    env = {"PYTHONWARNINGS": "error"}
    process = HERE.popen(*words, "--run-dir", str(base), "--state-dir", str(base), env=env)
    try:
        until(lambda: path.exists() or process.poll() is not None, what="it listens")
        yield process
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert not path.exists()


def free_port():
    """Of TCP on loopback; nobody has it yet."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]
