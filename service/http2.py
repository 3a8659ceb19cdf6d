"""HTTP/2 as a server speaks it (RFC 9113): frames, streams, flow control, and a bound on everything.

A `Server` listens, a `Connection` reads and writes frames, a `Stream` is one request with its answer;
what becomes of a request is the business of a subclass of `Stream`. All of it runs on one event loop.

Two things make it quick. We tell callers to compress headers without a table (HPACK, RFC 7541, with a
table of size 0): then equal requests have equal bytes before their bodies, and those are looked up
instead of read. And whatever a connection has to say within a turn of the loop goes out in one write.

What a caller can make us do or hold is bounded: `Limits` says by how much. Floods that other servers fell
to have their own bounds: streams that are reset as soon as they are opened (CVE-2023-44487) or made to be
reset by us (CVE-2025-8671), header blocks that never end (CVE-2024-27316), and frames that ask for an
answer or mean nothing: PING, SETTINGS, RST_STREAM, empty DATA (CVE-2019-9511 to 9518).
"""

import asyncio
import contextlib
import re
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Any, Final, Protocol, cast

from hpack import Decoder
from hpack.exceptions import HPACKError

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client says first (RFC 9113, section 3.4)."""

DATA: Final = 0x0
HEADERS: Final = 0x1
PRIORITY: Final = 0x2
RST_STREAM: Final = 0x3
SETTINGS: Final = 0x4
PUSH_PROMISE: Final = 0x5
PING: Final = 0x6
GOAWAY: Final = 0x7
WINDOW_UPDATE: Final = 0x8
CONTINUATION: Final = 0x9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
WITH_PRIORITY: Final = 0x20

NO_ERROR: Final = 0x0
PROTOCOL_ERROR: Final = 0x1
FLOW_CONTROL_ERROR: Final = 0x3
STREAM_CLOSED: Final = 0x5
FRAME_SIZE_ERROR: Final = 0x6
REFUSED_STREAM: Final = 0x7
CANCEL: Final = 0x8
COMPRESSION_ERROR: Final = 0x9
ENHANCE_YOUR_CALM: Final = 0xB

HEADER_TABLE_SIZE: Final = 0x1
ENABLE_PUSH: Final = 0x2
MAX_CONCURRENT_STREAMS: Final = 0x3
INITIAL_WINDOW_SIZE: Final = 0x4
MAX_FRAME_SIZE: Final = 0x5
MAX_HEADER_LIST_SIZE: Final = 0x6

FIRST_WINDOW: Final = 65_535
LARGEST_WINDOW: Final = 2**31 - 1
LARGEST_FRAME: Final = 16_384
"""In bytes, what we take; it is what everybody takes who does not say otherwise."""

LARGEST_FRAME_SENT: Final = 262_144
"""We send no larger ones, even to callers who take them: others wait on the same connection."""

HEAD: Final = Struct(">IBI")
"""The head of a frame: its length (24 bits) and kind (8), its flags, its stream."""

SETTING: Final = Struct(">HI")
NUMBER: Final = Struct(">I")

KNOWN_BLOCKS: Final = 1024
"""Header blocks that are remembered, of all connections together; then they are learned anew."""

LARGEST_KNOWN_BLOCK: Final = 1024

KNOWN_FIELDS: Final = 4096
"""Single header fields that are remembered, for blocks that are new in one or two of theirs."""

LARGEST_KNOWN_FIELD: Final = 256

WORK_IS_WORTH: Final = 8
"""A request, or a frame with content, makes up for so many frames without any."""

WRITE_BUFFER: Final = 262_144
"""Bytes that may wait in the transport before we stop adding to them."""

LOOK_SECONDS: Final = 1.0
"""How often the server looks for whoever has been silent, slow or stuck for too long."""

LAST_WORDS_SECONDS: Final = 5.0
"""How long a connection that we closed may take to read our last words."""

_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_PSEUDO: Final = frozenset((b":method", b":scheme", b":path", b":authority"))
_NEEDED: Final = frozenset((b":method", b":scheme", b":path"))
_OF_CONNECTIONS: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)

Field = tuple[bytes, bytes]


@dataclass(frozen=True)
class Limits:
    """What callers may make us do, and hold for them.

    Attributes:
        connections: Connections at one time.
        streams: Requests under way on one connection.
        block_bytes: A request's headers as sent.
        header_bytes: A request's headers once read, by the measure of RFC 9113, section 6.5.2. Who
            sends more is answered by the application; above four times as much the connection ends.
        stream_window: Bytes of one request's body that may be on their way to us.
        connection_window: The same of all requests of one connection together.
        resets: Streams that may be reset at one go, by the caller or because of an error of theirs,
            more than were answered (a proxy brings the resets of many callers).
        resets_per_second: As many more may be as time goes by.
        nuisances: Frames without content that may come at one go.
        nuisances_per_second: As many more may come as time goes by.
        greeting_seconds: How long the greeting may take.
        silence_seconds: After so long we ask whether the caller is still there.
        answer_seconds: How long that answer may take.
        stuck_seconds: How long a caller may take to make room for more of an answer.
    """

    connections: int = 4096
    streams: int = 1024
    block_bytes: int = 32_768
    header_bytes: int = 16_384
    stream_window: int = 1_048_576
    connection_window: int = 4_194_304
    resets: int = 1000
    resets_per_second: float = 33.0
    nuisances: int = 1000
    nuisances_per_second: float = 100.0
    greeting_seconds: float = 10.0
    silence_seconds: float = 60.0
    answer_seconds: float = 20.0
    stuck_seconds: float = 60.0


class ConnectionFault(Exception):
    """The caller broke the protocol in a way that ends the connection."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code
        self.words = words


