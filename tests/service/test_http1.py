"""The short way of HTTP/1.1: the same answers as the long one, whatever comes how.

A real server on a real socket, with a door that says what it was asked.
"""

import asyncio
import gc
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from service.http import Receive, Request, Response, Scope, Send
from service.http1 import MOST_HEADS, Head, Heads, ShortWay, TaskExchange

PATIENCE_SECONDS = 30


class Door:
    """Answers with what it was asked, and notes who went away."""

    def __init__(self) -> None:
        self.is_closing = False
        self.at_once: list[str] = []
        self.short: list[str] = []
        self.long: list[str] = []
        self.gone: list[str] = []
        self.given_up: list[str] = []
        self.answer_with = b""

    def takes(self, path: str) -> bool:
        return path.startswith("/short")

    def question(self, request: Request) -> str | None:
        """Of paths that begin with `/short/known`, which `ask` answers, what the path and the query are."""
        return f"{request.path}?{request.query.decode()}" if request.path.startswith("/short/known") else None

    def ask(self, question: str, body: bytes, reply: Callable[[Response], None]) -> Callable[[], None] | None:
        if body == b"refuse":
            return None
        self.at_once.append(question)
        response = Response(200, b"text/plain", question.encode() + b" " + body, ((b"way", b"at once"),))
        if "later" in question:
            asyncio.get_running_loop().call_later(0.05, reply, response)
        else:
            reply(response)
        return partial(self.given_up.append, question)

    async def answer(self, request: Request) -> Response | None:
        self.short.append(request.path)
        body = await self._body(request)
        if request.path == "/short/slow":
            assert (await request.receive())["type"] == "http.disconnect"
            self.gone.append(request.path)
            return None
        said = b"%b?%b %b" % (request.path.encode(), request.query, body)
        return Response(200, b"text/plain", self.answer_with or said, ((b"way", b"short"),))

    async def application(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request.of(scope, receive)
        self.long.append(request.path)
        said = b"%b?%b %b" % (request.path.encode(), request.query, await self._body(request))
        await Response(200, b"text/plain", self.answer_with or said, ((b"way", b"long"),)).send(send)

    async def _body(self, request: Request) -> bytes:
        body, more = b"", True
        while more:
            message = await request.receive()
            body += message["body"]
            more = message.get("more_body", False)
        return body


@asynccontextmanager
async def serving(door: Door, keep_alive: float = 30.0) -> AsyncIterator[int]:
    """A server for the block; its port."""
    config = Config(
        door.application, log_config=None, timeout_keep_alive=keep_alive, lifespan="off", interface="asgi3"
    )  # type: ignore[arg-type]
    config.load()
    state = ServerState()
    state.default_headers = [(b"date", b"today")]
    loop = asyncio.get_running_loop()
    make = partial(ShortWay, door, config=config, server_state=state, app_state={}, heads=Heads())
    server = await loop.create_server(make, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        await asyncio.sleep(0.01)


@asynccontextmanager
async def connected(
    port: int, **options: int
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection for the block."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def request(path: str, body: bytes = b"", *lines: str, method: str = "POST") -> bytes:
    """A request as it travels."""
    head = "\r\n".join([f"{method} {path} HTTP/1.1", "host: here", f"content-length: {len(body)}", *lines])
    return head.encode() + b"\r\n\r\n" + body


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The head and the body of the next answer."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        head = await reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"content-length: (\d+)", head)
        assert found, head
        return head, await reader.readexactly(int(found[1]))


async def exchange(port: int, sent: bytes, answers: int = 1) -> list[tuple[bytes, bytes]]:
    """Send bytes at once on a fresh connection, and read so many answers."""
    async with connected(port) as (reader, writer):
        writer.write(sent)
        return [await read_answer(reader) for _ in range(answers)]


async def test_an_answered_request_leaves_nothing_for_the_garbage_collector() -> None:
    """Under load its search takes 10 ms, in which everybody waits."""
    gc.collect()
    gc.disable()
    try:
        async with serving(Door()) as port:
            async with connected(port) as (reader, writer):
                for _ in range(50):
                    writer.write(request("/short", b"seven"))
                    await read_answer(reader)
            left = sum(type(one) is TaskExchange for one in gc.get_objects())
    finally:
        gc.enable()
    assert left <= 1, "the last one, which its connection still holds"


def test_a_short_request_has_its_answer_in_one_piece() -> None:
    async def check() -> None:
        door = Door()
        async with serving(door) as port:
            ((head, body),) = await exchange(port, request("/short/one?a=1", b"hello"))
        assert body == b"/short/one?a=1 hello"
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"date: today\r\n" in head
        assert b"content-type: text/plain\r\n" in head
        assert b"way: short\r\n" in head
        assert door.long == []

    asyncio.run(check())


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(request("/other", b"hello"), id="a path that is not the door's"),
        pytest.param(request("/short", b"", method="GET"), id="another method"),
        pytest.param(request("/short%20", b"hello"), id="an escaped path"),
        pytest.param(request("/short", bytes(65_537)), id="a long body"),
        pytest.param(
            b"POST /short HTTP/1.1\r\nhost: here\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
            id="a body in chunks",
        ),
        pytest.param(b"POST /short HTTP/1.0\r\ncontent-length: 2\r\n\r\nhi", id="an old version of HTTP"),
        pytest.param(b"POST http://here/short HTTP/1.1\r\nhost: here\r\n\r\n", id="a whole address"),
    ],
)
def test_everything_else_goes_the_long_way(sent: bytes) -> None:
    async def check() -> None:
        door = Door()
        async with serving(door) as port:
            ((head, _),) = await exchange(port, sent)
        assert b"way: long\r\n" in head
        assert (door.short, len(door.long)) == ([], 1)

    asyncio.run(check())


def test_a_body_that_is_waited_for_is_asked_for() -> None:
    async def check() -> None:
        door = Door()
        async with serving(door) as port, connected(port) as (reader, writer):
            writer.write(
                b"POST /short HTTP/1.1\r\nhost: here\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"
            )
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"hi")
            assert (await read_answer(reader))[1] == b"/short? hi"

    asyncio.run(check())


