"""HTTP/2 frame by frame, for tests that say what no client would."""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from hpack import Decoder, Encoder

from service import http2

HEAD = struct.Struct(">IBI")
WAIT_SECONDS = 20
"""Long: the machine may be busy with something else."""

Fields = list[tuple[str, str]]


class Frame(NamedTuple):
    """A frame that the server sent."""

    kind: int
    flags: int
    number: int
    payload: bytes


def frame(kind: int, flags: int, number: int, payload: bytes = b"") -> bytes:
    return HEAD.pack(len(payload) << 8 | kind, flags, number) + payload


def settings(**values: int) -> bytes:
    """A SETTINGS frame, by the names of the settings."""
    pairs = [struct.pack(">HI", getattr(http2, name.upper()), value) for name, value in values.items()]
    return frame(http2.SETTINGS, 0, 0, b"".join(pairs))


GREETING = http2.PREFACE + settings()


class Wire:
    """One connection of a caller's own making."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self._encoder = Encoder()
        self._decoder = Decoder()

    def send(self, kind: int, flags: int, number: int, payload: bytes = b"") -> None:
        self.raw(frame(kind, flags, number, payload))

    def raw(self, content: bytes) -> None:
        self.writer.write(content)

    def block(self, fields: Iterable[tuple[str, str]]) -> bytes:
        """A header block in which no table is used."""
        return b"".join(http2.literal(name.encode(), value.encode()) for name, value in fields)

    def headers(self, number: int, fields: Fields, *, is_last: bool = False) -> None:
        flags = http2.END_HEADERS | (http2.END_STREAM if is_last else 0)
        self.send(http2.HEADERS, flags, number, self.block(fields))

    def data(self, number: int, payload: bytes, *, is_last: bool = False) -> None:
        self.send(http2.DATA, http2.END_STREAM if is_last else 0, number, payload)

    def make_room(self, number: int, size: int) -> None:
        self.send(http2.WINDOW_UPDATE, 0, number, struct.pack(">I", size))

    def acknowledge(self) -> None:
        self.send(http2.SETTINGS, http2.ACK, 0)

    async def frame(self) -> Frame | None:
        """The next frame; None at the end."""
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                head = await self._reader.readexactly(HEAD.size)
                length_and_kind, flags, number = HEAD.unpack(head)
                payload = await self._reader.readexactly(length_and_kind >> 8)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return Frame(length_and_kind & 0xFF, flags, number, payload)

    async def until(self, wanted: Callable[[Frame], bool]) -> Frame:
        """The next frame like that; those before it are passed over."""
        while (one := await self.frame()) is not None:
            if wanted(one):
                return one
        raise AssertionError("the connection ended")

    async def of_kind(self, kind: int, number: int | None = None) -> Frame:
        return await self.until(lambda one: one.kind == kind and number in (None, one.number))

    async def answer(self, number: int) -> tuple[dict[str, str], bytes]:
        """All headers and trailers of a stream together, and its body; a reset is `:reset`."""
        fields: dict[str, str] = {}
        body = b""
        while True:
            one = await self.until(lambda one: one.kind in (http2.HEADERS, http2.DATA, http2.RST_STREAM))
            if one.kind == http2.HEADERS:
                decoded = dict(self._decoder.decode(one.payload))
                if one.number == number:
                    fields |= decoded
            elif one.number != number:
                continue
            elif one.kind == http2.DATA:
                body += one.payload
            else:
                return {**fields, ":reset": str(int.from_bytes(one.payload))}, body
            if one.number == number and one.flags & http2.END_STREAM:
                return fields, body

    async def last_words(self) -> int:
        """The code with which the server ends the connection, and that it does."""
        gone = await self.of_kind(http2.GOAWAY)
        assert await self.rest() == []
        return int.from_bytes(gone.payload[4:8])

    async def rest(self) -> list[Frame]:
        """All frames to the end."""
        frames = []
        while (one := await self.frame()) is not None:
            frames.append(one)
        return frames


@asynccontextmanager
async def connected(port: int, greeting: bytes = GREETING) -> AsyncIterator[Wire]:
    """A connection that has greeted."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    wire = Wire(reader, writer)
    wire.raw(greeting)
    try:
        yield wire
    finally:
        writer.close()


@asynccontextmanager
async def serving(application: Any, limits: http2.Limits) -> AsyncIterator[int]:
    """A server in this process; its port. Nothing may go wrong in it unnoticed."""
    troubles: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: troubles.append(context))
    server = http2.Server(application, limits)
    try:
        yield await server.listen("127.0.0.1", 0, None, 100)
    finally:
        await server.close(0)
        # The last callbacks of the connections.
        await asyncio.sleep(0.01)
    assert troubles == []