class StreamFault(Exception):
    """The caller broke the protocol in a way that ends one stream."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Allowance:
    """So many at one go, and then so many more per second."""

    __slots__ = ("_burst", "_left", "_per_second", "_since")

    def __init__(self, burst: int, per_second: float) -> None:
        self._burst = float(burst)
        self._per_second = per_second
        self._left = float(burst)
        self._since = time.monotonic()

    def give(self, count: int) -> None:
        """Allow so many more now, never above the burst."""
        self._left = min(self._burst, self._left + count)

    def take(self) -> bool:
        """Whether one more is allowed."""
        if self._left < 1:
            now = time.monotonic()
            self._left = min(self._burst, self._left + (now - self._since) * self._per_second)
            self._since = now
        self._left -= 1
        return self._left >= 0


class Application(Protocol):
    """What a server serves."""

    def read_head(self, fields: list[Field], *, is_too_large: bool) -> Any:
        """What a request's headers say, in the application's own form.

        The same fields must always give the same: the result may be kept and used for other
        requests. `is_too_large` says that there were more header bytes than `Limits` allows.
        """

    def open(self, connection: "Connection", number: int, head: Any) -> "Stream":
        """A stream for a request with that head."""


class Stream:
    """One request and its answer.

    A subclass says what becomes of the request in `received`, of its end in `closed`; it answers with
    `answer`, or piece by piece with `start`, `write` and `end`. After the stream has closed these do nothing.
    """

    __slots__ = ("_connection", "_is_heard", "_pieces", "_since", "_trailers", "_uncredited", "_window",
                 "is_closed", "is_paused", "number", "unsent")  # fmt: skip

    def __init__(self, connection: "Connection", number: int) -> None:
        self._connection = connection
        self.number = number
        self.is_closed = False
        self.is_paused = False
        self.unsent = 0
        """Bytes of the answer that wait for the caller to make room."""
        self._is_heard = False
        self._pieces: deque[memoryview] | None = None
        self._since = 0.0
        self._trailers: bytes | None = None
        self._uncredited = 0
        self._window = connection.first_window

    # ---- for a subclass to say ----

    def opened(self) -> None:
        """Begin; called once, before anything is received."""

    def received(self, data: bytes, is_last: bool) -> None:
        """Take the next bytes of the request's body."""
        raise NotImplementedError

    def closed(self) -> None:
        """Let go of everything; called once, however the stream ended."""

    def sent(self) -> None:
        """Go on writing: what had to wait has left."""

    def look(self, now: float) -> None:
        """Note what time it is (`time.monotonic`); called about once in a second."""

    def ask_to_end(self) -> None:
        """Come to an end soon, if there is none in sight: the server is stopping."""

    # ---- for a subclass to ask ----

    def fits(self, size: int) -> bool:
        """Whether an answer of so many bytes could leave at once."""
        connection = self._connection
        return (
            not self.unsent and size <= self._window and size <= connection.window and connection.is_writable
        )

    def answer(self, headers: bytes, data: bytes, trailers: bytes) -> None:
        """Send a whole answer: two header blocks, and the body between them."""
        connection = self._connection
        size = len(data)
        if self.is_closed or not self._is_heard or size > LARGEST_FRAME or not self.fits(size):
            self.start(headers)
            self.write(data)
            self.end(trailers)
            return
        self._window -= size
        connection.window -= size
        number = self.number
        connection.outgoing += (
            HEAD.pack(len(headers) << 8 | HEADERS, END_HEADERS, number), headers,
            HEAD.pack(size << 8 | DATA, 0, number), data,
            HEAD.pack(len(trailers) << 8 | HEADERS, END_HEADERS | END_STREAM, number), trailers,
        )  # fmt: skip
        connection.heavier(size)
        connection.resets.give(1)
        connection.forget(self)
        connection.book(is_last=True)

    def start(self, headers: bytes) -> None:
        """Send the first header block of an answer."""
        if not self.is_closed:
            self._connection.send(HEADERS, END_HEADERS, self.number, headers)

    def write(self, data: bytes) -> None:
        """Send more of an answer's body, as soon as there is room."""
        if self.is_closed or not data:
            return
        if len(data) <= LARGEST_FRAME and self.fits(len(data)):
            self._window -= len(data)
            self._connection.window -= len(data)
            self._connection.send(DATA, 0, self.number, data)
            return
        if self._pieces is None:
            self._pieces = deque()
        if not self.unsent:
            self._since = time.monotonic()
        self._pieces.append(memoryview(data))
        self.unsent += len(data)
        self._connection.wait(self)

    def end(self, trailers: bytes) -> None:
        """Send the last header block, once all of the body has left."""
        if self.is_closed:
            return
        if self.unsent:
            self._trailers = trailers
            return
        connection = self._connection
        connection.send(HEADERS, END_HEADERS | END_STREAM, self.number, trailers)
        if not self._is_heard:
            # We have answered; the rest of the request is of no use (RFC 9113, section 8.1).
            connection.send(RST_STREAM, 0, self.number, NUMBER.pack(NO_ERROR))
        connection.resets.give(1)
        connection.forget(self)

    def end_now(self, trailers: bytes) -> None:
        """Send the last header block in the place of whatever still waits."""
        self._drop()
        self.end(trailers)

    def reset(self, code: int) -> None:
        """End the stream without an answer, or in the middle of one."""
        if not self.is_closed:
            self._connection.send(RST_STREAM, 0, self.number, NUMBER.pack(code))
            self._connection.forget(self)

    def pause(self) -> None:
        """Let the caller send no more than is on its way already."""
        self.is_paused = True

    def resume(self) -> None:
        """Let the caller send more."""
        if self.is_paused:
            self.is_paused = False
            self._credit(0)

    # ---- for the connection ----

    def hear(self, size: int, data: bytes, is_last: bool) -> None:
        """Take a frame of the body, which took `size` bytes of the window."""
        if self._is_heard:
            raise StreamFault(STREAM_CLOSED)
        if size > self._connection.limits.stream_window - self._uncredited:
            raise StreamFault(FLOW_CONTROL_ERROR)
        if is_last:
            self._is_heard = True
        else:
            self._credit(size)
        self.received(data, is_last)

    def _credit(self, size: int) -> None:
        self._uncredited += size
        connection = self._connection
        if not (self.is_paused or self._is_heard or self.is_closed) and (
            self._uncredited * 2 >= connection.limits.stream_window
        ):
            connection.send(WINDOW_UPDATE, 0, self.number, NUMBER.pack(self._uncredited))
            self._uncredited = 0

    def widen(self, size: int) -> None:
        """Note that the caller has room for so many more bytes."""
        if self._window + size > LARGEST_WINDOW:
            raise StreamFault(FLOW_CONTROL_ERROR)
        self._window += size

    def pump(self) -> bool:
        """Send what there is room for; whether nothing is left."""
        connection, pieces = self._connection, self._pieces
        largest = connection.largest_frame
        while pieces and connection.is_writable:
            room = min(self._window, connection.window, largest)
            if room <= 0:
                return False
            piece = pieces[0]
            if len(piece) <= room:
                pieces.popleft()
            else:
                pieces[0] = piece[room:]
                piece = piece[:room]
            size = len(piece)
            self._window -= size
            connection.window -= size
            self.unsent -= size
            self._since = time.monotonic()
            connection.send(DATA, 0, self.number, piece)
        if pieces:
            return False
        if self._trailers is not None:
            self.end(self._trailers)
        return True

    def is_stuck(self, now: float) -> bool:
        """Whether the caller has made no room for too long."""
        return self.unsent > 0 and now - self._since > self._connection.limits.stuck_seconds

    def _drop(self) -> None:
        if self._pieces is not None:
            self._pieces.clear()
        self.unsent = 0
        self._trailers = None


