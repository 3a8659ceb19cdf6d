"""Pictures in the forms that people have them, to the bytes that services take, and back to look at."""

import base64
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from quintet_client.errors import BadInput

if TYPE_CHECKING:
    from quintet_client.results import Object


class Array(Protocol):
    """A numpy array, or anything that shows its memory the same way."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Shape, type and address of the pixels."""


Picture = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Array | Image.Image
"""A path, the bytes of a file, an open file, uint8 pixels [height, width] or [height, width, 3] RGB,
or a Pillow image."""

_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
_ROTATED = frozenset({5, 6, 7, 8})
_ORIENTATION = 0x0112

_BOX_COLOURS = ("#d1495b", "#2274a5", "#e0a100", "#3b8f5a", "#7b4fa3")
"""One for each label, in the order of the alphabet; told apart by the colour-blind too, and labelled."""


def is_one(value: object) -> bool:
    """Whether `value` is meant as one picture, rather than as several."""
    is_known = isinstance(value, str | os.PathLike | bytes | bytearray | memoryview | Image.Image)
    return is_known or hasattr(value, "__array_interface__") or hasattr(value, "read")


def encode(picture: Picture, index: int | None = None) -> bytes:
    """Turn `picture` into the bytes of a picture file; `index` is its place among several.

    Bytes and files pass as they are: whether they hold a picture is for the service to say.

    Raises:
        BadInput: it is none of the forms of `Picture`.
        OSError: the file cannot be read.
    """
    if isinstance(picture, str | os.PathLike):
        return Path(picture).read_bytes()
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if not isinstance(picture, Image.Image) and hasattr(picture, "read"):
        content = picture.read()
        if isinstance(content, bytes):
            return content
        raise BadInput('A picture\'s file must be opened in binary, with "rb".', index=index)
    if not isinstance(picture, Image.Image):
        picture = _from_array(picture, index)
    if picture.mode not in _PNG_MODES:
        picture = picture.convert("RGB")
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)  # seen once and thrown away: quick rather than small
    return file.getvalue()


def _from_array(array: Any, index: int | None) -> Image.Image:
    """Read uint8 pixels through the array interface, so that numpy need not be installed."""
    interface = getattr(array, "__array_interface__", None)
    if interface is None:
        raise BadInput(
            "A picture is a path, the bytes of a file, an open file, a uint8 array or a Pillow image; "
            f"this is a {type(array).__name__}.",
            index=index,
        )
    shape, kind = interface["shape"], interface["typestr"]
    if kind != "|u1" or 0 in shape or not (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)):
        raise BadInput(
            "An array must hold uint8 pixels, [height, width] or [height, width, 3]; "
            f"this one's shape is {list(shape)} and its type {kind!r}.",
            index=index,
        )
    return Image.fromarray(array)


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height in pixels of an encoded picture, turned the way its EXIF asks.

    Raises:
        BadInput: Pillow does not know this kind of picture.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
            is_rotated = picture.getexif().get(_ORIENTATION) in _ROTATED
    except (UnidentifiedImageError, OSError) as error:
        raise BadInput("The picture's size cannot be read; send a PNG, JPEG, WebP or BMP file.") from error
    return (height, width) if is_rotated else (width, height)


def with_boxes(data: bytes, objects: "Sequence[Object]") -> Image.Image:
    """An encoded picture, upright, with a labelled box around each object: a colour for each label."""
    with Image.open(io.BytesIO(data)) as stored:
        picture = ImageOps.exif_transpose(stored).convert("RGB")
    canvas = ImageDraw.Draw(picture)
    unit = max(1, round(min(picture.size) / 240))
    font = ImageFont.load_default(max(10, 11 * unit))
    colours = dict(zip(sorted({found.label for found in objects}), _BOX_COLOURS * len(objects)))  # noqa: B905
    # The surest last, so that its label lies on top.
    for found in reversed(objects):
        left, top, right, bottom = found.box
        canvas.rectangle((left, top, right, bottom), outline=colours[found.label], width=unit)
        words = f"{found.label} {found.confidence:.0%}"
        _, _, wide, high = canvas.textbbox((0, 0), words, font=font)
        above = top - high - 2 * unit
        place = (left, above if above >= 0 else top)
        canvas.rectangle(
            (place[0], place[1], place[0] + wide + 4 * unit, place[1] + high + 2 * unit),
            fill=colours[found.label],
        )
        canvas.text((place[0] + 2 * unit, place[1]), words, fill="white", font=font)
    return picture


def grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size, in rows of ten at the most, as one."""
    width, height = pictures[0].size
    columns = min(10, len(pictures))
    sheet = Image.new("L", (columns * width, math.ceil(len(pictures) / columns) * height))
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % columns * width, place // columns * height))
    return sheet


def png_from_grey(pixels: bytes, width: int, height: int) -> bytes:
    """Encode grey pixels, a byte each, row by row, as a PNG file."""
    file = io.BytesIO()
    Image.frombytes("L", (width, height), pixels).save(file, "PNG")
    return file.getvalue()


def to_base64(data: bytes) -> str:
    """Bytes as JSON carries them."""
    return base64.b64encode(data).decode()
