"""Asks a Quintet service about pictures and texts, over REST or gRPC.

from quintet_client import Client

with Client("http://localhost:3000") as quintet:  # or grpc://localhost:3001
    quintet.digit("seven.png").label
"""

from quintet_client.client import AsyncClient, Client
from quintet_client.errors import (
    BadInput,
    DeadlineExceeded,
    Forbidden,
    NotFound,
    Overloaded,
    QuintetError,
    ServerError,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UnsupportedMediaType,
    Untrusted,
)
from quintet_client.results import Classification, Detection, Generated, Object, Status

__all__ = [
    "AsyncClient",
    "BadInput",
    "Classification",
    "Client",
    "DeadlineExceeded",
    "Detection",
    "Forbidden",
    "Generated",
    "NotFound",
    "Object",
    "Overloaded",
    "QuintetError",
    "ServerError",
    "Status",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
    "UnsupportedMediaType",
    "Untrusted",
]
