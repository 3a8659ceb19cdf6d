"""The gRPC door: `inference.GRPCInferenceService`, with health and reflection.

It decodes, asks the data plane, encodes; it decides nothing. `grpc_calls.py` has the calls, `http2.py` the
connections.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Sequence
from functools import partial
from inspect import isawaitable
from typing import Any, Final

import numpy as np
import structlog
from google.protobuf import json_format

from service import grpc_forms, http2, open_inference
from service.batcher import Job
from service.data_plane import OPEN_INFERENCE_GRPC, DataPlane, off_the_loop
from service.errors import BadInput, InternalError, NotSupported, QuintetError
from service.grpc_calls import Answered, Call, GiveUp, Method, Service, Tell
from service.grpc_forms import Forms, Known
from service.grpc_standard import Health, Reflection, read
from service.loaded_model import LoadedModel
from service.models.spec import Inputs, Room
from service.open_inference import InputTensor
from service.proto import grpc_service_pb2 as pb
from service.version import VERSION

SERVICE: Final = "inference.GRPCInferenceService"

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

SPARE_CALLS: Final = 256
"""Calls above the plane's own limit that are let in, so that its refusal is what callers hear."""

BACKLOG: Final = 2048
"""Connections that may wait for this worker."""

log = structlog.get_logger("quintet")


class GrpcDoor:
    """A gRPC server over the data plane, on the event loop of the HTTP server."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._forms = Forms()
        self._health = Health([SERVICE], lambda: plane.is_ready)
        settings = plane.settings
        service = Service(
            self._methods() | self._health.methods() | Reflection([pb.DESCRIPTOR]).methods(),
            max_message_bytes=settings.max_body_bytes,
            max_calls=settings.max_requests + SPARE_CALLS,
            hold=plane.buffer,
            let_go=plane.leave_bytes,
        )
        self._server = http2.Server(service, http2.Limits())

    async def start(self, host: str, port: int) -> None:
        """Listen; the workers of one server share the port.

        Raises:
            OSError: the address cannot be had.
        """
        settings = self._plane.settings
        tls: ssl.SSLContext | None = None
        if settings.tls_certificate is not None and settings.tls_key is not None:
            tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            tls.load_cert_chain(settings.tls_certificate, settings.tls_key)
            tls.set_alpn_protocols(["h2"])
        await self._server.listen(host, port, tls, BACKLOG)

    def update_health(self) -> None:
        """Tell those who watch the health service whether work is taken."""
        self._health.update()

    async def stop(self, grace_seconds: float) -> None:
        """Send callers elsewhere, finish what is under way, close."""
        self._health.update()
        await self._server.close(grace_seconds)

    def _methods(self) -> dict[bytes, Method]:
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
        methods = {
            # Whether it lives is told to everybody, as over HTTP.
            name: self._plain(name, call, is_open=name in ("ServerLive", "ServerReady"))
            for name, call in calls.items()
        }
        for name, call in admin_calls.items():
            methods[name] = self._plain(name, call, is_admin=True)
        methods["ModelInfer"] = Method(
            self._infer, keeps_deadline=True, ask=partial(self._ask, lambda answer: answer)
        )
        methods["ModelStreamInfer"] = Method(
            self._stream_infer, is_stream=True, keeps_deadline=True, ask=partial(self._ask, _in_stream)
        )
        for name, words in NOT_SUPPORTED.items():
            methods[name] = self._not_supported(words)
        return {f"/{SERVICE}/{name}".encode(): method for name, method in methods.items()}

    def _plain(
        self, name: str, call: Callable[[Any], Any], *, is_admin: bool = False, is_open: bool = False
    ) -> Method:
        kind = getattr(pb, f"{name}Request")

        async def answer(asking: Call, message: bytes) -> bytes:
            if not is_open:
                self._plane.check_key(asking.head.authorization)
            if is_admin:
                self._plane.check_admin_key(asking.head.authorization)
            answered = call(read(kind, message))
            response = await answered if isawaitable(answered) else answered
            return bytes(response.SerializeToString())

        return Method(answer)

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

    def _not_supported(self, words: str) -> Method:
        async def answer(call: Call, message: bytes) -> bytes:
            raise NotSupported(f"{words} not supported by this service.")

        return Method(answer)

    async def _infer(self, call: Call, message: bytes) -> bytes:
        _, response, failure = await self._answered(call, message)
        if failure is not None:
            try:
                raise failure
            finally:
                # The traceback to come holds this frame: without this, a cycle.
                del failure
        return bytes(response.SerializeToString())

    async def _stream_infer(self, call: Call, message: bytes) -> bytes:
        """Answer one request of a stream; one that fails is told so in its answer, and the stream goes on."""
        # Who may not ask at all is not told so once for every request.
        self._plane.check_key(call.head.authorization)
        request, response, failure = await self._answered(call, message)
        if failure is not None:
            return _failed_in_stream(failure, None if request is None else request.id)
        if _parameters(request).get("triton_enable_empty_final_response") is True:
            # Ours is the first response and the last; a stream's reader may wait for this mark.
            response.parameters["triton_final_response"].bool_param = True
        return bytes(pb.ModelStreamInferResponse(infer_response=response).SerializeToString())

    async def _answered(self, call: Call, message: bytes) -> tuple[Any, Any, QuintetError | None]:
        """An inference request, and the response to it or why there is none."""
        started = time.perf_counter()
        loaded: LoadedModel | None = None
        failure: QuintetError | None = None
        request: Any = None
        response: Any = None
        entered = False
        try:
            self._plane.enter()
            entered = True
            self._plane.check_key(call.head.authorization)
            request = read(pb.ModelInferRequest, message)
            loaded = self._plane.find(request.model_name, request.model_version)
            wanted = open_inference.wanted_outputs(
                loaded.room, [(output.name, _parameters(output)) for output in request.outputs]
            )
            parameters = _parameters(request)
            seconds, priority = open_inference.wishes(parameters)
            deadline = call.deadline
            if seconds is not None:
                soonest = time.monotonic() + seconds
                deadline = soonest if deadline is None else min(deadline, soonest)
            limit = self._plane.settings.max_inputs
            inputs = await off_the_loop(len(message), _inputs, loaded.room, request, parameters, limit)
            answers, _ = await self._plane.predict(loaded, inputs, deadline, priority)
            response = pb.ModelInferResponse(
                model_name=loaded.room.name, model_version=loaded.version, id=request.id
            )
            for _, output in open_inference.to_outputs(loaded.room, answers, wanted):
                response.outputs.add(
                    name=output.tensor.name, datatype=output.tensor.datatype, shape=output.values.shape
                )
                response.raw_output_contents.append(open_inference.to_raw(output))
            if loaded.batcher.is_inline:
                self._forms.learn(message, request, loaded, inputs, wanted, response)
        except QuintetError as error:
            # A traceback holds this frame, and the frame the failure: a cycle for the garbage collector.
            failure = error.with_traceback(None)
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
                self._plane.measure(OPEN_INFERENCE_GRPC, loaded, started, failure, request_id)
        return request, response, failure

    # ---- at once ----

    def _ask(
        self, put: Callable[[Answered], Answered], call: Call, message: bytes, tell: Tell
    ) -> GiveUp | None:
        """Answer an inference request of a known form without a task, where all goes well; else None.

        Args:
            put: Makes of an answer, or of what went wrong, what the method answers with.
            call: Whose it is.
            message: The request.
            tell: Takes the answer, later.
        """
        started = time.perf_counter()
        found = self._forms.find(message)
        if found is None:
            return None
        known, start = found
        try:
            self._plane.check_key(call.head.authorization)
            loaded = self._plane.find(known.model, known.version)
        except QuintetError:
            return None
        if loaded.version != known.answered_by:
            return None
        asked = known.form.fill(message, start)
        on_done = partial(self._done, put, known, loaded, started, tell)
        job = self._plane.ask(loaded, asked.inputs, call.deadline, asked.priority, 0, on_done)
        return None if job is None else partial(self._plane.give_up, job)

    def _done(
        self,
        put: Callable[[Answered], Answered],
        known: Known,
        loaded: LoadedModel,
        started: float,
        tell: Tell,
        job: Job,
    ) -> None:
        """Answer a request that `_ask` took."""
        failure = job.error
        try:
            try:
                answer: Answered = failure or known.told(loaded, loaded.answers(job))
            except Exception:
                answer = failure = InternalError()
                log.exception("a call failed", id=failure.id)
            self._plane.leave()
            self._plane.measure(OPEN_INFERENCE_GRPC, loaded, started, failure)
            tell(put(answer))
        except Exception:
            # Others of the same batch still wait for their answers.
            log.exception("an answer could not be given")


def _in_stream(answer: Answered) -> bytes:
    """An answer, or what went wrong, as one of a stream's, for a request without a name."""
    if isinstance(answer, QuintetError):
        return _failed_in_stream(answer, "")
    return grpc_forms.delimited(grpc_forms.IN_STREAM, answer)


