"""Every model through Triton's public client, in its four forms: HTTP, gRPC, and both for asyncio."""

import asyncio
import inspect
import queue
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from service.models.spec import Room, Tensor
from tests.conftest import SHIPPED, QuintetServer, StartQuintet

TOLERANCE = 1e-3
FORMS = ("http", "grpc", "http.aio", "grpc.aio")
ADMIN_KEY = "open sesame"

every_model = pytest.mark.parametrize("room", SHIPPED.values(), ids=str)


class Triton:
    """One of the client's forms; calls answer at once, those for asyncio on a loop of their own."""

    def __init__(self, form: str, server: QuintetServer) -> None:
        self.form = form
        self.is_grpc = "grpc" in form
        modules = {
            "http": tritonclient.http,
            "grpc": tritonclient.grpc,
            "http.aio": tritonclient.http.aio,
            "grpc.aio": tritonclient.grpc.aio,
        }
        self.module: Any = modules[form]
        self._loop = asyncio.new_event_loop() if form.endswith("aio") else None
        address = server.grpc_address if self.is_grpc else server.http_address
        options = {"concurrency": 4} if form == "http" else {}
        self._client = self.run(lambda: self.module.InferenceServerClient(address, **options))

    def run(self, call: Callable[[], Any]) -> Any:
        async def on_the_loop() -> Any:
            result = call()
            return await result if inspect.isawaitable(result) else result

        return call() if self._loop is None else self._loop.run_until_complete(on_the_loop())

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return lambda *args, **options: self.run(lambda: method(*args, **options))

    def as_json(self, name: str, *args: Any, **options: Any) -> Any:
        """A call whose answer is a message over gRPC and JSON over HTTP: JSON from both."""
        return getattr(self, name)(*args, **options, **({"as_json": True} if self.is_grpc else {}))

    def inputs(self, room: Room, count: int = 1, *, binary: bool = True) -> list[Any]:
        """The room's example, `count` times."""
        chosen = next(one for one in room.inputs if {tensor.name for tensor in one} == set(room.example))
        tensors = []
        for tensor in chosen:
            values = column(tensor, room.example, count)
            sent = self.module.InferInput(tensor.name, list(values.shape), tensor.datatype)
            sent.set_data_from_numpy(values, **({} if self.is_grpc else {"binary_data": binary}))
            tensors.append(sent)
        return tensors

    def output(self, name: str, *, binary: bool = True, classes: int = 0) -> Any:
        how = {} if self.is_grpc else {"binary_data": binary}
        return self.module.InferRequestedOutput(name, class_count=classes, **how)

    def close(self) -> None:
        self.run(self._client.close)
        if self._loop is not None:
            self._loop.close()


def column(tensor: Tensor, example: Mapping[str, Any], count: int) -> np.ndarray[Any, Any]:
    value = example[tensor.name]
    if tensor.datatype == "BYTES":
        whole = np.empty(count, np.object_)
        whole[:] = [value.encode() if isinstance(value, str) else value] * count
        return whole
    return np.stack([np.asarray(value, tensor.dtype)] * count)


@pytest.fixture(scope="module", params=FORMS)
def triton(request: pytest.FixtureRequest, quintet_server: QuintetServer) -> Iterator[Triton]:
    client = Triton(request.param, quintet_server)
    yield client
    client.close()


def check_outputs(room: Room, result: Any, expected: Any, count: int) -> None:
    for tensor in room.outputs:
        values = result.as_numpy(tensor.name)
        assert len(values) == count
        if tensor.datatype == "FP32":
            np.testing.assert_allclose(values, expected.as_numpy(tensor.name)[:count], atol=TOLERANCE)
        elif tensor.datatype == "BYTES":
            # In binary the client gives bytes, in JSON text.
            texts = [one.decode() if isinstance(one, bytes) else one for one in values]
            assert texts == [
                one.decode() if isinstance(one, bytes) else one
                for one in expected.as_numpy(tensor.name)[:count]
            ]
        else:
            np.testing.assert_array_equal(values, expected.as_numpy(tensor.name)[:count])


# ---- what there is ----


def test_the_server_is_live_and_ready_and_says_what_it_can(triton: Triton) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    metadata = triton.as_json("get_server_metadata")
    assert metadata["name"] == "quintet"
    assert {"statistics", "classification", "binary_tensor_data"} <= set(metadata["extensions"])


