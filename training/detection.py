"""Finds the cells in microscope pictures of blood.

`cnn`: on BCCD's val split a mean average precision of 0.921 at half an overlap and 0.622 over
overlaps from 0.50 to 0.95 (seed 1, the averaged weights after the last epoch; red cells 0.877 and
0.619, white cells 0.995 and 0.798, platelets 0.891 and 0.449); seed 0: 0.919 and 0.630.
2,635,399 parameters, 19 minutes on one core of a CPU that others shared.

Rerun: python -m training detection
"""

import hashlib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, max_pool2d

from service.errors import BadInput
from service.models import detection as room
from service.models import pictures
from service.models.detection import CANDIDATES, FILL, HEIGHT, LABELS, LEAST_CONFIDENCE, WIDTH
from service.models.pictures import Pixels
from service.models.spec import Array, Sample
from training import card, data, fit
from training.errors import TrainingError
from training.exam import Exam, refuse_other_data

# ---------------------------------------------------------------- data

LARGEST_XML_BYTES = 2**20
SIDES = ("xmin", "ymin", "xmax", "ymax")


def _train_and_val(folder: Path) -> list[str]:
    """The files of the two splits that we read; BCCD has a test split beside them."""
    lists = [f"ImageSets/Main/{split}.txt" for split in ("train", "val")]
    names = [name for path in lists for name in (folder / path).read_text(encoding="utf-8").split()]
    return [
        *lists,
        *(f"JPEGImages/{name}.jpg" for name in names),
        *(f"Annotations/{name}.xml" for name in names),
    ]


COMMIT = "ec96fe4104e9bb329f0d263db95cf1edd8c09909"
BCCD = data.Archive(
    name="BCCD",
    folder="BCCD",
    mirrors=(f"https://github.com/Shenggan/BCCD_Dataset/archive/{COMMIT}.zip",),
    inside=f"BCCD_Dataset-{COMMIT}/BCCD",
    files=("ImageSets/Main/*.txt", "JPEGImages/*.jpg", "Annotations/*.xml"),
    chosen=_train_and_val,
    file_count=586,
    content_bytes=7_078_822,
    content_sha256="2a04dc083708c9dbd07287517a16809169ea54712ea0c3b645c83e7aed00f6a2",
)


class Annotated(NamedTuple):
    """A picture and the cells that somebody marked in it.

    Attributes:
        sha256: The checksum of its file.
        pixels: uint8 RGB [height, width, 3].
        boxes: float32 [n, 4], xyxy in pixels.
        labels: int64 [n], places in `LABELS`.
    """

    sha256: str
    pixels: Pixels
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


def load_bccd(folder: Path | None, split: str, *, verify: bool = True) -> list[Annotated]:
    """The pictures of one split of BCCD, in the order of its list.

    Args:
        folder: Holds `BCCD/` with the publisher's files; None for `$QUINTET_DATA` or the cache.
        split: `train` (205 pictures) or `val` (87).
        verify: Whether it must be BCCD, byte for byte. False takes anyone's own pictures in
            the same layout (PASCAL VOC's).

    Raises:
        TrainingError: the files cannot be had, or are damaged.
    """
    home = data.find_archive(BCCD, folder, verify=verify)
    listing = home / "ImageSets" / "Main" / f"{split}.txt"
    try:
        names = listing.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"There is no list of pictures {listing}; BCCD belongs in {home}.") from error
    if not names:
        raise TrainingError(f"{listing} names no pictures.")
    return [_read_annotated(home, name) for name in names]


def _read_annotated(home: Path, name: str) -> Annotated:
    """One picture and its annotation."""
    path = home / "JPEGImages" / f"{name}.jpg"
    try:
        content = path.read_bytes()
        pixels = pictures.decode_colour(content)
    except OSError as error:
        raise TrainingError(f"There is no picture {path}.") from error
    except BadInput as error:
        raise TrainingError(f"{path} is no picture that can be read: {error.detail}") from error
    boxes, labels = read_voc(home / "Annotations" / f"{name}.xml")
    height, width = pixels.shape[:2]
    boxes = np.clip(boxes, 0, np.array([width, height] * 2, np.float32))
    # Two red cells of BCCD are boxes without area.
    real = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return Annotated(data.sha256_of(content), pixels, boxes[real], labels[real])


