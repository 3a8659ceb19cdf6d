"""The HTTP door: what it answers when all is well. `test_grpc.py` asks the same of the other door."""

import base64
import gzip
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http
import tritonclient.http.aio

from service.version import VERSION
from tests.conftest import SHIPPED, QuintetServer

from .knocking import (
    INFER,
    TOLERANCE,
    GrpcClient,
    ask_alone,
    binary,
    encoded,
    floats_in,
    json_pixels,
    picture_request,
    pixels_of,
    probabilities_of,
    split_binary,
    split_elements,
    tensor,
    with_binary,
)

Pngs = list[tuple[bytes, str]]

# ---- for people ----


@pytest.mark.parametrize(
    ("kind", "media_type"),
    [
        ("png", "image/png"),
        ("jpg", "image/jpeg"),
        ("webp", "image/webp"),
        ("bmp", "image/bmp"),
        ("png", "application/octet-stream"),
        ("png", "IMAGE/PNG; name=digit.png"),
        ("png", None),
    ],
    ids=lambda value: str(value),
)
def test_one_picture_as_the_body(
    http: httpx.Client, digit_png: bytes, kind: str, media_type: str | None
) -> None:
    headers = {} if media_type is None else {"Content-Type": media_type}
    response = http.post("/digit", content=encoded(digit_png, kind), headers=headers)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert set(answer) == {"model", "version", "predictions"}
    assert answer["model"] == "digit"
    assert answer["version"].isdigit()
    (prediction,) = answer["predictions"]
    # JPEG and WebP lose a little, so only PNG and BMP must come to the very same numbers.
    loss = 0.2 if kind == "jpg" else TOLERANCE
    assert probabilities_of(prediction) == pytest.approx(ask_alone(http, digit_png), abs=loss)


def test_a_prediction_is_the_likeliest_label_with_all_probabilities(
    http: httpx.Client, digit_png: bytes
) -> None:
    (prediction,) = http.post("/digit", content=digit_png).json()["predictions"]
    assert set(prediction) == {"label", "confidence", "probabilities"}
    assert list(prediction["probabilities"]) == list(SHIPPED["digit"].labels)
    assert sum(prediction["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert prediction["confidence"] == max(prediction["probabilities"].values())
    assert prediction["probabilities"][prediction["label"]] == prediction["confidence"]


def as_multipart(pictures: list[bytes]) -> dict[str, Any]:
    return {"files": [("images", (f"{number}.png", one)) for number, one in enumerate(pictures)]}


def as_json(pictures: list[bytes]) -> dict[str, Any]:
    return {"json": {"images": [base64.b64encode(one).decode() for one in pictures]}}


@pytest.mark.parametrize("package", [as_multipart, as_json])
@pytest.mark.parametrize("count", [1, 3, 100])
def test_several_pictures_keep_their_order(
    http: httpx.Client, digit_pngs: Pngs, package: Callable[[list[bytes]], dict[str, Any]], count: int
) -> None:
    pictures = [picture for picture, _ in digit_pngs[:count]]
    response = http.post("/digit", **package(pictures))
    assert response.status_code == 200
    together = [probabilities_of(prediction) for prediction in response.json()["predictions"]]
    alone = [ask_alone(http, picture) for picture in pictures]
    assert len(together) == count
    np.testing.assert_allclose(together, alone, atol=TOLERANCE)


def test_the_pictures_of_these_tests_can_be_told_apart(http: httpx.Client, digit_pngs: Pngs) -> None:
    """Or the tests of order would prove nothing."""
    answers = np.array([ask_alone(http, picture) for picture, _ in digit_pngs[:32]])
    differences = np.abs(answers[:, None] - answers).max(axis=-1) + np.eye(len(answers))
    assert (differences > TOLERANCE).mean() > 0.9


def test_a_picture_in_json_may_be_a_data_url(http: httpx.Client, digit_png: bytes) -> None:
    text = "data:image/png;base64," + base64.b64encode(digit_png).decode()
    (prediction,) = http.post("/digit", json={"images": [text]}).json()["predictions"]
    assert probabilities_of(prediction) == pytest.approx(ask_alone(http, digit_png), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("coding", "compress"),
    [
        ("gzip", gzip.compress),
        ("x-gzip", gzip.compress),
        ("GZIP", gzip.compress),
        ("deflate", zlib.compress),
        ("identity", bytes),
        ("gzip", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])),
    ],
    ids=["gzip", "x-gzip", "upper case", "deflate", "identity", "two members"],
)
def test_a_compressed_body(
    http: httpx.Client, digit_png: bytes, coding: str, compress: Callable[[bytes], bytes]
) -> None:
    response = http.post("/digit", content=compress(digit_png), headers={"Content-Encoding": coding})
    assert response.status_code == 200
    (prediction,) = response.json()["predictions"]
    assert probabilities_of(prediction) == pytest.approx(ask_alone(http, digit_png), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip;q=0, deflate", "deflate"),
        ("br, gzip;q=0.5", "gzip"),
        ("br", None),
        ("identity", None),
        ("gzip;q=much", None),
        ("", None),
    ],
)
def test_a_long_answer_is_compressed_for_those_who_take_it(
    http: httpx.Client, digit_png: bytes, accepted: str, coding: str | None
) -> None:
    pictures = [("images", ("digit.png", digit_png))] * 20
    plain = http.post("/digit", files=pictures, headers={"Accept-Encoding": "identity"})
    response = http.post("/digit", files=pictures, headers={"Accept-Encoding": accepted})
    assert response.headers.get("content-encoding") == coding
    assert response.json() == plain.json()
    assert (int(response.headers["content-length"]) < len(plain.content) / 3) == (coding is not None)


