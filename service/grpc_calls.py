"""gRPC calls over HTTP/2: methods, messages, deadlines, statuses (`PROTOCOL-HTTP2.md` of the gRPC project).

It knows no method of ours. A `Service` is told its methods and what its calls may take; every call is a
stream of `http2.py`, whose messages are answered in their order, several of them under way at a time.

Specification: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from struct import Struct
from typing import Final

import structlog

from service.data_plane import off_the_loop
from service.errors import (
    BadInput,
    BodyTooLarge,
    DeadlineExceeded,
    InternalError,
    NotSupported,
    Overloaded,
    QuintetError,
    Unavailable,
)
from service.http import BODY_SECONDS, compress, decompress
from service.http2 import LARGEST_FRAME, Connection, Field, Stream, literal

PREFIX: Final = Struct(">BI")
"""Before each message: whether it is compressed, and its length."""

CODINGS: Final = (b"gzip", b"deflate")

WORTH_COMPRESSING: Final = 1024
"""In bytes: shorter answers are not compressed, whatever their requests were."""

AHEAD: Final = 64
"""Messages of one call that may be under way at a time."""

LONGEST_DETAIL: Final = 1024
"""In bytes: callers refuse headers of several kilobytes, and some sentences repeat what was sent."""

DRAINING: Final = "The service is draining; make the call again after a pause."

_SECONDS: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}

log = structlog.get_logger("quintet")


class Status(IntEnum):
    """How a call ended, of those that we use."""

    OK = 0
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


_STATUS_200: Final = b"\x88"
"""`:status: 200`, from HPACK's static table."""

HEADERS: Final = _STATUS_200 + literal(b"content-type", b"application/grpc")
HEADERS_BY_CODING: Final = {coding: HEADERS + literal(b"grpc-encoding", coding) for coding in CODINGS}
OK: Final = literal(b"grpc-status", b"0")
ACCEPTED: Final = literal(b"grpc-accept-encoding", b"identity,gzip,deflate")


def trailers(error: QuintetError) -> bytes:
    """The header block that ends a call with an error; `retry-after` and `index` ride in it."""
    detail = error.detail.encode()[:LONGEST_DETAIL].decode(errors="ignore")
    block = literal(b"grpc-status", b"%d" % Status[error.grpc_status]) + literal(
        b"grpc-message", percent_encoded(detail)
    )
    if error.retry_after_seconds is not None:
        block += literal(b"retry-after", b"%d" % error.retry_after_seconds)
    if error.index is not None:
        block += literal(b"index", b"%d" % error.index)
    return block


def percent_encoded(text: str) -> bytes:
    """Words as `grpc-message` carries them: printable ASCII as it is, all else as %XX of its UTF-8."""
    return b"".join(
        bytes((one,)) if 0x20 <= one <= 0x7E and one != 0x25 else b"%%%02X" % one for one in text.encode()
    )


def read_timeout(value: bytes) -> float:
    """The seconds of a `grpc-timeout`.

    Raises:
        BadInput: it is none.
    """
    digits, unit = value[:-1], _SECONDS.get(value[-1:])
    if unit is None or not digits.isdigit() or len(digits) > 8:
        raise BadInput(
            "grpc-timeout must be a whole number of up to 8 digits, and then one of H, M, S, m, u, n."
        )
    return int(digits) * unit


Answered = bytes | QuintetError
"""What came of a message."""

Tell = Callable[[Answered], None]
GiveUp = Callable[[], object]


@dataclass(frozen=True)
class Method:
    """One method of a service.

    Attributes:
        answer: Answers one message with one; raises `QuintetError` where it cannot.
        is_stream: Whether a call has any number of messages, each with its answer, rather than one.
        is_endless: Whether `answer` goes on, sending with `Call.send`, until the caller has had enough.
        keeps_deadline: Whether `answer` minds `Call.deadline` by itself.
        ask: Answers a message without a task, later, and minds the deadline: it takes the call, the
            message, and what is to be told the answer or the error, and gives what to call if nobody
            waits for it any more. It gives None where nothing has happened and `answer` must be asked
            instead; there is no `ask` where that is always so.
    """

    answer: "Callable[[Call, bytes], Awaitable[bytes]]"
    is_stream: bool = False
    is_endless: bool = False
    keeps_deadline: bool = False
    ask: "Callable[[Call, bytes, Tell], GiveUp | None] | None" = None


