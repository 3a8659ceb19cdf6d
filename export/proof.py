"""Proof that an exported file answers like the network it was made from.

Nothing gets its final name without it. What is compared are real inputs: ONNX
Runtime beside torch in several batch sizes, a row alone beside the same row in
company, and the decision and the score over the whole evaluation set. How close is
close enough depends on the precision alone, never on the model.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx.external_data_helper import uses_external_data

from export.errors import ProofFailed
from export.precision import LARGEST_HALF, MEANT_AS_INFINITY
from export.to_onnx import BATCH_AXIS
from service.models.spec import Array, Datatype, Room, Tensor
from training.exam import Exam


@dataclass(frozen=True)
class Tolerance:
    """How far a file of one precision may stray from the network it was made from.

    Attributes:
        largest_difference: In any number of any answer; None where single answers may differ.
        mean_difference: On average over an output, as a share of how much that output varies
            (its mean distance from its mean).
        neighbour_difference: Between a row's answer alone and its answer in company, in any number.
        score: In each score, as a share of 1; of scores beyond 1, as a share of themselves.
        same_decisions: The least share of decisions that must be the same.
        close_call: Decisions nearer than this to turning may turn.
    """

    largest_difference: float | None
    mean_difference: float
    neighbour_difference: float
    score: float
    same_decisions: float
    close_call: float


TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(1e-4, 0.01, 1e-5, 1e-4, 1.0, 1e-4),
    "fp32 stored as fp16": Tolerance(None, 0.01, 1e-5, 0.001, 0.998, 0.01),
    "fp16": Tolerance(None, 0.01, 1e-3, 0.002, 0.995, 0.01),
    "int8": Tolerance(None, 0.1, 1e-3, 0.005, 0.97, 0.05),
}
"""By precision. A tenth of a point of a score is 0.001."""

BATCH_SIZES = (1, 2, 7, 32)

BATCHES_PER_SIZE = 8

LENGTHS = (1, 2, 7, 32, 128, 512)
"""Of the texts that are made by repeating real ones, where inputs may have any length."""

ACTIVATION_EXAMPLES = 256
"""On how many examples every number inside an fp16 graph is looked at."""

Answers = Callable[[Sequence[Array]], list[Array]]
"""A network's inputs [n, ...] to its outputs [n, ...], in the order of the room."""

_RUNTIME_TYPES: dict[Datatype, str] = {
    "BOOL": "tensor(bool)",
    "UINT8": "tensor(uint8)",
    "INT32": "tensor(int32)",
    "INT64": "tensor(int64)",
    "FP16": "tensor(float16)",
    "FP32": "tensor(float)",
}


@dataclass(frozen=True)
class Proof:
    """What was found.

    Attributes:
        examples: How many examples the decisions and scores were compared on.
        largest_difference: Between the file and the network it was made from, anywhere.
        mean_difference: The same, on average over the whole set.
        largest_neighbour_difference: Between a row alone and the same row in company.
        same_decisions: The share of decisions that are the same.
        scores: What the exported file scores.
        score_differences: The same, minus what the network scores that it was made from.
        largest_activation: The largest number inside an fp16 graph; None for other precisions.
        opset: The file's ONNX operator set.
        nodes: How many nodes its graph has.
    """

    examples: int
    largest_difference: float
    mean_difference: float
    largest_neighbour_difference: float
    same_decisions: float
    scores: dict[str, float]
    score_differences: dict[str, float]
    largest_activation: float | None
    opset: int
    nodes: int


def prove(
    room: Room,
    network: bytes,
    reference: Answers,
    exam: Exam,
    precision: str = "fp32",
    *,
    rounded: bytes | None = None,
    beside: str = "torch",
) -> Proof:
    """Compare an ONNX file with the network it was made from.

    Args:
        room: What the file must take and give.
        network: The ONNX file.
        reference: The network it was made from.
        exam: Real inputs, at least as many as the largest batch.
        precision: Which of `TOLERANCES` is asked of it.
        rounded: For fp16, the graph that computes on this CPU what a GPU would compute; it is
            compared in the file's place, which answers here in fp32.
        beside: What the reference is, for messages.

    Raises:
        ProofFailed: they differ, or the file is not what the room says.
    """
    if len(exam) < max(BATCH_SIZES):
        raise ProofFailed(
            f"{room}: {exam.name} has {len(exam)} examples; the proof wants at least {max(BATCH_SIZES)}."
        )
    graph = _self_contained(room, network)
    itself = RuntimeAnswers(room, network)
    candidate = itself if rounded is None else RuntimeAnswers(room, rounded)
    trial = _Trial(room, exam, TOLERANCES[precision], f"between {beside} and ONNX Runtime")
    largest = max(
        _compare_batches(trial, answers, reference) for answers in dict.fromkeys((itself, candidate))
    )
    neighbours = _compare_company(trial, candidate)
    whole = _compare_whole_set(trial, candidate, reference, beside)
    return Proof(
        examples=len(exam),
        largest_difference=max(largest, whole.largest_difference),
        mean_difference=whole.mean_difference,
        largest_neighbour_difference=neighbours,
        same_decisions=whole.same_decisions,
        scores=whole.scores,
        score_differences=whole.score_differences,
        largest_activation=None if rounded is None else _largest_activation(trial, rounded),
        opset=next(opset.version for opset in graph.opset_import if opset.domain == ""),
        nodes=len(graph.graph.node),
    )


