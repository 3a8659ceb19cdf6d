"""The proof passes the true graph, and each way of being wrong is caught and named."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from torch import nn

from export.errors import ProofFailed
from export.proof import RuntimeAnswers, prove
from export.to_onnx import OPSET, TorchAnswers
from service.models.digit import DIGIT
from service.models.spec import Array
from training.exam import Exam

Sabotage = Callable[[onnx.GraphProto], None]


def sabotaged(graph: bytes, sabotage: Sabotage) -> bytes:
    """The graph, changed, and still valid ONNX."""
    model = onnx.load_model_from_string(graph)
    sabotage(model.graph)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def set_weights(graph: onnx.GraphProto, name_ends: str, change: Callable[[Array], Array]) -> None:
    (weights,) = (one for one in graph.initializer if one.name.endswith(name_ends))
    changed = np.asarray(change(numpy_helper.to_array(weights)), order="C")
    weights.CopyFrom(numpy_helper.from_array(changed, weights.name))


def last_layer(graph: onnx.GraphProto) -> Sequence[str]:
    """The names of its weights and its bias, one row for each label."""
    (linear,) = (node for node in graph.node if node.op_type == "Gemm")
    return linear.input[1:]


def insert_before(graph: onnx.GraphProto, operator: str, *nodes: onnx.NodeProto) -> None:
    """Put nodes before the first `operator`; their last output becomes its first input."""
    position = next(number for number, node in enumerate(graph.node) if node.op_type == operator)
    graph.node[position].input[0] = nodes[-1].output[0]
    for node in reversed(nodes):
        graph.node.insert(position, node)


def wrong_mean(graph: onnx.GraphProto) -> None:
    set_weights(graph, ".mean", lambda mean: mean + 30)


def no_normalisation(graph: onnx.GraphProto) -> None:
    set_weights(graph, ".mean", np.zeros_like)
    set_weights(graph, ".deviation", np.ones_like)


def swap_3_and_8(graph: onnx.GraphProto) -> None:
    order = [0, 1, 2, 8, 4, 5, 6, 7, 3, 9]
    for name in last_layer(graph):
        set_weights(graph, name, lambda rows: rows[order])


def transpose_pictures(graph: onnx.GraphProto) -> None:
    insert_before(graph, "Cast", helper.make_node("Transpose", ["pixels"], ["turned"], perm=[0, 2, 1]))


def no_softmax(graph: onnx.GraphProto) -> None:
    (softmax,) = (node for node in graph.node if node.op_type == "Softmax")
    softmax.op_type = "Identity"
    del softmax.attribute[:]


def not_a_number(graph: onnx.GraphProto) -> None:
    set_weights(graph, last_layer(graph)[1], lambda bias: np.full_like(bias, np.nan))


def mix_rows(graph: onnx.GraphProto) -> None:
    """Take the batch's mean from each row: what a batch normalisation in training mode would do."""
    logits = next(node for node in graph.node if node.op_type == "Softmax").input[0]
    graph.initializer.append(helper.make_tensor("axis", TensorProto.INT64, [1], [0]))
    insert_before(
        graph,
        "Softmax",
        helper.make_node("ReduceMean", [logits, "axis"], ["mean_row"]),
        helper.make_node("Sub", [logits, "mean_row"], ["mixed"]),
    )


def test_the_true_graph_passes(graph: bytes, network: nn.Module, exam: Exam) -> None:
    proof = prove(DIGIT, graph, TorchAnswers(network), exam)
    assert proof.examples == len(exam) == 300
    assert 0 <= proof.mean_difference <= proof.largest_difference < 1e-5
    assert proof.largest_neighbour_difference <= 1e-5
    assert proof.scores == pytest.approx(exam.score(TorchAnswers(network)(exam.inputs), exam.truth), abs=1e-6)
    assert proof.opset == OPSET
    assert proof.nodes == len(onnx.load_model_from_string(graph).graph.node)


@pytest.mark.parametrize(
    "sabotage",
    [
        pytest.param(wrong_mean, id="another-mean"),
        pytest.param(no_normalisation, id="no-normalisation"),
        pytest.param(swap_3_and_8, id="labels-3-and-8-swapped"),
        pytest.param(transpose_pictures, id="pictures-transposed"),
        pytest.param(no_softmax, id="logits-instead-of-probabilities"),
        pytest.param(not_a_number, id="answers-that-are-no-numbers"),
        pytest.param(mix_rows, id="rows-of-a-batch-mixed"),
    ],
)
def test_a_graph_that_answers_otherwise_is_refused(
    graph: bytes, network: nn.Module, exam: Exam, sabotage: Sabotage
) -> None:
    with pytest.raises(
        ProofFailed, match=r"digit: between torch and ONNX Runtime .* differs by up to .*; at most 0.0001"
    ):
        prove(DIGIT, sabotaged(graph, sabotage), TorchAnswers(network), exam)


