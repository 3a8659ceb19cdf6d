"""The payloads that all get: digits, photographs, reviews and blood, in each form that a door takes.

Real ones, as far as they come with a library: digits that people wrote and photographs ship
with scikit-learn. The reviews are our own, their lengths spread as those of people's are; the
slides of blood are painted.
"""

import base64
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Final, Literal

import cv2
import numpy as np
import numpy.typing as npt
import orjson
from sklearn.datasets import load_digits, load_sample_images

from service.models import MODELS
from service.models.digit import like_mnist
from service.models.pictures import Pixels
from service.proto import grpc_service_pb2 as pb

Protocol = Literal["http", "grpc", "client"]
Numbers = npt.NDArray[np.float64]

FRAME: Final = 5
"""Bytes that gRPC puts before a message."""

DIGITS: Final = 16
PHOTOGRAPHS: Final = 16
REVIEWS: Final = 64
SLIDES: Final = 8
"""Different inputs that take turns."""

STREAMED: Final = 16
"""Requests in one stream."""


@dataclass(frozen=True)
class Payload:
    """Requests of one form, ready to be sent again and again, by turns.

    Attributes:
        name: What travels, for the table.
        model: Which model is asked.
        path: Where it is posted.
        bodies: The requests' bytes; for gRPC one or more messages, each in its frame.
        read: The bytes of an answer to the numbers in it, by which answers are compared.
        headers: What says how to read them.
        protocol: HTTP/1.1, gRPC, or our Python client.
        inputs: What one request asks about, in inputs.
    """

    name: str
    model: str
    path: str
    bodies: tuple[bytes, ...]
    read: Callable[[bytes], Numbers]
    headers: dict[str, str] = field(default_factory=dict)
    protocol: Protocol = "http"
    inputs: int = 1


# What is asked about.


@cache
def digits() -> tuple[Pixels, ...]:
    """Digits that people wrote by hand, uint8 [28, 28] each: what MNIST would make of them.

    Being like MNIST already, they cost every contestant one decoding and no clean-up.
    """
    data: Any = load_digits()
    found: list[Pixels] = []
    for image in data.images:
        written = (image * (255 / 16)).astype(np.uint8)
        digit = like_mnist(cv2.resize(written, (200, 200), interpolation=cv2.INTER_CUBIC))
        if np.array_equal(like_mnist(digit), digit):
            found.append(digit)
        if len(found) == DIGITS:
            break
    return tuple(found)


@cache
def photographs() -> tuple[Pixels, ...]:
    """Pieces of two photographs, uint8 [32, 32, 3] RGB each, as small as the image model's."""
    chance = np.random.default_rng(0)
    found = []
    for number in range(PHOTOGRAPHS):
        photograph = load_sample_images().images[number % 2]
        side = int(chance.integers(64, 400))
        top, left = (int(chance.integers(0, size - side)) for size in photograph.shape[:2])
        piece = np.ascontiguousarray(photograph[top : top + side, left : left + side])
        small = cv2.resize(piece, (32, 32), interpolation=cv2.INTER_AREA)
        found.append(np.asarray(small, np.uint8))
    return tuple(found)


PRAISE: Final = (
    "I went in expecting nothing and came out humming the score.",
    "The lead carries the quiet scenes as well as the loud ones, which is rarer than it sounds.",
    "What stays with me is the light in that last shot over the harbour.",
    "It is funny without being cruel, and sad without asking for it.",
    "My daughter, who sits still for nobody, sat still for this.",
)
COMPLAINTS: Final = (
    "By the second hour I was counting the ceiling tiles.",
    "Every line sounds as if three people had rewritten it and none of them had spoken to the others.",
    "The plot needs everybody in it to be a fool, and then asks us to worry for them.",
    "I have seen better acting in an advertisement for gutters.",
    "It ends four times, and each ending is worse than the one before.",
)
NEITHER: Final = (
    "It was shot over six weeks in the off season, mostly in one house.",
    "The story, such as it is, follows two sisters who inherit a boat.",
    "There are songs.",
    "I saw it on a Tuesday with eleven other people.",
)


