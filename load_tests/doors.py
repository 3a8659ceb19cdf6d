"""Both doors of one server, through public clients, and inputs whose right answers are known.

An input is asked alone first, in each form; whatever it is asked among afterwards, its answer must
be that one.
"""

import asyncio
import base64
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import aiohttp
import cv2
import httpx
import numpy as np
import tritonclient.grpc.aio
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from load_tests.proof import Deviation
from service.models import MODELS
from service.models.spec import Inputs, Room, Tensor

TOLERANCE: Final = 1e-3
"""How much an answer may depend on its neighbours; of a picture's bytes, one level."""

ANSWER_SECONDS: Final = 120
"""An answer that takes longer is given up, and counts as none."""

Door = Literal["people", "machines over http", "machines over grpc"]
DOORS: Final[tuple[Door, ...]] = ("people", "machines over http", "machines over grpc")

HTTP_STATUS: Final = {
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""The contract's table of errors: what each of gRPC's codes is over HTTP."""


NO_ANSWER: Final = 0
"""The status of a request whose connection broke."""


@dataclass(frozen=True)
class Outcome:
    """How a request ended, whatever its door.

    Attributes:
        status: In HTTP's codes, or `NO_ANSWER`.
        answers: One for each input, in the form of its door.
        batch_size: Of the largest batch that it ran in, where the door tells.
    """

    status: int
    answers: list[Any] = field(default_factory=list)
    batch_size: int = 0


class Doors:
    """Both doors of one server, for as long as the `async with` block lasts."""

    def __init__(self, http_address: str, grpc_address: str) -> None:
        """Prepare to knock; both are `host:port`, without a scheme."""
        self._addresses = http_address, grpc_address

    async def __aenter__(self) -> "Doors":
        """Open the clients, with as many connections as there are requests."""
        http_address, grpc_address = self._addresses
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        # Nothing between us and the service: a proxy of the environment would answer in its place.
        self.http = httpx.AsyncClient(
            base_url=f"http://{http_address}", trust_env=False, timeout=ANSWER_SECONDS, limits=limits
        )
        self._machines: dict[str, tuple[Any, Any]] = {}
        for form, module, client in (
            (
                "machines over http",
                tritonclient.http.aio,
                tritonclient.http.aio.InferenceServerClient(
                    http_address, conn_limit=0, conn_timeout=ANSWER_SECONDS
                ),
            ),
            (
                "machines over grpc",
                tritonclient.grpc.aio,
                tritonclient.grpc.aio.InferenceServerClient(
                    grpc_address, channel_args=[("grpc.enable_http_proxy", 0)]
                ),
            ),
        ):
            self._machines[form] = module, client
        return self

    async def __aexit__(self, *error: object) -> None:
        """Hang up."""
        await self.http.aclose()
        for _, client in self._machines.values():
            await client.close()

    async def ask(
        self, door: Door, room: Room, inputs: Sequence[Inputs], milliseconds: float | None = None
    ) -> Outcome:
        """Ask a model about inputs, through one of the doors, with a deadline if need be."""
        if door == "people":
            body = body_of(room, inputs)
            if milliseconds is not None:
                body["headers"] = body.get("headers", {}) | {"Quintet-Timeout-Ms": str(milliseconds)}
            return await self.post(f"/{room.name}", **body)
        chosen = next(one for one in room.inputs if {tensor.name for tensor in one} == set(inputs[0]))
        columns = [(tensor, [one[tensor.name] for one in inputs]) for tensor in chosen]
        return await self.infer(door, room.name, columns, milliseconds=milliseconds)

    async def post(self, path: str, **body: Any) -> Outcome:
        """A call for people; `body` is httpx's."""
        try:
            response = await self.http.post(path, **body)
        except httpx.TransportError:
            return Outcome(NO_ANSWER)
        if response.status_code != 200:
            return Outcome(response.status_code)
        answers = [_with_pixels(one) for one in response.json()["predictions"]]
        return Outcome(200, answers, int(response.headers["quintet-batch-size"]))

    async def infer(
        self,
        door: Door,
        model: str,
        columns: Sequence[tuple[Tensor, list[Any]]],
        *,
        version: str = "",
        milliseconds: float | None = None,
    ) -> Outcome:
        """A call for machines, each column one input tensor."""
        module, client = self._machines[door]
        sent = []
        for tensor, values in columns:
            column = np.empty(len(values), tensor.dtype) if not tensor.shape else np.stack(values)
            if not tensor.shape:
                column[:] = values
            sent.append(module.InferInput(tensor.name, list(column.shape), tensor.datatype))
            sent[-1].set_data_from_numpy(column)
        microseconds = None if milliseconds is None else max(1, round(milliseconds * 1000))
        try:
            result = await client.infer(model, sent, model_version=version, timeout=microseconds)
        except InferenceServerException as error:
            said = error.status().removeprefix("StatusCode.")
            return Outcome(int(said) if said.isdigit() else HTTP_STATUS[said])
        except aiohttp.ClientError:
            return Outcome(NO_ANSWER)
        outputs = {tensor.name: result.as_numpy(tensor.name) for tensor in MODELS[model].outputs}
        return Outcome(200, [_row(outputs, index) for index in range(len(columns[0][1]))])


def body_of(room: Room, inputs: Sequence[Inputs]) -> dict[str, Any]:
    """Inputs as people send them, in httpx's words."""
    if room.takes == "digits":
        # One seed is for all of a request.
        return {"json": {"digits": [one["digit"] for one in inputs], "seed": inputs[0]["seed"]}}
    if room.takes == "texts":
        if len(inputs) == 1:
            return {"content": inputs[0]["text"], "headers": {"Content-Type": "text/plain"}}
        return {"json": {"texts": [one["text"].decode() for one in inputs]}}
    if len(inputs) == 1:
        return {"content": inputs[0]["image"]}
    if len(inputs) % 2:
        return {"files": [("images", ("picture", one["image"])) for one in inputs]}
    return {"json": {"images": [base64.b64encode(one["image"]).decode() for one in inputs]}}


def _with_pixels(prediction: dict[str, Any]) -> dict[str, Any]:
    """A prediction whose picture, if it has one, is unpacked: two files may hold the same picture."""
    if "image" not in prediction:
        return prediction
    packed = np.frombuffer(base64.b64decode(prediction["image"]), np.uint8)
    return prediction | {"image": cv2.imdecode(packed, cv2.IMREAD_GRAYSCALE)}


def _row(outputs: dict[str, Any], index: int) -> dict[str, Any]:
    """One input's share of the output tensors; what fills shorter rows up is left out."""
    row = {name: values[index] for name, values in outputs.items()}
    if "count" in row:
        row |= {name: values[: row["count"]] for name, values in row.items() if name != "count"}
    return row


def is_close(one: Any, other: Any) -> bool:
    """Whether two answers are the same: numbers within the tolerance, pixels within one level."""
    if isinstance(one, np.ndarray) and one.dtype == np.uint8:
        return one.shape == other.shape and int(np.abs(one.astype(int) - other).max(initial=0)) <= 1
    if isinstance(one, np.ndarray | np.generic):
        return is_close(one.tolist(), other.tolist())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_close(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_close, one, other))
    if isinstance(one, float):
        # Boxes are in pixels: of those up to a thousandth.
        return abs(one - other) <= TOLERANCE * max(1.0, abs(one))
    return bool(one == other)