def test_an_answer_says_how_it_came_about(http: httpx.Client, digit_png: bytes) -> None:
    response = http.post("/digit", content=digit_png)
    assert int(response.headers["quintet-batch-size"]) >= 1
    queue, compute = response.headers["server-timing"].split(", ")
    assert queue.startswith("queue;dur=")
    assert float(compute.removeprefix("compute;dur=")) > 0


def test_a_parameter_that_nobody_takes_is_refused(http: httpx.Client, digit_png: bytes) -> None:
    response = http.post("/digit?min_confidence=0.5", content=digit_png)
    assert response.status_code == 400
    assert "min_confidence" not in response.json()["detail"]


def test_a_deadline_that_can_be_kept(http: httpx.Client, digit_png: bytes) -> None:
    response = http.post("/digit", content=digit_png, headers={"Quintet-Timeout-Ms": "20000"})
    assert response.status_code == 200


def test_a_deadline_that_passes(http: httpx.Client, digit_png: bytes) -> None:
    response = http.post("/digit", content=digit_png, headers={"Quintet-Timeout-Ms": "0.001"})
    assert response.status_code == 504
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == 504


@pytest.mark.parametrize(
    ("priority", "status"), [("high", 200), ("Normal", 200), ("LOW", 200), ("first", 400), ("é", 400)]
)
def test_a_priority(http: httpx.Client, digit_png: bytes, priority: str, status: int) -> None:
    headers = {"Quintet-Priority": priority.encode()}
    assert http.post("/digit", content=digit_png, headers=headers).status_code == status


def test_a_body_that_comes_in_chunks(http: httpx.Client, digit_png: bytes) -> None:
    chunks = (digit_png[position : position + 40] for position in range(0, len(digit_png), 40))
    response = http.post("/digit", content=chunks)
    assert response.request.headers["transfer-encoding"] == "chunked"
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("path", "text"), [("/livez", "alive\n"), ("/readyz", "ready\n")], ids=["alive", "ready"]
)
def test_health_for_operators(http: httpx.Client, path: str, text: str) -> None:
    response = http.get(path)
    assert (response.status_code, response.text) == (200, text)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/"])
