"""The digit room: whatever way a digit is shown, the network gets it as MNIST would show it.

The judge is the nearest neighbour among other people's digits, and at the end the shipped network.
"""

from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from sklearn.datasets import load_digits

from service.errors import QuintetError, UnreadableImage
from service.models.digit import DIGIT, is_quick, like_mnist
from service.models.spec import Inputs, Sample
from service.repository import Repository
from service.runtime import Network
from tests import digits as ways
from tests.conftest import MODELS_FOLDER
from tests.digits import WAYS, Pixels, Way, png

ASKED = 60
"""Digits asked about; the judge knows the others."""


@pytest.fixture(scope="module")
def digits() -> tuple[Pixels, npt.NDArray[np.int64]]:
    """scikit-learn's 1,797 scans in MNIST's layout: uint8 [n, 28, 28], and their labels."""
    scans = load_digits()
    pixels = (scans.images * 255 / 16).astype(np.uint8)
    return np.stack([like_mnist(picture) for picture in pixels]), scans.target


@pytest.fixture(scope="module")
def judge(digits: tuple[Pixels, npt.NDArray[np.int64]]) -> Callable[[Pixels], int]:
    """The label of the most similar digit among those not asked about."""
    pixels, labels = digits
    known = pixels[ASKED:].reshape(len(pixels) - ASKED, -1).astype(np.float32)
    known /= np.linalg.norm(known, axis=1, keepdims=True)

    def nearest(picture: Pixels) -> int:
        return int(labels[ASKED:][(known @ picture.ravel().astype(np.float32)).argmax()])

    return nearest


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_digit_is_recognised_however_it_is_shown(
    way: Way, digits: tuple[Pixels, npt.NDArray[np.int64]], judge: Callable[[Pixels], int]
) -> None:
    chance = np.random.default_rng(0)
    shown = [way(digit, chance) for digit in digits[0][:ASKED]]
    read = [judge(like_mnist(picture)) for picture in shown]
    assert np.mean(read == digits[1][:ASKED]) >= 0.8


def test_a_digit_in_a_huge_scan_is_found(
    digits: tuple[Pixels, npt.NDArray[np.int64]], judge: Callable[[Pixels], int]
) -> None:
    chance = np.random.default_rng(0)
    read = [judge(like_mnist(ways.huge(digit, chance))) for digit in digits[0][:5]]
    assert np.sum(read == digits[1][:5]) >= 4


def test_what_is_like_mnist_comes_through_unchanged_and_its_negative_inverted(
    digits: tuple[Pixels, npt.NDArray[np.int64]],
) -> None:
    for digit in digits[0]:
        assert np.array_equal(like_mnist(digit), digit)
        assert np.array_equal(like_mnist(cv2.bitwise_not(digit)), digit)


def test_through_a_png_file_as_well(digits: tuple[Pixels, npt.NDArray[np.int64]]) -> None:
    digit = digits[0][0]
    for picture in (digit, cv2.bitwise_not(digit)):
        (pixels,) = DIGIT.to_tensor({"image": png(picture)}).tensors
        assert np.array_equal(pixels, digit)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_format_is_mnists(way: Way, digits: tuple[Pixels, npt.NDArray[np.int64]]) -> None:
    for digit in digits[0][:20]:
        out = like_mnist(way(digit, np.random.default_rng(1)))
        assert out.shape == (28, 28)
        assert out.dtype == np.uint8
        assert out.max() >= 250
        _, _, width, height = cv2.boundingRect(out)
        assert max(width, height) in (19, 20)
        moments = cv2.moments(out)
        assert abs(moments["m10"] / moments["m00"] - 14) < 0.55
        assert abs(moments["m01"] / moments["m00"] - 14) < 0.55


def a_mark(shape: tuple[int, int], paper: int, ink: int) -> Pixels:
    """A picture with a vertical bar over the middle third of its height."""
    picture = np.full(shape, paper, np.uint8)
    height, width = shape
    picture[
        height // 3 : max(height // 3 + 1, 2 * height // 3), width // 2 : width // 2 + max(1, width // 20)
    ] = ink
    return picture


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(np.zeros((28, 28), np.uint8), id="black"),
        pytest.param(np.full((28, 28), 255, np.uint8), id="white"),
        pytest.param(np.full((300, 200), 128, np.uint8), id="grey"),
        pytest.param(np.full((1, 1), 200, np.uint8), id="one-pixel"),
        pytest.param(np.zeros((5000, 5000), np.uint8), id="black-and-huge"),
    ],
)
def test_without_ink_it_is_black(picture: Pixels) -> None:
    assert not like_mnist(picture).any()