def test_a_request_may_come_byte_by_byte_and_the_connection_serves_on() -> None:
    async def check() -> None:
        door = Door()
        async with serving(door) as port, connected(port) as (reader, writer):
            for turn in range(3):
                for byte in request(f"/short/{turn}", b"hello"):
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0)
                assert (await read_answer(reader))[1] == b"/short/%d? hello" % turn

    asyncio.run(check())


def test_requests_sent_ahead_are_answered_in_their_order_whichever_way_they_go() -> None:
    async def check() -> None:
        door = Door()
        paths = ["/short/a", "/short/b", "/other/c", "/short/d", "/other/e", "/other/f", "/short/g"]
        async with serving(door) as port:
            answers = await exchange(port, b"".join(request(path, b"x") for path in paths), len(paths))
        assert [body for _, body in answers] == [f"{path}? x".encode() for path in paths]

    asyncio.run(check())


@pytest.mark.parametrize("door_closes", [False, True], ids=["the caller asks for it", "the door closes"])
def test_the_connection_is_closed_after_the_answer_when(door_closes: bool) -> None:
    async def check() -> None:
        door = Door()
        door.is_closing = door_closes
        async with serving(door) as port, connected(port) as (reader, writer):
            writer.write(request("/short", b"x", *([] if door_closes else ["connection: close"])))
            head, _ = await read_answer(reader)
            assert b"connection: close\r\n" in head
            assert await asyncio.wait_for(reader.read(), PATIENCE_SECONDS) == b""

    asyncio.run(check())


def test_a_caller_who_hangs_up_is_noticed() -> None:
    async def check() -> None:
        door = Door()
        async with serving(door) as port, connected(port) as (_, writer):
            writer.write(request("/short/slow", b"x"))
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not door.short:
                    await asyncio.sleep(0.01)
                writer.close()
                while not door.gone:
                    await asyncio.sleep(0.01)

    asyncio.run(check())


