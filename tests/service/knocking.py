"""What the tests of both doors knock with: requests of the protocol by hand, and pictures of every kind."""

import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any, Self

import cv2
import grpc
import httpx
import numpy as np
import numpy.typing as npt

from service.proto import grpc_service_pb2 as pb
from tests.conftest import QuintetServer

INFER = "/v2/models/digit/infer"
TOLERANCE = 1e-3
"""How much an answer may depend on its neighbours."""

Pixels = npt.NDArray[np.uint8]


def http_client(server: QuintetServer, **options: Any) -> httpx.Client:
    # Nothing between us and the service: a proxy of the environment would answer in its place.
    return httpx.Client(
        base_url=server.http_url, trust_env=False, timeout=30, verify=server.verify, **options
    )


class GrpcClient:
    """Calls by name, with messages or with bytes that are none."""

    def __init__(self, address: str) -> None:
        options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1)]
        self.channel = grpc.insecure_channel(address, options)

    def call(self, method: str, request: Any = None, **options: Any) -> Any:
        """The response to a call of the inference service; `options` are grpc's."""
        if request is None:
            request = getattr(pb, f"{method}Request")()
        multicallable = self.channel.unary_unary(
            f"/inference.GRPCInferenceService/{method}",
            request_serializer=lambda one: one if isinstance(one, bytes) else one.SerializeToString(),
            response_deserializer=getattr(pb, f"{method}Response").FromString,
        )
        return multicallable(request, **{"timeout": 30, **options})

    def refusal(self, method: str, request: Any = None, **options: Any) -> grpc.RpcError:
        """The error that a call ends with."""
        try:
            answer = self.call(method, request, **options)
        except grpc.RpcError as error:
            return error
        raise AssertionError(f"{method} was answered: {answer}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()


def binary(*elements: bytes) -> bytes:
    """BYTES elements in the protocol's binary form: each after its length."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def tensor(
    name: str = "pixels", datatype: str = "UINT8", shape: Any = (1, 28, 28), **more: Any
) -> dict[str, Any]:
    """One input as JSON describes it."""
    return {"name": name, "datatype": datatype, "shape": shape, **more}


def json_pixels(pixels: Pixels, **more: Any) -> dict[str, Any]:
    return tensor(shape=list(pixels.shape), **{"data": pixels.ravel().tolist(), **more})


def with_binary(head: dict[str, Any], *tensors: bytes) -> dict[str, Any]:
    """Body and headers of a request whose tensors follow the JSON."""
    text = json.dumps(head).encode()
    headers = {"Inference-Header-Content-Length": str(len(text)), "Content-Type": "application/octet-stream"}
    return {"content": text + b"".join(tensors), "headers": headers}


def split_binary(response: httpx.Response) -> tuple[dict[str, Any], bytes]:
    """The JSON of a binary answer, and what follows it."""
    length = int(response.headers["inference-header-content-length"])
    return json.loads(response.content[:length]), response.content[length:]


def infer_request(
    *raw: bytes,
    name: str = "pixels",
    datatype: str = "UINT8",
    shape: Sequence[int] = (1, 28, 28),
    model: str = "digit",
    version: str = "",
    request_id: str = "",
    outputs: Sequence[str] = (),
) -> Any:
    """A request with one input; its contents are `raw`, where any is given."""
    request = pb.ModelInferRequest(model_name=model, model_version=version, id=request_id)
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    request.raw_input_contents.extend(raw)
    for output in outputs:
        request.outputs.add(name=output)
    return request


def picture_request(*pictures: bytes, **options: Any) -> Any:
    """A request for encoded pictures."""
    return infer_request(binary(*pictures), name="image", datatype="BYTES", shape=[len(pictures)], **options)


def floats_in(response: Any, name: str = "probabilities") -> npt.NDArray[np.float32]:
    """A gRPC answer's tensor of numbers."""
    position = [output.name for output in response.outputs].index(name)
    shape = tuple(response.outputs[position].shape)
    return np.frombuffer(response.raw_output_contents[position], np.float32).reshape(shape)


def labels_in(response: Any) -> list[str]:
    """A gRPC answer's labels."""
    position = [output.name for output in response.outputs].index("label")
    return split_elements(response.raw_output_contents[position])


def split_elements(raw: bytes) -> list[str]:
    """The texts of a BYTES tensor in its binary form."""
    texts, position = [], 0
    while position < len(raw):
        (length,) = struct.unpack_from("<I", raw, position)
        texts.append(raw[position + 4 : position + 4 + length].decode())
        position += 4 + length
    return texts


def ask_alone(client: httpx.Client, picture: bytes) -> list[float]:
    """The probabilities of a picture that nobody shares a request with."""
    response = client.post("/digit", content=picture, headers={"Content-Type": "image/png"})
    assert response.status_code == 200, response.text
    return probabilities_of(response.json()["predictions"][0])


def probabilities_of(prediction: dict[str, Any]) -> list[float]:
    """In the order of the labels."""
    return [prediction["probabilities"][label] for label in "0123456789"]


def pixels_of(picture: bytes) -> Pixels:
    """A grey picture's pixels, as they are."""
    return cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_GRAYSCALE)


def encoded(picture: bytes, kind: str) -> bytes:
    """A picture in another format, without loss where the format has a form without."""
    quality = {"jpg": [cv2.IMWRITE_JPEG_QUALITY, 100], "webp": [cv2.IMWRITE_WEBP_QUALITY, 101]}.get(kind, [])
    return cv2.imencode(f".{kind}", pixels_of(picture), quality)[1].tobytes()


def png_claiming(width: int, height: int) -> bytes:
    """A well-formed PNG of a few kilobytes that says it is so large, and starts to be."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1_000_000), 9)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
