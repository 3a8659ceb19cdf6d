"""What is sent for each form of input, and what is refused before anything is sent."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from quintet_client import BadInput, Client, pictures, questions
from quintet_client import grpc_service_pb2 as messages

from .conftest import Ask
from .stand_in import GOOD, GrpcStandIn, HttpStandIn


def test_bytes_and_files_go_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "anything"
    path.write_bytes(b"anything")
    assert pictures.encode(path) == pictures.encode(memoryview(b"anything")) == b"anything"


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)], ids=["grey", "colour"])
def test_arrays_keep_their_pixels(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for array in (pixels, pixels[::-1], pixels[:, ::2]):
        sent = Image.open(io.BytesIO(pictures.encode(array)))
        np.testing.assert_array_equal(np.asarray(sent), array)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "F", "I;16"])
def test_pillow_images_of_every_mode_can_be_sent(mode: str) -> None:
    sent = Image.open(io.BytesIO(pictures.encode(Image.new(mode, (4, 3)))))
    assert (sent.format, sent.size) == ("PNG", (4, 3))


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(np.zeros((5, 7)), id="floats"),
        pytest.param(np.zeros((5, 7, 4), np.uint8), id="four-channels"),
        pytest.param(np.zeros((2, 5, 7, 3), np.uint8), id="a-batch"),
        pytest.param(np.zeros((0, 7), np.uint8), id="no-pixels"),
        pytest.param(7, id="a-number"),
        pytest.param(None, id="nothing"),
    ],
)
def test_what_is_no_picture_is_refused(picture: Any) -> None:
    with Client() as quintet, pytest.raises(BadInput) as caught:
        quintet.digit([b"a picture", picture])
    assert caught.value.index == 1


def test_a_missing_file_is_reported_as_python_does(tmp_path: Path) -> None:
    with Client() as quintet, pytest.raises(FileNotFoundError):
        quintet.digit(tmp_path / "missing.png")


@pytest.mark.parametrize("digits", ["seven", 1.5, 2**70], ids=str)
def test_what_is_no_digit_is_refused(digits: Any) -> None:
    with Client() as quintet, pytest.raises(BadInput):
        quintet.generator(digits)


def test_whole_numbers_of_numpy_are_digits() -> None:
    question = questions.draw(np.int64(7))  # type: ignore[arg-type]
    prepared = [question.prepare(digit, None) for digit in np.arange(3)]
    assert question.pack(prepared) == questions.Digits([0, 1, 2], 7)
    assert question.is_one(np.int64(3))
    assert not question.is_one(np.arange(3))


def test_what_is_no_text_is_refused() -> None:
    with Client() as quintet, pytest.raises(BadInput) as caught:
        quintet.sentiment(["fine", b"not a str"])  # type: ignore[list-item]
    assert caught.value.index == 1


def test_an_open_file_is_a_picture(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"anything")
    with (tmp_path / "file").open("rb") as file:
        assert pictures.is_one(file)
        assert pictures.encode(file) == b"anything"
    with (tmp_path / "file").open() as file, pytest.raises(BadInput, match="rb"):
        pictures.encode(file)  # type: ignore[arg-type]


def test_a_long_list_goes_in_parts() -> None:
    parts = list(questions.in_parts([b"x"] * 150))
    assert [len(part) for part in parts] == [64, 64, 22]
    large = b"x" * (questions.MOST_BYTES_TOGETHER - 1)
    assert [len(part) for part in questions.in_parts([large, b"x", large, large])] == [2, 1, 1]


@pytest.mark.parametrize(("orientation", "size"), [(1, (40, 20)), (6, (20, 40))], ids=["upright", "turned"])
def test_the_size_of_a_picture_is_that_which_people_see(orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.new("RGB", (40, 20)).save(file, "JPEG", exif=exif)
    assert pictures.size_of(file.getvalue()) == size


async def test_one_picture_is_the_body_and_several_are_parts(ask: Ask) -> None:
    with HttpStandIn([GOOD]) as server:
        await ask(server.url, "digit", b"one")
        with pytest.raises(Exception, match="results"):
            await ask(server.url, "digit", [b"one", b"two"])
    one, several = server.requests
    assert (one.place, one.body) == ("/digit", b"one")
    assert several.headers["content-type"].startswith("multipart/form-data")
    assert several.body.count(b'name="images"') == 2


async def test_a_prefix_in_the_address_is_kept(ask: Ask) -> None:
    with HttpStandIn([GOOD]) as server:
        await ask(f"{server.url}/quintet", "sentiment", "loved it")
    assert server.requests[0].place == "/quintet/sentiment"


async def test_padding_is_not_taken_for_objects(ask: Ask) -> None:
    response = messages.ModelInferResponse(model_name="detection", model_version="1")
    for name, datatype, shape, contents in [
        ("boxes", "FP32", [1, 2, 4], {"fp32_contents": [1, 2, 3, 4, 0, 0, 0, 0]}),
        ("confidence", "FP32", [1, 2], {"fp32_contents": [0.5, 0]}),
        ("label", "INT64", [1, 2], {"int64_contents": [1, -1]}),
        ("count", "INT64", [1], {"int64_contents": [1]}),
    ]:
        contents = messages.InferTensorContents(**contents)
        response.outputs.add(name=name, datatype=datatype, shape=shape, contents=contents)
    with GrpcStandIn([GOOD], response, labels=["WBC", "RBC"]) as server:
        found = await ask(server.url, "detection", Image.new("RGB", (8, 6)))
    assert (found.width, found.height) == (8, 6)
    assert [(one.label, one.confidence, one.box) for one in found.objects] == [("RBC", 0.5, (1, 2, 3, 4))]
    parameters = server.requests[0].body.parameters
    assert parameters["min_confidence"].double_param == 0.5
