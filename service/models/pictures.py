"""Encoded pictures to pixels: shared by the rooms that take pictures.

Only PNG, JPEG, WebP and BMP are let near a decoder, and only after their header
has said how many pixels they hold: a few kilobytes of PNG can unfold to gigabytes.
"""

import struct
from typing import Final, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from kornia_rs.io import decode_image_png_u8

from service.errors import BadInput, TooManyPixels, UnreadableImage

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS: Final = 25_000_000
"""A 24-megapixel photograph passes; what is larger is refused before it is decoded."""

QUICK_PIXELS: Final = 128 * 128
"""Up to here a picture is decoded in well under a millisecond."""

SLIDE_PIXELS: Final = 1024 * 512
"""Up to here in 4 ms (JPEG), or 12 (a noisy PNG)."""

MEDIA_TYPES: Final = ("image/png", "image/jpeg", "image/webp", "image/bmp")

SMALL_PNG: Final = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0"
"""How a PNG begins that is less than 256 pixels wide."""

PNG_END: Final = b"\0\0\0\0IEND\xaeB`\x82"
PNG_AROUND_PIXELS: Final = 57
"""In bytes: what a PNG has beside its pixels that is a header, one chunk of them and an end."""

GREY_PNG: Final = b"\x08\0\0\0\0"
COLOUR_PNG: Final = b"\x08\2\0\0\0"
"""Eight bits, grey or red, green and blue, not interlaced, as a PNG's header says it."""

_KINDS = "PNG, JPEG, WebP or BMP"
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})


class Header(NamedTuple):
    """What a picture says of itself before it is decoded: sizes in pixels."""

    width: int
    height: int
    has_alpha: bool