@dataclass(frozen=True)
class _Trial:
    """What is compared how strictly, and what to call it."""

    room: Room
    exam: Exam
    tolerance: Tolerance
    between: str

    @property
    def largest_difference(self) -> float:
        """In any number; infinite where single answers may differ."""
        if self.tolerance.largest_difference is None:
            return float("inf")
        return self.exam.largest_difference or self.tolerance.largest_difference


class RuntimeAnswers:
    """Runs an ONNX file as the service does: from bytes, in ONNX Runtime, on the CPU.

    Raises:
        ProofFailed: ONNX Runtime cannot load it, or it takes or gives other tensors than the room.
    """

    def __init__(self, room: Room, network: bytes) -> None:
        self.room = room
        try:
            self.session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no common base of their own
            raise ProofFailed(f"{room}: ONNX Runtime cannot load the exported file: {error}") from error
        _same_tensors(room, "takes", self.session.get_inputs(), room.network_inputs)
        _same_tensors(room, "gives", self.session.get_outputs(), room.network_outputs)

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        """The graph's outputs [n, ...] for its inputs [n, ...], in the room's order."""
        names = [tensor.name for tensor in self.room.network_outputs]
        feeds = {tensor.name: array for tensor, array in zip(self.room.network_inputs, inputs, strict=True)}
        return list(self.session.run(names, feeds))


def _self_contained(room: Room, network: bytes) -> onnx.ModelProto:
    """The parsed file, once it is known to keep all weights inside."""
    model = onnx.load_model_from_string(network)
    outside = [tensor.name for tensor in model.graph.initializer if uses_external_data(tensor)]
    if outside:
        raise ProofFailed(
            f"{room}: the exported file keeps {len(outside)} tensors in other files ({outside[0]} is the "
            "first); all of them belong inside."
        )
    return model


def _same_tensors(room: Room, verb: str, found: Sequence[Any], wanted: Sequence[Tensor]) -> None:
    """Names, order, datatypes and shapes are the room's, and what it leaves free is free."""

    def described(name: str, datatype: str, shape: Sequence[int | str | None]) -> str:
        return f"{name} {datatype} [{', '.join(str(size) for size in shape)}]"

    def as_free(shape: Sequence[int | str | None], wanted: Sequence[int]) -> list[int | str | None]:
        """The shape with -1 where the room leaves a length free and the graph does, whatever its name."""
        free = [False, *(size < 0 for size in wanted)]
        if len(free) != len(shape):
            return list(shape)
        return [-1 if may and isinstance(size, str) else size for may, size in zip(free, shape, strict=True)]

    shapes = {tensor.name: tensor.shape for tensor in wanted}
    there = [
        described(tensor.name, tensor.type, as_free(tensor.shape, shapes.get(tensor.name, ())))
        for tensor in found
    ]
    right = [
        described(tensor.name, _RUNTIME_TYPES[tensor.datatype], [BATCH_AXIS, *tensor.shape])
        for tensor in wanted
    ]
    if there != right:
        raise ProofFailed(
            f"{room}: the exported graph {verb} {'; '.join(there) or 'nothing'}; "
            f"the room says {'; '.join(right)}."
        )


