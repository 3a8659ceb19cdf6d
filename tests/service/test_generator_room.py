"""The generator room: the same digit and seed give the same picture, whoever asks, wherever."""

import base64

import cv2
import numpy as np
import pytest

from service.errors import BadInput
from service.models.digit import DIGIT
from service.models.generator import GENERATOR, LATENT, Picture, contact_sheet, noise_of
from service.models.spec import Sample
from service.repository import Repository
from service.runtime import Network
from tests.conftest import MODELS_FOLDER

LARGEST = 2**63 - 1
WORD = 2**64 - 1


def philox(counter: int, seed: int, digit: int) -> list[int]:
    """Four words of Philox4x64-10, as its paper defines them, in whole numbers of any size."""
    words, key = [counter, 0, 0, 0], [seed, digit]
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [
            (right >> 64) ^ words[1] ^ key[0],
            right & WORD,
            (left >> 64) ^ words[3] ^ key[1],
            left & WORD,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & WORD, (key[1] + 0xBB67AE8584CAA73B) & WORD]
    return words


@pytest.mark.parametrize(
    ("digit", "seed", "first"),
    [
        pytest.param(3, 7, ["0x1.f031240000000p-1", "0x1.cd4b3a0000000p-1"], id="three-from-seven"),
        pytest.param(0, 0, ["-0x1.508bac0000000p-1", "-0x1.6d8b3e0000000p-2"], id="nought-from-nought"),
        pytest.param(9, LARGEST, ["0x1.ed62580000000p+0", "0x1.d588dc0000000p-1"], id="from-the-largest"),
    ],
)
def test_the_noise_is_known_to_the_last_bit(digit: int, seed: int, first: list[str]) -> None:
    noise = noise_of(digit, seed)
    assert (noise.shape, noise.dtype) == ((LATENT,), np.float32)
    assert [float(number).hex() for number in noise[:2]] == first


