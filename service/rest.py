"""The HTTP door: the calls for people, and the Open Inference Protocol V2 for machines.

It decodes, asks the data plane, encodes; it decides nothing. Paths:

    POST /<model>                              what the room takes in, predictions out
    GET  / /assets/…                           a page to try them, for browsers
    GET  /openapi.json /docs                   what can be asked, for programs and for people
    GET  /startupz /livez /readyz /metrics     for whoever operates the service
    /v2/…                                      the Open Inference Protocol
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import structlog

from service import open_inference, openapi, questions
from service.batcher import Job
from service.data_plane import OPEN_INFERENCE_REST, REST, DataPlane, State, off_the_loop
from service.errors import (
    InternalError,
    NotFound,
    NotSupported,
    QuintetError,
    Unavailable,
    WrongMethod,
)
from service.http import (
    CallerGone,
    Receive,
    Request,
    Response,
    Scope,
    Send,
    compress,
    json_response,
    problem_response,
    read_json,
    text_response,
    wanted_coding,
)
from service.http1 import GiveUp
from service.loaded_model import LoadedModel
from service.metrics import CONTENT_TYPE_LATEST, Board
from service.models import MODELS
from service.pages import read_page
from service.questions import Asked, PeoplesQuestion, Question
from service.version import VERSION

WORTH_COMPRESSING: Final = 1024
"""In bytes: people's answers are compressed from here up, machines' (as Triton does) wherever they ask."""

ALLOWED_FROM_OTHER_ORIGINS: Final = (
    (b"access-control-allow-methods", b"GET, HEAD, POST"),
    (
        b"access-control-allow-headers",
        b"authorization, content-type, content-encoding, inference-header-content-length, "
        b"quintet-timeout-ms, quintet-priority, x-request-id",
    ),
    (b"access-control-max-age", b"600"),
)

EXPOSED: Final = (
    b"inference-header-content-length, quintet-batch-size, retry-after, server-timing, x-request-id"
)

ONCE: Final = frozenset(
    (
        b"content-encoding",
        questions.REQUEST_ID,
        b"traceparent",
        b"transfer-encoding",
        b"expect",
        b"authorization",
    )
)
"""Headers of requests that `ask` leaves to `answer`."""

log = structlog.get_logger("quintet")


class RestDoor:
    """An ASGI application over the data plane."""

    def __init__(self, plane: DataPlane, board: Board) -> None:
        self._plane = plane
        self._board = board
        self._models = {f"/{name}": name for name in MODELS}
        self._page = read_page(plane.settings.page)
        self._pages: dict[str, Callable[[Request], Response]] = {
            **dict.fromkeys(self._page, self._file),
            "/": self._index,
            "/livez": lambda request: text_response("alive\n"),
            "/startupz": self._started,
            "/readyz": self._ready,
            "/metrics": self._metrics,
            "/openapi.json": lambda request: self._description,
            "/docs": lambda request: self._docs,
        }
        self._description = json_response(openapi.description())
        security = ((b"content-security-policy", openapi.POLICY), (b"x-content-type-options", b"nosniff"))
        self._docs = Response(200, b"text/html; charset=utf-8", openapi.page().encode(), security)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as an ASGI application does."""
        response = await self.answer(Request.of(scope, receive))
        if response is not None:
            await response.send(send, close=self.is_closing)

    @property
    def is_closing(self) -> bool:
        """Whether connections shall be closed after their answer."""
        return self._plane.state is State.DRAINING

    def takes(self, path: str) -> bool:
        """Whether `POST` to this path is a question for a model, or another of the protocol's calls."""
        return path in self._models or path.startswith("/v2/")

    async def answer(self, request: Request) -> Response | None:
        """The answer to one request, whatever happens; None where its caller has gone."""
        origins = self._plane.settings.cors_origins
        response: Response | None
        if origins and request.method == "OPTIONS" and b"access-control-request-method" in request.headers:
            response = Response(204, b"text/plain", b"", ALLOWED_FROM_OTHER_ORIGINS)
        else:
            page = self._pages.get(request.path)
            response = await self._answer(request) if page is None else self._answer_page(request, page)
        return _readable(response, request, origins) if origins and response is not None else response

    async def _answer(self, request: Request) -> Response | None:
        started = time.perf_counter()
        is_machine = request.path == "/v2" or request.path.startswith("/v2/")
        protocol = OPEN_INFERENCE_REST if is_machine else REST
        name = questions.request_id(request)
        failure: QuintetError | None = None
        entered = False
        try:
            self._plane.enter()
            entered = True
            if not request.path.startswith("/v2/health/"):
                self._plane.check_key(request.headers.get(b"authorization", b""))
            response = await (self._machines if is_machine else self._people)(request, started)
        except QuintetError as error:
            # A traceback holds this frame, and the frame the failure: a cycle for the garbage collector.
            failure = error.with_traceback(None)
            response = problem_response(error, as_open_inference=is_machine)
        except CallerGone:
            return None
        except Exception:
            failure = InternalError()
            log.exception("a request failed", id=failure.id, path_is_machine=is_machine)
            response = problem_response(failure, as_open_inference=is_machine)
        finally:
            if entered:
                self._plane.leave(request.buffered_bytes)
        if request.asked is not None or failure is not None:
            self._plane.measure(protocol, request.asked, started, failure, name)
        accepted = request.headers.get(b"accept-encoding")
        # Predictions only: Triton's client for asyncio asks everywhere, and undoes it only there.
        if accepted is not None and request.asked is not None and failure is None:
            coding = _coding(response, accepted, is_machine=is_machine)
            if coding is not None:
                response = await off_the_loop(len(response.body), _coded, response, coding)
        return _named(response, name)

    # ---- at once ----

    def question(self, request: Request) -> Question | None:
        """What the head of a `POST` asks, if `ask` can answer it; None for all else, mistakes among it."""
        headers = request.headers
        # They differ from request to request, or need more than `ask` does; and callers' keys are not kept.
        if not headers.keys().isdisjoint(ONCE) or self._plane.settings.cors_origins:
            return None
        try:
            name = self._models.get(request.path)
            if name is not None:
                question = questions.from_people(MODELS[name], request)
                return None if question.wants_picture else question
            match request.path.split("/"):
                case ["", "v2", "models", name, *version, "infer"] if name in MODELS:
                    match version:
                        case []:
                            return questions.from_machine(MODELS[name], None, request, {})
                        case ["versions", number]:
                            return questions.from_machine(MODELS[name], number, request, {})
        except QuintetError:
            pass
        return None

    def ask(self, question: Question, body: bytes, reply: Callable[[Response], None]) -> GiveUp | None:
        """Answer a request whose body is here, without a task, where all goes well and nothing has to wait.

        Args:
            question: What `question` gave for the head.
            body: All of it.
            reply: Takes the answer, on the event loop, later.

        Returns:
            What to call if the caller goes before it is answered; None if it will not be: then nothing
            has happened, and `answer` knows what to do.
        """
        started = time.perf_counter()
        plane = self._plane
        try:
            plane.check_key(b"")
            loaded = plane.find(question.room.name, question.version)
            batcher = loaded.batcher
            if not (batcher.is_inline and batcher.makes_samples) or len(body) > plane.settings.max_body_bytes:
                return None
            asked = question.read(body, plane.settings.max_inputs)
        except QuintetError:
            return None
        on_done = partial(self._done, question, loaded, asked, started, len(body), reply)
        job = plane.ask(loaded, asked.inputs, asked.deadline(started), asked.priority, len(body), on_done)
        return None if job is None else partial(plane.give_up, job, len(body))

    def _done(
        self,
        question: Question,
        loaded: LoadedModel,
        asked: Asked,
        started: float,
        size: int,
        reply: Callable[[Response], None],
        job: Job,
    ) -> None:
        """Answer a request that `ask` took."""
        is_machine = question.protocol is OPEN_INFERENCE_REST
        failure = job.error
        try:
            try:
                if failure is None:
                    response = question.told(loaded, asked, loaded.answers(job), job)
                else:
                    response = problem_response(failure, as_open_inference=is_machine)
            except Exception:
                failure = InternalError()
                log.exception("a request failed", id=failure.id, path_is_machine=is_machine)
                response = problem_response(failure, as_open_inference=is_machine)
            self._plane.leave(size)
            self._plane.measure(question.protocol, loaded, started, failure, question.request_id)
            if question.accepts is not None and failure is None:
                coding = _coding(response, question.accepts, is_machine=is_machine)
                if coding is not None:
                    response = _coded(response, coding)
            reply(_named(response, question.request_id))
        except Exception:
            # Others of the same batch still wait for their answers.
            log.exception("an answer could not be given", path_is_machine=is_machine)

    def _answer_page(self, request: Request, page: Callable[[Request], Response]) -> Response:
        if request.method in ("GET", "HEAD"):
            return page(request)
        error = WrongMethod(f"{request.path} answers GET.", allow="GET, HEAD")
        return problem_response(error, as_open_inference=False)

    # ---- pages ----

    def _file(self, request: Request) -> Response:
        return self._page[request.path]

    def _index(self, request: Request) -> Response:
        """The page for a browser; for anything else what there is, as JSON."""
        if b"text/html" in request.headers.get(b"accept", b"") and "/" in self._page:
            return self._page["/"]
        return json_response(
            {
                "name": "quintet",
                "version": VERSION,
                "models": {
                    name: {"task": room.task, "call": f"POST /{name}"} for name, room in MODELS.items()
                },
                "open_inference_protocol": "/v2",
                "health": ["/startupz", "/livez", "/readyz"],
                "metrics": "/metrics",
                "description": ["/openapi.json", "/docs"],
            },
            ((b"vary", b"accept"),),
        )

    def _started(self, request: Request) -> Response:
        if self._plane.has_started:
            return text_response("started\n")
        return problem_response(Unavailable("The service is starting."), as_open_inference=False)

    def _ready(self, request: Request) -> Response:
        if self._plane.is_ready:
            return text_response("ready\n")
        error = Unavailable(f"The service is {self._plane.state.value}.")
        return problem_response(error, as_open_inference=False)

    def _metrics(self, request: Request) -> Response:
        self._plane.gauge()
        return Response(200, CONTENT_TYPE_LATEST.encode(), self._board.exposition())

    # ---- for people ----

    async def _people(self, request: Request, started: float) -> Response:
        name = self._models.get(request.path)
        if name is None:
            raise NotFound(f"There is no such path; there are {', '.join(self._models)} and /v2.")
        if request.method != "POST":
            raise WrongMethod(f"{request.path} answers POST.", allow="POST")
        request.asked = loaded = self._plane.find(name)
        return await self._told(request, questions.from_people(loaded.room, request), loaded, started)

    async def _told(
        self, request: Request, question: Question, loaded: LoadedModel, started: float
    ) -> Response:
        """The answer to a question, once its body has come."""
        body = await request.body(self._plane)
        asked = await off_the_loop(len(body), question.read, body, self._plane.settings.max_inputs)
        work = self._plane.predict(loaded, asked.inputs, asked.deadline(started), asked.priority)
        # A batch on the event loop is soon over, and waiting for a hang-up beside it costs a task.
        answers, job = await (work if loaded.batcher.is_inline else request.unless_gone(work))
        if isinstance(question, PeoplesQuestion) and question.wants_picture:
            return Response(200, b"image/png", await self._plane.picture(loaded.room, asked.inputs, answers))
        return question.told(loaded, asked, answers, job)

    # ---- for machines ----

    async def _machines(self, request: Request, started: float) -> Response:
        match request.path.strip("/").split("/")[1:]:
            case []:
                _must_be(request, "GET")
                return self._server()
            case ["health", "live"]:
                _must_be(request, "GET")
                return Response(200, b"application/json", b"{}")
            case ["health", "ready"]:
                _must_be(request, "GET")
                return Response(200 if self._plane.is_ready else 503, b"application/json", b"{}")
            case ["models", "stats"]:
                _must_be(request, "GET")
                return await self._statistics("", "")
            case ["models", _, "trace", "setting"] | ["trace", "setting"]:
                raise NotSupported("Tracing is not supported by this service.")
            case ["logging"]:
                raise NotSupported("Log settings are not supported by this service.")
            case ["systemsharedmemory" | "cudasharedmemory", *_]:
                raise NotSupported("Shared memory is not supported by this service.")
            case ["models", name, *rest]:
                return await self._model(request, name, rest, started)
            case ["repository", "index"]:
                _must_be(request, "POST")
                asked = await _optional_json(request, self._plane)
                return json_response(open_inference.index(self._plane, only_ready=asked.get("ready") is True))
            case ["repository", "models", name, "load" | "unload" as action]:
                _must_be(request, "POST")
                self._plane.check_admin_key(request.headers.get(b"authorization", b""))
                open_inference.refuse_overrides(
                    questions.parameters_of(await _optional_json(request, self._plane))
                )
                await (self._plane.load_model if action == "load" else self._plane.unload_model)(name)
                return json_response({})
        raise NotFound("The Open Inference Protocol has no such path.")

    async def _model(self, request: Request, name: str, rest: list[str], started: float) -> Response:
        version = None
        if rest[:1] == ["versions"] and len(rest) > 1:
            version, rest = rest[1], rest[2:]
        match rest:
            case []:
                _must_be(request, "GET")
                loaded = self._plane.find(name, version)
                return json_response(open_inference.model_metadata(self._plane, loaded))
            case ["ready"]:
                _must_be(request, "GET")
                self._plane.find(name, version)
                return Response(200, b"application/json", b"{}")
            case ["config"]:
                _must_be(request, "GET")
                loaded = self._plane.find(name, version)
                return json_response(open_inference.model_config(self._plane, loaded))
            case ["stats"]:
                _must_be(request, "GET")
                return await self._statistics(name, version or "")
            case ["infer"]:
                _must_be(request, "POST")
                request.asked = loaded = self._plane.find(name, version)
                question = questions.from_machine(loaded.room, version, request)
                return await self._told(request, question, loaded, started)
        raise NotFound("The Open Inference Protocol has no such path.")

    async def _statistics(self, name: str, version: str) -> Response:
        loaded = self._plane.find_all(name, version)
        return json_response(await asyncio.to_thread(open_inference.statistics, self._plane, loaded))

    def _server(self) -> Response:
        return json_response(
            {"name": "quintet", "version": VERSION, "extensions": list(open_inference.EXTENSIONS)}
        )


