"""The Open Inference Protocol V2 between its two encodings (REST and gRPC) and a room.

Both doors turn their bytes into `InputTensor`s and take `OutputTensor`s back; what the
tensors must look like is checked here, once. Where the specification is silent we do as
Triton does: an empty list of outputs means all of them, names must be known, and the
first axis is the batch.

Specification: https://github.com/kserve/open-inference-protocol
"""

import base64
import binascii
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from service.batcher import Priority
from service.catalogue import READY
from service.data_plane import DataPlane
from service.errors import BadInput
from service.loaded_model import Lapse, LoadedModel
from service.models.spec import NUMPY_TYPES, Answer, Array, Inputs, Room, Tensor

MAX_ELEMENTS: Final = 1 << 31
"""No shape may speak of more elements than this, whatever its body holds."""

PLATFORM: Final = "onnxruntime_onnx"

EXTENSIONS: Final = (
    "classification",
    "model_repository",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "schedule_policy",
)

MAX_CLASSES: Final = 1 << 31


class InputTensor(NamedTuple):
    """One input as it was sent: `values` is flat or shaped, of the datatype's numpy type."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Array


class OutputTensor(NamedTuple):
    """One output to send: `values` has its whole shape, the batch axis first."""

    tensor: Tensor
    values: Array


def check_shape(name: str, shape: Sequence[Any], max_inputs: int) -> tuple[int, ...]:
    """A shape that was sent, as whole numbers.

    Raises:
        BadInput: it is empty, negative, of more inputs than a request may have, or of more
            elements than fit anywhere.
    """
    for axis in shape:
        if type(axis) is not int or axis < 0:
            raise BadInput(f"The shape of input {name!r} must be whole numbers from 0 up.")
    if not shape or len(shape) > 8:
        raise BadInput(f"The shape of input {name!r} must have 1 to 8 axes, the batch first.")
    # Here already: taking millions of elements apart, only to refuse them, would take seconds.
    if shape[0] > max_inputs:
        raise BadInput(f"The request has {shape[0]} inputs; send 1 to {max_inputs}.")
    if math.prod(shape) > MAX_ELEMENTS:
        raise BadInput(f"The shape of input {name!r} has more elements than a request can hold.")
    return tuple(shape)


def from_raw(name: str, datatype: str, shape: tuple[int, ...], raw: bytes | memoryview) -> InputTensor:
    """A tensor from its binary form: little-endian, row-major; `BYTES` elements after their length.

    Raises:
        BadInput: unknown datatype, or more or fewer bytes than the shape asks for.
    """
    dtype = _dtype(name, datatype)
    count = math.prod(shape)
    if datatype == "BYTES":
        return InputTensor(name, datatype, shape, _split_bytes(name, raw, count))
    if len(raw) != count * dtype.itemsize:
        raise BadInput(
            f"Input {name!r} has {len(raw)} bytes; {datatype} {list(shape)} takes {count * dtype.itemsize}."
        )
    return InputTensor(name, datatype, shape, np.frombuffer(raw, dtype))


def from_json(room: Room, name: str, datatype: str, shape: tuple[int, ...], data: Any) -> InputTensor:
    """A tensor from its JSON form: flat or nested lists of numbers, booleans or texts.

    A picture's bytes are not text, so JSON carries them in base64.

    Raises:
        BadInput: unknown datatype, or values that do not fit it or the shape.
    """
    dtype = _dtype(name, datatype)
    values = _flatten(data)
    if len(values) != math.prod(shape):
        raise BadInput(
            f"Input {name!r} has {len(values)} values; its shape {list(shape)} takes {math.prod(shape)}."
        )
    if datatype == "BYTES":
        if not all(isinstance(value, str) for value in values):
            raise BadInput(f"Input {name!r} is BYTES: its values must be texts.")
        decode = decode_base64 if room.takes == "pictures" else str.encode
        elements = np.empty(len(values), np.object_)
        elements[:] = [decode(value) for value in values]
        return InputTensor(name, datatype, shape, elements)
    wanted = bool if datatype == "BOOL" else (int, float) if datatype.startswith("FP") else int
    if not all(isinstance(value, wanted) and (wanted is bool or type(value) is not bool) for value in values):
        raise BadInput(f"Input {name!r} is {datatype}: a value is of another type.")
    try:
        return InputTensor(name, datatype, shape, np.array(values, dtype))
    except OverflowError:
        raise BadInput(f"Input {name!r} has a value outside the range of {datatype}.") from None


def from_values(name: str, datatype: str, shape: tuple[int, ...], values: Array) -> InputTensor:
    """A tensor from a flat array of another numeric type (gRPC carries UINT8 as uint32).

    Raises:
        BadInput: unknown datatype, a wrong number of values, or values outside its range.
    """
    dtype = _dtype(name, datatype)
    if len(values) != math.prod(shape):
        raise BadInput(
            f"Input {name!r} has {len(values)} values; its shape {list(shape)} takes {math.prod(shape)}."
        )
    converted = values.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(converted, values):
        raise BadInput(f"Input {name!r} has a value outside the range of {datatype}.")
    return InputTensor(name, datatype, shape, converted)


def decode_base64(text: str) -> bytes:
    """The bytes that a base64 text stands for; a data URL's prefix is forgiven.

    Raises:
        BadInput: the text is not base64.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadInput("A picture in JSON must be base64 text.") from None


