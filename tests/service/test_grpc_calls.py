"""Calls of the gRPC door, alone: framing, statuses, deadlines, cancelling, and what is held in memory."""

import asyncio
import gzip
import struct
import zlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from service import http2
from service.errors import BadInput, Overloaded, QuintetError
from service.grpc_calls import (
    AHEAD,
    Answered,
    Call,
    GiveUp,
    Method,
    Service,
    Status,
    Tell,
    percent_encoded,
    read_timeout,
)
from service.http2 import Limits

from .wire import Fields, Wire, connected, serving, settings

LIMIT = 100_000


def fields(method: str = "Echo", **more: str) -> Fields:
    """A call's headers; `more` replaces some, or adds."""
    values = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/test.Service/{method}",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    values |= {name.replace("_", "-"): value for name, value in more.items()}
    return list(values.items())


def message(content: bytes, *, flag: int = 0) -> bytes:
    return struct.pack(">BI", flag, len(content)) + content


def messages_in(body: bytes) -> list[bytes]:
    """The messages of a body; those that are compressed as they are, with their flag before them."""
    found, position = [], 0
    while position < len(body):
        flag, length = struct.unpack_from(">BI", body, position)
        content = body[position + 5 : position + 5 + length]
        assert len(content) == length
        found.append(b"\x01" + content if flag else content)
        position += 5 + length
    return found


class Ledger:
    """Methods to call, and what they and the service have noted."""

    def __init__(self) -> None:
        self.held = 0
        self.most_held = 0
        self.most_allowed = 1 << 30
        self.started = 0
        self.cancelled = 0
        self.asked = 0
        self.given_up = 0
        self.gate = asyncio.Event()
        methods = {
            "Echo": Method(self.echo),
            "Row": Method(self.echo, is_stream=True),
            "Wait": Method(self.wait),
            "WaitRow": Method(self.wait, is_stream=True),
            "Own": Method(self.own, keeps_deadline=True),
            "Zeros": Method(self.zeros),
            "ZerosRow": Method(self.zeros, is_stream=True),
            "Wrong": Method(self.wrong),
            "Broken": Method(self.broken),
            "Asked": Method(self.echo, ask=self.ask),
            "AskedRow": Method(self.echo, is_stream=True, ask=self.ask),
        }
        self.service = Service(
            {f"/test.Service/{name}".encode(): method for name, method in methods.items()},
            max_message_bytes=LIMIT,
            max_calls=20,
            hold=self.hold,
            let_go=self.let_go,
        )

    def hold(self, size: int) -> None:
        if self.held + size > self.most_allowed:
            raise Overloaded("Too many large bodies are under way; send the request again after a pause.")
        self.held += size
        self.most_held = max(self.most_held, self.held)

    def let_go(self, size: int) -> None:
        self.held -= size

    async def echo(self, call: Call, content: bytes) -> bytes:
        return content

    async def wait(self, call: Call, content: bytes) -> bytes:
        self.started += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return content

    async def own(self, call: Call, content: bytes) -> bytes:
        return b"none" if call.deadline is None else b"some"

    async def zeros(self, call: Call, content: bytes) -> bytes:
        return bytes(int(content))

    async def wrong(self, call: Call, content: bytes) -> bytes:
        raise BadInput(content.decode(), index=3)

    async def broken(self, call: Call, content: bytes) -> bytes:
        raise RuntimeError("a secret of ours")

    def ask(self, call: Call, content: bytes, tell: Tell) -> GiveUp | None:
        """Without a task: an echo in a little while, the longer the shorter; not of what is long, or `no`."""
        if content == b"no" or len(content) > 1000:
            return None
        self.asked += 1
        answer: Answered = BadInput("as you wish") if content == b"fail" else content
        seconds = 3600 if content == b"for ever" else 0.02 / (1 + len(content))
        timer = asyncio.get_running_loop().call_later(seconds, tell, answer)

        def give_up() -> None:
            self.given_up += 1
            timer.cancel()

        return give_up


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
async def port(ledger: Ledger) -> AsyncIterator[int]:
    async with serving(ledger.service, Limits(stuck_seconds=1)) as port:
        yield port
    assert (ledger.held, ledger.service.calls) == (0, 0)


