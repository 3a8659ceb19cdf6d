"""What a caller wants to know, before any protocol has a say in it.

Both clients turn their arguments into the same `Question`, and both protocols
answer it, so a verb means the same four times.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from quintet_client import pictures
from quintet_client.errors import BadInput, ServerError
from quintet_client.results import Classification, Detection, Generated

Result = TypeVar("Result", Classification, Detection, Generated)

MOST_TOGETHER = 64
"""Inputs in one request: enough for the service to batch, few enough to stay under its limits."""

MOST_BYTES_TOGETHER = 8 * 1024 * 1024
"""Half of what a service takes by default; one larger input goes alone."""


@dataclass(frozen=True)
class Pictures:
    """Encoded pictures; `min_confidence` for a model that finds things in them."""

    encoded: Sequence[bytes]
    min_confidence: float | None = None

    def __len__(self) -> int:
        """How many results are due."""
        return len(self.encoded)


@dataclass(frozen=True)
class Texts:
    """Texts to read."""

    texts: Sequence[str]

    def __len__(self) -> int:
        """How many results are due."""
        return len(self.texts)


@dataclass(frozen=True)
class Digits:
    """Digits to draw; without a seed, of the service's choice."""

    digits: Sequence[int]
    seed: int | None

    def __len__(self) -> int:
        """How many results are due."""
        return len(self.digits)


Inputs = Pictures | Texts | Digits
"""What goes into one request."""


@dataclass(frozen=True)
class Question(Generic[Result]):
    """What one verb asks about each of its inputs.

    Attributes:
        model: The model to ask.
        result: The type of one result.
        is_one: Whether a caller's value is one input, rather than several.
        prepare: One input and its place among several, to what is sent for it.
        pack: What is sent for several, in one request.
    """

    model: str
    result: type[Result]
    is_one: Callable[[Any], bool]
    prepare: Callable[[Any, int | None], Any]
    pack: Callable[[list[Any]], Inputs]

    def complete(self, results: list[Result], prepared: list[Any], seconds: float) -> list[Result]:
        """The results with all that only the caller's side knows.

        Raises:
            ServerError: there are more or fewer results than inputs.
        """
        if len(results) != len(prepared):
            raise ServerError(f"The server gave {len(results)} results for {len(prepared)} inputs.")
        known: list[dict[str, Any]] = [{"seconds": seconds} for _ in results]
        if self.result is Detection:
            known = [{"seconds": seconds, "picture": picture} for picture in prepared]
        return [dataclasses.replace(one, **more) for one, more in zip(results, known, strict=True)]


def classify(model: str) -> Question[Classification]:
    """Ask which label a picture deserves."""
    return Question(model, Classification, pictures.is_one, pictures.encode, Pictures)


def detect(min_confidence: float) -> Question[Detection]:
    """Ask what is in a picture, leaving out what the model is less than `min_confidence` sure of."""
    pack = partial(Pictures, min_confidence=float(min_confidence))
    return Question("detection", Detection, pictures.is_one, pictures.encode, pack)


def judge() -> Question[Classification]:
    """Ask how a text feels."""
    return Question("sentiment", Classification, _is_text, _text, Texts)


def draw(seed: int | None) -> Question[Generated]:
    """Ask for drawn digits."""
    seed = None if seed is None else _whole(seed, "A seed")
    return Question("generator", Generated, _is_number, _digit, partial(Digits, seed=seed))


def in_parts(prepared: Iterable[Any]) -> Iterator[list[Any]]:
    """Prepared inputs as they go into requests: some together, but not too many, nor too large."""
    part: list[Any] = []
    size = 0
    for one in prepared:
        weight = len(one) if isinstance(one, bytes | str) else 1
        if part and (len(part) == MOST_TOGETHER or size + weight > MOST_BYTES_TOGETHER):
            yield part
            part, size = [], 0
        part.append(one)
        size += weight
    if part:
        yield part


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _text(text: object, index: int | None) -> str:
    if isinstance(text, str):
        return text
    raise BadInput(f"A text is a str; this is a {type(text).__name__}.", index=index)


def _is_number(value: object) -> bool:
    return not isinstance(value, Iterable) or isinstance(value, str)


def _digit(digit: Any, index: int | None) -> int:
    return _whole(digit, "A digit", index)


def _whole(number: Any, name: str, index: int | None = None) -> int:
    """Pass whole numbers of any library that fit in 64 bits."""
    try:
        whole = operator.index(number)
        if -(2**63) <= whole < 2**63:
            return whole
    except TypeError:
        pass
    raise BadInput(f"{name} is a whole number of at most 64 bits; this is {number!r}.", index=index)
