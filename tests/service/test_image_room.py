"""The image room: whatever picture is sent, the network gets its middle, upright, in 32x32 true colours."""

import io
import struct
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from service.errors import TooManyPixels, UnreadableImage
from service.models.image import IMAGE, LABELS, is_quick, like_cifar
from service.models.pictures import decode_colour
from service.repository import Repository
from service.runtime import Network
from tests.conftest import MODELS_FOLDER

Pixels = npt.NDArray[np.uint8]

RED, GREEN, BLUE, WHITE = (200, 30, 20), (20, 160, 40), (30, 50, 190), (255, 255, 255)


def noise(*shape: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encoded(picture: npt.NDArray[np.uint8 | np.uint16], ending: str = ".png", *options: int) -> bytes:
    """A picture, its channels in OpenCV's order, as a file."""
    return cv2.imencode(ending, picture, options)[1].tobytes()


def as_file(picture: Pixels, ending: str = ".png", *options: int) -> bytes:
    """An RGB picture as a file."""
    return encoded(np.ascontiguousarray(picture[:, :, ::-1]), ending, *options)


def seen(data: bytes) -> Pixels:
    """What the network gets of a file."""
    (pixels,) = IMAGE.to_tensor({"image": data}).tensors
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    return pixels


def flag(height: int = 60, width: int = 90) -> Pixels:
    """Red at the top left, green at the top right, blue below: one can tell how it stands."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = RED
    picture[: height // 2, width // 2 :] = GREEN
    picture[height // 2 :] = BLUE
    return picture


def corners(picture: Pixels) -> list[tuple[int, ...]]:
    """The colours a little inside the four corners, row by row."""
    height, width, _ = picture.shape
    places = [(row, column) for row in (height // 6, -height // 6) for column in (width // 6, -width // 6)]
    return [tuple(int(value) for value in picture[place]) for place in places]


def png_of(
    colour_type: int, rows: list[bytes], width: int, bits: int = 8, *chunks: tuple[bytes, bytes]
) -> bytes:
    """A PNG of any kind, made by hand (W3C, *Portable Network Graphics*, section 5)."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour_type, 0, 0, 0)
    scan = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", scan), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def turned_by_a_camera(picture: Pixels, orientation: int) -> bytes:
    """A JPEG whose EXIF says how it has to be turned."""
    tiff = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + b"\0" * 4
    exif = b"Exif\0\0" + tiff
    jpeg = as_file(picture, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 98)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


# ---- to 32x32 ----


@pytest.mark.parametrize("ending", [".png", ".bmp", ".webp"])
def test_a_picture_of_cifars_size_comes_through_unchanged(ending: str) -> None:
    picture = noise(32, 32, 3)
    lossless = (cv2.IMWRITE_WEBP_QUALITY, 101) if ending == ".webp" else ()
    assert np.array_equal(seen(as_file(picture, ending, *lossless)), picture)
    assert np.array_equal(like_cifar(picture), picture)


def test_ready_pixels_are_taken_as_they_are() -> None:
    picture = noise(32, 32, 3)
    (pixels,) = IMAGE.to_tensor({"pixels": picture}).tensors
    assert pixels is picture


def test_of_a_large_picture_each_pixel_is_the_mean_of_what_it_covers() -> None:
    picture = noise(32 * 8, 32 * 8, 3)
    means = picture.reshape(32, 8, 32, 8, 3).mean((1, 3))
    assert np.abs(like_cifar(picture) - means).max() <= 1


@pytest.mark.parametrize("shape", [(64, 200), (200, 64)], ids=["wide", "tall"])
def test_of_a_long_picture_the_middle_is_seen(shape: tuple[int, int]) -> None:
    picture = np.full((*shape, 3), 255, np.uint8)
    middle = noise(64, 64, 3)
    height, width = shape
    picture[(height - 64) // 2 :, (width - 64) // 2 :][:64, :64] = middle
    assert np.array_equal(like_cifar(picture), like_cifar(middle))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (1, 2),
        (2, 1),
        (1, 5000),
        (5000, 1),
        (3, 3),
        (31, 33),
        (32, 50),
        (33, 32),
        (7, 400),
        (3000, 4000),
    ],
    ids=str,
)
def test_any_size_comes_out_as_32x32_and_always_the_same(shape: tuple[int, int]) -> None:
    picture = np.full((*shape, 3), RED, np.uint8)
    before = picture.copy()
    out = like_cifar(picture)
    assert out.shape == (32, 32, 3)
    assert out.dtype == np.uint8
    assert (out == RED).all()
    assert out.flags.c_contiguous
    assert np.array_equal(picture, before)
    assert np.array_equal(like_cifar(picture), out)


def test_a_tiny_picture_is_enlarged_and_stays_in_range() -> None:
    small = np.zeros((4, 4, 3), np.uint8)
    small[:, 2:] = 255
    out = like_cifar(small)
    assert (out[:, :8] <= 20).all()
    assert (out[:, -8:] >= 235).all()


# ---- colours ----


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".bmp"])
def test_colours_are_red_green_blue_in_every_format(ending: str) -> None:
    best = {".jpg": (cv2.IMWRITE_JPEG_QUALITY, 98), ".webp": (cv2.IMWRITE_WEBP_QUALITY, 101)}
    found = corners(decode_colour(as_file(flag(), ending, *best.get(ending, ()))))
    for colour, right in zip(found, (RED, GREEN, BLUE, BLUE), strict=True):
        assert np.abs(np.subtract(colour, right)).max() <= 6


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".bmp"])
def test_a_grey_picture_has_three_equal_channels(ending: str) -> None:
    grey = np.tile(np.arange(0, 240, 5, dtype=np.uint8), (48, 1))
    out = decode_colour(encoded(grey, ending))
    assert out.shape == (48, 48, 3)
    assert np.abs(out[:, :, 0].astype(int) - out[:, :, 2]).max() <= 4
    assert np.abs(out[:, :, 1].astype(int) - grey).max() <= 12


