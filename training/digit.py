"""Reads handwritten digits.

`cnn`: 99.73 % of MNIST's test half, mean of three seeds (99.75, 99.72, 99.72: the averaged
weights after the last epoch), 225,882 parameters, 22 minutes on one core of a CPU; and,
unseen, 97.6 to 97.8 % of scikit-learn's 8x8 scans. `mlp`: 99.27 % (seed 0), 6 minutes.
`lean`, which ships as `models/digit/3`, with that `cnn` for a teacher: 99.70 %, mean of three seeds
(99.71, 99.68, 99.71), 168,682 parameters, a third of the multiplications, 25 minutes on one core
(with bfloat16 in hardware; twice that without); 98.1 to 98.2 % of the scans.

Rerun: python -m training digit --seeds 0 1 2
       python -m training digit --arch lean --teacher models/digit/2 --seeds 0 1 2
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, grid_sample, interpolate, max_pool2d, one_hot

from service.errors import NotFound
from service.models.digit import DIGIT, LABELS, SIDE
from service.models.spec import Sample
from service.providers import Profile
from service.repository import Repository, RepositoryError
from service.runtime import Network, NetworkMismatch
from training import card, data, fit
from training.calibration import Probabilities, fit_temperature
from training.errors import TrainingError
from training.exam import Exam, classification_scores, likeliest, refuse_other_data

# ---------------------------------------------------------------- data

Digits = npt.NDArray[np.uint8]

Half = tuple[Digits, Digits]
"""Pictures uint8 [n, 28, 28] and their labels uint8 [n]."""

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)
PUBLISHED = {
    "train": (
        data.Published(
            "train-images-idx3-ubyte.gz",
            47_040_016,
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        data.Published(
            "train-labels-idx1-ubyte.gz",
            60_008,
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
    ),
    "test": (
        data.Published(
            "t10k-images-idx3-ubyte.gz",
            7_840_016,
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        data.Published(
            "t10k-labels-idx1-ubyte.gz",
            10_008,
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
}


def load_mnist(folder: Path | None, split: str, *, verify: bool = True) -> tuple[Digits, Digits]:
    """The pictures and labels of one half of MNIST (LeCun et al., 1998).

    Args:
        folder: Holds `mnist/` with the publisher's files; None for `$QUINTET_DATA` or the cache.
        split: `train` (60,000 digits) or `test` (10,000).
        verify: Whether it must be MNIST, byte for byte. False takes anyone's own digits in
            the same format.

    Returns:
        Pictures uint8 [n, 28, 28], light ink on black, and labels uint8 [n].

    Raises:
        TrainingError: the files cannot be had, or are damaged.
    """
    home = data.data_folder(folder) / "mnist"
    images_file, labels_file = PUBLISHED[split]
    images = _read_idx(data.find(images_file, home, MIRRORS, verify=verify), 3, home / images_file.name)
    labels = _read_idx(data.find(labels_file, home, MIRRORS, verify=verify), 1, home / labels_file.name)
    if images.shape[1:] != (SIDE, SIDE):
        raise TrainingError(f"{images_file.name} holds {images.shape[1:]} pictures; {SIDE}x{SIDE} is needed.")
    if len(images) != len(labels) or len(images) == 0 or labels.max() >= len(LABELS):
        raise TrainingError(f"{labels_file.name} does not hold one label from 0 to 9 for each picture.")
    return images, labels


def _read_idx(content: bytes, axes: int, path: Path) -> Digits:
    """The array in an IDX file: magic 0, 0, type, axes; big-endian sizes; then the values."""
    header = 4 + 4 * axes
    if len(content) < header or content[:4] != bytes((0, 0, 8, axes)):
        raise TrainingError(f"{path} is not an IDX file of unsigned bytes with {axes} axes.")
    shape = struct.unpack(f">{axes}I", content[4:header])
    if len(content) - header != int(np.prod(shape, dtype=np.int64)):
        raise TrainingError(f"{path} is cut short or too long for the {shape} values that it promises.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def load_halves(folder: Path | None, holdout: int, *, verify: bool = True) -> tuple[Half, Half]:
    """The digits to learn from, and those that are never learned from and are scored on.

    Args:
        folder: The data folder; None for the usual one.
        holdout: Score on the last so many of MNIST's training half; 0 for its test half.
        verify: Whether it must be MNIST.

    Raises:
        TrainingError: the digits cannot be had, or the holdout leaves nothing to learn from.
    """
    images, labels = load_mnist(folder, "train", verify=verify)
    if not holdout:
        return (images, labels), load_mnist(folder, "test", verify=verify)
    if holdout >= len(images):
        raise TrainingError(f"--holdout {holdout} leaves nothing of {len(images)} digits to learn from.")
    return (images[:-holdout], labels[:-holdout]), (images[-holdout:], labels[-holdout:])


# ---------------------------------------------------------------- augmentation


@dataclass(frozen=True)
class Distortion:
    """How far training pictures may stray from the originals.

    Attributes:
        degrees: Rotation, either way.
        scale: Of each axis, as a natural logarithm, either way.
        shear: Sideways pixels per pixel of height, either way.
        shift_pixels: Either way, along both axes.
        elastic_pixels: Root mean square of the smooth displacement field.
        stroke: Share of pictures whose strokes are made thicker or thinner.
        coarse: Share of pictures that lose resolution, as a coarse scan would.
        contrast: Share of pictures with another tone curve and some noise.
    """

    degrees: float = 14.0
    scale: float = 0.18
    shear: float = 0.25
    shift_pixels: float = 2.5
    elastic_pixels: float = 1.25
    stroke: float = 0.3
    coarse: float = 0.2
    contrast: float = 0.3

    def scaled(self, strength: float) -> "Distortion":
        """The same with its geometry at `strength` times the amount; the shares stay."""
        return Distortion(
            self.degrees * strength,
            self.scale * strength,
            self.shear * strength,
            self.shift_pixels * strength,
            self.elastic_pixels * strength,
            self.stroke,
            self.coarse,
            self.contrast,
        )


def distort(pixels: Tensor, how: Distortion) -> Tensor:
    """Distort each picture in its own way: float [n, 28, 28] on 0..255, and back again."""
    ink = pixels.unsqueeze(1)
    ink = _on_some(ink, how.stroke, _restroke)
    ink = _warp(ink, how)
    ink = _on_some(ink, how.coarse, _coarsen)
    ink = _on_some(ink, how.contrast, _retone)
    return ink.squeeze(1)


def _on_some(ink: Tensor, share: float, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change about a `share` of the pictures."""
    (chosen,) = (torch.rand(len(ink), device=ink.device) < share).nonzero(as_tuple=True)
    return ink.index_copy(0, chosen, change(ink[chosen])) if len(chosen) else ink


