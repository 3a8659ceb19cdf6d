"""The digit story's parts: networks, distortions, score, checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from training.card import CARD, WEIGHTS, read_checkpoint, write_checkpoint
from training.digit import ARCHITECTURES, Distortion, Teacher, confusion, distort, predict
from training.errors import TrainingError

from .conftest import ROOT, Digits

VERSION = ROOT / "models" / "digit" / "2"
"""The residual network, which teaches the lean one."""


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_network_takes_bytes_and_floats_alike(arch: str, digits: tuple[Digits, Digits]) -> None:
    network = ARCHITECTURES[arch]().eval()
    pixels = torch.tensor(digits[0][:5])
    with torch.inference_mode():
        from_bytes, from_floats = network(pixels), network(pixels.float())
    assert from_bytes.shape == (5, 10)
    assert torch.equal(from_bytes, from_floats)


@pytest.mark.parametrize(("arch", "most"), [("cnn", 16_000_000), ("lean", 6_000_000)])
def test_a_network_is_small_and_quick(arch: str, most: int) -> None:
    network, work = ARCHITECTURES[arch]().eval(), 0

    def count(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal work
        work += output.numel() * module.weight[0].numel()  # type: ignore[index]

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    network(torch.zeros(1, 28, 28))
    assert work <= most, "multiplications for one picture"
    assert sum(weight.numel() for weight in network.parameters()) <= 600_000


def test_distortions_stay_in_range_and_differ_between_pictures(digits: tuple[Digits, Digits]) -> None:
    torch.manual_seed(0)
    same_digit = torch.tensor(digits[0][:1]).float().repeat(64, 1, 1)
    distorted = distort(same_digit, Distortion())
    assert distorted.shape == (64, 28, 28)
    assert distorted.min() >= 0
    assert distorted.max() <= 255
    assert len({tuple(picture.flatten().tolist()) for picture in distorted}) == 64
    torch.manual_seed(0)
    assert torch.equal(distort(same_digit, Distortion()), distorted)


def test_no_distortion_leaves_a_picture_as_it_is(digits: tuple[Digits, Digits]) -> None:
    pixels = torch.tensor(digits[0][:20]).float()
    nothing = Distortion(stroke=0, coarse=0, contrast=0).scaled(0)
    assert torch.allclose(distort(pixels, nothing), pixels, atol=0.01)


def test_confusion_counts_rows_as_truth() -> None:
    counts = confusion(torch.tensor([3, 3, 8]), torch.tensor([3, 8, 8]))
    assert counts.shape == (10, 10)
    assert (counts[3, 3], counts[3, 8], counts[8, 8], counts.sum()) == (1, 1, 1, 3)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, ARCHITECTURES["mlp"](), {"model": "digit", "arch": "mlp"})
    return tmp_path


def test_a_checkpoint_comes_back_as_it_went(checkpoint: Path, digits: tuple[Digits, Digits]) -> None:
    network, card = read_checkpoint(checkpoint)
    assert card["arch"] == "mlp"
    assert not network.training
    again, _ = read_checkpoint(checkpoint)
    pixels = torch.tensor(digits[0][:20])
    assert np.array_equal(predict(network, pixels), predict(again, pixels))


def change_card(folder: Path, **facts: object) -> None:
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps({**card, **facts}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda folder: (folder / CARD).unlink(), "no checkpoint", id="no-card"),
        pytest.param(lambda folder: (folder / CARD).write_text("{"), "cannot be read", id="half-a-card"),
        pytest.param(lambda folder: (folder / CARD).write_text("[]"), "not a card", id="a-list-for-a-card"),
        pytest.param(
            lambda folder: (folder / WEIGHTS).unlink(), "no checkpoint.safetensors", id="no-weights"
        ),
        pytest.param(
            lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]),
            "not the file that its card describes",
            id="half-the-weights",
        ),
        pytest.param(lambda folder: change_card(folder, arch="cnn"), "does not fit", id="other-architecture"),
        pytest.param(
            lambda folder: change_card(folder, arch="vgg"), "known are: cnn, lean, mlp", id="unknown-one"
        ),
        pytest.param(lambda folder: change_card(folder, model="fit"), "known are: none", id="not-a-story"),
        pytest.param(
            lambda folder: change_card(folder, model="../x"), "known are: none", id="a-path-for-a-model"
        ),
    ],
)
def test_a_broken_checkpoint_is_recognised(checkpoint: Path, spoil: object, message: str) -> None:
    spoil(checkpoint)  # type: ignore[operator]
    with pytest.raises(TrainingError, match=message):
        read_checkpoint(checkpoint)


# ---- a teacher ----


def test_a_teacher_says_what_its_version_would_answer_but_less_surely(digits: tuple[Digits, Digits]) -> None:
    pixels, labels = torch.tensor(digits[0][:200]), torch.tensor(digits[1][:200]).long()
    said = Teacher.read(VERSION).answers(pixels.float())
    assert (said.shape, said.dtype) == ((200, 10), torch.float32)
    torch.testing.assert_close(said.sum(1), torch.ones(200))
    assert (said.argmax(1) == labels).float().mean() > 0.95
    assert said.max(1).values.median() < 0.99, "a sure teacher says little more than the label"


def test_a_teacher_is_shown_what_its_pupil_sees_in_whole_numbers(digits: tuple[Digits, Digits]) -> None:
    teacher, pixels = Teacher.read(VERSION), torch.tensor(digits[0][:20]).float()
    torch.testing.assert_close(teacher.answers(pixels + 0.3), teacher.answers(pixels))


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        pytest.param(ROOT / "models" / "image" / "1", "no version of the digit model", id="another-model"),
        pytest.param(ROOT / "models" / "digit" / "99", "teacher cannot be read", id="no-such-version"),
        pytest.param(ROOT / "models" / "digit" / "card.json", "teacher cannot be read", id="no-version"),
    ],
)
def test_a_folder_that_is_no_teacher_is_named(folder: Path, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Teacher.read(folder)