def read_voc(path: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The boxes float32 [n, 4] (xyxy) and labels int64 [n] in an annotation of PASCAL VOC's form.

    Raises:
        TrainingError: the file is missing, too long, no such annotation, or names another cell.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_XML_BYTES + 1)
    except OSError as error:
        raise TrainingError(f"There is no annotation {path}.") from error
    # Entities are how a few bytes of XML unfold to gigabytes; annotations have no use for them.
    if len(content) > LARGEST_XML_BYTES or b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise TrainingError(f"{path} is not an annotation: it is too long or defines entities.")
    boxes, labels = [], []
    try:
        for marked in ElementTree.fromstring(content).iter("object"):
            label = marked.findtext("name", "").strip()
            if label not in LABELS:
                raise TrainingError(f"{path} marks a {label!r}; known are: {', '.join(LABELS)}.")
            sides = [float(marked.findtext(f"bndbox/{side}", "")) for side in SIDES]
            if not np.isfinite(sides).all():
                raise ValueError("a box without end")
            labels.append(LABELS.index(label))
            boxes.append(sides)
    except (ElementTree.ParseError, ValueError) as error:
        raise TrainingError(f"{path} is damaged: {error}.") from error
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64)


# ---------------------------------------------------------------- augmentation


@dataclass(frozen=True)
class Distortion:
    """How far training pictures may stray from the originals.

    Cells have no up: they are also mirrored, and turned.

    Attributes:
        turned: Share of pictures that are transposed, which together with the mirrors makes
            all eight ways a square can lie.
        scale: Largest enlargement; the largest shrinking is its inverse.
        stretch: Of each axis by itself, as a share, either way.
        visible: A cell stays marked when so much of its box is still on the canvas.
        contrast: Of all channels, as a share, either way.
        tint: Of each channel, as a share, either way.
        brightness: Added to all channels, in grey levels, either way.
        soft: Share of pictures that are blurred or lose resolution.
    """

    turned: float = 0.5
    scale: float = 1.45
    stretch: float = 0.08
    visible: float = 0.3
    contrast: float = 0.3
    tint: float = 0.08
    brightness: float = 20.0
    soft: float = 0.2

    def calmer(self, calm: float) -> "Distortion":
        """The same with its geometry on the way to the pictures as they are, which it reaches at 1."""
        rest = 1 - calm
        return replace(self, turned=self.turned * rest, scale=self.scale**rest, stretch=self.stretch * rest)


def distort(
    example: Annotated, how: Distortion, chance: np.random.Generator
) -> tuple[Pixels, npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """A picture turned, mirrored, scaled, moved and recoloured, on the canvas.

    Returns:
        uint8 RGB [HEIGHT, WIDTH, 3], boxes float32 [n, 4] on the canvas, labels int64 [n].
    """
    pixels, boxes, labels = example.pixels, example.boxes.copy(), example.labels
    height, width = pixels.shape[:2]
    # As large as on the canvas when it lies flat, whichever way it is turned.
    base = max(min(WIDTH / width, HEIGHT / height), min(WIDTH / height, HEIGHT / width))
    scale = base * how.scale ** chance.uniform(-1, 1)
    new_width = max(8, round(width * scale * (1 + chance.uniform(-how.stretch, how.stretch))))
    new_height = max(8, round(height * scale * (1 + chance.uniform(-how.stretch, how.stretch))))
    pixels = room.resized(pixels, new_width, new_height)
    boxes *= np.array([new_width / width, new_height / height] * 2, np.float32)
    if chance.random() < 0.5:
        pixels = pixels[:, ::-1]
        boxes[:, [0, 2]] = new_width - boxes[:, [2, 0]]
    if chance.random() < 0.5:
        pixels = pixels[::-1]
        boxes[:, [1, 3]] = new_height - boxes[:, [3, 1]]
    if chance.random() < how.turned:
        pixels = pixels.transpose(1, 0, 2)
        boxes = boxes[:, [1, 0, 3, 2]]
        new_width, new_height = new_height, new_width
    canvas = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    canvas[:] = FILL
    x, y = _place(new_width, WIDTH, chance), _place(new_height, HEIGHT, chance)
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + new_width, WIDTH), min(y + new_height, HEIGHT)
    part = _retoned(np.ascontiguousarray(pixels[top - y : bottom - y, left - x : right - x]), how, chance)
    canvas[top:bottom, left:right] = part
    boxes += np.array([x, y, x, y], np.float32)
    whole = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    boxes = np.clip(boxes, 0, np.array([WIDTH, HEIGHT] * 2, np.float32))
    stays = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) >= how.visible * whole
    return canvas, boxes[stays], labels[stays]


