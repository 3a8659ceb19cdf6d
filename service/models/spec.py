"""What a room is: everything one model promises, in one value.

A room says what a model takes, what it gives, how one input becomes the tensors
of its network (`to_tensor`) and how one row of the network's outputs becomes an
answer (`to_answer`). Training, export, both doors and the tests read the same
room, so the picture a network was scored on is the picture it is served.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from service.errors import BadInput, QuintetError

T = TypeVar("T")
R = TypeVar("R")

Datatype = Literal["BOOL", "UINT8", "INT32", "INT64", "FP16", "FP32", "BYTES"]
"""Datatypes by their Open Inference Protocol names; `BYTES` is a sequence of byte strings."""

Array = npt.NDArray[Any]

Inputs = Mapping[str, Any]
"""One input, by tensor name: `{"image": b"..."}` or `{"pixels": uint8 array}`."""

NUMPY_TYPES: dict[Datatype, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "BYTES": np.dtype(np.object_),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor as the Open Inference Protocol describes it.

    `shape` leaves the batch axis out; -1 stands for any length.
    """

    name: str
    datatype: Datatype
    shape: tuple[int, ...] = ()

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type that carries this datatype (`object` for `BYTES`)."""
        return NUMPY_TYPES[self.datatype]

    @property
    def is_fixed(self) -> bool:
        """Whether all its values take the same number of bytes."""
        return self.datatype != "BYTES" and -1 not in self.shape


@dataclass(slots=True)
class Sample:
    """One input, ready for the network.

    `tensors` follow the room's `network_inputs`, without the batch axis; `context`
    is whatever `to_answer` needs to know about the input (the size of a picture, say).
    """

    tensors: tuple[Array, ...]
    context: Any = None


class Answer(Protocol):
    """One prediction, in the two forms that the doors speak."""

    def as_json(self) -> dict[str, Any]:
        """The prediction for people, as the REST calls give it."""

    def as_tensor(self, name: str) -> Any:
        """The prediction for machines: the value of one of the room's outputs, without the batch axis."""


@dataclass(frozen=True)
class Option:
    """A number that callers may send beside their inputs; it joins each of them under its name.

    Attributes:
        default: What people get who do not name it.
        lowest: The least value that makes sense.
        highest: The greatest.
        words: What it does, in a sentence for people.
    """

    default: float
    lowest: float
    highest: float
    words: str

    def check(self, name: str, value: Any) -> float:
        """The value, if it can be.

        Raises:
            BadInput: it is no number, or out of range.
        """
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not self.lowest <= value <= self.highest:
            raise BadInput(f"{name} must be a number from {self.lowest:g} to {self.highest:g}.")
        return float(value)


@dataclass(frozen=True)
class Room:
    """A model, as everyone else in the project knows it.

    Attributes:
        name: The model's name in addresses, files and metrics.
        task: What it does, in a line for people.
        takes: The kind of body that people send to `POST /<name>`.
        labels: What an output's index means, in order.
        inputs: The tensors a machine may send: one alternative of several.
        outputs: The tensors a machine gets.
        network_inputs: What the ONNX graph takes, in the order of `Sample.tensors`.
        network_outputs: What the ONNX graph gives, in the order of `to_answer`'s row.
        to_tensor: One input to one sample; raises `BadInput` when it cannot.
        to_tensors: Several inputs to a sample each, or to what is wrong with them, where that is faster
            together than with `to_tensor` one by one; None where it is not.
        to_answer: One row of the network's outputs and its sample to one answer.
        example: One input that the model can answer: for warming up, for documents and for tests.
        is_quick: Whether `to_tensor` of this input is short enough for the event loop.
        is_short: Whether it takes no longer than the network, so that others of the same batch can wait for
            it, where that runs in a thread.
        options: Numbers that callers may send beside the inputs, by name.
        as_picture: Inputs and their answers as one PNG, for people who ask for a picture; None
            where there is none.
        assets: Names of the files beside the network, of the same version, that `to_tensor` needs.
        to_tensor_with: Those files' bytes, by name, to the `to_tensor` that uses them; None
            where the room needs none.
    """

    name: str
    task: str
    takes: Literal["pictures", "texts", "digits"]
    labels: tuple[str, ...]
    inputs: tuple[tuple[Tensor, ...], ...]
    outputs: tuple[Tensor, ...]
    network_inputs: tuple[Tensor, ...]
    network_outputs: tuple[Tensor, ...]
    to_tensor: Callable[[Inputs], Sample]
    to_answer: Callable[[Sequence[Array], Sample], Answer]
    example: Inputs
    is_quick: Callable[[Inputs], bool] = lambda inputs: True
    is_short: Callable[[Inputs], bool] = lambda inputs: True
    options: Mapping[str, Option] = field(default_factory=dict)
    as_picture: Callable[[Sequence[Inputs], Sequence[Any]], bytes] | None = None
    assets: tuple[str, ...] = ()
    to_tensor_with: Callable[[Mapping[str, bytes]], Callable[[Inputs], Sample]] | None = None
    to_tensors: Callable[[Sequence[Inputs]], list[Sample | QuintetError]] | None = None

    def furnish(self, assets: Mapping[str, bytes]) -> "Room":
        """This room with one version's `assets` in it; itself where it needs none.

        Raises:
            ValueError: an asset is not what the room can use.
        """
        return replace(self, to_tensor=self.to_tensor_with(assets)) if self.to_tensor_with else self

    def samples(self, inputs: Sequence[Inputs]) -> list[Sample | QuintetError]:
        """Every input's sample, or what is wrong with the input."""
        return each(self.to_tensor, inputs) if self.to_tensors is None else self.to_tensors(inputs)

    def __str__(self) -> str:
        """The model's name, so that test ids and messages read well."""
        return self.name


def each(make: Callable[[T], R], several: Iterable[T]) -> list[R | QuintetError]:
    """What can be made of each, or what is wrong with it."""
    made: list[R | QuintetError] = []
    for one in several:
        try:
            made.append(make(one))
        except QuintetError as error:
            # A traceback holds frames, and they the request: a cycle for the garbage collector. So does
            # that of the error which this one was raised for.
            error.__context__ = None
            made.append(error.with_traceback(None))
    return made


@dataclass(slots=True)
class Classification:
    """An answer that chooses one of the labels."""

    labels: tuple[str, ...]
    probabilities: npt.NDArray[np.float32]

    @property
    def label(self) -> str:
        """The likeliest label."""
        return self.labels[int(self.probabilities.argmax())]

    def as_json(self) -> dict[str, Any]:
        """`{"label", "confidence", "probabilities"}`, probabilities by label."""
        values = self.probabilities.tolist()
        confidence = max(values)
        return {
            "label": self.labels[values.index(confidence)],
            "confidence": confidence,
            "probabilities": dict(zip(self.labels, values, strict=True)),
        }

    def as_tensor(self, name: str) -> Any:
        """`label` as UTF-8 bytes, or `probabilities` as float32 [labels]."""
        return self.label.encode() if name == "label" else self.probabilities
