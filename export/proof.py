"""Proof that an exported file answers like the network it was made from.

Nothing gets its final name without it. What is compared are real inputs: ONNX
Runtime beside torch in several batch sizes, a row alone beside the same row in
company, and the decision and the score over the whole evaluation set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx.external_data_helper import uses_external_data

from export.errors import ProofFailed
from export.to_onnx import BATCH_AXIS
from service.models.spec import Array, Datatype, Room, Tensor
from training.exam import Exam

LARGEST_DIFFERENCE = 1e-4
"""Between torch and ONNX Runtime, in any number of any answer."""

LARGEST_NEIGHBOUR_DIFFERENCE = 1e-5
"""Between a row's answer alone and its answer in company."""

LARGEST_SCORE_DIFFERENCE = 1e-4
"""Between torch's score and ONNX Runtime's; some are sums of the answers, which are close, not equal."""

BATCH_SIZES = (1, 2, 7, 32)

BATCHES_PER_SIZE = 8

WHOLE_SET_BATCH = 250

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
        largest_difference: Between torch and ONNX Runtime, anywhere.
        mean_difference: The same, on average over the whole set.
        largest_neighbour_difference: Between a row alone and the same row in company.
        scores: What the exported file scores, which is what torch scores.
        opset: The file's ONNX operator set.
        nodes: How many nodes its graph has.
    """

    examples: int
    largest_difference: float
    mean_difference: float
    largest_neighbour_difference: float
    scores: dict[str, float]
    opset: int
    nodes: int


def prove(room: Room, network: bytes, reference: Answers, exam: Exam) -> Proof:
    """Compare an ONNX file with the network it was made from.

    Args:
        room: What the file must take and give.
        network: The ONNX file.
        reference: The trained network, in torch.
        exam: Real inputs, at least as many as the largest batch.

    Raises:
        ProofFailed: they differ, or the file is not what the room says.
    """
    if len(exam) < max(BATCH_SIZES):
        raise ProofFailed(
            f"{room}: {exam.name} has {len(exam)} examples; the proof wants at least {max(BATCH_SIZES)}."
        )
    graph = _self_contained(room, network)
    candidate = RuntimeAnswers(room, network)
    largest = _compare_batches(room, candidate, reference, exam)
    neighbours = _compare_company(room, candidate, exam)
    whole = _compare_whole_set(room, candidate, reference, exam)
    return Proof(
        examples=len(exam),
        largest_difference=max(largest, whole.largest_difference),
        mean_difference=whole.mean_difference,
        largest_neighbour_difference=neighbours,
        scores=whole.scores,
        opset=next(opset.version for opset in graph.opset_import if opset.domain == ""),
        nodes=len(graph.graph.node),
    )


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
    """Names, order, datatypes and shapes are the room's, and the batch axis is free."""

    def described(name: str, datatype: str, shape: Sequence[int | str | None]) -> str:
        return f"{name} {datatype} [{', '.join(str(size) for size in shape)}]"

    there = [described(tensor.name, tensor.type, tensor.shape) for tensor in found]
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
    room: Room, where: str, found: Sequence[Array], right: Sequence[Array], limit: float
) -> Array:
    """The absolute differences of all numbers of all outputs, float64 [numbers], none above `limit`."""
    differences = []
    for tensor, left, wanted in zip(room.network_outputs, found, right, strict=True):
        if left.shape != wanted.shape:
            raise ProofFailed(
                f"{room}: {where}, {tensor.name} has the shape {list(left.shape)}; "
                f"{list(wanted.shape)} would be right."
            )
        difference = np.abs(left.astype(np.float64) - wanted.astype(np.float64)).ravel()
        # Written so that a NaN, which is not below anything, is refused too.
        if not np.all(difference <= limit):
            worst = difference.max()
            raise ProofFailed(
                f"{room}: {where}, {tensor.name} differs by up to {worst:.3g}; "
                f"at most {limit:g} would be right."
            )
        differences.append(difference)
    return np.concatenate(differences)


