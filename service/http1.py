"""HTTP/1.1 on a connection, with a short way for the requests that the service lives from.

uvicorn hands every request to its application as a dictionary, in a cycle of events,
through middleware, and takes the answer in two messages: for a small picture that is a
third of all its time. Here a short POST, which has come whole, goes to the door as it is,
and its answer leaves in one piece. All others (long or chunked bodies, other methods,
`Expect`, upgrades, requests sent before the last was answered) go uvicorn's way.
"""

import asyncio
import time
from typing import Any, Final, Protocol

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from service.http import Message, Request, Response

SHORT_BODY: Final = b"65536"
"""In bytes; as text, for it is compared with a header's value. Longer bodies are read as they come."""

KEEP_ALIVE_SECONDS: Final = 75
"""How long an idle connection stays open: longer than callers keep theirs (aiohttp 15 s, nginx 60).
Whoever closes first should be the caller, or now and then a request crosses the closing on its way."""

UVICORN_KEEP_ALIVE_SECONDS: Final = 5
"""Where nobody has said how long."""


class Door(Protocol):
    """What answers requests."""

    @property
    def is_closing(self) -> bool:
        """Whether connections shall be closed after their answer."""

    def takes(self, path: str) -> bool:
        """Whether `POST` to this path is its own."""

    async def answer(self, request: Request) -> Response | None:
        """The answer, whatever happens; None where the caller has gone."""


class Exchange:
    """A short request that has come whole, and the connection's state until it is answered."""

    __slots__ = (
        "_gone",
        "body",
        "disconnected",
        "is_read",
        "keep_alive",
        "request",
        "response_complete",
        "task",
    )

    def __init__(
        self, method: str, path: str, query: bytes, headers: dict[bytes, bytes], keep_alive: bool
    ) -> None:
        self.request = Request(method, path, query, headers, self.receive)
        self.body = b""
        self.is_read = False
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_complete = False
        self.task: asyncio.Task[None] | None = None
        self._gone: asyncio.Future[None] | None = None

    async def receive(self) -> Message:
        """The body, then, should it happen, that the caller hung up (ASGI's messages)."""
        if not self.is_read:
            self.is_read = True
            return {"type": "http.request", "body": self.body}
        if not self.disconnected:
            self._gone = asyncio.get_running_loop().create_future()
            await self._gone
        return {"type": "http.disconnect"}

    def hang_up(self) -> None:
        """Note that the caller has gone."""
        self.disconnected = True
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)


class ShortWay(HttpToolsProtocol):
    """uvicorn's protocol, which it follows wherever a request is not short."""

    def __init__(
        self,
        door: Door,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._door = door
        if self.timeout_keep_alive == UVICORN_KEEP_ALIVE_SECONDS:
            self.timeout_keep_alive = KEEP_ALIVE_SECONDS
        self._exchange: Exchange | None = None
        self._idle_since = 0.0
        self._dated: list[tuple[bytes, bytes]] = []
        self._date = b""

    # ---- the connection ----

    def connection_lost(self, exc: Exception | None) -> None:
        """Let whoever works for this caller know that nobody waits any more."""
        if isinstance(self.cycle, Exchange):
            self.cycle.hang_up()
            self.cycle = None
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        super().connection_lost(exc)

    def _unset_keepalive_if_required(self) -> None:
        # Timers are dear: the one that runs looks at this when it fires, and goes on if need be.
        self._idle_since = 0.0

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that has been idle for long enough."""
        self.timeout_keep_alive_task = None
        if not self._idle_since or self.transport.is_closing():
            return
        left = self.timeout_keep_alive - (time.monotonic() - self._idle_since)
        if left <= 0:
            self.transport.close()
        else:
            self._arm(left)

    def _arm(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def on_response_complete(self) -> None:
        """Go on with what was sent meanwhile, or wait for more, though not for ever."""
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        self._idle_since = time.monotonic()
        if self.timeout_keep_alive_task is None:
            self._arm(self.timeout_keep_alive)

    # ---- a request, as the parser tells it ----

    def on_message_begin(self) -> None:
        """Begin with as little as the short way needs."""
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_headers_complete(self) -> None:
        """Choose the way."""
        exchange = self._short()
        if exchange is not None:
            self._exchange = exchange
            self.cycle = exchange  # type: ignore[assignment]
            return
        url, expects, headers = self.url, self.expect_100_continue, self.headers
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)
        super().on_headers_complete()

    def _short(self) -> Exchange | None:
        """The exchange, if this is a request for the short way."""
        cycle, parser, url = self.cycle, self.parser, self.url
        if (
            (cycle is not None and not cycle.response_complete)
            or self.expect_100_continue
            or parser.get_method() != b"POST"
            or parser.get_http_version() != "1.1"
            or parser.should_upgrade()
            or url[:1] != b"/"
            or b"%" in url
            or b"#" in url
            or not url.isascii()
        ):
            return None
        headers = dict(self.headers)
        length = headers.get(b"content-length", b"0")
        if b"transfer-encoding" in headers or (len(length), length) > (len(SHORT_BODY), SHORT_BODY):
            return None
        path, _, query = url.partition(b"?")
        text = path.decode()
        if not self._door.takes(text):
            return None
        return Exchange("POST", text, query, headers, parser.should_keep_alive())

    def on_body(self, body: bytes) -> None:
        """Gather the body."""
        exchange = self._exchange
        if exchange is None:
            super().on_body(body)
        else:
            exchange.body = exchange.body + body if exchange.body else body

    def on_message_complete(self) -> None:
        """Have the request answered, now that it is whole."""
        exchange = self._exchange
        if exchange is None:
            super().on_message_complete()
            return
        self._exchange = None
        request = exchange.request
        # They know each other, and would wait for Python's search for such cycles when they are done.
        del exchange.request
        exchange.task = self.loop.create_task(self._answer(exchange, request))

    async def _answer(self, exchange: Exchange, request: Request) -> None:
        response = await self._door.answer(request)
        if self.flow.write_paused and not exchange.disconnected:
            await self.flow.drain()
        if exchange.disconnected or response is None or self.transport.is_closing():
            return
        if self._door.is_closing:
            exchange.keep_alive = False
        self.transport.write(self._written(response, keep_alive=exchange.keep_alive))
        exchange.response_complete = True
        if not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _written(self, response: Response, *, keep_alive: bool) -> bytes:
        """The answer as it travels (RFC 9112)."""
        dated = self.server_state.default_headers
        if dated is not self._dated:
            self._dated = dated
            self._date = b"".join([b"%s: %s\r\n" % header for header in dated])
        return b"%b%bcontent-type: %b\r\ncontent-length: %d\r\n%b%b\r\n%b" % (
            STATUS_LINE[response.status],
            self._date,
            response.media_type,
            len(response.body),
            b"".join([b"%b: %b\r\n" % header for header in response.headers]),
            b"" if keep_alive else b"connection: close\r\n",
            response.body,
        )