def _either_way(like: Tensor, *shape: int) -> Tensor:
    """Uniform in -1..1."""
    return torch.rand(*shape, device=like.device) * 2 - 1


def _warp(ink: Tensor, how: Distortion) -> Tensor:
    """Random affine map and elastic displacement, in one resampling.

    The elastic field is Simard, Steinkraus and Platt's (*Best Practices for Convolutional
    Neural Networks Applied to Visual Document Analysis*, 2003): white noise, smoothed. It
    is smooth enough to be drawn on a coarse lattice.
    """
    count = len(ink)
    angle = torch.deg2rad(how.degrees * _either_way(ink, count))
    scale_x, scale_y = (how.scale * _either_way(ink, 2, count)).exp()
    shear = how.shear * _either_way(ink, count)
    shift_x, shift_y = how.shift_pixels * _either_way(ink, 2, count) * 2 / SIDE
    cosine, sine = angle.cos(), angle.sin()
    to_x = torch.stack([scale_x * cosine, shear * cosine - scale_y * sine, shift_x], -1)
    to_y = torch.stack([scale_x * sine, shear * sine + scale_y * cosine, shift_y], -1)
    # Pixel centres, on -1..1 as grid_sample wants them: [3, 784], the last row for the shift.
    centre = (torch.arange(SIDE, device=ink.device) * 2 + 1) / SIDE - 1
    centres = torch.stack(
        [centre.repeat(SIDE), centre.repeat_interleave(SIDE), torch.ones(SIDE**2, device=ink.device)]
    )
    spread = _lattice_to_pixels(ink.device)
    lattice = torch.randn(count, 2, spread.shape[1], spread.shape[1], device=ink.device)
    field = (spread @ lattice @ spread.T) * (how.elastic_pixels * 2 / SIDE)
    places = torch.stack([to_x, to_y], 1) @ centres + field.flatten(2)
    return grid_sample(ink, places.transpose(1, 2).reshape(count, SIDE, SIDE, 2), align_corners=False)