@pytest.fixture
async def wire(port: int) -> AsyncIterator[Wire]:
    async with connected(port) as wire:
        yield wire


async def ask(wire: Wire, head: Fields, body: bytes, number: int = 1) -> tuple[dict[str, str], bytes]:
    """One call, whole."""
    wire.headers(number, head)
    for start in range(0, len(body), 16_384):
        wire.data(number, body[start : start + 16_384])
    wire.data(number, b"", is_last=True)
    return await wire.answer(number)


# ---- when all is well ----


@pytest.mark.parametrize("kind", ["application/grpc", "application/grpc+proto", "application/grpc;charset=x"])
async def test_a_call(wire: Wire, kind: str) -> None:
    head, body = await ask(wire, fields(content_type=kind), message(b"good day"))
    assert head == {":status": "200", "content-type": "application/grpc", "grpc-status": "0"}
    assert messages_in(body) == [b"good day"]


async def test_a_call_in_one_frame_and_an_empty_message(wire: Wire) -> None:
    wire.headers(1, fields())
    wire.data(1, message(b""), is_last=True)
    assert messages_in((await wire.answer(1))[1]) == [b""]


async def test_a_message_may_come_in_any_pieces(wire: Wire) -> None:
    wire.headers(1, fields())
    for one in message(b"bit by bit"):
        wire.data(1, bytes((one,)))
    wire.data(1, b"", is_last=True)
    assert messages_in((await wire.answer(1))[1]) == [b"bit by bit"]


async def test_a_row_of_messages_is_answered_in_order_whatever_its_pieces(wire: Wire) -> None:
    contents = [b"%d" % number * number for number in range(300)]
    body = b"".join(map(message, contents))
    wire.headers(1, fields("Row"))
    for start in range(0, len(body), 997):
        wire.data(1, body[start : start + 997])
    wire.data(1, b"", is_last=True)
    wire.make_room(0, 1 << 20)
    wire.make_room(1, 1 << 20)
    head, answers = await wire.answer(1)
    assert head["grpc-status"] == "0"
    assert messages_in(answers) == contents


async def test_an_empty_row(wire: Wire) -> None:
    wire.headers(1, fields("Row"), is_last=True)
    head, answers = await wire.answer(1)
    assert (head[":status"], head["grpc-status"], answers) == ("200", "0", b"")


async def test_no_more_than_so_many_of_a_row_are_under_way(wire: Wire, ledger: Ledger) -> None:
    contents = [b"%d" % number for number in range(3 * AHEAD)]
    wire.headers(1, fields("WaitRow"))
    for content in contents:
        wire.data(1, message(content))
    wire.data(1, b"", is_last=True)
    wire.headers(3, fields())
    wire.data(3, message(b"after all that"), is_last=True)
    await wire.answer(3)
    assert ledger.started == AHEAD
    ledger.gate.set()
    assert messages_in((await wire.answer(1))[1]) == contents


# ---- messages that are answered without a task ----


async def test_a_message_is_answered_without_a_task_where_the_method_can(wire: Wire, ledger: Ledger) -> None:
    for number, content in enumerate([b"", b"good day", b"no", bytes(2000), b"again"]):
        head, body = await ask(wire, fields("Asked"), message(content), 1 + 2 * number)
        assert (head["grpc-status"], messages_in(body)) == ("0", [content])
    assert ledger.asked == 3