def test_a_page_may_be_asked_for_its_head_only(http: httpx.Client, path: str) -> None:
    response = http.head(path)
    assert (response.status_code, response.content) == (200, b"")


def test_both_doors_and_both_ways_to_ask_agree(
    http: httpx.Client, grpc_client: GrpcClient, digit_pngs: Pngs
) -> None:
    for picture, _ in digit_pngs[:10]:
        people = ask_alone(http, picture)
        body = {"inputs": [tensor("image", "BYTES", [1], data=[base64.b64encode(picture).decode()])]}
        machines = http.post(INFER, json=body).json()["outputs"][1]["data"]
        over_grpc = floats_in(grpc_client.call("ModelInfer", picture_request(picture)))[0]
        assert machines == pytest.approx(people, abs=TOLERANCE)
        assert over_grpc == pytest.approx(people, abs=TOLERANCE)


# ---- for machines ----


def test_the_server_is_live_and_ready(http: httpx.Client) -> None:
    assert http.get("/v2/health/live").status_code == 200
    assert http.get("/v2/health/ready").status_code == 200


@pytest.mark.parametrize("model", SHIPPED)
def test_every_model_is_ready(http: httpx.Client, model: str) -> None:
    assert http.get(f"/v2/models/{model}/ready").status_code == 200
    for version in http.get(f"/v2/models/{model}").json()["versions"]:
        assert http.get(f"/v2/models/{model}/versions/{version}/ready").status_code == 200


def test_server_metadata(http: httpx.Client) -> None:
    for path in ("/v2", "/v2/"):
        answer = http.get(path).json()
        assert (answer["name"], answer["version"]) == ("quintet", VERSION)
        assert "binary_tensor_data" in answer["extensions"]


def test_model_metadata(http: httpx.Client, newest: str) -> None:
    answer = http.get("/v2/models/digit").json()
    assert answer["name"] == "digit"
    assert newest == answer["versions"][-1]
    assert answer["inputs"] == [
        {"name": "pixels", "datatype": "UINT8", "shape": [-1, 28, 28]},
        {"name": "image", "datatype": "BYTES", "shape": [-1]},
    ]
    assert answer["outputs"] == [
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]},
    ]
    assert http.get(f"/v2/models/digit/versions/{newest}").json() == answer


def test_model_config(http: httpx.Client, newest: str) -> None:
    answer = http.get("/v2/models/digit/config").json()
    assert answer["name"] == "digit"
    assert answer["max_batch_size"] == 256
    assert [one["name"] for one in answer["input"]] == ["pixels", "image"]
    assert [one["data_type"] for one in answer["output"]] == ["TYPE_STRING", "TYPE_FP32"]
    assert http.get(f"/v2/models/digit/versions/{newest}/config").json() == answer


def test_repository_index(http: httpx.Client) -> None:
    index = http.post("/v2/repository/index").json()
    assert {entry["name"] for entry in index} == set(SHIPPED)
    assert {entry["state"] for entry in index} == {"READY"}


def test_pixels_in_json(http: httpx.Client, digit_pngs: Pngs) -> None:
    pictures = [picture for picture, _ in digit_pngs[:3]]
    pixels = np.stack([pixels_of(picture) for picture in pictures])
    response = http.post(INFER, json={"inputs": [json_pixels(pixels)]})
    assert response.status_code == 200
    answer = response.json()
    assert set(answer) == {"model_name", "model_version", "outputs"}
    assert answer["model_name"] == "digit"
    label, probabilities = answer["outputs"]
    assert {**label, "data": None} == {"name": "label", "datatype": "BYTES", "shape": [3], "data": None}
    assert (probabilities["datatype"], probabilities["shape"]) == ("FP32", [3, 10])
    rows = np.array(probabilities["data"]).reshape(3, 10)
    assert label["data"] == [str(row.argmax()) for row in rows]
    alone = [http.post(INFER, json={"inputs": [json_pixels(one[np.newaxis])]}).json() for one in pixels]
    np.testing.assert_allclose(rows, [one["outputs"][1]["data"] for one in alone], atol=TOLERANCE)


