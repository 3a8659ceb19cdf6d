"""Draws handwritten digits: a conditional generative adversarial network (Goodfellow et al., 2014).

The digit reader reads 99.77 % of 10,000 pictures as the digit asked for. Their Fréchet distance
from MNIST's test half is 0.0189 (three other draws: 0.0200 to 0.0217), where as many real training
digits have 0.0112 (0.0106 to 0.0116). The digit that varies least varies 0.98 times as much as the
real ones do. 726,305 parameters, six epochs, seed 0, half an hour on half a core of a CPU.

A generator makes a picture from a digit and noise; a critic learns to tell its pictures from
MNIST's; each gets better by the other. Both are scored by the shipped digit reader
(`models/digit`), which neither ever learns from: the generator's agreement with the digit asked
for is trained through the critic's own second output, so nobody grades his own exam.

Rerun: python -m training generator
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, leaky_relu, multi_margin_loss
from torch.nn.utils.parametrizations import spectral_norm

from service.errors import NotFound
from service.models.digit import LABELS, SIDE
from service.models.generator import GENERATOR, LATENT, Picture, contact_sheet, noise_of
from service.models.spec import Array
from service.repository import Repository, RepositoryError
from training import card, data, fit
from training.digit import Digits, load_halves
from training.errors import TrainingError
from training.exam import Exam, refuse_other_data

# ---------------------------------------------------------------- data


class Batch(NamedTuple):
    """What one step of both players is about.

    Attributes:
        pictures: Of MNIST, float [n, 1, 28, 28] on 0..1.
        digits: What they show, and what the generator is asked for, int64 [n].
        noise: float [n, LATENT].
    """

    pictures: Tensor
    digits: Tensor
    noise: Tensor


def bell(count: int, device: torch.device) -> Tensor:
    """Noise from the room's own bell, float [count, LATENT]: sums of four uniform numbers, of variance 1."""
    return (torch.rand(count, LATENT, 4, device=device).sum(2) - 2) * 3**0.5


# ---------------------------------------------------------------- networks


class _Conditioned(nn.Module):
    """Batch normalisation whose gain and offset the digit chooses.

    Dumoulin, Shlens and Kudlur, *A Learned Representation for Artistic Style*, 2017.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain = nn.Embedding(len(LABELS), channels)
        self.offset = nn.Embedding(len(LABELS), channels)
        nn.init.ones_(self.gain.weight)
        nn.init.zeros_(self.offset.weight)

    def forward(self, x: Tensor, digit: Tensor) -> Tensor:
        # In the type of x: a product of bfloat16 and float32 would go on in float32.
        gain, offset = (chosen(digit).to(x.dtype)[:, :, None, None] for chosen in (self.gain, self.offset))
        return torch.relu(self.norm(x) * gain + offset)


class Generator(nn.Module):
    """A digit int64 [n] and noise float [n, LATENT] to ink on 0..1, float [n, 28, 28]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        # A convolution of one pixel where a matrix product would do: in ONNX Runtime its rows
        # come out the same in any company, to the last bit.
        self.unfold = nn.Conv2d(LATENT, 4 * width * 49, 1)
        self.first = _Conditioned(4 * width)
        self.shape = nn.Conv2d(4 * width, 4 * width, 3, padding=1, bias=False)
        self.second = _Conditioned(4 * width)
        self.to_14 = nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=False)
        self.third = _Conditioned(2 * width)
        self.to_28 = nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False)
        self.fourth = _Conditioned(width)
        self.ink = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, digit: Tensor, noise: Tensor) -> Tensor:
        """See the class."""
        x = self.unfold(noise[:, :, None, None]).reshape(-1, 4 * self.width, 7, 7)
        x = self.first(x, digit)
        x = self.second(self.shape(x), digit)
        x = self.third(self.to_14(x), digit)
        x = self.fourth(self.to_28(x), digit)
        return torch.sigmoid(self.ink(x).float()).squeeze(1)


class Opinion(NamedTuple):
    """What the critic thinks: float [n], high for real, and logits float [n, 10]."""

    realness: Tensor
    digit: Tensor


