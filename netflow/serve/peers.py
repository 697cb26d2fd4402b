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

_connections: Counter[int] = Counter()


class PeerProtocol(H11Protocol):
    """HTTP/1.1 whose requests have state["peer"]: an access.Peer, or None over TCP."""

    peer: access.Peer | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        link: socket.socket = transport.get_extra_info("socket")
        if link.family == socket.AF_UNIX:
            self.peer = access.peer(link)
            _connections[self.peer.uid] += 1
        self.app_state = {**self.app_state, "peer": self.peer}
        super().connection_made(transport)
        if self.peer and not access.trusted(self.peer) and _connections[self.peer.uid] > EACH:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.peer:
            _connections[self.peer.uid] -= 1
            if not _connections[self.peer.uid]:
                del _connections[self.peer.uid]
        super().connection_lost(exc)


def of(state: Any) -> access.Peer | None:
    """Whose request it is; None: a token's."""
    found: access.Peer | None = getattr(state, "peer", None)
    return found