def _readable(response: Response, request: Request, origins: Sequence[str]) -> Response:
    """The same answer, which the page of an allowed origin may read (Fetch, section 3.2)."""
    origin = request.headers.get(b"origin", b"")
    headers: tuple[tuple[bytes, bytes], ...] = ((b"vary", b"origin"),)
    if origin and ("*" in origins or origin.decode("latin-1") in origins):
        headers += ((b"access-control-allow-origin", origin), (b"access-control-expose-headers", EXPOSED))
    # A copy: pages are shared by all who ask for them.
    return replace(response, headers=response.headers + headers)


def _coding(response: Response, accepted: bytes, *, is_machine: bool) -> bytes | None:
    """How to compress an answer for a caller who takes `accepted`; None where it is not worth it."""
    is_small = not is_machine and len(response.body) < WORTH_COMPRESSING
    return None if is_small or response.media_type == b"image/png" else wanted_coding(accepted)


def _coded(response: Response, coding: bytes) -> Response:
    """The answer, compressed."""
    headers = ((b"content-encoding", coding), (b"vary", b"accept-encoding"))
    return replace(response, body=compress(response.body, coding), headers=response.headers + headers)


def _named(response: Response, name: str) -> Response:
    """The answer, with the caller's own name for the request, if there is one."""
    if name:
        response.headers += ((questions.REQUEST_ID, name.encode()),)
    return response


async def _optional_json(request: Request, plane: DataPlane) -> dict[str, Any]:
    """The JSON object of a body that may be left out."""
    body = await request.body(plane)
    return read_json(body) if body else {}


def _must_be(request: Request, method: str) -> None:
    if request.method != method:
        raise WrongMethod(f"This path answers {method}.", allow=method)
