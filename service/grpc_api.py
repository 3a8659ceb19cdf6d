"""The gRPC door: `inference.GRPCInferenceService`, with health and reflection.

It decodes, asks the data plane, encodes; it decides nothing.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from inspect import isawaitable
from typing import Any, Final, NoReturn, TypeAlias

import grpc
import numpy as np
import structlog
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service import open_inference
from service.data_plane import DataPlane, off_the_loop
from service.errors import BadInput, InternalError, NotSupported, QuintetError
from service.loaded_model import LoadedModel
from service.models.spec import Inputs, Room
from service.open_inference import InputTensor
from service.proto import grpc_service_pb2 as pb
from service.version import VERSION

SERVICE: Final = "inference.GRPCInferenceService"
PROTOCOL: Final = "open-inference-grpc"

CONTENTS: Final = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "BYTES": "bytes_contents",
}
"""The field of `InferTensorContents` that carries each datatype; FP16 travels raw only."""

NOT_SUPPORTED: Final = {
    "TraceSetting": "Tracing is",
    "LogSettings": "Log settings are",
    **{f"{kind}SharedMemory{call}": "Shared memory is" for kind in ("System", "Cuda")
       for call in ("Status", "Register", "Unregister")},
}  # fmt: skip
"""Triton's calls that we have no answer for: they say so, whatever they are sent."""

MAX_REQUEST_ID: Final = 128
"""As much of a caller's name for a request as the log holds."""

STREAM_AHEAD: Final = 64
"""Requests of one stream that may be under way at a time."""

SPARE_CALLS: Final = 256
"""Calls above the plane's own limit that grpc lets in, so that the refusal is ours and names a pause."""

log = structlog.get_logger("quintet")
Context: TypeAlias = Any  # grpc ships no types; it is grpc.aio.ServicerContext


