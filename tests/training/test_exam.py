"""What a network is examined on: which rows, cut how, and no other data than the card's."""

import numpy as np
import pytest

from service.models.spec import Array
from training.errors import TrainingError
from training.exam import Exam, classification_scores, is_same_score, likeliest, refuse_other_data

TOKENS = np.array([[5, 6, 7, 8], [5, 0, 0, 0], [5, 6, 0, 0]])


def without_padding(inputs: list[Array]) -> list[Array]:
    longest = max(1, int((inputs[0] != 0).sum(axis=1).max()))
    return [array[:, :longest] for array in inputs]


def test_a_batch_holds_the_rows_that_were_asked_for() -> None:
    exam = Exam("numbers", (TOKENS, TOKENS * 2), None, None, lambda outputs, truth: {})
    assert len(exam) == 3
    first, second = exam.batch(slice(1, 3))
    assert np.array_equal(first, TOKENS[1:])
    assert np.array_equal(second, TOKENS[1:] * 2)


def test_a_batch_keeps_only_the_padding_that_its_longest_row_needs() -> None:
    exam = Exam("texts", (TOKENS,), None, None, lambda outputs, truth: {}, trim=without_padding)
    assert [exam.batch(np.array(rows))[0].shape for rows in ([1], [1, 2], [1, 2, 0])] == [
        (1, 1),
        (2, 2),
        (3, 4),
    ]


def test_a_classifier_is_scored_by_its_likeliest_labels_and_by_how_sure_it_was() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])
    assert likeliest([probabilities]).tolist() == [0, 1, 0, 0]
    scores = classification_scores([probabilities], np.array([0, 1, 1, 0]))
    assert scores == {
        "accuracy": 0.75,
        "expected_calibration_error": pytest.approx(0.3),
        "brier_score": pytest.approx((0.02 + 0.08 + 0.72 + 0.18) / 4),
    }


@pytest.mark.parametrize(
    ("claimed", "measured", "examples", "same"),
    [
        pytest.param(0.9975, 0.9975, 10_000, True, id="equal"),
        pytest.param(0.9975, 0.9970, 10_000, True, id="five-of-ten-thousand"),
        pytest.param(0.9975, 0.9955, 10_000, False, id="twenty-of-ten-thousand"),
        pytest.param(0.50, 0.51, 100, True, id="one-of-a-hundred"),
        pytest.param(0.50, 0.52, 100, False, id="two-of-a-hundred"),
        pytest.param(0.9, float("nan"), 100, False, id="no-number"),
    ],
)
def test_a_score_is_the_same_give_or_take_rounding(
    claimed: float, measured: float, examples: int, same: bool
) -> None:
    assert is_same_score(claimed, measured, examples) == same


def test_other_data_than_the_cards_are_refused() -> None:
    card = {"model": "digit", "data": {"name": "MNIST", "split": "test", "sha256": "a" * 64}}
    refuse_other_data(card, "a" * 64)
    with pytest.raises(TrainingError, match=r"are about MNIST, test .*the folder of the same data"):
        refuse_other_data(card, "b" * 64)
