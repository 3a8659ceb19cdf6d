"""Probabilities that mean what they say: of the answers given with confidence 0.9, nine in ten are right.

One number, the temperature, is fitted on examples that the network did not learn by heart
(never on the test half), and every logit is divided by it: no answer changes, only how sure
it sounds (Guo, Pleiss, Sun & Weinberger, *On Calibration of Modern Neural Networks*, 2017).
"""

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

BINS: Final = 15

COLDEST: Final = 0.05
HOTTEST: Final = 20.0
"""A network that is always right, or no better than chance, would ask for a temperature of 0 or infinity."""


class Probabilities(nn.Module):
    """A classifier and the softmax after it, so that the graph itself gives probabilities.

    Args:
        network: Gives logits [n, labels].
        temperature: What the logits are divided by: above 1 the answers sound less sure.
    """

    def __init__(self, network: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.temperature = temperature

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's input to probabilities float32 [n, labels]."""
        return torch.softmax(self.network(inputs).float() / self.temperature, dim=1)


def fit_temperature(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """The temperature at which the labels are likeliest: the least mean negative log likelihood.

    Args:
        logits: Of examples held out of training, float [n, labels]; logarithms of
            probabilities do as well.
        labels: What they are, int [n].

    Returns:
        The temperature, from `COLDEST` to `HOTTEST`, to nine digits.
    """
    scores = np.asarray(logits, np.float64)
    true = np.asarray(labels, np.int64)
    # Scaled by 1/T the loss is convex, and its slope is the mean score that the network
    # expects minus the mean score of the truth: halve the interval around the slope's zero.
    hottest, coldest = np.log(1 / HOTTEST), np.log(1 / COLDEST)
    truth = scores[np.arange(len(scores)), true].mean()
    for _ in range(40):
        middle = (hottest + coldest) / 2
        expected = (_softmax(scores * np.exp(middle)) * scores).sum(axis=1).mean()
        if expected <= truth:
            hottest = middle
        else:
            coldest = middle
    return float(f"{np.exp(-(hottest + coldest) / 2):.9g}")


def expected_calibration_error(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, bins: int = BINS
) -> float:
    """How far confidence and accuracy lie apart, on average over the examples.

    Args:
        probabilities: float [n, labels].
        labels: What they are, int [n].
        bins: Equally wide ones, over the likeliest label's probability.

    Returns:
        The mean over the bins, each weighed by its examples, of |accuracy - mean confidence|:
        0 is best, 1 is worst.
    """
    given = np.asarray(probabilities, np.float64)
    confidence = given.max(axis=1)
    is_right = given.argmax(axis=1) == np.asarray(labels)
    number = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(number, confidence - is_right, minlength=bins)
    return float(np.abs(gaps).sum() / len(given))


def brier_score(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """The mean squared error of the probabilities, summed over the labels (Brier, 1950).

    Accuracy asks only which label is likeliest; this also asks how likely the right one was.

    Args:
        probabilities: float [n, labels].
        labels: What they are, int [n].

    Returns:
        0 where every true label was given probability 1; 2 where every wrong one was.
    """
    given = np.asarray(probabilities, np.float64)
    truth = np.eye(given.shape[1])[np.asarray(labels, np.int64)]
    return float(np.square(given - truth).sum(axis=1).mean())


def _softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Float [n, labels] to probabilities of the same shape."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: npt.NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return shares
