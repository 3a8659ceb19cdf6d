"""HTTP/1.1 on a connection, with a short way for the requests that the service lives from.

uvicorn hands every request to its application as a dictionary, in a cycle of events,
through middleware, and takes the answer in two messages: for a small picture that is a
third of all its time. Here a short POST, which has come whole, goes to the door as it is,
and its answer leaves in one piece. All others (long or chunked bodies, other methods,
`Expect`, upgrades, requests sent before the last was answered) go uvicorn's way.

Callers send the same head again and again. What the parser and the door made of one is
kept, and used for those that are the same byte for byte.
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import Server, ServerState

from service.http import Message, Request, Response

SHORT_BODY: Final = b"65536"
"""In bytes; as text, for it is compared with a header's value. Longer bodies are read as they come."""

KEEP_ALIVE_SECONDS: Final = 75
"""How long an idle connection stays open: longer than callers keep theirs (aiohttp 15 s, nginx 60).
Whoever closes first should be the caller, or now and then a request crosses the closing on its way."""

UVICORN_KEEP_ALIVE_SECONDS: Final = 5
"""Where nobody has said how long."""

EARS: Final = 8
"""How often a worker listens on its socket. In a round of its loop libuv takes one connection for each of
them, and a round with a batch in it lasts a millisecond or more: 200 new callers waited for 0.27 s."""

HEAD_END: Final = b"\r\n\r\n"

LONGEST_HEAD: Final = 1024
"""In bytes: longer ones are parsed each time."""

MOST_HEADS: Final = 4096
"""That are kept; they differ in the lengths of bodies, too."""


GiveUp = Callable[[], None]


class Door(Protocol):
    """What answers requests."""

    @property
    def is_closing(self) -> bool:
        """Whether connections shall be closed after their answer."""

    def takes(self, path: str) -> bool:
        """Whether `POST` to this path is its own."""

    async def answer(self, request: Request) -> Response | None:
        """The answer, whatever happens; None where the caller has gone."""

    def question(self, request: Request) -> Any:
        """What the head of a short request asks, where `ask` may answer it; else None."""

    def ask(self, question: Any, body: bytes, reply: Callable[[Response], None]) -> GiveUp | None:
        """Answer without a task, later, if it is not given up; None where `answer` must be asked instead."""


class Head(NamedTuple):
    """What the head of a request says, to the parser and to the door: the same bytes always say the same.

    Attributes:
        question: What the door made of it.
        length: Of the body, in bytes.
    """

    question: Any
    length: int


class Heads:
    """The heads that the connections of one worker keep, by their bytes."""

    def __init__(self) -> None:
        self._kept: dict[bytes, Head] = {}

    def get(self, head: bytes) -> Head | None:
        """What these bytes say, if that is known."""
        return self._kept.get(head)

    def keep(self, head: bytes, said: Head) -> None:
        """Keep what they say."""
        if len(self._kept) >= MOST_HEADS:
            self._kept.clear()
        self._kept[head] = said


class Exchange:
    """A short request that has come whole, and the connection's state until it is answered.

    uvicorn looks at some of it, in the place of its own cycle.
    """

    __slots__ = ("disconnected", "give_up", "keep_alive", "response_complete")

    def __init__(self, keep_alive: bool = True) -> None:
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_complete = False
        self.give_up: GiveUp | None = None

    def hang_up(self) -> None:
        """Note that the caller has gone."""
        self.disconnected = True
        if self.give_up is not None:
            self.give_up()
            self.give_up = None


