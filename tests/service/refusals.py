"""How a refusal must look at each door; each check gives its sentence."""

import re
import sys
from pathlib import Path

import grpc
import httpx

from tests.conftest import MODELS_FOLDER, ROOT

GRPC_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}

INSIDE = re.compile(
    r"traceback|\.py\b|\bline \d|<class|0x[0-9a-f]{6}|errno|numpy|onnx|opencv|cv2|orjson|zlib|protobuf|"
    r"multipart_?parser|[a-z]Error\b|Exception",
    re.IGNORECASE,
)
"""What no answer for strangers may hold."""


def check_sentence(sentence: str) -> None:
    """It tells a stranger what is wrong, and nothing of our insides."""
    assert len(sentence.split()) >= 3
    assert sentence.rstrip().endswith((".", "/v2.")), sentence
    assert not INSIDE.search(sentence), sentence
    for folder in (ROOT, MODELS_FOLDER, Path(sys.prefix)):
        assert str(folder) not in sentence


def check_problem(response: httpx.Response, status: int, index: int | None = None) -> str:
    """The refusal as people get it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert set(problem) == {"type", "title", "status", "detail"} | ({"index"} if index is not None else set())
    assert problem["status"] == status
    assert problem["type"].startswith("urn:")
    assert problem["title"]
    assert problem.get("index") == index
    check_sentence(problem["detail"])
    return str(problem["detail"])


def check_v2_error(response: httpx.Response, status: int) -> str:
    """The refusal as machines get it over HTTP."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (name, sentence), *others = response.json().items()
    assert (name, others) == ("error", [])
    check_sentence(sentence)
    return str(sentence)


def check_grpc_error(error: grpc.RpcError, status: int, index: int | None = None) -> str:
    """The refusal over gRPC."""
    assert error.code() is GRPC_STATUS[status], error
    assert dict(error.trailing_metadata()).get("index") == (None if index is None else str(index))
    check_sentence(error.details())
    return str(error.details())
