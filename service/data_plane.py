"""The core that both doors call: find the model, prepare, batch, run, answer, measure.

It knows no protocol. A door hands it inputs by tensor name and gets answers back.
"""

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any, Final, TypeVar

import psutil
import structlog

from service.batcher import Job, Priority
from service.catalogue import Catalogue
from service.commands import Command, Commands
from service.errors import (
    BadInput,
    Forbidden,
    NotFound,
    Overloaded,
    QuintetError,
    Unauthenticated,
    Unavailable,
)
from service.keys import Keys
from service.lanes import Lanes, LoopTurns, step_back
from service.loaded_model import LoadedModel, Statistics, statistics
from service.metrics import Board, Counter, Histogram
from service.models import MODELS
from service.models.spec import Answer, Inputs, Room, Sample
from service.settings import Settings, cores

LONG_WORK: Final = 128 * 1024
"""Reading more bytes than this would keep the event loop from other callers."""

REST: Final = "rest"
OPEN_INFERENCE_REST: Final = "open-inference-rest"
OPEN_INFERENCE_GRPC: Final = "open-inference-grpc"
BENTOML: Final = "bentoml"
PROTOCOLS: Final = (REST, OPEN_INFERENCE_REST, OPEN_INFERENCE_GRPC, BENTOML)
"""How a request can come; the metrics have a label for it."""

QUICK_INPUTS: Final = 32
"""More inputs than this are prepared in a thread, however small each is."""

OBEY_SECONDS: Final = 120.0
"""How long the administrator waits for all workers to have loaded a model."""

WATCH_COMMANDS_SECONDS: Final = 0.2

GAUGE_SECONDS: Final = 0.25
"""How old the gauges of another worker may be that Prometheus reads."""

log = structlog.get_logger("quintet")
T = TypeVar("T")


