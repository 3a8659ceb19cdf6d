"""The transport of the gRPC door, alone: a server that echoes, and callers who break every rule."""

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hpack import Encoder

from service import http2
from service.http2 import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    Limits,
)

from .wire import GREETING, Fields, Frame, Wire, connected, frame, serving, settings

REQUEST: Fields = [(":method", "POST"), (":scheme", "http"), (":path", "/echo"), (":authority", "quintet")]
GO_ON = END_HEADERS
LAST = END_HEADERS | END_STREAM
SMALL = Limits(
    streams=8,
    block_bytes=32_768,
    resets=20,
    resets_per_second=0,
    nuisances=50,
    nuisances_per_second=0,
    greeting_seconds=0.5,
    silence_seconds=0.5,
    answer_seconds=0.5,
    stuck_seconds=0.5,
)
"""So small that tests reach them, and nothing comes back with time."""


class Echo(http2.Stream):
    """Answers a request with its own body, or with as many bytes as its path says."""

    def __init__(self, connection: http2.Connection, number: int, app: "EchoServer", path: bytes) -> None:
        super().__init__(connection, number)
        self._app = app
        self._path = path
        self._body = b""

    def opened(self) -> None:
        self._app.opened += 1

    def received(self, data: bytes, is_last: bool) -> None:
        self._body += data
        if self._path == b"/slow" or not is_last:
            return
        size = self._path.removeprefix(b"/bytes/")
        body = bytes(int(size)) if size.isdigit() else self._body
        self.answer(b"\x88", body, http2.literal(b"path", self._path))

    def closed(self) -> None:
        self._app.closed += 1


class EchoServer:
    """The application: heads are paths."""

    def __init__(self) -> None:
        self.opened = 0
        self.closed = 0
        self.heads_read = 0

    def read_head(self, fields: list[http2.Field], *, is_too_large: bool) -> bytes:
        self.heads_read += 1
        return b"/too-large" if is_too_large else dict(fields)[b":path"]

    def open(self, connection: http2.Connection, number: int, head: Any) -> Echo:
        return Echo(connection, number, self, head)


@pytest.fixture
def app() -> EchoServer:
    return EchoServer()


@pytest.fixture
async def port(app: EchoServer) -> AsyncIterator[int]:
    async with serving(app, Limits()) as port:
        yield port
    assert app.opened == app.closed


@pytest.fixture
async def small_port(app: EchoServer) -> AsyncIterator[int]:
    async with serving(app, SMALL) as port:
        yield port
    assert app.opened == app.closed


@pytest.fixture
async def wire(port: int) -> AsyncIterator[Wire]:
    async with connected(port) as wire:
        yield wire


def path(path: str) -> Fields:
    return [(name, path if name == ":path" else value) for name, value in REQUEST]


# ---- when all is well ----


async def test_the_server_greets_first(wire: Wire) -> None:
    first = await wire.frame()
    assert first is not None
    said = dict(struct.iter_unpack(">HI", first.payload))
    assert (first.kind, first.flags) == (SETTINGS, 0)
    assert said[http2.HEADER_TABLE_SIZE] == 0
    assert said[http2.MAX_CONCURRENT_STREAMS] == Limits().streams


async def test_an_answer(wire: Wire) -> None:
    wire.headers(1, REQUEST)
    wire.data(1, b"good day", is_last=True)
    assert await wire.answer(1) == ({":status": "200", "path": "/echo"}, b"good day")


async def test_bytes_may_come_one_by_one(port: int) -> None:
    async with connected(port, b"") as wire:
        whole = GREETING + frame(HEADERS, GO_ON, 1, wire.block(REQUEST)) + frame(DATA, END_STREAM, 1, b"bits")
        for number in range(len(whole)):
            wire.raw(whole[number : number + 1])
            await asyncio.sleep(0)
        assert (await wire.answer(1))[1] == b"bits"


async def test_many_streams_share_a_connection_and_a_write(wire: Wire) -> None:
    numbers = range(1, 201, 2)
    for number in numbers:
        wire.headers(number, REQUEST)
    for number in numbers:
        wire.data(number, b"%d" % number, is_last=True)
    for number in numbers:
        assert (await wire.answer(number))[1] == b"%d" % number