async def test_a_row_is_answered_in_order_by_tasks_and_without(wire: Wire, ledger: Ledger) -> None:
    contents = [b"no" if number % 3 == 1 else bytes(number) for number in range(2 * AHEAD)]
    wire.headers(1, fields("AskedRow"))
    for content in contents:
        wire.data(1, message(content))
    wire.data(1, b"", is_last=True)
    assert messages_in((await wire.answer(1))[1]) == contents
    assert ledger.asked == sum(content != b"no" for content in contents)


@pytest.mark.parametrize("method", ["Asked", "AskedRow"])
async def test_a_failure_without_a_task_is_told(wire: Wire, method: str) -> None:
    head, body = await ask(wire, fields(method), message(b"fail"))
    assert (head["grpc-status"], head["grpc-message"], body) == (
        str(Status.INVALID_ARGUMENT),
        "as you wish",
        b"",
    )


async def test_a_second_message_of_a_single_call_is_refused_without_a_task_too(wire: Wire) -> None:
    wire.headers(1, fields("Asked"))
    wire.data(1, message(b"one"))
    wire.data(1, message(b"two"), is_last=True)
    assert (await wire.answer(1))[0]["grpc-status"] == str(Status.INVALID_ARGUMENT)


@pytest.mark.parametrize("method", ["Asked", "AskedRow"])
async def test_compressed_messages_have_a_task(wire: Wire, ledger: Ledger, method: str) -> None:
    head = fields(method, grpc_encoding="gzip")
    assert messages_in((await ask(wire, head, message(gzip.compress(b"x"), flag=1)))[1]) == [b"x"]
    assert messages_in((await ask(wire, head, message(b"y"), 3))[1]) == [b"y"]
    assert ledger.asked == 0


@pytest.mark.parametrize("method", ["Asked", "AskedRow"])
async def test_whoever_gives_up_an_answer_without_a_task_is_worked_for_no_longer(
    wire: Wire, ledger: Ledger, method: str
) -> None:
    wire.headers(1, fields(method))
    wire.data(1, message(b"for ever"), is_last=method == "Asked")
    wire.send(http2.RST_STREAM, 0, 1, struct.pack(">I", http2.CANCEL))
    assert messages_in((await ask(wire, fields(method), message(b""), 3))[1]) == [b""]
    assert (ledger.asked, ledger.given_up) == (2, 1)


# ---- compression ----


@pytest.mark.parametrize(
    ("coding", "pack", "unpack"),
    [("gzip", gzip.compress, gzip.decompress), ("deflate", zlib.compress, zlib.decompress)],
)
async def test_compressed_both_ways(wire: Wire, coding: str, pack: Any, unpack: Any) -> None:
    content = b"again and again " * 1000
    head, body = await ask(wire, fields(grpc_encoding=coding), message(pack(content), flag=1))
    assert head["grpc-encoding"] == coding
    (answer,) = messages_in(body)
    assert answer[:1] == b"\x01"
    assert unpack(answer[1:]) == content
    assert len(body) < 1000
    short = await ask(wire, fields(grpc_encoding=coding), message(b"not compressed"), 3)
    assert messages_in(short[1]) == [b"not compressed"]


async def test_a_coding_that_is_not_served(wire: Wire) -> None:
    head, _ = await ask(wire, fields(grpc_encoding="snappy"), message(b"x", flag=1))
    assert head["grpc-status"] == str(Status.UNIMPLEMENTED)
    assert head["grpc-accept-encoding"] == "identity,gzip,deflate"


@pytest.mark.parametrize("method", ["Echo", "Row"])
@pytest.mark.parametrize("size", [LIMIT + 1, 100 * LIMIT])
async def test_a_message_that_unfolds_beyond_the_limit(wire: Wire, method: str, size: int) -> None:
    packed = message(gzip.compress(bytes(size)), flag=1)
    head, _ = await ask(wire, fields(method, grpc_encoding="gzip"), packed)
    assert head["grpc-status"] == str(Status.RESOURCE_EXHAUSTED)


# ---- calls that are none ----