@pytest.mark.parametrize(
    "shape",
    [(1, 2), (2, 1), (1, 5000), (5000, 1), (2, 3), (3, 3), (7, 400), (28, 28), (29, 31), (5000, 5000)],
    ids=str,
)
def test_any_size_and_content_comes_out_as_28x28_and_always_the_same(shape: tuple[int, int]) -> None:
    chance = np.random.default_rng(0)
    noise = chance.integers(0, 256, shape, dtype=np.uint8)
    faint_noise = chance.integers(120, 124, shape, dtype=np.uint8)
    stripes = np.broadcast_to((np.arange(shape[1]) % 7 * 40).astype(np.uint8), shape)
    slope = np.broadcast_to(np.linspace(0, 255, shape[1]).astype(np.uint8), shape)
    halves = np.where(np.arange(shape[1]) < shape[1] // 2, np.uint8(30), np.uint8(220)) * np.ones(
        shape, np.uint8
    )
    for picture in (noise, faint_noise, stripes, slope, halves, a_mark(shape, 255, 0), a_mark(shape, 0, 255)):
        out = like_mnist(picture)
        assert out.shape == (28, 28)
        assert out.dtype == np.uint8
        assert np.array_equal(like_mnist(picture.copy()), out)


def test_the_callers_picture_is_left_alone(digits: tuple[Pixels, npt.NDArray[np.int64]]) -> None:
    chance = np.random.default_rng(0)
    for way in WAYS.values():
        picture = way(digits[0][3], chance)
        before = picture.copy()
        like_mnist(picture)
        assert np.array_equal(picture, before)


def test_pixels_go_to_the_network_as_they_are() -> None:
    pixels = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    assert DIGIT.to_tensor({"pixels": pixels}).tensors[0] is pixels
    assert is_quick({"pixels": pixels})


def test_several_inputs_together_are_what_each_is_alone(digits: tuple[Pixels, npt.NDArray[np.int64]]) -> None:
    chance = np.random.default_rng(0)
    shown = [digits[0][0], *(way(digits[0][3], chance) for way in WAYS.values())]
    shown += [cv2.bitwise_not(digits[0][1]), np.zeros((28, 28), np.uint8), np.roll(digits[0][2], 3, axis=1)]
    several: list[Inputs] = [{"image": png(picture)} for picture in shown]
    alone = [DIGIT.to_tensor(inputs).tensors[0] for inputs in several]
    several[1:1] = [{"image": b"seven"}, {"pixels": digits[0][0]}, {"image": b""}]
    together = DIGIT.samples(several)
    assert [place for place, one in enumerate(together) if isinstance(one, QuintetError)] == [1, 3]
    pixels = [one.tensors[0] for one in together if isinstance(one, Sample)]
    assert np.array_equal(pixels.pop(1), digits[0][0])
    for one, other in zip(pixels, alone, strict=True):
        assert np.array_equal(one, other)


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(UnreadableImage):
        DIGIT.to_tensor({"image": b"seven"})


def test_the_answer_names_the_likeliest_digit() -> None:
    probabilities = np.full(10, 0.01, np.float32)
    probabilities[7] = 0.91
    answer = DIGIT.to_answer((probabilities,), DIGIT.to_tensor({"pixels": np.zeros((28, 28), np.uint8)}))
    assert answer.as_json()["label"] == "7"
    assert answer.as_tensor("label") == b"7"


@pytest.mark.parametrize(
    ("seen", "least"),
    [
        pytest.param(lambda scan: scan, 0.97, id="light-on-dark"),
        pytest.param(lambda scan: 255 - scan, 0.97, id="dark-on-light"),
        pytest.param(lambda scan: cv2.resize(scan, (120, 120)), 0.97, id="enlarged-to-its-edges"),
        pytest.param(
            lambda scan: cv2.resize(scan, (160, 160), interpolation=cv2.INTER_NEAREST),
            0.96,
            id="as-large-blocks",
        ),
        pytest.param(
            lambda scan: np.pad(cv2.resize(scan, (64, 64)), ((20, 90), (70, 10))),
            0.97,
            id="in-a-corner-of-a-page",
        ),
    ],
)
def test_the_shipped_network_reads_strangers_scans(seen: Callable[[Pixels], Pixels], least: float) -> None:
    """Nearly all of scikit-learn's 1,797 scans of 8x8 pixels, which it never saw."""
    network = Network(DIGIT, Repository(MODELS_FOLDER).open("digit").network)
    samples = [DIGIT.to_tensor({"image": png(seen(scan))}) for scan in as_scans()]
    read = [int(row[0].argmax()) for start in range(0, 1797, 64) for row in network.run(samples[start:][:64])]
    assert np.mean(read == load_digits().target) >= least


def as_scans() -> Pixels:
    """Digits of other hands than MNIST's: uint8 [1797, 8, 8], light on dark."""
    scans: Pixels = (load_digits().images * (255 / 16)).astype(np.uint8)
    return scans