def test_pixels_in_nested_lists(http: httpx.Client, digit_png: bytes) -> None:
    pixels = pixels_of(digit_png)[np.newaxis]
    flat, nested = (
        http.post(INFER, json={"inputs": [json_pixels(pixels, data=data)]}).json()
        for data in (pixels.ravel().tolist(), pixels.tolist())
    )
    assert flat == nested


def test_pixels_in_binary(http: httpx.Client, digit_png: bytes) -> None:
    pixels = pixels_of(digit_png)[np.newaxis]
    head = {"inputs": [tensor(parameters={"binary_data_size": 784})]}
    answer = http.post(INFER, **with_binary(head, pixels.tobytes())).json()
    assert answer == http.post(INFER, json={"inputs": [json_pixels(pixels)]}).json()


def test_pictures_in_binary(http: httpx.Client, digit_pngs: Pngs) -> None:
    pictures = [picture for picture, _ in digit_pngs[:3]]
    raw = binary(*pictures)
    for shape in ([3], [3, 1]):
        head = {"inputs": [tensor("image", "BYTES", shape, parameters={"binary_data_size": len(raw)})]}
        outputs = http.post(INFER, **with_binary(head, raw)).json()["outputs"]
        alone = [ask_alone(http, picture) for picture in pictures]
        np.testing.assert_allclose(np.reshape(outputs[1]["data"], (3, 10)), alone, atol=TOLERANCE)


def test_outputs_in_binary(http: httpx.Client, digit_png: bytes) -> None:
    inputs = [json_pixels(pixels_of(digit_png)[np.newaxis])]
    in_json = http.post(INFER, json={"inputs": inputs}).json()["outputs"]
    body = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    response = http.post(INFER, json=body)
    assert response.headers["content-type"] == "application/octet-stream"
    head, raw = split_binary(response)
    label, probabilities = head["outputs"]
    end = label["parameters"]["binary_data_size"]
    assert split_elements(raw[:end]) == in_json[0]["data"]
    assert np.frombuffer(raw[end:], np.float32).tolist() == pytest.approx(in_json[1]["data"])
    assert probabilities["parameters"]["binary_data_size"] == 40 == len(raw) - end


def test_one_output_in_binary_and_the_other_in_json(http: httpx.Client, digit_png: bytes) -> None:
    asked = [{"name": "probabilities", "parameters": {"binary_data": True}}, {"name": "label"}]
    body = {"inputs": [json_pixels(pixels_of(digit_png)[np.newaxis])], "outputs": asked}
    head, raw = split_binary(http.post(INFER, json=body))
    assert [output["name"] for output in head["outputs"]] == ["probabilities", "label"]
    assert head["outputs"][1]["data"] == [str(np.frombuffer(raw, np.float32).argmax())]


def test_the_request_id_comes_back(http: httpx.Client, digit_png: bytes) -> None:
    body = {"id": "Grüße 42", "inputs": [json_pixels(pixels_of(digit_png)[np.newaxis])]}
    assert http.post(INFER, json=body).json()["id"] == "Grüße 42"


@pytest.mark.parametrize("chosen", [["label"], ["probabilities"], ["probabilities", "label"], []])
def test_only_the_chosen_outputs_come(http: httpx.Client, digit_png: bytes, chosen: list[str]) -> None:
    body = {
        "inputs": [json_pixels(pixels_of(digit_png)[np.newaxis])],
        "outputs": [{"name": name} for name in chosen],
    }
    outputs = http.post(INFER, json=body).json()["outputs"]
    assert [output["name"] for output in outputs] == (chosen or ["label", "probabilities"])