class Critic(nn.Module):
    """Ink float [n, 1, 28, 28] on 0..1 and the digit that it should show, int64 [n], to an `Opinion`.

    Spectral normalisation keeps it smooth (Miyato et al., 2018), a projection tells it the
    digit (Miyato and Koyama, 2018), and a second output reads the digit (Odena et al., 2017).
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.eye = nn.ModuleList(
            [
                spectral_norm(nn.Conv2d(1, width, 4, 2, 1)),
                spectral_norm(nn.Conv2d(width, 2 * width, 4, 2, 1)),
                spectral_norm(nn.Conv2d(2 * width, 2 * width, 3, 1, 1)),
                spectral_norm(nn.Conv2d(2 * width, 4 * width, 3, 2, 1)),
            ]
        )
        self.realness = spectral_norm(nn.Linear(4 * width, 1))
        self.expected = spectral_norm(nn.Embedding(len(LABELS), 4 * width))
        self.digit = nn.Linear(4 * width, len(LABELS))

    def forward(self, ink: Tensor, digit: Tensor) -> Opinion:
        """See the class."""
        x = ink * 2 - 1
        for convolution in self.eye:
            x = leaky_relu(convolution(x), 0.2)
        seen = x.float().sum((2, 3))
        realness = self.realness(seen).squeeze(1).float() + (self.expected(digit) * seen).sum(1)
        return Opinion(realness, self.digit(seen).float())


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {"gan": Generator}
"""Each takes a digit int64 [n] and noise float [n, LATENT] and gives ink float [n, 28, 28] on 0..1."""


# ---------------------------------------------------------------- loss


def critic_loss(critic: nn.Module, batch: Batch, generator: nn.Module) -> Tensor:
    """Hinge loss (Lim and Ye, *Geometric GAN*, 2017), and cross entropy on the real digits."""
    with torch.no_grad():
        drawn = generator(batch.digits, batch.noise).unsqueeze(1)
    # One pass over both, so that the gradients of several processes meet once.
    opinion: Opinion = critic(torch.cat([batch.pictures, drawn]), batch.digits.repeat(2))
    real, fake = opinion.realness.chunk(2)
    reading = cross_entropy(opinion.digit[: len(real)], batch.digits)
    return torch.relu(1 - real).mean() + torch.relu(1 + fake).mean() + reading


def generator_loss(generator: nn.Module, batch: Batch, critic: nn.Module, reading_weight: float) -> Tensor:
    """Be taken for real, and be read as the digit asked for, by a margin."""
    # Only the generator learns here: without this the critic would gather gradients for nothing.
    critic.requires_grad_(False)
    opinion: Opinion = critic(generator(batch.digits, batch.noise).unsqueeze(1), batch.digits)
    critic.requires_grad_(True)
    # A margin rather than cross entropy: a digit that is read well is not asked to be a caricature.
    reading = multi_margin_loss(opinion.digit, batch.digits, margin=READING_MARGIN)
    return reading_weight * reading - opinion.realness.mean()


# ---------------------------------------------------------------- score

Features = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


class Reader:
    """The shipped digit reader, and what it sees before it decides.

    Args:
        version: Of the digit model; the highest unless named.

    Raises:
        TrainingError: there is no such version, or it is not as its card says.
    """

    def __init__(self, version: str | None = None) -> None:
        try:
            files = Repository(MODELS_FOLDER).open("digit", version)
        except (NotFound, RepositoryError) as error:
            raise TrainingError(f"Pictures are scored by the shipped digit reader: {error}") from error
        self.version = str(files.version)
        graph = onnx.load_model_from_string(files.network)
        # What goes into the last layer.
        self._seen = next(node for node in reversed(graph.graph.node) if node.op_type == "Gemm").input[0]
        graph.graph.output.append(onnx.ValueInfoProto(name=self._seen))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, pixels: Digits) -> tuple[Numbers, Features]:
        """Pictures uint8 [n, 28, 28] to the digits read, int64 [n], and features, float64 [n, 128]."""
        digits, features = [], []
        for part in np.array_split(pixels, -(-len(pixels) // 250)):
            probabilities, seen = self._session.run(["probabilities", self._seen], {"pixels": part})
            digits.append(probabilities.argmax(axis=1))
            features.append(seen.astype(np.float64))
        return np.concatenate(digits), np.concatenate(features)


def frechet_distance(some: Features, others: Features) -> float:
    """How far two sets of features [n, features] lie apart, each taken for a normal distribution.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): Heusel et al., *GANs Trained by a Two
    Time-Scale Update Rule*, 2017.
    """
    root = _root(np.cov(some, rowvar=False))
    # C1 C2 has the eigenvalues of this product, which is symmetric.
    product = _root(root @ np.cov(others, rowvar=False) @ root)
    shift = some.mean(axis=0) - others.mean(axis=0)
    variance = some.var(axis=0, ddof=1).sum() + others.var(axis=0, ddof=1).sum()
    return float(shift @ shift + variance - 2 * np.trace(product))


def _root(matrix: Features) -> Features:
    """The square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    root: Features = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return root


