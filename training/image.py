"""Says what a small photograph shows: one of CIFAR-10's ten kinds of thing.

`cnn`: 94.73 % of CIFAR-10's test half, each picture looked at once and as it is (the averaged
weights after the last epoch, seed 0), 3,190,432 parameters, 76 minutes on one core of a CPU
that had other work too (alone, an epoch takes 97 seconds).

Rerun: python -m training image
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from service.models.image import IMAGE, LABELS, SIDE
from service.models.spec import Array
from training import card, data, fit
from training.calibration import Probabilities, fit_temperature
from training.errors import TrainingError
from training.exam import Exam, classification_scores, likeliest, refuse_other_data

# ---------------------------------------------------------------- data

Pictures = npt.NDArray[np.uint8]

CIFAR10 = data.Archive(
    name="CIFAR-10",
    folder="cifar-10-batches-bin",
    mirrors=("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
    checksum="md5:c32a1d4ab5d03f1284b67883e8d87530",
    files=("data_batch_*.bin", "test_batch.bin"),
    file_count=6,
    content_bytes=184_380_000,
    content_sha256="40749a55b241a7907cb751e7225ee1227e844fe03f2be934b5bcdc2e12f26f53",
)
HALVES = {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)}
RECORD_BYTES = 1 + 3 * SIDE * SIDE
"""A label, then the red, the green and the blue plane."""


def load_cifar(folder: Path | None, split: str, *, verify: bool = True) -> tuple[Pictures, Pictures]:
    """The pictures and labels of one half of CIFAR-10 (Krizhevsky, 2009).

    Args:
        folder: The data folder; None for `$QUINTET_DATA` or the cache.
        split: `train` (50,000 pictures) or `test` (10,000).
        verify: Whether it must be CIFAR-10, byte for byte. False takes anyone's own pictures
            in the same format.

    Returns:
        Pictures uint8 [n, 32, 32, 3], RGB, and labels uint8 [n].

    Raises:
        TrainingError: the files cannot be had, or are damaged.
    """
    home = data.find_archive(CIFAR10, folder, verify=verify)
    records = np.concatenate([_read_records(home / name) for name in HALVES[split]])
    labels = records[:, 0].copy()
    if labels.max() >= len(LABELS):
        raise TrainingError(f"A label in {home} is {labels.max()}; labels run from 0 to {len(LABELS) - 1}.")
    planes = records[:, 1:].reshape(-1, 3, SIDE, SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def _read_records(path: Path) -> Pictures:
    """The records of one file, uint8 [n, 3073]."""
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror}.") from error
    if not len(content) or len(content) % RECORD_BYTES:
        raise TrainingError(f"{path} is cut short or no CIFAR-10 file: records have {RECORD_BYTES} bytes.")
    return content.reshape(-1, RECORD_BYTES)


# ---------------------------------------------------------------- augmentation

REACH = 4
"""How far a picture may be moved, in pixels either way."""

CUT_OUT = 12
"""The side of the square that is hidden, in pixels."""

MEAN = (125, 123, 114)
"""Of CIFAR-10's training pixels: red, green, blue."""


def with_margin(pictures: Tensor) -> Tensor:
    """The pictures mirrored `REACH` pixels beyond their edges: uint8 [n, 32, 32, 3] to [n, 40, 40, 3]."""
    planes = pictures.permute(0, 3, 1, 2)
    # Padding by reflection knows no bytes.
    parts = [pad(part.float(), [REACH] * 4, mode="reflect").byte() for part in planes.split(1000)]
    return torch.cat(parts).permute(0, 2, 3, 1).contiguous()


