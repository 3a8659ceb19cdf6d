"""What a request asks of a model: what its head says, then its body, and how the answer is told.

A caller's requests mostly begin with the same bytes. What those say is a value of its own, a
`Question`, so that a door need find it out only once, and read bodies with it from then on.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
import orjson

from service import open_inference
from service.batcher import Job, Priority
from service.bodies import Parameters, Reader, prefers_picture, read_query, reader_of
from service.data_plane import OPEN_INFERENCE_REST, REST
from service.errors import BadInput
from service.http import Request, Response, json_response, read_json
from service.loaded_model import LoadedModel
from service.models.spec import Answer, Inputs, Room
from service.open_inference import InputTensor, OutputTensor, Wanted

HEADER_LENGTH: Final = b"inference-header-content-length"

REQUEST_ID: Final = b"x-request-id"
MAX_REQUEST_ID: Final = 128

MOST_FORMS: Final = 16
LONGEST_FORM: Final = 1024
"""In bytes: more JSON before binary tensors is read anew each time."""


class Asked(NamedTuple):
    """What a whole request asks for.

    Attributes:
        inputs: One mapping by tensor name for each input.
        seconds: What its caller allows it; None for no end.
        priority: Whom it goes before.
        wanted: The outputs that a machine wants.
        id: A machine's own name for the request, which it gets back.
        heads: The JSON before the answer's binary tensors by the version that answers, where it is the
            same for all requests of a form; None where it is not.
    """

    inputs: list[Inputs]
    seconds: float | None
    priority: Priority
    wanted: Sequence[Wanted] = ()
    id: str | None = None
    heads: dict[str, bytes] | None = None

    def deadline(self, started: float) -> float | None:
        """When to give up, by `time.monotonic`, on a request that came at `started` (`time.perf_counter`)."""
        if self.seconds is None:
            return None
        return time.monotonic() + self.seconds - (time.perf_counter() - started)


@dataclass(frozen=True, kw_only=True)
class Question(ABC):
    """What the head of a request to a model says.

    Attributes:
        room: The model's.
        version: The one asked for; None for the highest.
        seconds: What its caller allows it, if the head says so.
        request_id: The caller's name for it; empty for none.
        accepts: The header `accept-encoding`; None for none.
    """

    protocol: ClassVar[str]
    """How the metrics name it."""

    room: Room
    version: str | None = None
    seconds: float | None
    request_id: str
    accepts: bytes | None

    @abstractmethod
    def read(self, body: bytes, max_inputs: int) -> Asked:
        """What the request asks for, from its whole, decompressed body.

        Raises:
            BadInput: it is not as it should be.
        """

    @abstractmethod
    def told(self, loaded: LoadedModel, asked: Asked, answers: Sequence[Answer], job: Job) -> Response:
        """The answers, as whoever asks in this way wants to be told."""


def _said_of_all(request: Request) -> dict[str, Any]:
    """What every question has from the head.

    Raises:
        BadInput: a header has no meaning.
    """
    headers = request.headers
    return {
        "seconds": _seconds(headers.get(b"quintet-timeout-ms")),
        "request_id": request_id(request),
        "accepts": headers.get(b"accept-encoding"),
    }


def request_id(request: Request) -> str:
    """The caller's own name for the request, if it is one that a log can hold."""
    value = request.headers.get(REQUEST_ID)
    if value is None or len(value) > MAX_REQUEST_ID or not value.isascii():
        return ""
    text = value.decode()
    return text if text.isprintable() else ""


def _seconds(value: bytes | None) -> float | None:
    if value is None:
        return None
    try:
        milliseconds = float(value)
    except ValueError:
        milliseconds = -1.0
    if not 0 < milliseconds <= 86_400_000:
        raise BadInput("Quintet-Timeout-Ms must be a number of milliseconds above 0, of a day at most.")
    return milliseconds / 1000


def _priority(value: bytes | None) -> Priority:
    if value is None:
        return Priority.NORMAL
    try:
        return Priority[value.decode().upper()]
    except (KeyError, UnicodeDecodeError):
        raise BadInput("Quintet-Priority must be high, normal or low.") from None


# ---- for people ----