def _lattice_to_pixels(device: torch.device, points: int = 10, deviation_pixels: float = 4.0) -> Tensor:
    """Smooths numbers on a lattice to pixels along one axis, [28, points]; variance 1 stays 1."""
    pixel = torch.arange(SIDE, device=device, dtype=torch.float32)
    # The lattice reaches past the picture, so that its edge is as free as its middle.
    point = torch.linspace(-4, SIDE + 3, points, device=device)
    weights = torch.exp(-((pixel[:, None] - point[None]) ** 2) / (2 * deviation_pixels**2))
    return weights / weights.square().sum(1, keepdim=True).sqrt()


def _restroke(ink: Tensor) -> Tensor:
    """Thicken or thin the strokes: grey dilation or erosion, mixed in up to four fifths."""
    thick = max_pool2d(ink, 3, stride=1, padding=1)
    thin = -max_pool2d(-ink, 2, stride=1, padding=1)[..., :SIDE, :SIDE]
    thicken = torch.rand(len(ink), 1, 1, 1, device=ink.device) < 0.5
    amount = torch.rand(len(ink), 1, 1, 1, device=ink.device) * 0.8
    return torch.lerp(ink, torch.where(thicken, thick, thin), amount)


def _coarsen(ink: Tensor) -> Tensor:
    """Take the pictures through a coarser grid and back, one grid for all of them."""
    side = int(torch.randint(9, 17, ()))
    mode = ("bilinear", "bicubic")[int(torch.randint(0, 2, ()))]
    small = interpolate(ink, (side, side), mode="area")
    back = interpolate(small, (SIDE, SIDE), mode=mode, align_corners=False).clamp(min=0)
    # Coarse pictures come with their brightest pixel at full ink, as the room makes them.
    return (back * (255 / back.amax((2, 3), keepdim=True).clamp(min=32))).clamp(max=255)


def _retone(ink: Tensor) -> Tensor:
    """Another tone curve and a little noise."""
    gamma = (0.6 * _either_way(ink, len(ink), 1, 1, 1)).exp()
    toned = 255 * (ink / 255).clamp(0, 1) ** gamma
    noise = torch.rand(len(ink), 1, 1, 1, device=ink.device) * 16 * torch.randn_like(ink)
    return (toned + noise).clamp(0, 255)


# ---------------------------------------------------------------- networks


class _Normalise(nn.Module):
    """Pixels on 0..255, uint8 or float [n, 28, 28], to float [n, 1, 28, 28] around 0."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Mean and deviation of MNIST's training pixels.
        self.register_buffer("mean", torch.tensor(33.32))
        self.register_buffer("deviation", torch.tensor(78.57))

    def forward(self, pixels: Tensor) -> Tensor:
        return ((pixels.float() - self.mean) / self.deviation).unsqueeze(1)


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution and batch normalisation, which export folds into one."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))


class _Residual(nn.Module):
    """Two 3x3 convolutions beside a short cut (He et al., *Deep Residual Learning*, 2015)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _convolution(channels, channels)
        self.second = _convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


def convolutional() -> nn.Module:
    """A small residual network: 28x28, 14x14, 7x7 and 4x4 stages, then the mean over the picture."""
    return nn.Sequential(
        _Normalise(),
        _convolution(1, 16),
        nn.ReLU(),
        _convolution(16, 48, stride=2),
        nn.ReLU(),
        _Residual(48),
        _convolution(48, 64, stride=2),
        nn.ReLU(),
        _Residual(64),
        _convolution(64, 128, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, len(LABELS)),
    )