def _place(length: int, space: int, chance: np.random.Generator) -> int:
    """Where a side of the picture begins on the canvas: anywhere it fits, or covers the canvas."""
    return int(chance.integers(min(0, space - length), max(0, space - length) + 1))


def _retoned(pixels: Pixels, how: Distortion, chance: np.random.Generator) -> Pixels:
    """Another tone and tint, and for some less sharpness: as of another lamp, camera or lens."""
    contrast = 1 + chance.uniform(-how.contrast, how.contrast)
    gains = contrast * (1 + chance.uniform(-how.tint, how.tint, 3))
    levels = np.arange(256, dtype=np.float32)[:, None]
    middle = np.array(FILL, np.float32)
    table = (levels - middle) * gains + middle * (1 + chance.uniform(-how.tint, how.tint, 3))
    table = np.clip(table + chance.uniform(-how.brightness, how.brightness), 0, 255).astype(np.uint8)
    pixels = cv2.LUT(pixels, np.ascontiguousarray(table[None]))  # type: ignore[assignment]
    if chance.random() < how.soft:
        pixels = cv2.GaussianBlur(pixels, (0, 0), chance.uniform(0.3, 1.2))  # type: ignore[assignment]
    return pixels


class Batch(NamedTuple):
    """What the loss understands.

    Attributes:
        pixels: uint8 [n, HEIGHT, WIDTH, 3].
        boxes: float32 [n, m, 4], on the canvas; m is that of the fullest picture.
        labels: int64 [n, m].
        real: bool [n, m], False where a row is padding.
    """

    pixels: Tensor
    boxes: Tensor
    labels: Tensor
    real: Tensor


def batch_of(examples: Sequence[tuple[Pixels, Array, Array]], device: torch.device) -> Batch:
    """Canvases and their boxes and labels, padded to one length."""
    most = max(1, *(len(labels) for _, _, labels in examples))
    boxes = np.zeros((len(examples), most, 4), np.float32)
    labels = np.zeros((len(examples), most), np.int64)
    real = np.zeros((len(examples), most), np.bool_)
    for row, (_, own_boxes, own_labels) in enumerate(examples):
        boxes[row, : len(own_labels)] = own_boxes
        labels[row, : len(own_labels)] = own_labels
        real[row, : len(own_labels)] = True
    pixels = np.stack([pixels for pixels, _, _ in examples])
    return Batch(*(torch.from_numpy(array).to(device) for array in (pixels, boxes, labels, real)))


# ---------------------------------------------------------------- network

STRIDE = 8
"""Of the one map that boxes are read from, in pixels."""

ROWS, COLUMNS = HEIGHT // STRIDE, WIDTH // STRIDE


def middles() -> Tensor:
    """The middle of each place on the canvas, x and y in pixels: float32 [ROWS * COLUMNS, 2]."""
    rows, columns = torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    return (torch.stack([columns, rows], 2).reshape(-1, 2) + 0.5) * STRIDE


class _Stem(nn.Module):
    """Pixels on 0..255 to a map at stride 4: each 4x4 block of them becomes one place of 48 channels.

    Nothing is lost by that, and no convolution runs at full resolution (the stem of Ridnik et
    al., *TResNet*, 2020).
    """

    mean: Tensor

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(FILL, dtype=torch.float32))
        self.convolution = _convolution(48, outputs)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 or float [n, HEIGHT, WIDTH, 3] to [n, outputs, HEIGHT / 4, WIDTH / 4]."""
        centred = (pixels.float() - self.mean) / 32.0
        blocks = centred.reshape(-1, HEIGHT // 4, 4, WIDTH // 4, 4, 3).transpose(2, 3)
        return self.convolution(blocks.reshape(-1, HEIGHT // 4, WIDTH // 4, 48).permute(0, 3, 1, 2))


def _convolution(inputs: int, outputs: int, side: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, which export folds into it, and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class _Residual(nn.Module):
    """Two 3x3 convolutions beside a short cut (He et al., *Deep Residual Learning*, 2015)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _convolution(channels, channels)
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(self.first(x)))


