"""Requests of every kind together: right, broken, late and given up, for all models, over both doors.

    python -m load_tests.mixed --url http://127.0.0.1:3000 --grpc 127.0.0.1:3001 --times 1000

Every right one must be right (as it is when it is asked alone, within 1e-3), every wrong one must be
told so, and nothing else may come back.
"""

import argparse
import asyncio
import base64
import random
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
import httpx

from service.models import MODELS
from service.models.spec import Room
from service.proto import grpc_service_pb2 as pb

IN_FLIGHT: Final = 200
TOLERANCE: Final = 1e-3
GIVEN_UP: Final = "given up"

Outcome = tuple[str, Any]


def as_json(room: Room) -> dict[str, Any]:
    """The room's example, as people send it."""
    example = room.example
    if room.takes == "pictures":
        return {"images": [base64.b64encode(example["image"]).decode()]}
    if room.takes == "texts":
        return {"texts": [example["text"].decode()]}
    return {"digits": [int(example["digit"])], "seed": int(example["seed"])}


def as_tensors(room: Room, timeout_us: int = 0) -> Any:
    """The room's example, as machines send it."""
    request = pb.ModelInferRequest(model_name=room.name)
    for name, value in room.example.items():
        if isinstance(value, bytes):
            request.inputs.add(name=name, datatype="BYTES", shape=[1])
            request.raw_input_contents.append(struct.pack("<I", len(value)) + value)
        else:
            request.inputs.add(name=name, datatype="INT64", shape=[1])
            request.raw_input_contents.append(struct.pack("<q", int(value)))
    if timeout_us:
        request.parameters["timeout"].int64_param = timeout_us
    return request


class Doors:
    """Both doors of one server."""

    def __init__(self, url: str, grpc_address: str) -> None:
        limits = httpx.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT)
        self.http = httpx.AsyncClient(base_url=url, trust_env=False, timeout=60, limits=limits)
        self._channel = grpc.aio.insecure_channel(grpc_address, [("grpc.enable_http_proxy", 0)])
        self._infer = self._channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )

    async def rest(self, model: str, body: Any, **headers: str) -> Outcome:
        """A call for people: its status, and its predictions where there are some."""
        response = await self.http.post(f"/{model}", json=body, headers=headers)
        return str(response.status_code), response.json().get("predictions")

    async def machine(self, request: Any) -> Outcome:
        """A call over gRPC: its status, and its tensors where there are some."""
        try:
            response = await self._infer(request, timeout=60)
        except grpc.aio.AioRpcError as error:
            return error.code().name, None
        tensors = zip(response.outputs, response.raw_output_contents, strict=True)
        return "OK", {output.name: _numbers(output.datatype, raw) for output, raw in tensors}

    async def close(self) -> None:
        """Hang up."""
        await self.http.aclose()
        await self._channel.close()


def _numbers(datatype: str, raw: bytes) -> Any:
    return list(struct.unpack(f"<{len(raw) // 4}f", raw)) if datatype == "FP32" else raw


def is_close(one: Any, other: Any) -> bool:
    """Whether two answers are the same, their numbers within the tolerance; boxes in pixels within one."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_close(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= TOLERANCE * max(1.0, abs(one))
    return bool(one == other)


async def storm(
    doors: Doors, models: list[str], chance: random.Random, count: int = IN_FLIGHT
) -> Counter[str]:
    """Send `count` requests at once and check what becomes of each; how many there were of each kind.

    Raises:
        AssertionError: one of them was not answered as it should be.
    """
    rooms = [MODELS[name] for name in models]
    alone = {room.name: await doors.rest(room.name, as_json(room)) for room in rooms}
    alone_tensors = {room.name: await doors.machine(as_tensors(room)) for room in rooms}
    Kind = Callable[[Room], Awaitable[Outcome]]
    kinds: dict[str, tuple[Kind, Callable[[Room], Outcome]]] = {
        "right": (lambda room: doors.rest(room.name, as_json(room)), lambda room: alone[room.name]),
        "right over grpc": (
            lambda room: doors.machine(as_tensors(room)),
            lambda room: alone_tensors[room.name],
        ),
        "broken": (lambda room: doors.rest(room.name, {"nothing": []}), lambda room: ("400", None)),
        "broken over grpc": (
            lambda room: doors.machine(pb.ModelInferRequest(model_name=room.name)),
            lambda room: ("INVALID_ARGUMENT", None),
        ),
        "late": (
            lambda room: doors.rest(room.name, as_json(room), **{"Quintet-Timeout-Ms": "0.001"}),
            lambda room: ("504", None),
        ),
        "late over grpc": (
            lambda room: doors.machine(as_tensors(room, timeout_us=1)),
            lambda room: ("DEADLINE_EXCEEDED", None),
        ),
    }
    counted: Counter[str] = Counter()

    async def one() -> None:
        room = chance.choice(rooms)
        kind = chance.choices(list(kinds), weights=[6, 6, 1, 1, 1, 1])[0]
        ask, expect = kinds[kind]
        asking = asyncio.ensure_future(ask(room))
        if chance.random() < 0.1:
            await asyncio.sleep(chance.random() * 0.02)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            counted[GIVEN_UP] += 1
            return
        found, expected = await asking, expect(room)
        assert is_close(list(found), list(expected)), f"{kind} {room}: {found} instead of {expected}"
        counted[kind] += 1

    await asyncio.gather(*(one() for _ in range(count)))
    return counted


async def ready_models(doors: Doors) -> list[str]:
    """The models that the server has loaded."""
    index = (await doors.http.post("/v2/repository/index", json={"ready": True})).json()
    return sorted({entry["name"] for entry in index})


async def main() -> None:
    """Storm a server as often as it is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:3000")
    parser.add_argument("--grpc", default="127.0.0.1:3001")
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, total = random.Random(options.seed), Counter[str]()
    doors = Doors(options.url, options.grpc)
    models = await ready_models(doors)
    for time in range(1, options.times + 1):
        total += await storm(doors, models, chance)
        if time % 50 == 0 or time == options.times:
            print(f"{time} times {IN_FLIGHT} in flight, all as they should be: {dict(total)}", flush=True)
    await doors.close()


if __name__ == "__main__":
    asyncio.run(main())