@dataclass(frozen=True, slots=True)
class Head:
    """What the headers of a call say.

    Attributes:
        method: What is called.
        refusal: The header block to refuse the call with, if it must be.
        seconds: How long the caller waits; None for ever.
        coding: How compressed messages are compressed, both ways.
        authorization: What the caller sent under that name; empty for nothing.
        headers: All that the caller sent, by name.
    """

    method: Method
    refusal: bytes | None = None
    seconds: float | None = None
    coding: bytes | None = None
    authorization: bytes = field(default=b"", repr=False)
    headers: Mapping[bytes, bytes] = field(default_factory=dict, repr=False)


def _framed(message: bytes, *, is_compressed: bool = False) -> bytes:
    return PREFIX.pack(is_compressed, len(message)) + message


def _tell_framed(tell: Tell, answer: Answered) -> None:
    tell(answer if isinstance(answer, QuintetError) else _framed(answer))


async def _nothing(call: "Call", message: bytes) -> bytes:
    raise AssertionError("a refused call is not answered")


_NO_METHOD: Final = Method(_nothing)


def _refused(error: QuintetError, more: bytes = b"") -> Head:
    return Head(_NO_METHOD, refusal=HEADERS + more + trailers(error))


def _not_grpc(status: bytes, words: bytes, more: bytes = b"") -> Head:
    """For callers who do not speak gRPC: a status that HTTP knows."""
    block = literal(b":status", status) + more + literal(b"grpc-message", words)
    return Head(_NO_METHOD, refusal=block)


class Service:
    """The application of an `http2.Server`: gRPC methods by their paths."""

    def __init__(
        self,
        methods: Mapping[bytes, Method],
        *,
        max_message_bytes: int,
        max_calls: int,
        hold: Callable[[int], None],
        let_go: Callable[[int], None],
    ) -> None:
        """Serve `methods`.

        Args:
            methods: By their paths, `/package.Service/Method`.
            max_message_bytes: One message, also once decompressed.
            max_calls: Calls under way at one time.
            hold: Notes bytes kept in memory for a caller; raises `Overloaded` where there are too many.
            let_go: Notes that they are no longer.
        """
        self._methods = methods
        self.max_message_bytes = max_message_bytes
        self.max_calls = max_calls
        self.hold = hold
        self.let_go = let_go
        self.calls = 0

    def read_head(self, fields: list[Field], *, is_too_large: bool) -> Head:
        """What the headers of a call say, or why it is refused."""
        headers = dict(fields)
        if headers[b":method"] != b"POST":
            return _not_grpc(b"405", b"gRPC calls are POST", literal(b"allow", b"POST"))
        kind = headers.get(b"content-type", b"")
        if kind != b"application/grpc" and not kind.startswith((b"application/grpc+", b"application/grpc;")):
            return _not_grpc(b"415", b"gRPC calls are application/grpc")
        if is_too_large:
            return _refused(BodyTooLarge("The metadata of the call is too large; send less."))
        method = self._methods.get(headers[b":path"])
        if method is None:
            return _refused(NotSupported("There is no such method on this service."))
        coding = headers.get(b"grpc-encoding", b"identity")
        if coding not in (b"identity", *CODINGS):
            return _refused(
                NotSupported("The grpc-encoding is not served; send gzip, deflate or identity."), ACCEPTED
            )
        value = headers.get(b"grpc-timeout")
        try:
            seconds = None if value is None else read_timeout(value)
        except BadInput as error:
            return _refused(error)
        return Head(
            method,
            seconds=seconds,
            coding=None if coding == b"identity" else coding,
            authorization=headers.get(b"authorization", b""),
            headers=headers,
        )

    def open(self, connection: Connection, number: int, head: Head) -> "Call":
        """A call."""
        return Call(connection, number, self, head)