def to_inputs(room: Room, tensors: Sequence[InputTensor], parameters: Mapping[str, Any]) -> list[Inputs]:
    """Check tensors against what the room takes, and split them into one mapping per input.

    The room's options ride as parameters of the request; one that is not named is left out.

    Raises:
        BadInput: unknown names, a datatype or shape that is not the room's, unequal batches, or
            an option out of its range.
    """
    names = {tensor.name for tensor in tensors}
    chosen = next((wanted for wanted in room.inputs if names == {tensor.name for tensor in wanted}), None)
    if chosen is None or len(tensors) != len(names):
        choices = " or ".join("+".join(tensor.name for tensor in wanted) for wanted in room.inputs)
        raise BadInput(f"The model {room} takes the input {choices}, each once.")
    sent = {tensor.name: tensor for tensor in tensors}
    batch = tensors[0].shape[0]
    columns = {}
    for wanted in chosen:
        tensor = sent[wanted.name]
        if tensor.datatype != wanted.datatype:
            raise BadInput(f"Input {wanted.name!r} must be {wanted.datatype}.")
        # A column [n, 1] stands for [n]: public clients send both.
        shape = tensor.shape[1:] if wanted.shape or tensor.shape[1:] != (1,) else ()
        fits = len(shape) == len(wanted.shape) and all(
            want in (-1, have) for have, want in zip(shape, wanted.shape, strict=True)
        )
        if not fits:
            whole = ", ".join(["n", *("any" if axis < 0 else str(axis) for axis in wanted.shape)])
            raise BadInput(f"Input {wanted.name!r} must have the shape [{whole}].")
        if tensor.shape[0] != batch:
            raise BadInput("All inputs must have the same first axis.")
        columns[wanted.name] = tensor.values.reshape(batch, *shape)
    inputs = [{name: column[row] for name, column in columns.items()} for row in range(batch)]
    options = {
        name: option.check(name, parameters[name])
        for name, option in room.options.items()
        if name in parameters
    }
    return [{**one, **options} for one in inputs] if options else inputs  # type: ignore[return-value]


class Wanted(NamedTuple):
    """An output as the caller wants it: `classes` likeliest values with their labels, or (0) all values."""

    tensor: Tensor
    is_binary: bool = False
    classes: int = 0


def wanted_outputs(
    room: Room, asked: Sequence[tuple[str, Mapping[str, Any]]], *, is_binary: bool = False
) -> list[Wanted]:
    """The outputs asked for by name and parameters, or all of them.

    Raises:
        BadInput: the room gives no such output, or not in that way.
    """
    if not asked:
        return [Wanted(tensor, is_binary) for tensor in room.outputs]
    known = {tensor.name: tensor for tensor in room.outputs}
    wanted = {}
    for name, parameters in asked:
        tensor = known.get(name)
        if tensor is None:
            raise BadInput(f"The model {room} has no such output; it has {', '.join(known)}.")
        refuse_shared_memory(parameters)
        classes = parameters.get("classification", 0)
        if type(classes) is not int or not 0 <= classes <= MAX_CLASSES:
            raise BadInput("The parameter classification must be a whole number, how many classes to give.")
        if classes and tensor.datatype == "BYTES":
            raise BadInput(f"Output {name!r} is BYTES: it has no values that could be ranked.")
        wanted[name] = Wanted(tensor, parameters.get("binary_data", is_binary) is True, classes)
    return list(wanted.values())


class Wishes(NamedTuple):
    """What a request's own parameters say of its turn: the seconds it may take, and whom it goes before."""

    seconds: float | None
    priority: Priority