def test_a_version_may_be_named(http: httpx.Client, digit_png: bytes, newest: str) -> None:
    body = {"inputs": [json_pixels(pixels_of(digit_png)[np.newaxis])]}
    answer = http.post(f"/v2/models/digit/versions/{newest}/infer", json=body).json()
    assert answer["model_version"] == newest


def test_a_compressed_request(http: httpx.Client, digit_png: bytes) -> None:
    pixels = pixels_of(digit_png)[np.newaxis]
    request = with_binary({"inputs": [tensor(parameters={"binary_data_size": 784})]}, pixels.tobytes())
    request["content"] = gzip.compress(request["content"])
    request["headers"]["Content-Encoding"] = "gzip"
    assert http.post(INFER, **request).status_code == 200


# ---- the public client ----


def test_the_triton_client_sees_the_service(quintet_server: QuintetServer, newest: str) -> None:
    with tritonclient.http.InferenceServerClient(quintet_server.http_address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("digit")
        assert client.is_model_ready("digit", newest)
        assert not client.is_model_ready("digit", "999999")
        assert client.get_server_metadata()["name"] == "quintet"
        assert client.get_model_metadata("digit")["name"] == "digit"
        assert client.get_model_config("digit")["name"] == "digit"
        assert {entry["name"] for entry in client.get_model_repository_index()} == set(SHIPPED)


@pytest.mark.parametrize("is_binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_the_triton_client_gets_answers(
    quintet_server: QuintetServer, http: httpx.Client, digit_png: bytes, is_binary: bool, compression: str
) -> None:
    pixels = tritonclient.http.InferInput("pixels", [1, 28, 28], "UINT8")
    pixels.set_data_from_numpy(pixels_of(digit_png)[np.newaxis], binary_data=is_binary)
    outputs = [
        tritonclient.http.InferRequestedOutput(name, binary_data=is_binary)
        for name in ("label", "probabilities")
    ]
    with tritonclient.http.InferenceServerClient(quintet_server.http_address) as client:
        result = client.infer(
            "digit", [pixels], outputs=outputs, request_id="7", request_compression_algorithm=compression
        )
    body = {"inputs": [json_pixels(pixels_of(digit_png)[np.newaxis])]}
    expected = http.post(INFER, json=body).json()["outputs"]
    assert result.get_response()["id"] == "7"
    label = result.as_numpy("label")[0]
    assert (label.decode() if is_binary else label) == expected[0]["data"][0]
    assert result.as_numpy("probabilities")[0].tolist() == pytest.approx(expected[1]["data"], abs=TOLERANCE)


def test_the_triton_client_sends_pictures(
    quintet_server: QuintetServer, http: httpx.Client, digit_pngs: Pngs
) -> None:
    pictures = [picture for picture, _ in digit_pngs[:4]]
    images = tritonclient.http.InferInput("image", [4], "BYTES")
    images.set_data_from_numpy(np.array(pictures, np.object_))
    with tritonclient.http.InferenceServerClient(quintet_server.http_address) as client:
        rows = client.infer("digit", [images]).as_numpy("probabilities")
    np.testing.assert_allclose(rows, [ask_alone(http, one) for one in pictures], atol=TOLERANCE)


async def test_the_async_triton_client(quintet_server: QuintetServer, digit_png: bytes) -> None:
    pixels = tritonclient.http.InferInput("pixels", [1, 28, 28], "UINT8")
    pixels.set_data_from_numpy(pixels_of(digit_png)[np.newaxis])
    async with tritonclient.http.aio.InferenceServerClient(quintet_server.http_address) as client:
        assert await client.is_server_live()
        assert await client.is_model_ready("digit")
        assert (await client.get_model_metadata("digit"))["name"] == "digit"
        result = await client.infer("digit", [pixels], request_id="8")
    assert result.get_response()["id"] == "8"
    assert result.as_numpy("probabilities").shape == (1, 10)
