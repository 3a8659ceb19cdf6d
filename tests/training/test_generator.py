"""The generator's story: its scores mean what they say, and a run killed half-way is none the worse."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from service.models.generator import GENERATOR, LATENT, noise_of
from training import generator as story
from training.card import read_checkpoint
from training.errors import TrainingError
from training.generator import (
    ARCHITECTURES,
    Batch,
    Critic,
    Judge,
    Reader,
    bell,
    critic_loss,
    draw,
    exam,
    frechet_distance,
    generator_loss,
    head,
    nearest_neighbours,
    relative_distance,
    variety,
)

from .conftest import ROOT, Digits

Start = Callable[[Sequence[str | Path]], "subprocess.Popen[str]"]
SMALL = ("--batch-size", "100", "--precision", "fp32", "--epochs", "2")


# ---- its parts ----


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(0)
    return Batch(torch.rand(6, 1, 28, 28), torch.arange(6), bell(6, torch.device("cpu")))


def test_training_draws_noise_from_the_rooms_bell() -> None:
    torch.manual_seed(0)
    ours = bell(2000, torch.device("cpu")).flatten()
    rooms = torch.tensor(np.concatenate([noise_of(3, seed) for seed in range(2000)]))
    quantiles = torch.linspace(0.001, 0.999, 99)
    assert torch.allclose(ours.quantile(quantiles), rooms.quantile(quantiles), atol=0.05)


def test_the_generator_is_small_and_gives_ink(batch: Batch) -> None:
    network = ARCHITECTURES["gan"]()
    assert sum(parameter.numel() for parameter in network.parameters()) <= 1_000_000
    ink = network(batch.digits, batch.noise)
    assert ink.shape == (6, 28, 28)
    assert 0 <= ink.min() <= ink.max() <= 1
    pixels = head(network.eval(), {})(batch.digits, batch.noise)
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (6, 28, 28))


@pytest.mark.parametrize("player", ["critic", "generator"])
def test_each_loss_moves_its_own_player_alone(player: str, batch: Batch) -> None:
    generator, critic = ARCHITECTURES["gan"](), Critic()
    if player == "critic":
        learner, other = critic, generator
        loss = critic_loss(critic, batch, generator)
    else:
        learner, other = generator, critic
        loss = generator_loss(generator, batch, critic, reading_weight=0.2)
    loss.backward()
    assert all(parameter.grad is not None for parameter in learner.parameters())
    assert all(parameter.grad is None for parameter in other.parameters())
    assert all(parameter.requires_grad for parameter in other.parameters())


# ---- its scores ----


def test_the_frechet_distance_of_known_bells() -> None:
    chance = np.random.default_rng(0)
    some = chance.normal(size=(20_000, 3))
    # Per axis |m1 - m2|^2 + (s1 - s2)^2.
    assert frechet_distance(some, chance.normal(size=(20_000, 3))) == pytest.approx(0, abs=0.01)
    assert frechet_distance(some, some * [1, 2, 3] + [3, 0, 0]) == pytest.approx(9 + 1 + 4, rel=0.02)
    turned = some @ np.linalg.qr(chance.normal(size=(3, 3)))[0]
    assert frechet_distance(some, turned) == pytest.approx(0, abs=0.01)
    assert frechet_distance(some, some[:, [0, 0, 0]]) == pytest.approx(
        frechet_distance(some[:, [0, 0, 0]], some)
    )


def test_the_readers_features_are_what_its_last_layer_sees(digits: tuple[Digits, Digits]) -> None:
    read, features = Reader()(digits[0][:300])
    assert features.shape == (300, 128)
    assert np.mean(read == digits[1][:300]) > 0.95
    means = np.stack([features[digits[1][:300] == digit].mean(axis=0) for digit in range(10)])
    nearest = ((features[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert np.mean(nearest == read) > 0.9


def test_a_missing_reader_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="has no version 77"):
        Reader("77")
    monkeypatch.setattr(story, "MODELS_FOLDER", tmp_path)
    with pytest.raises(TrainingError, match="scored by the shipped digit reader"):
        Reader()


def test_variety_is_the_mean_distance_within_a_digit() -> None:
    pixels = np.zeros((5, 28, 28), np.uint8)
    pixels[1, 0, 0] = 255
    pixels[2, 0, :2] = 255
    varieties = variety(pixels, np.array([0, 0, 0, 1, 1]))
    assert varieties[0] == pytest.approx((1 + 1 + 2**0.5) / 3)
    assert varieties[1:].tolist() == [0] * 9


def test_real_digits_judge_well_and_one_picture_for_each_digit_does_not(
    digits: tuple[Digits, Digits],
) -> None:
    judge = Judge(Reader(), digits[0][500:], digits[1][500:], digits[0][:500])
    assert len(judge.floors) == story.DRAWS
    themselves = judge.scores(digits[0][500:])
    assert themselves["agreement"] > 0.95
    assert themselves["frechet_distance"] == pytest.approx(0, abs=1e-3)
    assert themselves["frechet_floor"] > 0.01
    assert themselves["diversity"] == 1
    first = np.stack([digits[0][digits[1] == digit][0] for digit in range(10)])
    collapsed = judge.scores(first[judge.asked])
    assert collapsed["diversity"] == 0
    assert collapsed["frechet_distance"] > 3 * collapsed["frechet_floor"]
    assert judge.scores(first[(judge.asked + 1) % 10])["agreement"] < 0.2


def test_copies_are_found_out(digits: tuple[Digits, Digits]) -> None:
    learned, real = digits[0][:500], digits[0][500:]
    distances, places = nearest_neighbours(learned[40:43], learned, 2)
    assert places[:, 0].tolist() == [40, 41, 42]
    assert distances[:, 0] == pytest.approx(0, abs=1e-2)
    assert (distances[:, 1] > 1).all()
    assert relative_distance(learned[:200], real, learned) == pytest.approx(0, abs=1e-2)
    assert relative_distance(real, real, learned) == 1


# ---- a run ----


@pytest.fixture(scope="module")
def start(environment: dict[str, str]) -> Start:
    """Starts `python -m training generator --own-data …` in a process of its own."""

    def start(arguments: Sequence[str | Path]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "training", "generator", "--own-data", *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    return start


def finish(process: "subprocess.Popen[str]") -> str:
    """Wait for a run to end well; what it printed."""
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    return printed


@pytest.fixture(scope="module")
def unbroken(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs without interruption."""
    out = tmp_path_factory.mktemp("unbroken")
    finish(start([*SMALL, "--out", out]))
    return out


