"""A few hundred real digits: scikit-learn's, in MNIST's layout and files."""

import gzip
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.datasets import load_digits

from service.models.digit import like_mnist
from training.digit import PUBLISHED

Digits = npt.NDArray[np.uint8]
ROOT = Path(__file__).parents[2]


def idx(array: Digits) -> bytes:
    """An array as a gzipped IDX file."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes(), 1)


@pytest.fixture(scope="session")
def digits() -> tuple[Digits, Digits]:
    """900 pictures uint8 [n, 28, 28] and their labels uint8 [n]."""
    scans = load_digits()
    pixels = (scans.images[:900] * 255 / 16).astype(np.uint8)
    return np.stack([like_mnist(picture) for picture in pixels]), scans.target[:900].astype(np.uint8)


@pytest.fixture(scope="session")
def data_folder(digits: tuple[Digits, Digits], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 of them to learn from and 200 to be tested on, as `mnist/*.gz`."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "mnist").mkdir()
    for split, part in (("train", slice(700)), ("test", slice(700, None))):
        for file, array in zip(PUBLISHED[split], digits, strict=True):
            (folder / "mnist" / file.name).write_bytes(idx(array[part]))
    return folder


@pytest.fixture(scope="session")
def environment(data_folder: Path) -> dict[str, str]:
    """What a subprocess needs: where the digits are, and one thread, so that the suite stays polite."""
    return {**os.environ, "QUINTET_DATA": str(data_folder), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def start(environment: dict[str, str]) -> Callable[[Sequence[str | Path]], subprocess.Popen[str]]:
    """Starts `python -m training digit --own-data …` in a process of its own."""

    def start(arguments: Sequence[str | Path]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "training", "digit", "--own-data", *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    return start
