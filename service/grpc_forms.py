"""gRPC inference requests that differ from an earlier one in nothing but their numbers.

A caller asks the same of a model again and again. protobuf writes a message's fields in the order of
their numbers, so all that such requests say (the model, the tensor's name and shape, the outputs
wanted) comes first, in the same bytes each time, and the tensor's own bytes come last. What was made
of those first bytes is kept, with the first bytes of the answer, and used again: the message need
not be parsed, nor its answer built field by field.

Encoding: https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from service import open_inference
from service.batcher import Priority
from service.data_plane import QUICK_INPUTS
from service.loaded_model import LoadedModel
from service.models.spec import Answer, Inputs
from service.open_inference import Wanted
from service.proto import grpc_service_pb2 as pb
from service.questions import LONGEST_FORM, Asked, Column, Form

MOST_FORMS: Final = 256
"""That one worker keeps."""


def _tag(kind: Any, field: str) -> bytes:
    """What stands before the length of a field of bytes, or of a message in another."""
    return bytes((kind.DESCRIPTOR.fields_by_name[field].number << 3 | 2,))


RAW_INPUT: Final = _tag(pb.ModelInferRequest, "raw_input_contents")
RAW_OUTPUT: Final = _tag(pb.ModelInferResponse, "raw_output_contents")
IN_STREAM: Final = _tag(pb.ModelStreamInferResponse, "infer_response")


def delimited(tag: bytes, content: bytes) -> bytes:
    """A field of bytes: its tag, its length, and they themselves."""
    return tag + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    """A whole number, seven bits to a byte, the lowest first."""
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)


class Known(NamedTuple):
    """What requests that begin with the same bytes ask for, and how their answers begin.

    Attributes:
        model: The model's name.
        version: The one asked for; empty for the highest.
        answered_by: The version that answered the first of them.
        form: How the tensor is read.
        head: The answer, but for its tensors' bytes.
    """

    model: str
    version: str
    answered_by: str
    form: Form
    head: bytes

    def told(self, loaded: LoadedModel, answers: Sequence[Answer]) -> bytes:
        """A `ModelInferResponse`."""
        outputs = open_inference.to_outputs(loaded.room, answers, self.form.asked.wanted)
        raw = [delimited(RAW_OUTPUT, open_inference.to_raw(output)) for _, output in outputs]
        return b"".join([self.head, *raw])


class Forms:
    """Those that a worker keeps, by the bytes that requests begin with."""

    def __init__(self) -> None:
        self._known: dict[bytes, Known] = {}
        self._starts: dict[int, int] = {}
        """By a message's length, where the tensor began in the latest that was kept."""

    def find(self, message: bytes) -> tuple[Known, int] | None:
        """What is known of a request, and where in it the tensor begins."""
        start = self._starts.get(len(message))
        if start is None:
            return None
        known = self._known.get(message[:start])
        # Two tensors of other lengths may begin at the same place.
        return None if known is None or known.form.size != len(message) - start else (known, start)

    def learn(
        self,
        message: bytes,
        request: Any,
        loaded: LoadedModel,
        inputs: Sequence[Inputs],
        wanted: Sequence[Wanted],
        response: Any,
    ) -> None:
        """Keep what was made of a request, if only its one tensor's bytes may differ in the next.

        Args:
            message: A `ModelInferRequest`, as it came.
            request: The same, parsed.
            loaded: Who answered it.
            inputs: What it brought.
            wanted: What was wanted.
            response: The `ModelInferResponse`.
        """
        # A name of its own is another one each time.
        if request.id or request.parameters or len(request.inputs) != 1 or len(inputs) > QUICK_INPUTS:
            return
        tensor = request.inputs[0]
        if tensor.datatype == "BYTES" or any(-1 in one.tensor.shape for one in wanted):
            return
        if len(request.raw_input_contents) != 1:
            return
        (raw,) = request.raw_input_contents
        start = len(message) - len(raw)
        if not raw or start > LONGEST_FORM:
            return
        # What stands before the tensor must be a message by itself, or its end might be something else's.
        rest = pb.ModelInferRequest(
            model_name=request.model_name,
            model_version=request.model_version,
            inputs=request.inputs,
            outputs=request.outputs,
        )
        first = bytes(rest.SerializeToString()) + RAW_INPUT + _varint(len(raw))
        if message[:start] != first:
            return
        values = inputs[0][tensor.name]
        column = Column(tensor.name, values.dtype, values.size * len(inputs), 0, (len(inputs), *values.shape))
        form = Form([column], len(raw), {}, Asked([], None, Priority.NORMAL, wanted))
        bare = pb.ModelInferResponse()
        bare.CopyFrom(response)
        bare.ClearField("raw_output_contents")
        if len(self._known) >= MOST_FORMS:
            self._known.clear()
            self._starts.clear()
        head = bytes(bare.SerializeToString())
        self._known[first] = Known(request.model_name, request.model_version, loaded.version, form, head)
        self._starts[len(message)] = start
