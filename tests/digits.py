"""Digits as people send them: one clean picture in, the ways it is met in life out.

Each way takes light ink on black, uint8 [28, 28], and a generator of random numbers, and
gives a grey picture, uint8 [height, width]. The same generator gives the same picture.
"""

from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Way = Callable[[Pixels, np.random.Generator], Pixels]


def as_it_is(digit: Pixels, chance: np.random.Generator) -> Pixels:
    return digit


def inverted(digit: Pixels, chance: np.random.Generator) -> Pixels:
    return cv2.bitwise_not(digit)


def ten_times_larger(digit: Pixels, chance: np.random.Generator) -> Pixels:
    return cv2.resize(digit, None, fx=10, fy=10, interpolation=cv2.INTER_CUBIC)


def larger_and_inverted(digit: Pixels, chance: np.random.Generator) -> Pixels:
    return cv2.bitwise_not(ten_times_larger(digit, chance))


def off_centre(digit: Pixels, chance: np.random.Generator) -> Pixels:
    """Anywhere on a white 200x300 sheet, 60 to 140 pixels large."""
    side = int(chance.integers(60, 141))
    sheet = np.zeros((200, 300), np.uint8)
    _place(sheet, _enlarged(digit, side), chance)
    return cv2.bitwise_not(sheet)


def low_contrast(digit: Pixels, chance: np.random.Generator) -> Pixels:
    """Grey pencil, 40 levels darker than the paper."""
    return np.rint(200 - off_centre_ink(digit, chance) * (40 / 255)).astype(np.uint8)


def off_centre_ink(digit: Pixels, chance: np.random.Generator) -> Pixels:
    return cv2.bitwise_not(off_centre(digit, chance))


def photographed(digit: Pixels, chance: np.random.Generator) -> Pixels:
    """On paper under a lamp to one side, with the camera's noise and JPEG's blocks."""
    return _camera(off_centre_ink(digit, chance), chance)


def in_half_shadow(digit: Pixels, chance: np.random.Generator) -> Pixels:
    """Photographed with the shadow of a hand across the paper."""
    ink = off_centre_ink(digit, chance)
    height, width = ink.shape
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    direction = chance.uniform(0, 2 * np.pi)
    across = (columns - width / 2) * np.cos(direction) + (rows - height / 2) * np.sin(direction)
    shadow = 0.55 + 0.45 / (1 + np.exp(-across / 6))
    return _camera(ink, chance, shadow.astype(np.float32))


def on_ruled_paper(digit: Pixels, chance: np.random.Generator) -> Pixels:
    """Photographed on ruled paper, its lines half as dark as the ink."""
    ink = off_centre_ink(digit, chance)
    start, gap = int(chance.integers(10, 30)), int(chance.integers(24, 40))
    for row in range(start, ink.shape[0], gap):
        ink[row : row + 2] = np.maximum(ink[row : row + 2], 110)
    return _camera(ink, chance)


def seen_aslant(digit: Pixels, chance: np.random.Generator) -> Pixels:
    """Photographed from the side: a perspective that moves each corner by up to 30 pixels."""
    ink = off_centre_ink(digit, chance)
    height, width = ink.shape
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float32)
    moved = corners + chance.uniform(-30, 30, (4, 2)).astype(np.float32)
    aslant = cv2.warpPerspective(ink, cv2.getPerspectiveTransform(corners, moved), (width, height))
    return _camera(aslant, chance)


def with_specks(digit: Pixels, chance: np.random.Generator) -> Pixels:
    """A dusty scan: forty dark specks of one to three pixels."""
    sheet = off_centre(digit, chance)
    for _ in range(40):
        row, column = chance.integers(0, sheet.shape[0] - 3), chance.integers(0, sheet.shape[1] - 3)
        size = chance.integers(1, 4)
        sheet[row : row + size, column : column + size] = chance.integers(0, 120)
    return sheet


def drawn_thick(digit: Pixels, chance: np.random.Generator) -> Pixels:
    """Drawn with a fat brush on a 280x280 canvas."""
    canvas = ten_times_larger(digit, chance)
    return cv2.dilate(canvas, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (17, 17)))


def drawn_thin(digit: Pixels, chance: np.random.Generator) -> Pixels:
    """Drawn with a line of two or three pixels on a 280x280 canvas: the digit's skeleton."""
    _, shape = cv2.threshold(ten_times_larger(digit, chance), 127, 255, cv2.THRESH_BINARY)
    skeleton = np.zeros_like(shape)
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    while cv2.countNonZero(shape):
        eroded = cv2.erode(shape, cross)
        skeleton |= shape - cv2.dilate(eroded, cross)
        shape = eroded
    return cv2.morphologyEx(cv2.dilate(skeleton, cross), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))


def huge(digit: Pixels, chance: np.random.Generator) -> Pixels:
    """A twelve-megapixel scan with the digit over a fifth of its width."""
    sheet = np.full((3000, 4000), 245, np.uint8)
    small = _enlarged(digit, 800)
    row, column = chance.integers(0, 3000 - 800), chance.integers(0, 4000 - 800)
    part = sheet[row : row + 800, column : column + 800]
    np.minimum(part, 255 - small, out=part)
    return sheet


WAYS: dict[str, Way] = {
    way.__name__.replace("_", "-"): way
    for way in (
        as_it_is,
        inverted,
        ten_times_larger,
        larger_and_inverted,
        off_centre,
        low_contrast,
        photographed,
        in_half_shadow,
        on_ruled_paper,
        seen_aslant,
        with_specks,
        drawn_thick,
        drawn_thin,
    )
}
"""By name; `huge` is kept apart because it is slow."""


def png(picture: Pixels) -> bytes:
    """A picture as a PNG file."""
    return cv2.imencode(".png", picture)[1].tobytes()


def _enlarged(digit: Pixels, side: int) -> Pixels:
    return cv2.resize(digit, (side, side), interpolation=cv2.INTER_CUBIC)


def _place(sheet: Pixels, digit: Pixels, chance: np.random.Generator) -> None:
    row = int(chance.integers(0, sheet.shape[0] - digit.shape[0] + 1))
    column = int(chance.integers(0, sheet.shape[1] - digit.shape[1] + 1))
    sheet[row : row + digit.shape[0], column : column + digit.shape[1]] = digit


def _camera(
    ink: Pixels, chance: np.random.Generator, shadow: npt.NDArray[np.float32] | None = None
) -> Pixels:
    """Dark ink on grey paper under a light that falls off to one side, with noise, through JPEG."""
    height, width = ink.shape
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    slope = chance.uniform(-0.35, 0.35, 2)
    light = 1 + slope[0] * (rows / height - 0.5) + slope[1] * (columns / width - 0.5)
    if shadow is not None:
        light = light * shadow
    paper = chance.uniform(150, 205)
    picture = light * (paper - ink / 255 * (paper - chance.uniform(30, 70)))
    picture = cv2.GaussianBlur(picture, (0, 0), 0.8) + chance.normal(0, 6, ink.shape)
    pixels = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    quality = int(chance.integers(40, 90))
    _, packed = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(packed, cv2.IMREAD_GRAYSCALE)
