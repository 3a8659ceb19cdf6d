"""The generator room: a digit and a seed in, a new picture of that digit out.

The picture depends on digit and seed alone. The network's noise is made here, with
whole numbers and one exact scaling, so that it is the same to the last bit on every
machine, operating system and version of numpy.
"""

import base64
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt

from service.errors import BadInput
from service.models.digit import LABELS, SIDE
from service.models.pictures import Pixels
from service.models.spec import Array, Inputs, Room, Sample, Tensor

LATENT: Final = 64
"""How many numbers of noise make a picture."""

LARGEST_SEED: Final = 2**63 - 1
"""What an INT64 holds."""

SHEET_COLUMNS: Final = 10
SHEET_SCALE: Final = 4
SHEET_GAP: Final = 8
"""Of a contact sheet: pictures in a row, and then pixels to a pixel and pixels around each picture."""


def noise_of(digit: int, seed: int) -> npt.NDArray[np.float32]:
    """The noise that belongs to a digit and a seed, float32 [LATENT]: a bell of mean 0 and variance 1.

    Philox (Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*, 2011) is a published
    function of key and counter; numpy promises never to change its raw words, while it may
    change how they become normal numbers. So ours are made here: the sum of a word's four
    16-bit quarters, a bell that ends at 3.46 deviations. Training draws from the same bell.
    No logarithm and no cosine, whose last bits differ between machines.
    """
    words = np.random.Philox(key=np.array([seed, digit], np.uint64)).random_raw(LATENT)
    quarters = words.astype("<u8").view("<u2").reshape(LATENT, 4)
    # A quarter is uniform on 0..65535: of mean 65535 / 2 and variance (65536**2 - 1) / 12.
    centred = quarters.sum(axis=1, dtype=np.float64) - 2 * 65535
    noise: npt.NDArray[np.float32] = (centred / _DEVIATION).astype(np.float32)
    return noise


_DEVIATION: Final = ((65536.0**2 - 1) / 3) ** 0.5
"""Of the sum of four quarters."""


def to_tensor(inputs: Inputs) -> Sample:
    """A digit and a seed to the network's digit and noise.

    Raises:
        BadInput: there is no such digit or seed.
    """
    digit = _whole(inputs, "digit", len(LABELS) - 1)
    seed = _whole(inputs, "seed", LARGEST_SEED)
    return Sample((np.array(digit, np.int64), noise_of(digit, seed)), (digit, seed))


def _whole(inputs: Inputs, name: str, largest: int) -> int:
    """A whole number from 0 to `largest`."""
    value = inputs[name]
    right = f"The {name} must be a whole number from 0 to {largest}"
    if isinstance(value, bool | np.bool_):
        raise BadInput(f"{right}, not a truth value.")
    try:
        number = operator.index(value)
    except TypeError:
        raise BadInput(f"{right}.") from None
    if not 0 <= number <= largest:
        raise BadInput(f"{right}; this one is {number if abs(number) < 2**64 else 'far outside'}.")
    return number


@dataclass(slots=True)
class Picture:
    """An answer that is a picture: uint8 [28, 28], light ink on black."""

    digit: int
    seed: int
    pixels: Pixels

    def as_json(self) -> dict[str, Any]:
        """`{"digit", "seed", "image"}`, the picture as a PNG in base64."""
        return {
            "digit": self.digit,
            "seed": self.seed,
            "image": base64.b64encode(_png(self.pixels)).decode(),
        }

    def as_tensor(self, name: str) -> Pixels:
        """`pixels`, uint8 [28, 28]."""
        return self.pixels


def to_answer(row: Sequence[Array], sample: Sample) -> Picture:
    """The network's pixels, with the digit and seed that they answer."""
    digit, seed = sample.context
    return Picture(digit, seed, row[0])


def contact_sheet(answers: Sequence[Picture]) -> bytes:
    """Several pictures in one, in order, ten to a row, as a grey PNG.

    Every pixel is drawn four wide and high, and dark grey lies between the pictures, so
    that one sees where each of them ends.

    Args:
        answers: At least one.
    """
    columns = min(len(answers), SHEET_COLUMNS)
    rows = -(-len(answers) // columns)
    side = SIDE * SHEET_SCALE
    pitch = side + SHEET_GAP
    sheet = np.full((rows * pitch + SHEET_GAP, columns * pitch + SHEET_GAP), 48, np.uint8)
    for number, answer in enumerate(answers):
        row, column = divmod(number, columns)
        top, left = row * pitch + SHEET_GAP, column * pitch + SHEET_GAP
        large = answer.pixels.repeat(SHEET_SCALE, axis=0).repeat(SHEET_SCALE, axis=1)
        sheet[top : top + side, left : left + side] = large
    return _png(sheet)


def _png(picture: Pixels) -> bytes:
    """A grey picture as a PNG file."""
    return cv2.imencode(".png", picture)[1].tobytes()


GENERATOR = Room(
    name="generator",
    task="Draws a new handwritten digit.",
    takes="digits",
    labels=LABELS,
    inputs=((Tensor("digit", "INT64"), Tensor("seed", "INT64")),),
    outputs=(Tensor("pixels", "UINT8", (SIDE, SIDE)),),
    network_inputs=(Tensor("digit", "INT64"), Tensor("noise", "FP32", (LATENT,))),
    network_outputs=(Tensor("pixels", "UINT8", (SIDE, SIDE)),),
    to_tensor=to_tensor,
    to_answer=to_answer,
    example={"digit": 3, "seed": 7},
    as_picture=lambda inputs, answers: contact_sheet(answers),
)
