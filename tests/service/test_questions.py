"""Requests that begin like one before: read by what is kept of that, and answered as if nothing were."""

import re
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from service.errors import BadInput, QuintetError
from service.http import Request
from service.models.digit import DIGIT
from service.models.generator import GENERATOR
from service.questions import LONGEST_FORM, MOST_FORMS, Form, MachinesQuestion, from_machine, from_people
from tests.conftest import QuintetServer

from .knocking import INFER, TOLERANCE, encoded, http_client, pixels_of, probabilities_of, split_binary

Pngs = list[tuple[bytes, str]]


async def nothing() -> dict[str, Any]:
    raise AssertionError("only the head is read")


def head(path: str, *, query: bytes = b"", **headers: str) -> Request:
    named = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return Request("POST", path, query, named, nothing)


# ---- what a machine's JSON says is kept ----


def described(count: int = 1, *, size: int | None = None, **more: Any) -> bytes:
    """The JSON of a request for so many digits, whose pixels follow it."""
    parameters = {"binary_data_size": count * 784 if size is None else size}
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [count, 28, 28], "parameters": parameters}
    return orjson.dumps({"inputs": [tensor], **more})


def asking(text: bytes, forms: dict[bytes, Form] | None) -> MachinesQuestion:
    return from_machine(DIGIT, None, head(INFER, inference_header_content_length=str(len(text))), forms)


@pytest.mark.parametrize("count", [1, 3])
def test_a_form_that_is_known_reads_other_tensors_as_the_first_time(count: int) -> None:
    text = described(count, id="seven", parameters={"priority": 1, "timeout": 2_000_000})
    forms: dict[bytes, Form] = {}
    random = np.random.default_rng(0)
    for turn in range(3):
        pixels = random.integers(0, 256, (count, 28, 28), np.uint8)
        kept = asking(text, forms).read(text + pixels.tobytes(), 64)
        anew = asking(text, None).read(text + pixels.tobytes(), 64)
        assert len(forms) == 1, turn
        assert [one["pixels"].tolist() for one in kept.inputs] == pixels.tolist()
        assert [one["pixels"].tolist() for one in anew.inputs] == pixels.tolist()
        assert kept._replace(inputs=[], heads=None) == anew._replace(inputs=[])
        assert (kept.id, kept.seconds, int(kept.priority)) == ("seven", 2.0, 0)


@pytest.mark.parametrize("change", [-1, 1, -784], ids=["a byte less", "a byte more", "nothing"])
def test_a_known_form_with_other_sizes_is_refused_as_ever(change: int) -> None:
    text, forms = described(), dict[bytes, Form]()
    asking(text, forms).read(text + bytes(784), 64)
    refusals = []
    for kept in (forms, None):
        with pytest.raises(BadInput) as refusal:
            asking(text, kept).read(text + bytes(784 + change), 64)
        refusals.append(refusal.value.detail)
    assert refusals[0] == refusals[1]


def with_json(text: bytes) -> bytes:
    return orjson.dumps(
        {"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, 28, 28], "data": [0] * 784}]}
    )


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        pytest.param(described(0), b"", id="no rows"),
        pytest.param(described(id="x" * LONGEST_FORM), bytes(784), id="long JSON"),
        pytest.param(with_json(b""), b"", id="values in JSON"),
        pytest.param(
            orjson.dumps(
                {
                    "inputs": [
                        {
                            "name": "image",
                            "datatype": "BYTES",
                            "shape": [1],
                            "parameters": {"binary_data_size": 9},
                        }
                    ]
                }
            ),
            b"\5\0\0\0bytes",
            id="texts, which have lengths of their own",
        ),
    ],
)
def test_forms_that_say_too_little_or_too_much_are_not_kept(text: bytes, rest: bytes) -> None:
    forms: dict[bytes, Form] = {}
    asking(text, forms).read(text + rest, 64)
    assert not forms


def test_no_more_forms_are_kept_than_there_is_room_for() -> None:
    forms: dict[bytes, Form] = {}
    for number in range(MOST_FORMS * 3):
        text = described(id=str(number))
        asking(text, forms).read(text + bytes(784), 64)
        assert len(forms) <= MOST_FORMS


# ---- what heads say ----


def test_options_of_the_address_join_every_input() -> None:
    for room in (DIGIT, GENERATOR):
        asked = from_people(room, head(f"/{room}")).read(b"" if room is GENERATOR else b"picture", 64)
        assert asked.inputs


@pytest.mark.parametrize(
    "headers",
    [
        {"content_type": "text/html"},
        {"quintet_timeout_ms": "soon"},
        {"quintet_priority": "highest"},
    ],
    ids=str,
)
def test_a_head_without_meaning_is_no_question(headers: dict[str, str]) -> None:
    with pytest.raises(QuintetError):
        from_people(DIGIT, head("/digit", **headers))


# ---- the service, asked again and again ----