@pytest.mark.parametrize("size", [0, 1, 16_384, 16_385, 65_535, 65_536, 3_000_000])
async def test_bodies_of_all_sizes_come_back(wire: Wire, size: int) -> None:
    body = random.Random(size).randbytes(size)
    wire.make_room(0, 10_000_000)
    wire.headers(1, REQUEST)
    wire.make_room(1, 10_000_000)
    room = Limits().stream_window
    for start in range(0, size, 16_384):
        part = body[start : start + 16_384]
        while room < len(part):
            room += int.from_bytes((await wire.of_kind(WINDOW_UPDATE, 1)).payload)
        room -= len(part)
        wire.data(1, part)
    wire.data(1, b"", is_last=True)
    assert (await wire.answer(1))[1] == body


async def test_padding_and_priorities_are_passed_over(wire: Wire) -> None:
    block = b"\x03" + struct.pack(">IB", 0, 16) + wire.block(REQUEST) + bytes(3)
    wire.send(PRIORITY, 0, 9, struct.pack(">IB", 0, 16))
    wire.send(HEADERS, GO_ON | PADDED | WITH_PRIORITY, 1, block)
    wire.send(DATA, PADDED | END_STREAM, 1, b"\x05padded" + bytes(5))
    assert (await wire.answer(1))[1] == b"padded"


async def test_a_header_block_may_come_in_parts(wire: Wire) -> None:
    block = wire.block(REQUEST)
    wire.send(HEADERS, END_STREAM, 1, block[:5])
    wire.send(CONTINUATION, 0, 1, block[5:9])
    wire.send(CONTINUATION, END_HEADERS, 1, block[9:])
    assert (await wire.answer(1))[0]["path"] == "/echo"


async def test_trailers_of_a_request_end_it(wire: Wire) -> None:
    wire.headers(1, REQUEST)
    wire.data(1, b"body")
    wire.headers(1, [("checksum", "7")], is_last=True)
    assert (await wire.answer(1))[1] == b"body"


async def test_frames_of_unknown_kinds_and_settings_mean_nothing(wire: Wire) -> None:
    wire.send(0xAB, 0xFF, 77, b"what is this")
    wire.send(SETTINGS, 0, 0, struct.pack(">HI", 0xABCD, 7))
    wire.headers(1, REQUEST, is_last=True)
    assert (await wire.answer(1))[0][":status"] == "200"


async def test_a_ping_is_answered(wire: Wire) -> None:
    wire.send(PING, 0, 0, b"12345678")
    assert await wire.of_kind(PING) == Frame(PING, ACK, 0, b"12345678")


# ---- header compression ----


async def test_a_table_may_be_used_until_ours_is_known_and_not_after(wire: Wire, app: EchoServer) -> None:
    encoder = Encoder()
    for number in (1, 3, 5):
        wire.send(HEADERS, LAST, number, encoder.encode(REQUEST))
        assert (await wire.answer(number))[0]["path"] == "/echo"
    assert app.heads_read == 3
    wire.acknowledge()
    encoder.header_table_size = 0
    for number in (7, 9, 11, 13):
        wire.send(HEADERS, LAST, number, encoder.encode(REQUEST))
        assert (await wire.answer(number))[0]["path"] == "/echo"
    # The first of them says that the table is gone, the second is new, and the others are known.
    assert app.heads_read == 5


async def test_known_blocks_are_told_apart(port: int, app: EchoServer) -> None:
    for _ in range(3):
        async with connected(port) as wire:
            encoder = Encoder()
            encoder.header_table_size = 0
            wire.acknowledge()
            for number, name in [(1, "/a"), (3, "/b"), (5, "/a"), (7, "/b")]:
                wire.send(HEADERS, LAST, number, encoder.encode(path(name)))
                assert (await wire.answer(number))[0]["path"] == name