def _difference(
    trial: _Trial, where: str, found: Sequence[Array], right: Sequence[Array], limit: float
) -> Array:
    """The absolute differences of all numbers of all outputs, float64 [numbers], none above `limit`."""
    room, differences = trial.room, []
    for tensor, left, wanted in zip(room.network_outputs, found, right, strict=True):
        if left.shape != wanted.shape:
            raise ProofFailed(
                f"{room}: {where}, {tensor.name} has the shape {list(left.shape)}; "
                f"{list(wanted.shape)} would be right."
            )
        if trial.exam.apart is None:
            difference = np.abs(left.astype(np.float64) - wanted.astype(np.float64)).ravel()
            _refuse_distance(room, f"{where}, {tensor.name}", difference, limit)
            differences.append(difference)
        elif not np.all(np.isfinite(left)):
            raise ProofFailed(f"{room}: {where}, {tensor.name} holds answers that are no numbers.")
    if trial.exam.apart is not None:
        difference = trial.exam.apart(found, right)
        _refuse_distance(room, f"{where}, an answer", difference, limit)
        # A batch may hold nothing that could differ.
        differences.append(np.append(difference, 0.0))
    return np.concatenate(differences)


def _refuse_distance(room: Room, what: str, difference: Array, limit: float) -> None:
    """Every difference is a number, and none is above the limit."""
    # Written so that a NaN, which is not below anything, is refused too.
    if not np.all(difference <= limit) or not np.all(np.isfinite(difference)):
        raise ProofFailed(
            f"{room}: {what} differs by up to {difference.max():.3g}; at most {limit:g} would be right."
        )


