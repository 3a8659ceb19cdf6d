"""What each idea is worth: the digit reader trained with one idea left out at a time.

Small on purpose: the perceptron, a thousand training digits, thirty epochs, scored on ten
thousand other training digits. There every idea shows within seconds; on all of MNIST the
differences are smaller. `docs/learning-map.md` explains the ideas.

Rerun: python -m training.ablations
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot
from torch.optim import Optimizer

from service.models.digit import LABELS, SIDE
from training import fit
from training.digit import Distortion, distort, load_mnist, perceptron, predict
from training.errors import TrainingError

LEARNT_FROM = 1_000
SCORED_ON = 10_000
EPOCHS = 30
BATCH_SIZE = 100
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05


def adam(network: nn.Module) -> Optimizer:
    """Adam with decoupled weight decay."""
    return torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)


@dataclass(frozen=True)
class Trial:
    """One way to train.

    Attributes:
        name: What is different, for people.
        network: Makes the network, which gives logits.
        loss: Logits [n, 10] and digits int64 [n] to what is to become small.
        optimizer: Steps down that loss.
        how: The distortions.
    """

    name: str
    network: Callable[[], nn.Module] = perceptron
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    optimizer: Callable[[nn.Module], Optimizer] = adam
    how: Distortion | None = Distortion().scaled(0.5)  # noqa: RUF009


def exchanged(old: type[nn.Module], new: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Makes the perceptron with every layer of one kind exchanged for another."""

    def make() -> nn.Module:
        network = perceptron()
        for name, layer in network.named_children():
            if isinstance(layer, old):
                setattr(network, name, new())
        return network

    return make


def one_layer() -> nn.Module:
    """No hidden layer: each digit's score is a weighted sum of the pixels."""
    return nn.Sequential(perceptron()[0], nn.Flatten(), nn.Linear(SIDE * SIDE, len(LABELS)))  # type: ignore[index]


def squared_error(logits: Tensor, digits: Tensor) -> Tensor:
    """Mean squared error of the probabilities."""
    return mse_loss(logits.softmax(1), one_hot(digits, len(LABELS)).float())


def plain_descent(network: nn.Module) -> Optimizer:
    """Stochastic gradient descent, nothing else."""
    return torch.optim.SGD(network.parameters(), 0.1)


def with_momentum(network: nn.Module) -> Optimizer:
    """Stochastic gradient descent that keeps going the way it went."""
    return torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)


def no_decay(network: nn.Module) -> Optimizer:
    """Adam whose weights may grow as they like."""
    return torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0)


TRIALS = (
    Trial("all of it"),
    Trial("no hidden layers", network=one_layer),
    Trial("no ReLU between the layers", network=exchanged(nn.ReLU, nn.Identity)),
    Trial("sigmoid in the place of ReLU", network=exchanged(nn.ReLU, nn.Sigmoid)),
    Trial("mean squared error in the place of cross-entropy", loss=squared_error),
    Trial("plain SGD in the place of Adam", optimizer=plain_descent),
    Trial("SGD with momentum in the place of Adam", optimizer=with_momentum),
    Trial("no weight decay (L2)", optimizer=no_decay),
    Trial("no dropout", network=exchanged(nn.Dropout, nn.Identity)),
    Trial("no augmentation", how=None),
)


def accuracy(trial: Trial, images: Tensor, labels: Tensor, seed: int) -> float:
    """Train one network the trial's way, and see how many other digits it reads rightly.

    Args:
        trial: The way.
        images: uint8 [n, 28, 28]; the first are learnt from, the last are scored on.
        labels: int64 [n].
        seed: Sows every random number.

    Returns:
        The share of digits that were read rightly.
    """
    fit.sow(seed)
    network = trial.network()
    optimizer = trial.optimizer(network)
    steps = EPOCHS * (LEARNT_FROM // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        network.train()
        for chosen in torch.randperm(LEARNT_FROM).split(BATCH_SIZE):
            pixels = images[chosen].float()
            loss = trial.loss(network(distort(pixels, trial.how) if trial.how else pixels), labels[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    others, truth = images[LEARNT_FROM:][-SCORED_ON:], labels[LEARNT_FROM:][-SCORED_ON:]
    right = predict(network, others) == truth
    return right.double().mean().item()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train each trial with each seed and print the table; 2 with one sentence where data are missing."""
    options = argparse.ArgumentParser(prog="python -m training.ablations", description=__doc__)
    options.add_argument("--data", type=Path, metavar="DIR", help="data sets; default: as for training")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    chosen = options.parse_args(arguments)
    console = Console(soft_wrap=True)
    table = Table("trained with", f"accuracy on {SCORED_ON:,} others", "over seeds")
    try:
        images, labels = load_mnist(chosen.data, "train")
    except TrainingError as error:
        print(error, file=sys.stderr)
        return 2
    for trial in TRIALS:
        runs = [
            accuracy(trial, torch.tensor(images), torch.tensor(labels).long(), seed) for seed in chosen.seeds
        ]
        found = torch.tensor(runs)
        spread = f"± {found.std():.2%}" if len(found) > 1 else ""
        table.add_row(trial.name, f"{found.mean():.2%}", spread)
        console.print(f"{trial.name}: {found.mean():.2%} {spread}")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