class Connection(asyncio.Protocol):
    """One caller's connection: frames in, frames out."""

    def __init__(self, server: "Server") -> None:
        self.limits = server.limits
        self.outgoing: list[bytes | memoryview] = []
        """Frames that leave at the end of this turn of the loop."""
        self.window = FIRST_WINDOW
        """Bytes of bodies that the caller has room for, in all streams together."""
        self.first_window = FIRST_WINDOW
        """The same in each new stream."""
        self.largest_frame = LARGEST_FRAME
        self.is_writable = True
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._streams: dict[int, Stream] = {}
        self._waiting: dict[int, Stream] = {}
        self._last_stream = 0
        self._left = b""
        self._is_greeted = False
        self._has_settings = False
        self._is_booked = False
        self._outgoing_bytes = 0
        self._uncredited = 0
        self._decoder = Decoder(max_header_list_size=4 * server.limits.header_bytes)
        self._is_stateless = False
        self._block: bytearray | None = None
        self._block_of = 0
        self._block_flags = 0
        self._block_parts = 0
        limits = server.limits
        self.resets = Allowance(limits.resets, limits.resets_per_second)
        """How many more streams may be reset; each that is answered makes up for one."""
        self._nuisances = Allowance(limits.nuisances, limits.nuisances_per_second)
        self._opened = self._heard_at = time.monotonic()
        self._is_heard = False
        self._asked_at: float | None = None
        self._stuck_since: float | None = None
        self._closing_since: float | None = None
        self._leaving_since: float | None = None
        self._last_taken: int | None = None

    # ---- asyncio's side ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet a caller."""
        # uvloop's transports do not say that they are what they are.
        self._transport = transport = cast(asyncio.Transport, transport)
        encrypted = transport.get_extra_info("ssl_object")
        if encrypted is not None and encrypted.selected_alpn_protocol() != "h2":
            # Section 3.2: over TLS both sides say beforehand that they mean HTTP/2.
            transport.abort()
            return
        if not self._server.admit(self):
            transport.abort()
            return
        transport.set_write_buffer_limits(high=WRITE_BUFFER)
        limits = self.limits
        settings = {
            HEADER_TABLE_SIZE: 0,
            MAX_CONCURRENT_STREAMS: limits.streams,
            INITIAL_WINDOW_SIZE: limits.stream_window,
            MAX_HEADER_LIST_SIZE: limits.header_bytes,
        }
        self.send(SETTINGS, 0, 0, b"".join(SETTING.pack(*one) for one in settings.items()))
        self.send(WINDOW_UPDATE, 0, 0, NUMBER.pack(limits.connection_window - FIRST_WINDOW))

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of all that was under way."""
        self._transport = None
        self._server.dismiss(self)
        self.outgoing.clear()
        for stream in list(self._streams.values()):
            self.forget(stream)

    def pause_writing(self) -> None:
        """Take no more requests from whoever does not read the answers."""
        self.is_writable = False
        self._stuck_since = time.monotonic()
        if self._transport is not None and self._closing_since is None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Go on."""
        self.is_writable = True
        self._stuck_since = None
        if self._transport is not None and self._closing_since is None:
            self._transport.resume_reading()
            self._pump()

    def eof_received(self) -> None:
        """Close: who has sent all they will cannot make room for answers either."""

    def data_received(self, data: bytes) -> None:
        """Read frames; what is not whole yet stays for the next time."""
        if self._closing_since is not None:
            return
        self._is_heard = True
        if self._left:
            data = self._left + data
        try:
            self._left = self._read(data)
        except ConnectionFault as fault:
            self._left = b""
            self.close(fault.code, fault.words)

    def _read(self, data: bytes) -> bytes:
        """Read all whole frames; what is left."""
        position, end = 0, len(data)
        if not self._is_greeted:
            if not PREFACE.startswith(data[: len(PREFACE)]):
                raise ConnectionFault(PROTOCOL_ERROR, "this port speaks HTTP/2 with prior knowledge")
            if end < len(PREFACE):
                return data
            self._is_greeted = True
            position = len(PREFACE)
        while end - position >= HEAD.size:
            length_and_kind, flags, number = HEAD.unpack_from(data, position)
            length, kind = length_and_kind >> 8, length_and_kind & 0xFF
            if length > LARGEST_FRAME:
                raise ConnectionFault(FRAME_SIZE_ERROR, f"a frame has {LARGEST_FRAME} bytes at the most")
            start = position + HEAD.size
            stop = start + length
            if stop > end:
                break
            position = stop
            # The highest bit of the stream's number is reserved.
            self._frame(kind, flags, number & LARGEST_WINDOW, data[start:stop])
            if self._closing_since is not None:
                return b""
        return data[position:] if position < end else b""

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._block is not None and (kind != CONTINUATION or number != self._block_of):
            raise ConnectionFault(PROTOCOL_ERROR, "a header block must not be interrupted")
        if not self._has_settings and (kind != SETTINGS or flags & ACK):
            raise ConnectionFault(PROTOCOL_ERROR, "the first frame must be SETTINGS")
        try:
            if kind == DATA:
                self._data(flags, number, payload)
            elif kind == HEADERS:
                self._headers(flags, number, payload)
            elif kind == CONTINUATION:
                self._continuation(flags, payload)
            else:
                self._bother()
                handle = _CONTROL.get(kind)
                # Kinds that nobody knows are for nobody (section 5.5).
                if handle is not None:
                    handle(self, flags, number, payload)
        except StreamFault as fault:
            self._punish(number, fault.code)

    def _bother(self) -> None:
        """Count a frame that asks us to do something and brings nothing."""
        if not self._nuisances.take():
            raise ConnectionFault(ENHANCE_YOUR_CALM, "too many frames without content")

    def _punish(self, number: int, code: int) -> None:
        """Reset a stream for an error of the caller's."""
        if not self.resets.take():
            raise ConnectionFault(ENHANCE_YOUR_CALM, "too many streams are reset")
        stream = self._streams.get(number)
        if stream is not None:
            stream.reset(code)
        else:
            self.send(RST_STREAM, 0, number, NUMBER.pack(code))

    # ---- frames in ----

    def _data(self, flags: int, number: int, payload: bytes) -> None:
        size = len(payload)
        self._uncredited += size
        if self._uncredited * 2 >= self.limits.connection_window:
            self.send(WINDOW_UPDATE, 0, 0, NUMBER.pack(self._uncredited))
            self._uncredited = 0
        if flags & PADDED:
            payload = _without_padding(payload)
        if payload:
            self._nuisances.give(WORK_IS_WORTH)
        elif not flags & END_STREAM:
            self._bother()
        stream = self._streams.get(number)
        if stream is not None:
            stream.hear(size, payload, bool(flags & END_STREAM))
        else:
            self._expect_known(number)
            # It was under way when we ended the stream.
            self._bother()

    def _expect_known(self, number: int) -> None:
        if number == 0 or number > self._last_stream or not number & 1:
            raise ConnectionFault(PROTOCOL_ERROR, "there is no such stream")

    def _headers(self, flags: int, number: int, payload: bytes) -> None:
        if not number & 1:
            raise ConnectionFault(PROTOCOL_ERROR, "callers' streams have odd numbers")
        if flags & PADDED:
            payload = _without_padding(payload)
        if flags & WITH_PRIORITY:
            if len(payload) < 5:
                raise ConnectionFault(FRAME_SIZE_ERROR, "a HEADERS frame is too short")
            if NUMBER.unpack_from(payload)[0] & LARGEST_WINDOW == number:
                raise ConnectionFault(PROTOCOL_ERROR, "a stream must not depend on itself")
            payload = payload[5:]
        if flags & END_HEADERS:
            self._whole_block(number, payload, flags)
        else:
            self._block = bytearray(payload)
            self._block_of = number
            self._block_flags = flags
            self._block_parts = 1

    def _continuation(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise ConnectionFault(PROTOCOL_ERROR, "there is no header block to continue")
        self._block += payload
        self._block_parts += 1
        # A block of so many bytes needs so many frames, and a few more for who cuts them unevenly.
        most_parts = self.limits.block_bytes // LARGEST_FRAME + 8
        if len(self._block) > self.limits.block_bytes or self._block_parts > most_parts:
            raise ConnectionFault(ENHANCE_YOUR_CALM, "the header block is too long")
        if flags & END_HEADERS:
            block, self._block = bytes(self._block), None
            self._whole_block(self._block_of, block, self._block_flags)

    def _whole_block(self, number: int, block: bytes, flags: int) -> None:
        stream = self._streams.get(number)
        if stream is not None or number <= self._last_stream:
            # Trailers, or a request that we no longer want; the block is part of HPACK's state all the same.
            self._bother()
            self._decode(block)
            if stream is not None:
                if not flags & END_STREAM:
                    raise StreamFault(PROTOCOL_ERROR)
                stream.hear(0, b"", is_last=True)
            return
        self._last_stream = number
        self._nuisances.give(WORK_IS_WORTH)
        head = self._head(block)
        if self._last_taken is not None or len(self._streams) >= self.limits.streams:
            if not self.resets.take():
                raise ConnectionFault(ENHANCE_YOUR_CALM, "too many streams are refused")
            self.send(RST_STREAM, 0, number, NUMBER.pack(REFUSED_STREAM))
            return
        stream = self._server.application.open(self, number, head)
        self._streams[number] = stream
        stream.opened()
        if flags & END_STREAM and not stream.is_closed:
            stream.hear(0, b"", is_last=True)

    def _head(self, block: bytes) -> Any:
        """The application's reading of a header block.

        Raises:
            ConnectionFault: HPACK's state is lost.
            StreamFault: it is no request.
        """
        if self._is_stateless:
            # Without a table a block always means the same, whoever sends it.
            known = self._server.known_heads.get(block)
            if known is not None:
                return known
        fields = self._decode(block)
        _check_fields(fields)
        size = sum(len(name) + len(value) + 32 for name, value in fields)
        is_too_large = size > self.limits.header_bytes
        head = self._server.application.read_head(fields, is_too_large=is_too_large)
        if self._is_stateless and len(block) <= LARGEST_KNOWN_BLOCK:
            self._server.learn(block, head)
        return head

    def _decode(self, block: bytes) -> list[Field]:
        """The fields of a header block.

        Raises:
            ConnectionFault: HPACK's state is lost, or there are far too many.
        """
        try:
            if self._is_stateless:
                return self._recall(block)
            fields: list[Field] = list(self._decoder.decode(block, raw=True))
        except (HPACKError, IndexError):
            raise ConnectionFault(COMPRESSION_ERROR, "the header block cannot be read") from None
        if self._decoder.max_allowed_table_size == 0:
            self._is_stateless = True
        return fields

    def _recall(self, block: bytes) -> list[Field]:
        """The fields of a block that uses no table, each of which always has the same bytes.

        In calls that differ in their deadline or their trace, all the other fields are known.
        """
        known, fields = self._server.known_fields, []
        position, end, size = 0, len(block), 0
        while position < end:
            start, position = position, _end_of_field(block, position)
            encoded = block[start:position]
            field = known.get(encoded)
            if field is None:
                decoded = list(self._decoder.decode(encoded, raw=True))
                if not decoded:
                    # A new size of the table, which the decoder has found to be 0 as it must be.
                    continue
                name, value = decoded[0]
                field = (name, value)
                self._server.learn_field(encoded, field)
            fields.append(field)
            size += len(field[0]) + len(field[1]) + 32
            if size > 4 * self.limits.header_bytes:
                raise ConnectionFault(ENHANCE_YOUR_CALM, "the header block is too long")
        return fields

    def _priority(self, flags: int, number: int, payload: bytes) -> None:
        if len(payload) != 5:
            raise StreamFault(FRAME_SIZE_ERROR)
        if number == 0:
            raise ConnectionFault(PROTOCOL_ERROR, "PRIORITY needs a stream")

    def _rst_stream(self, flags: int, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(FRAME_SIZE_ERROR, "RST_STREAM has 4 bytes")
        self._expect_known(number)
        stream = self._streams.get(number)
        if stream is not None:
            if not self.resets.take():
                raise ConnectionFault(ENHANCE_YOUR_CALM, "too many streams are reset")
            self.forget(stream)

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise ConnectionFault(PROTOCOL_ERROR, "SETTINGS are of the connection")
        if len(payload) % SETTING.size or (flags & ACK and payload):
            raise ConnectionFault(FRAME_SIZE_ERROR, "SETTINGS have a wrong length")
        if flags & ACK:
            # From here on the caller may use no table: the next block begins by saying so.
            self._decoder.max_allowed_table_size = 0
            return
        self._has_settings = True
        settings = dict(SETTING.iter_unpack(payload))
        if settings.get(ENABLE_PUSH, 0) > 1:
            raise ConnectionFault(PROTOCOL_ERROR, "ENABLE_PUSH is 0 or 1")
        window = settings.get(INITIAL_WINDOW_SIZE, self.first_window)
        if window > LARGEST_WINDOW:
            raise ConnectionFault(FLOW_CONTROL_ERROR, "the window is too large")
        largest = settings.get(MAX_FRAME_SIZE, LARGEST_FRAME)
        if not LARGEST_FRAME <= largest < 1 << 24:
            raise ConnectionFault(PROTOCOL_ERROR, "MAX_FRAME_SIZE is out of its range")
        if MAX_FRAME_SIZE in settings:
            self.largest_frame = min(largest, LARGEST_FRAME_SENT)
        self.send(SETTINGS, ACK, 0, b"")
        if window != self.first_window:
            change, self.first_window = window - self.first_window, window
            try:
                for stream in self._streams.values():
                    stream.widen(change)
            except StreamFault:
                raise ConnectionFault(FLOW_CONTROL_ERROR, "a window is too large") from None
            self._pump()

    def _push_promise(self, flags: int, number: int, payload: bytes) -> None:
        raise ConnectionFault(PROTOCOL_ERROR, "callers promise nothing")

    def _ping(self, flags: int, number: int, payload: bytes) -> None:
        if len(payload) != 8:
            raise ConnectionFault(FRAME_SIZE_ERROR, "PING has 8 bytes")
        if number:
            raise ConnectionFault(PROTOCOL_ERROR, "PING is of the connection")
        if not flags & ACK:
            self.send(PING, ACK, 0, payload)
        elif payload == _LEAVING and self._leaving_since is not None:
            self._leave_for_good()

    def _goaway(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise ConnectionFault(PROTOCOL_ERROR, "GOAWAY is of the connection")
        if len(payload) < 8:
            raise ConnectionFault(FRAME_SIZE_ERROR, "GOAWAY has 8 bytes at least")
        # The caller opens no more streams, and closes when the last is answered.

    def _window_update(self, flags: int, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFault(FRAME_SIZE_ERROR, "WINDOW_UPDATE has 4 bytes")
        size = NUMBER.unpack(payload)[0] & LARGEST_WINDOW
        if number == 0:
            if size == 0:
                raise ConnectionFault(PROTOCOL_ERROR, "a window must grow")
            if self.window + size > LARGEST_WINDOW:
                raise ConnectionFault(FLOW_CONTROL_ERROR, "the window is too large")
            self.window += size
            self._pump()
            return
        self._expect_known(number)
        stream = self._streams.get(number)
        if stream is not None:
            if size == 0:
                raise StreamFault(PROTOCOL_ERROR)
            stream.widen(size)
            if number in self._waiting:
                self._go_on(stream)

    # ---- frames out ----

    def send(self, kind: int, flags: int, number: int, payload: bytes | memoryview) -> None:
        """Send a frame at the end of this turn of the loop."""
        self.outgoing.append(HEAD.pack(len(payload) << 8 | kind, flags, number))
        self.outgoing.append(payload)
        if kind == DATA:
            # It will be answered by a frame that makes room.
            self._nuisances.give(WORK_IS_WORTH)
            self.heavier(len(payload))
        self.book()

    def heavier(self, size: int) -> None:
        """Note so many more bytes in `outgoing`; too many leave now, that the transport may say stop."""
        self._outgoing_bytes += size
        if self._outgoing_bytes > WRITE_BUFFER:
            self.flush()

    def book(self, *, is_last: bool = False) -> None:
        """See that what is to be sent leaves at the end of this turn, or now if nothing can follow."""
        if is_last and not self._streams:
            self.flush()
        elif not self._is_booked:
            self._is_booked = True
            self._server.book(self)

    def flush(self) -> None:
        """Write all that is to be sent."""
        self._is_booked = False
        if self._transport is not None and self.outgoing:
            frames = b"".join(self.outgoing)
            self.outgoing.clear()
            self._outgoing_bytes = 0
            self._transport.write(frames)

    def wait(self, stream: Stream) -> None:
        """Send a stream's bytes as there is room."""
        if not stream.pump():
            self._waiting[stream.number] = stream

    def _pump(self) -> None:
        """Use the room that there is now, in the order in which the streams came to wait."""
        for stream in list(self._waiting.values()):
            if self.window <= 0 or not self.is_writable:
                return
            self._go_on(stream)

    def _go_on(self, stream: Stream) -> None:
        if not stream.is_closed and stream.pump():
            self._waiting.pop(stream.number, None)
            if not stream.is_closed:
                stream.sent()

    def forget(self, stream: Stream) -> None:
        """Note that a stream is over."""
        if stream.is_closed:
            return
        stream.is_closed = True
        self._streams.pop(stream.number, None)
        self._waiting.pop(stream.number, None)
        stream.closed()
        if self._last_taken is not None and not self._streams:
            self.close(NO_ERROR)

    # ---- the end ----

    def leave(self) -> None:
        """Ask the caller to go elsewhere; what is under way is finished (section 6.8)."""
        if self._leaving_since is None and self._closing_since is None:
            self._leaving_since = time.monotonic()
            # Streams that are on their way to us are still taken: they reach us before the PING's answer.
            self.send(GOAWAY, 0, 0, NUMBER.pack(LARGEST_WINDOW) + NUMBER.pack(NO_ERROR))
            self.send(PING, 0, 0, _LEAVING)

    def _leave_for_good(self) -> None:
        if self._last_taken is not None or self._closing_since is not None:
            return
        self._last_taken = self._last_stream
        if not self._streams:
            self.close(NO_ERROR)
            return
        self.send(GOAWAY, 0, 0, NUMBER.pack(self._last_taken) + NUMBER.pack(NO_ERROR))
        for stream in list(self._streams.values()):
            stream.ask_to_end()

    def close(self, code: int, words: str = "") -> None:
        """Say why, and close."""
        if self._transport is None or self._closing_since is not None:
            return
        self._closing_since = time.monotonic()
        last = self._last_stream if self._last_taken is None else self._last_taken
        self.send(GOAWAY, 0, 0, NUMBER.pack(last) + NUMBER.pack(code) + words.encode())
        for stream in list(self._streams.values()):
            self.forget(stream)
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        """Close at once, whatever waits to be sent."""
        if self._transport is not None:
            self._transport.abort()

    def look(self, now: float) -> None:
        """See whether the caller has been silent, slow or stuck for too long."""
        limits = self.limits
        if self._closing_since is not None:
            if now - self._closing_since > LAST_WORDS_SECONDS:
                self.abort()
            return
        if not self._has_settings and now - self._opened > limits.greeting_seconds:
            self.abort()
            return
        if self._stuck_since is not None and now - self._stuck_since > limits.stuck_seconds:
            self.abort()
            return
        if self._leaving_since is not None and now - self._leaving_since > LOOK_SECONDS:
            self._leave_for_good()
        for stream in list(self._streams.values()):
            if stream.is_stuck(now):
                stream.reset(CANCEL)
            else:
                stream.look(now)
        if self._is_heard:
            self._is_heard = False
            self._heard_at, self._asked_at = now, None
        elif self._asked_at is not None:
            if now - self._asked_at > limits.answer_seconds:
                self.abort()
        elif now - self._heard_at > limits.silence_seconds:
            self._asked_at = now
            self.send(PING, 0, 0, _THERE)


_LEAVING: Final = b"leaving!"
_THERE: Final = b"there? :"

_CONTROL: Final[dict[int, Callable[[Connection, int, int, bytes], None]]] = {
    PRIORITY: Connection._priority,
    RST_STREAM: Connection._rst_stream,
    SETTINGS: Connection._settings,
    PUSH_PROMISE: Connection._push_promise,
    PING: Connection._ping,
    GOAWAY: Connection._goaway,
    WINDOW_UPDATE: Connection._window_update,
}


class Server:
    """Listens, and looks after all connections of one worker."""

    def __init__(self, application: Application, limits: Limits) -> None:
        self.application = application
        self.limits = limits
        self.known_heads: dict[bytes, Any] = {}
        self.known_fields: dict[bytes, Field] = {}
        self._connections: set[Connection] = set()
        self._booked: list[Connection] = []
        self._is_closing = False
        self._listening: asyncio.Server | None = None
        self._looking: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None, backlog: int) -> int:
        """Take connections; several processes may listen on one port, which the kernel spreads callers over.

        Args:
            host: The address to listen on.
            port: Its port; 0 for any that is free.
            tls: Certificate and key, where connections are encrypted.
            backlog: Connections that may wait to be taken.

        Returns:
            The port.

        Raises:
            OSError: the address cannot be had.
        """
        self._loop = asyncio.get_running_loop()
        self._listening = await self._loop.create_server(
            lambda: Connection(self), host, port, ssl=tls, backlog=backlog, reuse_port=True
        )
        self._looking = asyncio.create_task(self._look())
        return int(self._listening.sockets[0].getsockname()[1])

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = time.monotonic()
            for connection in list(self._connections):
                connection.look(now)

    async def close(self, grace_seconds: float) -> None:
        """Take no more connections, ask callers to go, finish what is under way, and hang up."""
        if self._listening is None:
            return
        self._listening.close()
        self._is_closing = True
        for connection in list(self._connections):
            connection.leave()
        give_up = time.monotonic() + grace_seconds
        while self._connections and time.monotonic() < give_up:
            await asyncio.sleep(0.01)
        if self._looking is not None:
            self._looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._looking
        for connection in list(self._connections):
            connection.abort()

    def admit(self, connection: Connection) -> bool:
        """Note a new connection; False where there are too many, or none are taken any more."""
        if self._is_closing or len(self._connections) >= self.limits.connections:
            return False
        self._connections.add(connection)
        return True

    def dismiss(self, connection: Connection) -> None:
        """Note that a connection is over."""
        self._connections.discard(connection)

    def learn(self, block: bytes, head: Any) -> None:
        """Remember what a header block says."""
        if len(self.known_heads) >= KNOWN_BLOCKS:
            self.known_heads.clear()
        self.known_heads[block] = head

    def learn_field(self, encoded: bytes, field: Field) -> None:
        """Remember what a field of a header block says."""
        if len(encoded) > LARGEST_KNOWN_FIELD:
            return
        if len(self.known_fields) >= KNOWN_FIELDS:
            self.known_fields.clear()
        self.known_fields[encoded] = field

    def book(self, connection: Connection) -> None:
        """Have a connection write at the end of this turn of the loop."""
        if not self._booked:
            assert self._loop is not None, "there are connections, so the server listens"
            self._loop.call_soon(self._flush)
        self._booked.append(connection)

    def _flush(self) -> None:
        booked, self._booked = self._booked, []
        for connection in booked:
            connection.flush()


def _without_padding(payload: bytes) -> bytes:
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(PROTOCOL_ERROR, "a frame has more padding than it is long")
    return payload[1 : len(payload) - payload[0]]


def _check_fields(fields: list[Field]) -> None:
    """See that headers are those of a request (section 8.2 and 8.3).

    Raises:
        StreamFault: they are not.
    """
    seen: set[bytes] = set()
    is_regular = False
    for name, value in fields:
        if name.startswith(b":"):
            if is_regular or name in seen or name not in _PSEUDO:
                raise StreamFault(PROTOCOL_ERROR)
            seen.add(name)
        else:
            is_regular = True
            if (
                not _NAME.fullmatch(name)
                or name in _OF_CONNECTIONS
                or (name == b"te" and value != b"trailers")
            ):
                raise StreamFault(PROTOCOL_ERROR)
        if b"\0" in value or b"\r" in value or b"\n" in value or value != value.strip(b" \t"):
            raise StreamFault(PROTOCOL_ERROR)
    if not seen >= _NEEDED:
        raise StreamFault(PROTOCOL_ERROR)


def _end_of_field(block: bytes, position: int) -> int:
    """Where a field of a header block ends (RFC 7541, section 6).

    Raises:
        IndexError: not within the block.
    """
    first = block[position]
    if first & 0x80:
        return _read_integer(block, position, 0x7F)[1]
    if first & 0xE0 == 0x20:
        return _read_integer(block, position, 0x1F)[1]
    index, position = _read_integer(block, position, 0x3F if first & 0x40 else 0x0F)
    for _ in range(1 if index else 2):
        length, position = _read_integer(block, position, 0x7F)
        position += length
    if position > len(block):
        raise IndexError(position)
    return position


def _read_integer(block: bytes, position: int, mask: int) -> tuple[int, int]:
    """A number in the last bits of a byte and maybe more bytes, and where it ends (RFC 7541, section 5.1)."""
    value = block[position] & mask
    position += 1
    if value < mask:
        return value, position
    for shift in (0, 7, 14, 21):
        one = block[position]
        position += 1
        value += (one & 0x7F) << shift
        if one < 128:
            return value, position
    raise IndexError(position)


def literal(name: bytes, value: bytes) -> bytes:
    """A header field in HPACK that no table knows or will (RFC 7541, section 6.2.2)."""
    return b"\x00" + _integer(len(name)) + name + _integer(len(value)) + value


def _integer(value: int) -> bytes:
    """A length of seven bits, and more bytes if it needs them (RFC 7541, section 5.1)."""
    if value < 127:
        return bytes((value,))
    encoded, value = bytearray((127,)), value - 127
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