@every_model
def test_a_model_is_ready_and_described(triton: Triton, room: Room) -> None:
    metadata = triton.as_json("get_model_metadata", room.name)
    (*_, newest) = metadata["versions"]
    assert triton.is_model_ready(room.name)
    assert triton.is_model_ready(room.name, newest)
    assert [output["name"] for output in metadata["outputs"]] == [output.name for output in room.outputs]
    config = triton.as_json("get_model_config", room.name, newest)
    config = config.get("config", config)
    assert config["name"] == room.name
    assert int(config["max_batch_size"]) > 1


def test_a_model_that_is_not_there_is_not_ready(triton: Triton) -> None:
    # Over gRPC the client passes the error on, over HTTP it says no.
    if triton.is_grpc:
        with pytest.raises(InferenceServerException, match="no such model"):
            triton.is_model_ready("no_such_model")
    else:
        assert not triton.is_model_ready("no_such_model")


def test_the_index_lists_every_version(triton: Triton) -> None:
    index = triton.as_json("get_model_repository_index")
    models = index["models"] if triton.is_grpc else index
    assert {model["name"] for model in models} >= set(SHIPPED)
    assert all(model["state"] == "READY" for model in models)


@pytest.mark.parametrize("call", ["load_model", "unload_model"])
def test_loading_is_for_the_administrator(triton: Triton, call: str) -> None:
    with pytest.raises(InferenceServerException, match="switched off"):
        getattr(triton, call)("digit")


@pytest.fixture(scope="module")
def administered(start_quintet: StartQuintet) -> Iterator[QuintetServer]:
    """A service whose models its administrator may load and let go."""
    with start_quintet(admin_key=ADMIN_KEY, workers=1, drain_seconds=0) as server:
        yield server


@every_model
@pytest.mark.parametrize("form", FORMS)
def test_the_administrator_lets_a_model_go_and_loads_it(
    administered: QuintetServer, form: str, room: Room
) -> None:
    triton = Triton(form, administered)
    # Names of metadata are small letters.
    key = {"authorization": f"Bearer {ADMIN_KEY}"}
    with pytest.raises(InferenceServerException, match="administrator's key"):
        triton.unload_model(room.name)
    triton.unload_model(room.name, headers=key)
    with pytest.raises(InferenceServerException, match="is not loaded"):
        triton.infer(room.name, triton.inputs(room))
    index = triton.as_json("get_model_repository_index")
    (entry,) = [one for one in (index["models"] if triton.is_grpc else index) if one["name"] == room.name]
    assert entry["state"] == "UNAVAILABLE"
    triton.load_model(room.name, headers=key)
    assert triton.is_model_ready(room.name)
    assert triton.infer(room.name, triton.inputs(room)).as_numpy(room.outputs[0].name) is not None
    triton.close()


# ---- inference ----


@every_model
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("count", [1, 3])
def test_inference(triton: Triton, room: Room, binary: bool, count: int) -> None:
    if not binary and (triton.is_grpc or room.takes == "pictures"):
        pytest.skip("the client sends gRPC tensors raw, and JSON has no form for a picture's bytes")
    alone = triton.infer(room.name, triton.inputs(room))
    outputs = [triton.output(tensor.name, binary=binary) for tensor in room.outputs]
    result = triton.infer(
        room.name, triton.inputs(room, count, binary=binary), outputs=outputs, request_id="from a test"
    )
    response = result.get_response()
    answered = (
        response if isinstance(response, dict) else {"id": response.id, "model_name": response.model_name}
    )
    assert (answered["id"], answered["model_name"]) == ("from a test", room.name)
    check_outputs(room, alone, result, 1)


@every_model
def test_only_the_chosen_output_comes(triton: Triton, room: Room) -> None:
    chosen = room.outputs[-1].name
    result = triton.infer(room.name, triton.inputs(room), outputs=[triton.output(chosen)])
    assert result.as_numpy(chosen) is not None
    for other in room.outputs[:-1]:
        assert result.as_numpy(other.name) is None


