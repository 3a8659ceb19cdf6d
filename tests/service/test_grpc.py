"""The gRPC door: what it answers when all is well. `test_rest.py` asks the same of the other door."""

from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from service.proto import grpc_service_pb2 as pb
from service.proto import reflection_pb2
from service.version import VERSION
from tests.conftest import SHIPPED, QuintetServer

from .knocking import (
    TOLERANCE,
    GrpcClient,
    ask_alone,
    encoded,
    floats_in,
    infer_request,
    labels_in,
    picture_request,
    pixels_of,
)

Pngs = list[tuple[bytes, str]]

# ---- the protocol ----


def test_the_server_is_live_and_ready(grpc_client: GrpcClient) -> None:
    assert grpc_client.call("ServerLive").live
    assert grpc_client.call("ServerReady").ready


@pytest.mark.parametrize("model", SHIPPED)
def test_every_model_is_ready(grpc_client: GrpcClient, model: str) -> None:
    assert grpc_client.call("ModelReady", pb.ModelReadyRequest(name=model)).ready
    metadata = grpc_client.call("ModelMetadata", pb.ModelMetadataRequest(name=model))
    for version in metadata.versions:
        assert grpc_client.call("ModelReady", pb.ModelReadyRequest(name=model, version=version)).ready


def test_server_metadata(grpc_client: GrpcClient) -> None:
    answer = grpc_client.call("ServerMetadata")
    assert (answer.name, answer.version) == ("quintet", VERSION)
    assert "binary_tensor_data" in answer.extensions


def test_model_metadata(grpc_client: GrpcClient, newest: str) -> None:
    answer = grpc_client.call("ModelMetadata", pb.ModelMetadataRequest(name="digit"))
    assert answer.name == "digit"
    assert newest == answer.versions[-1]
    assert [(one.name, one.datatype, list(one.shape)) for one in answer.inputs] == [
        ("pixels", "UINT8", [-1, 28, 28]),
        ("image", "BYTES", [-1]),
    ]
    assert [(one.name, one.datatype, list(one.shape)) for one in answer.outputs] == [
        ("label", "BYTES", [-1]),
        ("probabilities", "FP32", [-1, 10]),
    ]
    named = pb.ModelMetadataRequest(name="digit", version=newest)
    assert grpc_client.call("ModelMetadata", named) == answer


def test_model_config(grpc_client: GrpcClient, newest: str) -> None:
    answer = grpc_client.call("ModelConfig", pb.ModelConfigRequest(name="digit"))
    assert answer.config.name == "digit"
    assert answer.config.max_batch_size == 256
    assert [one.name for one in answer.config.input] == ["pixels", "image"]
    named = pb.ModelConfigRequest(name="digit", version=newest)
    assert grpc_client.call("ModelConfig", named) == answer


def test_repository_index(grpc_client: GrpcClient) -> None:
    index = grpc_client.call("RepositoryIndex")
    assert {entry.name for entry in index.models} == set(SHIPPED)
    assert {entry.state for entry in index.models} == {"READY"}


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp"])
def test_one_picture(grpc_client: GrpcClient, http: httpx.Client, digit_png: bytes, kind: str) -> None:
    answer = grpc_client.call("ModelInfer", picture_request(encoded(digit_png, kind)))
    assert answer.model_name == "digit"
    assert [(one.name, one.datatype, list(one.shape)) for one in answer.outputs] == [
        ("label", "BYTES", [1]),
        ("probabilities", "FP32", [1, 10]),
    ]
    loss = 0.2 if kind == "jpg" else TOLERANCE
    assert floats_in(answer)[0].tolist() == pytest.approx(ask_alone(http, digit_png), abs=loss)


@pytest.mark.parametrize("count", [1, 3, 100])
def test_several_pictures_keep_their_order(
    grpc_client: GrpcClient, http: httpx.Client, digit_pngs: Pngs, count: int
) -> None:
    pictures = [picture for picture, _ in digit_pngs[:count]]
    answer = grpc_client.call("ModelInfer", picture_request(*pictures))
    rows = floats_in(answer)
    np.testing.assert_allclose(rows, [ask_alone(http, one) for one in pictures], atol=TOLERANCE)
    assert labels_in(answer) == [SHIPPED["digit"].labels[row.argmax()] for row in rows]