@pytest.mark.parametrize("huffman", [False, True])
async def test_blocks_that_are_new_in_one_field_are_read_right(
    wire: Wire, app: EchoServer, huffman: bool
) -> None:
    encoder = Encoder()
    encoder.header_table_size = 0
    wire.acknowledge()
    names = ["/a", "/b" * 40, "/c" * 100, "/d" * 400, "/?", "/a", "/b" * 40]
    for number, name in enumerate(names):
        fields = [*path(name), ("unknown", str(number)), ("grpc-timeout", "1S"), ("x" * 200, "y" * 200)]
        wire.send(HEADERS, LAST, 2 * number + 1, encoder.encode(fields, huffman=huffman))
        assert (await wire.answer(2 * number + 1))[0]["path"] == name
    assert app.heads_read == len(names)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b"\x80", id="field 0"),
        pytest.param(b"\xff\xff\xff\xff\xff\x0f", id="a field that no table has"),
        pytest.param(b"\xbe", id="a field of the table that is gone"),
        pytest.param(b"\xff\x80\x80\x80\x80\x80\x01", id="a number that never ends"),
        pytest.param(b"\x00\x05ab", id="a cut name"),
        pytest.param(b"\x00\x01a\x7f\xff\xff\xff\x7fab", id="a cut value"),
        pytest.param(b"\x00\x01a", id="no value"),
        pytest.param(b"\x00\x01a\x82\xff\xff", id="no Huffman code"),
        pytest.param(b"\x3f\x01", id="a table"),
    ],
)
async def test_what_is_no_header_block_ends_the_connection(wire: Wire, block: bytes) -> None:
    encoder = Encoder()
    encoder.header_table_size = 0
    wire.acknowledge()
    wire.send(HEADERS, LAST, 1, encoder.encode(REQUEST))
    assert (await wire.answer(1))[0]["path"] == "/echo"
    wire.send(HEADERS, LAST, 3, wire.block(REQUEST) + block)
    assert await wire.last_words() == http2.COMPRESSION_ERROR


async def test_a_small_block_of_many_fields_is_refused(wire: Wire) -> None:
    encoder = Encoder()
    encoder.header_table_size = 0
    wire.acknowledge()
    wire.send(HEADERS, LAST, 1, encoder.encode(REQUEST))
    await wire.answer(1)
    # Each of these bytes is a field of the static table.
    wire.send(HEADERS, LAST, 3, wire.block(REQUEST) + b"\x90" * 10_000)
    assert await wire.last_words() == http2.ENHANCE_YOUR_CALM


@pytest.mark.parametrize("acknowledged", [False, True])
async def test_more_of_a_table_than_we_keep_is_refused(wire: Wire, acknowledged: bool) -> None:
    if acknowledged:
        wire.acknowledge()
    size = 100 if acknowledged else 5000
    update = bytes((0x3F, (size - 31) & 127 | 128, (size - 31) >> 7))
    wire.send(HEADERS, LAST, 1, update + wire.block(REQUEST))
    assert await wire.last_words() == http2.COMPRESSION_ERROR


async def test_headers_over_the_limit_reach_the_application_as_such(wire: Wire) -> None:
    wire.send(HEADERS, END_STREAM, 1, wire.block([*REQUEST, ("one", "x" * 10_000)]))
    wire.send(CONTINUATION, END_HEADERS, 1, wire.block([("two", "x" * 10_000)]))
    assert (await wire.answer(1))[0]["path"] == "/too-large"


