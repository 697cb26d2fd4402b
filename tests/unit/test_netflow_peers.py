"""Connections to the HTTP interface: one that says nothing is not kept."""

import asyncio
from contextlib import closing

import pytest
import uvicorn
from uvicorn.server import ServerState

from netflow.serve import peers

pytestmark = pytest.mark.unit

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def hello(_scope, _receive, send):
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"hi"})


def talk(conversation):
    """Have it with a server whose application says hi: conversation(port) is a coroutine."""

    async def run():
        config = uvicorn.Config(hello, timeout_keep_alive=30, lifespan="off", log_config=None)
        config.load()

        def made():
            return peers.PeerProtocol(config=config, server_state=ServerState(), app_state={})

        server = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
        with closing(server):
            return await conversation(server.sockets[0].getsockname()[1])

    return asyncio.run(asyncio.wait_for(run(), 60))


def test_who_connects_and_says_nothing_is_parted_with_and_who_has_asked_is_not(monkeypatch):
    monkeypatch.setattr(peers, "QUIET", 0.5)

    async def conversation(port):
        silent, close_silent = await asyncio.open_connection("127.0.0.1", port)
        asking, ask = await asyncio.open_connection("127.0.0.1", port)
        ask.write(GET)
        assert b"200" in await asking.readline()
        assert await silent.read() == b""  # the end, in its time
        ask.write(GET)
        assert (await asking.readuntil(b"hi")).endswith(b"hi")
        for each in (close_silent, ask):
            each.close()
            await each.wait_closed()

    talk(conversation)


def test_connections_over_tcp_are_so_many_and_no_more(monkeypatch):
    monkeypatch.setattr(peers, "OVER_TCP", 2)

    async def conversation(port):
        links = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        third, close = await asyncio.open_connection("127.0.0.1", port)
        assert await third.read() == b""
        links[0][1].write(GET)
        assert b"200" in await links[0][0].readline()
        for each in (close, *(link for _, link in links)):
            each.close()
            await each.wait_closed()

    talk(conversation)