def variety(pixels: Digits, digits: Numbers) -> Features:
    """How much each digit varies: the mean distance between two pictures of it, float64 [10].

    Euclidean, over pixels on 0..1. A generator that draws one picture of a digit has 0 there.
    """
    varieties = []
    for digit in range(len(LABELS)):
        rows = _rows(pixels[digits == digit][:LARGEST_CROWD])
        pairs = max(1, len(rows) * (len(rows) - 1))
        varieties.append(_distances(rows, rows).sum() / pairs)
    return np.array(varieties)


def _rows(pixels: Digits) -> Features:
    """Pictures uint8 [n, 28, 28] to rows float64 [n, 784] on 0..1."""
    return pixels.reshape(-1, SIDE * SIDE) / 255.0


def _distances(some: Features, others: Features) -> Features:
    """Euclidean distances between the rows of one array and those of another."""
    squares = (some**2).sum(axis=1)[:, None] + (others**2).sum(axis=1) - 2 * some @ others.T
    # Of a row to itself rounding may leave a little on either side of 0.
    distances: Features = np.sqrt(np.where(squares > 1e-9, squares, 0))
    return distances


class Judge:
    """Scores pictures beside real digits that the generator never saw.

    Args:
        reader: Reads all of them.
        real: The digits it never saw, uint8 [n, 28, 28], and their labels, uint8 [n].
        labels: Theirs.
        learned: The digits it learned from.

    Attributes:
        asked: The digits asked for, int64 [n]: those of the real pictures, in their order, so
            that both sides have as many of each.
        floors: How far real digits are from real digits: of the digits learned from, as many
            are drawn by lot, `DRAWS` times. Who learns from those comes closer only by luck.
    """

    def __init__(self, reader: Reader, real: Digits, labels: Digits, learned: Digits) -> None:
        real, self.asked = real[:MOST_COMPARED], labels[:MOST_COMPARED].astype(np.int64)
        self.reader = reader
        self._features = reader(real)[1]
        self._variety = variety(real, self.asked)
        lots = [np.random.default_rng(draw).permutation(len(learned))[: len(real)] for draw in range(DRAWS)]
        self.floors = [self.distance(learned[lot]) for lot in lots]

    def distance(self, pixels: Digits) -> float:
        """The Fréchet distance from the real ones, for as many pictures uint8 [n, 28, 28]."""
        return frechet_distance(self.reader(pixels)[1], self._features)

    def relative_variety(self, pixels: Digits) -> Features:
        """How much each digit varies, as a share of how much the real ones do: float64 [10]."""
        real = self._variety
        return variety(pixels, self.asked) / np.where(real > 0, real, 1)

    def scores(self, pixels: Digits) -> dict[str, float]:
        """What the card says of pictures of the digits asked for, uint8 [n, 28, 28].

        `agreement`: the share that is read as the digit asked for. `frechet_distance`: from the
        real ones; `frechet_floor`: the mean of the floors. `diversity`: the relative variety of
        the digit that has least of it.
        """
        read, features = self.reader(pixels)
        return {
            "agreement": float(np.mean(read == self.asked)),
            "frechet_distance": round(frechet_distance(features, self._features), 4),
            "frechet_floor": round(float(np.mean(self.floors)), 4),
            "diversity": round(float(self.relative_variety(pixels).min()), 4),
        }