def test_pixels_in_binary(grpc_client: GrpcClient, digit_pngs: Pngs) -> None:
    pixels = np.stack([pixels_of(picture) for picture, _ in digit_pngs[:3]])
    answer = grpc_client.call("ModelInfer", infer_request(pixels.tobytes(), shape=(3, 28, 28)))
    alone = [grpc_client.call("ModelInfer", infer_request(one.tobytes())) for one in pixels]
    np.testing.assert_allclose(floats_in(answer), [floats_in(one)[0] for one in alone], atol=TOLERANCE)


def test_pixels_in_typed_contents(grpc_client: GrpcClient, digit_png: bytes) -> None:
    pixels = pixels_of(digit_png)
    request = infer_request()
    request.inputs[0].contents.uint_contents.extend(pixels.ravel().tolist())
    raw = grpc_client.call("ModelInfer", infer_request(pixels.tobytes()))
    assert grpc_client.call("ModelInfer", request) == raw


def test_pictures_in_typed_contents(grpc_client: GrpcClient, digit_pngs: Pngs) -> None:
    pictures = [picture for picture, _ in digit_pngs[:3]]
    request = infer_request(name="image", datatype="BYTES", shape=[3])
    request.inputs[0].contents.bytes_contents.extend(pictures)
    answers = [
        floats_in(grpc_client.call("ModelInfer", one)) for one in (request, picture_request(*pictures))
    ]
    np.testing.assert_allclose(*answers, atol=TOLERANCE)


def test_the_request_id_comes_back(grpc_client: GrpcClient, digit_png: bytes) -> None:
    answer = grpc_client.call("ModelInfer", picture_request(digit_png, request_id="Grüße 42"))
    assert answer.id == "Grüße 42"


@pytest.mark.parametrize("chosen", [["label"], ["probabilities"], ["probabilities", "label"], []])
def test_only_the_chosen_outputs_come(grpc_client: GrpcClient, digit_png: bytes, chosen: list[str]) -> None:
    answer = grpc_client.call("ModelInfer", picture_request(digit_png, outputs=chosen))
    assert [output.name for output in answer.outputs] == (chosen or ["label", "probabilities"])
    assert len(answer.raw_output_contents) == len(answer.outputs)


def test_a_version_may_be_named(grpc_client: GrpcClient, digit_png: bytes, newest: str) -> None:
    answer = grpc_client.call("ModelInfer", picture_request(digit_png, version=newest))
    assert answer.model_version == newest


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_a_compressed_request(
    grpc_client: GrpcClient, digit_png: bytes, compression: grpc.Compression
) -> None:
    answer = grpc_client.call("ModelInfer", picture_request(digit_png), compression=compression)
    assert labels_in(answer) == labels_in(grpc_client.call("ModelInfer", picture_request(digit_png)))


def test_a_deadline_that_passes(grpc_client: GrpcClient, digit_pngs: Pngs) -> None:
    request = picture_request(*[picture for picture, _ in digit_pngs])
    error = grpc_client.refusal("ModelInfer", request, timeout=0.0005)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


# ---- health and reflection ----


@pytest.mark.parametrize("name", ["", "inference.GRPCInferenceService"], ids=["server", "service"])
def test_the_health_service_says_serving(grpc_client: GrpcClient, name: str) -> None:
    stub = health_pb2_grpc.HealthStub(grpc_client.channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=30)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_health_service_can_be_watched(grpc_client: GrpcClient) -> None:
    watching: Any = health_pb2_grpc.HealthStub(grpc_client.channel).Watch(
        health_pb2.HealthCheckRequest(), timeout=30
    )
    assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
    watching.cancel()


@pytest.fixture
def described(grpc_client: GrpcClient) -> ProtoReflectionDescriptorDatabase:
    return ProtoReflectionDescriptorDatabase(grpc_client.channel)


def test_reflection_names_the_services(described: ProtoReflectionDescriptorDatabase) -> None:
    assert set(described.get_services()) == {
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }


@pytest.mark.parametrize("name", ["inference.GRPCInferenceService", "grpc.health.v1.Health"])
def test_reflection_describes_each_service(described: ProtoReflectionDescriptorDatabase, name: str) -> None:
    file = described.FindFileContainingSymbol(name)
    assert name.rpartition(".")[2] in [service.name for service in file.service]


def reflected(client: GrpcClient, **asked: Any) -> Any:
    """The answer of reflection's first version to one question."""
    ask = client.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    (answer,) = ask(iter([reflection_pb2.ServerReflectionRequest(**asked)]), timeout=30)
    return answer