def test_a_run_leaves_a_generator_its_card_and_its_pictures(unbroken: Path, data_folder: Path) -> None:
    network, card = read_checkpoint(unbroken)
    assert set(card["scores"]) == {"agreement", "frechet_distance", "frechet_floor", "diversity"}
    assert card["labels"] == list(GENERATOR.labels)
    assert len(card["draws"]["frechet_distances"]) == len(card["draws"]["frechet_floors"]) == story.DRAWS
    assert set(card["variety"]) == set(GENERATOR.labels)
    assert card["nearest_neighbours"]["relative_distance"] > 0
    questions = exam(data_folder, card)
    (digits, noise), truth = questions.inputs, questions.truth
    assert noise.shape == (len(questions), LATENT)
    drawn = head(network, card)(torch.tensor(digits), torch.tensor(noise)).numpy()
    assert np.abs(draw(network, digits, range(len(digits))).astype(int) - drawn).max() <= 1
    assert questions.score([drawn], truth)["agreement"] == np.mean(questions.decide([drawn]) == digits)
    for name, value in questions.score([drawn], truth).items():
        assert value == pytest.approx(card["scores"][name], abs=0.005), name
    shapes = {
        "samples.png": (1208, 1208),
        "samples/epoch-001.png": (1208, 1208),
        card["nearest_neighbours"]["picture"]: (488, 1208),
    }
    for name, shape in shapes.items():
        assert cv2.imread(str(unbroken / name), cv2.IMREAD_UNCHANGED).shape == shape
    for name in ("learning_curve.png", "frechet_curve.png"):
        assert (unbroken / name).read_bytes().startswith(b"\x89PNG")
    assert not [path for path in unbroken.rglob("*") if "tmp" in path.name]


def test_a_run_killed_in_the_middle_and_resumed_ends_as_an_unbroken_one(
    unbroken: Path, start: Start, tmp_path: Path
) -> None:
    arguments = [*SMALL, "--out", tmp_path]
    process = start(arguments)
    give_up = time.monotonic() + 300
    while not (tmp_path / "last.pt").exists():
        assert time.monotonic() < give_up, "no resume point appeared"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(TrainingError, match="go on with --resume"):
        read_checkpoint(tmp_path)
    assert "Resuming after epoch" in finish(start([*arguments, "--resume"]))
    ours, theirs = read_checkpoint(tmp_path), read_checkpoint(unbroken)
    weights: tuple[dict[str, torch.Tensor], ...] = tuple(
        network.state_dict() for network, _ in (ours, theirs)
    )
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert ours[1]["scores"] == theirs[1]["scores"]
