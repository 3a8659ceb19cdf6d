"""BentoML's own face: each model as a method of BentoML's API, for people who come from there.

`bentoml.SyncHTTPClient("http://localhost:3000").digit(images=["<base64>"])` works, and so does
BentoML's page, under `/bentoml/`. The methods ask the data plane that our own doors ask; BentoML
reads and writes the JSON, which costs several times what our doors take.

Inputs are texts and numbers only: BentoML's types for files would fetch whatever URL a caller names.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import bentoml
import orjson
import structlog
from starlette.responses import JSONResponse

from service.bodies import reader_of
from service.data_plane import BENTOML, DataPlane
from service.errors import InternalError, QuintetError, UnsupportedMediaType, WrongMethod
from service.http import CallerGone, Message, Receive, Request, Response, Scope, Send, problem_response
from service.loaded_model import LoadedModel
from service.models import MODELS
from service.models.spec import Room

PREFIX: Final = "/bentoml"
SCHEMA: Final = "/schema.json"
"""Where BentoML's clients read which methods there are."""


POLICY: Final = (
    b"default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data:; font-src 'self'; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""BentoML's page has scripts in its text, one of which would call an address outside: that it may not."""

log = structlog.get_logger("quintet")


def has_path(path: str) -> bool:
    """Whether BentoML's application answers under this path."""
    return path in (SCHEMA, PREFIX) or path.startswith(f"{PREFIX}/")


class Gate:
    """Stands before BentoML's application: our keys, our limits, and JSON only."""

    def __init__(
        self, plane: DataPlane, application: Callable[[Scope, Receive, Send], Awaitable[None]]
    ) -> None:
        self._plane = plane
        self._application = application
        # It would log what a caller sent wrongly, and with a stack.
        logging.getLogger("bentoml._internal.server.http_app").setLevel(logging.CRITICAL)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, if it may pass."""
        request = Request.of(scope, receive)
        if request.path == PREFIX:
            # The page names its parts relative to itself.
            await Response(307, b"text/plain", b"", ((b"location", PREFIX.encode() + b"/"),)).send(send)
            return
        try:
            self._plane.check_key(request.headers.get(b"authorization", b""))
            if request.method not in ("GET", "HEAD", "POST"):
                raise WrongMethod(f"{PREFIX} answers GET and POST.", allow="GET, HEAD, POST")
            body = b""
            if request.method == "POST":
                kind, _ = request.media_type()
                # Of a form BentoML would fetch files by their URL.
                if kind != b"application/json":
                    raise UnsupportedMediaType("The media type is not served; send application/json.")
                body = await request.body(self._plane)
        except QuintetError as error:
            self._plane.leave_bytes(request.buffered_bytes)
            await problem_response(error, as_open_inference=False).send(send)
            return
        except CallerGone:
            self._plane.leave_bytes(request.buffered_bytes)
            return
        scope = dict(scope)
        if request.method != "POST" and request.path != SCHEMA:
            # BentoML has its page and the page's parts at the root.
            scope["path"] = request.path.removeprefix(PREFIX)
            scope["raw_path"] = scope["path"].encode()
        # The body is whole and plain by now, and that is how it is handed on.
        replaced = (b"content-encoding", b"content-length", b"transfer-encoding")
        scope["headers"] = [
            *((name, value) for name, value in scope["headers"] if name not in replaced),
            (b"content-length", b"%d" % len(body)),
        ]
        is_read = False

        async def receive_body() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            await self._application(scope, receive_body, send_safely)
        finally:
            self._plane.leave_bytes(request.buffered_bytes)


async def _answer(plane: DataPlane, room: Room, fields: dict[str, Any], options: dict[str, float]) -> Any:
    """A request's answers, in the form that people get; an error as a response with its status."""
    started = time.perf_counter()
    loaded: LoadedModel | None = None
    failure: QuintetError | None = None
    entered = False
    try:
        plane.enter()
        entered = True
        loaded = plane.find(room.name)
        values = {name: room.options[name].check(name, value) for name, value in options.items()}
        read = reader_of(room, b"application/json")
        inputs = read(orjson.dumps(fields), {}, plane.settings.max_inputs)
        answers, _ = await plane.predict(loaded, [{**one, **values} for one in inputs], None)
        return [answer.as_json() for answer in answers]
    except QuintetError as error:
        failure = error
    except Exception:
        failure = InternalError()
        log.exception("a call failed", id=failure.id)
    finally:
        if entered:
            plane.leave()
        plane.measure(BENTOML, loaded, started, failure)
    seconds = failure.retry_after_seconds
    headers = {} if seconds is None else {"Retry-After": str(seconds)}
    return JSONResponse({"error": failure.detail}, int(failure.status), headers)


def _plane_of(service: Any) -> DataPlane:
    plane: DataPlane = service.bento_service.house.plane
    return plane


def _pictures(room: Room) -> Callable[..., Any]:
    if room.options:
        (name,) = room.options
        assert name == "min_confidence", "another option wants a method with its name"

        async def ask_surely(
            self: Any, images: list[str], min_confidence: float = 0.5
        ) -> list[dict[str, Any]]:
            options = {"min_confidence": min_confidence}
            answers: list[dict[str, Any]] = await _answer(_plane_of(self), room, {"images": images}, options)
            return answers

        return ask_surely

    async def ask(self: Any, images: list[str]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = await _answer(_plane_of(self), room, {"images": images}, {})
        return answers

    return ask


def _texts(room: Room) -> Callable[..., Any]:
    async def ask(self: Any, texts: list[str]) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = await _answer(_plane_of(self), room, {"texts": texts}, {})
        return answers

    return ask


def _digits(room: Room) -> Callable[..., Any]:
    async def ask(
        self: Any, digits: list[int] | None = None, seed: int | None = None
    ) -> list[dict[str, Any]]:
        fields = {name: value for name, value in (("digits", digits), ("seed", seed)) if value is not None}
        answers: list[dict[str, Any]] = await _answer(_plane_of(self), room, fields, {})
        return answers

    return ask


METHODS: Final = {"pictures": _pictures, "texts": _texts, "digits": _digits}
"""By `Room.takes`: a method with the arguments that people know from the REST calls."""


def with_a_method_for_each_room(service: type) -> type:
    """Give a service one BentoML method for each model, under `/bentoml/<model>`."""
    for name, room in MODELS.items():
        ask = METHODS[room.takes](room)
        ask.__name__ = name
        ask.__qualname__ = f"{service.__qualname__}.{name}"
        ask.__doc__ = room.task
        setattr(service, name, bentoml.api(route=f"{PREFIX}/{name}")(ask))
    return service
