"""What the models answer, as values that never change."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


@dataclass(frozen=True, slots=True)
class Classification:
    """One label chosen among several.

    Attributes:
        label: The likeliest label.
        confidence: Its probability, 0 to 1.
        probabilities: Every label's probability; together 1.
        model: The model that answered.
        version: Its version.
    """

    label: str
    confidence: float
    probabilities: dict[str, float]
    model: str
    version: str


@dataclass(frozen=True, slots=True)
class Object:
    """One thing found in a picture.

    Attributes:
        label: What it is.
        confidence: How sure the model is, 0 to 1.
        box: Its left, top, right and bottom edges, in pixels of the picture as sent.
    """

    label: str
    confidence: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Detection:
    """All that was found in one picture.

    Attributes:
        width: The picture's width in pixels.
        height: The picture's height in pixels.
        objects: What was found, the surest first.
        model: The model that answered.
        version: Its version.
    """

    width: int
    height: int
    objects: tuple[Object, ...]
    model: str
    version: str


@dataclass(frozen=True, slots=True)
class Generated:
    """One drawn digit.

    Attributes:
        digit: The digit that was asked for.
        seed: With the same digit, it draws the same picture again.
        image: The picture, as the bytes of a PNG file.
        model: The model that answered.
        version: Its version.
    """

    digit: int
    seed: int
    image: bytes
    model: str
    version: str

    def to_pillow(self) -> Image.Image:
        """The picture as a grey Pillow image."""
        picture = Image.open(io.BytesIO(self.image))
        picture.load()
        return picture

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture to `path` as a PNG file.

        Raises:
            OSError: the file cannot be written.
        """
        Path(path).write_bytes(self.image)
