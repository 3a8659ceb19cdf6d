"""The BentoML service: start, stop, and which door leads where.

BentoML builds, containerises, configures and supervises; `bentoml serve service:Quintet`
starts one process per worker. Our REST door stands in front of BentoML's middleware
stack, which a request never crosses (it costs several times what reading a digit costs);
BentoML's own application keeps the lifespan.
"""

import asyncio
import atexit
import contextlib
import gc
import logging
import os
import shutil
import signal
import socket
import ssl
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import bentoml
import click
import structlog
import uvicorn
from _bentoml_sdk.service.factory import Service
from bentoml._internal.configuration.containers import BentoMLContainer

from service import bento_face
from service.commands import Commands
from service.data_plane import DataPlane, State
from service.grpc_api import GrpcDoor
from service.http import Receive, Scope, Send
from service.http1 import Heads, ShortWay, listen_closely
from service.metrics import BOARD_BYTES, Board, reserve
from service.models import MODELS
from service.providers import Profile, ProviderRefused, profile_of, refuse_without_gpu
from service.repository import Repository, RepositoryError
from service.rest import RestDoor
from service.settings import MEBIBYTE, Settings, read_settings

if TYPE_CHECKING:
    from service.tracing import Tracer

FAILED: Final = "failed"
"""The file in the shared folder that says that a worker could not start."""

SHARED_FOLDER: Final = "QUINTET_SHARED_FOLDER"
"""Names the folder that the workers of one server share; the supervisor makes it."""

BACKLOG: Final = 2048
"""Connections that may wait for a worker, as many as BentoML allows."""

LAST_CALL_SECONDS: Final = 0.2
"""How long a connection made just before the doors closed has to send its request."""

GARBAGE_OBJECTS: Final = 20_000
"""So many more objects than before are worth looking for cycles among them."""

log = structlog.get_logger("quintet")


def configure_logging(level: str) -> None:
    """One line of JSON per event on standard error, for people at a terminal a coloured one."""
    # A line for every damaged body that a stranger sends would fill the log.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    is_terminal = os.isatty(2)
    # Local variables stay out of the log: among them are callers' keys and what they sent.
    frames = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            *([] if is_terminal else [structlog.processors.ExceptionRenderer(frames)]),
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
            if is_terminal
            else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.PrintLoggerFactory(open(2, "w", closefd=False)),  # noqa: SIM115
    )


class House:
    """One worker: its numbers, its data plane, its two doors, and its end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        named = os.environ.get(SHARED_FOLDER)
        self._folder = folder = Path(named) if named else _shared_folder()
        self._board = Board(folder)
        self.plane = DataPlane(settings, self._board, Commands(folder))
        self._tracer: Tracer | None = None
        if settings.trace_url is None:
            self.rest = RestDoor(self.plane, self._board)
            self._grpc = GrpcDoor(self.plane)
        else:
            # Loaded only here: who traces nothing pays nothing.
            from service import tracing

            self._tracer = tracing.Tracer(settings.trace_url, settings.trace_share)
            self.rest = tracing.TracedRestDoor(self.plane, self._board, self._tracer)
            self._grpc = tracing.TracedGrpcDoor(self.plane, self._tracer)
        self._loading: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._gauging: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._http_server: object | None = None

    async def start(self) -> None:
        """Open the doors and load the models behind them; `/readyz` says when they are there."""
        self._drain_on_signals()
        if self.settings.grpc_port:
            await self._grpc.start(self.settings.grpc_host, self.settings.grpc_port)
        self._gauging = asyncio.create_task(self.plane.keep_gauging())
        self._loading = asyncio.create_task(self._load())

    async def _load(self) -> None:
        try:
            await asyncio.to_thread(self.plane.load)
        except Exception as error:
            _give_up(self._folder, str(error))
        else:
            _spare_the_collector()
            if isinstance(self._http_server, uvicorn.Server) and self._http_server.started:
                await listen_closely(self._http_server)
            self._grpc.update_health()
            self._watching = asyncio.create_task(self.plane.keep_watch())
            log.info("ready", models=[str(loaded.room) for loaded in self.plane.models()])

    def _drain_on_signals(self) -> None:
        """Put a pause between the signal to stop and the HTTP server's own end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            stop_server = signal.getsignal(number)
            if not callable(stop_server):
                continue

            def drain(number: int, frame: FrameType | None, stop_server: Any = stop_server) -> None:
                if self.plane.state is not State.DRAINING:
                    self.plane.drain()
                    loop.call_soon_threadsafe(self._begin_drain, lambda: stop_server(number, None))

            signal.signal(number, drain)
            # The handler is a method of uvicorn's server, which knows what it listens on.
            self._http_server = getattr(stop_server, "__self__", None)

    def _begin_drain(self, stop_server: Callable[[], object]) -> None:
        self._draining = asyncio.create_task(self._drain(stop_server))

    async def _drain(self, stop_server: Callable[[], object]) -> None:
        """Refuse new work for a while with the doors open, then close them, then let the server end.

        Whoever sends traffic here has that while to see /readyz say 503 and look elsewhere; every
        answer asks its connection to close, so that none is cut while a request is on its way.
        """
        log.info("draining", seconds=self.settings.drain_seconds)
        self._grpc.update_health()
        await asyncio.sleep(self.settings.drain_seconds)
        # Shut down rather than closed: refused at once, callers need not find out by waiting.
        servers = getattr(self._http_server, "servers", ())
        # Its others listen on the same socket.
        for listening in servers[0].sockets if servers else ():
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(listening.fileno())) as ours:
                # No more connections in the queue, time to take those that wait, and then none at all:
                # shutting down cuts whoever still waits.
                ours.listen(0)
                await asyncio.sleep(LAST_CALL_SECONDS / 4)
                ours.shutdown(socket.SHUT_RD)
        await asyncio.sleep(LAST_CALL_SECONDS)
        stop_server()

    async def stop(self) -> None:
        """Answer what was accepted, then close."""
        self.plane.drain()
        for task in (self._loading, self._watching, self._gauging):
            if task is not None:
                task.cancel()
        await self._grpc.stop(self.settings.grace_seconds)
        await self.plane.finish(self.settings.grace_seconds)
        self._board.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)


