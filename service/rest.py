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
from typing import Any, Final

import orjson
import structlog

from service import open_inference, openapi
from service.batcher import Job, Priority
from service.bodies import prefers_picture, read_query, reader_of
from service.data_plane import LONG_WORK, OPEN_INFERENCE_REST, REST, DataPlane, off_the_loop
from service.errors import (
    BadInput,
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
from service.loaded_model import LoadedModel
from service.metrics import CONTENT_TYPE_LATEST, Board
from service.models import MODELS
from service.models.spec import Answer, Inputs, Room
from service.pages import read_page
from service.version import VERSION

WORTH_COMPRESSING: Final = 1024
"""In bytes: people's answers are compressed from here up, machines' (as Triton does) wherever they ask."""

REQUEST_ID: Final = b"x-request-id"
MAX_REQUEST_ID: Final = 128

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

HEADER_LENGTH: Final = b"inference-header-content-length"

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
        return not self._plane.is_taking

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
        request_id = _request_id(request)
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
            self._plane.measure(protocol, request.asked, started, failure, request_id)
        accepted = request.headers.get(b"accept-encoding")
        # Predictions only: Triton's client for asyncio asks everywhere, and undoes it only there.
        if accepted is not None and request.asked is not None and failure is None:
            await _compress(response, accepted, 0 if is_machine else WORTH_COMPRESSING)
        if request_id:
            response.headers += ((REQUEST_ID, request_id.encode()),)
        return response

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
        deadline = _deadline(request, started)
        room = loaded.room
        kind, parameters = request.media_type()
        read = reader_of(room, kind)
        options = read_query(room, request.query) if request.query or room.options else None
        content = await request.body(self._plane)
        limit = self._plane.settings.max_inputs
        if len(content) <= LONG_WORK:
            inputs = read(content, parameters, limit)
        else:
            inputs = await asyncio.to_thread(read, content, parameters, limit)
        if options:
            inputs = [{**one, **options} for one in inputs]
        priority = _priority(request)
        answers, job = await self._predict(request, loaded, inputs, deadline, priority)
        if room.as_picture is not None and prefers_picture(request.headers.get(b"accept", b"")):
            return Response(200, b"image/png", await self._plane.picture(room, inputs, answers))
        return json_response(
            {
                "model": name,
                "version": loaded.version,
                "predictions": [answer.as_json() for answer in answers],
            },
            (
                (b"quintet-batch-size", b"%d" % job.batch_size),
                (
                    b"server-timing",
                    b"queue;dur=%.3f, compute;dur=%.3f"
                    % (job.queue_seconds * 1000, job.compute_seconds * 1000),
                ),
            ),
        )

    async def _predict(
        self,
        request: Request,
        loaded: LoadedModel,
        inputs: Sequence[Inputs],
        deadline: float | None,
        priority: Priority,
    ) -> tuple[list[Answer], Job]:
        work = self._plane.predict(loaded, inputs, deadline, priority)
        # A batch on the event loop is over before a hang-up could be seen.
        return await (work if loaded.batcher.is_inline else request.unless_gone(work))

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
                open_inference.refuse_overrides(_parameters(await _optional_json(request, self._plane)))
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
                request.asked = self._plane.find(name, version)
                return await self._infer(request, request.asked, started)
        raise NotFound("The Open Inference Protocol has no such path.")

    async def _statistics(self, name: str, version: str) -> Response:
        loaded = self._plane.find_all(name, version)
        return json_response(await asyncio.to_thread(open_inference.statistics, self._plane, loaded))

    def _server(self) -> Response:
        return json_response(
            {"name": "quintet", "version": VERSION, "extensions": list(open_inference.EXTENSIONS)}
        )

    async def _infer(self, request: Request, loaded: LoadedModel, started: float) -> Response:
        deadline = _deadline(request, started)
        body = await request.body(self._plane)
        head_length = _head_length(request, len(body))
        limit = self._plane.settings.max_inputs
        head, inputs = await off_the_loop(len(body), _read_infer, loaded.room, body, head_length, limit)
        parameters = _parameters(head)
        seconds, priority = open_inference.wishes(parameters)
        if seconds is not None:
            soonest = time.monotonic() + seconds - (time.perf_counter() - started)
            deadline = soonest if deadline is None else min(deadline, soonest)
        all_binary = parameters.get("binary_data_output") is True
        wanted = open_inference.wanted_outputs(loaded.room, _asked_outputs(head), is_binary=all_binary)
        answers, _ = await self._predict(request, loaded, inputs, deadline, priority)
        outputs, chunks = [], []
        for one, output in open_inference.to_outputs(loaded.room, answers, wanted):
            described: dict[str, Any] = {
                "name": output.tensor.name,
                "datatype": output.tensor.datatype,
                "shape": list(output.values.shape),
            }
            if one.is_binary:
                chunks.append(open_inference.to_raw(output))
                described["parameters"] = {"binary_data_size": len(chunks[-1])}
            else:
                described["data"] = open_inference.to_json(output)
            outputs.append(described)
        answer = {"model_name": loaded.room.name, "model_version": loaded.version, "outputs": outputs}
        if isinstance(head.get("id"), str):
            answer["id"] = head["id"]
        if not chunks:
            return json_response(answer)
        text = orjson.dumps(answer)
        length = (HEADER_LENGTH, b"%d" % len(text))
        return Response(200, b"application/octet-stream", b"".join([text, *chunks]), (length,))


def _readable(response: Response, request: Request, origins: Sequence[str]) -> Response:
    """The same answer, which the page of an allowed origin may read (Fetch, section 3.2)."""
    origin = request.headers.get(b"origin", b"")
    headers: tuple[tuple[bytes, bytes], ...] = ((b"vary", b"origin"),)
    if origin and ("*" in origins or origin.decode("latin-1") in origins):
        headers += ((b"access-control-allow-origin", origin), (b"access-control-expose-headers", EXPOSED))
    # A copy: pages are shared by all who ask for them.
    return replace(response, headers=response.headers + headers)


async def _compress(response: Response, accepted: bytes, least_bytes: int) -> None:
    """Compress an answer in the way that its caller takes, if there is one and it is worth it."""
    if len(response.body) < least_bytes or response.media_type == b"image/png":
        return
    coding = wanted_coding(accepted)
    if coding is not None:
        response.body = await off_the_loop(len(response.body), compress, response.body, coding)
        response.headers += ((b"content-encoding", coding), (b"vary", b"accept-encoding"))


async def _optional_json(request: Request, plane: DataPlane) -> dict[str, Any]:
    """The JSON object of a body that may be left out."""
    body = await request.body(plane)
    return read_json(body) if body else {}


def _request_id(request: Request) -> str:
    """The caller's own name for the request, if it is one that a log can hold."""
    value = request.headers.get(REQUEST_ID)
    if value is None or len(value) > MAX_REQUEST_ID or not value.isascii():
        return ""
    text = value.decode()
    return text if text.isprintable() else ""


def _must_be(request: Request, method: str) -> None:
    if request.method != method:
        raise WrongMethod(f"This path answers {method}.", allow=method)


def _deadline(request: Request, started: float) -> float | None:
    """The caller's deadline by `time.monotonic`, if the request names one."""
    value = request.headers.get(b"quintet-timeout-ms")
    if value is None:
        return None
    try:
        milliseconds = float(value)
    except ValueError:
        milliseconds = -1.0
    if not 0 < milliseconds <= 86_400_000:
        raise BadInput("Quintet-Timeout-Ms must be a number of milliseconds above 0, of a day at most.")
    elapsed = time.perf_counter() - started
    return time.monotonic() + milliseconds / 1000 - elapsed


def _priority(request: Request) -> Priority:
    """Whom the caller says the request goes before."""
    value = request.headers.get(b"quintet-priority")
    if value is None:
        return Priority.NORMAL
    try:
        return Priority[value.decode().upper()]
    except (KeyError, UnicodeDecodeError):
        raise BadInput("Quintet-Priority must be high, normal or low.") from None


def _head_length(request: Request, body_length: int) -> int | None:
    value = request.headers.get(HEADER_LENGTH)
    if value is None:
        return None
    # Its own length first: Python refuses to read a number of thousands of digits.
    if not value.isdigit() or len(value) > 20 or int(value) > body_length:
        raise BadInput(
            "Inference-Header-Content-Length must be the length of the JSON before the binary data."
        )
    return int(value)


def _read_infer(
    room: Room, body: bytes, head_length: int | None, limit: int
) -> tuple[dict[str, Any], list[Inputs]]:
    """An inference request's JSON head, and its inputs, from JSON or from the bytes after it."""
    head = read_json(body if head_length is None else body[:head_length])
    described = head.get("inputs")
    if not isinstance(described, list) or not described:
        raise BadInput('The request must have "inputs", a list of tensors.')
    binary = memoryview(body)[head_length:] if head_length is not None else memoryview(b"")
    position, tensors = 0, []
    for one in described:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise BadInput("Every input must be an object with name, shape, datatype and data.")
        name, datatype = one["name"], one.get("datatype")
        if not isinstance(datatype, str) or not isinstance(one.get("shape"), list):
            raise BadInput(f'Input {name!r} must have a "datatype" and a "shape".')
        shape = open_inference.check_shape(name, one["shape"], limit)
        parameters = _parameters(one)
        open_inference.refuse_shared_memory(parameters)
        size = parameters.get("binary_data_size")
        if size is None:
            tensors.append(open_inference.from_json(room, name, datatype, shape, one.get("data")))
            continue
        if type(size) is not int or not 0 <= size <= len(binary) - position:
            raise BadInput(f"Input {name!r} says a binary_data_size that the body does not have.")
        raw = binary[position : position + size]
        tensors.append(open_inference.from_raw(name, datatype, shape, raw))
        position += size
    if position != len(binary):
        raise BadInput("The body has more binary data than its inputs name.")
    return head, open_inference.to_inputs(room, tensors, _parameters(head))


def _parameters(described: dict[str, Any]) -> dict[str, Any]:
    parameters = described.get("parameters")
    return parameters if isinstance(parameters, dict) else {}


def _asked_outputs(head: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The outputs asked for: their names and parameters."""
    described = head.get("outputs", [])
    if not isinstance(described, list):
        raise BadInput('"outputs" must be a list.')
    for one in described:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise BadInput('Every output asked for must be an object with a "name".')
    return [(one["name"], _parameters(one)) for one in described]
