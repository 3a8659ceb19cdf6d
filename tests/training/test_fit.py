"""The loop, with networks of a handful of weights."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training import fit
from training.errors import TrainingError

from .conftest import ROOT

SETTINGS = fit.Settings(epochs=3, batch_size=8, precision="fp32")
TARGETS = torch.linspace(-1, 1, 32).unsqueeze(1)


def player(name: str, average_decay: float = 0.9) -> fit.Player:
    """One that learns to repeat its input."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=12)
    return fit.Player(name, network, error, optimizer, schedule, average_decay)


def error(network: nn.Module, batch: Tensor) -> Tensor:
    return (network(batch) - batch).square().mean()


def train(players: list[fit.Player], out: Path, epochs: int = 3, resume: bool = False) -> fit.Story:
    def noisy(indices: Tensor, progress: float) -> Tensor:
        if len(seen) == epochs * 4:
            raise KeyboardInterrupt
        seen.append(progress)
        return TARGETS[indices] + 0.01 * torch.randn(len(indices), 1)

    seen: list[float] = []
    return fit.fit(
        players,
        examples=len(TARGETS),
        batch_of=noisy,
        score=lambda: {"error": error(players[0].averaged.eval(), TARGETS).item()},
        settings=SETTINGS,
        out=out,
        identity={"seed": SETTINGS.seed},
        resume=resume,
    )


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def test_two_players_broken_off_and_resumed_end_where_they_would_have(tmp_path: Path) -> None:
    whole = [player("first"), player("second", average_decay=0.0)]
    story = train(whole, tmp_path / "whole")
    assert [row["epoch"] for row in story.epochs] == [1, 2, 3]
    with pytest.raises(KeyboardInterrupt):
        train([player("first"), player("second", average_decay=0.0)], tmp_path / "broken", epochs=2)
    resumed = [player("first"), player("second", average_decay=0.0)]
    story = train(resumed, tmp_path / "broken", resume=True)
    assert [row["epoch"] for row in story.epochs] == [1, 2, 3]
    for one, other in zip(resumed, whole, strict=True):
        assert same(one.network, other.network)
        assert same(one.averaged, other.averaged)


def test_the_average_trails_its_network_and_takes_whole_numbers_over(tmp_path: Path) -> None:
    reader = player("reader")
    train([reader], tmp_path)
    assert not same(reader.averaged, reader.network)
    counts = [reader.averaged.state_dict()["1.num_batches_tracked"], torch.tensor(12)]
    assert torch.equal(*counts)


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_epoch_before(tmp_path: Path) -> None:
    broken, steps = player("reader"), 0
    usual = broken.loss

    def breaks(network: nn.Module, batch: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        return usual(network, batch) * (1.0 if steps < 6 else float("nan"))

    broken.loss = breaks
    with pytest.raises(TrainingError, match="epoch 2 the loss stopped being"):
        train([broken], tmp_path)
    kept = torch.load(tmp_path / fit.RESUME_POINT, weights_only=True)
    assert len(kept["epochs"]) == 1


def test_a_run_that_starts_anew_leaves_no_earlier_one_to_be_resumed(tmp_path: Path) -> None:
    train([player("reader")], tmp_path)
    broken = player("reader")
    broken.loss = lambda network, batch: network(batch).mean() * float("nan")
    with pytest.raises(TrainingError, match="epoch 1 the loss stopped being"):
        train([broken], tmp_path)
    assert not (tmp_path / fit.RESUME_POINT).exists()


def test_an_epoch_shows_every_example_once_in_another_order_each_time() -> None:
    first, again, second = (torch.cat(list(fit.shards(32, SETTINGS, epoch))) for epoch in (1, 1, 2))
    assert sorted(first.tolist()) == list(range(32))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_epochs_and_seeds_draw_different_numbers() -> None:
    drawn = []
    for seed, epoch in ((0, 1), (0, 2), (1, 1), (0, 1)):
        fit.sow(seed, epoch)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) == 3


def test_a_player_without_an_average_is_its_own() -> None:
    plain = player("plain", average_decay=0.0)
    assert plain.averaged is plain.network
    averaged = player("averaged")
    assert averaged.averaged is not averaged.network
    assert same(averaged.averaged, copy.deepcopy(averaged.network))


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(TrainingError, match="choose cpu or cuda"), fit.processes("tpu"):
        pass


def test_two_processes_take_the_very_steps_that_one_takes(tmp_path: Path) -> None:
    """At the same total batch, with nothing drawn by chance: the same loss, the same weights."""
    results = []
    for processes in ("1", "2"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", processes, "-m", "tests.training.together", str(tmp_path / processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        results.append([float(number) for number in run.stdout.split("RESULT")[1].split()])
    assert results[0] == pytest.approx(results[1], rel=1e-5, abs=1e-6)