def distort(wide: Tensor, chosen: Tensor, mirrored: Tensor) -> Tensor:
    """Move each chosen picture, mirror some, and hide a square of each.

    The hidden square is DeVries and Taylor's (*Improved Regularization of Convolutional
    Neural Networks with Cutout*, 2017).

    Args:
        wide: All pictures with their margins, uint8 [n, 40, 40, 3].
        chosen: Indices, int64 [m].
        mirrored: Which of them to turn left for right, bool [m].

    Returns:
        uint8 [m, 32, 32, 3].
    """
    device, count = wide.device, len(chosen)
    along = torch.arange(SIDE, device=device)
    shift_y, shift_x = torch.randint(0, 2 * REACH + 1, (2, count, 1), device=device)
    rows = along + shift_y
    columns = torch.where(mirrored[:, None], along.flip(0), along) + shift_x
    moved = wide[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
    # The square's middle may be anywhere, so that near the edge less is hidden.
    below, beside = along - torch.randint(0, SIDE, (2, count, 1), device=device) + CUT_OUT // 2
    in_rows, in_columns = (below >= 0) & (below < CUT_OUT), (beside >= 0) & (beside < CUT_OUT)
    hidden = (in_rows[:, :, None] & in_columns[:, None, :])[..., None]
    return torch.where(hidden, torch.tensor(MEAN, dtype=torch.uint8, device=device), moved)


# ---------------------------------------------------------------- networks


class _Whiten(nn.Module):
    """Pixels on 0..255, uint8 or float [n, 32, 32, 3], to 24 channels that do not repeat each other.

    The filters are the eigenvectors of the covariance of 2x2 patches, scaled to variance 1, and
    their negatives. They are computed once and not trained (Page, *How to Train Your ResNet 8:
    Bag of Tricks*, 2019; Jordan, *94% on CIFAR-10 in 3.29 Seconds on a Single GPU*, 2024).
    """

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN, dtype=torch.float32))
        self.filters = nn.Conv2d(3, 24, 2, bias=False)
        self.filters.weight.requires_grad = False

    def forward(self, pixels: Tensor) -> Tensor:
        # Whole numbers up to 256 are exact in bfloat16: nothing is lost before the filters.
        return self.filters((pixels.float() - self.mean).permute(0, 3, 1, 2))

    def learn(self, pictures: Tensor) -> None:
        """Compute the filters from pictures uint8 [n, 32, 32, 3]."""
        centred = (pictures.float() - self.mean).permute(0, 3, 1, 2)
        patches = centred.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).double()
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (directions / (variances + NOISE_VARIANCE).sqrt()).T.reshape(12, 3, 2, 2)
        with torch.no_grad():
            self.filters.weight.copy_(torch.cat([filters, -filters]))


