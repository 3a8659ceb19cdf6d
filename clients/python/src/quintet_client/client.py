"""The two clients: the same verbs, one blocking and one to await.

A verb turns its arguments into a `Question`. A protocol (`over_http`, `over_grpc`) holds the
conversation that answers it, without any I/O; a carrier does the I/O. All that is left to
the clients is to carry each request of the conversation, with retries, in one time limit,
and to keep several conversations going where there are many inputs.
"""

# A str is itself an iterable of str, so the signatures for one input and for several overlap;
# checkers take the first that fits, which is the one meant.
# mypy: disable-error-code="overload-overlap"

import asyncio
import os
import time
from collections import deque
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from types import TracebackType
from typing import Any, ClassVar, TypeVar, overload
from urllib.parse import urlsplit

import stamina

from quintet_client import progress as bars
from quintet_client import questions
from quintet_client.errors import BadInput, DeadlineExceeded, QuintetError, Unavailable
from quintet_client.over_http import AsyncHttpCarrier, HttpCarrier, HttpProtocol
from quintet_client.patience import Patience
from quintet_client.pictures import Picture
from quintet_client.questions import Question, Result
from quintet_client.results import Classification, Detection, Generated, Status

Outcome = TypeVar("Outcome")
Conversation = Generator[Any, Any, Outcome]

MODELS = ("digit", "image", "sentiment", "generator", "detection")
"""What a service is asked about when it is asked how it is."""

_TEN_DIGITS = tuple(range(10))
_GRPC_PORTS = {"grpc": 3001, "grpcs": 443}
_END = object()


class _BaseClient:
    """What both clients do alike: they keep their arguments, and choose the protocol by the address."""

    _is_async: ClassVar[bool]

    def __init__(
        self,
        url: str = "http://localhost:3000",
        *,
        timeout: float = 10.0,
        retries: int = 3,
        in_flight: int = 8,
        outage: float = 60.0,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        ca_file: str | os.PathLike[str] | None = None,
    ) -> None:
        """Prepare to ask the service at `url`; nothing is sent yet.

        Args:
            url: `http://`, `https://`, `grpc://` or `grpcs://`, then host and port.
            timeout: Seconds that one call may take in all, retries and waits included; in a stream,
                that one try of one input may take.
            retries: How often a refused request or a lost connection is tried again.
            in_flight: How many requests of a stream, or of a long list, are under way at one time.
            outage: Seconds for which a stream waits for a service that is gone, before it gives up.
            key: The service's key, where it wants one.
            headers: Further headers (gRPC: metadata) for every request.
            ca_file: A PEM file of the certificates to trust, for a service whose own is signed by itself
                or by nobody well known.

        Raises:
            ValueError: an argument makes no sense.
            OSError: the file of certificates cannot be read.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https", *_GRPC_PORTS) or not parts.hostname:
            raise ValueError(f"The address must look like http://host:3000 or grpc://host:3001, not {url!r}.")
        if timeout <= 0 or outage <= 0 or retries < 0 or in_flight < 1:
            raise ValueError(
                "timeout and outage must be more than 0 seconds, retries 0 or more, and in_flight 1 or more."
            )
        self.timeout = timeout
        self.retries = retries
        self.in_flight = in_flight
        self.outage = outage
        sent = {name.lower(): value for name, value in (headers or {}).items()}
        if key is not None:
            sent["authorization"] = f"Bearer {key}"
        if parts.scheme in _GRPC_PORTS:
            # Imported here because it takes a while, and who speaks HTTP need not wait for it.
            from quintet_client import over_grpc

            port = parts.port or _GRPC_PORTS[parts.scheme]
            host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
            grpc_carrier = over_grpc.AsyncGrpcCarrier if self._is_async else over_grpc.GrpcCarrier
            self._protocol: Any = over_grpc.GrpcProtocol()
            self._carrier: Any = grpc_carrier(f"{host}:{port}", parts.scheme == "grpcs", sent, ca_file)
        else:
            _ = parts.port  # raises ValueError now, rather than at the first question
            sent.setdefault("user-agent", f"quintet-client/{version('quintet-client')}")
            http_carrier = AsyncHttpCarrier if self._is_async else HttpCarrier
            self._protocol = HttpProtocol()
            self._carrier = http_carrier(url, sent, ca_file)

    def _patience(self, timeout: float | None, *, in_a_stream: bool = False) -> Patience:
        seconds = self.timeout if timeout is None else timeout
        if seconds <= 0:
            raise ValueError("The timeout must be more than 0 seconds.")
        return Patience.of_a_stream(seconds, self.outage) if in_a_stream else Patience(seconds, self.retries)


def _is_one(question: Question[Result], given: object) -> bool:
    """Whether a verb was given one input; what is neither one nor several is refused as one."""
    return question.is_one(given) or not isinstance(given, Iterable | AsyncIterable)


def _bar(question: Question[Result], is_asked: bool, total: int | None) -> Any:
    return bars.bar(question.model, total) if is_asked else bars.no_bar()


def _placed(error: BadInput, first: int, count: int) -> BadInput:
    """The same refusal with the input's place among all, where its request held `count` from `first` on."""
    if count == 1:
        error.index = first
    elif error.index is not None:
        error.index += first
    return error