class _Wide(nn.Module):
    """Sees far: the maximum over three growing windows beside the map itself.

    From He et al., *Spatial Pyramid Pooling*, 2014; one pooling after the other is Jocher's, YOLOv5, 2021.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.narrow = _convolution(channels, channels // 2, 1)
        self.join = _convolution(channels * 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.narrow(x)]
        for _ in range(3):
            maps.append(max_pool2d(maps[-1], 5, 1, 2))
        return self.join(torch.cat(maps, 1))


class Detector(nn.Module):
    """One map at stride 8, every place of which says what cell it is in, and where its sides are.

    Strides 4 to 32 look ever farther; what they see is brought back up and added to the
    finer maps (Lin et al., *Feature Pyramid Networks*, 2017). No anchors: a place gives the
    distances to the four sides (Tian et al., *FCOS*, 2019).
    """

    places: Tensor

    def __init__(self, widths: Sequence[int] = (48, 64, 128, 224), neck: int = 64) -> None:
        super().__init__()
        four, eight, sixteen, thirty_two = widths
        self.stem = _Stem(four)
        self.eight = nn.Sequential(_convolution(four, eight, stride=2), _Residual(eight), _Residual(eight))
        self.sixteen = nn.Sequential(
            _convolution(eight, sixteen, stride=2), _Residual(sixteen), _Residual(sixteen)
        )
        self.thirty_two = nn.Sequential(
            _convolution(sixteen, thirty_two, stride=2), _Residual(thirty_two), _Wide(thirty_two)
        )
        self.up_sixteen = _convolution(thirty_two, sixteen, 1)
        self.join_sixteen = _Residual(sixteen)
        self.up_eight = _convolution(sixteen, neck, 1)
        self.side_eight = _convolution(eight, neck, 1)
        self.join_eight = _Residual(neck)
        self.kind = nn.Sequential(_convolution(neck, neck), nn.Conv2d(neck, len(LABELS), 1))
        self.sides = nn.Sequential(_convolution(neck, neck), nn.Conv2d(neck, 4, 1))
        self.register_buffer("places", middles(), persistent=False)
        nn.init.constant_(self.kind[-1].bias, -4.0)
        # Half a red cell, 40 pixels.
        nn.init.constant_(self.sides[-1].bias, float(np.log(40 / STRIDE)))
        nn.init.normal_(self.sides[-1].weight, std=0.01)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of each kind at each place [n, ROWS * COLUMNS, 3], and boxes xyxy [n, ROWS * COLUMNS, 4]."""
        eight = self.eight(self.stem(pixels))
        sixteen = self.sixteen(eight)
        thirty_two = self.thirty_two(sixteen)
        sixteen = self.join_sixteen(sixteen + _doubled(self.up_sixteen(thirty_two)))
        eight = self.join_eight(self.side_eight(eight) + _doubled(self.up_eight(sixteen)))
        kinds = self.kind(eight).flatten(2).transpose(1, 2)
        # Never so far that float16 could not hold it.
        sides = self.sides(eight).flatten(2).transpose(1, 2).float().clamp(-3, 4).exp() * STRIDE
        boxes = torch.cat([self.places - sides[..., :2], self.places + sides[..., 2:]], 2)
        return kinds, boxes


def _doubled(x: Tensor) -> Tensor:
    """Twice as high and wide."""
    return interpolate(x, scale_factor=2.0, mode="nearest")


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {"cnn": Detector}
"""Each takes pixels uint8 or float [n, 384, 512, 3] on 0..255."""


class Head(nn.Module):
    """A detector and the choice of its likeliest boxes, so that the graph itself gives them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes float32 [n, k, 4], confidence float32 [n, k], the surest first, and label int64 [n, k].

        Where there are fewer than k, the rest is zeros, with -1 for a label.
        """
        logits, boxes = self.network(pixels)
        confidence = torch.sigmoid(logits.float())
        # Of one cell many places speak; only the surest among its neighbours is heard (Zhou et al.,
        # *Objects as Points*, 2019).
        maps = confidence.transpose(1, 2).reshape(-1, len(LABELS), ROWS, COLUMNS)
        peaks = torch.where(max_pool2d(maps, 3, 1, 1) == maps, maps, torch.zeros_like(maps))
        best, index = torch.topk(peaks.flatten(1), CANDIDATES)
        # In whole numbers throughout: a division would go through floats, and float16 ends at 2048.
        label = sum((index >= kind * ROWS * COLUMNS).long() for kind in range(1, len(LABELS)))
        place = index - label * (ROWS * COLUMNS)
        chosen = torch.gather(boxes.float(), 1, place.unsqueeze(2).expand(-1, -1, 4))
        # Noise has no order that two machines would agree on; it is left out.
        is_real = best >= LEAST_CONFIDENCE
        return (
            torch.where(is_real.unsqueeze(2), chosen, 0.0),
            torch.where(is_real, best, 0.0),
            torch.where(is_real, label, -1),
        )


def head(network: nn.Module, card: Mapping[str, Any]) -> nn.Module:
    """The trained network, giving the room's `network_outputs`."""
    return Head(network)


