"""What the models answer, as values that never change.

`print(result)` says it in words for people, `repr` in a line for whoever explores.
"""

import io
import os
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image

from quintet_client import pictures


@dataclass(frozen=True, slots=True, repr=False)
class Classification:
    """One label chosen among several.

    Attributes:
        label: The likeliest label.
        confidence: Its probability, 0 to 1.
        probabilities: Every label's probability; together 1.
        model: The model that answered.
        version: Its version.
        seconds: From the question to its answer as the caller felt it, retries and waits included.
    """

    label: str
    confidence: float
    probabilities: dict[str, float]
    model: str
    version: str
    seconds: float = field(default=0.0, compare=False)

    def ranked(self) -> list[tuple[str, float]]:
        """All labels with their probabilities, the likeliest first."""
        return sorted(self.probabilities.items(), key=lambda pair: pair[1], reverse=True)

    def __str__(self) -> str:
        return f"{self.label} ({in_percent(self.confidence)})"

    def __repr__(self) -> str:
        others = "".join(f", {label!r} {in_percent(value)}" for label, value in self.ranked()[1:2])
        return f"<{self.model} {self.version}: {self.label!r} {in_percent(self.confidence)}{others}>"


@dataclass(frozen=True, slots=True, repr=False)
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

    def __str__(self) -> str:
        return f"{self.label} ({in_percent(self.confidence)})"

    def __repr__(self) -> str:
        left, top, right, bottom = (round(edge) for edge in self.box)
        return f"<{self.label} {in_percent(self.confidence)} at {left},{top} to {right},{bottom}>"


@dataclass(frozen=True, slots=True, repr=False)
class Detection:
    """All that was found in one picture.

    Attributes:
        width: The picture's width in pixels.
        height: The picture's height in pixels.
        objects: What was found, the surest first.
        model: The model that answered.
        version: Its version.
        seconds: From the question to its answer as the caller felt it, retries and waits included.
        picture: The bytes that were sent, for `draw`.
    """

    width: int
    height: int
    objects: tuple[Object, ...]
    model: str
    version: str
    seconds: float = field(default=0.0, compare=False)
    picture: bytes = field(default=b"", compare=False)

    def counts(self) -> dict[str, int]:
        """How many there are of each label, the most first."""
        return dict(Counter(found.label for found in self.objects).most_common())

    def draw(self) -> Image.Image:
        """The picture as sent, upright, with a labelled box around everything that was found."""
        return pictures.with_boxes(self.picture, self.objects)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture with its boxes to `path`, in the format that its ending names.

        Raises:
            OSError: the file cannot be written.
            ValueError: Pillow knows no format of that ending.
        """
        self.draw().save(path)

    def __str__(self) -> str:
        return ", ".join(f"{count} {label}" for label, count in self.counts().items()) or "nothing found"

    def __repr__(self) -> str:
        return f"<{self.model} {self.version}: {self} in {self.width}×{self.height}>"  # noqa: RUF001


@dataclass(frozen=True, slots=True, repr=False)
class Generated:
    """One drawn digit.

    Attributes:
        digit: The digit that was asked for.
        seed: With the same digit, it draws the same picture again.
        image: The picture, as the bytes of a PNG file.
        model: The model that answered.
        version: Its version.
        seconds: From the question to its answer as the caller felt it, retries and waits included.
    """

    digit: int
    seed: int
    image: bytes
    model: str
    version: str
    seconds: float = field(default=0.0, compare=False)

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

    def __str__(self) -> str:
        return f"a {self.digit}, seed {self.seed}"

    def __repr__(self) -> str:
        return f"<{self.model} {self.version}: a {self.digit}, seed {self.seed}>"

    def _repr_png_(self) -> bytes:
        """The picture itself, where a notebook shows a value."""
        return self.image


@dataclass(frozen=True, slots=True, repr=False)
class Status:
    """How a service is, as one client sees it.

    Attributes:
        is_ready: Whether it takes requests now.
        server: Its name, and its version.
        models: The versions that it serves of each model of ours; none where the model is not loaded.
        seconds: How long the first question took there and back.
    """

    is_ready: bool
    server: str
    models: dict[str, tuple[str, ...]]
    seconds: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        loaded = ", ".join(
            f"{name} {' '.join(versions)}" for name, versions in self.models.items() if versions
        )
        return f"{self.server} is {'ready' if self.is_ready else 'not ready'}; models: {loaded or 'none'}"

    def __repr__(self) -> str:
        return f"<{self}>"


def as_dict(result: Classification | Detection | Generated) -> dict[str, Any]:
    """A result's fields as JSON's types, without the picture that the caller has already."""
    values: dict[str, Any] = {
        one.name: getattr(result, one.name) for one in fields(result) if one.name != "picture"
    }
    if isinstance(result, Detection):
        values["objects"] = [
            {"label": found.label, "confidence": found.confidence, "box": list(found.box)}
            for found in result.objects
        ]
    if isinstance(result, Generated):
        values["image"] = pictures.to_base64(result.image)
    return values


def in_percent(share: float) -> str:
    """A share of one, in words: 0.998 is "99.8 %"."""
    return f"{share * 100:.1f} %"
