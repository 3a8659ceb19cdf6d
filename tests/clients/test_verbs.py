"""The five verbs against the real service: the same in all four ways to ask."""

import inspect
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from quintet_client import AsyncClient, BadInput, Classification, Client, Detection, Generated

from service.models import MODELS

from .conftest import Ask

NOT_A_PICTURE = b"These bytes are not a picture." * 8


def verbs(client: type) -> dict[str, Any]:
    """The name of each verb, and what it takes: what it gives differs in being awaited."""
    public = {name: call for name, call in vars(client).items() if not name.startswith("_")}
    return {name: inspect.signature(call).parameters for name, call in public.items()}


def in_room(name: str) -> Any:
    """A parameter for tests that need the room of that name."""
    return pytest.param(name, marks=pytest.mark.room(name))


def gradient(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    grey = Image.linear_gradient("L").resize(size)
    return grey if mode == "L" else Image.merge("RGB", (grey, grey.rotate(180), grey)).convert(mode)


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_both_clients_have_the_same_verbs() -> None:
    assert verbs(Client) == verbs(AsyncClient)


def test_every_model_has_its_verb() -> None:
    assert set(verbs(Client)) >= set(MODELS)


async def test_every_verb_of_the_async_client_is_awaited() -> None:
    for name in MODELS:
        async with AsyncClient() as quintet:
            answer = getattr(quintet, name)([])
            assert inspect.isawaitable(answer)
            assert await answer == []


async def test_the_service_is_ready(ask: Ask, url: str) -> None:
    assert await ask(url, "is_ready") is True


@pytest.mark.parametrize(
    "form", ["path", "path-as-text", "bytes", "bytearray", "grey-array", "array", "pillow"]
)
async def test_a_digit_in_every_form(ask: Ask, url: str, digit_png: bytes, tmp_path: Path, form: str) -> None:
    path = tmp_path / "digit.png"
    path.write_bytes(digit_png)
    pillow = Image.open(path)
    picture = {
        "path": path,
        "path-as-text": str(path),
        "bytes": digit_png,
        "bytearray": bytearray(digit_png),
        "grey-array": np.asarray(pillow.convert("L")),
        "array": np.asarray(pillow.convert("RGB")),
        "pillow": pillow,
    }[form]
    answer = await ask(url, "digit", picture)
    assert answer == await ask(url, "digit", digit_png)
    assert isinstance(answer, Classification)
    assert (answer.model, answer.version.isdecimal()) == ("digit", True)
    assert list(answer.probabilities) == list("0123456789")
    assert answer.probabilities[answer.label] == answer.confidence == max(answer.probabilities.values())
    assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("verb", ["digit", in_room("image")])
async def test_both_doors_see_the_same(ask: Ask, quintet_server: Any, digit_png: bytes, verb: str) -> None:
    pictures = [digit_png, gradient(), gradient("L")]
    people = await ask(quintet_server.http_url, verb, pictures)
    machines = await ask(quintet_server.grpc_url, verb, tuple(pictures))
    assert [answer.label for answer in people] == [answer.label for answer in machines]
    for one, other in zip(people, machines, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-3)
        assert (one.model, one.version) == (other.model, other.version)


@pytest.mark.room("sentiment")
async def test_texts_are_judged_in_order(ask: Ask, url: str) -> None:
    good, bad = await ask(
        url, "sentiment", ["A wonderful, moving film: loved it.", "A dull, awful waste of time."]
    )
    assert (good.label, bad.label) == ("positive", "negative")
    assert set(good.probabilities) == {"negative", "positive"}
    alone = await ask(url, "sentiment", "A dull, awful waste of time.")
    assert alone.probabilities == pytest.approx(bad.probabilities, abs=1e-3)


@pytest.mark.room("sentiment")
async def test_a_text_of_any_script_is_taken(ask: Ask, url: str) -> None:
    assert (await ask(url, "sentiment", "Ein schöner Film 🎬 映画")).label in ("positive", "negative")


@pytest.mark.room("generator")
async def test_the_same_seed_draws_the_same_picture_at_both_doors(ask: Ask, quintet_server: Any) -> None:
    people = await ask(quintet_server.http_url, "generator", [3, 1, 4], seed=7)
    machines = await ask(quintet_server.grpc_url, "generator", [3, 1, 4], seed=7)
    assert [(drawn.digit, drawn.seed) for drawn in people] == [
        (drawn.digit, drawn.seed) for drawn in machines
    ]
    for one, other in zip(people, machines, strict=True):
        difference = np.subtract(one.to_pillow(), other.to_pillow(), dtype=np.int16)
        assert np.abs(difference).max() <= 1


@pytest.mark.room("generator")
async def test_a_drawn_digit_can_be_kept(ask: Ask, url: str, tmp_path: Path) -> None:
    drawn = await ask(url, "generator", 4)
    assert isinstance(drawn, Generated)
    assert (drawn.digit, drawn.to_pillow().size) == (4, (28, 28))
    drawn.save(tmp_path / "four.png")
    assert (tmp_path / "four.png").read_bytes() == drawn.image
    again = await ask(url, "generator", 4, seed=drawn.seed)
    assert again.to_pillow().tobytes() == drawn.to_pillow().tobytes()


@pytest.mark.room("generator")
async def test_the_ten_digits_are_drawn_unasked(ask: Ask, url: str) -> None:
    assert [drawn.digit for drawn in await ask(url, "generator")] == list(range(10))


@pytest.mark.room("detection")
async def test_boxes_are_in_pixels_of_the_picture_as_sent(ask: Ask, quintet_server: Any) -> None:
    pictures = [gradient(size=(640, 480)), gradient(size=(300, 500))]
    people = await ask(quintet_server.http_url, "detection", pictures, min_confidence=0.05)
    machines = await ask(quintet_server.grpc_url, "detection", pictures, min_confidence=0.05)
    assert [(one.width, one.height) for one in people] == [(640, 480), (300, 500)]
    for one, other in zip(people, machines, strict=True):
        assert isinstance(one, Detection)
        assert (one.width, one.height) == (other.width, other.height)
        assert [found.label for found in one.objects] == [found.label for found in other.objects]
        for mine, theirs in zip(one.objects, other.objects, strict=True):
            assert mine.confidence == pytest.approx(theirs.confidence, abs=1e-3)
            assert mine.box == pytest.approx(theirs.box, abs=0.5)


@pytest.mark.room("detection")
async def test_the_unsure_is_left_out(ask: Ask, url: str) -> None:
    found = await ask(url, "detection", gradient(), min_confidence=1.0)
    assert found.objects == ()


@pytest.mark.parametrize("verb", ["digit", "sentiment", "detection", "generator"])
async def test_no_inputs_give_no_results(ask: Ask, url: str, verb: str) -> None:
    assert await ask(url, verb, []) == []


@pytest.mark.parametrize("verb", ["digit", in_room("image"), in_room("detection")])
async def test_a_bad_picture_is_told_apart_from_its_neighbours(ask: Ask, url: str, verb: str) -> None:
    good = png(gradient())
    with pytest.raises(BadInput, match="picture") as caught:
        await ask(url, verb, [good, NOT_A_PICTURE, good])
    assert caught.value.index == 1


@pytest.mark.room("generator")
async def test_a_digit_that_does_not_exist_is_refused(ask: Ask, url: str) -> None:
    with pytest.raises(BadInput):
        await ask(url, "generator", 11)
