"""The payloads that every contestant gets: one handwritten digit in each form that a door takes."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import cv2
import numpy as np
import orjson
from sklearn.datasets import load_digits

from service.models.digit import LABELS, like_mnist
from service.models.pictures import Pixels
from service.proto import grpc_service_pb2 as pb

Protocol = Literal["http", "grpc"]


@dataclass(frozen=True)
class Payload:
    """A request, ready to be sent again and again.

    Attributes:
        name: What travels, for the table.
        path: Where it is posted.
        headers: What says how to read it.
        body: Its bytes; for gRPC one message in its frame.
        read: The bytes of an answer to the ten probabilities in it.
        protocol: HTTP/1.1 or gRPC.
    """

    name: str
    path: str
    body: bytes
    read: Callable[[bytes], list[float]]
    headers: dict[str, str] = field(default_factory=dict)
    protocol: Protocol = "http"


@cache
def digit() -> Pixels:
    """A seven that someone wrote by hand, uint8 [28, 28]: what MNIST would make of it.

    Being like MNIST already, it costs every contestant one decoding and no clean-up.
    """
    data: Any = load_digits()
    written = data.images[list(data.target).index(7)] * (255 / 16)
    large = cv2.resize(written.astype(np.uint8), (200, 200), interpolation=cv2.INTER_CUBIC)
    return like_mnist(large)


@cache
def png() -> bytes:
    """The digit as a PNG file."""
    return cv2.imencode(".png", digit())[1].tobytes()


def raw_picture() -> Payload:
    """A PNG as the whole body of `POST /digit`."""
    return Payload("PNG", "/digit", png(), _read_people, {"content-type": "image/png"})


def binary_tensor() -> Payload:
    """The pixels by the Open Inference Protocol over REST, binary both ways."""
    pixels = digit().tobytes()
    described = {
        "name": "pixels",
        "datatype": "UINT8",
        "shape": [1, *digit().shape],
        "parameters": {"binary_data_size": len(pixels)},
    }
    wanted = {"name": "probabilities", "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [described], "outputs": [wanted]}).encode()
    headers = {
        "content-type": "application/octet-stream",
        "inference-header-content-length": str(len(head)),
    }
    return Payload("V2 tensor", "/v2/models/digit/infer", head + pixels, _read_binary, headers)


def grpc_call() -> Payload:
    """The pixels by the Open Inference Protocol over gRPC: one `ModelInfer`, framed."""
    request = pb.ModelInferRequest(model_name="digit", raw_input_contents=[digit().tobytes()])
    request.inputs.add(name="pixels", datatype="UINT8", shape=[1, *digit().shape])
    request.outputs.add(name="probabilities")
    message = request.SerializeToString()
    # Not compressed, so many bytes long: the frame that gRPC puts around every message.
    frame = struct.pack(">BI", 0, len(message)) + message
    headers = {"content-type": "application/grpc", "te": "trailers"}
    path = "/inference.GRPCInferenceService/ModelInfer"
    return Payload("V2 tensor, gRPC", path, frame, _read_grpc, headers, protocol="grpc")


def multipart_picture() -> Payload:
    """A PNG as one file of a form, as BentoML takes lists of pictures."""
    boundary = "one-digit"
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="digit.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    )
    body = head.encode() + png() + f"\r\n--{boundary}--\r\n".encode()
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    return Payload("PNG, multipart", "/pictures", body, _read_list_of_people, headers)


def json_array() -> Payload:
    """The pixels as lists of numbers in JSON, as BentoML takes arrays."""
    body = json.dumps({"pixels": [digit().tolist()]}, separators=(",", ":")).encode()
    return Payload("JSON array", "/arrays", body, _read_lists, {"content-type": "application/json"})


def _by_label(prediction: dict[str, Any]) -> list[float]:
    return [prediction["probabilities"][label] for label in LABELS]


def _read_people(answer: bytes) -> list[float]:
    (prediction,) = orjson.loads(answer)["predictions"]
    return _by_label(prediction)


def _read_list_of_people(answer: bytes) -> list[float]:
    (prediction,) = orjson.loads(answer)
    return _by_label(prediction)


def _read_lists(answer: bytes) -> list[float]:
    (probabilities,) = orjson.loads(answer)
    return list(probabilities)


def _read_binary(answer: bytes) -> list[float]:
    # The only output is at the end, after the JSON that describes it.
    return list(np.frombuffer(answer[-4 * len(LABELS) :], "<f4"))


def _read_grpc(answer: bytes) -> list[float]:
    (probabilities,) = pb.ModelInferResponse.FromString(answer).raw_output_contents
    return list(np.frombuffer(probabilities, "<f4"))