class QuintetService(Service[Any]):
    """BentoML's service, with our door in front of its application."""

    def to_asgi(self, is_main: bool = True) -> Any:
        """The application of one worker."""
        # Our door counts and logs; a line per request from uvicorn would cost more than the request.
        logging.getLogger("uvicorn.access").disabled = True
        settings = read_settings()
        configure_logging(settings.log_level)
        _listen_alone()
        self.house = House(settings)
        rest, bento = self.house.rest, super().to_asgi(is_main)
        gate = bento_face.Gate(self.house.plane, bento)
        # What uvicorn, which BentoML starts next, takes to speak HTTP.
        uvicorn.config.HTTP_PROTOCOLS["auto"] = partial(ShortWay, rest, heads=Heads())  # type: ignore[assignment]

        async def front(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await bento(scope, receive, send)
            elif bento_face.has_path(scope["path"]):
                await gate(scope, receive, send)
            else:
                await rest(scope, receive, send)

        return front


def _listen_alone() -> None:
    """Put a listening socket of this worker's own in the place of the one that all workers inherit.

    Of workers that accept from one socket, the first to wake takes all that wait: under a
    burst one of them gets every connection, and the others idle. Sockets of their own on
    the same port (SO_REUSEPORT) have the kernel spread connections evenly.
    """
    if sys.platform != "linux" or "--fd" not in sys.argv:
        return
    inherited_number = int(sys.argv[sys.argv.index("--fd") + 1])
    with socket.socket(fileno=os.dup(inherited_number)) as inherited:
        inherited.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with socket.socket(inherited.family, inherited.type) as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            own.bind(inherited.getsockname())
            own.listen(BACKLOG)
            # The supervisor keeps the inherited one open; nobody may be left waiting in its queue.
            with contextlib.suppress(OSError):
                inherited.shutdown(socket.SHUT_RD)
            os.dup2(own.fileno(), inherited_number)


def _spare_the_collector() -> None:
    """Have garbage looked for less often, and not among what stays for good.

    A request that is answered leaves no cycles behind, so Python's search after every 700 objects
    finds nothing and takes 3 % of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS, *gc.get_threshold()[1:])


def _give_up(folder: Path, reason: str) -> None:
    """End the whole server: a worker that merely ended would be started again, to fail again."""
    log.critical("the service cannot start", reason=reason)
    (folder / FAILED).touch()
    os.kill(os.getppid(), signal.SIGTERM)


def _end_badly_if_a_worker_gave_up(folder: Path) -> None:
    """Have the supervisor, which was asked to end and did, say that it was not for a good reason."""
    if (folder / FAILED).exists():
        shutil.rmtree(folder, ignore_errors=True)
        sys.stdout.flush()
        # Called at exit, where an exception no longer changes the exit code.
        os._exit(1)


def _shared_folder() -> Path:
    """A fresh folder that lives as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="quintet-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _check_versions(repository: Repository, model: str, profile: Profile) -> None:
    """See that a model has a version that can be opened, if it has any.

    Raises:
        RepositoryError: it has some, and none can be; this is about the highest.
    """
    trouble: RepositoryError | None = None
    for version in reversed(repository.versions(model)):
        try:
            repository.open(model, version, profile.variants)
        except RepositoryError as error:
            trouble = trouble or error
        else:
            return
    if trouble is not None:
        raise trouble


def _check_port(host: str, port: int, door: str, advice: str) -> None:
    """See that a port is free: workers share it between them, which would hide that a stranger has it.

    Raises:
        SystemExit: it is not.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise SystemExit(
                f"quintet: port {port} for {door} is not free ({error.strerror}); {advice}."
            ) from None


def _check_room(workers: int) -> Path:
    """The folder that the workers will share, with room for their numbers.

    Raises:
        SystemExit: there is none.
    """
    # Twice as much as they hold, for a worker that takes a dead one's place before it has tidied up.
    needed = 2 * workers * BOARD_BYTES
    try:
        folder = _shared_folder()
        with tempfile.TemporaryFile(dir=folder) as probe:
            reserve(probe.fileno(), needed)
    except OSError as error:
        raise SystemExit(
            f"quintet: the workers need {needed / MEBIBYTE:g} MiB for their numbers in "
            f"{os.environ.get('TMPDIR', '/tmp')} ({error.strerror}); "
            "make room there, or name another folder in TMPDIR."
        ) from None
    return folder


def _tls(settings: Settings) -> dict[str, Any]:
    """What BentoML wants to know to speak TLS; nothing where it is not wanted."""
    if settings.tls_certificate is None:
        return {}
    files = {"certfile": str(settings.tls_certificate), "keyfile": str(settings.tls_key)}
    return {"ssl": {"enabled": True, **files}}


def _check_tls(settings: Settings) -> None:
    """See that certificate and key can be read and belong together.

    Raises:
        OSError: they cannot be, or do not.
    """
    if settings.tls_certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        # Without an answer OpenSSL would ask the terminal for a passphrase.
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password="")


@bentoml.service(
    name="quintet",
    service_class=QuintetService,
    workers=read_settings().workers,
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
    **_tls(read_settings()),
)
@bento_face.with_a_method_for_each_room
class Quintet:
    """The service that `bentoml serve service:Quintet` runs."""

    bento_service: QuintetService

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def check() -> None:
        """Refuse to start, once and in a sentence, rather than in every worker over and over."""
        settings = read_settings()
        try:
            profile = profile_of(settings)
            refuse_without_gpu(profile)
            repository = Repository(settings.models)
            for model in set(repository.models()) & set(MODELS):
                _check_versions(repository, model, profile)
        except (RepositoryError, ProviderRefused) as error:
            raise SystemExit(f"quintet: {error}") from None
        try:
            _check_tls(settings)
        except OSError as error:
            raise SystemExit(
                f"quintet: QUINTET_TLS_CERTIFICATE and QUINTET_TLS_KEY cannot be used: {error}"
            ) from None
        command = click.get_current_context(silent=True)
        if command is not None and "port" in command.params:
            # What the command line leaves open is BentoML's configuration.
            host = command.params["host"] or BentoMLContainer.http.host.get()
            port = command.params["port"] or BentoMLContainer.http.port.get()
            _check_port(host, int(port), "REST", "take another with --port or BENTOML_PORT")
        if settings.grpc_port:
            _check_port(settings.grpc_host, settings.grpc_port, "gRPC", "set QUINTET_GRPC_PORT to another")
        folder = _check_room(settings.workers)
        atexit.register(_end_badly_if_a_worker_gave_up, folder)
        os.environ[SHARED_FOLDER] = str(folder)

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def start(self) -> None:
        """Open the house."""
        await self.bento_service.house.start()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def stop(self) -> None:
        """Close it."""
        await self.bento_service.house.stop()