def test_an_idle_connection_is_closed_and_a_busy_one_is_not() -> None:
    async def check() -> None:
        door = Door()
        async with serving(door, keep_alive=0.5) as port, connected(port) as (reader, writer):
            for _ in range(8):
                writer.write(request("/short", b"x"))
                await read_answer(reader)
                await asyncio.sleep(0.1)
            assert await asyncio.wait_for(reader.read(), PATIENCE_SECONDS) == b""

    asyncio.run(check())


def test_where_nobody_says_how_long_an_idle_connection_outlasts_what_callers_keep_theirs() -> None:
    """A client that keeps it for as long would now and then send a request across its closing."""

    async def check() -> None:
        async with serving(Door(), keep_alive=5) as port, connected(port) as (reader, writer):
            for _ in range(2):
                writer.write(request("/short", b"x"))
                await read_answer(reader)
                await asyncio.sleep(5.5)
            assert not reader.at_eof()

    asyncio.run(check())


def test_a_caller_who_reads_slowly_gets_all_and_fills_no_memory() -> None:
    async def check() -> None:
        door = Door()
        door.answer_with = bytes(1 << 20)
        async with serving(door) as port, connected(port, limit=1 << 16) as (reader, writer):
            for _ in range(20):
                writer.write(request("/short", b"x"))
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not door.short:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.5)
            # Kept waiting by what the caller has not read, the server goes no further.
            assert len(door.short) + len(door.long) < 20
            for _ in range(20):
                assert len((await read_answer(reader))[1]) == len(door.answer_with)

    asyncio.run(check())


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"POST /short HTTP/1.1\r\ncontent-length: -1\r\n\r\n", id="a length below nothing"),
        pytest.param(
            b"POST /short HTTP/1.1\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nhi!", id="two lengths"
        ),
        pytest.param(
            b"POST /short HTTP/1.1\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\nhi",
            id="length and chunks",
        ),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00", id="another protocol"),
    ],
)
def test_what_is_not_http_is_refused(sent: bytes) -> None:
    async def check() -> None:
        door = Door()
        async with serving(door) as port:
            ((head, _),) = await exchange(port, sent)
        assert head.startswith(b"HTTP/1.1 400 ")
        assert (door.short, door.long) == ([], [])

    asyncio.run(check())


# ---- heads that are known ----


KNOWN = request("/short/known?a=1", b"hello")


async def ways(port: int, *packets: bytes, answers: int) -> list[tuple[str, bytes]]:
    """Send packets of requests whose head may be known, in turn; how each was answered, and what."""
    async with connected(port) as (reader, writer):
        writer.write(KNOWN)
        await read_answer(reader)
        for packet in packets:
            writer.write(packet)
            await asyncio.sleep(0.05)
        found = [await read_answer(reader) for _ in range(answers)]
    return [(re.findall(rb"way: ([a-z ]+)", head)[0].decode(), body) for head, body in found]


HEAD, BODY = KNOWN[:-5], KNOWN[-5:]
AT_ONCE = ("at once", b"/short/known?a=1 hello")
BY_A_TASK = ("short", b"/short/known?a=1 hello")