class Client(_BaseClient):
    """Asks a service, and waits for its answers. Threads may share one.

        with Client("http://localhost:3000") as quintet:
            quintet.digit("seven.png").label

    A single input gives a single result; a list gives a list, in order; an iterator gives an
    iterator of results in the same order, with `in_flight` requests under way. Every verb raises
    a `QuintetError` when there is no answer, and `OSError` when a picture's file cannot be
    read. Every verb takes `timeout`, in the place of the client's own, and `progress=True` for
    a bar on standard error.
    """

    _is_async = False

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._carrier.close()

    @overload
    def digit(
        self, picture: Picture, *, timeout: float | None = None, progress: bool = False
    ) -> Classification: ...
    @overload
    def digit(
        self, picture: Iterator[Picture], *, timeout: float | None = None, progress: bool = False
    ) -> Iterator[Classification]: ...
    @overload
    def digit(
        self, picture: Iterable[Picture], *, timeout: float | None = None, progress: bool = False
    ) -> list[Classification]: ...
    def digit(self, picture: Any, *, timeout: float | None = None, progress: bool = False) -> Any:
        """Read the handwritten digit in a picture: labels "0" to "9"."""
        return self._answer(questions.classify("digit"), picture, timeout, progress)

    @overload
    def image(
        self, picture: Picture, *, timeout: float | None = None, progress: bool = False
    ) -> Classification: ...
    @overload
    def image(
        self, picture: Iterator[Picture], *, timeout: float | None = None, progress: bool = False
    ) -> Iterator[Classification]: ...
    @overload
    def image(
        self, picture: Iterable[Picture], *, timeout: float | None = None, progress: bool = False
    ) -> list[Classification]: ...
    def image(self, picture: Any, *, timeout: float | None = None, progress: bool = False) -> Any:
        """Name what a picture shows.

        One of airplane, automobile, bird, cat, deer, dog, frog, horse, ship and truck.
        """
        return self._answer(questions.classify("image"), picture, timeout, progress)

    @overload
    def sentiment(
        self, text: str, *, timeout: float | None = None, progress: bool = False
    ) -> Classification: ...
    @overload
    def sentiment(
        self, text: Iterator[str], *, timeout: float | None = None, progress: bool = False
    ) -> Iterator[Classification]: ...
    @overload
    def sentiment(
        self, text: Iterable[str], *, timeout: float | None = None, progress: bool = False
    ) -> list[Classification]: ...
    def sentiment(self, text: Any, *, timeout: float | None = None, progress: bool = False) -> Any:
        """Tell whether a text is "positive" or "negative"."""
        return self._answer(questions.judge(), text, timeout, progress)

    @overload
    def detection(
        self,
        picture: Picture,
        min_confidence: float = 0.5,
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> Detection: ...
    @overload
    def detection(
        self,
        picture: Iterator[Picture],
        min_confidence: float = 0.5,
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> Iterator[Detection]: ...
    @overload
    def detection(
        self,
        picture: Iterable[Picture],
        min_confidence: float = 0.5,
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> list[Detection]: ...
    def detection(
        self,
        picture: Any,
        min_confidence: float = 0.5,
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> Any:
        """Find blood cells in a picture, leaving out what the model is less sure of than `min_confidence`."""
        return self._answer(questions.detect(min_confidence), picture, timeout, progress)

    @overload
    def generator(
        self, digits: int, seed: int | None = None, *, timeout: float | None = None, progress: bool = False
    ) -> Generated: ...
    @overload
    def generator(
        self,
        digits: Iterator[int],
        seed: int | None = None,
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> Iterator[Generated]: ...
    @overload
    def generator(
        self,
        digits: Iterable[int] | None = None,
        seed: int | None = None,
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> list[Generated]: ...
    def generator(
        self,
        digits: Any = None,
        seed: int | None = None,
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> Any:
        """Draw digits, all ten if none is named; the same `seed` draws the same picture again."""
        wanted = _TEN_DIGITS if digits is None else digits
        return self._answer(questions.draw(seed), wanted, timeout, progress)

    def is_ready(self) -> bool:
        """Whether the service takes requests now: False too when none answers. Asks once."""
        try:
            conversation: Conversation[bool] = self._protocol.is_ready()
            return self._hold(conversation, Patience(self.timeout, retries=0))
        except (Unavailable, DeadlineExceeded):
            return False

    def status(self) -> Status:
        """How the service is, and which versions of which models it serves. Asks once."""
        conversation: Conversation[Status] = self._protocol.status(MODELS)
        return self._hold(conversation, Patience(self.timeout, retries=0))

    def _answer(self, question: Question[Result], given: Any, timeout: float | None, is_shown: bool) -> Any:
        """Answer in the form that the inputs came in: one, an iterator or a list."""
        if _is_one(question, given):
            with _bar(question, is_shown, 1) as count:
                (result,) = self._ask(question, [question.prepare(given, None)], self._patience(timeout))
                count(1)
            return result
        if isinstance(given, Iterator):
            self._patience(timeout)  # a time limit that cannot be is refused here, not at the first answer
            return self._stream(question, given, timeout, is_shown)
        prepared = [question.prepare(one, index) for index, one in enumerate(given)]
        parts = list(questions.in_parts(prepared))
        # One time limit for the whole list, however many requests it takes.
        patiences = [self._patience(timeout) for _ in parts]

        def ask(first: int, part: list[Any], patience: Patience) -> list[Result]:
            try:
                return self._ask(question, part, patience)
            except BadInput as error:
                raise _placed(error, first, len(part)) if len(parts) > 1 else error from None

        with _bar(question, is_shown, len(prepared)) as count:
            if len(parts) == 1:  # most lists are short, and need no threads
                results = ask(0, parts[0], patiences[0])
                count(len(results))
                return results
            results = []
            jobs = [_job(ask, *each) for each in zip(_starts(parts), parts, patiences, strict=True)]
            for answered in self._in_order(iter(jobs), patiences):
                results += answered
                count(len(answered))
            return results

    def _stream(
        self, question: Question[Result], given: Iterator[Any], timeout: float | None, is_shown: bool
    ) -> Iterator[Result]:
        """Answer one input after the other, a request each, while later ones are under way."""
        patiences: deque[Patience] = deque(maxlen=self.in_flight)

        def ask(index: int, one: Any, patience: Patience) -> Result:
            try:
                return self._ask(question, [question.prepare(one, index)], patience)[0]
            except BadInput as error:
                raise _placed(error, index, 1) from None

        def jobs() -> Iterator[Callable[[], Result]]:
            for index, one in enumerate(given):
                patiences.append(self._patience(timeout, in_a_stream=True))
                yield _job(ask, index, one, patiences[-1])

        with _bar(question, is_shown, None) as count:
            for result in self._in_order(jobs(), patiences):
                count(1)
                yield result

    def _in_order(
        self, jobs: Iterator[Callable[[], Outcome]], patiences: Iterable[Patience]
    ) -> Iterator[Outcome]:
        """Do `in_flight` jobs at a time, in threads; their outcomes in the order of the jobs."""
        pool = ThreadPoolExecutor(self.in_flight, thread_name_prefix="quintet")
        under_way: deque[Future[Outcome]] = deque()
        try:
            for job in jobs:
                under_way.append(pool.submit(job))
                while under_way and (len(under_way) == self.in_flight or under_way[0].done()):
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            # Left early, by an error or by a caller who has enough: nobody waits for the rest.
            for patience in list(patiences):
                patience.end()
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, question: Question[Result], prepared: list[Any], patience: Patience) -> list[Result]:
        """Answer what goes into one request."""
        started = time.perf_counter()
        results = self._hold(self._protocol.ask(question, question.pack(prepared)), patience)
        return question.complete(results, prepared, time.perf_counter() - started)

    def _hold(self, conversation: Conversation[Outcome], patience: Patience) -> Outcome:
        """Carry each request of a conversation, until it has its outcome."""
        step: Callable[[], Any] = lambda: next(conversation)  # noqa: E731
        while True:
            try:
                request = step()
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome
            try:
                for attempt in stamina.retry_context(patience.wait_after, patience.attempts, timeout=None):
                    with attempt:
                        reply = self._carrier.send(request, patience.seconds_left())
            except QuintetError as error:
                step = _job(conversation.throw, error)
            else:
                step = _job(conversation.send, reply)


class AsyncClient(_BaseClient):
    """Asks a service without blocking the event loop: `Client`, with every verb to be awaited.

        async with AsyncClient("grpc://localhost:3001") as quintet:
            (await quintet.digit("seven.png")).label
            async for answer in quintet.digit(iter(paths)):
                answer.label

    An iterator, of either kind, gives an asynchronous iterator, which is not awaited.
    """

    _is_async = True

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._carrier.close()

    @overload
    def digit(
        self, picture: Picture, *, timeout: float | None = None, progress: bool = False
    ) -> Awaitable[Classification]: ...
    @overload
    def digit(
        self,
        picture: Iterator[Picture] | AsyncIterator[Picture],
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> AsyncIterator[Classification]: ...
    @overload
    def digit(
        self, picture: Iterable[Picture], *, timeout: float | None = None, progress: bool = False
    ) -> Awaitable[list[Classification]]: ...
    def digit(self, picture: Any, *, timeout: float | None = None, progress: bool = False) -> Any:
        """See `Client.digit`."""
        return self._answer(questions.classify("digit"), picture, timeout, progress)

    @overload
    def image(
        self, picture: Picture, *, timeout: float | None = None, progress: bool = False
    ) -> Awaitable[Classification]: ...
    @overload
    def image(
        self,
        picture: Iterator[Picture] | AsyncIterator[Picture],
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> AsyncIterator[Classification]: ...
    @overload
    def image(
        self, picture: Iterable[Picture], *, timeout: float | None = None, progress: bool = False
    ) -> Awaitable[list[Classification]]: ...
    def image(self, picture: Any, *, timeout: float | None = None, progress: bool = False) -> Any:
        """See `Client.image`."""
        return self._answer(questions.classify("image"), picture, timeout, progress)

    @overload
    def sentiment(
        self, text: str, *, timeout: float | None = None, progress: bool = False
    ) -> Awaitable[Classification]: ...
    @overload
    def sentiment(
        self,
        text: Iterator[str] | AsyncIterator[str],
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> AsyncIterator[Classification]: ...
    @overload
    def sentiment(
        self, text: Iterable[str], *, timeout: float | None = None, progress: bool = False
    ) -> Awaitable[list[Classification]]: ...
    def sentiment(self, text: Any, *, timeout: float | None = None, progress: bool = False) -> Any:
        """See `Client.sentiment`."""
        return self._answer(questions.judge(), text, timeout, progress)

    @overload
    def detection(
        self,
        picture: Picture,
        min_confidence: float = 0.5,
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> Awaitable[Detection]: ...
    @overload
    def detection(
        self,
        picture: Iterator[Picture] | AsyncIterator[Picture],
        min_confidence: float = 0.5,
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> AsyncIterator[Detection]: ...
    @overload
    def detection(
        self,
        picture: Iterable[Picture],
        min_confidence: float = 0.5,
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> Awaitable[list[Detection]]: ...
    def detection(
        self,
        picture: Any,
        min_confidence: float = 0.5,
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> Any:
        """See `Client.detection`."""
        return self._answer(questions.detect(min_confidence), picture, timeout, progress)

    @overload
    def generator(
        self, digits: int, seed: int | None = None, *, timeout: float | None = None, progress: bool = False
    ) -> Awaitable[Generated]: ...
    @overload
    def generator(
        self,
        digits: Iterator[int] | AsyncIterator[int],
        seed: int | None = None,
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> AsyncIterator[Generated]: ...
    @overload
    def generator(
        self,
        digits: Iterable[int] | None = None,
        seed: int | None = None,
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> Awaitable[list[Generated]]: ...
    def generator(
        self,
        digits: Any = None,
        seed: int | None = None,
        *,
        timeout: float | None = None,
        progress: bool = False,
    ) -> Any:
        """See `Client.generator`."""
        wanted = _TEN_DIGITS if digits is None else digits
        return self._answer(questions.draw(seed), wanted, timeout, progress)

    async def is_ready(self) -> bool:
        """See `Client.is_ready`."""
        try:
            conversation: Conversation[bool] = self._protocol.is_ready()
            return await self._hold(conversation, Patience(self.timeout, retries=0))
        except (Unavailable, DeadlineExceeded):
            return False

    async def status(self) -> Status:
        """See `Client.status`."""
        conversation: Conversation[Status] = self._protocol.status(MODELS)
        return await self._hold(conversation, Patience(self.timeout, retries=0))

    def _answer(self, question: Question[Result], given: Any, timeout: float | None, is_shown: bool) -> Any:
        """See `Client._answer`; an iterator is the only form that is not awaited."""
        if _is_one(question, given):
            return self._one(question, given, timeout, is_shown)
        if isinstance(given, Iterator | AsyncIterator):
            return self._stream(question, given, timeout, is_shown)
        return self._list(question, given, timeout, is_shown)

    async def _one(
        self, question: Question[Result], given: Any, timeout: float | None, is_shown: bool
    ) -> Result:
        with _bar(question, is_shown, 1) as count:
            prepared = await asyncio.to_thread(question.prepare, given, None)
            (result,) = await self._ask(question, [prepared], self._patience(timeout))
            count(1)
        return result

    async def _list(
        self, question: Question[Result], given: Iterable[Any], timeout: float | None, is_shown: bool
    ) -> list[Result]:
        def prepare() -> list[Any]:
            return [question.prepare(one, index) for index, one in enumerate(given)]

        prepared = await asyncio.to_thread(prepare)
        parts = list(questions.in_parts(prepared))
        patiences = [self._patience(timeout) for _ in parts]

        async def ask(first: int, part: list[Any], patience: Patience) -> list[Result]:
            try:
                return await self._ask(question, part, patience)
            except BadInput as error:
                raise _placed(error, first, len(part)) if len(parts) > 1 else error from None

        async def jobs() -> AsyncIterator[Coroutine[Any, Any, list[Result]]]:
            for each in zip(_starts(parts), parts, patiences, strict=True):
                yield ask(*each)

        results: list[Result] = []
        with _bar(question, is_shown, len(prepared)) as count:
            async for answered in self._in_order(jobs()):
                results += answered
                count(len(answered))
        return results

    async def _stream(
        self,
        question: Question[Result],
        given: Iterator[Any] | AsyncIterator[Any],
        timeout: float | None,
        is_shown: bool,
    ) -> AsyncIterator[Result]:
        """See `Client._stream`."""

        async def ask(index: int, one: Any, patience: Patience) -> Result:
            try:
                prepared = await asyncio.to_thread(question.prepare, one, index)
                return (await self._ask(question, [prepared], patience))[0]
            except BadInput as error:
                raise _placed(error, index, 1) from None

        async def jobs() -> AsyncIterator[Coroutine[Any, Any, Result]]:
            index = 0
            async for one in _without_blocking(given):
                yield ask(index, one, self._patience(timeout, in_a_stream=True))
                index += 1

        with _bar(question, is_shown, None) as count:
            async for result in self._in_order(jobs()):
                count(1)
                yield result

    async def _in_order(self, jobs: AsyncIterator[Coroutine[Any, Any, Outcome]]) -> AsyncIterator[Outcome]:
        """Do `in_flight` jobs at a time; their outcomes in the order of the jobs."""
        under_way: deque[asyncio.Task[Outcome]] = deque()
        try:
            async for job in jobs:
                under_way.append(asyncio.ensure_future(job))
                while under_way and (len(under_way) == self.in_flight or under_way[0].done()):
                    yield await under_way[0]
                    under_way.popleft()
            while under_way:
                yield await under_way[0]
                under_way.popleft()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _ask(self, question: Question[Result], prepared: list[Any], patience: Patience) -> list[Result]:
        """See `Client._ask`."""
        started = time.perf_counter()
        results = await self._hold(self._protocol.ask(question, question.pack(prepared)), patience)
        return question.complete(results, prepared, time.perf_counter() - started)

    async def _hold(self, conversation: Conversation[Outcome], patience: Patience) -> Outcome:
        """See `Client._hold`."""
        step: Callable[[], Any] = lambda: next(conversation)  # noqa: E731
        while True:
            try:
                request = step()
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome
            try:
                async for attempt in stamina.retry_context(
                    patience.wait_after, patience.attempts, timeout=None
                ):
                    with attempt:
                        reply = await self._carrier.send(request, patience.seconds_left())
            except QuintetError as error:
                step = _job(conversation.throw, error)
            else:
                step = _job(conversation.send, reply)


def _job(call: Callable[..., Outcome], *arguments: Any) -> Callable[[], Outcome]:
    """The call with its arguments, to be done later."""
    return lambda: call(*arguments)


def _starts(parts: list[list[Any]]) -> Iterator[int]:
    """The place of each part's first input among all."""
    start = 0
    for part in parts:
        yield start
        start += len(part)


async def _without_blocking(given: Iterator[Any] | AsyncIterator[Any]) -> AsyncIterator[Any]:
    """What an iterator of either kind gives: one that may block is asked in a thread."""
    if isinstance(given, AsyncIterator):
        async for one in given:
            yield one
        return
    while (one := await asyncio.to_thread(next, given, _END)) is not _END:
        yield one
