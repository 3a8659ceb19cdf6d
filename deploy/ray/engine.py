"""More than one machine: each model's data plane is a Ray Serve deployment, behind our own HTTP door.

    serve run deploy.ray.engine:build replicas=2 gpu=0.25

A model's replicas batch, run and measure as one worker of the service does, on whichever nodes Ray has put
them; how many there are follows the load. The door decodes and encodes, as ever; where a replica or its node
dies, whoever was under way there is told to ask again (503 and `Retry-After`), as our clients do by
themselves. What is not here: the gRPC door, and loading by an administrator.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request as StarletteRequest
from starlette.responses import Response as StarletteResponse

from service.batcher import Priority
from service.commands import Commands
from service.data_plane import DataPlane, State
from service.errors import DeadlineExceeded, InternalError, Overloaded, QuintetError, Unavailable
from service.metrics import Board
from service.models import MODELS
from service.models.spec import Answer, Inputs, Room
from service.providers import profile_of
from service.repository import Repository
from service.rest import RestDoor
from service.settings import Settings, WholePolicy

UNDER_WAY: Final = 512
"""Requests that one replica has at a time; enough to fill its batches."""


class Arguments(BaseModel):
    """What `serve run` may be told, as `name=value`."""

    replicas: int = 1
    """Of each model, at the least."""
    most_replicas: int = 8
    """Of each model, at the most; between them, as many as the load needs."""
    gpu: float = 0.0
    """The share of a GPU that a replica takes: four replicas of 0.25 fit on one."""
    replicas_per_node: int | None = None
    """Of one model on one node, at the most."""
    models: str = str(Settings().models)
    """The repository, where every node finds it."""


@dataclass(frozen=True)
class Done:
    """How a request's samples went: what `Server-Timing` says."""

    batch_size: int
    queue_seconds: float
    compute_seconds: float


@dataclass(frozen=True)
class Failed:
    """Our fault, as it travels: the id is in the log of the replica."""

    id: str
    detail: str
    index: int | None


class OneModel(DataPlane):
    """A data plane with one model of the repository."""

    def __init__(self, model: str, settings: Settings) -> None:
        # Ray has metrics of its own for replicas; ours are of this process.
        folder = Path(tempfile.mkdtemp(prefix="quintet-"))
        super().__init__(settings, Board(folder), Commands(folder))
        self.model = model

    def load(self) -> None:
        """Open the versions of the model.

        Raises:
            RepositoryError: they are damaged.
        """
        self.catalogue.load_all(set(MODELS) - {self.model})
        self.state = State.READY


@serve.deployment(max_ongoing_requests=UNDER_WAY)
class Model:
    """One model: a replica has its own sessions, queue and batches."""

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        self._plane = OneModel(model, Settings(**settings))
        self._plane.load()

    async def predict(
        self, version: str, inputs: Sequence[Inputs], seconds: float | None, priority: int
    ) -> tuple[list[Answer], Done] | QuintetError | Failed:
        """Answers, or the error that the caller is to hear: it is no failure of the replica."""
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            loaded = self._plane.find(self._plane.model, version)
            answers, job = await self._plane.predict(loaded, inputs, deadline, Priority(priority))
        except InternalError as error:
            return Failed(error.id, error.detail, error.index)
        except QuintetError as error:
            return error
        return answers, Done(job.batch_size, job.queue_seconds, job.compute_seconds)


@dataclass(frozen=True)
class Elsewhere:
    """A model version that runs on other machines: what the door needs to know of it."""

    room: Room
    version: str
    policy: WholePolicy

    @property
    def batcher(self) -> "Elsewhere":
        """Its queue is with its replicas."""
        return self

    is_inline = False
    depth = 0


class Distributor(DataPlane):
    """A data plane whose models are deployments."""

    def __init__(self, settings: Settings, handles: dict[str, DeploymentHandle]) -> None:
        folder = Path(tempfile.mkdtemp(prefix="quintet-"))
        self.board = Board(folder)
        super().__init__(settings, self.board, Commands(folder))
        self._handles = handles
        repository, profile = Repository(settings.models), profile_of(settings)
        for model in handles:
            versions: dict[str, Any] = {}
            for version in map(str, repository.versions(model)):
                room = repository.open(model, int(version), profile.variants).furnish(MODELS[model])
                versions[version] = Elsewhere(room, version, settings.policy(model))
            self.catalogue.models[model] = versions
        self.state = State.READY

    async def predict(
        self,
        loaded: Any,
        inputs: Sequence[Inputs],
        deadline: float | None,
        priority: Priority = Priority.NORMAL,
    ) -> tuple[list[Answer], Any]:
        """Have a replica answer.

        Raises:
            Unavailable: it died, or its node did; another may answer.
            QuintetError: what the replica says is to be said.
        """
        seconds = None if deadline is None else deadline - time.monotonic()
        if seconds is not None and seconds <= 0:
            raise DeadlineExceeded("The deadline passed before the answer; allow more time.")
        handle = self._handles[loaded.room.name]
        try:
            answered = await handle.predict.remote(loaded.version, inputs, seconds, int(priority))
        except BackPressureError:
            raise Overloaded("The queue is full; send the request again after a pause.") from None
        except RayTaskError:
            # A mistake in a replica; its caller gets an id, and the log the rest.
            raise
        except (RayError, RayServeException) as error:
            raise Unavailable("The machine that had the request is gone; send it again.") from error
        if isinstance(answered, Failed):
            failure = InternalError(index=answered.index)
            failure.id, failure.detail = answered.id, answered.detail
            raise failure
        if isinstance(answered, QuintetError):
            raise answered
        answers, done = answered
        return answers, done


@serve.deployment(name="door", max_ongoing_requests=4 * UNDER_WAY)
class Door:
    """Our HTTP door, behind Ray's proxy."""

    def __init__(self, settings: dict[str, Any], **handles: DeploymentHandle) -> None:
        plane = Distributor(Settings(**settings), handles)
        self._door = RestDoor(plane, plane.board)

    async def __call__(self, request: StarletteRequest) -> StarletteResponse:
        """Answer one request."""
        sent: list[Any] = []

        async def keep(message: Any) -> None:
            sent.append(message)

        await self._door(request.scope, request.receive, keep)
        start, *bodies = sent
        response = StarletteResponse(b"".join(one["body"] for one in bodies), start["status"])
        response.raw_headers = list(start["headers"])
        return response


def build(arguments: Arguments) -> serve.Application:
    """The application: a deployment for each model that the repository has, and the door before them."""
    settings = {"models": arguments.models, "workers": 1, "runtime": "cuda" if arguments.gpu else "cpu"}
    there = set(Repository(Path(arguments.models)).models())
    models = {
        name: Model.options(  # type: ignore[attr-defined]
            name=name,
            max_replicas_per_node=arguments.replicas_per_node,
            ray_actor_options={"num_cpus": 1, "num_gpus": arguments.gpu},
            autoscaling_config={
                "min_replicas": arguments.replicas,
                "max_replicas": max(arguments.replicas, arguments.most_replicas),
                "target_ongoing_requests": UNDER_WAY / 8,
            },
        ).bind(name, settings)
        for name in MODELS
        if name in there
    }

    return Door.bind(settings, **models)  # type: ignore[attr-defined]