def perceptron(width: int = 512) -> nn.Module:
    """Two hidden layers, every pixel to every unit."""
    return nn.Sequential(
        _Normalise(),
        nn.Flatten(),
        nn.Linear(SIDE * SIDE, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(width, len(LABELS)),
    )


class _Ink(nn.Module):
    """Pixels on 0..255, uint8 or float [n, 28, 28], to float [n, 1, 28, 28] on 0..1.

    Black stays 0, so that what a convolution sees beyond the border is more paper.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255).unsqueeze(1)


def lean(first: int = 32, middle: int = 64, last: int = 128) -> nn.Module:
    """A third of the small residual network's work: all but the first layer see 7x7 pixels at most."""
    return nn.Sequential(
        _Ink(),
        nn.Conv2d(1, first, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        _convolution(first, middle, stride=2),
        nn.ReLU(),
        _Residual(middle),
        _convolution(middle, last, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(last, len(LABELS)),
    )


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "cnn": convolutional,
    "lean": lean,
    "mlp": perceptron,
}
"""Each takes pixels uint8 or float [n, 28, 28] on 0..255 and gives logits [n, 10]."""

WITH_A_TEACHER = ("lean", "mlp")
"""Architectures that learn from a larger one, which sees more than they find by themselves."""


# ---------------------------------------------------------------- teacher


@dataclass(frozen=True)
class Teacher:
    """An exported network, whose answers to distorted pictures a smaller one learns to give.

    Its probabilities say more than a label does: which other digit a picture nearly is, and that a
    distortion has spoilt it (Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural
    Network*, 2015; as there, the label is heard beside them). Whatever it is shown, the pupil is
    shown, and for long (Beyer et al., *Knowledge Distillation: A Good Teacher Is Patient and
    Consistent*, 2022).

    Attributes:
        network: Takes pixels uint8 [n, 28, 28], gives probabilities float32 [n, 10].
        sha256: Of its file.
        command: That trained it.
    """

    network: Network
    sha256: str
    command: str

    @classmethod
    def read(cls, folder: Path) -> "Teacher":
        """From the folder of a version, as in `models/digit/2`; of its files, the quickest on a CPU.

        Raises:
            TrainingError: it is no version of the digit model, or is not as its card says.
        """
        where = folder.absolute()
        if where.parent.name != DIGIT.name:
            raise TrainingError(
                f"{folder} is no version of the digit model; name one as in --teacher models/digit/1."
            )
        try:
            files = Repository(where.parents[1]).open(DIGIT.name, where.name, ("int8", "fp32"))
            network = Network(DIGIT, files.network, Profile(threads=torch.get_num_threads()))
        except (NotFound, RepositoryError, NetworkMismatch) as error:
            raise TrainingError(f"The teacher cannot be read: {error}") from error
        command = str(files.card["training"]["command"])
        return cls(network, files.card["files"][files.variant]["sha256"], command)

    def answers(self, pixels: Tensor) -> Tensor:
        """What it says of pictures, float [n, 28, 28] on 0..255: softened probabilities float32 [n, 10]."""
        shown = pixels.round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        rows = self.network.run([Sample((picture,)) for picture in shown])
        said = torch.from_numpy(np.stack([row[0] for row in rows])).to(pixels.device)
        return (said.clamp(min=SMALLEST_DOUBT).log() / SOFTNESS).softmax(1)


# ---------------------------------------------------------------- loss


def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy against what a teacher says, or slightly softened labels (Szegedy et al., 2016)."""
    pixels, digits = batch
    # A teacher's probabilities are soft already.
    smoothing = 0.0 if digits.is_floating_point() else LABEL_SMOOTHING
    return cross_entropy(network(pixels).float(), digits, label_smoothing=smoothing)


# ---------------------------------------------------------------- score


@torch.inference_mode()
def answers(network: nn.Module, images: Tensor) -> Tensor:
    """What the network says of each picture: uint8 or float [n, 28, 28] to float32 [n, 10]."""
    network.eval()
    return torch.cat([network(part).float() for part in torch.split(images, 1000)])


def predict(network: nn.Module, images: Tensor) -> Tensor:
    """The digit that the network sees in each picture: uint8 [n, 28, 28] to int64 [n]."""
    return answers(network, images).argmax(1)


def temperature(network: nn.Module, images: Tensor, digits: Tensor, seed: int) -> float:
    """The temperature that makes the network's probabilities honest.

    Fitted on fresh distortions of training digits, as mild as the last that it learnt from.
    Nothing need be held out for that: a network that never saw the same picture twice is no
    better on training digits than on others (99.77 % against 99.75 % on MNIST).

    Args:
        network: The trained one, giving logits.
        images: Training digits, uint8 [n, 28, 28].
        digits: What they are, int64 [n].
        seed: The run's.
    """
    fit.sow(seed)
    fresh = torch.cat(
        [distort(part.float(), Distortion().scaled(CALMEST)) for part in torch.split(images, 1000)]
    )
    return fit_temperature(answers(network, fresh).cpu(), digits.cpu())


def confusion(digits: Tensor, predicted: Tensor) -> npt.NDArray[np.int64]:
    """How often each digit (row) was read as each (column): int64 [10, 10]."""
    pairs = digits.cpu() * len(LABELS) + predicted.cpu()
    counts = torch.bincount(pairs, minlength=len(LABELS) ** 2)
    return counts.reshape(len(LABELS), len(LABELS)).numpy()


def head(network: nn.Module, card: Mapping[str, Any]) -> nn.Module:
    """The trained network with the room's outputs: probabilities float32 [n, 10]."""
    return Probabilities(network, float(card.get("temperature", 1.0)))


def exam(folder: Path | None, card: Mapping[str, Any]) -> Exam:
    """The test half of MNIST, or of the digits that the network was trained on instead.

    Args:
        folder: The data folder; None for the usual one.
        card: The network's card; its `data` say which digits its scores are about.

    Raises:
        TrainingError: the digits cannot be had, or are not those of the card.
    """
    named = card["data"]
    images, labels = load_mnist(folder, "test", verify=named["name"] == "MNIST")
    refuse_other_data(card, data.sha256_of(images.tobytes()))
    return Exam(f"{named['name']} {named['split']}", (images,), labels, likeliest, classification_scores)


def calibration(folder: Path | None, card: Mapping[str, Any]) -> tuple[Digits]:
    """Training digits, slightly distorted as the last epochs saw them: uint8 [n, 28, 28].

    Args:
        folder: The data folder; None for the usual one.
        card: The network's card.

    Raises:
        TrainingError: the digits cannot be had.
    """
    images, _ = load_mnist(folder, "train", verify=card["data"]["name"] == "MNIST")
    fit.sow(0)
    chosen = torch.randperm(len(images))[:QUANTISATION_DIGITS].numpy()
    distorted = distort(torch.tensor(images[chosen]).float(), Distortion().scaled(CALMEST))
    return (distorted.round().clamp(0, 255).to(torch.uint8).numpy(),)


# ---------------------------------------------------------------- settings

QUANTISATION_DIGITS = 1024
LABEL_SMOOTHING = 0.05
SOFTNESS = 2.0
"""The temperature at which a pupil hears its teacher: at 1 there is little but the label."""
LABEL_SHARE = 0.3
"""Of what a pupil hears beside its teacher, who is wrong now and then."""
SMALLEST_DOUBT = 1e-12
AVERAGE_DECAY = 0.999
CALM_FROM = 0.7
"""From this part of the run on the distortions shrink, towards the pictures that will be read."""
CALMEST = 0.4
CALIBRATION_DIGITS = 20_000
"""So many training digits give the temperature to a few thousandths."""


@dataclass(frozen=True)
class Recipe:
    """What an architecture is trained with, unless the command line says otherwise."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float


RECIPES = {
    "cnn": Recipe(28, 128, 4e-3, 0.05),
    "lean": Recipe(60, 128, 4e-3, 0.01),
    "mlp": Recipe(30, 256, 3e-3, 0.05),
}


def train(run: fit.Run) -> dict[str, Any]:
    """Train one network, score it on the test half, and leave both in `run.out`.

    Returns:
        The card.

    Raises:
        TrainingError: data, settings or resume point are not in order.
    """
    recipe = RECIPES[run.arch]
    (images, labels), (test_images, test_labels) = load_halves(run.data, run.holdout, verify=run.verify)
    settings = fit.Settings(
        epochs=run.epochs or recipe.epochs,
        batch_size=min(run.batch_size or recipe.batch_size, len(images)),
        seed=run.seed,
        device=run.device,
        precision=run.precision,
    )
    teacher = Teacher.read(run.teacher) if run.teacher else None
    with fit.processes(run.device) as device:
        fit.sow(run.seed)
        network = ARCHITECTURES[run.arch]().to(device)
        # Pixel by pixel rather than channel by channel: faster convolutions in bfloat16.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        pixels, digits, test_pixels, test_digits = (
            torch.tensor(array, device=device) for array in (images, labels, test_images, test_labels)
        )
        digits, test_digits = digits.long(), test_digits.long()
        steps = settings.epochs * fit.steps_per_epoch(len(images), settings.batch_size)
        optimizer = torch.optim.AdamW(_groups(network, recipe.weight_decay), lr=recipe.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=steps + 1, pct_start=0.2, cycle_momentum=False
        )
        reader = fit.Player("digit", network, loss, optimizer, schedule, AVERAGE_DECAY)

        def batch_of(indices: Tensor, progress: float) -> tuple[Tensor, Tensor]:
            chosen = indices.to(device)
            calm = max(0.0, (progress - CALM_FROM) / (1 - CALM_FROM))
            distorted = distort(pixels[chosen].float(), Distortion().scaled(1 - calm * (1 - CALMEST)))
            right = digits[chosen]
            if teacher is None:
                return distorted, right
            certain = one_hot(right, len(LABELS)).float()
            return distorted, teacher.answers(distorted).lerp(certain, LABEL_SHARE)

        def score() -> dict[str, float]:
            right = predict(reader.averaged, test_pixels) == test_digits
            return {"accuracy": right.float().mean().item()}

        story = fit.fit(
            [reader],
            examples=len(images),
            batch_of=batch_of,
            score=score,
            settings=settings,
            out=run.out,
            identity={**run.identity(settings, recipe), "teacher": teacher.sha256 if teacher else None},
            resume=run.resume,
        )
        if fit.process_rank() != 0:
            return {}
        heat = temperature(
            reader.averaged, pixels[:CALIBRATION_DIGITS], digits[:CALIBRATION_DIGITS], run.seed
        )
        probabilities = answers(head(reader.averaged, {"temperature": heat}), test_pixels)
        training = card.training_facts(run, settings, story, reader.averaged)
        if teacher:
            training["teacher"] = teacher.command
        facts = {
            "model": DIGIT.name,
            "arch": run.arch,
            "task": DIGIT.task,
            "labels": list(LABELS),
            "scores": classification_scores([probabilities.cpu().numpy()], test_labels),
            "temperature": heat,
            "data": {
                "name": "MNIST" if run.verify else "own digits",
                "sha256": data.sha256_of(test_images.tobytes()),
                "split": f"last {run.holdout} of train" if run.holdout else "test",
            },
            "training": training,
            "licence": "Apache-2.0; MNIST is CC BY-SA 3.0 (LeCun, Cortes, Burges)",
            "intended_use": "Single handwritten digits, written, scanned, photographed or drawn.",
            "limits": (
                "One digit to a picture. Every picture gets one of ten answers, also one that shows no "
                "digit; writers of MNIST are American, so a European 1 or a crossed 7 is read less surely."
            ),
        }
        card.write_checkpoint(run.out, reader.averaged, facts)
        card.draw_confusion(
            confusion(test_digits, probabilities.argmax(1)), LABELS, run.out / "confusion_matrix.png"
        )
        card.draw_curve(story.epochs, "accuracy", run.out / "learning_curve.png")
        return facts


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases and normalisation, which have one axis, do not."""
    matrices = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