# ---- requests that are none ----


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(REQUEST[1:], id="no method"),
        pytest.param([*REQUEST[:2], *REQUEST[3:]], id="no path"),
        pytest.param([*REQUEST, (":path", "/again")], id="a path twice"),
        pytest.param([*REQUEST, (":status", "200")], id="the head of an answer"),
        pytest.param([("first", "me"), *REQUEST], id="a field before the path"),
        pytest.param([*REQUEST, ("Upper", "case")], id="an upper-case name"),
        pytest.param([*REQUEST, ("", "nameless")], id="no name"),
        pytest.param([*REQUEST, ("a b", "c")], id="a blank in a name"),
        pytest.param([*REQUEST, ("connection", "close")], id="a header of HTTP/1.1"),
        pytest.param([*REQUEST, ("transfer-encoding", "chunked")], id="chunks"),
        pytest.param([*REQUEST, ("te", "gzip")], id="te"),
        pytest.param([*REQUEST, ("name", "one\r\ntwo: 2")], id="a line break"),
        pytest.param([*REQUEST, ("name", "nothing\0")], id="a zero"),
        pytest.param([*REQUEST, ("name", " blank")], id="a blank before"),
    ],
)
async def test_a_malformed_request_is_reset_and_the_connection_lives(wire: Wire, fields: Fields) -> None:
    wire.headers(1, fields, is_last=True)
    assert (await wire.answer(1))[0] == {":reset": str(http2.PROTOCOL_ERROR)}
    wire.headers(3, REQUEST, is_last=True)
    assert (await wire.answer(3))[0]["path"] == "/echo"


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        pytest.param(frame(DATA, 0, 1, b"late"), http2.STREAM_CLOSED, id="more after the end"),
        pytest.param(frame(WINDOW_UPDATE, 0, 1, bytes(4)), http2.PROTOCOL_ERROR, id="no room at all"),
        pytest.param(
            frame(WINDOW_UPDATE, 0, 1, b"\x7f\xff\xff\xff"), http2.FLOW_CONTROL_ERROR, id="too much room"
        ),
        pytest.param(frame(PRIORITY, 0, 1, b"1234"), http2.FRAME_SIZE_ERROR, id="a short priority"),
    ],
)
async def test_a_fault_of_one_stream_resets_it_alone(wire: Wire, wrong: bytes, code: int) -> None:
    wire.headers(1, path("/slow"), is_last=True)
    wire.raw(wrong)
    assert (await wire.answer(1))[0] == {":reset": str(code)}
    wire.headers(3, REQUEST, is_last=True)
    assert (await wire.answer(3))[0]["path"] == "/echo"


# ---- connections that break the protocol ----


def dependent_on_itself(wire: Wire) -> bytes:
    return frame(HEADERS, LAST | WITH_PRIORITY, 1, struct.pack(">IB", 1, 0) + wire.block(REQUEST))


def interrupted(wire: Wire) -> bytes:
    return frame(HEADERS, 0, 1, wire.block(REQUEST)) + frame(PING, 0, 0, bytes(8))


def continued_elsewhere(wire: Wire) -> bytes:
    return frame(HEADERS, 0, 1, wire.block(REQUEST)) + frame(CONTINUATION, END_HEADERS, 3)


def backwards(wire: Wire) -> bytes:
    return frame(HEADERS, LAST, 2, wire.block(REQUEST))


