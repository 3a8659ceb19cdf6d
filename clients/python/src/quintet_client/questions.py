"""What a caller wants to know, before any protocol has a say in it.

Both clients turn their arguments into the same `Question`, and both protocols
answer it, so a verb means the same four times.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from quintet_client import pictures
from quintet_client.errors import BadInput, ServerError
from quintet_client.pictures import Picture
from quintet_client.results import Classification, Detection, Generated

Result = TypeVar("Result", Classification, Detection, Generated)


@dataclass(frozen=True)
class Pictures:
    """Encoded pictures; `min_confidence` for a model that finds things in them."""

    encoded: list[bytes]
    min_confidence: float | None = None

    def __len__(self) -> int:
        """How many results are due."""
        return len(self.encoded)


@dataclass(frozen=True)
class Texts:
    """Texts to read."""

    texts: list[str]

    def __len__(self) -> int:
        """How many results are due."""
        return len(self.texts)


@dataclass(frozen=True)
class Digits:
    """Digits to draw; without a seed, of the service's choice."""

    digits: list[int]
    seed: int | None

    def __len__(self) -> int:
        """How many results are due."""
        return len(self.digits)


@dataclass(frozen=True)
class Question(Generic[Result]):
    """Inputs for a model.

    Attributes:
        model: The model to ask.
        result: The type of one result.
        inputs: One or more of them.
        is_list: Whether the caller gave a list, and so expects one.
    """

    model: str
    result: type[Result]
    inputs: Pictures | Texts | Digits
    is_list: bool

    def shape(self, results: list[Result]) -> Result | list[Result]:
        """Give the results back as the inputs came: one, or a list.

        Raises:
            ServerError: there are more or fewer results than inputs.
        """
        if len(results) != len(self.inputs):
            raise ServerError(f"The server gave {len(results)} results for {len(self.inputs)} inputs.")
        return results if self.is_list else results[0]


def classify(model: str, picture: Picture | Sequence[Picture]) -> Question[Classification]:
    """Ask which label a picture deserves."""
    encoded, is_list = _encode(picture)
    return Question(model, Classification, Pictures(encoded), is_list)


def detect(picture: Picture | Sequence[Picture], min_confidence: float) -> Question[Detection]:
    """Ask what is in a picture, leaving out what the model is less than `min_confidence` sure of."""
    encoded, is_list = _encode(picture)
    return Question("detection", Detection, Pictures(encoded, float(min_confidence)), is_list)


def judge(text: str | Sequence[str]) -> Question[Classification]:
    """Ask how a text feels."""
    texts = [text] if isinstance(text, str) else list(text)
    for index, one in enumerate(texts):
        if not isinstance(one, str):
            raise BadInput(f"A text is a str; this is a {type(one).__name__}.", index=index)
    return Question("sentiment", Classification, Texts(texts), not isinstance(text, str))


def draw(digits: int | Iterable[int] | None, seed: int | None) -> Question[Generated]:
    """Ask for drawn digits; all ten where none is named."""
    if digits is None:
        digits = range(10)
    seed = None if seed is None else _whole(seed, "A seed")
    if isinstance(digits, Iterable):
        wanted = [_whole(digit, "A digit", index) for index, digit in enumerate(digits)]
        return Question("generator", Generated, Digits(wanted, seed), True)
    return Question("generator", Generated, Digits([_whole(digits, "A digit")], seed), False)


def _whole(number: int, name: str, index: int | None = None) -> int:
    """Pass whole numbers of any library that fit in 64 bits."""
    try:
        whole = operator.index(number)
        if -(2**63) <= whole < 2**63:
            return whole
    except TypeError:
        pass
    raise BadInput(f"{name} is a whole number of at most 64 bits; this is {number!r}.", index=index)


def _encode(picture: Picture | Sequence[Picture]) -> tuple[list[bytes], bool]:
    """Encode one picture or several; whether they were several."""
    if isinstance(picture, Sequence) and not isinstance(picture, str | bytes | bytearray | memoryview):
        return [pictures.encode(one, index) for index, one in enumerate(picture)], True
    return [pictures.encode(picture)], False
