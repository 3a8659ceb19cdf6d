"""fp16 and int8 keep what was proven in fp32, and each way of losing it is caught and named."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from export.errors import ExportRefused, ProofFailed
from export.placement import place
from export.precision import Converted, fp16, int8, stored_small, tempered, unfolded
from export.proof import RuntimeAnswers, prove
from export.to_onnx import TorchAnswers, to_onnx
from service.models.digit import DIGIT
from service.models.spec import Array, Classification, Room, Sample, Tensor
from tests.export.test_proof import mix_rows, sabotaged, swap_3_and_8, transpose_pictures, wrong_mean
from training.calibration import Probabilities
from training.exam import Exam, likeliest


@pytest.fixture(scope="module")
def half(graph: bytes) -> Converted:
    return fp16(graph)


@pytest.fixture(scope="module")
def bytewise(graph: bytes, exam: Exam) -> Converted:
    batches = [[exam.inputs[0][start : start + 16]] for start in range(0, 128, 16)]
    return int8(graph, batches)


def operators(network: bytes) -> set[str]:
    return {node.op_type for node in onnx.load_model_from_string(network).graph.node}


def weights_of(network: bytes) -> dict[str, Array]:
    return {
        one.name: numpy_helper.to_array(one) for one in onnx.load_model_from_string(network).graph.initializer
    }


def test_fp16_is_half_the_size_and_answers_alike(
    half: Converted, graph: bytes, network: nn.Module, exam: Exam
) -> None:
    assert len(half.network) < 0.55 * len(graph)
    proof = prove(DIGIT, half.network, TorchAnswers(network), exam, "fp16", rounded=half.rounded)
    assert proof.same_decisions >= 0.995
    assert 0 < proof.largest_difference < 0.01
    assert proof.largest_activation is not None
    assert 1 < proof.largest_activation < 1000


def test_fp16_computes_in_fp16_between_the_first_weights_and_the_last(half: Converted) -> None:
    weights = weights_of(half.network)
    assert {one.dtype for one in weights.values() if one.ndim > 1} == {np.dtype(np.float16)}
    (mean,) = (one for name, one in weights.items() if name.endswith(".mean") or name == "mean")
    assert mean.dtype == np.float32
    assert half.facts["kept_in_fp32"] == {
        "before the first weights": ["Cast", "Div", "Sub", "Unsqueeze"],
        "after the last weights": ["Softmax"],
    }


def test_the_rounded_graph_rounds_what_the_file_alone_would_not(half: Converted, exam: Exam) -> None:
    assert half.rounded is not None
    model = onnx.load_model_from_string(half.rounded)
    rounding = next(node.input[0] for node in model.graph.node if node.input[0].endswith(".exact"))
    convolved = rounding.removesuffix(".exact")
    model.graph.output.add().name = convolved
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (values,) = session.run([convolved], {"pixels": exam.inputs[0][:4]})
    np.testing.assert_array_equal(values, values.astype(np.float16).astype(np.float32))


def test_int8_is_a_third_of_the_size_and_answers_alike(
    bytewise: Converted, graph: bytes, network: nn.Module, exam: Exam
) -> None:
    assert len(bytewise.network) < 0.35 * len(graph)
    proof = prove(DIGIT, bytewise.network, TorchAnswers(network), exam, "int8")
    assert proof.same_decisions >= 0.97
    assert proof.largest_neighbour_difference <= 1e-3
    assert abs(proof.score_differences["accuracy"]) <= 0.005


def test_int8_keeps_to_seven_bits_and_leaves_the_first_and_last_layer_alone(bytewise: Converted) -> None:
    weights = weights_of(bytewise.network)
    signed = [one for one in weights.values() if one.dtype == np.int8 and one.ndim == 4]
    assert len(signed) == 7
    assert max(np.abs(one.astype(int)).max() for one in signed) <= 64
    floats = [one.shape for one in weights.values() if one.dtype == np.float32 and one.ndim > 1]
    assert sorted(floats) == [(10, 128), (16, 1, 3, 3)]
    assert bytewise.facts["calibration"] in bytewise.facts["mean_difference_by_calibration"]


def test_activations_are_unsigned_and_scales_fixed(bytewise: Converted) -> None:
    assert "DynamicQuantizeLinear" not in operators(bytewise.network)
    model = onnx.load_model_from_string(bytewise.network)
    constants = weights_of(bytewise.network)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert constants[node.input[2]].dtype == np.uint8


@pytest.mark.parametrize(
    "sabotage",
    [
        pytest.param(wrong_mean, id="another-mean"),
        pytest.param(swap_3_and_8, id="labels-3-and-8-swapped"),
        pytest.param(transpose_pictures, id="pictures-transposed"),
    ],
)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_what_was_made_from_another_graph_is_refused_in_every_precision(
    graph: bytes,
    network: nn.Module,
    exam: Exam,
    sabotage: Callable[[onnx.GraphProto], None],
    precision: str,
) -> None:
    wrong = fp16(sabotaged(graph, sabotage))
    with pytest.raises(ProofFailed, match=r"differs by .* on average|decides otherwise|scores"):
        prove(DIGIT, wrong.network, TorchAnswers(network), exam, precision, rounded=wrong.rounded)


def test_int8_with_scales_from_the_batch_at_hand_is_refused(graph: bytes, exam: Exam) -> None:
    """What dynamic quantisation does: one scale for the batch, so a bright neighbour costs levels."""
    model = onnx.load_model_from_string(graph)
    logits = next(node for node in model.graph.node if node.op_type == "Softmax").input[0]
    position = next(number for number, node in enumerate(model.graph.node) if node.op_type == "Softmax")
    model.graph.node[position].input[0] = "back"
    model.graph.node.insert(
        position, helper.make_node("DynamicQuantizeLinear", [logits], ["levels", "scale", "zero"])
    )
    model.graph.node.insert(
        position + 1, helper.make_node("DequantizeLinear", ["levels", "scale", "zero"], ["back"])
    )
    dynamic = model.SerializeToString()
    with pytest.raises(ProofFailed, match=r"between a row of .* in a batch of \d+ and the same row alone"):
        prove(DIGIT, dynamic, RuntimeAnswers(DIGIT, dynamic), exam, "int8")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_graph_that_mixes_rows_is_refused_in_every_precision(
    graph: bytes, exam: Exam, precision: str
) -> None:
    mixing = sabotaged(graph, mix_rows)
    with pytest.raises(ProofFailed, match=r"between a row of .* in a batch of 2 and the same row alone"):
        prove(DIGIT, mixing, RuntimeAnswers(DIGIT, mixing), exam, precision)


def scaled_inside(graph: bytes, factor: float) -> bytes:
    """The same function with one layer's numbers `factor` times larger, and the next one's smaller."""
    model = onnx.load_model_from_string(graph)
    first, second = [node for node in model.graph.node if node.op_type == "Conv"][:2]
    for one in model.graph.initializer:
        by = {first.input[1]: factor, first.input[2]: factor, second.input[1]: 1 / factor}.get(one.name)
        if by is not None:
            one.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(one) * np.float32(by), one.name))
    return bytes(model.SerializeToString())


def test_an_overflow_inside_an_fp16_graph_is_refused(graph: bytes, network: nn.Module, exam: Exam) -> None:
    large = fp16(scaled_inside(graph, 2.0**14))
    with pytest.raises(ProofFailed, match=r"in fp16, .* overflows|is no number|differs by up to nan"):
        prove(DIGIT, large.network, TorchAnswers(network), exam, "fp16", rounded=large.rounded)


def test_an_overflow_that_later_layers_hide_is_refused(graph: bytes, exam: Exam) -> None:
    """A sigmoid makes 1 of infinity: the answers are right, and one number inside is not."""
    model = onnx.load_model_from_string(graph)
    convolution = next(node for node in model.graph.node if node.op_type == "Conv")
    position = list(model.graph.node).index(convolution)
    for node in reversed(
        [
            helper.make_node("Mul", [convolution.output[0], "much"], ["huge"], name="huge"),
            helper.make_node("Sigmoid", ["huge"], ["step"], name="step"),
            helper.make_node("Conv", ["step", convolution.input[1] + ".again"], ["again"], name="again"),
        ]
    ):
        model.graph.node.insert(position + 1, node)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(6e4), "much"))
    model.graph.initializer.append(
        numpy_helper.from_array(np.ones((1, 16, 3, 3), np.float32), convolution.input[1] + ".again")
    )
    # Something must need it, or it would be taken out: add nothing of it to the answer.
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    position = list(model.graph.node).index(softmax)
    for node in reversed(
        [
            helper.make_node("Mul", ["again", "nothing"], ["none"], name="none"),
            helper.make_node("ReduceMean", ["none", "axes"], ["flat"], name="flat", keepdims=0),
            helper.make_node("Add", [softmax.input[0], "flat"], ["logits.same"], name="same"),
        ]
    ):
        model.graph.node.insert(position, node)
    softmax.input[0] = "logits.same"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    network = bytes(model.SerializeToString())
    converted = fp16(network)
    with pytest.raises(ProofFailed, match=r"in fp16, .*huge.* overflows: it reaches .* end at 65504"):
        prove(
            DIGIT, converted.network, RuntimeAnswers(DIGIT, network), exam, "fp16", rounded=converted.rounded
        )


def test_a_weight_beyond_fp16_is_refused_before_it_is_clipped(graph: bytes) -> None:
    with pytest.raises(ExportRefused, match=r"reach .* and fp16 ends at 65504; leave fp16 out"):
        fp16(scaled_inside(graph, 2.0**20))


def test_weights_stored_small_are_cast_once_and_come_back(graph: bytes, exam: Exam) -> None:
    small = stored_small(graph)
    assert len(small) < 0.55 * len(graph)
    proof = prove(DIGIT, small, RuntimeAnswers(DIGIT, graph), exam, "fp32 stored as fp16", beside="fp32")
    assert 0 < proof.largest_difference < 0.01
    back = unfolded(small)
    assert weights_of(back).keys() == weights_of(graph).keys()
    same = prove(DIGIT, back, RuntimeAnswers(DIGIT, small), exam)
    assert same.largest_difference < 1e-6


def test_a_temperature_is_taken_in_by_the_last_layer(graph: bytes, exam: Exam) -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))

    class Pixels(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return inner(pixels.float() / 255)

    warm = Probabilities(Pixels(), 0.5)
    made = tempered(DIGIT, to_onnx(Probabilities(Pixels()), DIGIT), 0.5)
    assert prove(DIGIT, made, TorchAnswers(warm), exam).largest_difference < 1e-5


# ---------------------------------------------------------------- texts

WORDS = 70_000


class Reader(nn.Module):
    """A transformer's parts in pocket size: a large table, a layer norm, products of three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.Embedding(WORDS, 16)
        self.norm = nn.LayerNorm(16)
        self.inner = nn.Linear(16, 64)
        self.outer = nn.Linear(64, 16)
        self.answer = nn.Linear(16, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        read = self.norm(self.vectors(tokens))
        read = read + self.outer(nn.functional.gelu(self.inner(read)))
        is_word = (tokens != 0).unsqueeze(-1).float()
        mean = (read * is_word).sum(1) / is_word.sum(1).clamp(min=1)
        return torch.softmax(4 * self.answer(mean), 1)


TEXTS = Room(
    name="texts",
    task="Tells two kinds of text apart.",
    takes="texts",
    labels=("one", "other"),
    inputs=(),
    outputs=(),
    network_inputs=(Tensor("tokens", "INT64", (-1,)),),
    network_outputs=(Tensor("probabilities", "FP32", (2,)),),
    to_tensor=lambda inputs: Sample(()),
    to_answer=lambda row, sample: Classification((), row[0]),
    example={},
)


@pytest.fixture(scope="module")
def reader() -> nn.Module:
    torch.manual_seed(0)
    return Reader().eval()


@pytest.fixture(scope="module")
def texts(reader: nn.Module) -> Exam:
    numbers = np.random.default_rng(0)
    tokens = np.zeros((120, 40), np.int64)
    for row in tokens:
        length = int(numbers.integers(1, 41))
        row[:length] = numbers.integers(1, WORDS, length)
    truth = likeliest(TorchAnswers(reader)([tokens]))

    def trim(inputs: Sequence[Array]) -> list[Array]:
        return [inputs[0][:, : max(1, int((inputs[0] != 0).sum(1).max()))]]

    def surety(outputs: Sequence[Array], truth: Array) -> dict[str, float]:
        return {"surety": float(outputs[0].max(axis=1).mean())}

    return Exam("texts", (tokens,), truth, likeliest, surety, trim=trim)


def test_a_text_reader_keeps_its_answers_in_every_precision(reader: nn.Module, texts: Exam) -> None:
    network = to_onnx(reader, TEXTS)
    half, small = fp16(network), int8(network, [])
    assert small.facts["products_in_8_bits"] == 2
    assert small.facts["tables_in_8_bits"] == 1
    assert len(small.network) < 0.35 * len(network)
    for converted, precision in ((half, "fp16"), (small, "int8")):
        proof = prove(
            TEXTS, converted.network, TorchAnswers(reader), texts, precision, rounded=converted.rounded
        )
        assert proof.same_decisions > 0.97
    assert place(half.network).fallbacks == {}


def test_a_text_in_eight_bits_does_not_see_the_texts_beside_it(reader: nn.Module, texts: Exam) -> None:
    small = RuntimeAnswers(TEXTS, int8(to_onnx(reader, TEXTS), []).network)
    loud = np.full((1, 40), 7, np.int64)
    for row in range(8):
        text = texts.inputs[0][row : row + 1]
        (alone,) = small(texts.trim([text]) if texts.trim else [text])
        (together,) = small([np.concatenate([text, loud])])
        np.testing.assert_allclose(together[0], alone[0], atol=1e-5)