class GrpcDoor:
    """A gRPC server over the data plane, on the event loop of the HTTP server."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()

    async def start(self, address: str) -> None:
        """Listen on `host:port`; the workers of one server share the port.

        Raises:
            RuntimeError: the address cannot be had.
        """
        limit = self._plane.settings.max_body_bytes
        # Several workers open the same port, and the kernel spreads connections over them.
        options = [
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", 1024),
        ]
        server = grpc.aio.server(
            options=options, maximum_concurrent_rpcs=self._plane.settings.max_requests + SPARE_CALLS
        )
        server.add_generic_rpc_handlers((self._handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server, pool=_described_services())
        settings = self._plane.settings
        if settings.tls_certificate is None or settings.tls_key is None:
            server.add_insecure_port(address)
        else:
            pair = (settings.tls_key.read_bytes(), settings.tls_certificate.read_bytes())
            server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        await self.update_health()
        await server.start()
        self._server = server

    async def update_health(self) -> None:
        """Tell the health service whether work is taken."""
        serving = health_pb2.HealthCheckResponse.ServingStatus
        status = serving.SERVING if self._plane.is_ready else serving.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def stop(self, grace_seconds: float) -> None:
        """Refuse new calls, finish those under way, close."""
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(grace_seconds)

    def _handlers(self) -> grpc.GenericRpcHandler:
        calls: dict[str, Callable[[Any], Any]] = {
            "ServerLive": lambda request: pb.ServerLiveResponse(live=True),
            "ServerReady": lambda request: pb.ServerReadyResponse(ready=self._plane.is_ready),
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
        }
        admin_calls = {"RepositoryModelLoad": self._load, "RepositoryModelUnload": self._unload}
        methods = {name: self._unary(name, self._plain(call)) for name, call in calls.items()}
        for name, call in admin_calls.items():
            methods[name] = self._unary(name, self._plain(call, is_admin=True))
        methods["ModelInfer"] = self._unary("ModelInfer", self._infer)
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self._stream,
            request_deserializer=_lenient(pb.ModelInferRequest.FromString),
            response_serializer=pb.ModelStreamInferResponse.SerializeToString,
        )
        for name, words in NOT_SUPPORTED.items():
            methods[name] = grpc.unary_unary_rpc_method_handler(self._not_supported(words))
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _plain(
        self, call: Callable[[Any], Any], *, is_admin: bool = False
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        async def answer(request: Any, context: Context) -> Any:
            try:
                self._check_key(context)
                if is_admin:
                    self._plane.check_admin_key(_authorization(context))
                answered = call(_whole(request))
                return await answered if isawaitable(answered) else answered
            except QuintetError as error:
                failure = error
            except Exception:
                failure = InternalError()
                log.exception("a call failed", id=failure.id)
            await _abort(context, failure)

        return answer

    def _unary(self, name: str, call: Callable[[Any, Context], Awaitable[Any]]) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(
            call,
            request_deserializer=_lenient(getattr(pb, f"{name}Request").FromString),
            response_serializer=getattr(pb, f"{name}Response").SerializeToString,
        )

    def _check_key(self, context: Context) -> None:
        self._plane.check_key(_authorization(context))

    def _model_ready(self, request: Any) -> Any:
        self._plane.find(request.name, request.version)
        return pb.ModelReadyResponse(ready=True)

    def _server_metadata(self, request: Any) -> Any:
        extensions = open_inference.EXTENSIONS
        return pb.ServerMetadataResponse(name="quintet", version=VERSION, extensions=extensions)

    def _model_metadata(self, request: Any) -> Any:
        loaded = self._plane.find(request.name, request.version)
        described = open_inference.model_metadata(self._plane, loaded)
        return json_format.ParseDict(described, pb.ModelMetadataResponse())

    def _model_config(self, request: Any) -> Any:
        loaded = self._plane.find(request.name, request.version)
        config = open_inference.model_config(self._plane, loaded)
        return json_format.ParseDict({"config": config}, pb.ModelConfigResponse())

    async def _model_statistics(self, request: Any) -> Any:
        loaded = self._plane.find_all(request.name, request.version)
        statistics = await asyncio.to_thread(open_inference.statistics, self._plane, loaded)
        return json_format.ParseDict(statistics, pb.ModelStatisticsResponse())

    def _repository_index(self, request: Any) -> Any:
        models = open_inference.index(self._plane, only_ready=request.ready)
        return json_format.ParseDict({"models": models}, pb.RepositoryIndexResponse())

    async def _load(self, request: Any) -> Any:
        open_inference.refuse_overrides(request.parameters)
        await self._plane.load_model(request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def _unload(self, request: Any) -> Any:
        await self._plane.unload_model(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    def _not_supported(self, words: str) -> Callable[[bytes, Context], Awaitable[NoReturn]]:
        async def answer(request: bytes, context: Context) -> NoReturn:
            await _abort(context, NotSupported(f"{words} not supported by this service."))

        return answer

    async def _infer(self, request: Any, context: Context) -> Any:
        response, failure = await self._answered(request, context)
        if failure is not None:
            await _abort(context, failure)
        return response

    async def _stream(self, requests: AsyncIterable[Any], context: Context) -> AsyncIterator[Any]:
        """Answer the requests of a stream in their order, several of them under way at a time.

        One that fails is told so in its answer; the stream goes on.
        """
        under_way: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue(STREAM_AHEAD)

        async def read() -> None:
            # However the requests end, what came before is answered.
            with contextlib.suppress(Exception):
                async for request in requests:
                    await under_way.put(asyncio.create_task(self._stream_answer(request, context)))
            await under_way.put(None)

        reading = asyncio.create_task(read())
        try:
            while True:
                answering = await under_way.get()
                if answering is None:
                    return
                yield await answering
        finally:
            reading.cancel()
            while not under_way.empty():
                left = under_way.get_nowait()
                if left is not None:
                    left.cancel()

    async def _stream_answer(self, request: Any, context: Context) -> Any:
        response, failure = await self._answered(request, context)
        if failure is not None:
            whose = pb.ModelInferResponse(id=request.id) if request is not None else None
            return pb.ModelStreamInferResponse(error_message=failure.detail, infer_response=whose)
        if _parameters(request).get("triton_enable_empty_final_response") is True:
            # Ours is the first response and the last; a stream's reader may wait for this mark.
            response.parameters["triton_final_response"].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=response)

    async def _answered(self, request: Any, context: Context) -> tuple[Any, QuintetError | None]:
        """The response to an inference request, or why there is none."""
        started = time.perf_counter()
        loaded: LoadedModel | None = None
        failure: QuintetError | None = None
        response: Any = None
        entered = False
        try:
            self._plane.enter()
            entered = True
            self._check_key(context)
            loaded = self._plane.find(_whole(request).model_name, request.model_version)
            wanted = open_inference.wanted_outputs(
                loaded.room, [(output.name, _parameters(output)) for output in request.outputs]
            )
            parameters = _parameters(request)
            seconds, priority = open_inference.wishes(parameters)
            left = [span for span in (seconds, context.time_remaining()) if span is not None]
            deadline = time.monotonic() + min(left) if left else None
            limit = self._plane.settings.max_inputs
            inputs = await off_the_loop(request.ByteSize(), _inputs, loaded.room, request, parameters, limit)
            answers, _ = await self._plane.predict(loaded, inputs, deadline, priority)
            response = pb.ModelInferResponse(
                model_name=loaded.room.name, model_version=loaded.version, id=request.id
            )
            for _, output in open_inference.to_outputs(loaded.room, answers, wanted):
                response.outputs.add(
                    name=output.tensor.name, datatype=output.tensor.datatype, shape=output.values.shape
                )
                response.raw_output_contents.append(open_inference.to_raw(output))
        except QuintetError as error:
            failure = error
        except asyncio.CancelledError:
            loaded = None  # The caller is gone: there is no outcome to count.
            raise
        except Exception:
            failure = InternalError()
            log.exception("a call failed", id=failure.id)
        finally:
            if entered:
                self._plane.leave()
            if loaded is not None or failure is not None:
                request_id = request.id[:MAX_REQUEST_ID] if request is not None else ""
                self._plane.measure(PROTOCOL, loaded, started, failure, request_id)
        return response, failure


def _authorization(context: Context) -> bytes:
    """What the caller sent under that name; empty for nothing."""
    sent: str | bytes = dict(context.invocation_metadata() or ()).get("authorization", "")
    return sent.encode() if isinstance(sent, str) else sent


def _lenient(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """`read`, with None for a damaged message: grpc itself would answer with the parser's own name."""

    def deserialize(message: bytes) -> Any:
        try:
            return read(message)
        except DecodeError:
            return None

    return deserialize