def _failed_in_stream(failure: QuintetError, request_id: str | None) -> bytes:
    """What went wrong, told in the place of an answer; the request's name, if it could be read."""
    whose = None if request_id is None else pb.ModelInferResponse(id=request_id)
    response = pb.ModelStreamInferResponse(error_message=failure.detail, infer_response=whose)
    return bytes(response.SerializeToString())


def _inputs(room: Room, request: Any, parameters: dict[str, Any], limit: int) -> list[Inputs]:
    """The request's tensors, from their raw or their typed form, as the room's inputs."""
    if not request.inputs:
        raise BadInput("The request must have inputs.")
    for tensor in request.inputs:
        if tensor.parameters:
            # Before their contents are counted: those in shared memory have none.
            open_inference.refuse_shared_memory(_parameters(tensor))
    raws: Sequence[bytes] = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        raise BadInput("raw_input_contents must have one entry for each input, or none at all.")
    tensors = []
    for position, tensor in enumerate(request.inputs):
        shape = open_inference.check_shape(tensor.name, tensor.shape, limit)
        if raws:
            raw = raws[position]
            tensors.append(open_inference.from_raw(tensor.name, tensor.datatype, shape, raw))
        else:
            tensors.append(_from_contents(tensor, shape))
    return open_inference.to_inputs(room, tensors, parameters)


def _parameters(described: Any) -> dict[str, Any]:
    """A message's parameters as plain values, whichever field carries each."""
    parameters = described.parameters
    if not parameters:
        return {}
    return {
        name: getattr(value, chosen)
        for name, value in parameters.items()
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
