"""`torchrun` with two processes: the loss of an epoch is that of one process at the same total batch."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cells import write_slides
from tests.texts import write_texts

from .conftest import ROOT


def losses(processes: int, environment: dict[str, str], *options: str | Path) -> dict[str, float]:
    """Each player's mean loss in the first epoch."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, "-m", "training", *map(str, options), "--epochs", "1"]
    run = subprocess.run(
        [*command, "--own-data", "--precision", "fp32"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("epoch 1/1") == 1, "only the first process reports"
    return {name: float(loss) for name, loss in re.findall(r"(\w+)/loss (\S+)", run.stdout)}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return folder


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    write_slides(folder, {"train": 8, "val": 2})
    return folder


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        pytest.param(("sentiment", "--arch", "gru", "--batch-size", "8"), 0.25, id="sentiment"),
        pytest.param(("generator", "--batch-size", "70"), 0.25, id="generator"),
        pytest.param(("detection", "--batch-size", "4"), 0.25, id="detection"),
    ],
)
def test_two_processes_agree_with_one(
    options: tuple[str, ...],
    tolerance: float,
    slides: Path,
    texts: Path,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """Each process draws its own distortions, noise and hidden words, and normalises by its own half.

    Other seeds of one process alone move a text's loss by a tenth.
    """
    folder = {"detection": slides, "sentiment": texts}.get(options[0])
    if folder is not None:
        environment = {**environment, "QUINTET_DATA": str(folder)}
    with ThreadPoolExecutor() as both:
        one, two = both.map(
            lambda processes: losses(processes, environment, *options, "--out", tmp_path / str(processes)),
            (1, 2),
        )
    assert two == pytest.approx(one, rel=tolerance)