def _compare_batches(room: Room, candidate: Answers, reference: Answers, exam: Exam) -> float:
    """Both networks on batches of each size from all over the set; the largest difference."""
    largest = 0.0
    for size in BATCH_SIZES:
        for start in np.linspace(0, len(exam) - size, BATCHES_PER_SIZE).astype(int):
            inputs = exam.batch(slice(start, start + size))
            where = f"between torch and ONNX Runtime on {exam.name}, in batches of {size}"
            difference = _difference(room, where, candidate(inputs), reference(inputs), LARGEST_DIFFERENCE)
            largest = max(largest, float(difference.max()))
    return largest


def _compare_company(room: Room, candidate: Answers, exam: Exam) -> float:
    """Rows from all over the set, alone and in batches; the largest difference."""
    rows = np.linspace(0, len(exam) - 1, max(BATCH_SIZES)).astype(int)
    alone = [candidate(exam.batch(slice(row, row + 1))) for row in rows]
    right = [np.concatenate(outputs) for outputs in zip(*alone, strict=True)]
    largest = 0.0
    for size in BATCH_SIZES[1:]:
        for first in range(0, len(rows), size):
            chosen = slice(first, first + size)
            together = candidate(exam.batch(rows[chosen]))
            difference = _difference(
                room,
                f"between a row of {exam.name} in a batch of {size} and the same row alone",
                together,
                [output[chosen] for output in right],
                LARGEST_NEIGHBOUR_DIFFERENCE,
            )
            largest = max(largest, float(difference.max()))
    return largest


@dataclass(frozen=True)
class _Whole:
    """What the comparison over the whole set found."""

    largest_difference: float
    mean_difference: float
    scores: dict[str, float]


def _compare_whole_set(room: Room, candidate: Answers, reference: Answers, exam: Exam) -> _Whole:
    """Both networks on every example: answers close, decisions and scores equal."""
    found, right = (_all_answers(answers, exam) for answers in (candidate, reference))
    difference = _difference(
        room, f"between torch and ONNX Runtime on all of {exam.name}", found, right, LARGEST_DIFFERENCE
    )
    _refuse_other_decisions(room, exam, found, right)
    scores, wanted_scores = exam.score(found, exam.truth), exam.score(right, exam.truth)
    if any(
        not abs(scores[name] - wanted) <= LARGEST_SCORE_DIFFERENCE for name, wanted in wanted_scores.items()
    ):
        raise ProofFailed(
            f"{room}: on {exam.name} the exported file scores {scores}; torch scores {wanted_scores}."
        )
    return _Whole(float(difference.max()), float(difference.mean()), scores)


def _refuse_other_decisions(room: Room, exam: Exam, found: Sequence[Array], right: Sequence[Array]) -> None:
    """Every decision is the same, but for those too close to call."""
    if exam.decide is None:
        return
    decided, wanted = exam.decide(found), exam.decide(right)
    differing = decided != wanted
    if exam.margin is not None:
        differing &= exam.margin(right) > (exam.largest_difference or LARGEST_DIFFERENCE)
    rows = np.flatnonzero(differing.reshape(len(exam), -1).any(axis=1))
    if len(rows):
        row = int(rows[0])
        raise ProofFailed(
            f"{room}: ONNX Runtime decides otherwise than torch on {len(rows)} of {len(exam)} examples "
            f"of {exam.name}; example {row} is {decided[row]} instead of {wanted[row]}. "
            "Every decision must be the same."
        )


def _all_answers(answers: Answers, exam: Exam) -> list[Array]:
    """The outputs for every example, each [examples, ...]."""
    batches = [
        answers(exam.batch(slice(start, start + WHOLE_SET_BATCH)))
        for start in range(0, len(exam), WHOLE_SET_BATCH)
    ]
    return [np.concatenate(outputs) for outputs in zip(*batches, strict=True)]
