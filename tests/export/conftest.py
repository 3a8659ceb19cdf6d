"""A pocket-size model: our own network after a few steps, on scikit-learn's digits in MNIST's layout."""

import gzip
import hashlib
import struct
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from export.to_onnx import to_onnx
from service.models.digit import DIGIT
from training import digit
from training.card import read_checkpoint, write_checkpoint
from training.digit import ARCHITECTURES, PUBLISHED, load_mnist, predict
from training.exam import Exam

Digits = npt.NDArray[np.uint8]

TEST_DIGITS = 300


def write_digits(folder: Path, images: Digits, labels: Digits) -> None:
    """The first `TEST_DIGITS` as the test half, the others as the training half, in IDX files."""
    (folder / "mnist").mkdir(parents=True)
    for split, part in (("test", slice(TEST_DIGITS)), ("train", slice(TEST_DIGITS, None))):
        for published, array in zip(PUBLISHED[split], (images[part], labels[part]), strict=True):
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / "mnist" / published.name).write_bytes(gzip.compress(header + array.tobytes(), 1))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder."""
    folder = tmp_path_factory.mktemp("digits")
    bunch = load_digits()
    small = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    images = np.stack([np.pad(cv2.resize(picture, (20, 20)), 4) for picture in small])
    write_digits(folder, images, bunch.target.astype(np.uint8))
    return folder


@pytest.fixture(scope="session")
def checkpoint(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, as training leaves it."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    network = ARCHITECTURES["cnn"]()
    images, labels = (torch.tensor(array) for array in load_mnist(digits, "train", verify=False))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for chosen in torch.randperm(len(images)).split(64) * 2:
        loss = nn.functional.cross_entropy(network(images[chosen]), labels[chosen].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, labels = (torch.tensor(array) for array in load_mnist(digits, "test", verify=False))
    facts = {
        "model": "digit",
        "arch": "cnn",
        "task": DIGIT.task,
        "labels": list(DIGIT.labels),
        "scores": {"accuracy": (predict(network, images) == labels).double().mean().item()},
        "data": {
            "name": "own digits",
            "sha256": hashlib.sha256(images.numpy().tobytes()).hexdigest(),
            "split": "test",
        },
        "training": {"command": "python -m training digit", "seed": 0, "device": "cpu"},
        "seeds": {"numbers": [0]},
        "licence": "BSD-3-Clause",
        "intended_use": "Tests.",
        "limits": "Hardly trained.",
    }
    write_checkpoint(folder, network, facts)
    return folder


@pytest.fixture(scope="session")
def network(checkpoint: Path) -> nn.Module:
    """The trained network, giving probabilities."""
    return digit.head(*read_checkpoint(checkpoint))


@pytest.fixture(scope="session")
def exam(checkpoint: Path, digits: Path) -> Exam:
    """What the trained network is examined on."""
    return digit.exam(digits, read_checkpoint(checkpoint)[1])


@pytest.fixture(scope="session")
def graph(network: nn.Module) -> bytes:
    """The trained network as an ONNX file."""
    return to_onnx(network, DIGIT)