PROTOCOL, SIZE, FLOW = http2.PROTOCOL_ERROR, http2.FRAME_SIZE_ERROR, http2.FLOW_CONTROL_ERROR


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        pytest.param(frame(DATA, 0, 1, bytes(16_385)), SIZE, id="a frame above the limit"),
        pytest.param(frame(DATA, 0, 0, b"x"), PROTOCOL, id="DATA of no stream"),
        pytest.param(frame(DATA, 0, 5, b"x"), PROTOCOL, id="DATA of an idle stream"),
        pytest.param(frame(DATA, PADDED, 1, b"\x09x"), PROTOCOL, id="more padding than frame"),
        pytest.param(backwards, PROTOCOL, id="a stream of the server's"),
        pytest.param(dependent_on_itself, PROTOCOL, id="a stream that depends on itself"),
        pytest.param(frame(HEADERS, WITH_PRIORITY | LAST, 1, b"123"), SIZE, id="too short for a priority"),
        pytest.param(frame(HEADERS, LAST, 1, b"\xff\xff\xff"), http2.COMPRESSION_ERROR, id="no header block"),
        pytest.param(
            frame(HEADERS, LAST, 1, b"\x40\x05ab"), http2.COMPRESSION_ERROR, id="a cut header block"
        ),
        pytest.param(interrupted, PROTOCOL, id="a frame between HEADERS and CONTINUATION"),
        pytest.param(continued_elsewhere, PROTOCOL, id="CONTINUATION of another stream"),
        pytest.param(frame(CONTINUATION, END_HEADERS, 1), PROTOCOL, id="CONTINUATION of nothing"),
        pytest.param(frame(PRIORITY, 0, 0, bytes(5)), PROTOCOL, id="PRIORITY of no stream"),
        pytest.param(frame(RST_STREAM, 0, 0, bytes(4)), PROTOCOL, id="RST_STREAM of no stream"),
        pytest.param(frame(RST_STREAM, 0, 9, bytes(4)), PROTOCOL, id="RST_STREAM of an idle stream"),
        pytest.param(frame(RST_STREAM, 0, 1, bytes(3)), SIZE, id="a short RST_STREAM"),
        pytest.param(frame(SETTINGS, 0, 1), PROTOCOL, id="SETTINGS of a stream"),
        pytest.param(frame(SETTINGS, 0, 0, bytes(5)), SIZE, id="half a setting"),
        pytest.param(frame(SETTINGS, ACK, 0, bytes(6)), SIZE, id="an acknowledgement with settings"),
        pytest.param(settings(enable_push=2), PROTOCOL, id="ENABLE_PUSH out of range"),
        pytest.param(settings(initial_window_size=1 << 31), FLOW, id="a window out of range"),
        pytest.param(settings(max_frame_size=16_383), PROTOCOL, id="a frame size out of range"),
        pytest.param(settings(max_frame_size=1 << 24), PROTOCOL, id="too large a frame size"),
        pytest.param(frame(PUSH_PROMISE, 0, 1, bytes(8)), PROTOCOL, id="a promise"),
        pytest.param(frame(PING, 0, 0, bytes(7)), SIZE, id="a short PING"),
        pytest.param(frame(PING, 0, 1, bytes(8)), PROTOCOL, id="PING of a stream"),
        pytest.param(frame(GOAWAY, 0, 1, bytes(8)), PROTOCOL, id="GOAWAY of a stream"),
        pytest.param(frame(GOAWAY, 0, 0, bytes(7)), SIZE, id="a short GOAWAY"),
        pytest.param(frame(WINDOW_UPDATE, 0, 0, bytes(3)), SIZE, id="a short WINDOW_UPDATE"),
        pytest.param(frame(WINDOW_UPDATE, 0, 0, bytes(4)), PROTOCOL, id="no room at all"),
        pytest.param(frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), FLOW, id="too much room"),
        pytest.param(frame(WINDOW_UPDATE, 0, 7, b"\0\0\0\1"), PROTOCOL, id="room for an idle stream"),
    ],
)
async def test_a_fault_of_the_connection_ends_it_with_its_code(
    wire: Wire, wrong: bytes | Callable[[Wire], bytes], code: int
) -> None:
    wire.raw(wrong if isinstance(wrong, bytes) else wrong(wire))
    assert await wire.last_words() == code


@pytest.mark.parametrize(
    "greeting",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: quintet\r\n\r\n", id="HTTP/1.1"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="TLS"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", id="nearly"),
        pytest.param(http2.PREFACE + frame(PING, 0, 0, bytes(8)), id="no settings"),
        pytest.param(http2.PREFACE + frame(SETTINGS, ACK, 0), id="an acknowledgement first"),
    ],
)
async def test_who_does_not_greet_as_agreed_is_told_so(port: int, greeting: bytes) -> None:
    async with connected(port, greeting) as wire:
        assert await wire.last_words() == http2.PROTOCOL_ERROR


async def test_a_window_that_settings_make_too_large(wire: Wire) -> None:
    wire.headers(1, path("/slow"))
    wire.make_room(1, 0x7FFFFFFF - 65_535)
    wire.raw(settings(initial_window_size=65_536))
    assert await wire.last_words() == FLOW


