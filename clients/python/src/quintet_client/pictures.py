"""Pictures in the forms that people have them, to the bytes that services take."""

import io
import os
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from quintet_client.errors import BadInput


class Array(Protocol):
    """A numpy array, or anything that shows its memory the same way."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Shape, type and address of the pixels."""


Picture = str | os.PathLike[str] | bytes | bytearray | memoryview | Array | Image.Image
"""A path, the bytes of a file, uint8 pixels [height, width] or [height, width, 3] RGB, or a Pillow image."""

_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
_ROTATED = frozenset({5, 6, 7, 8})
_ORIENTATION = 0x0112


def encode(picture: Picture, index: int | None = None) -> bytes:
    """Turn `picture` into the bytes of a picture file; `index` is its place in a list.

    Bytes and files pass as they are: whether they hold a picture is for the service to say.

    Raises:
        BadInput: it is none of the forms of `Picture`.
        OSError: the file cannot be read.
    """
    if isinstance(picture, str | os.PathLike):
        return Path(picture).read_bytes()
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if not isinstance(picture, Image.Image):
        picture = _from_array(picture, index)
    if picture.mode not in _PNG_MODES:
        picture = picture.convert("RGB")
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)  # seen once and thrown away: quick rather than small
    return file.getvalue()


def _from_array(array: Array, index: int | None) -> Image.Image:
    """Read uint8 pixels through the array interface, so that numpy need not be installed."""
    interface = getattr(array, "__array_interface__", None)
    if interface is None:
        raise BadInput(
            "A picture is a path, the bytes of a file, a uint8 array or a Pillow image; "
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


def png_from_grey(pixels: bytes, width: int, height: int) -> bytes:
    """Encode grey pixels, a byte each, row by row, as a PNG file."""
    file = io.BytesIO()
    Image.frombytes("L", (width, height), pixels).save(file, "PNG")
    return file.getvalue()