@cache
def reviews() -> tuple[str, ...]:
    """Opinions from a few words to a page long: lengths are spread evenly on a logarithmic scale."""
    chance = np.random.default_rng(0)
    texts = []
    for number, words in enumerate(np.geomspace(4, 300, REVIEWS)):
        stock = (*(PRAISE if number % 2 else COMPLAINTS), *NEITHER)
        said: list[str] = []
        while len(said) < words:
            said += str(chance.choice(stock)).split()
        texts.append(" ".join(said[: int(words)]))
    chance.shuffle(texts)
    return tuple(texts)


@cache
def slides() -> tuple[bytes, ...]:
    """Painted slides of blood as JPEG files, as large as a microscope's camera makes them here: 640x480."""
    chance = np.random.default_rng(0)
    files = []
    for _ in range(SLIDES):
        picture = np.full((480, 640, 3), (206, 204, 214), np.uint8)
        for radius, colour, count in (
            (48, (126, 122, 184), 14),
            (80, (150, 70, 120), 1),
            (16, (140, 50, 110), 3),
        ):
            for _ in range(count):
                centre = (
                    int(chance.integers(radius, 640 - radius)),
                    int(chance.integers(radius, 480 - radius)),
                )
                cv2.circle(picture, centre, radius, colour, cv2.FILLED, cv2.LINE_AA)
        grain = chance.normal(0, 4, picture.shape)
        noisy = np.clip(picture + grain, 0, 255).astype(np.uint8)
        files.append(cv2.imencode(".jpg", noisy)[1].tobytes())
    return tuple(files)


def _png(pixels: Pixels) -> bytes:
    shown = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", shown)[1].tobytes()


@cache
def pngs(model: str) -> tuple[bytes, ...]:
    """The digits or the photographs as PNG files."""
    return tuple(_png(pixels) for pixels in _pixels(model))


def _pixels(model: str) -> tuple[Pixels, ...]:
    return digits() if model == "digit" else photographs()


def inputs_of(model: str) -> list[dict[str, Any]]:
    """The inputs of one model as its room takes them: what a server without a door would get."""
    if model == "sentiment":
        return [{"text": text.encode()} for text in reviews()]
    if model == "detection":
        return [{"image": slide} for slide in slides()]
    if model == "generator":
        return [{"digit": number, "seed": number} for number in range(10)]
    return [{"image": picture} for picture in pngs(model)]


# The same in the words of each door.


def pictures(model: str) -> Payload:
    """A picture as the whole body of `POST /<model>`."""
    if model == "detection":
        headers = {"content-type": "image/jpeg"}
        return Payload("slide, JPEG", model, "/detection", slides(), _read_boxes, headers)
    headers = {"content-type": "image/png"}
    return Payload(_named(model, "PNG"), model, f"/{model}", pngs(model), _read_people, headers)


def json_pictures(model: str, path: str = "") -> Payload:
    """A picture as base64 in JSON, as `POST /<model>` takes several of them."""
    bodies = tuple(json.dumps({"images": [_base64(picture)]}).encode() for picture in pngs(model))
    return Payload("PNG in JSON", model, path or f"/{model}", bodies, _read_people, JSON)


def texts() -> Payload:
    """A review in JSON."""
    bodies = tuple(json.dumps({"texts": [text]}).encode() for text in reviews())
    return Payload("review, JSON", "sentiment", "/sentiment", bodies, _read_people, JSON)


def drawings() -> Payload:
    """A digit to be drawn."""
    bodies = tuple(json.dumps({"digits": [number], "seed": number}).encode() for number in range(10))
    return Payload("digit and seed", "generator", "/generator", bodies, _read_size, JSON)


def _named(model: str, form: str) -> str:
    return form if model == "digit" else f"photograph, {form}"