def wishes(parameters: Mapping[str, Any]) -> Wishes:
    """Triton's `timeout` (microseconds; 0: none) and `priority` (1 is the highest; 0: the usual one).

    Raises:
        BadInput: they are not whole numbers from 0 up.
    """
    for name in ("timeout", "priority"):
        value = parameters.get(name, 0)
        if type(value) is not int or value < 0:
            raise BadInput(f"The parameter {name} must be a whole number from 0 up.")
    # As Triton does, a level that there is not means the usual one.
    levels = {1: Priority.HIGH, 3: Priority.LOW}
    microseconds = parameters.get("timeout", 0)
    return Wishes(
        microseconds / 1e6 if microseconds else None,
        levels.get(parameters.get("priority", 0), Priority.NORMAL),
    )


def refuse_shared_memory(parameters: Mapping[str, Any]) -> None:
    """Say that tensors travel in the request itself.

    Raises:
        BadInput: the parameters name a region of shared memory.
    """
    if "shared_memory_region" in parameters:
        raise BadInput("Shared memory is not supported by this service; send the data in the request.")


def to_outputs(
    room: Room, answers: Sequence[Answer], wanted: Sequence[Wanted]
) -> list[tuple[Wanted, OutputTensor]]:
    """Answers to one tensor for each output; shorter rows are padded as the room's datatype asks.

    Unequal lengths (boxes of several pictures) are filled up with -1 for whole numbers and 0 else.
    """
    outputs = []
    for one in wanted:
        name = one.tensor.name
        column = _column(one.tensor, [answer.as_tensor(name) for answer in answers])
        if one.classes:
            output = OutputTensor(Tensor(one.tensor.name, "BYTES"), _classes(room, column, one.classes))
        else:
            output = OutputTensor(one.tensor, column)
        outputs.append((one, output))
    return outputs


def _classes(room: Room, column: Array, count: int) -> Array:
    """Each row's greatest values as Triton writes them, `value:index:label`: bytes [n, count].

    The label is left out where the values are not one for each label.
    """
    flat = column.reshape(len(column), -1)
    count = min(count, flat.shape[1])
    labels = room.labels if flat.shape[1] == len(room.labels) else None
    classes = np.empty((len(flat), count), np.object_)
    for row, values in zip(classes, flat, strict=True):
        for place, index in enumerate(np.argsort(-values.astype(np.float64), kind="stable")[:count]):
            value = f"{values[index]:.6f}" if values.dtype.kind == "f" else str(values[index])
            label = f":{labels[index]}" if labels else ""
            row[place] = f"{value}:{index}{label}".encode()
    return classes


def to_raw(output: OutputTensor) -> bytes:
    """A tensor in its binary form."""
    if output.tensor.datatype == "BYTES":
        return b"".join(struct.pack("<I", len(value)) + value for value in output.values.ravel())
    return output.values.tobytes()


def to_json(output: OutputTensor) -> list[Any]:
    """A tensor's values as a flat list for JSON; `BYTES` as text."""
    if output.tensor.datatype == "BYTES":
        return [value.decode() for value in output.values.ravel()]
    values: list[Any] = output.values.ravel().tolist()
    return values


def _column(tensor: Tensor, values: list[Any]) -> Array:
    if tensor.datatype == "BYTES":
        column = np.empty(len(values), np.object_)
        column[:] = values
        return column
    arrays = [np.asarray(value, tensor.dtype) for value in values]
    if len(arrays) == 1:
        return arrays[0][np.newaxis]
    if len({array.shape for array in arrays}) == 1:
        return np.stack(arrays)
    longest = np.max([array.shape for array in arrays], axis=0)
    column = np.full((len(arrays), *longest), -1 if tensor.datatype == "INT64" else 0, tensor.dtype)
    for row, array in zip(column, arrays, strict=True):
        row[tuple(slice(length) for length in array.shape)] = array
    return column


def _dtype(name: str, datatype: Any) -> np.dtype[Any]:
    for known, dtype in NUMPY_TYPES.items():
        if known == datatype:
            return dtype
    raise BadInput(f"Input {name!r} has a datatype we do not take; we take {', '.join(NUMPY_TYPES)}.")


