"""Networks at work: ONNX Runtime sessions, checked against their room and warmed before they serve."""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import onnxruntime

from service.matrix_units import suited
from service.models.spec import Array, Room, Sample, Tensor
from service.providers import RUNGS, Profile, allows_graphs, refuse_other_provider, rung_of

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

MOST_RUNGS: Final = 64
"""Shapes of batches that have places of their own at one time."""

CPU: Final = Profile()


class NetworkMismatch(Exception):
    """The ONNX file is not the network that the room describes."""


class Network:
    """One ONNX graph in one session, for one room.

    On the CPU a batch is taken as it comes. On a GPU it is padded to a rung of a ladder of
    sizes (`providers.RUNGS`), each of which has its places for inputs and outputs bound and its run
    warmed before anybody asks: every new shape would cost its first caller a slow run. Safe to
    run from several threads at a time.
    """

    def __init__(
        self,
        room: Room,
        model: bytes,
        profile: Profile = CPU,
        variant: str = "fp32",
        card: Mapping[str, Any] = MappingProxyType({}),
        *,
        is_bound: bool | None = None,
    ) -> None:
        """Open the ONNX file whose bytes are `model`.

        Args:
            room: What it must take and give.
            model: The file.
            profile: Where it runs.
            variant: Its precision.
            card: Its card, which says what export found out about it.
            is_bound: Whether batches are padded and bound; None for GPUs only.

        Raises:
            NetworkMismatch: its inputs or outputs are not the room's, or it cannot be opened.
            ProviderRefused: ONNX Runtime runs it somewhere else than the profile says.
        """
        self._is_bound = profile.is_gpu if is_bound is None else is_bound
        is_any_length = any(-1 in tensor.shape for tensor in room.network_inputs)
        # A replayed run cannot change its shapes.
        graphs = profile.is_gpu and profile.graphs and allows_graphs(card, variant) and not is_any_length
        options = onnxruntime.SessionOptions()
        # Requests are spread over workers and lanes, which costs no synchronisation inside a run.
        options.intra_op_num_threads = profile.threads_for(card, variant)
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # ONNX Runtime would keep a plan of memory for every shape that ever came, and saves no time by it
        # where shapes change from batch to batch.
        options.enable_mem_pattern = self._is_bound
        # A spinning thread takes the core from the worker beside it.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(
                suited(model, profile),
                options,
                providers=profile.providers(room, variant, graphs=graphs),
            )
        except Exception as error:
            raise NetworkMismatch(f"{room}: ONNX Runtime cannot open the model: {error}") from error
        refuse_other_provider(profile.name, session.get_providers())
        self.room = room
        self.provider: str = session.get_providers()[0]
        self._seconds_of: dict[int, float] = {}
        # Of a CPU's time, what others ran meanwhile is not this network's. Other threads' time, and
        # a GPU's, is only seen as time that passed.
        is_all_in_the_caller = not profile.is_gpu and options.intra_op_num_threads == 1
        self.clock: Callable[[], float] = time.thread_time if is_all_in_the_caller else time.perf_counter
        _check(room, "input", room.network_inputs, session.get_inputs())
        _check(room, "output", room.network_outputs, session.get_outputs())
        self._session = session
        self._device = "cuda" if profile.is_gpu else "cpu"
        self._device_id = profile.device_id if profile.is_gpu else 0
        self._replays = graphs
        self._rungs: dict[tuple[int, ...], _Rung] = {}
        self._one_at_a_time = threading.Lock()
        # On places made beforehand whole batches run.
        self._piece = 0 if self._is_bound else profile.piece_for(card, variant)
        self._inputs = [tensor.name for tensor in room.network_inputs]
        self._outputs = [tensor.name for tensor in room.network_outputs]

    def run(self, samples: Sequence[Sample]) -> list[tuple[Array, ...]]:
        """Run the network over all samples, in pieces that suit it; one row of outputs each, in order."""
        piece = self._piece or len(samples)
        return [
            row
            for start in range(0, len(samples), piece)
            for row in self._run_together(samples[start : start + piece])
        ]

    def _run_together(self, samples: Sequence[Sample]) -> list[tuple[Array, ...]]:
        feed = {
            name: _stack([sample.tensors[position] for sample in samples])
            for position, name in enumerate(self._inputs)
        }
        outputs = self._run_bound(feed) if self._is_bound else self._session.run(self._outputs, feed)
        rows = list(zip(*outputs, strict=True))
        if len(rows) != len(samples):
            raise NetworkMismatch(f"{self.room}: {len(samples)} samples in, {len(rows)} rows out")
        return rows

    def warm_up(self, sample: Sample, max_batch: int = 1) -> None:
        """Run a sample at several batch sizes, so that the first caller waits no longer than the hundredth.

        From then on `seconds_per_input` and `seconds_for` know how long it takes.

        Args:
            sample: What to run.
            max_batch: The largest batch that will come; on a GPU every rung up to it is warmed.
        """
        sizes = [rung for rung in RUNGS if rung <= rung_of(max_batch)] if self._is_bound else WARM_UP_SIZES
        for size in sizes:
            seconds = []
            for _ in range(WARM_UP_RUNS):
                started = time.perf_counter()
                self.run([sample] * size)
                seconds.append(time.perf_counter() - started)
            self._seconds_of[size] = min(seconds)

    @property
    def seconds_per_input(self) -> float:
        """The time that one input takes, at the batch size where it takes longest; 0 before the warm-up."""
        return max((seconds / size for size, seconds in self._seconds_of.items()), default=0.0)

    def seconds_for(self, count: int) -> float:
        """The time that so many inputs take, in the best of the sizes that were warmed."""
        return min(seconds * math.ceil(count / size) for size, seconds in self._seconds_of.items())

    def _run_bound(self, feed: Mapping[str, Array]) -> list[Array]:
        """Run a batch on the rung that it fits on, in places made beforehand."""
        count = len(next(iter(feed.values())))
        padded = {name: _padded(array) for name, array in feed.items()}
        key = tuple(size for array in padded.values() for size in array.shape)
        with self._one_at_a_time:
            rung = self._rungs.get(key)
            if rung is None:
                # Texts come in many lengths, each with places of its own; the oldest make room.
                if len(self._rungs) >= MOST_RUNGS:
                    del self._rungs[next(iter(self._rungs))]
                rung = self._rungs[key] = _Rung(
                    self._session,
                    padded,
                    {tensor.name: (rung_of(count), *tensor.shape) for tensor in self.room.network_outputs},
                    {tensor.name: tensor.dtype for tensor in self.room.network_outputs},
                    (self._device, self._device_id),
                    graph=len(self._rungs) + 1 if self._replays else None,
                )
            return [array[:count] for array in rung.run(padded)]


