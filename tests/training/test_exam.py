"""What a network is examined on: which rows, cut how, and no other data than the card's."""

import numpy as np
import pytest

from service.models.spec import Array
from training.errors import TrainingError
from training.exam import Exam, accuracy, likeliest, refuse_other_data

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


def test_accuracy_is_the_share_of_right_labels() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])
    assert likeliest([probabilities]).tolist() == [0, 1, 0, 0]
    assert accuracy([probabilities], np.array([0, 1, 1, 0])) == {"accuracy": 0.75}


def test_other_data_than_the_cards_are_refused() -> None:
    card = {"model": "digit", "data": {"name": "MNIST", "split": "test", "sha256": "a" * 64}}
    refuse_other_data(card, "a" * 64)
    with pytest.raises(TrainingError, match=r"are about MNIST, test .*the folder of the same data"):
        refuse_other_data(card, "b" * 64)