def test_a_network_that_mixes_rows_is_refused_even_where_its_graph_is_faithful(
    graph: bytes, exam: Exam
) -> None:
    mixing = sabotaged(graph, mix_rows)
    with pytest.raises(
        ProofFailed, match=r"between a row of .* in a batch of 2 and the same row alone, .* at most 1e-05"
    ):
        prove(DIGIT, mixing, RuntimeAnswers(DIGIT, mixing), exam)


def rename_input(graph: onnx.GraphProto) -> None:
    graph.input[0].name = "picture"
    next(node for node in graph.node if node.op_type == "Cast").input[0] = "picture"


def take_floats(graph: onnx.GraphProto) -> None:
    graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT


def fix_the_batch(graph: onnx.GraphProto) -> None:
    for tensor in (*graph.input, *graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 1
    del graph.value_info[:]


def rename_the_batch(graph: onnx.GraphProto) -> None:
    for tensor in (*graph.input, *graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_param = "n"
    del graph.value_info[:]


def rename_output(graph: onnx.GraphProto) -> None:
    graph.output[0].name = "logits"
    next(node for node in graph.node if node.op_type == "Softmax").output[0] = "logits"


def give_logits_too(graph: onnx.GraphProto) -> None:
    logits = next(node for node in graph.node if node.op_type == "Softmax").input[0]
    graph.output.append(helper.make_tensor_value_info(logits, TensorProto.FLOAT, ["batch", 10]))


@pytest.mark.parametrize(
    ("sabotage", "says"),
    [
        pytest.param(
            rename_input, r"takes picture tensor\(uint8\) .*; the room says pixels", id="input-renamed"
        ),
        pytest.param(
            take_floats, r"takes pixels tensor\(float\) .*; the room says .*uint8", id="input-float"
        ),
        pytest.param(fix_the_batch, r"takes .* \[1, 28, 28\]; the room says .* \[batch,", id="batch-of-one"),
        pytest.param(rename_the_batch, r"\[n, 28, 28\]; the room says .* \[batch,", id="batch-axis-renamed"),
        pytest.param(rename_output, "gives logits .*; the room says probabilities", id="output-renamed"),
        pytest.param(
            give_logits_too, "gives probabilities .*; linear.*; the room says", id="one-more-output"
        ),
    ],
)
def test_a_graph_with_other_tensors_than_the_room_is_refused(
    graph: bytes, network: nn.Module, exam: Exam, sabotage: Sabotage, says: str
) -> None:
    with pytest.raises(ProofFailed, match=says):
        prove(DIGIT, sabotaged(graph, sabotage), TorchAnswers(network), exam)


def test_weights_in_another_file_are_refused(graph: bytes, network: nn.Module, exam: Exam) -> None:
    model = onnx.load_model_from_string(graph)
    weights = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    set_external_data(weights, location="weights.bin")
    weights.ClearField("raw_data")
    with pytest.raises(ProofFailed, match=r"keeps 1 tensors in other files .* belong inside"):
        prove(DIGIT, model.SerializeToString(), TorchAnswers(network), exam)


def test_one_decision_that_differs_is_refused_however_close_the_numbers(graph: bytes, exam: Exam) -> None:
    runtime = RuntimeAnswers(DIGIT, graph)
    third = float(runtime([exam.inputs[0]])[0][2, 0])
    strict = replace(exam, decide=lambda outputs: outputs[0][:, 0] > third + 2e-5)

    def a_hair_higher(inputs: Sequence[Array]) -> list[Array]:
        return [runtime(inputs)[0] + np.float32(4e-5)]

    with pytest.raises(
        ProofFailed, match=r"decides otherwise than torch on \d+ of 300 .* example \d+ is False"
    ):
        prove(DIGIT, graph, a_hair_higher, strict)


def test_another_score_is_refused_however_close_the_numbers(graph: bytes, exam: Exam) -> None:
    runtime = RuntimeAnswers(DIGIT, graph)
    strict = replace(exam, score=lambda outputs, truth: {"sum": round(float(outputs[0].sum()), 3)})

    def a_hair_higher(inputs: Sequence[Array]) -> list[Array]:
        return [runtime(inputs)[0] + np.float32(4e-5)]

    with pytest.raises(ProofFailed, match=r"the exported file scores {'sum': .*}; torch scores"):
        prove(DIGIT, graph, a_hair_higher, strict)


def test_an_answer_of_another_shape_is_refused(graph: bytes, exam: Exam) -> None:
    runtime = RuntimeAnswers(DIGIT, graph)
    with pytest.raises(ProofFailed, match=r"has the shape \[1, 10\]; \[1, 9\] would be right"):
        prove(DIGIT, graph, lambda inputs: [runtime(inputs)[0][:, :9]], exam)


def test_an_exam_shorter_than_the_largest_batch_is_refused(
    graph: bytes, network: nn.Module, exam: Exam
) -> None:
    short = replace(exam, inputs=(exam.inputs[0][:31],), truth=exam.truth[:31])
    with pytest.raises(ProofFailed, match="has 31 examples; the proof wants at least 32"):
        prove(DIGIT, graph, TorchAnswers(network), short)