def read_header(data: bytes) -> Header:
    """Read a picture's size from its first bytes.

    Raises:
        UnreadableImage: the bytes are none of PNG, JPEG, WebP and BMP, or end too early.
    """
    if not data:
        raise UnreadableImage(f"The picture is empty; send the bytes of a {_KINDS} file.")
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            width, height, _, colour = struct.unpack_from(">IIBB", data, 16)
            return Header(width, height, colour >= 4 or b"tRNS" in data[33:2048])
        if data.startswith(b"\xff\xd8"):
            return Header(*_jpeg_size(data), has_alpha=False)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp_header(data)
        if data.startswith(b"BM"):
            width, height = struct.unpack_from("<ii", data, 18)
            return Header(abs(width), abs(height), has_alpha=False)
    except (struct.error, IndexError):
        raise UnreadableImage("The picture ends in its header; send the whole file.") from None
    raise UnreadableImage(f"These bytes are not a picture; send a {_KINDS} file.")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Walk the markers of ITU-T T.81, annex B, to the frame header; width and height."""
    position = 2
    while data[position] == 0xFF:
        marker = data[position + 1]
        if marker in _JPEG_SIZES:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return width, height
        if marker in _JPEG_BARE or marker == 0xFF:
            position += 1 if marker == 0xFF else 2
        else:
            position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    raise UnreadableImage("The JPEG's header is damaged; send the whole file.")


def _webp_header(data: bytes) -> Header:
    """Size and alpha flag of the three WebP forms (RFC 9649, section 2)."""
    form = data[12:16]
    if form == b"VP8X":
        flags = data[20]
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
        return Header(width, height, bool(flags & 0x10))
    if form == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return Header(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), bool(bits >> 28 & 1))
    width, height = struct.unpack_from("<HH", data, 26)
    return Header(width & 0x3FFF, height & 0x3FFF, has_alpha=False)


def is_quick(data: bytes) -> bool:
    """Whether decoding `data` is short enough for the event loop; bytes that will be refused are."""
    # Most pictures of a digit: a PNG less than 128 pixels wide and high, told from its first bytes.
    if data[:19] == SMALL_PNG and data[20:23] == b"\0\0\0" and data[19:20] < b"\x80" > data[23:24]:
        return True
    return has_at_most(QUICK_PIXELS, data)


def has_at_most(pixels: int, data: bytes) -> bool:
    """Whether `data` is a picture of so many pixels at most, or one that will be refused."""
    try:
        header = read_header(data)
    except BadInput:
        return True
    return header.width * header.height <= pixels


def decode_grey(data: bytes) -> Pixels:
    """Decode a picture to grey pixels, uint8 [height, width].

    A transparent picture is laid on white paper, or on black where its ink is white.

    Raises:
        UnreadableImage: the bytes are damaged or of another kind.
        TooManyPixels: the picture holds more than `MAX_PIXELS`.
    """
    plain = _decode_plain_png(data, GREY_PNG, "mono")
    if plain is not None:
        return plain[:, :, 0]
    header = read_header(data)
    picture = _with_alpha(data, header)
    if picture is None:
        return _decode(data, header, cv2.IMREAD_GRAYSCALE)
    grey = cv2.cvtColor(picture[:, :, :3], cv2.COLOR_BGR2GRAY).astype(np.float32)
    alpha = picture[:, :, 3].astype(np.float32) / 255
    total = float(alpha.sum())
    ink = float((grey * alpha).sum()) / total if total else 0.0
    paper = 0.0 if ink > 127 else 255.0
    laid: Pixels = np.rint(grey * alpha + paper * (1 - alpha)).astype(np.uint8)
    return laid


def decode_colour(data: bytes) -> Pixels:
    """Decode a picture to colours, uint8 [height, width, 3], red, green, blue.

    It stands upright as a camera's EXIF orientation says. Grey pictures have three equal
    channels, 16 bits become 8, and a transparent picture is laid on white paper.

    Raises:
        UnreadableImage: the bytes are damaged or of another kind.
        TooManyPixels: the picture holds more than `MAX_PIXELS`.
    """
    plain = _decode_plain_png(data, COLOUR_PNG, "rgb")
    if plain is not None:
        return plain
    header = read_header(data)
    picture = _with_alpha(data, header)
    if picture is None:
        return _decode(data, header, cv2.IMREAD_COLOR_RGB)
    alpha = picture[:, :, 3].astype(np.float32) / 255
    colour = cv2.cvtColor(picture, cv2.COLOR_BGRA2RGB)
    return cv2.blendLinear(colour, np.full_like(colour, 255), alpha, 1 - alpha)  # type: ignore[return-value]


def _with_alpha(data: bytes, header: Header) -> Pixels | None:
    """A picture with its transparency, uint8 [height, width, 4], blue first; None where it has none."""
    if not header.has_alpha:
        return None
    picture = _decode(data, header, cv2.IMREAD_UNCHANGED)
    if picture.ndim == 2 or picture.shape[2] != 4:
        return None
    return (picture >> 8).astype(np.uint8) if picture.dtype == np.uint16 else picture


def _decode(data: bytes, header: Header, flags: int) -> Pixels:
    """Decode with OpenCV, once the header has passed."""
    width, height, _ = header
    if width < 1 or height < 1:
        raise UnreadableImage("The picture has no pixels; send one of at least 1x1.")
    if width * height > MAX_PIXELS:
        raise TooManyPixels(
            f"The picture is {width}x{height} pixels; send one of at most "
            f"{MAX_PIXELS // 1_000_000} million pixels."
        )
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        picture = None
    if picture is None:
        raise UnreadableImage(f"The picture is damaged or cut short; send a whole {_KINDS} file.")
    return picture  # type: ignore[return-value]


def _decode_plain_png(data: bytes, form: bytes, mode: str) -> Pixels | None:
    """Decode a small PNG of one form that is nothing but pixels, in half of OpenCV's time; None for all else.

    Nothing in such a file could turn or colour it otherwise (PNG, third edition, section 5). One that is
    damaged is left for OpenCV to refuse, and a larger one too: this decoder keeps Python's lock.

    Returns:
        uint8 [height, width, 1] or, of colours, [height, width, 3].
    """
    if not (
        data[:19] == SMALL_PNG
        and data[20:23] == b"\0\0\0"
        and data[24:29] == form
        and data[37:41] == b"IDAT"
        and data[-12:] == PNG_END
        and int.from_bytes(data[33:37]) == len(data) - PNG_AROUND_PIXELS
    ):
        return None
    try:
        return decode_image_png_u8(data, (data[23], data[19]), mode)  # type: ignore[no-any-return]
    except Exception:
        return None