@dataclass(frozen=True, kw_only=True)
class PeoplesQuestion(Question):
    """`POST /<model>`.

    Attributes:
        priority: Whom it goes before.
        reader: Reads a body of the type that the head says.
        parameters: Of that type.
        options: The room's, as the address names them.
        wants_picture: Whether the caller would rather have a picture than JSON.
    """

    protocol: ClassVar[str] = REST
    priority: Priority
    reader: Reader
    parameters: Parameters
    options: Mapping[str, float]
    wants_picture: bool

    def read(self, body: bytes, max_inputs: int) -> Asked:
        """The inputs in a body, each with the options."""
        inputs = self.reader(body, self.parameters, max_inputs)
        if self.options:
            inputs = [{**one, **self.options} for one in inputs]
        return Asked(inputs, self.seconds, self.priority)

    def told(self, loaded: LoadedModel, asked: Asked, answers: Sequence[Answer], job: Job) -> Response:
        """JSON, and in the headers how it went."""
        return json_response(
            {
                "model": self.room.name,
                "version": loaded.version,
                "predictions": [answer.as_json() for answer in answers],
            },
            (
                (b"quintet-batch-size", b"%d" % job.batch_size),
                (
                    b"server-timing",
                    b"queue;dur=%.3f, compute;dur=%.3f"
                    % (job.queue_seconds * 1000, job.compute_seconds * 1000),
                ),
            ),
        )


def from_people(room: Room, request: Request) -> PeoplesQuestion:
    """What the head of `POST /<model>` asks.

    Raises:
        UnsupportedMediaType: nobody reads a body of its type.
        BadInput: a header or a parameter of the address has no meaning.
    """
    said = _said_of_all(request)
    kind, parameters = request.media_type()
    return PeoplesQuestion(
        room=room,
        priority=_priority(request.headers.get(b"quintet-priority")),
        reader=reader_of(room, kind),
        parameters=parameters,
        options=read_query(room, request.query) if request.query or room.options else {},
        wants_picture=room.as_picture is not None and prefers_picture(request.headers.get(b"accept", b"")),
        **said,
    )


# ---- for machines ----


class Column(NamedTuple):
    """Where one tensor lies in a request's binary part, and what it is."""

    name: str
    dtype: np.dtype[Any]
    values: int
    start: int
    shape: tuple[int, ...]


class Form(NamedTuple):
    """What the JSON before binary tensors says: the same text is the same form, whatever follows it.

    Attributes:
        columns: One for each tensor.
        size: Of all of them, in bytes.
        options: The room's, which join each input.
        asked: The rest, without inputs.
    """

    columns: Sequence[Column]
    size: int
    options: Mapping[str, float]
    asked: Asked

    def fill(self, body: bytes, start: int) -> Asked:
        """What a request of this form asks for, whose tensors begin at `start` of its body."""
        columns = [
            (name, np.frombuffer(body, dtype, values, start + offset).reshape(shape))
            for name, dtype, values, offset, shape in self.columns
        ]
        rows = range(self.columns[0].shape[0])
        inputs: list[Inputs] = [
            {**{name: values[row] for name, values in columns}, **self.options} for row in rows
        ]
        return self.asked._replace(inputs=inputs)


@dataclass(frozen=True, kw_only=True)
class MachinesQuestion(Question):
    """`POST /v2/models/<model>/infer`.

    Attributes:
        head_length: How much of the body is JSON, where binary tensors follow it.
        forms: By their JSON, those that have been read; None where nothing is kept.
    """

    protocol: ClassVar[str] = OPEN_INFERENCE_REST
    head_length: int | None
    forms: dict[bytes, Form] | None = field(default=None, compare=False)

    def read(self, body: bytes, max_inputs: int) -> Asked:
        """The tensors that a body describes and, where they are binary, has behind the description."""
        length = self.head_length
        if length is not None and length > len(body):
            raise _bad_length()
        text = body if length is None else body[:length]
        if self.forms and length is not None:
            form = self.forms.get(text)
            if form is not None and form.size == len(body) - length:
                return form.fill(body, length)
        head = read_json(text)
        parameters = parameters_of(head)
        binary = memoryview(body)[len(text) :]
        tensors = _tensors(self.room, head, binary, max_inputs)
        inputs = open_inference.to_inputs(self.room, tensors, parameters)
        seconds, priority = open_inference.wishes(parameters)
        if self.seconds is not None:
            seconds = self.seconds if seconds is None else min(seconds, self.seconds)
        wanted = open_inference.wanted_outputs(
            self.room, _asked_outputs(head), is_binary=parameters.get("binary_data_output") is True
        )
        name = head.get("id")
        asked = Asked(inputs, seconds, priority, wanted, name if isinstance(name, str) else None)
        if self.forms is not None and length is not None and length <= LONGEST_FORM:
            self._keep(text, tensors, asked, len(binary))
        return asked

    def _keep(self, text: bytes, tensors: Sequence[InputTensor], asked: Asked, size: int) -> None:
        """Remember a form, if what its tensors may hold hangs on their sizes alone, and all are binary."""
        assert self.forms is not None, "only a question that is kept keeps forms"
        rows, first = len(asked.inputs), asked.inputs[:1]
        columns, start = [], 0
        for name, datatype, _, values in tensors:
            if datatype == "BYTES" or not first:
                return
            columns.append(Column(name, values.dtype, values.size, start, (rows, *first[0][name].shape)))
            start += values.nbytes
        if start != size:
            return
        if len(self.forms) >= MOST_FORMS:
            self.forms.clear()
        names = {column.name for column in columns}
        options = {name: value for name, value in first[0].items() if name not in names}
        is_same = all(one.is_binary and one.tensor.is_fixed and not one.classes for one in asked.wanted)
        heads: dict[str, bytes] | None = {} if is_same else None
        self.forms[text] = Form(columns, size, options, asked._replace(inputs=[], heads=heads))

    def told(self, loaded: LoadedModel, asked: Asked, answers: Sequence[Answer], job: Job) -> Response:
        """The tensors wanted, as JSON or behind it."""
        outputs = [
            (output, open_inference.to_raw(output) if one.is_binary else None)
            for one, output in open_inference.to_outputs(self.room, answers, asked.wanted)
        ]
        head = asked.heads.get(loaded.version) if asked.heads else None
        if head is None:
            head = self._head(loaded, asked, outputs)
            if asked.heads is not None:
                asked.heads[loaded.version] = head
        raws = [raw for _, raw in outputs if raw is not None]
        if not raws:
            return Response(200, b"application/json", head)
        length = (HEADER_LENGTH, b"%d" % len(head))
        return Response(200, b"application/octet-stream", b"".join([head, *raws]), (length,))

    def _head(
        self, loaded: LoadedModel, asked: Asked, outputs: Sequence[tuple[OutputTensor, bytes | None]]
    ) -> bytes:
        """The JSON of an answer: what its tensors are, with the values of those that do not follow it."""
        described = []
        for output, raw in outputs:
            said: dict[str, Any] = {
                "name": output.tensor.name,
                "datatype": output.tensor.datatype,
                "shape": list(output.values.shape),
            }
            if raw is None:
                said["data"] = open_inference.to_json(output)
            else:
                said["parameters"] = {"binary_data_size": len(raw)}
            described.append(said)
        answer = {"model_name": self.room.name, "model_version": loaded.version, "outputs": described}
        if asked.id is not None:
            answer["id"] = asked.id
        return orjson.dumps(answer)


