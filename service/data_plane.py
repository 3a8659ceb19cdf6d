"""The core that both doors call: find the model, prepare, batch, run, answer, measure.

It knows no protocol. A door hands it inputs by tensor name and gets answers back.
"""

import asyncio
import hmac
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NamedTuple, TypeVar

import structlog

from service.batcher import Batcher
from service.errors import BadInput, NotFound, Overloaded, QuintetError, Unauthenticated, Unavailable
from service.metrics import Board, Counter, Histogram, Tally
from service.models import MODELS
from service.models.spec import Answer, Inputs, Room, Sample
from service.repository import ModelFiles, Repository
from service.runtime import Network
from service.settings import Settings

LONG_WORK: Final = 128 * 1024
"""Reading more bytes than this would keep the event loop from other callers."""

QUICK_INPUTS: Final = 32
"""More inputs than this are prepared in a thread, however small each is."""

log = structlog.get_logger("quintet")
T = TypeVar("T")


class State(Enum):
    """Whether work is taken; what `/readyz` says."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class Meters:
    """The numbers of one model version, on the board."""

    def __init__(self, board: Board, model: str, version: str) -> None:
        self._board = board
        self._labels = (model, version)
        self._inferences = board.counter("quintet_inferences", *self._labels)
        self._batch_size = board.histogram("quintet_batch_size", *self._labels)
        self._compute_seconds = board.histogram("quintet_compute_seconds", *self._labels)
        self._queue_seconds = board.histogram("quintet_queue_seconds", *self._labels)
        self.preprocess_seconds = board.histogram("quintet_preprocess_seconds", *self._labels)
        self.postprocess_seconds = board.histogram("quintet_postprocess_seconds", *self._labels)
        self._requests_computed = board.tally("requests_computed", *self._labels)
        self._last_inference = board.gauge("last_inference", *self._labels)
        self._batches: dict[int, Tally] = {}

    def batch_ran(self, size: int, compute_seconds: float, queue_seconds: Sequence[float]) -> None:
        """Count a batch; `queue_seconds` are those of the requests that began in it."""
        self._inferences.add(size)
        self._batch_size.observe(size)
        self._compute_seconds.observe(compute_seconds)
        for seconds in queue_seconds:
            self._queue_seconds.observe(seconds)
        requests = len(queue_seconds)
        self._requests_computed.add(compute_seconds * requests, requests)
        self._last_inference.set(time.time())
        batches = self._batches.get(size)
        if batches is None:
            batches = self._batches[size] = self._board.tally("batches", *self._labels, str(size))
        batches.add(compute_seconds)


@dataclass(frozen=True)
class Lapse:
    """How often something happened, and the seconds it took in all."""

    count: int
    seconds: float


@dataclass(frozen=True)
class Statistics:
    """What a model version has done since the server started, in all workers together.

    Attributes:
        inferences: Inputs answered.
        executions: Batches run.
        last_inference: When a batch last ran, in seconds since 1970; 0 for never.
        success: Requests answered.
        fail: Requests refused or failed.
        queue: Requests' waiting for a batch.
        compute_input: Turning requests' inputs into tensors.
        compute_infer: Requests' batches running the network.
        compute_output: Turning rows into answers.
        batches: Batches by their size.
    """

    inferences: int
    executions: int
    last_inference: float
    success: Lapse
    fail: Lapse
    queue: Lapse
    compute_input: Lapse
    compute_infer: Lapse
    compute_output: Lapse
    batches: dict[int, Lapse]


class Predicted(NamedTuple):
    """Answers, one for each input, in order, and how they came about (as `Job` says it)."""

    answers: list[Answer]
    batch_size: int
    queue_seconds: float
    compute_seconds: float


class LoadedModel:
    """One version of one model, ready to answer."""

    def __init__(self, files: ModelFiles, room: Room, settings: Settings, board: Board) -> None:
        """Open, check and warm the network.

        Raises:
            NetworkMismatch: the files are not the room's network.
        """
        self.room = room
        self.version = str(files.version)
        self.network = Network(room, files.network)
        sample = room.to_tensor(room.example)
        self.network.warm_up(sample)
        room.to_answer(self.network.run([sample])[0], sample)
        # Nothing here refers back to this object: when its last request ends, it goes at once.
        self.meters = Meters(board, room.name, self.version)
        seconds = self.network.seconds_per_input
        fits_inline = max(1, int(settings.inline_ms / 1000 / seconds))
        # A batch on the event loop must stay short, or everybody else waits for it.
        inline = seconds * 1000 <= settings.inline_ms
        self._lanes = None if inline else ThreadPoolExecutor(settings.lanes, f"{room.name}-lane")
        self.batcher = Batcher(
            self.network.run,
            queue_size=settings.queue_size,
            max_batch=min(settings.max_batch, fits_inline) if inline else settings.max_batch,
            window_seconds=settings.batch_window_ms / 1000,
            lanes=settings.lanes,
            executor=self._lanes,
            on_batch=self.meters.batch_ran,
        )
        self._workers = board.gauge(
            "quintet_model_info",
            room.name,
            self.version,
            files.variant,
            self.network.provider,
            files.card["files"][files.variant]["sha256"],
        )
        self._workers.set(1)

    def close(self) -> None:
        """Let the lanes go."""
        if self._lanes is not None:
            self._lanes.shutdown(wait=False)


class DataPlane:
    """All models of this worker, and the one way to ask them."""

    def __init__(self, settings: Settings, board: Board) -> None:
        self.settings = settings
        self.state = State.STARTING
        self._board = board
        self._models: dict[str, dict[str, LoadedModel]] = {}
        self._meters: dict[tuple[str, str, str, str], tuple[Counter, Histogram]] = {}
        self._preparers = ThreadPoolExecutor(2, "prepare")
        self._keys = [key.get_secret_value().encode() for key in settings.api_keys]
        self._under_way = 0
        self._buffered_bytes = 0

    def load(self) -> None:
        """Open every version of every model in the repository; blocks, so call it in a thread.

        Raises:
            RepositoryError: the repository is damaged.
            NetworkMismatch: a file is not the network that its room describes.
        """
        repository = Repository(self.settings.models)
        for name in repository.models():
            room = MODELS.get(name)
            if room is None:
                continue
            versions = {}
            for version in repository.versions(name):
                started = time.perf_counter()
                files = repository.open(room.name, version)
                versions[str(version)] = LoadedModel(files, room, self.settings, self._board)
                log.info(
                    "model loaded",
                    model=room.name,
                    version=version,
                    provider=versions[str(version)].network.provider,
                    seconds=round(time.perf_counter() - started, 3),
                    inline=versions[str(version)].batcher.is_inline,
                    microseconds_per_input=round(versions[str(version)].network.seconds_per_input * 1e6),
                )
            if versions:
                self._models[room.name] = versions
        if self.state is State.STARTING:
            self.state = State.READY

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self.state is State.READY

    @property
    def is_taking(self) -> bool:
        """Whether connections may stay open for more requests."""
        return self.state is not State.DRAINING

    def find(self, model: str, version: str | None = None) -> LoadedModel:
        """The model, in the version asked for or (none, or an empty one) the highest.

        Raises:
            NotFound: there is no such model or version.
            Unavailable: starting, draining, or the model is not loaded.
        """
        if model not in MODELS:
            raise NotFound(f"There is no such model; there are {', '.join(MODELS)}.")
        if self.state is not State.READY:
            raise Unavailable(f"The service is {self.state.value}; send the request again after a pause.")
        versions = self._models.get(model)
        if not versions:
            raise Unavailable(f"The model {model} is not loaded.")
        if not version:
            return next(reversed(versions.values()))
        found = versions.get(version)
        if found is None:
            raise NotFound(f"The model {model} has no such version; it has {', '.join(versions)}.")
        return found

    def find_all(self, model: str, version: str = "") -> list[LoadedModel]:
        """The versions of a model, or the one asked for; without a name, every model's.

        Raises:
            NotFound: there is no such model or version.
            Unavailable: starting, draining, or the model is not loaded.
        """
        if not model:
            return self.models()
        found = self.find(model, version)
        return [found] if version else list(self._models[model].values())

    def models(self) -> list[LoadedModel]:
        """Every model version that is loaded."""
        return [loaded for versions in self._models.values() for loaded in versions.values()]

    def versions(self, model: str) -> list[str]:
        """The versions of a model that are loaded, lowest first."""
        return list(self._models.get(model, ()))

    async def predict(
        self, loaded: LoadedModel, inputs: Sequence[Inputs], deadline: float | None
    ) -> Predicted:
        """Answer inputs: one answer each, in order, whatever they were batched with.

        Args:
            loaded: What `find` gave.
            inputs: One mapping by tensor name for each input.
            deadline: When to give up, on the event loop's clock; None for never.

        Raises:
            BadInput: an input cannot be prepared; its `index` says which, of several.
            Overloaded: the queue is full.
            DeadlineExceeded: the deadline passed first.
            InternalError: the network failed on one of these inputs.
        """
        count = len(inputs)
        if not 1 <= count <= self.settings.max_inputs:
            raise BadInput(f"The request has {count} inputs; send 1 to {self.settings.max_inputs}.")
        room, batcher = loaded.room, loaded.batcher
        batcher.admit(count)
        started = time.perf_counter()
        try:
            if count <= QUICK_INPUTS and all(map(room.is_quick, inputs)):
                samples = _prepare(room, inputs)
            else:
                loop = asyncio.get_running_loop()
                samples = await loop.run_in_executor(self._preparers, _prepare, room, inputs)
        except BaseException:
            batcher.release(count)
            raise
        loaded.meters.preprocess_seconds.observe(time.perf_counter() - started)
        job = await batcher.run(samples, deadline)
        started = time.perf_counter()
        answers = list(map(room.to_answer, job.rows, samples))
        loaded.meters.postprocess_seconds.observe(time.perf_counter() - started)
        return Predicted(answers, job.batch_size, job.queue_seconds, job.compute_seconds)

    async def picture(self, room: Room, inputs: Sequence[Inputs], answers: Sequence[Answer]) -> bytes:
        """Answers as one PNG, of a room that gives pictures."""
        assert room.as_picture is not None, f"{room} gives no pictures"
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._preparers, room.as_picture, inputs, answers)

    def check_key(self, authorization: bytes) -> None:
        """Let in who has a key, and everybody where none is set.

        Args:
            authorization: What the caller sent under that name; empty for nothing.

        Raises:
            Unauthenticated: no key, or none of ours.
        """
        if not self._keys:
            return
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not any(hmac.compare_digest(key, one) for one in self._keys):
            raise Unauthenticated("Send your key as authorization: Bearer <key>.")

    def enter(self) -> None:
        """Note a request at a door.

        Raises:
            Overloaded: too many are under way.
        """
        if self._under_way >= self.settings.max_requests:
            raise Overloaded("Too many requests are under way; send the request again after a pause.")
        self._under_way += 1

    def leave(self, buffered_bytes: int = 0) -> None:
        """Note that a request which entered is answered, and that its body is let go."""
        self._under_way -= 1
        self._buffered_bytes -= buffered_bytes

    def buffer(self, size: int) -> None:
        """Note `size` more bytes of a body in memory.

        Raises:
            Overloaded: all bodies together would take too much.
        """
        if self._buffered_bytes + size > self.settings.max_buffered_bytes:
            raise Overloaded("Too many large bodies are under way; send the request again after a pause.")
        self._buffered_bytes += size

    def measure(
        self,
        protocol: str,
        loaded: LoadedModel | None,
        started: float,
        error: QuintetError | None,
    ) -> None:
        """Count an answered request, and how long it took since `started` (perf_counter)."""
        model, version = (loaded.room.name, loaded.version) if loaded else ("none", "none")
        outcome = str(int(error.status)) if error else "ok"
        meters = self._meters.get((model, version, protocol, outcome))
        if meters is None:
            meters = self._meters[model, version, protocol, outcome] = (
                self._board.counter("quintet_requests", model, version, protocol, outcome),
                self._board.histogram("quintet_request_seconds", model, version, protocol, outcome),
            )
        requests, request_seconds = meters
        requests.add()
        request_seconds.observe(time.perf_counter() - started)
        if error is not None and error.rejection is not None:
            self._board.counter("quintet_rejected", error.rejection).add()

    def statistics(self, loaded: Sequence[LoadedModel]) -> list[Statistics]:
        """What each of these model versions has done, in all workers; reads files."""
        sums = self._board.sums()
        return [_statistics(sums, (one.room.name, one.version)) for one in loaded]

    def gauge(self) -> None:
        """Say how full this worker is."""
        for loaded in self.models():
            self._board.gauge("quintet_queue_depth", loaded.room.name).set(loaded.batcher.depth)
        self._board.gauge("quintet_in_flight").set(self._under_way)

    def drain(self) -> None:
        """Take no more work; what was accepted is finished."""
        self.state = State.DRAINING

    async def finish(self, grace_seconds: float) -> None:
        """Wait until all accepted work is answered, or the grace period is over."""
        give_up = time.monotonic() + grace_seconds
        while self._under_way and time.monotonic() < give_up:
            await asyncio.sleep(0.01)
        for loaded in self.models():
            loaded.close()
        self._preparers.shutdown(wait=False, cancel_futures=True)


def _statistics(
    sums: Mapping[str, Mapping[tuple[str, ...], Sequence[float]]], labels: tuple[str, str]
) -> Statistics:
    """The statistics of one (model, version), out of the board's sums."""

    def number(family: str) -> float:
        return sums[family].get(labels, (0.0,))[0]

    def histogram(family: str, *outcomes: Sequence[float]) -> Lapse:
        series = outcomes or (sums[family].get(labels, (0.0, 0.0)),)
        return Lapse(sum(int(sum(one[:-1])) for one in series), sum(one[-1] for one in series))

    requests: dict[bool, list[Sequence[float]]] = {True: [(0.0, 0.0)], False: [(0.0, 0.0)]}
    for (model, version, _, outcome), cells in sums["quintet_request_seconds"].items():
        if (model, version) == labels:
            requests[outcome == "ok"].append(cells)
    computed, computed_seconds = sums["requests_computed"].get(labels, (0.0, 0.0))
    batches = {
        int(size): Lapse(int(count), seconds)
        for (model, version, size), (count, seconds) in sums["batches"].items()
        if (model, version) == labels
    }
    return Statistics(
        inferences=int(number("quintet_inferences")),
        executions=sum(lapse.count for lapse in batches.values()),
        last_inference=number("last_inference"),
        success=histogram("quintet_request_seconds", *requests[True]),
        fail=histogram("quintet_request_seconds", *requests[False]),
        queue=histogram("quintet_queue_seconds"),
        compute_input=histogram("quintet_preprocess_seconds"),
        compute_infer=Lapse(int(computed), computed_seconds),
        compute_output=histogram("quintet_postprocess_seconds"),
        batches=dict(sorted(batches.items())),
    )


def _prepare(room: Room, inputs: Sequence[Inputs]) -> list[Sample]:
    """Every input to its sample; an error says which input it is about, if there are several."""
    samples = []
    for index, item in enumerate(inputs):
        try:
            samples.append(room.to_tensor(item))
        except BadInput as error:
            error.index = index if len(inputs) > 1 else None
            raise
    return samples


async def off_the_loop(size: int, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function whose work grows with `size` bytes: here if it is short, else in a thread."""
    if size <= LONG_WORK:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)
