"""Questions over HTTP, in the REST that the service speaks with people.

`HttpProtocol` holds all that is known of requests and answers, and does no I/O. The two
carriers carry them, and know nothing else.
"""

import asyncio
import base64
import json
import os
import ssl
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from quintet_client import errors
from quintet_client.questions import Digits, Inputs, Pictures, Question, Result, Texts
from quintet_client.results import Classification, Detection, Generated, Object, Status

_ANY_PICTURE = "application/octet-stream"  # the service looks at the bytes, so we need not


@dataclass(frozen=True)
class HttpRequest:
    """One request; `options` are those of `httpx.Client.build_request`."""

    method: str
    path: str
    options: dict[str, Any] = field(default_factory=dict)


class HttpProtocol:
    """What to send, and what the answers mean: requests are yielded, bodies are sent in."""

    def ask(self, question: Question[Result], inputs: Inputs) -> Generator[HttpRequest, bytes, list[Result]]:
        """Put a question about some inputs; returns their results in order.

        Raises:
            ServerError: the answer is not what the contract says.
        """
        body = yield HttpRequest("POST", question.model, _write(inputs))
        read: Callable[..., Result] = _READERS[question.result]
        try:
            answer = json.loads(body)
            model, version = str(answer["model"]), str(answer["version"])
            return [read(prediction, model, version) for prediction in answer["predictions"]]
        except (ValueError, TypeError, KeyError) as error:
            raise errors.ServerError(
                "The server's answer is not one that this client understands."
            ) from error

    def is_ready(self) -> Generator[HttpRequest, bytes, bool]:
        """Ask whether the service takes requests: anything but success is raised by the carrier."""
        yield HttpRequest("GET", "readyz")
        return True

    def status(self, models: Sequence[str]) -> Generator[HttpRequest, bytes, Status]:
        """Ask how the service is, and which versions of `models` it serves.

        Raises:
            ServerError: the answer is not what the protocol says.
        """
        started = time.perf_counter()
        body = yield HttpRequest("GET", "v2")
        seconds = time.perf_counter() - started
        try:
            server = json.loads(body)
            name = f"{server['name']} {server['version']}"
            is_ready = True
            try:
                yield HttpRequest("GET", "readyz")
            except errors.Unavailable:
                is_ready = False
            versions = {}
            for model in models:
                versions[model] = yield from self._versions(model)
        except (ValueError, TypeError, KeyError) as error:
            raise errors.ServerError(
                "The server's answer is not one that this client understands."
            ) from error
        return Status(is_ready, name, versions, seconds)

    def _versions(self, model: str) -> Generator[HttpRequest, bytes, tuple[str, ...]]:
        """The versions of a model that are served: none where it is not loaded."""
        try:
            described = json.loads((yield HttpRequest("GET", f"v2/models/{model}")))
        except (errors.NotFound, errors.Unavailable):
            return ()
        return tuple(map(str, described["versions"]))


def _write(inputs: Inputs) -> dict[str, Any]:
    """The body of a request."""
    match inputs:
        case Texts(texts):
            return {"json": {"texts": texts}}
        case Digits(digits, seed):
            return {"json": {"digits": digits} if seed is None else {"digits": digits, "seed": seed}}
        case Pictures(encoded, min_confidence):
            options: dict[str, Any] = {}
            if min_confidence is not None:
                options["params"] = {"min_confidence": min_confidence}
            if len(encoded) == 1:
                return options | {"content": encoded[0], "headers": {"Content-Type": _ANY_PICTURE}}
            parts = [("images", (str(index), data, _ANY_PICTURE)) for index, data in enumerate(encoded)]
            return options | {"files": parts}


def _read_classification(prediction: Mapping[str, Any], model: str, version: str) -> Classification:
    return Classification(
        label=prediction["label"],
        confidence=float(prediction["confidence"]),
        probabilities={label: float(value) for label, value in prediction["probabilities"].items()},
        model=model,
        version=version,
    )