def from_machine(
    room: Room, version: str | None, request: Request, forms: dict[bytes, Form] | None = None
) -> MachinesQuestion:
    """What the head of an inference request asks.

    Args:
        room: The model's.
        version: The one asked for; None for the highest.
        request: Its head.
        forms: Where forms are kept for the requests with the same head.

    Raises:
        BadInput: a header has no meaning.
    """
    return MachinesQuestion(
        room=room, version=version, head_length=_head_length(request), forms=forms, **_said_of_all(request)
    )


def _head_length(request: Request) -> int | None:
    value = request.headers.get(HEADER_LENGTH)
    if value is None:
        return None
    # Its own length first: Python refuses to read a number of thousands of digits.
    if not value.isdigit() or len(value) > 20:
        raise _bad_length()
    return int(value)


def _bad_length() -> BadInput:
    return BadInput("Inference-Header-Content-Length must be the length of the JSON before the binary data.")


def _tensors(room: Room, head: Mapping[str, Any], binary: memoryview, max_inputs: int) -> list[InputTensor]:
    """The tensors that an inference request's JSON describes, from it or from the bytes after it."""
    described = head.get("inputs")
    if not isinstance(described, list) or not described:
        raise BadInput('The request must have "inputs", a list of tensors.')
    position, tensors = 0, []
    for one in described:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise BadInput("Every input must be an object with name, shape, datatype and data.")
        name, datatype = one["name"], one.get("datatype")
        if not isinstance(datatype, str) or not isinstance(one.get("shape"), list):
            raise BadInput(f'Input {name!r} must have a "datatype" and a "shape".')
        shape = open_inference.check_shape(name, one["shape"], max_inputs)
        parameters = parameters_of(one)
        open_inference.refuse_shared_memory(parameters)
        size = parameters.get("binary_data_size")
        if size is None:
            tensors.append(open_inference.from_json(room, name, datatype, shape, one.get("data")))
            continue
        if type(size) is not int or not 0 <= size <= len(binary) - position:
            raise BadInput(f"Input {name!r} says a binary_data_size that the body does not have.")
        raw = binary[position : position + size]
        tensors.append(open_inference.from_raw(name, datatype, shape, raw))
        position += size
    if position != len(binary):
        raise BadInput("The body has more binary data than its inputs name.")
    return tensors


def parameters_of(described: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a request, a tensor or an output; none where they are no object."""
    parameters = described.get("parameters")
    return parameters if isinstance(parameters, dict) else {}


def _asked_outputs(head: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The outputs asked for: their names and parameters."""
    described = head.get("outputs", [])
    if not isinstance(described, list):
        raise BadInput('"outputs" must be a list.')
    for one in described:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            raise BadInput('Every output asked for must be an object with a "name".')
    return [(one["name"], parameters_of(one)) for one in described]
