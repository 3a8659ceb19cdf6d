"""Who is measured with what, and how fast the service must be beside its peers."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from load_tests import payloads
from load_tests.payloads import Payload

HOST: Final = "127.0.0.1"


@dataclass(frozen=True)
class Server:
    """A server as it is started: its command, with `{port}` where the port belongs."""

    name: str
    workers: int
    command: tuple[str, ...]


@dataclass(frozen=True)
class Scenario:
    """One row of the table: a payload, sent to a server over and over."""

    server: Server
    payload: Payload

    @property
    def name(self) -> str:
        """The row's name."""
        return f"{self.server.name} {self.payload.name} ({self.server.workers})"


@dataclass(frozen=True)
class Target:
    """`ours` must answer at least `at_least` times as many requests as the best of `peers`."""

    ours: str
    peers: tuple[str, ...]
    at_least: float


def _python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *arguments)


def quintet(workers: int) -> Server:
    """The service, as it is deployed."""
    serve = ("serve", "service:Quintet", "--host", HOST, "--port", "{port}")
    return Server("quintet", workers, _python("bentoml", *serve))


def bare(workers: int) -> Server:
    """The same decode, batcher and session with nothing around them."""
    application = ("--factory", "load_tests.peers.bare_asgi:application", "--host", HOST, "--port", "{port}")
    options = ("--http", "httptools", "--loop", "uvloop", "--lifespan", "off", "--no-server-header")
    quiet = ("--no-access-log", "--log-level", "warning", "--workers", str(workers))
    return Server("bare", workers, _python("uvicorn", *application, *options, *quiet))


def bentoml_batchable(workers: int) -> Server:
    """The same network behind BentoML's own batching."""
    service = "load_tests.peers.bentoml_batchable:Peer"
    serve = ("serve", service, "--host", HOST, "--port", "{port}")
    return Server("bentoml-batchable", workers, _python("bentoml", *serve))


def scenarios(workers: int) -> list[Scenario]:
    """Every row, in the order of a round: who is compared is measured close together."""
    rows: list[Scenario] = []
    for count in sorted({workers, 1}, reverse=True):
        ours, peer = quintet(count), bentoml_batchable(count)
        rows += [
            Scenario(bare(count), payloads.raw_picture()),
            Scenario(ours, payloads.raw_picture()),
            Scenario(ours, payloads.binary_tensor()),
            Scenario(ours, payloads.grpc_call()),
            Scenario(peer, payloads.multipart_picture()),
            Scenario(peer, payloads.json_array()),
        ]
    return rows


def beside(row: Scenario) -> str:
    """The name of the row that this one is compared with: the bare server with as many workers."""
    return Scenario(bare(row.server.workers), payloads.raw_picture()).name


def targets(rows: Sequence[Scenario], workers: int) -> list[Target]:
    """What a run must show of the service with `workers` workers, its default number."""
    ours = Scenario(quintet(workers), payloads.raw_picture())
    peers = tuple(row.name for row in rows if row.server.name == "bentoml-batchable")
    return [
        Target(ours.name, (beside(ours),), at_least=0.85),
        Target(ours.name, peers, at_least=5.0),
    ]