@every_model
def test_a_version_may_be_named(triton: Triton, room: Room) -> None:
    (*_, newest) = triton.as_json("get_model_metadata", room.name)["versions"]
    result = triton.infer(room.name, triton.inputs(room), model_version=newest)
    response = result.get_response()
    version = response["model_version"] if isinstance(response, dict) else response.model_version
    assert version == newest
    with pytest.raises(InferenceServerException, match="no such version"):
        triton.infer(room.name, triton.inputs(room), model_version="999")


@every_model
@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_bodies_may_be_compressed_both_ways(triton: Triton, room: Room, algorithm: str) -> None:
    if triton.is_grpc:
        compression = {"compression_algorithm": algorithm}
    else:
        compression = {
            "request_compression_algorithm": algorithm,
            "response_compression_algorithm": algorithm,
        }
    alone = triton.infer(room.name, triton.inputs(room))
    check_outputs(room, triton.infer(room.name, triton.inputs(room), **compression), alone, 1)


@pytest.mark.parametrize("classes", [1, 3, 100])
@pytest.mark.parametrize("room", [room for room in SHIPPED.values() if "probabilities" in {one.name for one in room.outputs}], ids=str)  # fmt: skip # noqa: E501
def test_the_likeliest_classes_come_with_their_labels(triton: Triton, room: Room, classes: int) -> None:
    values = triton.infer(room.name, triton.inputs(room)).as_numpy("probabilities")[0]
    outputs = [triton.output("probabilities", classes=classes)]
    (ranked,) = triton.infer(room.name, triton.inputs(room), outputs=outputs).as_numpy("probabilities")
    assert len(ranked) == min(classes, len(room.labels))
    for text, place in zip(ranked, np.argsort(-values, kind="stable"), strict=False):
        value, index, label = text.decode().split(":")
        assert float(value) == pytest.approx(values[place], abs=TOLERANCE)
        assert label == room.labels[int(index)]


@every_model
@pytest.mark.parametrize("priority", [0, 1, 2, 3, 17])
def test_a_request_may_say_how_urgent_it_is(triton: Triton, room: Room, priority: int) -> None:
    result = triton.infer(room.name, triton.inputs(room), priority=priority, timeout=20_000_000)
    assert result.as_numpy(room.outputs[0].name) is not None


@every_model
def test_a_time_that_is_too_short_is_not_exceeded(triton: Triton, room: Room) -> None:
    with pytest.raises(InferenceServerException, match="deadline passed"):
        triton.infer(room.name, triton.inputs(room), timeout=1)


def test_texts_cannot_be_ranked(triton: Triton) -> None:
    room = SHIPPED["digit"]
    with pytest.raises(InferenceServerException, match="BYTES"):
        triton.infer(room.name, triton.inputs(room), outputs=[triton.output("label", classes=1)])


@every_model
def test_shared_memory_is_told_to_stay_out(triton: Triton, room: Room) -> None:
    sent = triton.inputs(room)
    for one in sent:
        one.set_shared_memory("region", 100)
    with pytest.raises(InferenceServerException, match="hared memory is not supported"):
        triton.infer(room.name, sent)


@every_model
def test_shared_memory_of_one_input_of_several_is_told_so_too(triton: Triton, room: Room) -> None:
    sent = triton.inputs(room)
    sent[0].set_shared_memory("region", 100)
    with pytest.raises(InferenceServerException, match="hared memory is not supported"):
        triton.infer(room.name, sent)


# ---- statistics ----


def statistics(triton: Triton, model: str = "") -> dict[str, Any]:
    stats = triton.as_json("get_inference_statistics", model)["model_stats"]
    return {one["name"]: one for one in stats}


def counts(one: dict[str, Any]) -> dict[str, int]:
    """Zeros are left out over gRPC."""
    return {name: int(lapse.get("count", 0)) for name, lapse in one["inference_stats"].items()}


@every_model
def test_statistics_grow_with_what_is_done(triton: Triton, room: Room) -> None:
    triton.infer(room.name, triton.inputs(room))
    before = statistics(triton, room.name)[room.name]
    triton.infer(room.name, triton.inputs(room, 3))
    with pytest.raises(InferenceServerException):
        triton.infer(room.name, triton.inputs(room), outputs=[triton.output("no_such_output")])
    after = statistics(triton, room.name)[room.name]
    assert int(after["inference_count"]) == int(before["inference_count"]) + 3
    assert int(after["execution_count"]) > int(before["execution_count"])
    assert int(after["last_inference"]) >= int(before["last_inference"]) > 1_600_000_000_000
    grown = {name: count - counts(before)[name] for name, count in counts(after).items()}
    once = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    assert {name: grown[name] for name in once} == dict.fromkeys(once, 1)
    for name in once:
        assert int(after["inference_stats"][name]["ns"]) > 0
    executions = sum(int(batch["compute_infer"]["count"]) for batch in after["batch_stats"])
    assert executions == int(after["execution_count"])
    assert sum(
        int(batch["batch_size"]) * int(batch["compute_infer"]["count"]) for batch in after["batch_stats"]
    ) == int(after["inference_count"])