def test_sixteen_bits_become_eight() -> None:
    picture = noise(32, 32, 3)
    deep = picture[:, :, ::-1].astype(np.uint16) * 257
    assert np.array_equal(seen(encoded(deep)), picture)
    assert np.array_equal(seen(encoded(deep[:, :, 0]))[:, :, 1], picture[:, :, 2])
    opaque = np.dstack((deep, np.full((32, 32), 65535, np.uint16)))
    assert np.array_equal(seen(encoded(opaque)), picture)


def test_a_palette_and_single_bits_are_looked_up() -> None:
    palette = (b"PLTE", bytes(RED + GREEN + BLUE))
    out = decode_colour(png_of(3, [b"\0\1", b"\2\2"], 2, 8, palette))
    assert [tuple(colour) for colour in out.reshape(4, 3)] == [RED, GREEN, BLUE, BLUE]
    stripes = decode_colour(png_of(0, [b"\xaa"], 8, 1))
    assert stripes[0, :, 0].tolist() == [255, 0] * 4


def test_a_transparent_picture_lies_on_white() -> None:
    picture = flag()
    alpha = np.zeros((60, 90), np.uint8)
    alpha[:30, :45] = 255
    alpha[30:, :] = 128
    out = corners(decode_colour(encoded(np.dstack((picture[:, :, ::-1], alpha)))))
    assert out[:2] == [RED, WHITE]
    half = np.rint(np.multiply(BLUE, 128 / 255) + 127)
    assert np.abs(out[2] - half).max() <= 1


def test_transparency_of_other_kinds() -> None:
    hidden = (b"PLTE", bytes(RED + GREEN)), (b"tRNS", b"\0\xff")
    palette = decode_colour(png_of(3, [b"\0\1"], 2, 8, *hidden))
    assert [tuple(colour) for colour in palette[0]] == [WHITE, GREEN]
    grey = decode_colour(png_of(4, [bytes((10, 0, 10, 255))], 2))
    assert [tuple(colour) for colour in grey[0]] == [WHITE, (10, 10, 10)]
    webp = np.dstack((flag()[:, :, ::-1], np.zeros((60, 90), np.uint8)))
    assert (decode_colour(encoded(webp, ".webp", cv2.IMWRITE_WEBP_QUALITY, 101)) == 255).all()


def test_a_printers_jpeg_in_four_inks() -> None:
    inks = Image.new("CMYK", (40, 40), (0, 230, 20, 10))
    inks.paste((200, 0, 220, 0), (20, 0, 40, 40))
    file = io.BytesIO()
    inks.save(file, "JPEG", quality=98)
    pink, green = decode_colour(file.getvalue())[20, [5, 35]].astype(int)
    assert pink[0] > 180
    assert pink[0] > pink[2] > pink[1] + 60
    assert green[1] > 180
    assert green[1] > max(green[0], green[2]) + 60


# ---- which way up ----


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright(orientation: int) -> None:
    upright = flag()
    # What the sensor saw, by the EXIF standard's table of orientations.
    sensor = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    out = decode_colour(turned_by_a_camera(np.ascontiguousarray(sensor), orientation))
    assert out.shape == upright.shape
    for colour, right in zip(corners(out), corners(upright), strict=True):
        assert np.abs(np.subtract(colour, right)).max() <= 12


# ---- what cannot be seen ----


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"hello", as_file(flag())[:30], as_file(flag())[:-60]])
def test_what_is_no_whole_picture_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadableImage):
        IMAGE.to_tensor({"image": data})


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(TooManyPixels, match="100000x100000"):
        IMAGE.to_tensor(
            {"image": png_of(2, [b"\0"], 100_000)[:16] + struct.pack(">II", 10**5, 10**5) + b"\x08\x02"}
        )


# ---- the answer ----


def test_the_likeliest_label_is_the_answer() -> None:
    probabilities = np.full(10, 0.02, np.float32)
    probabilities[LABELS.index("cat")] = 0.82
    answer = IMAGE.to_answer([probabilities], IMAGE.to_tensor(IMAGE.example))
    assert answer.as_json()["label"] == "cat"
    assert answer.as_json()["confidence"] == pytest.approx(0.82)
    assert list(answer.as_json()["probabilities"]) == list(LABELS)
    assert answer.as_tensor("label") == b"cat"


def test_small_pictures_and_pixels_are_quick() -> None:
    assert is_quick({"pixels": noise(32, 32, 3)})
    assert is_quick({"image": as_file(noise(120, 120, 3))})
    assert not is_quick({"image": as_file(noise(300, 300, 3))})


@pytest.mark.parametrize(
    "shown",
    [
        pytest.param(lambda view: as_file(view), id="as-drawn"),
        pytest.param(lambda view: as_file(view[:, ::-1]), id="mirrored"),
        pytest.param(lambda view: as_file(cv2.resize(view, (960, 960)), ".jpg"), id="large-jpeg"),
        pytest.param(lambda view: as_file(np.pad(view, ((0, 0), (40, 40), (0, 0)), "edge")), id="wide"),
        pytest.param(lambda view: turned_by_a_camera(np.rot90(view), 6), id="held-sideways"),
    ],
)
def test_the_shipped_network_sees_a_ship(shown: Callable[[Pixels], bytes]) -> None:
    network = Network(IMAGE, Repository(MODELS_FOLDER).open("image").network)
    sample = IMAGE.to_tensor({"image": shown(decode_colour(IMAGE.example["image"]))})
    assert IMAGE.to_answer(network.run([sample])[0], sample).as_json()["label"] == "ship"
