"""Networks at work: ONNX Runtime sessions, checked against their room and warmed before they serve."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime

from service.models.spec import Array, Room, Sample, Tensor

ONNX_TYPES: Final = {
    "BOOL": "tensor(bool)",
    "UINT8": "tensor(uint8)",
    "INT32": "tensor(int32)",
    "INT64": "tensor(int64)",
    "FP16": "tensor(float16)",
    "FP32": "tensor(float)",
}

WARM_UP_SIZES: Final = (1, 2, 8)
WARM_UP_RUNS: Final = 5


EIGHT_BIT_INSTRUCTIONS: Final = ("amx_int8", "asimddp", "avx512_vnni", "avx_vnni")
"""What processors call the instructions that multiply bytes and add up four products at a time."""


def eight_bit_instructions() -> list[str]:
    """Which of `EIGHT_BIT_INSTRUCTIONS` this processor has; none where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted(set(EIGHT_BIT_INSTRUCTIONS).intersection(flags.split()))


class NetworkMismatch(Exception):
    """The ONNX file is not the network that the room describes."""


class Network:
    """One ONNX graph in one session, for one room.

    The session runs on a single thread: requests are spread over workers and lanes
    instead, which costs no synchronisation inside a run. Safe to run from several
    threads at a time.
    """

    def __init__(self, room: Room, model: bytes) -> None:
        """Open the ONNX file whose bytes are `model`.

        Raises:
            NetworkMismatch: its inputs or outputs are not the room's, or it cannot be opened.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A spinning thread takes the core from the worker beside it.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise NetworkMismatch(f"{room}: ONNX Runtime cannot open the model: {error}") from error
        self.room = room
        self.provider: str = session.get_providers()[0]
        self.seconds_per_input = 0.0
        _check(room, "input", room.network_inputs, session.get_inputs())
        _check(room, "output", room.network_outputs, session.get_outputs())
        self._session = session
        self._inputs = [tensor.name for tensor in room.network_inputs]
        self._outputs = [tensor.name for tensor in room.network_outputs]

    def run(self, samples: Sequence[Sample]) -> list[tuple[Array, ...]]:
        """Run the network once over all samples; one row of outputs each, in order."""
        feed = {
            name: _stack([sample.tensors[position] for sample in samples])
            for position, name in enumerate(self._inputs)
        }
        outputs = self._session.run(self._outputs, feed)
        rows = list(zip(*outputs, strict=True))
        if len(rows) != len(samples):
            raise NetworkMismatch(f"{self.room}: {len(samples)} samples in, {len(rows)} rows out")
        return rows

    def warm_up(self, sample: Sample) -> None:
        """Run a sample at several batch sizes, so that the first caller waits no longer than the hundredth.

        Leaves the time that one input takes, at the batch size where it took longest,
        in `seconds_per_input`.
        """
        for size in WARM_UP_SIZES:
            seconds = []
            for _ in range(WARM_UP_RUNS):
                started = time.perf_counter()
                self.run([sample] * size)
                seconds.append((time.perf_counter() - started) / size)
            self.seconds_per_input = max(self.seconds_per_input, min(seconds))


def _stack(tensors: Sequence[Array]) -> Array:
    """Stack samples of one tensor along a new batch axis; shorter ones are padded with zeros."""
    first = tensors[0]
    if len(tensors) == 1:
        return first[np.newaxis]
    if all(tensor.shape == first.shape for tensor in tensors):
        # Cheaper than np.stack, which makes a view of every tensor first.
        return (
            np.concatenate(tensors).reshape(len(tensors), *first.shape) if first.ndim else np.array(tensors)
        )
    longest = np.max([tensor.shape for tensor in tensors], axis=0)
    stacked = np.zeros((len(tensors), *longest), first.dtype)
    for row, tensor in zip(stacked, tensors, strict=True):
        row[tuple(slice(length) for length in tensor.shape)] = tensor
    return stacked


def _check(room: Room, side: str, wanted: Sequence[Tensor], found: Sequence[onnxruntime.NodeArg]) -> None:
    """Compare a graph's inputs or outputs with the room's, name by name."""
    have = {arg.name: arg for arg in found}
    if set(have) != {tensor.name for tensor in wanted}:
        raise NetworkMismatch(
            f"{room}: the graph's {side}s are {sorted(have)}, not {[t.name for t in wanted]}"
        )
    for tensor in wanted:
        arg = have[tensor.name]
        if arg.type != ONNX_TYPES[tensor.datatype]:
            raise NetworkMismatch(f"{room}: {side} {tensor.name} is {arg.type}, not {tensor.datatype}")
        shape = arg.shape[1:]
        fits = len(shape) == len(tensor.shape) and all(
            want < 0 or have == want for have, want in zip(shape, tensor.shape, strict=True)
        )
        if not fits or isinstance(arg.shape[0], int):
            raise NetworkMismatch(f"{room}: {side} {tensor.name} is {arg.shape}, not [n, {tensor.shape}]")