# ---- floods ----


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(frame(PING, 0, 0, bytes(8)), id="PING"),
        pytest.param(frame(PING, ACK, 0, bytes(8)), id="answers to no PING"),
        pytest.param(settings(initial_window_size=70_000), id="SETTINGS"),
        pytest.param(frame(SETTINGS, ACK, 0), id="acknowledgements"),
        pytest.param(frame(DATA, 0, 1), id="empty DATA"),
        pytest.param(frame(DATA, PADDED, 1, b"\x07" + bytes(7)), id="padding"),
        pytest.param(frame(PRIORITY, 0, 1, struct.pack(">IB", 0, 1)), id="PRIORITY"),
        pytest.param(frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1"), id="WINDOW_UPDATE"),
        pytest.param(frame(0x77, 0, 0, b"hello"), id="unknown frames"),
        pytest.param(frame(GOAWAY, 0, 0, bytes(8)), id="GOAWAY"),
    ],
)
async def test_a_flood_of_frames_without_content_is_cut_off(small_port: int, flood: bytes) -> None:
    async with connected(small_port) as wire:
        wire.headers(1, path("/slow"))
        wire.raw(flood * 200)
        assert await wire.last_words() == http2.ENHANCE_YOUR_CALM


async def test_pings_between_requests_are_no_flood(small_port: int) -> None:
    async with connected(small_port) as wire:
        for number in range(1, 401, 2):
            wire.raw(frame(PING, 0, 0, bytes(8)) * 4)
            wire.headers(number, REQUEST, is_last=True)
            assert (await wire.answer(number))[0]["path"] == "/echo"


async def test_streams_that_are_reset_at_once_are_a_flood(small_port: int, app: EchoServer) -> None:
    async with connected(small_port) as wire:
        for number in range(1, 2001, 2):
            wire.headers(number, path("/slow"), is_last=True)
            wire.send(RST_STREAM, 0, number, struct.pack(">I", http2.CANCEL))
        assert await wire.last_words() == http2.ENHANCE_YOUR_CALM
    assert app.opened <= SMALL.resets + 1


async def test_streams_that_are_reset_among_others_that_are_answered_are_no_flood(small_port: int) -> None:
    async with connected(small_port) as wire:
        for number in range(1, 401, 4):
            wire.headers(number, path("/slow"), is_last=True)
            wire.send(RST_STREAM, 0, number, struct.pack(">I", http2.CANCEL))
            wire.headers(number + 2, REQUEST, is_last=True)
            assert (await wire.answer(number + 2))[0]["path"] == "/echo"


async def test_streams_that_we_are_made_to_reset_are_a_flood(small_port: int, app: EchoServer) -> None:
    async with connected(small_port) as wire:
        for number in range(1, 2001, 2):
            wire.headers(number, path("/slow"), is_last=True)
            wire.make_room(number, 0)
        assert await wire.last_words() == http2.ENHANCE_YOUR_CALM
    assert app.opened <= SMALL.resets + 1


async def test_malformed_requests_are_a_flood(small_port: int) -> None:
    async with connected(small_port) as wire:
        for number in range(1, 2001, 2):
            wire.headers(number, REQUEST[1:], is_last=True)
        assert await wire.last_words() == http2.ENHANCE_YOUR_CALM


@pytest.mark.parametrize("part", [b"", b"\x00", bytes(1000)], ids=["nothing", "a byte", "a kilobyte"])
async def test_a_header_block_that_never_ends_is_cut_off(small_port: int, part: bytes) -> None:
    async with connected(small_port) as wire:
        wire.send(HEADERS, 0, 1, wire.block(REQUEST))
        wire.raw(frame(CONTINUATION, 0, 1, part) * 200)
        assert await wire.last_words() == http2.ENHANCE_YOUR_CALM


async def test_a_small_block_that_unfolds_to_a_huge_one_is_refused(wire: Wire) -> None:
    big = ("name", "x" * 3000)
    encoder = Encoder()
    first = encoder.encode([*REQUEST, big])
    # The same field again and again, each for one byte.
    wire.send(HEADERS, LAST, 1, first + b"\xbe" * 4000)
    assert await wire.last_words() == http2.COMPRESSION_ERROR


