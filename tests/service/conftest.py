"""Clients of the shared service."""

from collections.abc import Iterator

import httpx
import pytest

from tests.conftest import MODELS_FOLDER, QuintetServer

from .knocking import GrpcClient, http_client


@pytest.fixture(scope="session")
def http(quintet_server: QuintetServer) -> Iterator[httpx.Client]:
    with http_client(quintet_server) as client:
        yield client


@pytest.fixture(scope="session")
def grpc_client(quintet_server: QuintetServer) -> Iterator[GrpcClient]:
    with GrpcClient(quintet_server.grpc_address) as client:
        yield client


@pytest.fixture(scope="session")
def newest() -> str:
    """The version of the digit model that is served unless another is asked for."""
    return max((folder.name for folder in (MODELS_FOLDER / "digit").iterdir()), key=int)
