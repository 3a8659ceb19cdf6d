"""The description agrees with the service, and the page of it stands alone."""

import json
import re
from typing import Any

import httpx
import pytest

from service.models.spec import Room
from tests.conftest import SHIPPED, QuintetServer

every_model = pytest.mark.parametrize("room", SHIPPED.values(), ids=str)


@pytest.fixture(scope="module")
def described(quintet_server: QuintetServer) -> dict[str, Any]:
    response = httpx.get(f"{quintet_server.http_url}/openapi.json", trust_env=False)
    assert response.status_code == 200
    document: dict[str, Any] = response.json()
    return document


def test_it_says_what_it_is(described: dict[str, Any]) -> None:
    assert described["openapi"].startswith("3.1")
    assert described["info"]["title"] == "Quintet"


def test_every_reference_leads_somewhere(described: dict[str, Any]) -> None:
    for reference in set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(described))):
        found: Any = described
        for part in reference.split("/"):
            found = found[part]
        assert found


def test_names_of_operations_are_unique_and_every_part_of_a_path_is_described(
    described: dict[str, Any],
) -> None:
    names = []
    for path, methods in described["paths"].items():
        for operation in methods.values():
            names.append(operation.get("operationId", path))
            parts = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "path"}
            assert parts == set(re.findall(r"{(\w+)}", path))
            assert "200" in operation["responses"]
    assert len(set(names)) == len(names)


PAGES = ("/", "/livez", "/startupz", "/readyz", "/metrics", "/openapi.json", "/docs")
MACHINES_PAGES = ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/stats")


@pytest.mark.parametrize("path", [*PAGES, *MACHINES_PAGES])
def test_what_is_described_is_there_and_answers_as_described(
    http: httpx.Client, described: dict[str, Any], path: str
) -> None:
    (media_type,) = described["paths"][path]["get"]["responses"]["200"]["content"]
    response = http.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].split(";")[0] == media_type
    assert http.request("DELETE", path).status_code == 405
    assert "405" in described["paths"][path]["get"]["responses"]


@every_model
def test_every_model_and_its_versions_are_described(
    http: httpx.Client, described: dict[str, Any], room: Room
) -> None:
    operation = described["paths"][f"/{room.name}"]["post"]
    assert operation["summary"] == room.task
    assert {one["name"] for one in operation["parameters"] if one["in"] == "query"} == set(room.options)
    newest = http.get(f"/v2/models/{room.name}").json()["versions"][-1]
    for place, methods in described["paths"].items():
        if place.startswith("/v2/models/{model}") and "get" in methods:
            address = place.format(model=room.name, version=newest)
            assert http.get(address).status_code == 200, address


@every_model
def test_every_refusal_that_people_meet_is_described(described: dict[str, Any], room: Room) -> None:
    responses = described["paths"][f"/{room.name}"]["post"]["responses"]
    assert set(responses) == {
        "200", "400", "401", "404", "405", "413", "415", "429", "500", "503", "504",
    }  # fmt: skip
    for status in ("429", "503"):
        assert "Retry-After" in responses[status]["headers"]


def test_the_page_tells_all_of_it_and_needs_nothing_else(
    http: httpx.Client, described: dict[str, Any]
) -> None:
    response = http.get("/docs")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    for path in described["paths"]:
        assert path in response.text
    assert "<script" not in response.text
    assert not re.search(r"(src|href)=\"(https?:)?//", response.text)
