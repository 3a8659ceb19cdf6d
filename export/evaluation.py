"""What each model is examined on before it is published, and how its graph ends."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from export.errors import ExportRefused
from export.proof import Exam
from export.to_onnx import Probabilities
from service.models.spec import Array
from training.digit import load_mnist


@dataclass(frozen=True)
class Evaluation:
    """The part of an export that is one model's own.

    Attributes:
        head: Makes the trained network give the room's `network_outputs`.
        exam: The data folder (None for the usual one) and the checkpoint's card to the
            examples that the card's scores are about. Raises `TrainingError` where the data
            cannot be had, `ExportRefused` where they are not those that the card names.
    """

    head: Callable[[nn.Module], nn.Module]
    exam: Callable[[Path | None, Mapping[str, Any]], Exam]


def likeliest(outputs: Sequence[Array]) -> Array:
    """Probabilities [n, labels] to the label's index, int64 [n]."""
    indices: Array = outputs[0].argmax(axis=1)
    return indices


def accuracy(outputs: Sequence[Array], truth: Array) -> dict[str, float]:
    """The share of examples whose likeliest label is the true one."""
    return {"accuracy": float(np.mean(likeliest(outputs) == truth))}


def digits(folder: Path | None, card: Mapping[str, Any]) -> Exam:
    """The test half of MNIST, or of the digits that the checkpoint was trained on instead."""
    named = card["data"]
    images, labels = load_mnist(folder, "test", verify=named["name"] == "MNIST")
    found = hashlib.sha256(images.tobytes()).hexdigest()
    if found != named["sha256"]:
        raise ExportRefused(
            f"digit: the checkpoint's scores are about {named['name']}, {named['split']} (sha256 "
            f"{named['sha256'][:12]}…), and the test half found has the sha256 {found[:12]}…; name the "
            "folder of the same data with --data, or train without --holdout."
        )
    return Exam(f"{named['name']} {named['split']}", (images,), labels, likeliest, accuracy)


EVALUATIONS = {"digit": Evaluation(Probabilities, digits)}
