"""The two clients: the same verbs, one blocking and one to await.

A verb turns its arguments into a `Question`. A protocol (`over_http`, `over_grpc`) holds the
conversation that answers it, without any I/O; a carrier does the I/O. All that is left to
the clients is to carry each request of the conversation, with retries, in one time limit.
"""

# A str is itself a sequence of str, so the signatures for one input and for several overlap;
# checkers take the first that fits, which is the one meant.
# mypy: disable-error-code="overload-overlap"

import asyncio
from collections.abc import Generator, Iterable, Mapping, Sequence
from importlib.metadata import version
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar, overload
from urllib.parse import urlsplit

import stamina

from quintet_client import questions
from quintet_client.errors import DeadlineExceeded, Unavailable
from quintet_client.over_http import AsyncHttpCarrier, HttpCarrier, HttpProtocol
from quintet_client.patience import Patience
from quintet_client.pictures import Picture
from quintet_client.questions import Question, Result
from quintet_client.results import Classification, Detection, Generated

Outcome = TypeVar("Outcome")
Conversation = Generator[Any, Any, Outcome]

_GRPC_PORTS = {"grpc": 3001, "grpcs": 443}


class _BaseClient:
    """What both clients do alike: they keep their arguments, and choose the protocol by the address."""

    _is_async: ClassVar[bool]

    def __init__(
        self,
        url: str = "http://localhost:3000",
        *,
        timeout: float = 10.0,
        retries: int = 3,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare to ask the service at `url`; nothing is sent yet.

        Args:
            url: `http://`, `https://`, `grpc://` or `grpcs://`, then host and port.
            timeout: Seconds that one call may take in all, retries and waits included.
            retries: How often a refused request or a lost connection is tried again.
            key: The service's key, where it wants one.
            headers: Further headers (gRPC: metadata) for every request.

        Raises:
            ValueError: an argument makes no sense.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https", *_GRPC_PORTS) or not parts.hostname:
            raise ValueError(f"The address must look like http://host:3000 or grpc://host:3001, not {url!r}.")
        if timeout <= 0 or retries < 0:
            raise ValueError("The timeout must be more than 0 seconds, and retries 0 or more.")
        self.timeout = timeout
        self.retries = retries
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
            self._carrier: Any = grpc_carrier(f"{host}:{port}", parts.scheme == "grpcs", sent)
        else:
            sent.setdefault("user-agent", f"quintet-client/{version('quintet-client')}")
            http_carrier = AsyncHttpCarrier if self._is_async else HttpCarrier
            self._protocol = HttpProtocol()
            self._carrier = http_carrier(url, sent)


class Client(_BaseClient):
    """Asks a service, and waits for its answers. Threads may share one.

        with Client("http://localhost:3000") as quintet:
            quintet.digit("seven.png").label

    A single input gives a single result; a list gives a list, in order. Every verb
    raises a `QuintetError` when there is no answer, and `OSError` when a picture's file cannot
    be read.
    """

    _is_async = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._carrier.close()

    @overload
    def digit(self, picture: Picture) -> Classification: ...
    @overload
    def digit(self, picture: Sequence[Picture]) -> list[Classification]: ...
    def digit(self, picture: Picture | Sequence[Picture]) -> Classification | list[Classification]:
        """Read the handwritten digit in a picture: labels "0" to "9"."""
        return self._ask(questions.classify("digit", picture))

    @overload
    def image(self, picture: Picture) -> Classification: ...
    @overload
    def image(self, picture: Sequence[Picture]) -> list[Classification]: ...
    def image(self, picture: Picture | Sequence[Picture]) -> Classification | list[Classification]:
        """Name what a picture shows.

        One of airplane, automobile, bird, cat, deer, dog, frog, horse, ship and truck.
        """
        return self._ask(questions.classify("image", picture))

    @overload
    def sentiment(self, text: str) -> Classification: ...
    @overload
    def sentiment(self, text: Sequence[str]) -> list[Classification]: ...
    def sentiment(self, text: str | Sequence[str]) -> Classification | list[Classification]:
        """Tell whether a text is "positive" or "negative"."""
        return self._ask(questions.judge(text))

    @overload
    def detection(self, picture: Picture, min_confidence: float = 0.5) -> Detection: ...
    @overload
    def detection(self, picture: Sequence[Picture], min_confidence: float = 0.5) -> list[Detection]: ...
    def detection(
        self, picture: Picture | Sequence[Picture], min_confidence: float = 0.5
    ) -> Detection | list[Detection]:
        """Find blood cells in a picture, leaving out what the model is less sure of than `min_confidence`."""
        return self._ask(questions.detect(picture, min_confidence))

    @overload
    def generator(self, digits: int, seed: int | None = None) -> Generated: ...
    @overload
    def generator(self, digits: Iterable[int] | None = None, seed: int | None = None) -> list[Generated]: ...
    def generator(
        self, digits: int | Iterable[int] | None = None, seed: int | None = None
    ) -> Generated | list[Generated]:
        """Draw digits, all ten if none is named; the same `seed` draws the same picture again."""
        return self._ask(questions.draw(digits, seed))

    def is_ready(self) -> bool:
        """Whether the service takes requests now: False too when none answers. Asks once."""
        try:
            conversation: Conversation[bool] = self._protocol.is_ready()
            return self._hold(conversation, Patience(self.timeout, retries=0))
        except (Unavailable, DeadlineExceeded):
            return False

    def _ask(self, question: Question[Result]) -> Result | list[Result]:
        """Answer a question within the time limit; a question about nothing needs no service."""
        if not question.inputs:
            return []
        return question.shape(self._hold(self._protocol.ask(question), Patience(self.timeout, self.retries)))

    def _hold(self, conversation: Conversation[Outcome], patience: Patience) -> Outcome:
        """Carry each request of a conversation, until it has its outcome."""
        reply = None
        while True:
            try:
                request = conversation.send(reply)
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome
            for attempt in stamina.retry_context(patience.wait_after, patience.attempts, timeout=None):
                with attempt:
                    reply = self._carrier.send(request, patience.seconds_left())


class AsyncClient(_BaseClient):
    """Asks a service without blocking the event loop: `Client`, with every verb to be awaited.

    async with AsyncClient("grpc://localhost:3001") as quintet:
        (await quintet.digit("seven.png")).label
    """

    _is_async = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._carrier.close()

    @overload
    async def digit(self, picture: Picture) -> Classification: ...
    @overload
    async def digit(self, picture: Sequence[Picture]) -> list[Classification]: ...
    async def digit(self, picture: Picture | Sequence[Picture]) -> Classification | list[Classification]:
        """See `Client.digit`."""
        return await self._ask(await asyncio.to_thread(questions.classify, "digit", picture))

    @overload
    async def image(self, picture: Picture) -> Classification: ...
    @overload
    async def image(self, picture: Sequence[Picture]) -> list[Classification]: ...
    async def image(self, picture: Picture | Sequence[Picture]) -> Classification | list[Classification]:
        """See `Client.image`."""
        return await self._ask(await asyncio.to_thread(questions.classify, "image", picture))

    @overload
    async def sentiment(self, text: str) -> Classification: ...
    @overload
    async def sentiment(self, text: Sequence[str]) -> list[Classification]: ...
    async def sentiment(self, text: str | Sequence[str]) -> Classification | list[Classification]:
        """See `Client.sentiment`."""
        return await self._ask(questions.judge(text))

    @overload
    async def detection(self, picture: Picture, min_confidence: float = 0.5) -> Detection: ...
    @overload
    async def detection(self, picture: Sequence[Picture], min_confidence: float = 0.5) -> list[Detection]: ...
    async def detection(
        self, picture: Picture | Sequence[Picture], min_confidence: float = 0.5
    ) -> Detection | list[Detection]:
        """See `Client.detection`."""
        return await self._ask(await asyncio.to_thread(questions.detect, picture, min_confidence))

    @overload
    async def generator(self, digits: int, seed: int | None = None) -> Generated: ...
    @overload
    async def generator(
        self, digits: Iterable[int] | None = None, seed: int | None = None
    ) -> list[Generated]: ...
    async def generator(
        self, digits: int | Iterable[int] | None = None, seed: int | None = None
    ) -> Generated | list[Generated]:
        """See `Client.generator`."""
        return await self._ask(questions.draw(digits, seed))

    async def is_ready(self) -> bool:
        """See `Client.is_ready`."""
        try:
            conversation: Conversation[bool] = self._protocol.is_ready()
            return await self._hold(conversation, Patience(self.timeout, retries=0))
        except (Unavailable, DeadlineExceeded):
            return False

    async def _ask(self, question: Question[Result]) -> Result | list[Result]:
        """See `Client._ask`."""
        if not question.inputs:
            return []
        patience = Patience(self.timeout, self.retries)
        return question.shape(await self._hold(self._protocol.ask(question), patience))

    async def _hold(self, conversation: Conversation[Outcome], patience: Patience) -> Outcome:
        """See `Client._hold`."""
        reply = None
        while True:
            try:
                request = conversation.send(reply)
            except StopIteration as end:
                outcome: Outcome = end.value
                return outcome
            async for attempt in stamina.retry_context(patience.wait_after, patience.attempts, timeout=None):
                with attempt:
                    reply = await self._carrier.send(request, patience.seconds_left())