class _Turn:
    """A message of a call on its way to its answer, which is framed, or an error."""

    __slots__ = ("answer", "give_up", "held")

    def __init__(self, held: int) -> None:
        self.answer: Answered | None = None
        self.held = held
        self.give_up: GiveUp | None = None


class Call(Stream):
    """One call of a method."""

    __slots__ = (
        "_answer_held", "_arrived", "_give_up", "_has_started", "_held", "_is_booked", "_is_over",
        "_is_sent_away", "_is_whole", "_partial", "_service", "_turns", "deadline", "head", "more",
    )  # fmt: skip

    def __init__(self, connection: Connection, number: int, service: Service, head: Head) -> None:
        super().__init__(connection, number)
        self.head = head
        now = time.monotonic()
        self.deadline = None if head.seconds is None else now + head.seconds
        """When the caller gives up, by `time.monotonic`."""
        self.more = b""
        """A header block that the call's end is to have as well."""
        self._service = service
        self._answer_held = 0
        self._arrived = now
        self._give_up: GiveUp | None = None
        self._has_started = False
        self._held = 0
        self._is_booked = False
        self._is_over = False
        self._is_sent_away = False
        self._is_whole = False
        self._partial: bytearray | None = None
        self._turns: deque[_Turn] = deque() if head.method.is_stream else _NO_TURNS

    # ---- what comes in ----

    def opened(self) -> None:
        """Refuse what must be."""
        service = self._service
        service.calls += 1
        if self.head.refusal is not None:
            self._is_over = True
            self.end(self.head.refusal)
        elif service.calls > service.max_calls:
            self.fail(Overloaded("Too many calls are under way; send the call again after a pause."))

    def received(self, data: bytes, is_last: bool) -> None:
        """Take the next bytes of the messages."""
        if self._is_over or self._is_sent_away:
            return
        if not self._partial and len(data) >= PREFIX.size:
            # What nearly all frames are: one message.
            flag, length = PREFIX.unpack_from(data)
            if length == len(data) - PREFIX.size and flag <= 1 and self._take(data, flag == 1, is_last):
                return
        if self._partial is None:
            self._partial = bytearray()
        if not self._partial:
            self._arrived = time.monotonic()
        self._is_whole = is_last
        try:
            self._hold(len(data))
            self._partial += data
            self._split(self._partial)
        except QuintetError as error:
            self.fail(error)

    def _take(self, data: bytes, is_compressed: bool, is_last: bool) -> bool:
        """Begin with a message that has come whole and alone; False where it cannot begin now."""
        if not self.head.method.is_stream:
            if not is_last or self._give_up is not None:
                return False
            self._is_whole = True
            self._begin(data[PREFIX.size :], is_compressed)
            return True
        if self.is_paused:
            return False
        try:
            self._hold(len(data))
        except Overloaded as error:
            self.fail(error)
            return True
        self._is_whole = is_last
        self._begin_turn(data[PREFIX.size :], is_compressed)
        return True

    def _split(self, partial: bytearray) -> None:
        """Take out the messages that are whole.

        Raises:
            BodyTooLarge: one of them is going to be.
            BadInput: what came is no row of messages, or not one message where there must be one.
        """
        position, is_stream = 0, self.head.method.is_stream
        while not (self._is_over or self.is_paused) and len(partial) - position >= PREFIX.size:
            flag, length = PREFIX.unpack_from(partial, position)
            if flag > 1:
                raise BadInput("The call's body is not a row of gRPC messages.")
            limit = self._service.max_message_bytes
            if length > limit:
                raise BodyTooLarge(
                    f"The message is too large; send at most {limit:,} bytes, also once decompressed."
                )
            start = position + PREFIX.size
            stop = start + length
            if len(partial) < stop:
                break
            if is_stream:
                position = stop
                self._begin_turn(bytes(memoryview(partial)[start:stop]), flag == 1)
                continue
            if len(partial) > stop:
                raise BadInput("The call must have one message; it has more.")
            if not self._is_whole:
                return
            self._partial = None
            self._begin(bytes(memoryview(partial)[start:stop]), flag == 1)
            return
        if position:
            self._arrived = time.monotonic()
            del partial[:position]
        if not self._is_whole or self._is_over or self.is_paused:
            return
        if partial:
            raise BadInput("The call ends in the middle of a message; send all of it.")
        if not is_stream:
            raise BadInput("The call must have one message; it has none.")
        self._advance()

    def closed(self) -> None:
        """Stop what is under way."""
        service = self._service
        self._is_over = True
        service.calls -= 1
        if self._give_up is not None:
            self._give_up()
        for turn in self._turns:
            if turn.give_up is not None:
                turn.give_up()
            self._held += turn.held
        self._turns = _NO_TURNS
        self._partial = None
        if self._held or self._answer_held:
            service.let_go(self._held + self._answer_held)
            self._held = self._answer_held = 0

    def look(self, now: float) -> None:
        """End what the caller has given up, or sends too slowly."""
        if self._is_over:
            return
        # A message that is being answered minds the deadline by itself; a row of them may go on for ever.
        is_idle = self._give_up is None
        is_sending = bool(self._partial) or (is_idle and not self.head.method.is_stream)
        if self.deadline is not None and now > self.deadline and is_idle:
            self.fail(DeadlineExceeded("The deadline passed before the call was over; allow more time."))
        elif is_sending and not self.is_paused and now - self._arrived > BODY_SECONDS:
            self.fail(DeadlineExceeded(f"The message took more than {BODY_SECONDS} s; send it faster."))

    def ask_to_end(self) -> None:
        """End, after what is under way."""
        method = self.head.method
        if method.is_endless or (method.is_stream and not self._turns):
            self.fail(Unavailable(DRAINING))
        elif method.is_stream and not self._is_whole:
            self._is_whole = self._is_sent_away = True
            self._partial = None

    # ---- one message, one answer ----

    def _begin(self, message: bytes, is_compressed: bool) -> None:
        self._give_up = self._work(message, is_compressed, self._tell)

    def _work(self, message: bytes, is_compressed: bool, tell: Tell) -> GiveUp:
        """Have a message answered, without a task if that can be; `tell` gets the answer, framed."""
        head = self.head
        ask = head.method.ask
        if ask is not None and not is_compressed and head.coding is None:
            give_up = ask(self, message, partial(_tell_framed, tell))
            if give_up is not None:
                return give_up
        return asyncio.get_running_loop().create_task(self._run(message, is_compressed, tell)).cancel

    async def _run(self, message: bytes, is_compressed: bool, tell: Tell) -> None:
        try:
            answer: Answered = await self._answered(message, is_compressed)
        except QuintetError as error:
            # A traceback holds this frame, and the frame the error: a cycle for the garbage collector.
            answer = error.with_traceback(None)
        tell(answer)

    def _tell(self, framed: Answered) -> None:
        """Send the one answer, framed, or the error in its place."""
        self._give_up = None
        if self._is_over:
            return
        if isinstance(framed, QuintetError):
            self.fail(framed)
            return
        try:
            if not self.fits(len(framed)):
                self._hold(len(framed))
        except Overloaded as error:
            self.fail(error)
            return
        coding = self.head.coding
        self._is_over = True
        self.answer(HEADERS if coding is None else HEADERS_BY_CODING[coding], framed, OK + self.more)

    async def _answered(self, message: bytes, is_compressed: bool) -> bytes:
        """The answer to a message, framed.

        Raises:
            QuintetError: there is none.
        """
        head = self.head
        method = head.method
        held = 0
        try:
            if is_compressed:
                message = await self._decompressed(message)
                self._service.hold(len(message))
                held = len(message)
            if self.deadline is None or method.keeps_deadline:
                answer = await method.answer(self, message)
            else:
                async with asyncio.timeout(self.deadline - time.monotonic()):
                    answer = await method.answer(self, message)
            if head.coding is not None and len(answer) >= WORTH_COMPRESSING:
                answer = await off_the_loop(len(answer), compress, answer, head.coding)
                return _framed(answer, is_compressed=True)
            return _framed(answer)
        except QuintetError:
            raise
        except TimeoutError:
            raise DeadlineExceeded("The deadline passed before the answer; allow more time.") from None
        except Exception:
            failure = InternalError()
            log.exception("a call failed", id=failure.id)
            raise failure from None
        finally:
            self._service.let_go(held)

    async def _decompressed(self, message: bytes) -> bytes:
        coding = self.head.coding
        if coding is None:
            raise BadInput("The message says that it is compressed; the call names no grpc-encoding.")
        limit = self._service.max_message_bytes
        return await off_the_loop(len(message), decompress, message, coding, limit)

    # ---- any number of messages ----

    def _begin_turn(self, message: bytes, is_compressed: bool) -> None:
        # What is held for the message is let go with its answer.
        turn = _Turn(len(message) + PREFIX.size)
        self._held -= turn.held
        self._turns.append(turn)
        turn.give_up = self._work(message, is_compressed, partial(self._end_turn, turn))
        if len(self._turns) >= AHEAD:
            self.pause()

    def _end_turn(self, turn: _Turn, framed: Answered) -> None:
        turn.answer, turn.give_up = framed, None
        # Not at once: the answers of one batch leave together.
        if not self._is_booked and not self._is_over and turn is self._turns[0]:
            self._is_booked = True
            asyncio.get_running_loop().call_soon(self._advance)

    def _advance(self) -> None:
        """Send the answers that are next; end after the last."""
        self._is_booked = False
        if self._is_over:
            return
        turns, service = self._turns, self._service
        if self._answer_held and not self.unsent:
            service.let_go(self._answer_held)
            self._answer_held = 0
        failure: QuintetError | None = None
        while failure is None and turns and turns[0].answer is not None and not self.unsent:
            answers, size = [], 0
            while turns and size < LARGEST_FRAME:
                answer = turns[0].answer
                if answer is None:
                    break
                service.let_go(turns.popleft().held)
                if isinstance(answer, QuintetError):
                    failure = answer
                    break
                answers.append(answer)
                size += len(answer)
            try:
                if not self.fits(size):
                    service.hold(size)
                    self._answer_held = size
            except Overloaded as error:
                failure = error
            else:
                self._start()
                self.write(b"".join(answers))
        if failure is None and self.is_paused and len(turns) < AHEAD and not self.unsent:
            self._arrived = time.monotonic()
            self.resume()
            try:
                self._split(self._partial or bytearray())
            except QuintetError as error:
                failure = error
        if failure is not None:
            self.fail(failure, after_all=True)
        elif self._is_whole and not turns and not self._partial and not self._is_over:
            if self._is_sent_away:
                self.fail(Unavailable(DRAINING))
                return
            self._is_over = True
            self._start()
            self.end(OK + self.more)

    def sent(self) -> None:
        """Go on with what waited for room."""
        if self.head.method.is_stream:
            self._advance()

    def send(self, answer: bytes) -> None:
        """Send one answer of several."""
        if not self._is_over:
            self._start()
            self.write(_framed(answer))

    def _start(self) -> None:
        if not self._has_started:
            self._has_started = True
            coding = self.head.coding
            self.start(HEADERS if coding is None else HEADERS_BY_CODING[coding])

    # ---- the end ----

    def fail(self, error: QuintetError, *, after_all: bool = False) -> None:
        """End the call with an error, in the place of what still waits for room or `after_all` of it."""
        if self.is_closed:
            return
        self._is_over = True
        block = trailers(error) + self.more
        if not self._has_started:
            block = HEADERS + block
        if after_all:
            self.end(block)
        else:
            self.end_now(block)

    def _hold(self, size: int) -> None:
        self._service.hold(size)
        self._held += size


_NO_TURNS: Final[deque[_Turn]] = deque(maxlen=0)
"""Of calls that have one message; nobody adds to it."""
