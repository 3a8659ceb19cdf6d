"""The image story: its data, its distortions, its network, and real runs on a few made pictures."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from service.models.image import LABELS
from training import image
from training.__main__ import main
from training.card import read_checkpoint
from training.errors import TrainingError
from training.exam import Exam

from .conftest import ROOT

Pictures = npt.NDArray[np.uint8]

SMALL = ("image", "--own-data", "--precision", "fp32", "--batch-size", "48")


def made(count: int, seed: int) -> tuple[Pictures, Pictures]:
    """Pictures of ten kinds, each a hue of its own, with a lighter square somewhere, and noise."""
    chance = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.uint8) % 10
    hues = np.random.default_rng(7).integers(30, 200, (10, 3))
    pictures = hues[labels][:, None, None, :] + chance.normal(0, 12, (count, 32, 32, 3))
    for picture, (row, column) in zip(pictures, chance.integers(2, 18, (count, 2)), strict=True):
        picture[row : row + 12, column : column + 12] += 40
    return np.clip(pictures, 0, 255).astype(np.uint8), labels


def as_records(pictures: Pictures, labels: Pictures) -> bytes:
    """The publisher's layout: a label, then the three planes."""
    planes = pictures.transpose(0, 3, 1, 2).reshape(len(pictures), -1)
    return np.column_stack((labels, planes)).tobytes()


def write_pictures(folder: Path, train: tuple[Pictures, Pictures], test: tuple[Pictures, Pictures]) -> Path:
    """A data folder with the training half in five files and the test half in one."""
    home = folder / image.CIFAR10.folder
    home.mkdir()
    for name, pictures, labels in zip(
        image.HALVES["train"], np.array_split(train[0], 5), np.array_split(train[1], 5), strict=True
    ):
        (home / name).write_bytes(as_records(pictures, labels))
    (home / image.HALVES["test"][0]).write_bytes(as_records(*test))
    return folder


@pytest.fixture(scope="module")
def pictures_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 made pictures to learn from and 50 to be tested on."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), made(120, 0), made(50, 1))


def run(
    arguments: Sequence[str | Path], pictures_folder: Path, processes: int = 1
) -> "subprocess.Popen[str]":
    """`python -m training image` on the made pictures, under `torchrun` where there are several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "training", *SMALL]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "QUINTET_DATA": str(pictures_folder), "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: "subprocess.Popen[str]") -> str:
    """Wait for a run to end well; what it printed."""
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


# ---- data ----


def test_the_publishers_planes_become_red_green_blue(pictures_folder: Path) -> None:
    pictures, labels = image.load_cifar(pictures_folder, "test", verify=False)
    right, right_labels = made(50, 1)
    assert np.array_equal(pictures, right)
    assert np.array_equal(labels, right_labels)
    assert len(image.load_cifar(pictures_folder, "train", verify=False)[0]) == 120


# ---- augmentation ----


def test_a_distorted_picture_is_the_same_one_moved_and_mirrored_with_a_square_hidden() -> None:
    torch.manual_seed(0)
    pictures, _ = made(8, 3)
    wide = image.with_margin(torch.tensor(pictures))
    assert wide.shape == (8, 40, 40, 3)
    assert torch.equal(wide[:, 4:-4, 4:-4], torch.tensor(pictures))
    assert torch.equal(wide[:, 4:-4, 3], wide[:, 4:-4, 5]), "beyond the edge it is mirrored"
    chosen = torch.arange(8).repeat(16)
    mirrored = torch.rand(len(chosen)) < 0.5
    seen = image.distort(wide, chosen, mirrored)
    hidden = (seen == torch.tensor(image.MEAN)).all(-1)
    areas = hidden.sum((1, 2))
    assert areas.max() == image.CUT_OUT**2
    assert areas.min() >= (image.CUT_OUT // 2) ** 2
    found = set()
    for picture, number, is_mirrored, cover in zip(seen, chosen, mirrored, hidden, strict=True):
        original = wide[number].flip(1) if is_mirrored else wide[number]
        views = original.unfold(0, 32, 1).unfold(1, 32, 1).permute(0, 1, 3, 4, 2)
        same = ((views == picture).all(-1) | cover).all(-1).all(-1).nonzero()
        assert len(same) == 1, "exactly one view is this picture"
        found.add(tuple(same[0].tolist()))
    assert len(found) > 40, "of 81 places"


# ---- network ----


def test_the_first_filters_make_channels_of_one_strength_that_do_not_repeat_each_other() -> None:
    pictures = torch.tensor(made(100, 5)[0])
    network = image.convolutional()
    network[0].learn(pictures)
    assert not any(parameter.requires_grad for parameter in network[0].parameters())
    channels = network[0](pictures)
    assert channels.shape == (100, 24, 31, 31)
    assert torch.equal(channels[:, 12:], -channels[:, :12])
    flat = channels[:, :12].transpose(0, 1).reshape(12, -1)
    covariance = flat @ flat.T / flat.shape[1]
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 0.02
    assert covariance.diagonal().min() > 0.9
    assert covariance.diagonal().max() < 1.1


@pytest.mark.parametrize("arch", image.ARCHITECTURES)
def test_the_network_takes_bytes_or_floats_and_is_small_enough(arch: str) -> None:
    network = image.ARCHITECTURES[arch]().eval()
    assert sum(parameter.numel() for parameter in network.parameters()) <= 7_000_000
    pictures = torch.tensor(made(3, 0)[0])
    with torch.inference_mode():
        assert network(pictures).shape == (3, 10)
        assert torch.equal(network(pictures), network(pictures.float()))


def test_scores_say_how_each_kind_fares() -> None:
    truth = np.array([0, 0, 3, 3])
    outputs = np.full((4, 10), 0.05, np.float32)
    outputs[[0, 1, 2, 3], [0, 1, 3, 3]] = 0.55
    found = image.scores([outputs], truth)
    assert found["accuracy"] == 0.75
    assert found["accuracy/airplane"] == 0.5
    assert found["accuracy/cat"] == 1.0
    assert "accuracy/dog" not in found
    assert found["expected_calibration_error"] == pytest.approx(0.2)


# ---- runs ----


@pytest.fixture(scope="module")
def unbroken(pictures_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Three epochs without interruption: the run's folder and what it printed."""
    out = tmp_path_factory.mktemp("unbroken")
    return out, finish(run(["--epochs", "3", "--out", out], pictures_folder))