@pytest.mark.parametrize(
    ("packets", "expected"),
    [
        pytest.param([KNOWN], [AT_ONCE], id="the same again"),
        pytest.param([KNOWN, KNOWN, KNOWN], [AT_ONCE] * 3, id="again and again"),
        pytest.param([HEAD, BODY], [AT_ONCE], id="the body by itself"),
        pytest.param([HEAD, BODY[:2], BODY[2:]], [BY_A_TASK], id="the body in two parts"),
        pytest.param([HEAD[:20], HEAD[20:] + BODY], [BY_A_TASK], id="the head in two parts"),
        pytest.param([HEAD[:20], KNOWN[20:], KNOWN], [BY_A_TASK, AT_ONCE], id="in parts, then whole"),
        pytest.param([HEAD + b"other"], [("at once", b"/short/known?a=1 other")], id="another body"),
        pytest.param(
            [HEAD.replace(b"a=1", b"a=2") + BODY], [("short", b"/short/known?a=2 hello")], id="another query"
        ),
        pytest.param(
            [request("/short/known?a=1", b"a longer body")],
            [("short", b"/short/known?a=1 a longer body")],
            id="another length",
        ),
        pytest.param([KNOWN + KNOWN], [BY_A_TASK, ("long", AT_ONCE[1])], id="two at a time"),
        pytest.param([KNOWN + KNOWN[:30], KNOWN[30:]], [BY_A_TASK, BY_A_TASK], id="one and a half"),
        pytest.param([HEAD, BODY + KNOWN], [BY_A_TASK, ("long", AT_ONCE[1])], id="the next behind the body"),
        pytest.param(
            [request("/short/known?a=1", b"refuse")] * 2,
            [("short", b"/short/known?a=1 refuse")] * 2,
            id="the door would rather not",
        ),
    ],
)
def test_a_known_head_is_answered_at_once_and_all_else_as_ever(
    packets: list[bytes], expected: list[tuple[str, bytes]]
) -> None:
    async def check() -> None:
        async with serving(Door()) as port:
            assert await ways(port, *packets, answers=len(expected)) == expected

    asyncio.run(check())


def test_a_head_that_comes_by_itself_the_first_time_is_known_the_second() -> None:
    async def check() -> None:
        door = Door()
        async with serving(door) as port, connected(port) as (reader, writer):
            for _ in range(2):
                writer.write(HEAD)
                await asyncio.sleep(0.05)
                writer.write(BODY)
                await read_answer(reader)
        assert (door.short, door.at_once) == (["/short/known"], ["/short/known?a=1"])

    asyncio.run(check())


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(request("/short/known", b"x", "connection: close"), id="a connection that is to close"),
        pytest.param(request("/short/known", b"x", f"long: {'x' * 2000}"), id="a long head"),
        pytest.param(request("/short/other", b"x"), id="a question that the door does not answer so"),
        pytest.param(
            b"POST /short/known HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
            id="chunks",
        ),
        # Were this head's end where the blank line in its body is, the next request would begin elsewhere.
        pytest.param(
            b"POST /short/known HTTP/1.1\nhost: here\ncontent-length: 6\n\nab\r\n\r\n",
            id="line ends of another kind",
        ),
    ],
)
def test_heads_that_are_not_kept(sent: bytes) -> None:
    async def check() -> None:
        door = Door()
        async with serving(door) as port:
            for _ in range(3):
                await exchange(port, sent)
        assert door.at_once == []

    asyncio.run(check())


def test_a_request_sent_before_the_last_was_answered_waits_for_its_turn() -> None:
    async def check() -> None:
        later = request("/short/known/later", b"first")
        async with serving(Door()) as port, connected(port) as (reader, writer):
            for _ in range(3):
                writer.write(later)
                await asyncio.sleep(0.01)
                writer.write(KNOWN)
                assert (await read_answer(reader))[1] == b"/short/known/later? first"
                assert (await read_answer(reader))[1] == b"/short/known?a=1 hello"

    asyncio.run(check())


def test_who_hangs_up_before_a_later_answer_harms_nobody() -> None:
    async def check() -> None:
        door = Door()
        later = request("/short/known/later", b"x")
        async with serving(door) as port:
            for _ in range(3):
                async with connected(port) as (reader, writer):
                    writer.write(later)
                    await read_answer(reader)
                    writer.write(later)
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert (await exchange(port, KNOWN))[0][1] == b"/short/known?a=1 hello"
        assert len(door.at_once) >= 3
        assert door.given_up == ["/short/known/later?"] * 3, "those who hung up, and nobody who was answered"

    asyncio.run(check())


def test_no_more_heads_are_kept_than_there_is_room_for() -> None:
    heads = Heads()
    for number in range(MOST_HEADS + 10):
        heads.keep(b"%d" % number, Head(number, 0))
    assert heads.get(b"%d" % (MOST_HEADS + 9)) == Head(MOST_HEADS + 9, 0)
    assert sum(heads.get(b"%d" % number) is not None for number in range(MOST_HEADS + 10)) <= MOST_HEADS