def room_payload(model: str) -> Payload:
    """What people send to a model."""
    if model == "sentiment":
        return texts()
    return drawings() if model == "generator" else pictures(model)


def binary_tensor(model: str = "digit", inputs: int = 1) -> Payload:
    """Pixels by the Open Inference Protocol over REST, binary both ways."""
    bodies = []
    for pixels in _stacks(model, inputs):
        described = {
            "name": "pixels",
            "datatype": "UINT8",
            "shape": list(pixels.shape),
            "parameters": {"binary_data_size": pixels.nbytes},
        }
        wanted = {"name": "probabilities", "parameters": {"binary_data": True}}
        head = json.dumps({"inputs": [described], "outputs": [wanted]}).encode()
        bodies.append(head + pixels.tobytes())
    headers = {
        "content-type": "application/octet-stream",
        "inference-header-content-length": str(len(head)),
    }
    path = f"/v2/models/{model}/infer"
    name = _named(model, "V2 tensor" if inputs == 1 else f"V2 tensor of {inputs}")
    read = partial(_read_tail, classes=len(MODELS[model].labels), inputs=inputs)
    return Payload(name, model, path, tuple(bodies), read, headers, inputs=inputs)


def json_tensor(model: str = "digit") -> Payload:
    """Pixels by the Open Inference Protocol over REST, as lists of numbers."""
    bodies = []
    for pixels in _stacks(model, 1):
        tensor = {
            "name": "pixels",
            "datatype": "UINT8",
            "shape": list(pixels.shape),
            "data": pixels.ravel().tolist(),
        }
        bodies.append(orjson.dumps({"inputs": [tensor], "outputs": [{"name": "probabilities"}]}))
    return Payload("V2 JSON", model, f"/v2/models/{model}/infer", tuple(bodies), _read_v2_json, JSON)


def grpc_call(model: str = "digit") -> Payload:
    """Pixels by the Open Inference Protocol over gRPC: one `ModelInfer`, framed."""
    path = f"/{SERVICE}/ModelInfer"
    return Payload("V2 tensor, gRPC", model, path, (_frame(model),), _read_grpc, GRPC, protocol="grpc")


def grpc_stream(model: str = "digit") -> Payload:
    """The same as a stream, `ModelStreamInfer`: so many requests in each, sent without waiting."""
    frames = (_frame(model) * STREAMED,)
    path = f"/{SERVICE}/ModelStreamInfer"
    name = f"V2 tensor, gRPC stream of {STREAMED}"
    return Payload(name, model, path, frames, _read_grpc_stream, GRPC, protocol="grpc", inputs=STREAMED)


def python_client(scheme: Literal["http", "grpc"]) -> Payload:
    """A PNG through `quintet_client.AsyncClient`; its load program sends them."""
    return Payload(
        f"PNG, Python client, {scheme}", "digit", scheme, pngs("digit"), _read_client, protocol="client"
    )


def multipart_pictures() -> Payload:
    """A PNG as one file of a form, as BentoML takes lists of pictures."""
    boundary = "one-digit"
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="digit.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    )
    end = f"\r\n--{boundary}--\r\n"
    bodies = tuple(head.encode() + picture + end.encode() for picture in pngs("digit"))
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    return Payload("PNG, multipart", "digit", "/pictures", bodies, _read_list_of_people, headers)


def json_arrays() -> Payload:
    """The pixels as lists of numbers in JSON, as BentoML takes arrays."""
    bodies = tuple(orjson.dumps({"pixels": [pixels.tolist()]}) for pixels in digits())
    return Payload("JSON array", "digit", "/arrays", bodies, _read_lists, JSON)


def picture_of_a_peer(path: str) -> Payload:
    """A PNG as the whole body, answered with one prediction and nothing around it."""
    return Payload("PNG", "digit", path, pngs("digit"), _read_person, {"content-type": "image/png"})


def json_picture_of_a_peer(path: str) -> Payload:
    """A PNG as base64 in JSON, answered with one prediction and nothing around it."""
    bodies = tuple(json.dumps({"image": _base64(picture)}).encode() for picture in pngs("digit"))
    return Payload("PNG in JSON", "digit", path, bodies, _read_person, JSON)