@pytest.mark.parametrize(("digit", "seed"), [(3, 7), (0, 0), (9, LARGEST)])
def test_the_noise_is_what_its_description_says(digit: int, seed: int) -> None:
    words = [word for counter in range(1, LATENT // 4 + 1) for word in philox(counter, seed, digit)]
    sums = [sum(word >> shift & 0xFFFF for shift in (0, 16, 32, 48)) for word in words]
    expected = [np.float32((total - 2 * 65535) / ((65536**2 - 1) / 3) ** 0.5) for total in sums]
    assert noise_of(digit, seed).tolist() == [float(number) for number in expected]


def test_the_noise_is_a_bell_of_variance_one_and_differs_with_digit_and_seed() -> None:
    noise = np.stack([noise_of(digit, seed) for digit in range(10) for seed in range(100)])
    assert len(np.unique(noise, axis=0)) == 1000
    assert abs(noise.mean()) < 0.02
    assert abs(noise.var() - 1) < 0.02
    assert 3 < np.abs(noise).max() <= 3.4642
    assert np.abs(np.corrcoef(noise, rowvar=False) - np.eye(LATENT)).max() < 0.2


def test_whole_numbers_of_every_kind_are_taken_and_echoed() -> None:
    kinds = [(3, 7), (np.int64(3), np.uint8(7)), (np.array(3), np.array(7, np.int64))]
    samples = [GENERATOR.to_tensor({"digit": digit, "seed": seed}) for digit, seed in kinds]
    for sample in samples:
        asked, noise = sample.tensors
        assert (asked.dtype, asked.shape, int(asked)) == (np.int64, (), 3)
        assert np.array_equal(noise, noise_of(3, 7))
        assert [type(number) for number in sample.context] == [int, int]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        pytest.param({"digit": 10, "seed": 0}, "digit must be a whole number from 0 to 9", id="ten"),
        pytest.param({"digit": -1, "seed": 0}, "this one is -1", id="below-nought"),
        pytest.param({"digit": 3.0, "seed": 0}, "digit must be a whole number", id="a-fraction"),
        pytest.param({"digit": "3", "seed": 0}, "digit must be a whole number", id="a-text"),
        pytest.param({"digit": None, "seed": 0}, "digit must be a whole number", id="nothing"),
        pytest.param({"digit": True, "seed": 0}, "not a truth value", id="a-truth-value"),
        pytest.param({"digit": [3], "seed": 0}, "digit must be a whole number", id="a-list"),
        pytest.param(
            {"digit": 3, "seed": -1}, "seed must be a whole number from 0 to 92233", id="seed-below-0"
        ),
        pytest.param({"digit": 3, "seed": LARGEST + 1}, "seed must be", id="more-than-an-int64-holds"),
        pytest.param({"digit": 3, "seed": 10**5000}, "far outside", id="a-number-of-5000-digits"),
        pytest.param({"digit": 3, "seed": 0.5}, "seed must be a whole number", id="half-a-seed"),
    ],
)
def test_what_is_no_digit_or_seed_is_refused(inputs: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        GENERATOR.to_tensor(inputs)


def test_the_answer_holds_the_picture_as_png_and_as_pixels() -> None:
    pixels = np.arange(28 * 28, dtype=np.uint16).reshape(28, 28).astype(np.uint8)
    answer = GENERATOR.to_answer((pixels,), GENERATOR.to_tensor({"digit": 3, "seed": 7}))
    assert np.array_equal(answer.as_tensor("pixels"), pixels)
    told = answer.as_json()
    assert (list(told), told["digit"], told["seed"]) == (["digit", "seed", "image"], 3, 7)
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(told["image"]), np.uint8), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(picture, pixels)


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (3, 1, 3), (10, 1, 10), (23, 3, 10)])
def test_a_contact_sheet_shows_every_picture_in_order(count: int, rows: int, columns: int) -> None:
    answers = [Picture(0, 0, np.full((28, 28), 100 + number, np.uint8)) for number in range(count)]
    packed = np.frombuffer(contact_sheet(answers), np.uint8)
    sheet = cv2.imdecode(packed, cv2.IMREAD_UNCHANGED)
    assert sheet.shape == (rows * 120 + 8, columns * 120 + 8)
    for number in range(count):
        row, column = divmod(number, 10)
        shown = sheet[row * 120 + 8 : row * 120 + 120, column * 120 + 8 : column * 120 + 120]
        assert (shown == 100 + number).all()


# ---- the shipped network ----


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(GENERATOR, Repository(MODELS_FOLDER).open("generator").network)


def asked(count: int) -> list[Sample]:
    return [GENERATOR.to_tensor({"digit": seed % 10, "seed": seed}) for seed in range(count)]


def test_a_picture_is_the_same_to_the_last_bit_in_any_company(network: Network) -> None:
    samples = asked(64)
    alone = [network.run([sample])[0][0] for sample in samples]
    for size in (2, 7, 64):
        rows = [row for start in range(0, 64, size) for row in network.run(samples[start : start + size])]
        assert all(np.array_equal(row[0], one) for row, one in zip(rows, alone, strict=True))


def test_the_digit_room_reads_what_the_generator_room_draws(network: Network) -> None:
    reader = Network(DIGIT, Repository(MODELS_FOLDER).open("digit").network)
    samples = asked(1000)
    drawn = [row[0] for start in range(0, 1000, 50) for row in network.run(samples[start : start + 50])]
    read = [reader.run([DIGIT.to_tensor({"pixels": pixels})])[0][0].argmax() for pixels in drawn]
    assert np.mean(np.array(read) == np.arange(1000) % 10) >= 0.99


def test_no_two_seeds_draw_the_same_picture(network: Network) -> None:
    samples = asked(200)
    drawn = np.stack([row[0] for row in network.run(samples)])
    assert len(np.unique(drawn.reshape(200, -1), axis=0)) == 200
