"""Callers who come together need not come in one by one."""

import asyncio
import socket
from contextlib import ExitStack

import pytest
import uvicorn
import uvloop

from service.http import Receive, Scope, Send
from service.http1 import EARS, listen_closely


async def nobody(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that is asked nothing."""


async def taken_in_a_round(closely: bool) -> int:
    """How many of more connections than `EARS` a server takes in one round of the loop."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ExitStack() as callers:
        server = uvicorn.Server(
            uvicorn.Config(nobody, fd=listening.fileno(), lifespan="off", log_level="error")
        )
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup()
        if closely:
            await listen_closely(server)
        for _ in range(2 * EARS):
            callers.enter_context(socket.create_connection(listening.getsockname()))
        done = asyncio.get_running_loop().create_future()
        # What is called later is called after the loop has looked at its sockets, once.
        asyncio.get_running_loop().call_soon(asyncio.get_running_loop().call_soon, done.set_result, None)
        await done
        taken = len(server.server_state.connections)
        # It would wait for its callers to go.
        callers.close()
        await server.shutdown()
        return taken


@pytest.mark.parametrize(("closely", "least", "most"), [(False, 0, 2), (True, EARS, 2 * EARS)])
def test_of_callers_who_come_together_several_are_let_in_at_once(
    closely: bool, least: int, most: int
) -> None:
    assert least <= uvloop.run(taken_in_a_round(closely)) <= most