@pytest.mark.parametrize(
    ("body", "says"),
    [
        pytest.param(b"", "none", id="no message"),
        pytest.param(b"\0\0", "middle", id="half a prefix"),
        pytest.param(message(b"good day")[:-1], "middle", id="half a message"),
        pytest.param(message(b"one") + message(b"two"), "more", id="two messages"),
        pytest.param(message(b"one") + b"\0", "more", id="a message and a bit"),
        pytest.param(message(b"x", flag=2), "row", id="a flag that is none"),
        pytest.param(message(b"x", flag=1), "grpc-encoding", id="compressed, it does not say how"),
    ],
)
async def test_a_body_that_is_not_one_message(wire: Wire, body: bytes, says: str) -> None:
    head, _ = await ask(wire, fields(), body)
    assert head["grpc-status"] == str(Status.INVALID_ARGUMENT)
    assert says in head["grpc-message"]


@pytest.mark.parametrize("body", [message(b"one")[:-1], message(b"x", flag=7), b"\0\0\0"])
async def test_a_body_that_is_no_row_of_messages(wire: Wire, body: bytes) -> None:
    head, answers = await ask(wire, fields("Row"), message(b"before") + body)
    assert head["grpc-status"] == str(Status.INVALID_ARGUMENT)
    assert messages_in(answers) in ([], [b"before"])


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("content", [b"not compressed", gzip.compress(bytes(100))[:-9], b""])
async def test_what_is_not_compressed_as_it_says(wire: Wire, coding: str, content: bytes) -> None:
    head, body = await ask(wire, fields(grpc_encoding=coding), message(content, flag=1))
    if content:
        assert head["grpc-status"] == str(Status.INVALID_ARGUMENT)
    else:
        assert messages_in(body) == [b""]


@pytest.mark.parametrize("method", ["Echo", "Row"])
async def test_a_message_that_says_it_is_too_large_is_refused_at_once(wire: Wire, method: str) -> None:
    wire.headers(1, fields(method))
    wire.data(1, b"\0\xff\xff\xff\xff")
    head, _ = await wire.answer(1)
    assert head["grpc-status"] == str(Status.RESOURCE_EXHAUSTED)
    # The rest is not wanted.
    assert int.from_bytes((await wire.of_kind(http2.RST_STREAM, 1)).payload) == http2.NO_ERROR


@pytest.mark.parametrize(
    ("head", "status"),
    [
        pytest.param({":method": "GET"}, "405", id="another method of HTTP"),
        pytest.param({"content-type": "application/json"}, "415", id="another media type"),
        pytest.param({"content-type": "application/grpc-web"}, "415", id="nearly the media type"),
    ],
)
async def test_who_speaks_no_grpc_is_told_so_as_http_has_it(
    wire: Wire, head: dict[str, str], status: str
) -> None:
    answer, _ = await ask(wire, list((dict(fields()) | head).items()), message(b"x"))
    assert answer[":status"] == status


@pytest.mark.parametrize("name", ["/test.Service/Nothing", "/", "/test.Service", "*"])
async def test_a_method_that_is_not_there(wire: Wire, name: str) -> None:
    head, _ = await ask(wire, list((dict(fields()) | {":path": name}).items()), message(b"x"))
    assert (head[":status"], head["grpc-status"]) == ("200", str(Status.UNIMPLEMENTED))


async def test_metadata_over_the_limit(wire: Wire) -> None:
    head, _ = await ask(wire, [*fields(), *((f"name-{n}", "x" * 100) for n in range(130))], message(b"x"))
    assert head["grpc-status"] == str(Status.RESOURCE_EXHAUSTED)


# ---- errors ----


