"""Sockets, and the server on them. No address is listened on that was not asked for."""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from netflow import systemd
from netflow.metrics import Figures, Source
from netflow.serve.app import Settings, make
from netflow.serve.peers import PeerProtocol

TOKEN_LENGTH = 32
_log = logging.getLogger("netflow")

Address = tuple[str, int]


class ServeError(Exception):
    """It cannot be listened as asked; the message says why."""


@dataclass(frozen=True)
class Options:
    """What ``netflow serve`` was told. token: the file that has it."""

    source: Source
    socket: Path
    listen: Address | None = None
    token: Path | None = None
    listen_metrics: Address | None = None


class _Server(uvicorn.Server):
    """Tells the service manager when it listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        systemd.notify("READY=1")


def run(options: Options) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    logging.basicConfig(stream=sys.stderr, format="netflow: %(message)s", level=logging.INFO)
    for name in ("uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # While uvicorn serves the signals are its; it stops in order, and then raises them again.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        _serve(options)
    except ServeError as error:
        _log.error("%s", error)
        return 1
    return 0


def _serve(options: Options) -> None:
    token = read_token(options.token) if options.token else ""
    sockets: list[socket.socket] = []
    try:
        if options.listen:
            sockets.append(_tcp(options.listen))
            _log.info("listening on %s", _text(options.listen))
        if options.listen_metrics:
            _metrics(options.listen_metrics, options.source)
        # The last: who waits for it to be there finds the addresses, too.
        sockets.append(_unix(options.socket))
        _log.info("listening on %s", options.socket)
        try:
            config = uvicorn.Config(
                make(Settings(options.source, token)), http=PeerProtocol, ws="none",
                lifespan="off", loop="asyncio", log_config=None, access_log=False,
                proxy_headers=False, server_header=False, timeout_graceful_shutdown=5,
            )  # fmt: skip
            _Server(config).run(sockets)
        finally:
            options.socket.unlink(missing_ok=True)
    finally:
        for one in sockets:
            one.close()


def _unix(path: Path) -> socket.socket:
    """Anybody may connect: who may see what, the collector decides."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    new = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            if other.connect_ex(str(path)) == 0:
                raise ServeError(f"somebody listens on {path} already")
        new.unlink(missing_ok=True)
        # Bound aside and renamed: nobody meets it before its mode is right.
        made.bind(str(new))
        new.chmod(0o666)
        made.listen(64)
        new.rename(path)
    except OSError as error:
        made.close()
        raise ServeError(f"cannot listen on {path}: {error.strerror or error}") from None
    except ServeError:
        made.close()
        raise
    return made


def _tcp(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
        made.listen(64)
    except OSError as error:
        made.close()
        raise ServeError(f"cannot listen on {_text(address)}: {error.strerror}") from None
    return made


def _metrics(address: Address, source: Source) -> None:
    """Metrics alone, by the official library's own little server, in a thread."""
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(Figures(source))
    try:
        server, _ = start_http_server(address[1], address[0], registry)
    except OSError as error:
        raise ServeError(f"cannot listen on {_text(address)}: {error.strerror}") from None
    _log.info("metrics on %s", _text(server.server_address))


def read_token(path: Path) -> str:
    """What the file says. Raises ServeError for a file that others can read, or a short one."""
    try:
        with path.open() as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"cannot read the token in {path}: {error}") from None
    if stat.S_IMODE(mode) & 0o077:
        raise ServeError(f"{path} can be read by others than its owner: chmod 600 {path}")
    if len(text) < TOKEN_LENGTH or not text.isascii() or " " in text:
        raise ServeError(
            f"the token in {path} is not {TOKEN_LENGTH} or more characters without spaces: "
            f"openssl rand -hex 32 > {path}"
        )
    return text


def _text(address: object) -> str:
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    return str(address)