def _read_detection(prediction: Mapping[str, Any], model: str, version: str) -> Detection:
    objects = []
    for found in prediction["objects"]:
        left, top, right, bottom = map(float, found["box"])
        objects.append(Object(found["label"], float(found["confidence"]), (left, top, right, bottom)))
    return Detection(int(prediction["width"]), int(prediction["height"]), tuple(objects), model, version)


def _read_generated(prediction: Mapping[str, Any], model: str, version: str) -> Generated:
    image = base64.b64decode(prediction["image"])
    return Generated(int(prediction["digit"]), int(prediction["seed"]), image, model, version)


_READERS: dict[type, Callable[..., Any]] = {
    Classification: _read_classification,
    Detection: _read_detection,
    Generated: _read_generated,
}


class HttpCarrier:
    """Carries requests to an address, one thread at a time or many."""

    def __init__(
        self, url: str, headers: Mapping[str, str], ca_file: str | os.PathLike[str] | None = None
    ) -> None:
        """Prepare connections to `url`; none is made yet."""
        self._url = url
        self._client = httpx.Client(base_url=url, headers=headers, verify=_trust(ca_file), limits=_LIMITS)

    def send(self, request: HttpRequest, seconds: float) -> bytes:
        """Send a request and return the body of its answer, within `seconds`.

        Raises:
            QuintetError: there was no answer in time, or it was a refusal.
        """
        deadline = time.monotonic() + seconds
        outgoing = self._client.build_request(
            request.method, request.path, timeout=seconds, **request.options
        )
        outgoing.headers["Quintet-Timeout-Ms"] = _milliseconds(seconds)
        body = bytearray()
        with _named_errors(self._url, seconds):
            response = self._client.send(outgoing, stream=True)
            try:
                for chunk in response.iter_bytes():
                    body += chunk
                    if time.monotonic() > deadline:  # httpx limits each wait, not their sum
                        raise httpx.ReadTimeout("The whole answer did not come in time.")
            finally:
                response.close()
        return _check(response, bytes(body))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


class AsyncHttpCarrier:
    """Carries requests to an address, in one event loop."""

    def __init__(
        self, url: str, headers: Mapping[str, str], ca_file: str | os.PathLike[str] | None = None
    ) -> None:
        """Prepare connections to `url`; none is made yet."""
        self._url = url
        verify = _trust(ca_file)
        self._client = httpx.AsyncClient(base_url=url, headers=headers, verify=verify, limits=_LIMITS)

    async def send(self, request: HttpRequest, seconds: float) -> bytes:
        """Send a request and return the body of its answer, within `seconds`.

        Raises:
            QuintetError: there was no answer in time, or it was a refusal.
        """
        outgoing = self._client.build_request(
            request.method, request.path, timeout=seconds, **request.options
        )
        outgoing.headers["Quintet-Timeout-Ms"] = _milliseconds(seconds)
        with _named_errors(self._url, seconds):
            response = await asyncio.wait_for(self._client.send(outgoing), seconds)
        return _check(response, response.content)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=30.0)
"""How many requests are under way is the caller's decision, and each keeps its connection."""


def _trust(ca_file: str | os.PathLike[str] | None) -> ssl.SSLContext | bool:
    """Whose certificates to trust: those that httpx does, or those in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no certificate.
    """
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as error:
        raise ValueError(f"{os.fspath(ca_file)} holds no certificate in PEM form.") from error


def _milliseconds(seconds: float) -> str:
    """Whole milliseconds, at least one."""
    return str(max(1, int(seconds * 1000)))


@contextmanager
def _named_errors(url: str, seconds: float) -> Iterator[None]:
    """Raise httpx's errors as ours, with the cause and the cure."""
    try:
        yield
    except (httpx.TimeoutException, TimeoutError, asyncio.TimeoutError) as error:
        raise errors.too_late(url, seconds) from error
    except httpx.TransportError as error:
        raise errors.unreachable(url, str(error)) from error
    except httpx.HTTPError as error:
        raise errors.ServerError(f"The server's answer cannot be read: {error}.") from error


def _check(response: httpx.Response, body: bytes) -> bytes:
    """Pass the body of a success, and raise anything else."""
    if response.is_success:
        return body
    raise errors.from_http(response.status_code, response.headers, body)