def _split_bytes(name: str, raw: bytes | memoryview, count: int) -> Array:
    elements: list[bytes] = []
    position, end = 0, len(raw)
    while position + 4 <= end and len(elements) < count:
        (length,) = struct.unpack_from("<I", raw, position)
        position += 4
        if length > end - position:
            break
        elements.append(bytes(raw[position : position + length]))
        position += length
    if position != end or len(elements) != count:
        raise BadInput(f"Input {name!r} does not hold {count} elements, each after its length in four bytes.")
    column = np.empty(count, np.object_)
    column[:] = elements
    return column


def _flatten(data: Any) -> list[Any]:
    """Nested lists to one; without recursion, for callers choose the depth."""
    if not isinstance(data, list):
        raise BadInput('The "data" of an input must be a list.')
    flat = data
    while any(isinstance(value, list) for value in flat):
        if not all(isinstance(value, list) for value in flat):
            raise BadInput('The "data" of an input must be nested evenly.')
        flat = [value for inner in flat for value in inner]
    return flat


def model_metadata(plane: DataPlane, loaded: LoadedModel) -> dict[str, Any]:
    """What the protocol calls a model's metadata; alternatives of inputs stand side by side."""
    room = loaded.room
    return {
        "name": room.name,
        "versions": plane.versions(room.name),
        "platform": PLATFORM,
        "inputs": [_described(tensor) for tensors in room.inputs for tensor in tensors],
        "outputs": [_described(tensor) for tensor in room.outputs],
    }


def model_config(plane: DataPlane, loaded: LoadedModel) -> dict[str, Any]:
    """A model's configuration in the form that Triton's clients ask for; labels ride as a parameter."""
    room = loaded.room
    return {
        "name": room.name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "max_batch_size": plane.settings.max_inputs,
        "input": [
            {**_configured(tensor), "optional": len(room.inputs) > 1}
            for tensors in room.inputs
            for tensor in tensors
        ],
        "output": [_configured(tensor) for tensor in room.outputs],
        "dynamic_batching": {
            "max_queue_delay_microseconds": round(plane.settings.batch_window_ms * 1000),
            "preserve_ordering": True,
        },
        "parameters": {"labels": {"string_value": json.dumps(room.labels, ensure_ascii=False)}},
    }


def statistics(plane: DataPlane, loaded: Sequence[LoadedModel]) -> dict[str, Any]:
    """Statistics of model versions, times in nanoseconds; reads files."""
    return {
        "model_stats": [
            {
                "name": one.room.name,
                "version": one.version,
                "last_inference": round(found.last_inference * 1000),
                "inference_count": found.inferences,
                "execution_count": found.executions,
                "inference_stats": {
                    "success": _lapse(found.success),
                    "fail": _lapse(found.fail),
                    "queue": _lapse(found.queue),
                    "compute_input": _lapse(found.compute_input),
                    "compute_infer": _lapse(found.compute_infer),
                    "compute_output": _lapse(found.compute_output),
                    "cache_hit": _lapse(Lapse(0, 0.0)),
                    "cache_miss": _lapse(Lapse(0, 0.0)),
                },
                "batch_stats": [
                    {
                        "batch_size": size,
                        # Turning inputs into tensors and rows into answers is no batch's work here.
                        "compute_input": _lapse(Lapse(0, 0.0)),
                        "compute_infer": _lapse(lapse),
                        "compute_output": _lapse(Lapse(0, 0.0)),
                    }
                    for size, lapse in found.batches.items()
                ],
            }
            for one, found in zip(loaded, plane.statistics(loaded), strict=True)
        ]
    }


def _lapse(lapse: Lapse) -> dict[str, int]:
    return {"count": lapse.count, "ns": round(lapse.seconds * 1e9)}


def index(plane: DataPlane, *, only_ready: bool = False) -> list[dict[str, str]]:
    """The model repository's index."""
    return [
        {"name": entry.model, "version": entry.version, "state": entry.state, "reason": entry.reason}
        for entry in plane.catalogue.index()
        if entry.state == READY or not only_ready
    ]


def refuse_overrides(parameters: Iterable[str]) -> None:
    """Say that a model is loaded as the repository has it.

    Raises:
        BadInput: the parameters of a load bring a configuration or files.
    """
    if any(name == "config" or name.startswith("file:") for name in parameters):
        raise BadInput("A model is loaded as the repository has it; send neither config nor files.")


def _described(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": [-1, *tensor.shape]}


def _configured(tensor: Tensor) -> dict[str, Any]:
    kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    # A scalar per input is one axis of one in Triton's configuration, where none is not allowed.
    return {"name": tensor.name, "data_type": f"TYPE_{kind}", "dims": list(tensor.shape) or [1]}
