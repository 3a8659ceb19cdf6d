"""What a model is examined on: the examples behind its card's scores, and what is asked of the answers.

Each story makes its own (`exam(data, card)`), and the end of its graph (`head(network,
card)`). Export proves a file on it before it is published, and `python -m
training.evaluate` scores on it what ships.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from service.models.spec import Array
from training.calibration import brier_score, expected_calibration_error
from training.errors import TrainingError

Rows = slice | npt.NDArray[np.int64]
"""Which examples: a slice, or their numbers, int64 [n]."""

SCORE_TOLERANCE: Final = 0.001
"""Another processor rounds otherwise, which may turn a decision that was close."""


@dataclass(frozen=True)
class Exam:
    """What a network is examined on.

    Attributes:
        name: The data, for messages: `MNIST test`.
        inputs: The network's inputs, each [examples, ...].
        truth: What is right, one entry for each example, in the form that `score` takes.
        decide: Outputs to what a caller acts on, [examples, ...]: two networks that are the
            same decide the same. None where an answer holds nothing to decide.
        score: Outputs and truth to the scores that the card shows.
        margin: Outputs to how far each decision is from turning, in the outputs' own unit and
            the shape of `decide`'s result. Decisions closer to that than the outputs may
            differ are not compared. None where all are.
        apart: Found and right outputs to how far apart what they say is, float64 [m], where the
            order of an answer's parts says nothing. None where numbers stand in fixed places.
        trim: A batch's inputs to the same without the padding that no row of them needs, for
            networks that take any length. None where inputs have one size.
        largest_difference: What two networks that are the same may differ by in any number of
            any answer (1 for bytes, where a last bit may round the other way). None for the
            usual.
        largest_neighbour_difference: The same for a row alone and in company.
        batch_size: How many examples go through a network at a time when all do.
    """

    name: str
    inputs: tuple[Array, ...]
    truth: Any
    decide: Callable[[Sequence[Array]], Array] | None
    score: Callable[[Sequence[Array], Any], dict[str, float]]
    margin: Callable[[Sequence[Array]], Array] | None = None
    apart: Callable[[Sequence[Array], Sequence[Array]], Array] | None = None
    trim: Callable[[Sequence[Array]], list[Array]] | None = None
    largest_difference: float | None = None
    largest_neighbour_difference: float | None = None
    batch_size: int = 250

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.inputs[0])

    def batch(self, rows: Rows) -> list[Array]:
        """The network's inputs for some of the examples, as they would be served: each [rows, ...]."""
        chosen = [array[rows] for array in self.inputs]
        return self.trim(chosen) if self.trim else chosen


def likeliest(outputs: Sequence[Array]) -> Array:
    """Probabilities [n, labels] to the label's index, int64 [n]."""
    indices: Array = outputs[0].argmax(axis=1)
    return indices


def classification_scores(outputs: Sequence[Array], truth: Array) -> dict[str, float]:
    """How often the likeliest label is the true one, and how well the probabilities say so."""
    return {
        "accuracy": float(np.mean(likeliest(outputs) == truth)),
        "expected_calibration_error": expected_calibration_error(outputs[0], truth),
        "brier_score": brier_score(outputs[0], truth),
    }


def is_same_score(claimed: float, measured: float, examples: int) -> bool:
    """Whether two scores over so many examples are one, give or take rounding on another machine."""
    return math.isclose(
        claimed, measured, rel_tol=SCORE_TOLERANCE, abs_tol=max(SCORE_TOLERANCE, 1.5 / examples)
    )


def refuse_other_data(card: Mapping[str, Any], found_sha256: str) -> None:
    """The examples found must be those that the card's scores are about.

    Raises:
        TrainingError: their checksum is not the one in the card's `data`.
    """
    named = card["data"]
    if found_sha256 != named["sha256"]:
        raise TrainingError(
            f"{card['model']}: the checkpoint's scores are about {named['name']}, {named['split']} (sha256 "
            f"{named['sha256'][:12]}…), and the examples found have the sha256 {found_sha256[:12]}…; name "
            "the folder of the same data with --data, or train without --holdout."
        )