def _whole(request: Any) -> Any:
    """The request, if it could be read.

    Raises:
        BadInput: it could not.
    """
    if request is None:
        raise BadInput("The message is damaged; send one of the Open Inference Protocol.")
    return request


def _inputs(room: Room, request: Any, parameters: dict[str, Any], limit: int) -> list[Inputs]:
    """The request's tensors, from their raw or their typed form, as the room's inputs."""
    if not request.inputs:
        raise BadInput("The request must have inputs.")
    raws: Sequence[bytes] = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        raise BadInput("raw_input_contents must have one entry for each input, or none at all.")
    tensors = []
    for position, tensor in enumerate(request.inputs):
        shape = open_inference.check_shape(tensor.name, tensor.shape, limit)
        if tensor.parameters:
            open_inference.refuse_shared_memory(_parameters(tensor))
        if raws:
            raw = raws[position]
            tensors.append(open_inference.from_raw(tensor.name, tensor.datatype, shape, raw))
        else:
            tensors.append(_from_contents(tensor, shape))
    return open_inference.to_inputs(room, tensors, parameters)


def _parameters(described: Any) -> dict[str, Any]:
    """A message's parameters as plain values, whichever field carries each."""
    return {
        name: getattr(value, chosen)
        for name, value in described.parameters.items()
        if (chosen := value.WhichOneof("parameter_choice"))
    }


def _from_contents(tensor: Any, shape: tuple[int, ...]) -> InputTensor:
    field = CONTENTS.get(tensor.datatype)
    values = getattr(tensor.contents, field) if field else ()
    if tensor.datatype == "BYTES":
        elements = np.empty(len(values), np.object_)
        elements[:] = list(values)
    else:
        elements = np.array(values)
    return open_inference.from_values(tensor.name, tensor.datatype, shape, elements)


async def _abort(context: Context, error: QuintetError) -> NoReturn:
    """End a call with an error's code and words; `retry-after` and `index` ride as metadata."""
    metadata = []
    if error.retry_after_seconds is not None:
        metadata.append(("retry-after", str(error.retry_after_seconds)))
    if error.index is not None:
        metadata.append(("index", str(error.index)))
    code = grpc.StatusCode[error.grpc_status]
    await context.abort(code, error.detail, tuple(metadata))
    raise AssertionError("abort always raises")


def _described_services() -> Any:
    """All services' descriptions in one pool, ours and the standard ones, for reflection."""
    from google.protobuf import descriptor_pb2, descriptor_pool
    from grpc_reflection.v1alpha import reflection_pb2

    pool = descriptor_pool.DescriptorPool()
    for file in (pb.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        described = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(described)
        pool.Add(described)
    return pool
