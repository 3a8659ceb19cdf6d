"""Questions over gRPC, in the Open Inference Protocol that the service speaks with machines.

`GrpcProtocol` holds all that is known of requests and answers, and does no I/O. The two
carriers carry them, and know nothing else.
"""

import json
import math
import os
import secrets
import struct
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped,unused-ignore]
import grpc.aio  # type: ignore[import-untyped,unused-ignore]

from quintet_client import errors, pictures
from quintet_client import grpc_service_pb2 as messages
from quintet_client.questions import Digits, Inputs, Pictures, Question, Result, Texts
from quintet_client.results import Classification, Detection, Generated, Object, Status

_SERVICE = "/inference.GRPCInferenceService"
_SEED_BITS = 31

_CHANNEL_OPTIONS = (
    # The service decides what is too large, and says so better than a channel.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A lost connection is tried again as soon as we ask: how long to wait is our decision.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    # One channel for each client, as with HTTP, rather than one for each address in the process.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True)
class GrpcRequest:
    """One call: `message` is a `<method>Request`, and a `<method>Response` is awaited."""

    method: str
    message: Any


@dataclass(frozen=True)
class Tensor:
    """One output: its shape, and its values in row-major order."""

    shape: tuple[int, ...]
    values: Sequence[Any]


class GrpcProtocol:
    """What to send, and what the answers mean: requests are yielded, responses are sent in."""

    def __init__(self) -> None:
        """Know no labels yet."""
        self._labels: dict[tuple[str, str], list[str]] = {}

    def ask(self, question: Question[Result], inputs: Inputs) -> Generator[GrpcRequest, Any, list[Result]]:
        """Put a question about some inputs; returns their results in order.

        Raises:
            ServerError: the answer is not what the contract says.
        """
        seeded = _with_seeds(inputs)
        response = yield GrpcRequest("ModelInfer", _write(question.model, seeded))
        version = response.model_version
        labels: list[str] = []
        if question.result is not Generated:
            labels = yield from self._labels_of(question.model, version)
        read: Callable[..., list[Result]] = _READERS[question.result]
        try:
            return read(_tensors(response), seeded, labels, question.model, version)
        except (ValueError, TypeError, LookupError, struct.error) as error:
            raise errors.ServerError(
                "The server's answer is not one that this client understands."
            ) from error

    def is_ready(self) -> Generator[GrpcRequest, Any, bool]:
        """Ask whether the service takes requests."""
        response = yield GrpcRequest("ServerReady", messages.ServerReadyRequest())
        return bool(response.ready)

    def status(self, models: Sequence[str]) -> Generator[GrpcRequest, Any, Status]:
        """Ask how the service is, and which versions of `models` it serves."""
        started = time.perf_counter()
        server = yield GrpcRequest("ServerMetadata", messages.ServerMetadataRequest())
        seconds = time.perf_counter() - started
        ready = yield GrpcRequest("ServerReady", messages.ServerReadyRequest())
        versions = {}
        for model in models:
            versions[model] = yield from self._versions(model)
        return Status(bool(ready.ready), f"{server.name} {server.version}", versions, seconds)

    def _versions(self, model: str) -> Generator[GrpcRequest, Any, tuple[str, ...]]:
        """The versions of a model that are served: none where it is not loaded."""
        try:
            described = yield GrpcRequest("ModelMetadata", messages.ModelMetadataRequest(name=model))
        except (errors.NotFound, errors.Unavailable):
            return ()
        return tuple(described.versions)

    def _labels_of(self, model: str, version: str) -> Generator[GrpcRequest, Any, list[str]]:
        """What the indices in a model's outputs mean: asked once for each version that answers."""
        known = self._labels.get((model, version))
        if known is not None:
            return known
        response = yield GrpcRequest("ModelConfig", messages.ModelConfigRequest(name=model, version=version))
        try:
            labels = [str(label) for label in json.loads(response.config.parameters["labels"].string_value)]
        except (ValueError, TypeError) as error:
            raise errors.ServerError(f"The server does not say what the labels of {model} are.") from error
        self._labels[model, version] = labels
        return labels


@dataclass(frozen=True)
class SeededDigits:
    """Digits to draw, and the seed of each."""

    digits: Sequence[int]
    seeds: Sequence[int]


def _with_seeds(inputs: Inputs) -> Pictures | Texts | SeededDigits:
    """Choose the seeds that the caller left open: unlike REST, the tensors leave nothing open."""
    if not isinstance(inputs, Digits):
        return inputs
    if inputs.seed is not None:
        return SeededDigits(inputs.digits, [inputs.seed] * len(inputs))
    return SeededDigits(inputs.digits, [secrets.randbits(_SEED_BITS) for _ in inputs.digits])


def _write(model: str, inputs: Pictures | Texts | SeededDigits) -> Any:
    """The request for a model."""
    request = messages.ModelInferRequest(model_name=model)
    match inputs:
        case Texts(texts):
            _add(request, "text", "BYTES", len(texts), _join([text.encode() for text in texts]))
        case SeededDigits(digits, seeds):
            _add(request, "digit", "INT64", len(digits), struct.pack(f"<{len(digits)}q", *digits))
            _add(request, "seed", "INT64", len(seeds), struct.pack(f"<{len(seeds)}q", *seeds))
        case Pictures(encoded, min_confidence):
            _add(request, "image", "BYTES", len(encoded), _join(encoded))
            if min_confidence is not None:
                request.parameters["min_confidence"].double_param = min_confidence
    return request


def _add(request: Any, name: str, datatype: str, count: int, raw: bytes) -> None:
    request.inputs.add(name=name, datatype=datatype, shape=[count])
    request.raw_input_contents.append(raw)


def _join(elements: Sequence[bytes]) -> bytes:
    """BYTES elements, each after its length."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def _split(raw: bytes) -> list[bytes]:
    """Undo `_join`."""
    elements, position = [], 0
    while position < len(raw):
        (length,) = struct.unpack_from("<I", raw, position)
        position += 4
        elements.append(raw[position : position + length])
        position += length
    return elements


def _tensors(response: Any) -> dict[str, Tensor]:
    """The outputs by name, whichever of the two ways their values came."""
    raws = list(response.raw_output_contents) or [None] * len(response.outputs)
    tensors = {}
    for output, raw in zip(response.outputs, raws, strict=True):
        shape = tuple(output.shape)
        values = _typed_values(output) if raw is None else _raw_values(output.datatype, raw)
        if len(values) != math.prod(shape):
            raise ValueError(f"{output.name} does not fill its shape")
        tensors[output.name] = Tensor(shape, values)
    return tensors


def _raw_values(datatype: str, raw: bytes) -> Sequence[Any]:
    """Values from their binary form."""
    match datatype:
        case "BYTES":
            return _split(raw)
        case "UINT8":
            return raw
        case "INT64":
            return struct.unpack(f"<{len(raw) // 8}q", raw)
        case "FP32":
            return struct.unpack(f"<{len(raw) // 4}f", raw)
    raise ValueError(f"no model of ours answers in {datatype}")


def _typed_values(output: Any) -> Sequence[Any]:
    """Values from the field of their datatype."""
    match output.datatype:
        case "BYTES":
            return list(output.contents.bytes_contents)
        case "UINT8":
            return bytes(output.contents.uint_contents)
        case "INT64":
            return list(output.contents.int64_contents)
        case "FP32":
            return list(output.contents.fp32_contents)
    raise ValueError(f"no model of ours answers in {output.datatype}")


def _read_classifications(
    tensors: Mapping[str, Tensor], inputs: Any, labels: list[str], model: str, version: str
) -> list[Classification]:
    """`label` BYTES [n] and `probabilities` FP32 [n, labels]."""
    probabilities = tensors["probabilities"]
    width = probabilities.shape[1]
    results = []
    for row, label in enumerate(tensors["label"].values):
        values = probabilities.values[row * width : (row + 1) * width]
        by_label = dict(zip(labels, values, strict=True))
        results.append(Classification(label.decode(), max(values), by_label, model, version))
    return results


def _read_detections(
    tensors: Mapping[str, Tensor], inputs: Pictures, labels: list[str], model: str, version: str
) -> list[Detection]:
    """`boxes` FP32 [n, m, 4], `confidence` FP32 [n, m], `label` INT64 [n, m], `count` INT64 [n]."""
    boxes, confidences, indices = (tensors[name] for name in ("boxes", "confidence", "label"))
    most = confidences.shape[1]
    results = []
    for row, count in enumerate(tensors["count"].values):
        objects = []
        for place in range(row * most, row * most + count):
            confidence = confidences.values[place]
            # A server that does not know the parameter answers by its own threshold.
            if confidence >= (inputs.min_confidence or 0.0):
                left, top, right, bottom = boxes.values[4 * place : 4 * place + 4]
                objects.append(Object(labels[indices.values[place]], confidence, (left, top, right, bottom)))
        width, height = pictures.size_of(inputs.encoded[row])
        results.append(Detection(width, height, tuple(objects), model, version))
    return results


def _read_generated(
    tensors: Mapping[str, Tensor], inputs: SeededDigits, labels: list[str], model: str, version: str
) -> list[Generated]:
    """`pixels` UINT8 [n, height, width]."""
    pixels = tensors["pixels"]
    _, height, width = pixels.shape
    area = height * width
    results = []
    for row, (digit, seed) in enumerate(zip(inputs.digits, inputs.seeds, strict=True)):
        grey = bytes(pixels.values[row * area : (row + 1) * area])
        results.append(Generated(digit, seed, pictures.png_from_grey(grey, width, height), model, version))
    return results


_READERS: dict[type, Callable[..., Any]] = {
    Classification: _read_classifications,
    Detection: _read_detections,
    Generated: _read_generated,
}


class GrpcCarrier:
    """Carries requests to an address, one thread at a time or many."""

    def __init__(
        self,
        target: str,
        is_secure: bool,
        metadata: Mapping[str, str],
        ca_file: str | os.PathLike[str] | None = None,
    ) -> None:
        """Prepare a channel to `target` (`host:port`); it connects with the first request."""
        self._url = f"{'grpcs' if is_secure else 'grpc'}://{target}"
        self._metadata = tuple(metadata.items())
        if is_secure:
            self._channel = grpc.secure_channel(target, _trust(ca_file), _CHANNEL_OPTIONS)
        else:
            self._channel = grpc.insecure_channel(target, _CHANNEL_OPTIONS)

    def send(self, request: GrpcRequest, seconds: float) -> Any:
        """Send a request and return its response, within `seconds`.

        Raises:
            QuintetError: there was no response in time, or it was a refusal.
        """
        try:
            return _method(self._channel, request)(request.message, timeout=seconds, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _named(error, self._url, seconds) from error
        except ValueError as error:  # the channel was closed while others still ask
            raise errors.QuintetError("The client is closed; open another.") from error

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


class AsyncGrpcCarrier:
    """Carries requests to an address, in one event loop."""

    def __init__(
        self,
        target: str,
        is_secure: bool,
        metadata: Mapping[str, str],
        ca_file: str | os.PathLike[str] | None = None,
    ) -> None:
        """Prepare for a channel to `target` (`host:port`)."""
        self._url = f"{'grpcs' if is_secure else 'grpc'}://{target}"
        self._target = target
        self._credentials = _trust(ca_file) if is_secure else None
        self._metadata = tuple(metadata.items())
        self._channel: Any = None  # opened with the first request: a channel binds itself to the running loop

    async def send(self, request: GrpcRequest, seconds: float) -> Any:
        """Send a request and return its response, within `seconds`.

        Raises:
            QuintetError: there was no response in time, or it was a refusal.
        """
        if self._channel is None:
            self._channel = self._open()
        try:
            return await _method(self._channel, request)(
                request.message, timeout=seconds, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise _named(error, self._url, seconds) from error

    async def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            await self._channel.close()

    def _open(self) -> Any:
        if self._credentials is not None:
            return grpc.aio.secure_channel(self._target, self._credentials, _CHANNEL_OPTIONS)
        return grpc.aio.insecure_channel(self._target, _CHANNEL_OPTIONS)


def _trust(ca_file: str | os.PathLike[str] | None) -> Any:
    """Whose certificates to trust: those that gRPC does, or those in a file."""
    return grpc.ssl_channel_credentials(None if ca_file is None else Path(ca_file).read_bytes())


def _method(channel: Any, request: GrpcRequest) -> Any:
    """The callable of a method, on a channel of either kind."""
    return channel.unary_unary(
        f"{_SERVICE}/{request.method}",
        request_serializer=type(request.message).SerializeToString,
        response_deserializer=getattr(messages, f"{request.method}Response").FromString,
    )


_OF_THE_CHANNEL = (
    "failed to connect",
    "dns resolution",
    "resolving",
    "socket closed",
    "connection",
    "ssl",
    "http",
)
"""Words by which a channel's own failure is told from a service's sentence."""


_BROKEN_OFF = ("rst_stream", "stream removed", "goaway")
"""Words of a channel whose server went away in the middle of an answer."""


def _named(error: Any, url: str, seconds: float) -> errors.QuintetError:
    """Name an error of gRPC's as ours; both kinds of channel raise the same."""
    trailers = {key: value for key, value in error.trailing_metadata() or () if isinstance(value, str)}
    code, details = error.code().name, error.details() or ""
    if code == "UNAVAILABLE" and any(word in details.lower() for word in _OF_THE_CHANNEL):
        return errors.unreachable(url, details)
    if code in ("INTERNAL", "UNKNOWN", "CANCELLED") and any(word in details.lower() for word in _BROKEN_OFF):
        return errors.Unavailable(f"The connection to {url} broke off; the service may have stopped.")
    if code == "DEADLINE_EXCEEDED" and details in ("", "Deadline Exceeded"):
        return errors.too_late(url, seconds)
    return errors.from_grpc(code, details, trailers)