class TaskExchange(Exchange):
    """One that is answered by a task."""

    __slots__ = ("_gone", "body", "is_read", "request", "task")

    def __init__(
        self, method: str, path: str, query: bytes, headers: dict[bytes, bytes], keep_alive: bool
    ) -> None:
        super().__init__(keep_alive)
        self.request = Request(method, path, query, headers, self.receive)
        self.body = b""
        self.is_read = False
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
        """Note that the caller has gone, and tell who waits for that."""
        super().hang_up()
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
        *,
        heads: Heads | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._door = door
        self._heads = heads or Heads()
        self._is_between_requests = True
        self._packet = b""
        self._is_body_apart = False
        self._held = b""
        if self.timeout_keep_alive == UVICORN_KEEP_ALIVE_SECONDS:
            self.timeout_keep_alive = KEEP_ALIVE_SECONDS
        self._exchange: TaskExchange | None = None
        self._idle_since = 0.0
        self._dated: list[tuple[bytes, bytes]] = []
        self._date = b""

    # ---- the connection ----

    def connection_lost(self, exc: Exception | None) -> None:
        """Let whoever works for this caller know that nobody waits any more."""
        if isinstance(self.cycle, Exchange):
            self.cycle.hang_up()
            self.cycle = None  # type: ignore[assignment]
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

    # ---- a request whose head is known ----

    def data_received(self, data: bytes) -> None:
        """Answer a request with a known head at once; have all else parsed."""
        held, self._held = self._held, b""
        data = held + data if held else data
        self._is_body_apart = not self._is_between_requests
        if self._is_between_requests:
            self._packet = b""
            if self.cycle is None or self.cycle.response_complete:
                end = data.find(HEAD_END, 0, LONGEST_HEAD) + len(HEAD_END)
                head = self._heads.get(data[:end])
                if head is None:
                    self._packet = data
                elif len(data) < end + head.length and not held and not self._door.is_closing:
                    # Some clients send the body by itself. If it does not come next, all is parsed.
                    self._held = data
                    self._idle_since = time.monotonic()
                    return
                elif len(data) == end + head.length and self._answer_at_once(head.question, data[end:]):
                    return
        super().data_received(data)
        if self._exchange is None or self._exchange.body:
            self._packet = b""

    def _answer_at_once(self, question: Any, body: bytes) -> bool:
        """Have the door answer; False where it goes the longer way."""
        if self.flow.write_paused or self.transport.is_closing():
            return False
        before = self.cycle
        exchange = Exchange()
        self.cycle = exchange  # type: ignore[assignment]
        self._idle_since = 0.0
        exchange.give_up = self._door.ask(question, body, partial(self._reply, exchange))
        if exchange.give_up is None:
            self.cycle = before
            return False
        return True

    def _reply(self, exchange: Exchange, response: Response) -> None:
        """Send an answer, if there is somebody left to take it."""
        # What would give it up knows this exchange: a cycle for the garbage collector.
        exchange.give_up = None
        if exchange.disconnected or self.transport.is_closing():
            return
        if self._door.is_closing:
            exchange.keep_alive = False
        self.transport.write(self._written(response, keep_alive=exchange.keep_alive))
        exchange.response_complete = True
        if not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()

    # ---- a request, as the parser tells it ----

    def on_message_begin(self) -> None:
        """Begin with as little as the short way needs."""
        self._is_between_requests = False
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

    def _short(self) -> TaskExchange | None:
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
        return TaskExchange("POST", text, query, headers, parser.should_keep_alive())

    def on_body(self, body: bytes) -> None:
        """Gather the body."""
        exchange = self._exchange
        if exchange is None:
            super().on_body(body)
        else:
            exchange.body = exchange.body + body if exchange.body else body

    def on_message_complete(self) -> None:
        """Have the request answered, now that it is whole."""
        self._is_between_requests = True
        exchange = self._exchange
        if exchange is None:
            super().on_message_complete()
            return
        self._exchange = None
        request = exchange.request
        if self._packet and exchange.keep_alive:
            self._learn(request, exchange.body)
        # They know each other, and would wait for Python's search for such cycles when they are done.
        del exchange.request
        exchange.task = self.loop.create_task(self._answer(exchange, request))

    def _learn(self, request: Request, body: bytes) -> None:
        """Keep what was made of a head that came in one packet, by itself or with all of its body."""
        packet, self._packet = self._packet, b""
        head, end, rest = packet.partition(HEAD_END)
        # The parser may take something else for the end of a head; then this is not its body.
        if not end or rest != (b"" if self._is_body_apart else body) or len(head + end) > LONGEST_HEAD:
            return
        question = self._door.question(request)
        if question is not None:
            self._heads.keep(head + end, Head(question, len(body)))

    async def _answer(self, exchange: Exchange, request: Request) -> None:
        response = await self._door.answer(request)
        if self.flow.write_paused and not exchange.disconnected:
            await self.flow.drain()
        if response is not None:
            self._reply(exchange, response)

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


async def listen_closely(server: Server) -> None:
    """Have a server that has started take `EARS` connections from its socket in a round of the event loop."""
    config, loop = server.config, asyncio.get_running_loop()

    def protocol() -> asyncio.Protocol:
        # As uvicorn makes them.
        return config.http_protocol_class(  # type: ignore[call-arg]
            config=config, server_state=server.server_state, app_state=server.lifespan.state
        )

    for listening in server.servers[0].sockets:
        for _ in range(EARS - 1):
            ear = socket.socket(fileno=os.dup(listening.fileno()))
            # Among uvicorn's own, which closes them at the end.
            server.servers.append(
                await loop.create_server(protocol, sock=ear, ssl=config.ssl, backlog=config.backlog)
            )