def counted(http: httpx.Client, outcome: str, protocol: str = "rest") -> float:
    """How many requests to the digit model the service has counted."""
    lines = http.get("/metrics").text
    labels = rf'model="digit",outcome="{outcome}",protocol="{protocol}"'
    return sum(
        float(value) for value in re.findall(rf"quintet_requests_total{{{labels}[^}}]*}} (\S+)", lines)
    )


def all_of(http: httpx.Client, pictures: Sequence[bytes], **headers: str) -> list[httpx.Response]:
    return [
        http.post("/digit", content=one, headers={"content-type": "image/png", **headers}) for one in pictures
    ]


def test_every_request_of_many_alike_gets_its_own_answer(http: httpx.Client, digit_pngs: Pngs) -> None:
    pictures = [picture for picture, _ in digit_pngs[:20]]
    together = http.post("/digit", files=[("images", picture) for picture in pictures]).json()["predictions"]
    for _ in range(3):
        for response, expected in zip(all_of(http, pictures), together, strict=True):
            assert response.status_code == 200
            (prediction,) = response.json()["predictions"]
            assert probabilities_of(prediction) == pytest.approx(probabilities_of(expected), abs=TOLERANCE)
            assert int(response.headers["quintet-batch-size"]) >= 1
            assert response.headers["server-timing"].startswith("queue;dur=")


def test_a_mistake_after_good_ones_is_told_as_at_first(http: httpx.Client, digit_png: bytes) -> None:
    spoilt = digit_png[:40] + bytes(len(digit_png) - 40)
    (first,) = all_of(http, [spoilt], first="time")
    all_of(http, [digit_png] * 3)
    (again,) = all_of(http, [spoilt])
    assert (again.status_code, again.json()) == (first.status_code, first.json()) == (400, first.json())
    assert again.headers["content-type"] == "application/problem+json"


def test_every_request_is_counted_once(quintet_server: QuintetServer, digit_png: bytes) -> None:
    spoilt = digit_png[:40] + bytes(len(digit_png) - 40)
    with http_client(quintet_server) as http:
        before, refused = counted(http, "ok"), counted(http, "400")
        all_of(http, [digit_png] * 7, purpose="counting")
        all_of(http, [spoilt] * 3, purpose="counting")
        assert counted(http, "ok") - before == 7
        assert counted(http, "400") - refused == 3


@pytest.mark.parametrize("coding", ["identity", "gzip, deflate"])
def test_a_machine_that_asks_alike_gets_each_answer_as_it_wants_it(
    http: httpx.Client, digit_pngs: Pngs, coding: str
) -> None:
    outputs = [{"name": "probabilities", "parameters": {"binary_data": True}}]
    for turn in range(3):
        for picture, _ in digit_pngs[:5]:
            text = described(id=f"turn {turn}", outputs=outputs)
            body = text + pixels_of(picture).tobytes()
            headers = {"inference-header-content-length": str(len(text)), "accept-encoding": coding}
            response = http.post(INFER, content=body, headers=headers)
            assert response.status_code == 200, response.text
            told, binary = split_binary(response)
            assert told["id"] == f"turn {turn}"
            (alone,) = all_of(http, [picture])
            (prediction,) = alone.json()["predictions"]
            found = np.frombuffer(binary, np.float32)
            assert found == pytest.approx(probabilities_of(prediction), abs=TOLERANCE)


@pytest.mark.parametrize("binary", [(), ("probabilities",), ("label",), ("label", "probabilities")], ids=str)
def test_machines_that_ask_alike_get_their_own_values_in_json_and_in_binary(
    http: httpx.Client, digit_pngs: Pngs, binary: Sequence[str]
) -> None:
    outputs = [
        {"name": name, "parameters": {"binary_data": name in binary}} for name in ("label", "probabilities")
    ]
    text = described(outputs=outputs)
    by_label = {label: picture for picture, label in digit_pngs}
    for label, picture in by_label.items():
        headers = {"inference-header-content-length": str(len(text))}
        response = http.post(INFER, content=text + pixels_of(picture).tobytes(), headers=headers)
        told, rest = split_binary(response) if binary else (response.json(), b"")
        labels, probabilities = told["outputs"]
        if "label" in binary:
            size = labels["parameters"]["binary_data_size"]
            assert rest[4:size] == label.encode()
            rest = rest[size:]
        else:
            assert labels["data"] == [label]
        values = np.frombuffer(rest, np.float32) if "probabilities" in binary else probabilities["data"]
        assert int(np.argmax(values)) == int(label)


def test_a_request_keeps_its_own_name(http: httpx.Client, digit_png: bytes) -> None:
    for name in ("one", "two", "two", "three"):
        (response,) = all_of(http, [digit_png], **{"x-request-id": name})
        assert response.headers["x-request-id"] == name


def test_each_kind_of_picture_is_read_whatever_was_read_before(http: httpx.Client, digit_png: bytes) -> None:
    pictures = {kind: encoded(digit_png, kind) for kind in ("png", "webp", "bmp")}
    for _ in range(3):
        for kind, picture in pictures.items():
            assert http.post("/digit", content=picture).status_code == 200, kind