@pytest.mark.parametrize(
    ("words", "encoded"),
    [
        ("plain words, ~!", "plain words, ~!"),
        ("100 % sure", "100 %25 sure"),
        ("Grüße\n", "Gr%C3%BC%C3%9Fe%0A"),
        ("x" * 5000, "x" * 1024),
        ("ü" * 5000, "%C3%BC" * 512),
        ("x" + "ü" * 5000, "x" + "%C3%BC" * 511),
    ],
)
async def test_words_of_errors(wire: Wire, words: str, encoded: str) -> None:
    head, _ = await ask(wire, fields("Wrong"), message(words.encode()))
    assert (head["grpc-status"], head["index"]) == (str(Status.INVALID_ARGUMENT), "3")
    assert head["grpc-message"] == encoded
    assert percent_encoded(words).decode().startswith(encoded)


def family(kind: type[QuintetError]) -> list[type[QuintetError]]:
    return [kind, *(one for child in kind.__subclasses__() for one in family(child))]


@pytest.mark.parametrize("kind", family(QuintetError), ids=lambda kind: kind.__name__)
def test_every_error_has_a_status_of_grpc(kind: type[QuintetError]) -> None:
    assert Status[kind.grpc_status].value == grpc.StatusCode[kind.grpc_status].value[0]


async def test_a_fault_of_ours_tells_an_id_and_no_more(wire: Wire) -> None:
    head, _ = await ask(wire, fields("Broken"), message(b"x"))
    assert head["grpc-status"] == str(Status.INTERNAL)
    assert "id" in head["grpc-message"]
    assert "secret" not in head["grpc-message"]


# ---- deadlines and cancelling ----


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("1H", 3600), ("2M", 120), ("3S", 3), ("4m", 0.004), ("5u", 5e-6), ("99999999n", 0.099999999)],
)
def test_timeouts(value: str, seconds: float) -> None:
    assert read_timeout(value.encode()) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "S", "1", "-1S", "1.5S", "123456789S", "1 S", "1s", "\u0661S"])
async def test_timeouts_that_are_none(wire: Wire, value: str) -> None:
    head, _ = await ask(wire, fields(grpc_timeout=value), message(b"x"))
    assert head["grpc-status"] == str(Status.INVALID_ARGUMENT)


@pytest.mark.parametrize("method", ["Wait", "WaitRow"])
async def test_an_answer_that_comes_too_late(wire: Wire, ledger: Ledger, method: str) -> None:
    head, _ = await ask(wire, fields(method, grpc_timeout="50m"), message(b"x"))
    assert head["grpc-status"] == str(Status.DEADLINE_EXCEEDED)
    assert ledger.cancelled == 1


@pytest.mark.parametrize("method", ["Echo", "Own", "Row"])
async def test_a_message_that_never_comes(wire: Wire, method: str) -> None:
    wire.headers(1, fields(method, grpc_timeout="50m"))
    assert (await wire.answer(1))[0]["grpc-status"] == str(Status.DEADLINE_EXCEEDED)


async def test_a_method_may_mind_the_deadline_itself(wire: Wire) -> None:
    assert messages_in((await ask(wire, fields("Own", grpc_timeout="50S"), message(b"x")))[1]) == [b"some"]
    assert messages_in((await ask(wire, fields("Own"), message(b"x"), 3))[1]) == [b"none"]


@pytest.mark.parametrize("method", ["Wait", "WaitRow"])
@pytest.mark.parametrize("hangs_up", [False, True], ids=["one call", "all of them"])
async def test_whoever_gives_up_is_worked_for_no_longer(
    port: int, ledger: Ledger, method: str, hangs_up: bool
) -> None:
    async with connected(port) as wire:
        wire.headers(1, fields(method))
        wire.data(1, message(b"x" * 1000), is_last=method == "Wait")
        while not ledger.started:
            await asyncio.sleep(0.01)
        if not hangs_up:
            wire.send(http2.RST_STREAM, 0, 1, struct.pack(">I", http2.CANCEL))
            assert messages_in((await ask(wire, fields(), message(b"next"), 3))[1]) == [b"next"]
    while ledger.service.calls:
        await asyncio.sleep(0.01)
    assert ledger.cancelled == 1


# ---- limits ----