NOISE_VARIANCE = 2.0
"""In squared grey levels: what varies by less is mostly rounding, and is not blown up."""


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """3x3, and at first passing its inputs on unchanged as far as it has outputs for them."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(convolution.weight[: min(inputs, outputs)])
    return convolution


class _Stage(nn.Module):
    """Halves the picture, then refines it by two convolutions beside a short cut.

    The short cut is He et al.'s (*Deep Residual Learning for Image Recognition*, 2015).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        # Pooled before it is normalised: a quarter of the work.
        self.halve = nn.Sequential(
            _convolution(inputs, outputs), nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.SiLU()
        )
        self.refine = nn.Sequential(
            _convolution(outputs, outputs),
            nn.BatchNorm2d(outputs),
            nn.SiLU(),
            _convolution(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.halve(x)
        return self.activation(x + self.refine(x))


class _Scale(nn.Module):
    """Smaller logits, so that early steps are not too sure of themselves."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def convolutional(widths: tuple[int, int, int] = (64, 256, 256)) -> nn.Module:
    """Whitened patches, three residual stages, then the strongest response of each channel.

    Jordan's (2024) layout, narrower and with SiLU. The stages work at 15x15, 7x7 and 3x3 pixels.

    Args:
        widths: Channels of the three stages.
    """
    return nn.Sequential(
        _Whiten(),
        nn.SiLU(),
        _Stage(24, widths[0]),
        _Stage(widths[0], widths[1]),
        _Stage(widths[1], widths[2]),
        nn.MaxPool2d(3),
        nn.Flatten(),
        nn.Linear(widths[2], len(LABELS), bias=False),
        _Scale(1 / 9),
    )


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {"cnn": convolutional}
"""Each takes pixels uint8 or float [n, 32, 32, 3] on 0..255, RGB, and gives logits [n, 10]."""


# ---------------------------------------------------------------- loss


def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy against slightly softened labels (Szegedy et al., 2016)."""
    pictures, kinds = batch
    return cross_entropy(network(pictures).float(), kinds, label_smoothing=LABEL_SMOOTHING)


# ---------------------------------------------------------------- score


@torch.inference_mode()
def answers(network: nn.Module, pictures: Tensor) -> Tensor:
    """What the network says of pictures as they are: uint8 [n, 32, 32, 3] to float32 [n, 10]."""
    network.eval()
    return torch.cat([network(part).float() for part in pictures.split(500)])


def scores(outputs: Sequence[Array], truth: Array) -> dict[str, float]:
    """Accuracy, expected calibration error, and the accuracy on each kind, `accuracy/cat`.

    Args:
        outputs: Probabilities, one array [n, 10].
        truth: The kinds, int [n].
    """
    is_right = likeliest(outputs) == truth
    each = {
        f"accuracy/{label}": float(is_right[truth == kind].mean())
        for kind, label in enumerate(LABELS)
        if (truth == kind).any()
    }
    return {**classification_scores(outputs, truth), **each}


def head(network: nn.Module, card: Mapping[str, Any]) -> nn.Module:
    """The trained network with the room's outputs: probabilities float32 [n, 10]."""
    return Probabilities(network, float(card["temperature"]))


def exam(folder: Path | None, card: Mapping[str, Any]) -> Exam:
    """The test half of CIFAR-10, or of the pictures that the network was trained on instead.

    Args:
        folder: The data folder; None for the usual one.
        card: The network's card; its `data` say which pictures its scores are about.

    Raises:
        TrainingError: the pictures cannot be had, or are not those of the card.
    """
    named = card["data"]
    images, labels = load_cifar(folder, "test", verify=named["name"] == "CIFAR-10")
    refuse_other_data(card, data.sha256_of(images.tobytes()))
    return Exam(f"{named['name']} {named['split']}", (images,), labels, likeliest, scores)


def calibration(folder: Path | None, card: Mapping[str, Any]) -> tuple[Pictures]:
    """Training pictures from all over that half: uint8 [n, 32, 32, 3].

    Args:
        folder: The data folder; None for the usual one.
        card: The network's card.

    Raises:
        TrainingError: the pictures cannot be had.
    """
    images, _ = load_cifar(folder, "train", verify=card["data"]["name"] == "CIFAR-10")
    return (images[np.linspace(0, len(images) - 1, QUANTISATION_PICTURES).astype(int)],)


def confusion(kinds: Tensor, predicted: Tensor) -> npt.NDArray[np.int64]:
    """How often each kind (row) was taken for each (column): int64 [10, 10]."""
    pairs = kinds.cpu() * len(LABELS) + predicted.cpu()
    counts = torch.bincount(pairs, minlength=len(LABELS) ** 2)
    return counts.reshape(len(LABELS), len(LABELS)).numpy()


# ---------------------------------------------------------------- settings

LABEL_SMOOTHING = 0.1
AVERAGE_DECAY = 0.999
MOMENTUM = 0.9
QUANTISATION_PICTURES = 512
RESERVED = 2000
"""Training pictures that are not learned from: they show progress and set the temperature."""


@dataclass(frozen=True)
class Recipe:
    """What an architecture is trained with, unless the command line says otherwise."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float


RECIPES = {"cnn": Recipe(40, 256, 0.25, 1e-3)}


def train(run: fit.Run) -> dict[str, Any]:
    """Train one network, score it on the test half, and leave both in `run.out`.

    The last training pictures are set apart: progress is shown on them, so that the test half is
    looked at once, when all is done, and they give the temperature. Under `torchrun` each process
    normalises by the statistics of its own share of a batch, and the first one's running ones
    are kept.

    Returns:
        The card.

    Raises:
        TrainingError: data, settings or resume point are not in order.
    """
    recipe = RECIPES[run.arch]
    images, labels = load_cifar(run.data, "train", verify=run.verify)
    if run.holdout:
        if run.holdout >= len(images):
            raise TrainingError(
                f"--holdout {run.holdout} leaves nothing of {len(images)} pictures to learn from."
            )
        test_images, test_labels = images[-run.holdout :], labels[-run.holdout :]
        images, labels = images[: -run.holdout], labels[: -run.holdout]
    else:
        test_images, test_labels = load_cifar(run.data, "test", verify=run.verify)
    reserved = min(RESERVED, len(images) // 5)
    learned = len(images) - reserved
    settings = fit.Settings(
        epochs=run.epochs or recipe.epochs,
        batch_size=min(run.batch_size or recipe.batch_size, learned),
        seed=run.seed,
        device=run.device,
        precision=run.precision,
        largest_gradient=math.inf,
    )
    with fit.processes(run.device) as device:
        fit.sow(run.seed)
        pictures, kinds, test_pictures, test_kinds = (
            torch.tensor(array, device=device) for array in (images, labels, test_images, test_labels)
        )
        kinds, test_kinds = kinds.long(), test_kinds.long()
        network = ARCHITECTURES[run.arch]().to(device)
        network[0].learn(pictures[:5000])
        # Pixel by pixel rather than channel by channel: faster convolutions in bfloat16.
        network.to(memory_format=torch.channels_last)
        steps = settings.epochs * fit.steps_per_epoch(learned, settings.batch_size)
        optimizer = torch.optim.SGD(
            _groups(network, recipe.weight_decay), lr=recipe.learning_rate, momentum=MOMENTUM, nesterov=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            recipe.learning_rate,
            total_steps=steps + 1,
            pct_start=0.15,
            anneal_strategy="linear",
            cycle_momentum=False,
        )
        looker = fit.Player("image", network, loss, optimizer, schedule, AVERAGE_DECAY)
        wide = with_margin(pictures[:learned])
        mirrored_first = torch.rand(learned, generator=torch.Generator().manual_seed(run.seed)) < 0.5

        def batch_of(indices: Tensor, progress: float) -> tuple[Tensor, Tensor]:
            # Every second epoch the other way round, so that two epochs show both sides of every
            # picture (Jordan, 2024); chance would show one in two of them the same side twice.
            epoch = int(progress * settings.epochs + 1e-6)
            mirrored = mirrored_first[indices] ^ bool(epoch % 2)
            chosen = indices.to(device)
            return distort(wide, chosen, mirrored.to(device)), kinds[chosen]

        def score() -> dict[str, float]:
            right = answers(looker.averaged, pictures[learned:]).argmax(1) == kinds[learned:]
            return {"accuracy": right.float().mean().item()}

        story = fit.fit(
            [looker],
            examples=learned,
            batch_of=batch_of,
            score=score,
            settings=settings,
            out=run.out,
            identity=run.identity(settings, recipe),
            resume=run.resume,
        )
        if fit.process_rank() != 0:
            return {}
        heat = fit_temperature(answers(looker.averaged, pictures[learned:]).cpu(), kinds[learned:].cpu())
        probabilities = answers(head(looker.averaged, {"temperature": heat}), test_pictures)
        facts = {
            "model": IMAGE.name,
            "arch": run.arch,
            "task": IMAGE.task,
            "labels": list(LABELS),
            "scores": scores([probabilities.cpu().numpy()], test_labels),
            "temperature": heat,
            "data": {
                "name": "CIFAR-10" if run.verify else "own pictures",
                "sha256": data.sha256_of(test_images.tobytes()),
                "split": f"last {run.holdout} of train" if run.holdout else "test",
            },
            "training": card.training_facts(run, settings, story, looker.averaged),
            "licence": (
                "Apache-2.0; the publisher of CIFAR-10 (Krizhevsky, 2009) states no licence for its "
                "pictures, which come from the World Wide Web"
            ),
            "intended_use": (
                "Learning and showing how pictures are told apart: one thing of the ten kinds, in the "
                "middle of a photograph and filling it."
            ),
            "limits": (
                "It sees the middle square in 32x32 pixels, so what is small or off to the side is lost. "
                "Every picture gets one of ten answers, also one that shows none of them or several, and "
                "then its confidence means nothing; it is measured on pictures like CIFAR-10's alone. "
                "Cats and dogs are confused most. Not for decisions about people or safety."
            ),
        }
        card.write_checkpoint(run.out, looker.averaged, facts)
        card.draw_confusion(
            confusion(test_kinds, probabilities.argmax(1)), LABELS, run.out / "confusion_matrix.png"
        )
        card.draw_curve(story.epochs, "accuracy", run.out / "learning_curve.png")
        return facts


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases and normalisation, which have one axis, do not."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [
        {"params": [each for each in trained if each.ndim > 1], "weight_decay": weight_decay},
        {"params": [each for each in trained if each.ndim <= 1], "weight_decay": 0.0},
    ]