class State(Enum):
    """Whether work is taken; what `/readyz` says."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class DataPlane:
    """All models of this worker, and the one way to ask them."""

    def __init__(self, settings: Settings, board: Board, commands: Commands) -> None:
        self.settings = settings
        self.state = State.STARTING
        self._board = board
        self._lanes = Lanes(settings.lanes)
        # Where each loop and each lane has a core of its own, none takes anything from another (runs of
        # several threads aside).
        is_crowded = settings.workers * (1 + settings.lanes) > cores()
        loop_turns = LoopTurns(settings.inline_ms / 1000, self._lanes if is_crowded else None)
        self.catalogue = Catalogue(settings, board, self._lanes, loop_turns)
        self._meters: dict[tuple[str, str, str, str], tuple[Counter, Histogram]] = {}
        self._preparers = ThreadPoolExecutor(2, "prepare", step_back)
        admin_keys = [settings.admin_key.get_secret_value()] if settings.admin_key else []
        api_keys = [key.get_secret_value() for key in settings.api_keys]
        self._admin_keys = Keys(admin_keys)
        self._keys = Keys([*api_keys, *admin_keys]) if api_keys else None
        self._commands = commands
        self._obeying = asyncio.Lock()
        self._under_way = 0
        self._buffered_bytes = 0
        self._process = psutil.Process()
        self._cpu_seconds = 0.0
        board.counter("quintet_worker_starts").add()

    def load(self) -> None:
        """Open every version of every model that is not unloaded; blocks, so call it in a thread.

        Raises:
            RepositoryError: the repository is damaged.
            NetworkMismatch: a file is not the network that its room describes.
        """
        self.catalogue.load_all(self._commands.unloaded())
        self.expect()
        if self.state is State.STARTING:
            self.state = State.READY

    def expect(self) -> None:
        """Have the numbers ready that every model's first caller would wait for; they begin at 0."""
        for loaded in self.models():
            for protocol in PROTOCOLS:
                self._meters_of(loaded.room.name, loaded.version, protocol, "ok")

    async def load_model(self, model: str) -> None:
        """Open every version of a model anew, in every worker; requests go on meanwhile.

        Raises:
            NotFound: there is no such model, or the repository has no version of it.
            BadInput: its highest version cannot be loaded; what served before still does.
        """
        await self._command(Command("load", model))
        troubles = [entry for entry in self.catalogue.index() if entry.model == model and entry.reason]
        if troubles:
            serving = ", ".join(self.versions(model)) or "none"
            raise BadInput(
                f"Version {troubles[-1].version} of the model {model} was not loaded. "
                f"{troubles[-1].reason} Versions that serve: {serving}."
            )
        if not self.versions(model):
            raise NotFound(f"The repository has no version of the model {model}.")

    async def unload_model(self, model: str) -> None:
        """Let a model go, in every worker; requests under way are finished.

        Raises:
            NotFound: there is no such model.
        """
        await self._command(Command("unload", model))

    async def _command(self, command: Command) -> None:
        if command.model not in MODELS:
            raise NotFound(f"There is no such model; there are {', '.join(MODELS)}.")
        if self.state is not State.READY:
            raise Unavailable(f"The service is {self.state.value}; send the request again after a pause.")
        place = self._commands.give(command)
        await self.obey()
        give_up = time.monotonic() + OBEY_SECONDS
        while not self._commands.are_done(place):
            if time.monotonic() > give_up:
                raise Unavailable("Not every worker has done it yet; ask for the index after a pause.")
            await asyncio.sleep(0.02)

    async def obey(self) -> None:
        """Carry out the administrator's commands that are new."""
        async with self._obeying:
            for action, model in self._commands.read():
                change = self.catalogue.load if action == "load" else self.catalogue.unload
                try:
                    await asyncio.to_thread(change, model)
                    self.expect()
                except Exception:
                    # Half done here is better than all workers waiting for this one.
                    log.exception("a command failed", action=action, model=model)
            await asyncio.to_thread(self._commands.done)

    async def keep_watch(self) -> None:
        """Obey, and look at the repository now and then, for ever."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_COMMANDS_SECONDS)
            try:
                if self._commands.are_new():
                    await self.obey()
                if self.settings.watch_seconds and time.monotonic() - looked >= self.settings.watch_seconds:
                    looked = time.monotonic()
                    await asyncio.to_thread(self.catalogue.watch)
                    self.expect()
            except Exception:
                # A full disk, say: what is loaded serves on, and the next look may go well.
                log.exception("the repository could not be looked at")

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self.state is State.READY

    @property
    def has_started(self) -> bool:
        """Whether the models were loaded, whatever has become of the service since."""
        return self.state is not State.STARTING

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
        versions = self.catalogue.models.get(model)
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
        return [found] if version else list(self.catalogue.models[model].values())

    def models(self) -> list[LoadedModel]:
        """Every model version that is loaded."""
        return [loaded for versions in self.catalogue.models.values() for loaded in versions.values()]

    def versions(self, model: str) -> list[str]:
        """The versions of a model that are loaded, lowest first."""
        return list(self.catalogue.models.get(model, ()))

    async def predict(
        self,
        loaded: LoadedModel,
        inputs: Sequence[Inputs],
        deadline: float | None,
        priority: Priority = Priority.NORMAL,
    ) -> tuple[list[Answer], Job]:
        """Answer inputs: one answer each, in order, whatever they were batched with; and how it went.

        Args:
            loaded: What `find` gave.
            inputs: One mapping by tensor name for each input.
            deadline: When to give up, by `time.monotonic`; None for never.
            priority: Whom it goes before.

        Raises:
            BadInput: an input cannot be prepared; its `index` says which, of several.
            Overloaded: the queue is full.
            DeadlineExceeded: the deadline passed first.
            InternalError: the network failed on one of these inputs.
        """
        self._admit(loaded, inputs)
        samples = None
        try:
            if not self.is_prepared_in_its_batch(loaded, inputs):
                samples = await self._prepared(loaded, inputs)
        except BaseException:
            loaded.batcher.release(len(inputs))
            raise
        job = await loaded.batcher.run(inputs, samples, deadline, priority)
        return loaded.answers(job), job

    def ask(
        self,
        loaded: LoadedModel,
        inputs: Sequence[Inputs],
        deadline: float | None,
        priority: Priority,
        size: int,
        on_done: Callable[[Job], None],
    ) -> Job | None:
        """Have a request answered without a task, where nothing has to wait but its batch.

        Args:
            loaded: What `find` gave.
            inputs: As `predict` takes them.
            deadline: As for `predict`.
            priority: As for `predict`.
            size: Of the request's body, as `enter` takes it.
            on_done: Called when the job has its rows, which `loaded.answers` makes answers of, or an
                error; it must call `leave`, and raises nothing. Never called of a job that `give_up` was.

        Returns:
            The job; None where there is none: then nothing has happened, and `predict` knows what is wrong.
        """
        batcher = loaded.batcher
        if not (batcher.is_inline and self.is_prepared_in_its_batch(loaded, inputs)):
            return None
        try:
            self.enter(size)
        except Overloaded:
            return None
        try:
            self._admit(loaded, inputs)
        except (BadInput, Overloaded):
            self.leave(size)
            return None
        job = batcher.job_type(inputs, None, deadline, on_done)
        batcher.submit(job, priority)
        return job

    def give_up(self, job: Job, size: int = 0) -> None:
        """Work no longer for a caller who is gone, if that is not done yet.

        Args:
            job: What `ask` gave.
            size: Of the request's body, as `ask` was told.
        """
        if not job.is_done:
            job.give_up()
            self.leave(size)

    def _admit(self, loaded: LoadedModel, inputs: Sequence[Inputs]) -> None:
        count = len(inputs)
        if not 1 <= count <= self.settings.max_inputs:
            raise BadInput(f"The request has {count} inputs; send 1 to {self.settings.max_inputs}.")
        loaded.batcher.admit(count)

    @staticmethod
    def is_quick(loaded: LoadedModel, inputs: Sequence[Inputs]) -> bool:
        """Whether preparing them is short enough for the event loop."""
        return len(inputs) <= QUICK_INPUTS and all(map(loaded.room.is_quick, inputs))

    def is_prepared_in_its_batch(self, loaded: LoadedModel, inputs: Sequence[Inputs]) -> bool:
        """Whether a request's samples are made when its batch runs, rather than before."""
        batcher = loaded.batcher
        if not batcher.makes_samples:
            return False
        if batcher.is_inline:
            return self.is_quick(loaded, inputs)
        return all(map(loaded.room.is_short, inputs))

    async def _prepared(self, loaded: LoadedModel, inputs: Sequence[Inputs]) -> list[Sample]:
        """A request's samples, made here if that is short work, else in a thread."""
        started = time.perf_counter()
        if self.is_quick(loaded, inputs):
            samples, spent_seconds = _timed_samples(loaded.room, inputs)
        else:
            loop = asyncio.get_running_loop()
            samples, spent_seconds = await loop.run_in_executor(
                self._preparers, _timed_samples, loaded.room, inputs
            )
        loaded.prepared(time.perf_counter() - started, spent_seconds)
        return samples

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
        if self._keys is not None and not self._keys.open_for(authorization):
            raise Unauthenticated("Send your key as authorization: Bearer <key>.")

    def check_admin_key(self, authorization: bytes) -> None:
        """Let in who has the administrator's key, and nobody where none is set.

        Raises:
            Forbidden: the call is switched off, or this is not the key.
        """
        if not self._admin_keys:
            raise Forbidden("Loading and unloading is switched off on this service.")
        if not self._admin_keys.open_for(authorization):
            raise Forbidden("Send the administrator's key as authorization: Bearer <key>.")

    def enter(self, buffered_bytes: int = 0) -> None:
        """Note a request at a door, and its body, where that is here already.

        Raises:
            Overloaded: too many are under way, or all bodies together would take too much.
        """
        if self._under_way >= self.settings.max_requests:
            raise Overloaded("Too many requests are under way; send the request again after a pause.")
        self.buffer(buffered_bytes)
        self._under_way += 1

    def leave(self, buffered_bytes: int = 0) -> None:
        """Note that a request which entered is answered, and that its body is let go."""
        self._under_way -= 1
        self._buffered_bytes -= buffered_bytes

    def leave_bytes(self, buffered_bytes: int) -> None:
        """Note that a body is let go whose request did not enter, or entered apart from it."""
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
        request_id: str = "",
    ) -> None:
        """Count an answered request, and how long it took since `started` (perf_counter).

        Of a share of them the log has a line: who asked for what is in it, what they sent is not.
        """
        try:
            self._count(protocol, loaded, started, error, request_id)
        except Exception:
            # A full disk under the metrics, say: whoever asked has an answer all the same.
            log.exception("a request could not be counted")

    def _count(
        self,
        protocol: str,
        loaded: LoadedModel | None,
        started: float,
        error: QuintetError | None,
        request_id: str,
    ) -> None:
        model, version = (loaded.room.name, loaded.version) if loaded else ("none", "none")
        outcome = str(int(error.status)) if error else "ok"
        requests, request_seconds = self._meters_of(model, version, protocol, outcome)
        requests.add()
        seconds = time.perf_counter() - started
        request_seconds.observe(seconds)
        share = self.settings.access_log_share
        if share and random.random() < share:
            log.info(
                "request",
                request_id=request_id or secrets.token_hex(8),
                protocol=protocol,
                model=model,
                version=version,
                outcome=outcome,
                milliseconds=round(seconds * 1000, 3),
                queue_depth=loaded.batcher.depth if loaded else 0,
            )
        if error is not None and error.rejection is not None:
            self._board.counter("quintet_rejected", error.rejection).add()

    def _meters_of(self, model: str, version: str, protocol: str, outcome: str) -> tuple[Counter, Histogram]:
        labels = (model, version, protocol, outcome)
        meters = self._meters.get(labels)
        if meters is None:
            meters = self._meters[labels] = (
                self._board.counter("quintet_requests", *labels),
                self._board.histogram("quintet_request_seconds", *labels),
            )
        return meters

    def statistics(self, loaded: Sequence[LoadedModel]) -> list[Statistics]:
        """What each of these model versions has done, in all workers; reads files."""
        sums = self._board.sums()
        return [statistics(sums, one.room.name, one.version) for one in loaded]

    def gauge(self) -> None:
        """Say how full this worker is, and what it has used."""
        board = self._board
        for model in MODELS:
            versions = self.catalogue.models.get(model, {}).values()
            board.gauge("quintet_queue_depth", model).set(sum(one.batcher.depth for one in versions))
            board.gauge("quintet_queue_places", model).set(sum(one.policy.queue_size for one in versions))
            board.gauge("quintet_broken_versions", model).set(self.catalogue.broken(model))
        for state in State:
            board.gauge("quintet_workers", state.value).set(self.state is state)
        board.gauge("quintet_in_flight").set(self._under_way)
        used = time.process_time()
        board.counter("quintet_cpu_seconds").add(used - self._cpu_seconds)
        self._cpu_seconds = used
        board.gauge("quintet_memory_bytes").set(self._process.memory_info().rss)

    async def keep_gauging(self) -> None:
        """Say it anew now and then, for ever: whichever worker is asked speaks for all."""
        while True:
            self.gauge()
            await asyncio.sleep(GAUGE_SECONDS)

    def drain(self) -> None:
        """Take no more work; what was accepted is finished."""
        self.state = State.DRAINING

    async def finish(self, grace_seconds: float) -> None:
        """Wait until all accepted work is answered, or the grace period is over."""
        give_up = time.monotonic() + grace_seconds
        while self._under_way and time.monotonic() < give_up:
            await asyncio.sleep(0.01)
        self._lanes.close()
        self._preparers.shutdown(wait=False, cancel_futures=True)


def _timed_samples(room: Room, inputs: Sequence[Inputs]) -> tuple[list[Sample], float]:
    """Samples, and the seconds that the calling thread was at making them.

    Raises:
        BadInput: of an input none can be made; its `index` says which, of several.
    """
    started, samples = time.thread_time(), []
    for index, sample in enumerate(room.samples(inputs)):
        if isinstance(sample, QuintetError):
            sample.index = index if len(inputs) > 1 else None
            raise sample
        samples.append(sample)
    return samples, time.thread_time() - started


async def off_the_loop(size: int, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function whose work grows with `size` bytes: here if it is short, else in a thread."""
    if size <= LONG_WORK:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)
