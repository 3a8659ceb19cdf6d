"""The protocol's definition, against those who must agree with it."""

from pathlib import Path
from typing import Any

import pytest
import quintet_client
from google.protobuf import descriptor_pb2
from quintet_client import grpc_service_pb2 as of_client
from tritonclient.grpc import model_config_pb2, service_pb2

from service.proto import __main__ as generator
from service.proto import grpc_service_pb2 as of_service

SERVICE_FOLDER = Path(of_service.__file__).parent
CLIENT_FOLDER = Path(quintet_client.__file__).parent


@pytest.mark.parametrize("name", ["grpc_service_pb2.py", "grpc_service_pb2.pyi"])
def test_the_clients_copy_is_the_services(name: str) -> None:
    assert (CLIENT_FOLDER / name).read_bytes() == (SERVICE_FOLDER / name).read_bytes()


def test_what_was_generated_is_what_the_proto_says(tmp_path: Path) -> None:
    written = descriptor_pb2.FileDescriptorProto.FromString(generator.describe(tmp_path))
    generated = descriptor_pb2.FileDescriptorProto.FromString(of_service.DESCRIPTOR.serialized_pb)
    assert written == generated, "run `make proto`"


def _public(name: str) -> Any:
    for module in (service_pb2, model_config_pb2):
        if name in module.DESCRIPTOR.message_types_by_name:
            return module.DESCRIPTOR.message_types_by_name[name]
    raise AssertionError(f"the public protocol has no {name}")


@pytest.mark.parametrize("name", sorted(of_service.DESCRIPTOR.message_types_by_name))
def test_every_field_is_where_the_public_protocol_has_it(name: str) -> None:
    def compare(ours: Any, theirs: Any) -> None:
        for one in ours.fields:
            other = theirs.fields_by_name[one.name]
            assert (one.number, one.type, one.is_repeated) == (other.number, other.type, other.is_repeated), (
                one.name
            )
        for nested in ours.nested_types:
            compare(nested, theirs.nested_types_by_name[nested.name])

    compare(of_service.DESCRIPTOR.message_types_by_name[name], _public(name))


def test_every_method_is_one_of_the_public_protocol() -> None:
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    for one in of_service.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        other = theirs[one.name]
        assert one.full_name == other.full_name
        assert one.input_type.full_name == other.input_type.full_name
        assert one.output_type.full_name == other.output_type.full_name
        assert (one.client_streaming, one.server_streaming) == (
            other.client_streaming,
            other.server_streaming,
        )


def test_ours_and_the_public_messages_live_side_by_side() -> None:
    request = of_client.ModelInferRequest(model_name="digit", raw_input_contents=[b"raw"])
    request.inputs.add(name="image", datatype="BYTES", shape=[1])
    request.parameters["min_confidence"].double_param = 0.25
    public = service_pb2.ModelInferRequest.FromString(request.SerializeToString())
    assert of_service.ModelInferRequest.FromString(public.SerializeToString()).inputs[0].shape == [1]
    assert public.parameters["min_confidence"].double_param == 0.25
