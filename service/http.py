"""HTTP as the REST door needs it: requests read within limits, answers and problems written.

Plain ASGI: a framework's router, request object and middleware cost more than
reading a small digit does.
"""

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, TypeVar

import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.data_plane import DataPlane, off_the_loop
from service.errors import (
    BadInput,
    BodyTooLarge,
    DeadlineExceeded,
    QuintetError,
    UnsupportedMediaType,
    WrongMethod,
)
from service.loaded_model import LoadedModel

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
T = TypeVar("T")

BODY_SECONDS: Final = 60
"""A body that takes longer to arrive is given up, so that slow callers cannot fill the house."""

MAX_MEMBERS: Final = 64
"""A gzip body may be a row of members; each more costs a copy of all that follow it."""


class CallerGone(Exception):
    """The caller hung up before the answer."""


class Request:
    """One HTTP request: what its first lines say, and its body when asked for."""

    __slots__ = ("asked", "buffered_bytes", "headers", "method", "path", "query", "receive")

    def __init__(
        self, method: str, path: str, query: bytes, headers: dict[bytes, bytes], receive: Receive
    ) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.buffered_bytes = 0
        self.asked: LoadedModel | None = None
        """The model that is to answer, once it is found: whatever happens then is counted as its."""
        self.receive = receive

    @classmethod
    def of(cls, scope: Scope, receive: Receive) -> "Request":
        """The request that an ASGI server has put in a scope."""
        headers = dict(scope["headers"])
        return cls(scope["method"], scope["path"], scope["query_string"], headers, receive)

    def media_type(self) -> tuple[bytes, dict[bytes, bytes]]:
        """The lower-case media type of the body and its parameters; empty where none is said."""
        value = self.headers.get(b"content-type", b"")
        if b";" not in value:
            return value.strip().lower(), {}
        kind, options = parse_options_header(value)
        return kind.lower(), options

    async def body(self, plane: DataPlane) -> bytes:
        """The whole body, decompressed.

        Raises:
            BodyTooLarge: it is over the limit, as sent or decompressed.
            Overloaded: all bodies in memory together are.
            DeadlineExceeded: it came too slowly.
            CallerGone: it never came.
        """
        limit = plane.settings.max_body_bytes
        length = self.headers.get(b"content-length")
        if length is not None and int(length) > limit:
            raise _too_large(limit)
        message = await self.receive()
        body: bytes = self._accept(message, plane)
        if message.get("more_body"):
            body = await self._rest(body, plane, limit)
        if len(body) > limit:
            raise _too_large(limit)
        coding = self.headers.get(b"content-encoding")
        if coding is not None and coding.lower() != b"identity":
            body = await off_the_loop(len(body), decompress, body, coding.lower(), limit)
            self._count(len(body), plane)
        return body

    async def _rest(self, start: bytes, plane: DataPlane, limit: int) -> bytes:
        chunks, size = [start], len(start)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await self.receive()
                    chunks.append(self._accept(message, plane))
                    size += len(chunks[-1])
                    if size > limit:
                        raise _too_large(limit)
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except TimeoutError:
            raise DeadlineExceeded(f"The body took more than {BODY_SECONDS} s; send it faster.") from None

    def _accept(self, message: Message, plane: DataPlane) -> bytes:
        if message["type"] == "http.disconnect":
            raise CallerGone
        chunk: bytes = message.get("body", b"")
        self._count(len(chunk), plane)
        return chunk

    def _count(self, size: int, plane: DataPlane) -> None:
        plane.buffer(size)
        self.buffered_bytes += size

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """Wait for `work`; if the caller hangs up first, cancel it.

        Raises:
            CallerGone: the caller hung up.
        """
        working = asyncio.ensure_future(work)
        hanging_up = asyncio.ensure_future(self.receive())
        try:
            await asyncio.wait((working, hanging_up), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise CallerGone
            return working.result()
        finally:
            working.cancel()
            hanging_up.cancel()


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is too large; send at most {limit:,} bytes, also once decompressed.")


def decompress(body: bytes, coding: bytes, limit: int) -> bytes:
    """Undo gzip or deflate, never beyond `limit` bytes (RFC 9110, section 8.4.1)."""
    if coding not in (b"gzip", b"x-gzip", b"deflate"):
        raise UnsupportedMediaType("The content coding is not served; send gzip, deflate or none.")
    unfolded = b""
    try:
        for _ in range(MAX_MEMBERS):
            if not body:
                return unfolded
            # Window bits 47: a gzip or a zlib wrapper, whichever is there.
            member = zlib.decompressobj(wbits=47)
            unfolded += member.decompress(body, limit + 1 - len(unfolded))
            if len(unfolded) > limit:
                raise _too_large(limit)
            if not member.eof:
                raise BadInput("The compressed body ends too early; send all of it.")
            body = member.unused_data
    except zlib.error:
        raise BadInput("The body is not compressed the way that it is said to be.") from None
    raise BadInput("The compressed body has too many members; compress it as one.")


def wanted_coding(accept_encoding: bytes) -> bytes | None:
    """The content coding to answer with, of those that a caller takes (RFC 9110, section 12.5.3)."""
    weights = {}
    for one in accept_encoding.lower().split(b","):
        name, _, parameter = one.partition(b";")
        try:
            weights[name.strip()] = float(parameter.strip().removeprefix(b"q=") or 1)
        except ValueError:
            weights[name.strip()] = 0.0
    best = max((b"gzip", b"deflate"), key=lambda coding: weights.get(coding, 0.0))
    return best if weights.get(best, 0.0) > 0 else None


def compress(body: bytes, coding: bytes) -> bytes:
    """A body as gzip or deflate (which in HTTP has zlib's wrapper), quickly rather than smallest."""
    wbits = 31 if coding == b"gzip" else 15
    compressor = zlib.compressobj(level=1, wbits=wbits)
    return compressor.compress(body) + compressor.flush()


def read_json(body: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadInput: it is no JSON, nested too deeply, or no object.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # The parser's own words tell the place; what it was given stays out of the answer.
        reason = str(error).split(":")[0]
        raise BadInput(f"The body is not JSON that we can read ({reason}).") from None
    if not isinstance(value, dict):
        raise BadInput("The JSON body must be an object.")
    return value


def read_multipart(body: bytes, boundary: bytes | None, name: bytes, limit: int) -> list[bytes]:
    """The contents of all parts called `name` (RFC 7578), at most `limit` of them.

    Raises:
        BadInput: the body is damaged, or has parts of other names, or too many.
    """
    if not boundary:
        raise BadInput("The multipart body's Content-Type names no boundary.")
    parts: list[bytearray] = []
    field, value, disposition = bytearray(), bytearray(), b""
    is_whole = False

    def on_part_begin() -> None:
        nonlocal disposition
        disposition = b""
        if len(parts) >= limit:
            raise BadInput(f"The body has too many parts; send at most {limit}.")
        parts.append(bytearray())

    def on_header_end() -> None:
        nonlocal disposition
        if bytes(field).lower() == b"content-disposition":
            disposition = bytes(value)
        field.clear()
        value.clear()

    def on_headers_finished() -> None:
        if parse_options_header(disposition)[1].get(b"name") != name:
            raise BadInput(f"Every part of the body must have the name {name.decode()}.")

    def on_end() -> None:
        nonlocal is_whole
        is_whole = True

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": on_part_begin,
                "on_header_field": lambda data, start, end: field.extend(data[start:end]),
                "on_header_value": lambda data, start, end: value.extend(data[start:end]),
                "on_header_end": on_header_end,
                "on_headers_finished": on_headers_finished,
                "on_part_data": lambda data, start, end: parts[-1].extend(data[start:end]),
                "on_end": on_end,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError:
        is_whole = False
    # The parser itself is content with a body that lost its end.
    if not is_whole:
        raise BadInput("The multipart body is damaged or cut short.")
    return [bytes(part) for part in parts]


@dataclass(slots=True)
class Response:
    """An answer: status, media type, body, and what other headers it needs."""

    status: int
    media_type: bytes
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()

    async def send(self, send: Send, *, close: bool = False) -> None:
        """Write it, and ask for the connection to be closed after it if `close`."""
        headers = [
            (b"content-type", self.media_type),
            (b"content-length", b"%d" % len(self.body)),
            *self.headers,
        ]
        if close:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


def json_response(value: Any, headers: tuple[tuple[bytes, bytes], ...] = ()) -> Response:
    """A JSON answer with status 200."""
    return Response(200, b"application/json", orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), headers)


def text_response(text: str, status: int = 200) -> Response:
    """A line of text."""
    return Response(status, b"text/plain; charset=utf-8", text.encode())


def problem_response(error: QuintetError, *, as_open_inference: bool) -> Response:
    """An error as `application/problem+json` (RFC 9457), or as the Open Inference Protocol has it."""
    if as_open_inference:
        body: dict[str, Any] = {"error": error.detail}
        media_type = b"application/json"
    else:
        slug = error.title.lower().replace(" ", "-")
        body = {
            "type": f"urn:quintet:problem:{slug}",
            "title": error.title,
            "status": int(error.status),
            "detail": error.detail,
        }
        if error.index is not None:
            body["index"] = error.index
        media_type = b"application/problem+json"
    return Response(int(error.status), media_type, orjson.dumps(body), tuple(_error_headers(error)))


def _error_headers(error: QuintetError) -> Iterator[tuple[bytes, bytes]]:
    if error.retry_after_seconds is not None:
        yield b"retry-after", b"%d" % error.retry_after_seconds
    if error.status is HTTPStatus.UNAUTHORIZED:
        yield b"www-authenticate", b"Bearer"
    if isinstance(error, WrongMethod):
        yield b"allow", error.allow.encode()