def nearest_neighbours(pixels: Digits, among: Digits, count: int) -> tuple[Features, Numbers]:
    """The most similar pictures to each of some.

    Args:
        pixels: uint8 [n, 28, 28].
        among: uint8 [m, 28, 28].
        count: How many to find.

    Returns:
        Their distances, nearest first, and their places in `among`: each [n, count].
    """
    known = torch.tensor(_rows(among), dtype=torch.float32)
    parts = torch.tensor(_rows(pixels), dtype=torch.float32).split(250)
    found = [torch.cdist(part, known).topk(count, largest=False) for part in parts]
    distances, places = (torch.cat(both) for both in zip(*found, strict=True))
    return distances.double().numpy(), places.numpy()


def relative_distance(drawn: Digits, real: Digits, learned: Digits) -> float:
    """How far drawn pictures keep from those learned from, as a share of how far real ones do.

    Medians over the distances to the nearest neighbour. Copies have 0; 1 is as new as a new
    writer's digits.
    """
    drawn_median, real_median = (
        np.median(nearest_neighbours(pixels[:NEAREST_ASKED], learned, 1)[0]) for pixels in (drawn, real)
    )
    return round(float(drawn_median / real_median), 3)


def noise_for(digits: Iterable[int], seeds: Iterable[int]) -> npt.NDArray[np.float32]:
    """The room's noise for each digit and seed, float32 [n, LATENT]."""
    return np.stack([noise_of(int(digit), seed) for digit, seed in zip(digits, seeds, strict=True)])


@torch.inference_mode()
def draw(network: nn.Module, digits: Numbers, seeds: Sequence[int]) -> Digits:
    """The pictures that the room would give for digits int64 [n] and seeds [n]: uint8 [n, 28, 28]."""
    network.eval()
    device = next(network.parameters()).device
    pixels = Pixels(network)
    noise = torch.tensor(noise_for(digits, seeds), device=device)
    parts = zip(torch.tensor(digits, device=device).split(500), noise.split(500), strict=True)
    return np.concatenate([pixels(*part).cpu().numpy() for part in parts])


class Pixels(nn.Module):
    """A generator and the rounding after it, so that the graph itself gives bytes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, digit: Tensor, noise: Tensor) -> Tensor:
        """A digit int64 [n] and noise float [n, LATENT] to pixels uint8 [n, 28, 28]."""
        return (self.network(digit, noise) * 255).round().to(torch.uint8)


def head(network: nn.Module, card: Mapping[str, Any]) -> nn.Module:
    """The trained network with the room's output: pixels uint8 [n, 28, 28]."""
    return Pixels(network)


def exam(folder: Path | None, card: Mapping[str, Any]) -> Exam:
    """One picture for each real digit that the card's scores are about: of the same digit, from seed i.

    What a picture decides is the digit that the reader sees in it; its pixels may differ by the
    one level by which rounding can fall the other way, and not at all in company.

    Args:
        folder: The data folder; None for the usual one.
        card: The network's card; its `data` say which digits its scores are about.

    Raises:
        TrainingError: the digits or the reader cannot be had, or are not those of the card.
    """
    named = card["data"]
    (learned, _), (images, labels) = load_halves(folder, named["holdout"], verify=named["name"] == "MNIST")
    refuse_other_data(card, data.sha256_of(images.tobytes()))
    judge = Judge(Reader(card["reader"]["version"]), images, labels, learned)
    return Exam(
        name=f"one picture for each digit of {named['name']} {named['split']}",
        inputs=(judge.asked, noise_for(judge.asked, range(len(judge.asked)))),
        truth=judge,
        decide=lambda outputs: judge.reader(outputs[0])[0],
        score=lambda outputs, truth: truth.scores(outputs[0]),
        largest_difference=1.0,
        largest_neighbour_difference=0.0,
    )