async def test_more_streams_than_allowed_are_refused_and_the_others_live(small_port: int) -> None:
    async with connected(small_port) as wire:
        for number in range(1, 2 * SMALL.streams + 1, 2):
            wire.headers(number, REQUEST)
        wire.headers(99, REQUEST)
        assert (await wire.answer(99))[0] == {":reset": str(http2.REFUSED_STREAM)}
        wire.data(1, b"still here", is_last=True)
        assert (await wire.answer(1))[1] == b"still here"


async def test_connections_are_counted(app: EchoServer) -> None:
    async with serving(app, Limits(connections=2)) as port, connected(port) as one, connected(port) as two:
        for wire in (one, two):
            wire.headers(1, REQUEST, is_last=True)
            assert (await wire.answer(1))[0]["path"] == "/echo"
        async with connected(port) as three:
            assert await three.frame() is None


# ---- flow control ----


async def test_room_is_given_back_as_it_is_used(app: EchoServer) -> None:
    limits = Limits(stream_window=70_000, connection_window=100_000)
    async with serving(app, limits) as port, connected(port) as wire:
        wire.headers(1, path("/bytes/5"))
        for _ in range(3):
            # No more than half of a window is ever kept back.
            wire.raw(frame(DATA, 0, 1, bytes(16_384)) * 3)
            room = await wire.of_kind(WINDOW_UPDATE, 1)
            assert int.from_bytes(room.payload) == 3 * 16_384
        wire.data(1, b"", is_last=True)
        assert len((await wire.answer(1))[1]) == 5


async def test_more_than_a_streams_window_resets_it(app: EchoServer) -> None:
    class Deaf(Echo):
        def received(self, data: bytes, is_last: bool) -> None:
            self.pause()

    app.open = lambda connection, number, head: Deaf(connection, number, app, head)  # type: ignore[method-assign]
    async with serving(app, Limits(stream_window=100_000)) as port, connected(port) as wire:
        wire.headers(1, REQUEST)
        for _ in range(7):
            wire.data(1, bytes(16_384))
        assert (await wire.answer(1))[0] == {":reset": str(http2.FLOW_CONTROL_ERROR)}


async def test_an_answer_waits_for_room(port: int) -> None:
    async with connected(port, http2.PREFACE + settings(initial_window_size=0)) as wire:
        wire.headers(1, path("/bytes/100"), is_last=True)
        headers = await wire.of_kind(HEADERS, 1)
        assert not headers.flags & END_STREAM
        wire.make_room(1, 60)
        assert len((await wire.of_kind(DATA, 1)).payload) == 60
        wire.raw(settings(initial_window_size=30))
        assert len((await wire.of_kind(DATA, 1)).payload) == 30
        wire.raw(settings(initial_window_size=0))
        wire.make_room(1, 35)
        # Thirty of them were taken back.
        assert len((await wire.of_kind(DATA, 1)).payload) == 5
        wire.make_room(1, 1000)
        assert len((await wire.of_kind(DATA, 1)).payload) == 5
        assert (await wire.of_kind(HEADERS, 1)).flags & END_STREAM


async def test_the_connections_room_is_shared_in_turn(wire: Wire) -> None:
    wire.headers(1, path("/bytes/65000"), is_last=True)
    wire.headers(3, path("/bytes/65000"), is_last=True)
    assert len((await wire.answer(1))[1]) == 65_000
    wire.make_room(0, 65_000)
    assert len((await wire.answer(3))[1]) == 65_000


async def test_who_makes_no_room_is_reset(small_port: int) -> None:
    async with connected(small_port, http2.PREFACE + settings(initial_window_size=0)) as wire:
        wire.headers(1, path("/bytes/100"), is_last=True)
        assert (await wire.answer(1))[0][":reset"] == str(http2.CANCEL)


async def test_who_does_not_read_is_read_no_more_and_then_cut_off(app: EchoServer) -> None:
    greeting = http2.PREFACE + settings(initial_window_size=(1 << 31) - 1)
    async with serving(app, Limits(stuck_seconds=0.5)) as port, connected(port, greeting) as wire:
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        wire.make_room(0, (1 << 31) - 1 - 65_535)
        for number in range(1, 2001, 2):
            wire.headers(number, path("/bytes/1000000"), is_last=True)
            await asyncio.sleep(0)
        while app.opened != app.closed or app.opened == 0:
            await asyncio.sleep(0.05)
        assert app.opened < 100