def _compare_batches(trial: _Trial, candidate: Answers, reference: Answers) -> float:
    """Both networks on batches of each size from all over the set, and on each length; the worst."""
    exam, largest = trial.exam, 0.0
    for size in BATCH_SIZES:
        # Of a small exam no example is asked for twice.
        batches = min(BATCHES_PER_SIZE, len(exam) // size)
        for start in np.linspace(0, len(exam) - size, batches).astype(int):
            inputs = exam.batch(slice(start, start + size))
            where = f"{trial.between} on {exam.name}, in batches of {size}"
            largest = max(largest, _compare(trial, where, candidate(inputs), reference(inputs)))
    if exam.trim is not None:
        # No longer than the longest real one: a network may have a longest input.
        for length in sorted({min(length, exam.inputs[0].shape[1]) for length in LENGTHS}):
            inputs = _of_length(exam, length)
            where = f"{trial.between} on {exam.name}, repeated to length {length}"
            largest = max(largest, _compare(trial, where, candidate(inputs), reference(inputs)))
    return largest


def _compare(trial: _Trial, where: str, found: Sequence[Array], right: Sequence[Array]) -> float:
    return float(_difference(trial, where, found, right, trial.largest_difference).max())


def _of_length(exam: Exam, length: int) -> list[Array]:
    """The first example, cut or repeated to a length: each [1, length]."""
    return [np.resize(array[0], length)[np.newaxis] for array in exam.batch(slice(0, 1))]


def _compare_company(trial: _Trial, candidate: Answers) -> float:
    """Rows from all over the set, alone and in batches; the largest difference."""
    exam = trial.exam
    limit = exam.largest_neighbour_difference
    if limit is None:
        limit = trial.tolerance.neighbour_difference
    rows = np.linspace(0, len(exam) - 1, max(BATCH_SIZES)).astype(int)
    alone = [candidate(exam.batch(slice(row, row + 1))) for row in rows]
    right = [np.concatenate(outputs) for outputs in zip(*alone, strict=True)]
    largest = 0.0
    for size in BATCH_SIZES[1:]:
        for first in range(0, len(rows), size):
            chosen = slice(first, first + size)
            together = candidate(exam.batch(rows[chosen]))
            difference = _difference(
                trial,
                f"between a row of {exam.name} in a batch of {size} and the same row alone",
                together,
                [output[chosen] for output in right],
                limit,
            )
            largest = max(largest, float(difference.max()))
    return largest


@dataclass(frozen=True)
class _Whole:
    """What the comparison over the whole set found."""

    largest_difference: float
    mean_difference: float
    same_decisions: float
    scores: dict[str, float]
    score_differences: dict[str, float]


def _compare_whole_set(trial: _Trial, candidate: Answers, reference: Answers, beside: str) -> _Whole:
    """Both networks on every example: answers close, decisions the same, scores as good."""
    room, exam = trial.room, trial.exam
    found, right = (_all_answers(answers, exam) for answers in (candidate, reference))
    where = f"{trial.between} on all of {exam.name}"
    difference = _difference(trial, where, found, right, trial.largest_difference)
    _refuse_drift(trial, where, found, right)
    same = _same_decisions(trial, beside, found, right)
    scores, wanted_scores = exam.score(found, exam.truth), exam.score(right, exam.truth)
    differences = {name: scores[name] - wanted for name, wanted in wanted_scores.items()}
    # A score of one label (`accuracy/cat`, `ap50_rbc`) is shown, not judged: a few examples move it.
    labels = {label.lower() for label in room.labels}
    judged = {
        name: wanted
        for name, wanted in wanted_scores.items()
        if re.split("[/_]", name)[-1].lower() not in labels
    }
    for name, wanted in judged.items():
        if not abs(differences[name]) <= trial.tolerance.score * max(1, abs(wanted)):
            raise ProofFailed(
                f"{room}: on {exam.name} the exported file scores {scores}; {beside} scores {wanted_scores}."
            )
    return _Whole(float(difference.max()), float(difference.mean()), same, scores, differences)


def _refuse_drift(trial: _Trial, where: str, found: Sequence[Array], right: Sequence[Array]) -> None:
    """No output may differ by more, on average, than a share of how much it varies."""
    if trial.exam.apart is not None:
        drift = float(np.append(trial.exam.apart(found, right), 0.0).mean())
        if not drift <= trial.tolerance.mean_difference:
            raise ProofFailed(
                f"{trial.room}: {where}, answers differ by {drift:.3g} on average; at most "
                f"{trial.tolerance.mean_difference:g} would be right."
            )
        return
    for tensor, left, wanted in zip(trial.room.network_outputs, found, right, strict=True):
        wanted = wanted.astype(np.float64)
        varies = np.abs(wanted - wanted.mean(axis=0)).mean()
        drift = np.abs(left.astype(np.float64) - wanted).mean()
        if not drift <= trial.tolerance.mean_difference * varies:
            raise ProofFailed(
                f"{trial.room}: {where}, {tensor.name} differs by {drift:.3g} on average and varies by "
                f"{varies:.3g}; at most {trial.tolerance.mean_difference:.0%} of that would be right."
            )


def _same_decisions(trial: _Trial, beside: str, found: Sequence[Array], right: Sequence[Array]) -> float:
    """The share of decisions that are the same, once enough of those are that are not too close to call."""
    room, exam = trial.room, trial.exam
    if exam.decide is None:
        return 1.0
    decided, wanted = exam.decide(found), exam.decide(right)
    differing = np.asarray(decided != wanted)
    share = float(1 - differing.mean())
    if exam.margin is not None:
        close = exam.largest_difference if trial.tolerance.largest_difference else None
        differing = differing & (exam.margin(right) > (close or trial.tolerance.close_call))
    if not 1 - differing.mean() >= trial.tolerance.same_decisions:
        rows = np.flatnonzero(differing.reshape(len(exam), -1).any(axis=1))
        row = int(rows[0])
        least = trial.tolerance.same_decisions
        raise ProofFailed(
            f"{room}: ONNX Runtime decides otherwise than {beside} on {len(rows)} of {len(exam)} examples "
            f"of {exam.name}; example {row} is {decided[row]} instead of {wanted[row]}. "
            + ("Every decision must be the same." if least == 1 else f"{least:.1%} must be the same.")
        )
    return share


def _largest_activation(trial: _Trial, rounded: bytes) -> float:
    """The largest number that an fp16 graph makes on the way to its answers.

    Raises:
        ProofFailed: sixteen bits cannot hold it.
    """
    model = onnx.load_model_from_string(rounded)
    # Before each rounding; constants of an attention mask are no quantities.
    names = [name for node in model.graph.node for name in node.output if name.endswith(".exact")]
    for name in names:
        model.graph.output.add().name = name
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    taken = [tensor.name for tensor in trial.room.network_inputs]
    largest = 0.0
    for start in range(0, min(len(trial.exam), ACTIVATION_EXAMPLES), max(BATCH_SIZES)):
        inputs = trial.exam.batch(slice(start, start + max(BATCH_SIZES)))
        for name, value in zip(names, session.run(names, dict(zip(taken, inputs, strict=True))), strict=True):
            sizes = np.abs(value)
            reached = float(sizes[sizes < MEANT_AS_INFINITY].max(initial=0))
            if reached > LARGEST_HALF:
                raise ProofFailed(
                    f"{trial.room}: in fp16, {name.removesuffix('.exact')} overflows: it reaches "
                    f"{reached:.3g} on {trial.exam.name}, and sixteen bits end at {LARGEST_HALF:g}. "
                    "Leave fp16 out with --variants."
                )
            largest = max(largest, reached)
    return largest


def _all_answers(answers: Answers, exam: Exam) -> list[Array]:
    """The outputs for every example, each [examples, ...]."""
    batches = [
        answers(exam.batch(slice(start, start + exam.batch_size)))
        for start in range(0, len(exam), exam.batch_size)
    ]
    return [np.concatenate(outputs) for outputs in zip(*batches, strict=True)]
