"""Real runs, small enough for a suite: `python -m training digit` from outside."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from training.calibration import Probabilities, expected_calibration_error
from training.card import note_seeds, read_checkpoint
from training.digit import load_mnist, predict
from training.errors import TrainingError

from .conftest import ROOT

Start = Callable[[Sequence[str | Path]], "subprocess.Popen[str]"]
SMALL = ("--arch", "cnn", "--batch-size", "50", "--precision", "fp32")


def finish(process: "subprocess.Popen[str]") -> str:
    """Wait for a run to end well; what it printed."""
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


@pytest.fixture(scope="session")
def unbroken(start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Four epochs without interruption: the run's folder and what it printed."""
    out = tmp_path_factory.mktemp("unbroken")
    return out, finish(start([*SMALL, "--epochs", "4", "--out", out]))


def test_a_run_learns_and_leaves_weights_card_and_pictures(
    unbroken: tuple[Path, str], data_folder: Path
) -> None:
    out, printed = unbroken
    assert "epoch 4/4" in printed
    network, card = read_checkpoint(out)
    images, labels = load_mnist(data_folder, "test", verify=False)
    accuracy = (predict(network, torch.tensor(images)).numpy() == labels).mean()
    assert card["scores"]["accuracy"] == pytest.approx(accuracy)
    assert accuracy > 0.85
    head = Probabilities(network, card["temperature"])
    with torch.inference_mode():
        error = expected_calibration_error(head(torch.tensor(images)), labels)
    assert card["scores"]["expected_calibration_error"] == pytest.approx(error, abs=1e-5)
    assert card["training"]["command"] == (
        "python -m training digit --arch cnn --epochs 4 --batch-size 50 --seed 0 --device cpu --own-data"
    )
    assert card["training"]["parameters"] == sum(weight.numel() for weight in network.parameters())
    assert card["data"]["name"] == "own digits"
    for picture in ("confusion_matrix.png", "learning_curve.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").iterdir())
    assert not [path for path in out.iterdir() if "tmp" in path.name]


def test_a_run_killed_and_resumed_ends_with_the_same_weights(
    unbroken: tuple[Path, str], start: Start, tmp_path: Path
) -> None:
    arguments = [*SMALL, "--epochs", "4", "--out", tmp_path]
    process = start(arguments)
    deadline = time.monotonic() + 60
    while not (tmp_path / "last.pt").exists():
        assert time.monotonic() < deadline, "no resume point appeared"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(TrainingError, match="go on with --resume"):
        read_checkpoint(tmp_path)
    assert "Resuming after epoch" in finish(start([*arguments, "--resume"]))
    ours, theirs = read_checkpoint(tmp_path)[0].state_dict(), read_checkpoint(unbroken[0])[0].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def first_loss(printed: str) -> float:
    """The mean loss of the first epoch, as the terminal shows it."""
    (loss,) = re.findall(r"epoch 1/\d+  digit/loss (\S+)", printed)
    return float(loss)


def test_two_processes_train_as_one(
    unbroken: tuple[Path, str], environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "training", "digit", "--own-data", *SMALL, "--epochs", "1", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("epoch 1/1") == 1, "only the first process reports"
    _, card = read_checkpoint(tmp_path)
    assert 0 < card["scores"]["accuracy"] <= 1
    # Each process draws its own distortions, so the two losses agree as two seeds' would.
    assert first_loss(run.stdout) == pytest.approx(first_loss(unbroken[1]), rel=0.1)


def test_several_seeds_are_noted_in_every_card(start: Start, tmp_path: Path) -> None:
    finish(
        start(
            ["--arch", "mlp", "--batch-size", "50", "--epochs", "1", "--seeds", "3", "4", "--out", tmp_path]
        )
    )
    cards = [json.loads((tmp_path / f"seed{seed}" / "card.json").read_text()) for seed in (3, 4)]
    accuracies = [card["scores"]["accuracy"] for card in cards]
    for card in cards:
        assert (card["seeds"]["score"], card["seeds"]["values"]) == ("accuracy", accuracies)
        assert card["seeds"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert note_seeds([tmp_path / "seed3"])["spread"] == 0


def test_a_pupil_learns_from_its_teacher_alone(start: Start, data_folder: Path, tmp_path: Path) -> None:
    command = ["--arch", "lean", "--batch-size", "50", "--epochs", "6", "--precision", "fp32"]
    teacher = ROOT / "models" / "digit" / "2"
    taught = [*command, "--teacher", teacher, "--out", tmp_path / "taught"]
    for run in [start(taught), start([*command, "--out", tmp_path / "alone"])]:
        finish(run)
    (pupil, card), (alone, _) = (read_checkpoint(tmp_path / name) for name in ("taught", "alone"))
    assert (
        card["training"]["teacher"] == json.loads((teacher / "card.json").read_text())["training"]["command"]
    )
    assert f"--teacher {teacher}" in card["training"]["command"]
    assert any(not value.equal(pupil.state_dict()[name]) for name, value in alone.state_dict().items())
    images, labels = load_mnist(data_folder, "test", verify=False)
    assert (predict(pupil, torch.tensor(images)).numpy() == labels).mean() > 0.8
    printed, _ = start([*command, "--resume", "--out", tmp_path / "taught"]).communicate(timeout=300)
    assert "a run of other settings (teacher)" in printed


def test_the_residual_network_learns_from_labels_alone(start: Start, tmp_path: Path) -> None:
    process = start([*SMALL, "--teacher", ROOT / "models" / "digit" / "2", "--out", tmp_path])
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "learns from labels alone" in printed