# ---- silence ----


async def test_who_never_greets_is_cut_off(small_port: int) -> None:
    async with connected(small_port, b"") as wire:
        assert GOAWAY not in [one.kind for one in await wire.rest()]


async def test_who_is_silent_is_asked_and_then_cut_off(small_port: int) -> None:
    async with connected(small_port) as wire:
        asked = await wire.of_kind(PING)
        wire.send(PING, ACK, 0, asked.payload)
        assert await wire.of_kind(PING) == asked
        assert await wire.rest() == []


# ---- the end ----


async def test_what_is_under_way_is_finished_and_callers_are_sent_elsewhere(app: EchoServer) -> None:
    server = http2.Server(app, Limits())
    port = await server.listen("127.0.0.1", 0, None, 10)
    async with connected(port) as wire, connected(port) as idle:
        wire.headers(1, REQUEST)
        await wire.of_kind(WINDOW_UPDATE)
        await idle.of_kind(WINDOW_UPDATE)
        closing = asyncio.create_task(server.close(20))
        first = await wire.of_kind(GOAWAY)
        assert int.from_bytes(first.payload[:4]) == (1 << 31) - 1
        # This one was on its way.
        wire.headers(3, REQUEST, is_last=True)
        wire.send(PING, ACK, 0, (await wire.of_kind(PING)).payload)
        assert (await wire.answer(3))[0]["path"] == "/echo"
        second = await wire.of_kind(GOAWAY)
        assert int.from_bytes(second.payload[:4]) == 3
        wire.headers(5, REQUEST, is_last=True)
        assert (await wire.answer(5))[0] == {":reset": str(http2.REFUSED_STREAM)}
        wire.data(1, b"the last", is_last=True)
        assert (await wire.answer(1))[1] == b"the last"
        assert [one.kind for one in await wire.rest()] == [GOAWAY]
        assert GOAWAY in [one.kind for one in await idle.rest()]
        await closing
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_a_stream_that_its_caller_gave_up_is_let_go(wire: Wire, app: EchoServer) -> None:
    wire.headers(1, path("/slow"), is_last=True)
    wire.send(RST_STREAM, 0, 1, struct.pack(">I", http2.CANCEL))
    wire.headers(3, REQUEST, is_last=True)
    assert (await wire.answer(3))[0]["path"] == "/echo"
    assert (app.opened, app.closed) == (2, 2)


# ---- nonsense ----


def nonsense(chance: random.Random, wire: Wire) -> bytes:
    """A frame of any kind that may be right, wrong, cut or longer than it says."""
    kind = chance.choice([*range(11), 0x77])
    flags = chance.choice([0, 1, 4, 5, 8, 0x20, 0xFF])
    number = chance.choice([0, 1, 2, 3, 5, 7, 99, (1 << 31) - 1])
    payload = chance.choice(
        [
            b"",
            bytes(4),
            bytes(8),
            wire.block(REQUEST),
            wire.block(path("/bytes/20000")),
            chance.randbytes(chance.randrange(40)),
            chance.randbytes(chance.randrange(3000)),
        ]
    )
    whole = frame(kind, flags, number, payload)
    return whole[: chance.randrange(len(whole))] if chance.random() < 0.03 else whole


@pytest.mark.parametrize("seed", range(4))
async def test_nonsense_harms_nobody(port: int, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(100):
        async with connected(port, GREETING if chance.random() < 0.95 else b"") as wire:
            for _ in range(chance.randrange(1, 30)):
                wire.raw(nonsense(chance, wire))
            if chance.random() < 0.5:
                await asyncio.sleep(0)
    async with connected(port) as wire:
        wire.headers(1, REQUEST, is_last=True)
        assert (await wire.answer(1))[0]["path"] == "/echo"