class _Rung:
    """One shape of batch: fixed places for its inputs and outputs on the device, and so a run to replay."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        inputs: Mapping[str, Array],
        output_shapes: Mapping[str, tuple[int, ...]],
        output_types: Mapping[str, np.dtype[Any]],
        device: tuple[str, int],
        *,
        graph: int | None,
    ) -> None:
        """Make the places.

        Args:
            session: What runs.
            inputs: A batch of the shape that all will have.
            output_shapes: By name.
            output_types: By name.
            device: ONNX Runtime's name of it, and its number.
            graph: The number under which the run is captured and replayed; None runs it plainly.
        """
        value = onnxruntime.OrtValue
        self._session = session
        self._places = {name: value.ortvalue_from_numpy(array, *device) for name, array in inputs.items()}
        self._answers = [
            value.ortvalue_from_shape_and_type(list(shape), output_types[name], *device)
            for name, shape in output_shapes.items()
        ]
        self._binding = session.io_binding()
        for name, place in self._places.items():
            self._binding.bind_ortvalue_input(name, place)
        for name, answer in zip(output_shapes, self._answers, strict=True):
            self._binding.bind_ortvalue_output(name, answer)
        self._options = onnxruntime.RunOptions()
        if graph is not None:
            self._options.add_run_config_entry("gpu_graph_id", str(graph))

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """The outputs for inputs of this shape."""
        for name, array in inputs.items():
            self._places[name].update_inplace(array)
        self._session.run_with_iobinding(self._binding, self._options)
        # Copied: the next batch is written to the same places.
        return [np.array(answer.numpy()) for answer in self._answers]


def _padded(batch: Array) -> Array:
    """A batch with rows of zeros up to its rung: [n, ...] to [rung, ...], contiguous."""
    rung = rung_of(len(batch))
    if rung == len(batch):
        return np.ascontiguousarray(batch)
    padded = np.zeros((rung, *batch.shape[1:]), batch.dtype)
    padded[: len(batch)] = batch
    return padded


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
