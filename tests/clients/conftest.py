"""Every way to ask: two protocols, blocking and async."""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from quintet_client import AsyncClient, Client

from .stand_in import GrpcStandIn, HttpStandIn

Ask = Callable[..., Any]
"""`await ask(url, verb, *arguments, **options)`; the client's own options go in `client={…}`."""


@pytest.fixture(params=[Client, AsyncClient], ids=["blocking", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    kind = request.param

    async def ask(
        url: str, verb: str, *arguments: Any, client: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        if kind is AsyncClient:
            async with AsyncClient(url, **(client or {})) as quintet:
                return await getattr(quintet, verb)(*arguments, **options)

        def block() -> Any:
            with Client(url, **(client or {})) as quintet:
                return getattr(quintet, verb)(*arguments, **options)

        assert not inspect.iscoroutinefunction(getattr(Client, verb))
        return await asyncio.to_thread(block)

    return ask


@pytest.fixture(params=[HttpStandIn, GrpcStandIn], ids=["http", "grpc"])
def stand_in(request: pytest.FixtureRequest) -> Any:
    """The kind of server that the test is to be run against."""
    return request.param


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest, quintet_server: Any) -> str:
    """The real service, at each of its two doors."""
    return quintet_server.http_url if request.param == "http" else quintet_server.grpc_url