async def test_too_many_calls(wire: Wire, ledger: Ledger) -> None:
    numbers = range(1, 2 * ledger.service.max_calls + 1, 2)
    for number in numbers:
        wire.headers(number, fields("Wait"))
        wire.data(number, message(b"x"), is_last=True)
    head, _ = await ask(wire, fields(), message(b"one too many"), 99)
    assert (head["grpc-status"], head["retry-after"]) == (str(Status.RESOURCE_EXHAUSTED), "1")
    ledger.gate.set()
    for number in numbers:
        assert (await wire.answer(number))[0]["grpc-status"] == "0"


@pytest.mark.parametrize("method", ["Echo", "Row"])
async def test_what_waits_in_memory_is_counted_and_refused_when_it_is_too_much(
    wire: Wire, ledger: Ledger, method: str
) -> None:
    ledger.most_allowed = 50_000
    head, _ = await ask(wire, fields(method), message(bytes(60_000)))
    assert (head["grpc-status"], head["retry-after"]) == (str(Status.RESOURCE_EXHAUSTED), "1")
    assert ledger.held == 0
    assert messages_in((await ask(wire, fields(method), message(bytes(30_000)), 3))[1]) == [bytes(30_000)]
    assert 30_000 <= ledger.most_held <= 50_000


@pytest.mark.parametrize("method", ["Zeros", "ZerosRow"])
async def test_answers_that_nobody_makes_room_for_are_counted_too(
    port: int, ledger: Ledger, method: str
) -> None:
    async with connected(port, http2.PREFACE + settings(initial_window_size=0)) as wire:
        ledger.most_allowed = 50_000
        for number in (1, 3, 5):
            wire.headers(number, fields(method))
            wire.data(number, message(b"20000"), is_last=True)
        head, _ = await wire.answer(5)
        assert head["grpc-status"] == str(Status.RESOURCE_EXHAUSTED)
        wire.make_room(1, 1 << 20)
        assert messages_in((await wire.answer(1))[1]) == [bytes(20_000)]
        # Who makes no room at all is given up in the end.
        assert (await wire.answer(3))[0][":reset"] == str(http2.CANCEL)
        assert ledger.held == 0


async def test_a_long_row_of_compressed_and_large_messages_leaves_nothing_behind(
    wire: Wire, ledger: Ledger
) -> None:
    wire.make_room(0, 1 << 30)
    wire.headers(1, fields("Row", grpc_encoding="gzip"))
    wire.make_room(1, 1 << 30)
    packed = message(gzip.compress(bytes(90_000)), flag=1)
    for _ in range(100):
        wire.data(1, packed)
    wire.data(1, b"", is_last=True)
    assert len(messages_in((await wire.answer(1))[1])) == 100
    assert ledger.held == 0


# ---- the end ----


async def test_calls_under_way_are_finished_when_the_server_stops(ledger: Ledger) -> None:
    server = http2.Server(ledger.service, Limits())
    port = await server.listen("127.0.0.1", 0, None, 10)
    async with connected(port) as wire:
        for number, method in [(1, "Wait"), (3, "WaitRow"), (5, "Row")]:
            wire.headers(number, fields(method))
            wire.data(number, message(b"x"), is_last=method == "Wait")
        while ledger.started < 2:
            await asyncio.sleep(0.01)
        closing = asyncio.create_task(server.close(20))
        wire.send(http2.PING, http2.ACK, 0, (await wire.of_kind(http2.PING)).payload)
        # A row with nothing under way is told to go on elsewhere.
        assert (await wire.answer(5))[0]["grpc-status"] == str(Status.UNAVAILABLE)
        ledger.gate.set()
        assert messages_in((await wire.answer(1))[1]) == [b"x"]
        head, body = await wire.answer(3)
        assert (messages_in(body), head["grpc-status"]) == ([b"x"], str(Status.UNAVAILABLE))
        await closing
    assert (ledger.held, ledger.service.calls) == (0, 0)
