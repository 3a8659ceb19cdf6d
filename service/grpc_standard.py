"""gRPC's standard services: health, and reflection in both its versions."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import DecodeError

from service.errors import BadInput, NotFound
from service.grpc_calls import Call, Method, Status
from service.proto import health_pb2, reflection_pb2

HEALTH: Final = "grpc.health.v1.Health"
REFLECTION: Final = "grpc.reflection.v1.ServerReflection"
REFLECTION_ALPHA: Final = "grpc.reflection.v1alpha.ServerReflection"

Answer = Callable[[Call, bytes], Awaitable[bytes]]


def read(kind: Any, message: bytes) -> Any:
    """A message of this class.

    Raises:
        BadInput: the bytes are none.
    """
    try:
        return kind.FromString(message)
    except DecodeError:
        raise BadInput("The message is damaged; send one of the Open Inference Protocol.") from None


class Health:
    """Says whether work is taken, to whoever asks once and to whoever watches."""

    def __init__(self, services: Iterable[str], is_serving: Callable[[], bool]) -> None:
        self._services = {"", *services}
        self._is_serving = is_serving
        self._changed = asyncio.Event()

    def methods(self) -> dict[bytes, Method]:
        """The service's methods, by their paths."""
        return {
            f"/{HEALTH}/Check".encode(): Method(self._check),
            f"/{HEALTH}/Watch".encode(): Method(self._watch, is_endless=True),
        }

    def update(self) -> None:
        """Tell those who watch."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _status(self, service: str) -> Any:
        kind = health_pb2.HealthCheckResponse
        if service not in self._services:
            return kind.SERVICE_UNKNOWN
        return kind.SERVING if self._is_serving() else kind.NOT_SERVING

    async def _check(self, call: Call, message: bytes) -> bytes:
        service = read(health_pb2.HealthCheckRequest, message).service
        if service not in self._services:
            raise NotFound("There is no such service.")
        return bytes(health_pb2.HealthCheckResponse(status=self._status(service)).SerializeToString())

    async def _watch(self, call: Call, message: bytes) -> bytes:
        service = read(health_pb2.HealthCheckRequest, message).service
        said: Any = None
        while True:
            changed, status = self._changed, self._status(service)
            if status != said:
                said = status
                call.send(health_pb2.HealthCheckResponse(status=status).SerializeToString())
            await changed.wait()


class Reflection:
    """Describes services to programs that know none of them."""

    def __init__(self, files: Iterable[FileDescriptor]) -> None:
        """Describe the services of `files`, and the standard ones."""
        alpha = _renamed(reflection_pb2.DESCRIPTOR, "grpc.reflection.v1alpha", "reflection_v1alpha.proto")
        described = [*map(_as_message, (*files, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)), alpha]
        self._pool = descriptor_pool.DescriptorPool()
        for file in described:
            self._pool.Add(file)
        self._services = sorted(
            f"{file.package}.{service.name}" for file in described for service in file.service
        )

    def methods(self) -> dict[bytes, Method]:
        """The methods of both versions, by their paths: their messages are the same."""
        method = Method(self._answer, is_stream=True)
        return {f"/{name}/ServerReflectionInfo".encode(): method for name in (REFLECTION, REFLECTION_ALPHA)}

    async def _answer(self, call: Call, message: bytes) -> bytes:
        request = read(reflection_pb2.ServerReflectionRequest, message)
        response = reflection_pb2.ServerReflectionResponse(valid_host=request.host, original_request=request)
        asked = request.WhichOneof("message_request")
        try:
            if asked == "list_services":
                for name in self._services:
                    response.list_services_response.service.add(name=name)
            elif asked == "file_by_filename":
                self._describe(response, self._pool.FindFileByName(request.file_by_filename))
            elif asked == "file_containing_symbol":
                self._describe(response, self._pool.FindFileContainingSymbol(request.file_containing_symbol))
            elif asked == "all_extension_numbers_of_type":
                name = self._pool.FindMessageTypeByName(request.all_extension_numbers_of_type).full_name
                response.all_extension_numbers_response.base_type_name = name
            else:
                raise KeyError(asked)
        except KeyError:
            response.error_response.error_code = Status.NOT_FOUND
            response.error_response.error_message = "There is no such file, symbol or extension."
        return bytes(response.SerializeToString())

    def _describe(self, response: Any, file: FileDescriptor) -> None:
        response.file_descriptor_response.file_descriptor_proto.append(file.serialized_pb)


def _as_message(file: FileDescriptor) -> descriptor_pb2.FileDescriptorProto:
    described = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(described)
    return described


def _renamed(file: FileDescriptor, package: str, name: str) -> descriptor_pb2.FileDescriptorProto:
    """The same messages and services in another package."""
    described = _as_message(file)
    old = f".{described.package}."
    described.name, described.package = name, package
    for message in described.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(old, f".{package}.")
    for service in described.service:
        for method in service.method:
            method.input_type = method.input_type.replace(old, f".{package}.")
            method.output_type = method.output_type.replace(old, f".{package}.")
    return described
