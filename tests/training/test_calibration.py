"""Temperature and calibration error, on answers whose true chances are known."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from training.calibration import (
    COLDEST,
    HOTTEST,
    Probabilities,
    brier_score,
    expected_calibration_error,
    fit_temperature,
)

Drawn = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]


@pytest.fixture(scope="module")
def honest() -> Drawn:
    """Logits [40,000, 5] and labels drawn with just the chances that their softmax gives."""
    chance = np.random.default_rng(0)
    logits = chance.normal(0, 2, (40_000, 5))
    # The largest of logits with Gumbel noise is a draw from their softmax.
    return logits, (logits + chance.gumbel(size=logits.shape)).argmax(axis=1)


def softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return torch.softmax(torch.tensor(logits), 1).numpy()


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_the_temperature_undoes_what_made_the_answers_too_sure_or_too_shy(
    honest: Drawn, scale: float
) -> None:
    logits, labels = honest
    temperature = fit_temperature(logits * scale, labels)
    assert temperature == pytest.approx(scale, rel=0.03)
    assert expected_calibration_error(softmax(logits * scale / temperature), labels) < 0.01


def test_no_other_temperature_makes_the_labels_likelier(honest: Drawn) -> None:
    logits, labels = honest
    chosen = torch.tensor(logits * 2.2), torch.tensor(labels)
    best = fit_temperature(*chosen)
    losses = [nn.functional.cross_entropy(chosen[0] / (best * away), chosen[1]) for away in (0.99, 1, 1.01)]
    assert min(losses) == losses[1]


def test_a_temperature_stays_within_bounds_where_none_is_best() -> None:
    logits = np.eye(4) * 9
    assert fit_temperature(logits, [0, 1, 2, 3]) == pytest.approx(COLDEST, rel=1e-6)
    assert fit_temperature(logits, [1, 2, 3, 0]) == pytest.approx(HOTTEST, rel=1e-6)


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    sure = np.array([[0.9, 0.1]] * 10)
    assert expected_calibration_error(sure, [0] * 9 + [1]) == pytest.approx(0)
    assert expected_calibration_error(sure, [0] * 5 + [1] * 5) == pytest.approx(0.4)
    two_bins = np.array([[0.9, 0.1]] * 5 + [[0.4, 0.6]] * 5)
    # Half of the examples 0.1 too shy, half 0.2 too sure: gaps do not make up for each other.
    assert expected_calibration_error(two_bins, [0] * 5 + [1, 1, 0, 0, 0]) == pytest.approx(0.15)


def test_a_confidence_of_one_has_a_bin() -> None:
    assert expected_calibration_error(np.eye(3), [0, 1, 2]) == 0
    assert expected_calibration_error(np.eye(3), [1, 2, 0]) == 1


def test_the_brier_score_is_a_squared_distance_from_the_truth() -> None:
    assert brier_score(np.eye(3), [0, 1, 2]) == 0
    assert brier_score(np.eye(3), [1, 2, 0]) == 2
    assert brier_score([[0.8, 0.2], [0.5, 0.5]], [0, 1]) == pytest.approx((2 * 0.04 + 2 * 0.25) / 2)


def test_a_temperature_changes_no_answer() -> None:
    logits = torch.randn(50, 10)
    plain, soft = Probabilities(nn.Identity())(logits), Probabilities(nn.Identity(), 3.0)(logits)
    assert torch.equal(plain.argmax(1), soft.argmax(1))
    assert torch.allclose(soft, torch.softmax(logits / 3, 1))
    assert (soft.amax(1) < plain.amax(1)).all()
