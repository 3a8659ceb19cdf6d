"""BentoML's own clients and page, over the same data plane."""

import base64
import gzip
import json
import os
import subprocess
import sys
from typing import Any

import httpx
import pytest

from service.models.spec import Room
from tests.conftest import SHIPPED, QuintetServer

from .knocking import http_client


def arguments(room: Room) -> dict[str, Any]:
    """The room's example, as BentoML's clients send it."""
    if room.takes == "pictures":
        return {"images": [base64.b64encode(room.example["image"]).decode()]}
    if room.takes == "texts":
        return {"texts": [room.example["text"].decode()]}
    return {"digits": [room.example["digit"]], "seed": room.example["seed"]}


CLIENT = """
import json, sys
from bentoml import SyncHTTPClient
from bentoml.exceptions import BentoMLException

answers = {}
with SyncHTTPClient(sys.argv[1]) as client:
    for name, arguments in json.load(sys.stdin).items():
        try:
            answers[name] = getattr(client, name)(**arguments)
        except BentoMLException as error:
            answers[name] = str(error)
print(json.dumps(answers))
"""
"""In a process of its own: importing BentoML warns of its dependencies' ways."""


def ask(server: QuintetServer, asked: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What BentoML's client gets, by the name of the model."""
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CLIENT, server.http_url],
        input=json.dumps(asked), capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    answers: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return answers


def rounded(value: Any) -> Any:
    """Numbers as exact as an answer is whatever it was batched with."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return pytest.approx(value, abs=1e-3) if isinstance(value, float) else value


def test_the_client_gets_from_every_model_what_people_get(
    quintet_server: QuintetServer, http: httpx.Client
) -> None:
    asked = {name: arguments(room) for name, room in SHIPPED.items()}
    for name, answers in ask(quintet_server, asked).items():
        response = http.post(f"/{name}", json=asked[name])
        assert answers == rounded(response.json()["predictions"]), name


def test_a_refusal_tells_the_client_what_is_wrong(quintet_server: QuintetServer) -> None:
    no_picture = base64.b64encode(b"no picture").decode()
    assert "not a picture" in ask(quintet_server, {"digit": {"images": [no_picture]}})["digit"]


@pytest.mark.parametrize(
    ("body", "status"),
    [({"images": ["http://127.0.0.1/picture.png"]}, 400), ({"images": 7}, 400), ({}, 400), ([], 400)],
)
def test_a_wrong_body_is_refused(http: httpx.Client, body: Any, status: int) -> None:
    assert http.post("/bentoml/digit", json=body).status_code == status


@pytest.mark.parametrize(
    "kind", ["multipart/form-data; boundary=x", "text/plain", "application/vnd.bentoml+pickle"]
)
def test_nothing_but_json_gets_past_the_gate(http: httpx.Client, kind: str) -> None:
    response = http.post(
        "/bentoml/digit", content=b"http://127.0.0.1/picture.png", headers={"Content-Type": kind}
    )
    assert response.status_code == 415


def test_the_gate_keeps_the_limits(http: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    assert http.post("/bentoml/digit", content=bytes(17 * 2**20), headers=headers).status_code == 413
    bomb = gzip.compress(b'{"images": ["' + b"A" * (17 * 2**20) + b'"]}')
    packed = {**headers, "Content-Encoding": "gzip"}
    assert http.post("/bentoml/digit", content=bomb, headers=packed).status_code == 413
    whole = gzip.compress(json.dumps(arguments(SHIPPED["digit"])).encode())
    assert http.post("/bentoml/digit", content=whole, headers=packed).status_code == 200


def test_the_page_is_there_and_calls_nobody_outside(http: httpx.Client) -> None:
    page = http.get("/bentoml/")
    assert page.status_code == 200
    assert "swagger" in page.text.lower()
    assert "default-src 'none'" in page.headers["content-security-policy"]
    described = http.get("/bentoml/docs.json").json()
    assert {f"/bentoml/{name}" for name in SHIPPED} <= set(described["paths"])
    assert http.get("/bentoml").headers["location"] == "/bentoml/"
    assert http.get("/bentoml/static_content/swagger-ui.css").status_code == 200


def test_the_key_is_asked_for_here_too(start_quintet: Any) -> None:
    with (
        start_quintet(workers=1, drain_seconds=0, api_keys=["a key"]) as server,
        http_client(server) as client,
    ):
        for path in ("/schema.json", "/bentoml/", "/bentoml/docs.json"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer a key"}).status_code == 200
        assert client.post("/bentoml/digit", json=arguments(SHIPPED["digit"])).status_code == 401
