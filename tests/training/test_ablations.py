"""Each trial leaves out what it says, and still trains."""

import pytest
import torch
from torch import nn

from training import ablations
from training.ablations import TRIALS, Trial, accuracy, squared_error

from .conftest import Digits

TRIAL = {trial.name: trial for trial in TRIALS}


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_a_trial_trains_and_is_scored(
    trial: Trial, digits: tuple[Digits, Digits], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablations, "LEARNT_FROM", 400)
    monkeypatch.setattr(ablations, "EPOCHS", 2)
    images, labels = torch.tensor(digits[0]), torch.tensor(digits[1]).long()
    assert 0.1 < accuracy(trial, images, labels, seed=0) <= 1


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("no ReLU between the layers", nn.ReLU),
        ("sigmoid in the place of ReLU", nn.ReLU),
        ("no dropout", nn.Dropout),
    ],
)
def test_what_is_left_out_is_gone(name: str, gone: type[nn.Module]) -> None:
    assert any(isinstance(layer, gone) for layer in TRIAL["all of it"].network().modules())
    assert not any(isinstance(layer, gone) for layer in TRIAL[name].network().modules())


def test_squared_error_is_nothing_for_certain_and_right() -> None:
    certain = torch.eye(10) * 100
    assert squared_error(certain, torch.arange(10)) == pytest.approx(0)
    assert squared_error(certain, torch.arange(10).roll(1)) == pytest.approx(0.2)