# ---- inputs, and what is right ----


def inputs_of(room: Room, count: int, chance: random.Random) -> list[Inputs]:
    """So many different inputs of a room, made from its example."""
    if room.takes == "digits":
        # Rows of ten share a seed, for people can ask for one only.
        seeds = [chance.randrange(2**32) for _ in range(-(-count // 10))]
        return [{"digit": number % 10, "seed": seeds[number // 10]} for number in range(count)]
    if room.takes == "texts":
        words = room.example["text"].decode().split()
        texts = [" ".join(chance.choices(words, k=chance.choice((2, 5, 20, 80)))) for _ in range(count)]
        return [{"text": f"{text} {number}".encode()} for number, text in enumerate(texts)]
    picture = cv2.imdecode(np.frombuffer(room.example["image"], np.uint8), cv2.IMREAD_UNCHANGED)
    return [{"image": _varied(picture, chance)} for _ in range(count)]


def _varied(picture: np.ndarray[Any, Any], chance: random.Random) -> bytes:
    """A picture that is turned, cut and lit in another way, as a PNG."""
    height, width = picture.shape[:2]
    turned = cv2.getRotationMatrix2D((width / 2, height / 2), chance.uniform(-40, 40), chance.uniform(1, 1.6))
    seen = cv2.warpAffine(picture, turned, (width, height), borderMode=cv2.BORDER_REPLICATE)
    seen = cv2.convertScaleAbs(seen, alpha=chance.uniform(0.7, 1.2), beta=chance.uniform(-20, 20))
    return cv2.imencode(".png", seen[:, ::-1] if chance.random() < 0.5 else seen)[1].tobytes()


@dataclass(frozen=True)
class Known:
    """One model's inputs, and what each of them is answered with when it is alone.

    Attributes:
        for_people: In the order of `inputs`.
        for_machines: Likewise; both of their doors agreed on it.
        seconds: What one of them took alone.
    """

    room: Room
    inputs: list[Inputs]
    for_people: list[Any]
    for_machines: list[Any]
    seconds: float

    def draw(self, chance: random.Random, most: int) -> list[int]:
        """The places of 1 to `most` inputs that may travel in one request."""
        count = chance.randint(1, most)
        if self.room.takes == "digits":
            start = chance.randrange(len(self.inputs) // 10) * 10
            return [start + chance.randrange(10) for _ in range(count)]
        return [chance.randrange(len(self.inputs)) for _ in range(count)]

    def parcels(self, chance: random.Random, most: int) -> list[list[int]]:
        """The places of all inputs in any order, as requests of 1 to `most` of them."""
        row = 10 if self.room.takes == "digits" else len(self.inputs)
        parcels = []
        for start in range(0, len(self.inputs), row):
            places = list(range(start, min(start + row, len(self.inputs))))
            chance.shuffle(places)
            while places:
                size = chance.randint(1, most)
                parcels.append(places[:size])
                del places[:size]
        chance.shuffle(parcels)
        return parcels

    def is_right(self, door: Door, places: Sequence[int], outcome: Outcome) -> bool:
        """Whether a request for these inputs was answered, and each of them as when it was alone."""
        alone = self.for_people if door == "people" else self.for_machines
        return outcome.status == 200 and is_close(outcome.answers, [alone[place] for place in places])


async def get_to_know(doors: Doors, room: Room, count: int, chance: random.Random) -> Known:
    """Ask a model about so many inputs, one at a time, as people do and as machines do.

    Raises:
        Deviation: one is not answered, or not alone.
    """
    inputs = inputs_of(room, count, chance)
    for_people: list[Any] = []
    for_machines: list[Any] = []
    started = time.perf_counter()
    for number, one in enumerate(inputs):
        # Machines' two doors by turns: whoever compares later finds that both give the same.
        for door, answers in ((DOORS[0], for_people), (DOORS[1 + number % 2], for_machines)):
            outcome = await doors.ask(door, room, [one])
            if outcome.status != 200 or outcome.batch_size > 1:
                raise Deviation(f"{room}, {door}, an input alone: {outcome}")
            answers += outcome.answers
    seconds = (time.perf_counter() - started) / (2 * count)
    return Known(room, inputs, for_people, for_machines, seconds)


async def ready_rooms(doors: Doors) -> list[Room]:
    """The models that the server has loaded."""
    index = (await doors.http.post("/v2/repository/index", json={"ready": True})).json()
    names = {entry["name"] for entry in index}
    return [room for name, room in MODELS.items() if name in names]


async def give_up_after(seconds: float, asking: "asyncio.Task[Outcome]") -> None:
    """Hang up on a request, wherever it is by then."""
    await asyncio.sleep(seconds)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