def test_reflection_in_its_first_version(grpc_client: GrpcClient) -> None:
    services = [one.name for one in reflected(grpc_client, list_services="").list_services_response.service]
    assert "inference.GRPCInferenceService" in services
    for name in services:
        answer = reflected(grpc_client, file_containing_symbol=name)
        (content,) = answer.file_descriptor_response.file_descriptor_proto
        file = descriptor_pb2.FileDescriptorProto.FromString(content)
        assert name in [f"{file.package}.{service.name}" for service in file.service]
        assert reflected(grpc_client, file_by_filename=file.name).file_descriptor_response == (
            answer.file_descriptor_response
        )


@pytest.mark.parametrize(
    "asked",
    [
        {"file_containing_symbol": "inference.Nothing"},
        {"file_by_filename": "nothing.proto"},
        {"all_extension_numbers_of_type": "inference.Nothing"},
        {"file_containing_extension": {"containing_type": "inference.ModelInferRequest"}},
        {},
    ],
    ids=["symbol", "file", "type", "extension", "nothing"],
)
def test_reflection_of_what_is_not_there(grpc_client: GrpcClient, asked: dict[str, Any]) -> None:
    assert reflected(grpc_client, **asked).error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_the_health_of_what_is_not_there(grpc_client: GrpcClient) -> None:
    stub = health_pb2_grpc.HealthStub(grpc_client.channel)
    request = health_pb2.HealthCheckRequest(service="no.such.Service")
    with pytest.raises(grpc.RpcError) as raised:
        stub.Check(request, timeout=30)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    watching = stub.Watch(request, timeout=30)
    assert next(watching).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watching.cancel()


# ---- the public client ----


def test_the_triton_client_sees_the_service(quintet_server: QuintetServer, newest: str) -> None:
    with tritonclient.grpc.InferenceServerClient(quintet_server.grpc_address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("digit")
        assert client.is_model_ready("digit", newest)
        assert client.get_server_metadata().name == "quintet"
        assert client.get_model_metadata("digit").name == "digit"
        assert client.get_model_config("digit").config.name == "digit"
        index = client.get_model_repository_index()
        assert {entry.name for entry in index.models} == set(SHIPPED)


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_the_triton_client_gets_answers(
    quintet_server: QuintetServer, grpc_client: GrpcClient, digit_png: bytes, compression: str | None
) -> None:
    pixels = tritonclient.grpc.InferInput("pixels", [1, 28, 28], "UINT8")
    pixels.set_data_from_numpy(pixels_of(digit_png)[np.newaxis])
    outputs = [tritonclient.grpc.InferRequestedOutput(name) for name in ("label", "probabilities")]
    with tritonclient.grpc.InferenceServerClient(quintet_server.grpc_address) as client:
        result = client.infer(
            "digit", [pixels], outputs=outputs, request_id="7", compression_algorithm=compression
        )
    expected = grpc_client.call("ModelInfer", infer_request(pixels_of(digit_png).tobytes()))
    assert result.get_response().id == "7"
    assert [label.decode() for label in result.as_numpy("label")] == labels_in(expected)
    np.testing.assert_allclose(result.as_numpy("probabilities"), floats_in(expected), atol=TOLERANCE)


def test_the_triton_client_sends_pictures(
    quintet_server: QuintetServer, http: httpx.Client, digit_pngs: Pngs
) -> None:
    pictures = [picture for picture, _ in digit_pngs[:4]]
    images = tritonclient.grpc.InferInput("image", [4], "BYTES")
    images.set_data_from_numpy(np.array(pictures, np.object_))
    with tritonclient.grpc.InferenceServerClient(quintet_server.grpc_address) as client:
        rows = client.infer("digit", [images]).as_numpy("probabilities")
    np.testing.assert_allclose(rows, [ask_alone(http, one) for one in pictures], atol=TOLERANCE)


async def test_the_async_triton_client(quintet_server: QuintetServer, digit_png: bytes) -> None:
    pixels = tritonclient.grpc.InferInput("pixels", [1, 28, 28], "UINT8")
    pixels.set_data_from_numpy(pixels_of(digit_png)[np.newaxis])
    async with tritonclient.grpc.aio.InferenceServerClient(quintet_server.grpc_address) as client:
        assert await client.is_server_live()
        assert await client.is_model_ready("digit")
        assert (await client.get_model_metadata("digit")).name == "digit"
        result = await client.infer("digit", [pixels], request_id="8")
    assert result.get_response().id == "8"
    assert result.as_numpy("probabilities").shape == (1, 10)