def test_a_run_learns_and_leaves_weights_card_and_pictures(
    unbroken: tuple[Path, str], pictures_folder: Path
) -> None:
    out, printed = unbroken
    assert "epoch 3/3" in printed
    network, card = read_checkpoint(out)
    asked: Exam = image.exam(pictures_folder, card)
    with torch.inference_mode():
        outputs = image.head(network, card)(torch.tensor(asked.inputs[0])).numpy()
    assert np.allclose(outputs.sum(1), 1, atol=1e-5)
    assert card["scores"] == pytest.approx(asked.score([outputs], asked.truth), abs=1e-6)
    assert card["scores"]["accuracy"] > 0.3, "by chance it would be 0.1"
    assert card["temperature"] > 0
    assert card["labels"] == list(LABELS)
    assert card["data"]["name"] == "own pictures"
    assert card["training"]["parameters"] == sum(weight.numel() for weight in network.parameters())
    for picture in ("confusion_matrix.png", "learning_curve.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_a_run_killed_and_resumed_ends_with_the_same_weights(
    unbroken: tuple[Path, str], pictures_folder: Path, tmp_path: Path
) -> None:
    arguments = ["--epochs", "3", "--out", tmp_path]
    process = run(arguments, pictures_folder)
    deadline = time.monotonic() + 240
    while not (tmp_path / "last.pt").exists():
        assert time.monotonic() < deadline, "no resume point appeared"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert "Resuming after epoch" in finish(run([*arguments, "--resume"], pictures_folder))
    ours, theirs = read_checkpoint(tmp_path)[0].state_dict(), read_checkpoint(unbroken[0])[0].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_processes_learn_as_one_does(
    unbroken: tuple[Path, str], pictures_folder: Path, tmp_path: Path
) -> None:
    """The batch is the same one, shared. Chance differs: other moves, and statistics of half a batch each."""
    printed = finish(run(["--epochs", "3", "--out", tmp_path], pictures_folder, processes=2))
    losses = [
        [float(number) for number in re.findall(r"image/loss ([\d.]+)", text)]
        for text in (printed, unbroken[1])
    ]
    assert len(losses[0]) == 3, "only the first process reports"
    assert losses[0] == pytest.approx(losses[1], rel=0.15)


# ---- what must be mended first ----


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        pytest.param(lambda file: file.write_bytes(file.read_bytes()[:-5]), "cut short", id="cut-short"),
        pytest.param(lambda file: file.write_bytes(b""), "cut short", id="empty"),
        pytest.param(lambda file: file.write_bytes(b"\x0a" + file.read_bytes()[1:]), "is 10", id="label"),
        pytest.param(lambda file: file.unlink(), "cannot be read", id="missing"),
    ],
)
def test_pictures_that_are_not_in_order(
    harm: object, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pictures(tmp_path, made(20, 0), made(10, 1))
    harm(folder / image.CIFAR10.folder / "data_batch_3.bin")  # type: ignore[operator]
    out = tmp_path / "run"
    assert main([*SMALL, "--data", str(folder), "--out", str(out)]) == 2
    sentence = capsys.readouterr().err
    assert expected in sentence
    assert sentence.count("\n") == 1, "one sentence, no stack"
    assert not out.exists()


def test_a_holdout_that_leaves_nothing(pictures_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--data", str(pictures_folder), "--holdout", "120"]) == 2
    assert "leaves nothing" in capsys.readouterr().err


def test_other_pictures_than_the_cards_are_no_exam(unbroken: tuple[Path, str], tmp_path: Path) -> None:
    card = json.loads((unbroken[0] / "card.json").read_text(encoding="utf-8"))
    others = write_pictures(tmp_path, made(20, 0), made(10, 9))
    with pytest.raises(TrainingError, match="the folder of the same data"):
        image.exam(others, card)
