"""The image room: any photograph in, which of ten kinds of thing it shows out.

The network knows CIFAR-10: 32x32 pixels in colour, the thing filling the picture
(Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009).
"""

from collections.abc import Sequence

import cv2
import numpy as np

from service.models import pictures
from service.models.pictures import Pixels
from service.models.spec import Array, Classification, Inputs, Room, Sample, Tensor

SIDE = 32
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def like_cifar(picture: Pixels) -> Pixels:
    """Bring a picture to CIFAR-10's size: its middle square, each pixel the mean of what it covers.

    Args:
        picture: uint8 [height, width, 3], RGB, at least 1x1. What is 32x32 comes through unchanged.

    Returns:
        uint8 [32, 32, 3].
    """
    height, width, _ = picture.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = np.ascontiguousarray(picture[top : top + side, left : left + side])
    if side == SIDE:
        return square
    how = cv2.INTER_AREA if side > SIDE else cv2.INTER_CUBIC
    return cv2.resize(square, (SIDE, SIDE), interpolation=how)  # type: ignore[return-value]


def to_tensor(inputs: Inputs) -> Sample:
    """An encoded picture, or pixels of CIFAR-10's size, to the network's input."""
    pixels = inputs.get("pixels")
    if pixels is None:
        pixels = like_cifar(pictures.decode_colour(inputs["image"]))
    return Sample((pixels,))


def to_answer(row: Sequence[Array], sample: Sample) -> Classification:
    """Ten probabilities to the kind of thing they point at."""
    return Classification(LABELS, row[0])


def is_quick(inputs: Inputs) -> bool:
    """Small pictures and ready pixels are."""
    return "image" not in inputs or pictures.is_quick(inputs["image"])


def _drawn_ship() -> bytes:
    """A ship on a calm sea under a hazy sky, 96x96, as PNG."""
    sky, sea = np.linspace((225, 205, 170), (235, 225, 210), 58), np.linspace((140, 95, 45), (90, 55, 20), 38)
    view = np.repeat(np.concatenate((sky, sea))[:, np.newaxis], 96, axis=1).astype(np.uint8)
    for corners, colour in (
        ([[8, 50], [88, 48], [80, 66], [18, 66]], (50, 40, 130)),
        ([[14, 45], [82, 45], [82, 51], [11, 51]], (240, 240, 240)),
        ([[24, 34], [58, 34], [58, 45], [22, 45]], (245, 245, 245)),
        ([[40, 20], [50, 20], [50, 34], [40, 34]], (40, 40, 200)),
    ):
        cv2.fillPoly(view, [np.array(corners, np.int32)], color=colour, lineType=cv2.LINE_AA)
    return cv2.imencode(".png", view)[1].tobytes()


IMAGE = Room(
    name="image",
    task="Says which of ten kinds of thing a photograph shows.",
    takes="pictures",
    labels=LABELS,
    inputs=((Tensor("pixels", "UINT8", (SIDE, SIDE, 3)),), (Tensor("image", "BYTES"),)),
    outputs=(Tensor("label", "BYTES"), Tensor("probabilities", "FP32", (len(LABELS),))),
    network_inputs=(Tensor("pixels", "UINT8", (SIDE, SIDE, 3)),),
    network_outputs=(Tensor("probabilities", "FP32", (len(LABELS),)),),
    to_tensor=to_tensor,
    to_answer=to_answer,
    example={"image": _drawn_ship()},
    is_quick=is_quick,
    is_short=is_quick,
)
