"""Decoding: small plain PNGs go to a decoder of their own, and nobody can tell by what comes out."""

import io
import struct
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from service.errors import BadInput, UnreadableImage
from service.models.pictures import PNG_END, decode_colour, decode_grey

Pixels = npt.NDArray[np.uint8]


def by_pillow(picture: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def by_opencv(picture: Pixels) -> bytes:
    shown = picture if picture.ndim == 2 else np.ascontiguousarray(picture[:, :, ::-1])
    return cv2.imencode(".png", shown)[1].tobytes()


def smooth(height: int, width: int, *channels: int) -> Pixels:
    """A picture with slopes, for which encoders choose several of PNG's filters."""
    noise = np.random.default_rng(height * width).integers(0, 256, (height, width, *channels), np.uint8)
    return np.asarray(cv2.GaussianBlur(noise, (0, 0), 2), np.uint8).reshape(height, width, *channels)


@pytest.mark.parametrize("write", [by_pillow, by_opencv])
@pytest.mark.parametrize("size", [(1, 1), (28, 28), (3, 200), (255, 255), (256, 20), (20, 300)], ids=str)
def test_pixels_come_through_unchanged(write: Callable[[Pixels], bytes], size: tuple[int, int]) -> None:
    grey, colours = smooth(*size), smooth(*size, 3)
    assert np.array_equal(decode_grey(write(grey)), grey)
    assert np.array_equal(decode_colour(write(colours)), colours)


@pytest.mark.parametrize("write", [by_pillow, by_opencv])
def test_grey_is_seen_in_colours_and_colours_in_grey(write: Callable[[Pixels], bytes]) -> None:
    grey, colours = smooth(28, 28), smooth(28, 28, 3)
    assert np.array_equal(decode_colour(write(grey)), np.stack([grey] * 3, axis=-1))
    # libpng rounds otherwise.
    assert np.allclose(decode_grey(write(colours)), cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY), atol=1)


@pytest.mark.parametrize(
    ("decode", "channels", "flag"),
    [(decode_grey, (), cv2.IMREAD_GRAYSCALE), (decode_colour, (3,), cv2.IMREAD_COLOR_RGB)],
    ids=["grey", "colours"],
)
def test_a_byte_that_changed_is_told_as_opencv_tells_it(
    decode: Callable[[bytes], Pixels], channels: tuple[int, ...], flag: int
) -> None:
    whole = by_pillow(smooth(20, 20, *channels))
    chance = np.random.default_rng(0)
    refused = 0
    # Behind the signature, the sizes and the form, which belong to the header's own tests.
    for position in range(29, len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= int(chance.integers(1, 256))
        expected = cv2.imdecode(np.frombuffer(damaged, np.uint8), flag)
        try:
            found = decode(bytes(damaged))
        except BadInput:
            refused += 1
            assert expected is None, f"byte {position}: OpenCV reads it"
        else:
            assert np.array_equal(found, expected), f"byte {position}"
    assert refused > 0.9 * (len(whole) - 29)


def test_what_is_cut_short_is_refused() -> None:
    whole = by_pillow(smooth(20, 20))
    for length in range(len(whole)):
        with pytest.raises(UnreadableImage):
            decode_grey(whole[:length])


@pytest.mark.parametrize("rows", [0, 27, 29])
def test_more_or_fewer_rows_than_the_header_says(rows: int) -> None:
    pixels = b"".join(b"\0" + bytes(range(28)) for _ in range(rows))
    content = b"IDAT" + zlib.compress(pixels)
    header = by_pillow(smooth(28, 28))[:33]
    file = (
        header
        + struct.pack(">I", len(content) - 4)
        + content
        + struct.pack(">I", zlib.crc32(content))
        + PNG_END
    )
    expected = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_GRAYSCALE)
    if expected is None:
        with pytest.raises(UnreadableImage):
            decode_grey(file)
    else:
        assert np.array_equal(decode_grey(file), expected)


def test_a_small_png_stands_upright_too() -> None:
    lying = smooth(28, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(lying).save(file, "PNG", exif=exif)
    assert np.array_equal(decode_grey(file.getvalue()), np.rot90(lying, -1))


def test_a_palette_that_is_transparent_is_laid_on_white() -> None:
    picture = Image.new("P", (28, 28), 0)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    file = io.BytesIO()
    picture.save(file, "PNG", transparency=0)
    assert (decode_colour(file.getvalue()) == 255).all()
