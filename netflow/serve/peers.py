"""Who connected: the kernel's word for it, with each request.

uvicorn tells an application nothing of a unix socket's peer. A protocol of
our own asks the kernel when the connection is made, and puts the answer into
the state of each of its requests.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from netflow import access

EACH = 16
"""Connections that one uid may have, root excepted: nobody can have them all."""
OVER_TCP = 64
"""Connections over TCP, whoever has them: their descriptors must not be those of the others."""
QUIET = 20.0
"""s in which a connection must send a whole request: uvicorn's clock begins after the first."""

_TCP = -1
_connections: Counter[int] = Counter()
"""By uid, or _TCP."""


class PeerProtocol(H11Protocol):
    """HTTP/1.1 whose requests have state["peer"]: an access.Peer, or None over TCP."""

    peer: access.Peer | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        link: socket.socket = transport.get_extra_info("socket")
        if link.family == socket.AF_UNIX:
            self.peer = access.peer(link)
        self._whose = self.peer.uid if self.peer else _TCP
        _connections[self._whose] += 1
        self.app_state = {**self.app_state, "peer": self.peer}
        super().connection_made(transport)
        self._quiet = asyncio.get_running_loop().call_later(QUIET, self._part)
        most = EACH if self.peer else OVER_TCP
        trusted = self.peer is not None and access.trusted(self.peer)
        if not trusted and _connections[self._whose] > most:
            transport.close()

    def _part(self) -> None:
        if self.cycle is None:  # no request has begun to be answered
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._quiet.cancel()
        _connections[self._whose] -= 1
        if not _connections[self._whose]:
            del _connections[self._whose]
        super().connection_lost(exc)


def of(state: Any) -> access.Peer | None:
    """Whose request it is; None: a token's."""
    found: access.Peer | None = getattr(state, "peer", None)
    return found