def calibration(folder: Path | None, card: Mapping[str, Any]) -> tuple[Array, ...]:
    """Digits in turn, from seeds that the exam does not use: int64 [n] and noise float32 [n, LATENT]."""
    digits = np.arange(QUANTISATION_PICTURES) % len(LABELS)
    return digits, noise_for(digits, range(QUANTISATION_SEED, QUANTISATION_SEED + len(digits)))


# ---------------------------------------------------------------- settings

QUANTISATION_PICTURES = 512
QUANTISATION_SEED = 2**32
MODELS_FOLDER = Path(__file__).parents[1] / "models"
READING_MARGIN = 3.0
"""By how much the digit asked for should lead when the critic reads a picture, in logits."""
AVERAGE_DECAY = 0.9995
LARGEST_GRADIENT = 10.0
MOST_COMPARED = 10_000
"""Real and drawn pictures that a score is made from; a Fréchet distance depends on how many they are."""
LARGEST_CROWD = 1_000
"""Pictures of one digit that are compared each with each."""
NEAREST_ASKED = 1_000
"""Pictures whose nearest neighbours are looked for."""
NEAREST_PICTURE = "nearest_neighbours.png"
DRAWS = 3
"""How often the distances are taken, to say how far chance moves them."""


@dataclass(frozen=True)
class Recipe:
    """What an architecture is trained with, unless the command line says otherwise.

    Attributes:
        epochs: How often every digit is seen.
        batch_size: Digits per step.
        generator_rate: The generator's learning rate.
        critic_rate: The critic's.
        reading_weight: How much being read as the digit asked for counts beside being taken for real.
    """

    epochs: int
    batch_size: int
    generator_rate: float
    critic_rate: float
    reading_weight: float


RECIPES = {"gan": Recipe(6, 64, 5e-4, 5e-4, 0.2)}


def train(run: fit.Run) -> dict[str, Any]:
    """Train the two players, score the generator, and leave it with its pictures in `run.out`.

    Returns:
        The card.

    Raises:
        TrainingError: data, settings, the digit reader or the resume point are not in order.
    """
    recipe = RECIPES[run.arch]
    (images, labels), (test_images, test_labels) = load_halves(run.data, run.holdout, verify=run.verify)
    settings = fit.Settings(
        epochs=run.epochs or recipe.epochs,
        batch_size=min(run.batch_size or recipe.batch_size, len(images)),
        seed=run.seed,
        device=run.device,
        precision=run.precision,
        largest_gradient=LARGEST_GRADIENT,
    )
    with fit.processes(run.device) as device:
        fit.sow(run.seed)
        generator, critic = ARCHITECTURES[run.arch]().to(device), Critic().to(device)
        # Pixel by pixel rather than channel by channel: faster convolutions in bfloat16. Not for
        # the generator, whose batch normalisation is slower that way.
        critic.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        pixels, digits = torch.tensor(images, device=device), torch.tensor(labels, device=device).long()
        steps = fit.steps_per_epoch(len(images), settings.batch_size)
        against = functools.partial(critic_loss, generator=generator)
        towards = functools.partial(generator_loss, critic=critic, reading_weight=recipe.reading_weight)
        players = (
            _player("critic", critic, against, recipe.critic_rate, settings.epochs * steps),
            _player(
                "generator", generator, towards, recipe.generator_rate, settings.epochs * steps, AVERAGE_DECAY
            ),
        )
        artist = players[1]
        judge = Judge(Reader(), test_images, test_labels, images)

        def batch_of(indices: Tensor, progress: float) -> Batch:
            chosen = indices.to(device)
            ink = pixels[chosen].unsqueeze(1).float() / 255
            return Batch(ink, digits[chosen], bell(len(chosen), device))

        def score() -> dict[str, float]:
            epoch = artist.schedule.last_epoch // steps
            if epoch % 5 == 0 or epoch in (1, 2):
                _draw_samples(artist.averaged, run.out / "samples" / f"epoch-{epoch:03}.png")
            return judge.scores(draw(artist.averaged, judge.asked, range(len(judge.asked))))

        story = fit.fit(
            players,
            examples=len(images),
            batch_of=batch_of,
            score=score,
            settings=settings,
            out=run.out,
            identity=run.identity(settings, recipe),
            resume=run.resume,
        )
        if fit.process_rank() != 0:
            return {}
        drawn = draw(artist.averaged, judge.asked, range(len(judge.asked)))
        facts = {
            "model": GENERATOR.name,
            "arch": run.arch,
            "task": GENERATOR.task,
            "labels": list(LABELS),
            "scores": judge.scores(drawn),
            "data": {
                "name": "MNIST" if run.verify else "own digits",
                "sha256": data.sha256_of(test_images.tobytes()),
                "split": f"last {run.holdout} of train" if run.holdout else "test",
                "holdout": run.holdout,
            },
            "training": card.training_facts(run, settings, story, artist.averaged),
            "reader": {"model": "digit", "version": judge.reader.version},
            "draws": {
                "pictures": len(drawn),
                "frechet_distances": _other_draws(artist.averaged, judge),
                "frechet_floors": [round(distance, 4) for distance in judge.floors],
            },
            "variety": dict(zip(LABELS, judge.relative_variety(drawn).round(3).tolist(), strict=True)),
            "nearest_neighbours": {
                "picture": NEAREST_PICTURE,
                "relative_distance": relative_distance(drawn, test_images, images),
            },
            "licence": "Apache-2.0; MNIST is CC BY-SA 3.0 (LeCun, Cortes, Burges)",
            "intended_use": "Pictures of single digits in the hands of MNIST's writers, for play and tests.",
            "limits": (
                "28 by 28 pixels, one digit. A few pictures in a thousand can be taken for another digit, "
                "and some are no good digit at all. Not for making documents look as if written by hand."
            ),
        }
        card.write_checkpoint(run.out, artist.averaged, facts)
        _draw_nearest(artist.averaged, images, run.out / NEAREST_PICTURE)
        _draw_samples(artist.averaged, run.out / "samples.png")
        card.draw_curve(story.epochs, "agreement", run.out / "learning_curve.png")
        card.draw_curve(story.epochs, "frechet_distance", run.out / "frechet_curve.png")
        return facts