def test_statistics_of_all_models_come_together(triton: Triton) -> None:
    assert set(statistics(triton)) == set(SHIPPED)


# ---- what is not offered says so ----


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("get_trace_settings", ()),
        ("get_trace_settings", ("digit",)),
        ("update_trace_settings", ()),
        ("get_log_settings", ()),
        ("update_log_settings", ({"log_verbose_level": 1},)),
        ("get_system_shared_memory_status", ()),
        ("register_system_shared_memory", ("region", "/region", 64)),
        ("unregister_system_shared_memory", ()),
        ("get_cuda_shared_memory_status", ()),
        ("register_cuda_shared_memory", ("region", b"aGFuZGxl", 0, 64)),
        ("unregister_cuda_shared_memory", ()),
    ],
)
def test_what_is_not_offered_says_so(triton: Triton, call: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(InferenceServerException, match="not supported"):
        getattr(triton, call)(*arguments)


# ---- what only one form has ----


@every_model
def test_the_http_client_asks_without_waiting(quintet_server: QuintetServer, room: Room) -> None:
    triton = Triton("http", quintet_server)
    alone = triton.infer(room.name, triton.inputs(room))
    asked = [triton.async_infer(room.name, triton.inputs(room)) for _ in range(8)]
    for one in asked:
        check_outputs(room, one.get_result(), alone, 1)
    triton.close()


@every_model
def test_the_grpc_client_asks_without_waiting(quintet_server: QuintetServer, room: Room) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    triton = Triton("grpc", quintet_server)
    for _ in range(8):
        triton.async_infer(room.name, triton.inputs(room), lambda result, error: answers.put((result, error)))
    alone = triton.infer(room.name, triton.inputs(room))
    for _ in range(8):
        result, error = answers.get(timeout=30)
        assert error is None
        check_outputs(room, result, alone, 1)
    triton.close()


@every_model
def test_a_stream_answers_in_order_and_survives_a_bad_request(
    quintet_server: QuintetServer, room: Room
) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    triton = Triton("grpc", quintet_server)
    triton.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(20):
        triton.async_stream_infer(room.name, triton.inputs(room, 1 + number % 3), request_id=str(number))
    triton.async_stream_infer("no_such_model", triton.inputs(room), request_id="bad")
    triton.async_stream_infer(
        room.name, triton.inputs(room), request_id="last", enable_empty_final_response=True
    )
    alone = triton.infer(room.name, triton.inputs(room, 3))
    for number in range(20):
        result, error = answers.get(timeout=30)
        assert error is None
        assert result.get_response().id == str(number)
        check_outputs(room, result, alone, 1 + number % 3)
    _, error = answers.get(timeout=30)
    assert "no such model" in str(error)
    last, error = answers.get(timeout=30)
    assert error is None
    assert last.get_response().parameters["triton_final_response"].bool_param
    triton.stop_stream()
    triton.close()


@every_model
async def test_a_stream_for_asyncio_answers_too(quintet_server: QuintetServer, room: Room) -> None:
    module = tritonclient.grpc.aio
    chosen = next(one for one in room.inputs if {tensor.name for tensor in one} == set(room.example))
    sent = []
    for tensor in chosen:
        sent.append(module.InferInput(tensor.name, [1], tensor.datatype))
        sent[-1].set_data_from_numpy(column(tensor, room.example, 1))

    async def requests() -> Any:
        for number in range(100):
            yield {"model_name": room.name, "inputs": sent, "request_id": str(number)}

    async with module.InferenceServerClient(quintet_server.grpc_address) as client:
        seen = []
        async for result, error in client.stream_infer(requests()):
            assert error is None
            seen.append(result.get_response().id)
    assert seen == [str(number) for number in range(100)]
