"""gRPC requests that begin like one before: answered with what is kept of that, as if nothing were."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from load_tests.servers import free_ports
from service import open_inference
from service.commands import Commands
from service.data_plane import DataPlane
from service.grpc_api import GrpcDoor
from service.grpc_calls import GiveUp
from service.grpc_forms import IN_STREAM, MOST_FORMS, RAW_INPUT, Forms, delimited
from service.metrics import Board
from service.models.digit import DIGIT
from service.models.spec import Classification, Inputs
from service.open_inference import Wanted
from service.proto import grpc_service_pb2 as pb
from service.questions import LONGEST_FORM
from service.settings import Settings
from tests.conftest import MODELS_FOLDER

from .knocking import INFER, TOLERANCE, GrpcClient, pixels_of

Pngs = list[tuple[bytes, str]]


class Version:
    """Of a model that is loaded, as much as a form asks of it."""

    room = DIGIT
    version = "7"


def request_of(pixels: Any, **more: Any) -> Any:
    request = pb.ModelInferRequest(model_name="digit", **more)
    request.inputs.add(name="pixels", datatype="UINT8", shape=pixels.shape)
    request.outputs.add(name="probabilities")
    request.raw_input_contents.append(pixels.tobytes())
    return request


def random_pixels(count: int = 1, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), np.uint8)


def wanted_of(request: Any) -> list[Wanted]:
    return open_inference.wanted_outputs(DIGIT, [(output.name, {}) for output in request.outputs])


def answers_to(count: int) -> list[Classification]:
    random = np.random.default_rng(count)
    return [Classification(DIGIT.labels, random.random(10, np.float32)) for _ in range(count)]


def response_to(request: Any, answers: Sequence[Classification]) -> Any:
    """As the door builds it, field by field."""
    response = pb.ModelInferResponse(model_name="digit", model_version="7", id=request.id)
    for _, output in open_inference.to_outputs(DIGIT, answers, wanted_of(request)):
        response.outputs.add(
            name=output.tensor.name, datatype=output.tensor.datatype, shape=output.values.shape
        )
        response.raw_output_contents.append(open_inference.to_raw(output))
    return response


def learnt(forms: Forms, request: Any, message: bytes | None = None) -> Forms:
    tensor = request.inputs[0]
    if tensor.datatype == "BYTES":
        inputs: list[Inputs] = [{"image": b"picture"}]
    else:
        values = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(tensor.shape)
        inputs = [{"pixels": row} for row in values]
    message = request.SerializeToString() if message is None else message
    response = response_to(request, answers_to(max(1, len(inputs))))
    forms.learn(message, request, Version, inputs, wanted_of(request), response)  # type: ignore[arg-type]
    return forms


@pytest.mark.parametrize("outputs", [["probabilities"], ["label", "probabilities"], []], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_a_known_form_reads_and_answers_as_the_parser_does(count: int, outputs: list[str]) -> None:
    def request_for(seed: int) -> Any:
        request = request_of(random_pixels(count, seed), model_version="7")
        del request.outputs[:]
        for name in outputs:
            request.outputs.add(name=name)
        return request

    forms = learnt(Forms(), request_for(0))
    for seed in range(1, 4):
        request, answers = request_for(seed), answers_to(count)
        message = request.SerializeToString()
        found = forms.find(message)
        assert found is not None
        known, start = found
        assert (known.model, known.version, known.answered_by) == ("digit", "7", "7")
        inputs = known.form.fill(message, start).inputs
        assert [one["pixels"].tolist() for one in inputs] == random_pixels(count, seed).tolist()
        told = pb.ModelInferResponse.FromString(known.told(Version, answers))  # type: ignore[arg-type]
        assert told == response_to(request, answers)


def test_what_is_not_the_same_is_not_known() -> None:
    forms = learnt(Forms(), request_of(random_pixels()))
    others = [
        request_of(random_pixels(2)),
        request_of(random_pixels(), model_version="1"),
        request_of(random_pixels(), id="mine"),
        request_of(random_pixels().reshape(1, 784)),
    ]
    # As long as the one that is known, with another name for the model.
    others.append(request_of(random_pixels()))
    others[-1].model_name = "tigid"
    assert forms.find(request_of(random_pixels(seed=5)).SerializeToString()) is not None
    for other in others:
        assert forms.find(other.SerializeToString()) is None


def test_tensors_of_two_lengths_may_begin_at_the_same_place() -> None:
    forms = learnt(learnt(Forms(), request_of(random_pixels(1))), request_of(random_pixels(2)))
    one, two = (request_of(random_pixels(count, 9)).SerializeToString() for count in (1, 2))
    begins = len(one) - 784
    assert begins == len(two) - 2 * 784
    assert forms.find(one) is not None
    assert forms.find(two) is not None
    # Each with as many bytes as the other: damaged messages, which the parser must see.
    assert forms.find(two[:-784]) is None
    assert forms.find(one + bytes(784)) is None


def with_parameter() -> Any:
    request = request_of(random_pixels())
    request.parameters["priority"].int64_param = 1
    return request


def a_picture() -> Any:
    request = pb.ModelInferRequest(model_name="digit")
    request.inputs.add(name="image", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(b"\7\0\0\0picture")
    return request


@pytest.mark.parametrize(
    "request_for",
    [
        pytest.param(lambda: request_of(random_pixels(), id="mine"), id="a name, which changes"),
        pytest.param(with_parameter, id="parameters"),
        pytest.param(a_picture, id="bytes, which have lengths of their own"),
        pytest.param(lambda: request_of(random_pixels(0)), id="no bytes"),
        pytest.param(
            lambda: request_of(random_pixels(), model_version="1" * LONGEST_FORM), id="much before it"
        ),
    ],
)
def test_what_changes_from_request_to_request_is_not_kept(request_for: Any) -> None:
    request = request_for()
    assert learnt(Forms(), request).find(request.SerializeToString()) is None


def test_a_tensor_that_only_seems_to_come_last_is_not_kept() -> None:
    # A field that nobody knows (number 15) holds what looks like the tensor, after the tensor itself.
    pixels = random_pixels().tobytes()
    disguise = delimited(bytes((15 << 3 | 2,)), b"x" + delimited(RAW_INPUT, pixels))
    message = request_of(random_pixels()).SerializeToString() + disguise
    request = pb.ModelInferRequest.FromString(message)
    assert request.raw_input_contents[0] == pixels
    assert message.endswith(pixels)
    assert learnt(Forms(), request, message).find(message) is None


def test_no_more_are_kept_than_there_is_room_for() -> None:
    forms, message = Forms(), b""
    for number in range(MOST_FORMS + 1):
        request = request_of(random_pixels(), model_version=str(number))
        message = request.SerializeToString()
        learnt(forms, request)
    assert forms.find(message) is not None
    assert forms.find(request_of(random_pixels(), model_version="0").SerializeToString()) is None


@pytest.mark.parametrize("size", [0, 1, 127, 128, 300, 20_000])
def test_a_field_of_any_length(size: int) -> None:
    inner = pb.ModelInferResponse(model_name="x" * size)
    whole = pb.ModelStreamInferResponse(infer_response=inner)
    assert delimited(IN_STREAM, inner.SerializeToString()) == whole.SerializeToString()


# ---- through the service ----


def test_the_same_answers_call_by_call_and_in_a_stream(
    grpc_client: GrpcClient, http: httpx.Client, digit_pngs: Pngs
) -> None:
    pictures = [content for content, _ in digit_pngs]
    tensors = [
        {"name": "pixels", "datatype": "UINT8", "shape": [1, 28, 28], "data": pixels_of(one).ravel().tolist()}
        for one in pictures
    ]
    right = [
        http.post(INFER, json={"inputs": [tensor], "outputs": [{"name": "probabilities"}]}).json()
        for tensor in tensors
    ]
    requests = [request_of(pixels_of(one)[np.newaxis]) for one in pictures]
    called = [grpc_client.call("ModelInfer", request) for request in requests]
    stream = grpc_client.channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        request_serializer=pb.ModelInferRequest.SerializeToString,
        response_deserializer=pb.ModelStreamInferResponse.FromString,
    )
    streamed = list(stream(iter(requests), timeout=30))
    assert [one.error_message for one in streamed] == [""] * len(requests)
    for answers in (called, [one.infer_response for one in streamed]):
        for answer, one in zip(answers, right, strict=True):
            assert answer.outputs[0].shape == [1, 10]
            found = np.frombuffer(answer.raw_output_contents[0], np.float32)
            assert found == pytest.approx(one["outputs"][0]["data"], abs=TOLERANCE)


async def test_many_callers_at_once_get_their_own(grpc_client: GrpcClient, digit_pngs: Pngs) -> None:
    requests = [request_of(pixels_of(content)[np.newaxis]) for content, _ in digit_pngs]
    alone = [grpc_client.call("ModelInfer", request) for request in requests]
    calls = [
        asyncio.to_thread(grpc_client.call, "ModelInfer", requests[number % len(requests)])
        for number in range(8 * len(requests))
    ]
    for number, answer in enumerate(await asyncio.gather(*calls)):
        own = alone[number % len(requests)].raw_output_contents[0]
        found = np.frombuffer(answer.raw_output_contents[0], np.float32)
        assert found == pytest.approx(np.frombuffer(own, np.float32), abs=TOLERANCE)


class NotingDoor(GrpcDoor):
    """Notes which requests were taken without a task."""

    def __init__(self, plane: DataPlane) -> None:
        super().__init__(plane)
        self.at_once: list[bool] = []

    def _ask(self, *asked: Any) -> GiveUp | None:
        give_up = super()._ask(*asked)
        self.at_once.append(give_up is not None)
        return give_up


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[NotingDoor]:
    settings = Settings(models=MODELS_FOLDER)
    board = Board(tmp_path)
    plane = DataPlane(settings, board, Commands(tmp_path))
    await asyncio.to_thread(plane.load)
    door = NotingDoor(plane)
    yield door
    assert plane.find("digit").batcher.depth == 0
    await asyncio.wait_for(plane.finish(5), 5)
    board.close()


@asynccontextmanager
async def stub_of(door: NotingDoor) -> AsyncIterator[Any]:
    (port,) = free_ports(1)
    await door.start("127.0.0.1", port)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
            yield channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                request_serializer=lambda one: one if isinstance(one, bytes) else one.SerializeToString(),
                response_deserializer=pb.ModelInferResponse.FromString,
            )
    finally:
        await door.stop(0)


async def test_what_is_known_is_answered_without_a_task_and_all_else_as_ever(door: NotingDoor) -> None:
    async with stub_of(door) as infer:
        first, second = [await infer(request_of(random_pixels(2, seed))) for seed in (1, 1)]
        assert first == second
        named = await infer(request_of(random_pixels(2, 1), id="mine"))
        assert named.raw_output_contents == first.raw_output_contents
        assert door.at_once == [False, True, False]
        # The head of two digits with the bytes of one: no message at all.
        damaged = request_of(random_pixels(2)).SerializeToString()[:-784]
        await infer(request_of(random_pixels(1)))
        with pytest.raises(grpc.RpcError) as refusal:
            await infer(damaged)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        # That cost nobody else the connection.
        await infer(request_of(random_pixels(1)))
        assert door.at_once == [False, True, False, False, False, True]


async def test_a_known_request_whose_caller_has_gone_is_not_counted(door: NotingDoor) -> None:
    plane = door._plane
    async with stub_of(door) as infer:
        await infer(request_of(random_pixels()))
        batcher = plane.find("digit").batcher
        # Nothing runs meanwhile: its caller is gone before it is its turn.
        batcher._turn_is_booked = True
        call = infer(request_of(random_pixels()))
        while len(door.at_once) < 2:
            await asyncio.sleep(0.01)
        assert (door.at_once, batcher.depth) == ([False, True], 1)
        call.cancel()
        while plane._under_way:
            await asyncio.sleep(0.01)
        batcher._turn_is_booked = False
        await infer(request_of(random_pixels()))
    (counted,) = plane.statistics([plane.find("digit")])
    assert counted.success.count == 2
    assert counted.inferences == 2