# ---------------------------------------------------------------- loss


def pair_overlaps(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of each box with each other: [n, m, 4] and [n, p, 4] to [n, m, p]."""
    upper_left = torch.maximum(one[:, :, None, :2], other[:, None, :, :2])
    lower_right = torch.minimum(one[:, :, None, 2:], other[:, None, :, 2:])
    shared = (lower_right - upper_left).clamp(min=0).prod(3)
    areas, other_areas = ((boxes[..., 2:] - boxes[..., :2]).prod(2) for boxes in (one, other))
    return shared / (areas[:, :, None] + other_areas[:, None, :] - shared).clamp(min=1e-6)


@torch.no_grad()
def assign(logits: Tensor, boxes: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Which places answer for which cell, and how sure each should be.

    For every cell, those places inside its box answer that are best at both tasks already:
    at its kind and at its sides (Feng et al., *TOOD*, 2021). The best of them should be as
    sure as its box is good; others less, in proportion.

    Args:
        logits: [n, p, kinds].
        boxes: [n, p, 4].
        batch: What is right.

    Returns:
        For every place the row of its cell, int64 [n, p] (-1 where it has none), and the
        confidence it should have, float [n, p].
    """
    overlap = pair_overlaps(batch.boxes, boxes)
    kinds = batch.labels[:, :, None].expand(-1, -1, logits.shape[1])
    confidence = torch.sigmoid(logits.float()).transpose(1, 2).gather(1, kinds)
    places = middles().to(boxes.device)
    inside = (places > batch.boxes[:, :, None, :2]) & (places < batch.boxes[:, :, None, 2:])
    allowed = inside.all(3) & batch.real[:, :, None]
    merit = torch.where(allowed, confidence.sqrt() * overlap**ALIGNMENT, 0.0)
    index = merit.topk(PLACES_PER_CELL, dim=2).indices
    chosen = torch.zeros_like(merit).scatter_(2, index, 1.0).bool() & allowed & (merit > 0)
    # Where two cells want one place, it answers for the one that it fits better.
    fits = torch.where(chosen, overlap, -1.0)
    chosen &= torch.zeros_like(chosen).scatter_(1, fits.argmax(1, keepdim=True), True)
    merit = torch.where(chosen, merit, 0.0)
    overlap = torch.where(chosen, overlap, 0.0)
    wanted = merit / merit.amax(2, keepdim=True).clamp(min=1e-9) * overlap.amax(2, keepdim=True)
    wanted, cell = wanted.max(1)
    return torch.where(chosen.any(1), cell, -1), wanted


def box_loss(one: Tensor, other: Tensor) -> Tensor:
    """How badly boxes fit: [n, 4] twice to [n], 0 where they are equal.

    Overlap, distance and shape together (complete IoU, Zheng et al., *Distance-IoU Loss*, 2020).
    """
    shared = (torch.minimum(one[:, 2:], other[:, 2:]) - torch.maximum(one[:, :2], other[:, :2])).clamp(min=0)
    size, other_size = one[:, 2:] - one[:, :2], other[:, 2:] - other[:, :2]
    shared = shared.prod(1)
    union = size.prod(1) + other_size.prod(1) - shared
    hull = torch.maximum(one[:, 2:], other[:, 2:]) - torch.minimum(one[:, :2], other[:, :2])
    apart = ((one[:, :2] + one[:, 2:] - other[:, :2] - other[:, 2:]) / 2).square().sum(1)
    overlap = shared / union.clamp(min=1e-6)
    shape = (
        4
        / np.pi**2
        * (torch.atan2(size[:, 0], size[:, 1]) - torch.atan2(other_size[:, 0], other_size[:, 1])).square()
    )
    with torch.no_grad():
        trade = shape / (1 - overlap + shape).clamp(min=1e-6)
    return 1 - overlap + apart / hull.square().sum(1).clamp(min=1e-6) + trade * shape


def loss(network: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of the confidences everywhere, and the boxes' misfit where a place has a cell."""
    logits, boxes = network(batch.pixels)
    logits = logits.float()
    cell, wanted = assign(logits, boxes, batch)
    picture, place = torch.nonzero(cell >= 0, as_tuple=True)
    row, worth = cell[picture, place], wanted[picture, place]
    targets = torch.zeros_like(logits)
    targets[picture, place, batch.labels[picture, row]] = worth
    total = worth.sum().clamp(min=1.0)
    kinds = binary_cross_entropy_with_logits(logits, targets, reduction="sum") / total
    misfit = (box_loss(boxes[picture, place], batch.boxes[picture, row]) * worth).sum() / total
    return kinds + BOX_WEIGHT * misfit


# ---------------------------------------------------------------- score


class Examples(NamedTuple):
    """Pictures as the network gets them, and all that is needed to score its answers.

    Attributes:
        canvases: uint8 [n, HEIGHT, WIDTH, 3].
        samples: What the room made of each picture, with nothing too unsure to be counted.
        truth: What people marked.
    """

    canvases: Array
    samples: list[Sample]
    truth: list[Annotated]


def as_served(truth: list[Annotated]) -> Examples:
    """Pictures laid on the canvas as the room does it."""
    samples = []
    for example in truth:
        canvas, lies = room.letterbox(example.pixels)
        samples.append(Sample((canvas,), room.Context(lies, 0.0)))
    return Examples(np.stack([sample.tensors[0] for sample in samples]), samples, truth)


@torch.inference_mode()
def answers(network: nn.Module, canvases: Tensor) -> list[Array]:
    """The room's network outputs for canvases uint8 [n, HEIGHT, WIDTH, 3], each [n, ...]."""
    whole = Head(network).eval()
    parts = [whole(part) for part in torch.split(canvases, 16)]
    return [torch.cat(outputs).cpu().numpy() for outputs in zip(*parts, strict=True)]


def found_in(outputs: Sequence[Array], samples: Sequence[Sample]) -> list[room.Detections]:
    """The room's answers, one for each picture."""
    return list(map(room.to_answer, zip(*outputs, strict=True), samples))


def average_precision(found: Sequence[room.Detections], truth: Sequence[Annotated]) -> dict[str, float]:
    """COCO's scores by COCO's rules (Lin et al., *Microsoft COCO*, 2014), 100 objects a picture at most.

    Returns:
        `map50`, where half an overlap is enough; `map50_95`, the mean over overlaps from 0.50
        to 0.95; and both for each label: `ap50_rbc`, `ap50_95_rbc`, …, 0 where nobody marked any.
    """
    marked = [
        _in_coco_form(picture, box, label)
        for picture, example in enumerate(truth)
        for box, label in zip(example.boxes.tolist(), example.labels.tolist(), strict=True)
    ]
    given = [
        {**_in_coco_form(picture, box, label), "score": score}
        for picture, one in enumerate(found)
        for box, label, score in zip(
            one.boxes.tolist(), one.label.tolist(), one.confidence.tolist(), strict=True
        )
    ]
    by_overlap = np.zeros((10, len(LABELS)))
    if given:
        marks = COCO(
            {
                "images": [{"id": picture} for picture in range(len(truth))],
                "annotations": [{**mark, "id": number} for number, mark in enumerate(marked, 1)],
                "categories": [{"id": number, "name": label} for number, label in enumerate(LABELS)],
            }
        )
        evaluation = COCOeval_faster(marks, marks.loadRes(given), "bbox", print_function=_say_nothing)
        evaluation.evaluate()
        evaluation.accumulate()
        # [overlaps, recalls, labels, sizes, limits]: of all sizes, and the loosest limit.
        by_overlap = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1].mean(axis=1)
    # COCO says -1 of a label that nobody marked.
    known = np.isin(np.arange(len(LABELS)), [mark["category_id"] for mark in marked])
    by_overlap = np.where(known, by_overlap, 0.0)
    share = known / max(1, known.sum())
    scores = {"map50": float(by_overlap[0] @ share), "map50_95": float(by_overlap.mean(axis=0) @ share)}
    for number, label in enumerate(LABELS):
        scores[f"ap50_{label.lower()}"] = float(by_overlap[0, number])
        scores[f"ap50_95_{label.lower()}"] = float(by_overlap[:, number].mean())
    return scores


def _in_coco_form(picture: int, box: list[float], label: int) -> dict[str, Any]:
    """A box as COCO writes it: from its upper left corner, so wide and so high."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    return {
        "image_id": picture,
        "category_id": label,
        "bbox": [left, top, width, height],
        "area": width * height,
        "iscrowd": 0,
    }


def _say_nothing(*words: object) -> None:
    """The evaluation would print a table."""


def exam(folder: Path | None, card: Mapping[str, Any]) -> Exam:
    """BCCD's val split, or that of the pictures that the network was trained on instead.

    Decided for every picture is how many objects of each kind people are shown: those that are
    sure enough, each once. (Before suppression neighbours of equal confidence count twice, and in
    fp16 many are equal.)

    Args:
        folder: The data folder; None for the usual one.
        card: The network's card; its `data` say which pictures its scores are about.

    Raises:
        TrainingError: the pictures cannot be had, or are not those of the card.
    """
    named = card["data"]
    examples = as_served(load_bccd(folder, "val", verify=named["name"] == "BCCD"))
    refuse_other_data(card, digest(examples.truth))
    shown_from = room.DETECTION.options["min_confidence"].default
    kinds = np.arange(len(LABELS))

    def decide(outputs: Sequence[Array]) -> Array:
        shown = [one.label[one.confidence >= shown_from] for one in found_in(outputs, examples.samples)]
        return np.array([np.bincount(labels, minlength=len(LABELS)) for labels in shown])

    def margin(outputs: Sequence[Array]) -> Array:
        _, confidence, label = outputs
        away = np.abs(confidence - shown_from)[:, :, None]
        nearest: Array = np.where(label[:, :, None] == kinds, away, 1.0).min(axis=1)
        return nearest

    def score(outputs: Sequence[Array], truth: Sequence[Annotated]) -> dict[str, float]:
        return average_precision(found_in(outputs, examples.samples), truth)

    return Exam(
        f"{named['name']} {named['split']}",
        (examples.canvases,),
        examples.truth,
        decide,
        score,
        margin=margin,
        apart=apart,
    )


def calibration(folder: Path | None, card: Mapping[str, Any]) -> tuple[Array, ...]:
    """The training pictures as the service would lay them on the canvas: uint8 [n, HEIGHT, WIDTH, 3]."""
    return (as_served(load_bccd(folder, "train", verify=card["data"]["name"] == "BCCD")).canvases,)


def apart(found: Sequence[Array], right: Sequence[Array]) -> Array:
    """How far each object that one network sees is from the most similar that another sees.

    The surest come first, so the least difference in how sure two networks are may change
    the order: rows cannot be compared with rows.

    Args:
        found: One network's outputs: boxes [n, k, 4], confidence [n, k], label [n, k].
        right: Another's.

    Returns:
        float64 [m], for every object of either that is surer than `CLEARLY`: the largest
        difference in its confidence or, as a share of the canvas, in a side of its box; 1
        where there is no such object.
    """
    distances = [np.zeros(0)]
    for mine, theirs in ((found, right), (right, found)):
        for boxes, confidence, label, other_boxes, other_confidence, other_label in zip(
            *mine, *theirs, strict=True
        ):
            clear = confidence >= CLEARLY
            sides = np.abs(boxes[clear, None] - other_boxes[None]).max(axis=2) / WIDTH
            distance = np.maximum(sides, np.abs(confidence[clear, None] - other_confidence[None]))
            distance[label[clear, None] != other_label[None]] = 1.0
            distances.append(distance.min(axis=1).astype(np.float64))
    return np.concatenate(distances)


def digest(truth: Sequence[Annotated]) -> str:
    """The checksum of pictures and of what is marked in them."""
    whole = hashlib.sha256()
    for example in truth:
        whole.update(example.sha256.encode() + example.boxes.tobytes() + example.labels.tobytes())
    return whole.hexdigest()


# ---------------------------------------------------------------- pictures

SHOWN = 4
"""Pictures in the comparison, evenly spread over the split."""


def draw_comparison(truth: Sequence[Annotated], found: Sequence[room.Detections], path: Path) -> None:
    """Draw what people marked (above) and what the network is surer of than 0.5 (below)."""
    columns = []
    for number in np.linspace(0, len(truth) - 1, min(SHOWN, len(truth))).astype(int):
        example, one = truth[number], found[number]
        shown = one.confidence >= room.DETECTION.options["min_confidence"].default
        sure = [f"{confidence:.0%}" for confidence in one.confidence[shown].tolist()]
        marked = room.draw_boxes(example.pixels, example.boxes, example.labels, [""] * len(example.labels))
        seen = room.draw_boxes(example.pixels, one.boxes[shown], one.label[shown], sure)
        columns.append([room.resized(picture, 480, 360) for picture in (marked, seen)])
    sheet = np.concatenate([np.concatenate(row, axis=1) for row in zip(*columns, strict=True)])
    candidate = path.with_suffix(".tmp.png")
    candidate.write_bytes(cv2.imencode(".png", sheet[:, :, ::-1])[1].tobytes())
    candidate.replace(path)


# ---------------------------------------------------------------- settings

ALIGNMENT = 4.0
PLACES_PER_CELL = 10
BOX_WEIGHT = 5.0
AVERAGE_DECAY = 0.999
CALM_FROM = 0.4
"""From this part of the run on the distortions shrink, towards the pictures that will be seen."""
CALMEST = 0.8
CLEARLY = 0.05
"""Objects surer than this are compared between two networks."""
VIEWS = 4
"""How often each picture is seen in an epoch, each time otherwise distorted."""


@dataclass(frozen=True)
class Recipe:
    """What an architecture is trained with, unless the command line says otherwise."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float


RECIPES = {"cnn": Recipe(24, 8, 2e-3, 0.05)}


def train(run: fit.Run) -> dict[str, Any]:
    """Train one network, score it on the val split, and leave both in `run.out`.

    Returns:
        The card.

    Raises:
        TrainingError: data, settings or resume point are not in order.
    """
    recipe = RECIPES[run.arch]
    examples = load_bccd(run.data, "train", verify=run.verify)
    if run.holdout:
        if run.holdout >= len(examples):
            raise TrainingError(
                f"--holdout {run.holdout} leaves nothing of {len(examples)} pictures to learn from."
            )
        examples, truth = examples[: -run.holdout], examples[-run.holdout :]
    else:
        truth = load_bccd(run.data, "val", verify=run.verify)
    test = as_served(truth)
    settings = fit.Settings(
        epochs=run.epochs or recipe.epochs,
        batch_size=min(run.batch_size or recipe.batch_size, len(examples) * VIEWS),
        seed=run.seed,
        device=run.device,
        precision=run.precision,
        largest_gradient=10.0,
    )
    with fit.processes(run.device) as device:
        fit.sow(run.seed)
        network = ARCHITECTURES[run.arch]().to(device)
        # Pixel by pixel rather than channel by channel: faster convolutions in bfloat16.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        canvases = torch.from_numpy(test.canvases).to(device)
        views = len(examples) * VIEWS
        steps = settings.epochs * fit.steps_per_epoch(views, settings.batch_size)
        optimizer = torch.optim.AdamW(
            _groups(network, recipe.weight_decay), lr=recipe.learning_rate, betas=(0.9, 0.99)
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
        )
        finder = fit.Player("detection", network, loss, optimizer, schedule, AVERAGE_DECAY)

        def distorted(indices: Tensor, progress: float) -> Batch:
            chance = np.random.default_rng(np.random.randint(2**31))
            how = Distortion().calmer(CALMEST * max(0.0, (progress - CALM_FROM) / (1 - CALM_FROM)))
            chosen = [examples[index % len(examples)] for index in indices.tolist()]
            return batch_of([distort(example, how, chance) for example in chosen], device)

        def score() -> dict[str, float]:
            with fit.autocasting(settings.precision, device):
                outputs = answers(finder.averaged, canvases)
            scores = average_precision(found_in(outputs, test.samples), test.truth)
            return {name: scores[name] for name in ("map50", "map50_95")}

        story = fit.fit(
            [finder],
            examples=views,
            batch_of=distorted,
            score=score,
            settings=settings,
            out=run.out,
            identity=run.identity(settings, recipe),
            resume=run.resume,
        )
        if fit.process_rank() != 0:
            return {}
        found = found_in(answers(finder.averaged, canvases), test.samples)
        facts = {
            "model": room.DETECTION.name,
            "arch": run.arch,
            "task": room.DETECTION.task,
            "labels": list(LABELS),
            "scores": average_precision(found, test.truth),
            "data": {
                "name": "BCCD" if run.verify else "own pictures",
                "sha256": digest(test.truth),
                "split": f"last {run.holdout} of train" if run.holdout else "val",
            },
            "training": card.training_facts(run, settings, story, finder.averaged),
            "licence": "Apache-2.0; BCCD is MIT (Shenggan, cosmicad)",
            "intended_use": (
                "Finding and counting red cells, white cells and platelets in stained blood smears, "
                "photographed through a microscope like BCCD's. To learn from, not for diagnosis."
            ),
            "limits": (
                "It learnt from 205 pictures of one laboratory. Many red cells are not marked there, "
                "above all in clumps, so it is unsure of such cells as well. Other stains, enlargements "
                "and cameras were not tried."
            ),
        }
        card.write_checkpoint(run.out, finder.averaged, facts)
        card.draw_curve(story.epochs, "map50", run.out / "learning_curve.png")
        draw_comparison(test.truth, found, run.out / "cells.png")
        return facts


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases and normalisation, which have one axis, do not."""
    matrices = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