def _player(
    name: str,
    network: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    rate: float,
    steps: int,
    average_decay: float = 0.0,
) -> fit.Player:
    """Adam without momentum, and a learning rate that falls to nothing over the second half of the run."""
    optimizer = torch.optim.Adam(network.parameters(), lr=rate, betas=(0.0, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 2 * (1 - step / (steps + 1)))
    )
    return fit.Player(name, network, loss, optimizer, schedule, average_decay)


def _other_draws(network: nn.Module, judge: Judge) -> list[float]:
    """The Fréchet distances of as many pictures from other seeds, `DRAWS` times."""
    count = len(judge.asked)
    starts = range(count, (DRAWS + 1) * count, count)
    draws = (draw(network, judge.asked, range(start, start + count)) for start in starts)
    return [round(judge.distance(pixels), 4) for pixels in draws]


def _draw_samples(network: nn.Module, path: Path) -> None:
    """Ten pictures of each digit, a row for each; the same seeds each time."""
    digits, seeds = np.repeat(np.arange(10), 10), list(range(10)) * 10
    card.write(path, contact_sheet(_answers(digits, seeds, draw(network, digits, seeds))))


def _draw_nearest(network: nn.Module, learned: Digits, path: Path) -> None:
    """A picture of each digit, and under it the three that come nearest among those learned from."""
    digits, seeds = np.arange(10), [0] * 10
    drawn = draw(network, digits, seeds)
    _, nearest = nearest_neighbours(drawn, learned, 3)
    column = [drawn, *(learned[rank] for rank in nearest.T)]
    card.write(path, contact_sheet(_answers(np.tile(digits, 4), seeds * 4, np.concatenate(column))))


def _answers(digits: Numbers, seeds: Sequence[int], pixels: Digits) -> list[Picture]:
    """Pictures as the room answers them."""
    return [Picture(int(digit), *rest) for digit, *rest in zip(digits, seeds, pixels, strict=True)]