SERVICE: Final = "inference.GRPCInferenceService"
JSON: Final = {"content-type": "application/json"}
GRPC: Final = {"content-type": "application/grpc", "te": "trailers"}


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _stacks(model: str, inputs: int) -> list[Pixels]:
    """Every picture at the head of so many, uint8 [inputs, ...]."""
    every = _pixels(model)
    return [
        np.stack([every[(first + further) % len(every)] for further in range(inputs)])
        for first in range(len(every))
    ]


def _frame(model: str) -> bytes:
    """One request for gRPC, in its frame."""
    pixels = _pixels(model)[0]
    request = pb.ModelInferRequest(model_name=model, raw_input_contents=[pixels.tobytes()])
    request.inputs.add(name="pixels", datatype="UINT8", shape=[1, *pixels.shape])
    request.outputs.add(name="probabilities")
    return framed([request.SerializeToString()])


def framed(messages: Sequence[bytes]) -> bytes:
    """Messages, each in the frame that gRPC puts around it: not compressed, so many bytes."""
    return b"".join(struct.pack(">BI", 0, len(message)) + message for message in messages)


def unframed(frames: bytes) -> list[bytes]:
    """The messages in a row of frames."""
    messages = []
    while frames:
        (size,) = struct.unpack_from(">I", frames, 1)
        messages.append(frames[FRAME : FRAME + size])
        frames = frames[FRAME + size :]
    return messages


# The numbers in each kind of answer: the probabilities of the first input, or what tells as much.


def _read_tail(answer: bytes, *, classes: int, inputs: int) -> Numbers:
    # The only output is at the end, after the JSON that describes it.
    return np.frombuffer(answer[-4 * classes * inputs :], "<f4")[:classes].astype(np.float64)


def _by_label(prediction: dict[str, Any]) -> Numbers:
    return np.array(list(prediction["probabilities"].values()))


def _read_people(answer: bytes) -> Numbers:
    (prediction,) = orjson.loads(answer)["predictions"]
    return _by_label(prediction)


def _read_person(answer: bytes) -> Numbers:
    return _by_label(orjson.loads(answer))


def _read_client(answer: bytes) -> Numbers:
    return np.array(orjson.loads(answer))


def _read_size(answer: bytes) -> Numbers:
    (drawing,) = orjson.loads(answer)["predictions"]
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(drawing["image"]), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert picture is not None, "the answer is no picture"
    return np.array([drawing["digit"], *picture.shape], np.float64)


def _read_boxes(answer: bytes) -> Numbers:
    (prediction,) = orjson.loads(answer)["predictions"]
    return np.array([prediction["width"], prediction["height"], len(prediction["objects"])], np.float64)


def _read_list_of_people(answer: bytes) -> Numbers:
    (prediction,) = orjson.loads(answer)
    return _by_label(prediction)


def _read_lists(answer: bytes) -> Numbers:
    (probabilities,) = orjson.loads(answer)
    return np.array(probabilities)


def _read_v2_json(answer: bytes) -> Numbers:
    (output,) = orjson.loads(answer)["outputs"]
    return np.array(output["data"], np.float64)


def _read_grpc(answer: bytes) -> Numbers:
    (probabilities,) = pb.ModelInferResponse.FromString(answer).raw_output_contents
    return np.frombuffer(probabilities, "<f4").astype(np.float64)


def _read_grpc_stream(answers: bytes) -> Numbers:
    responses = [pb.ModelStreamInferResponse.FromString(message) for message in unframed(answers)]
    if len(responses) != STREAMED or any(one.error_message for one in responses):
        raise ValueError(f"{len(responses)} answers, some of them errors, to {STREAMED} requests")
    (probabilities,) = responses[0].infer_response.raw_output_contents
    return np.frombuffer(probabilities, "<f4").astype(np.float64)
