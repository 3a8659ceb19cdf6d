"""Less work for the same answers: what is folded, what is repeated, and what is left alone."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from export.simplify import simplified
from export.to_onnx import TorchAnswers, to_onnx
from service.models.image import IMAGE
from service.models.spec import Array
from training.image import ARCHITECTURES


def operators(network: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_model_from_string(network).graph.node]


def answer(network: bytes, pixels: Array) -> Array:
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: pixels})
    return np.asarray(found)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """The image model's own network; its statistics are those of some noise, so that they matter."""
    torch.manual_seed(3)
    network = nn.Sequential(ARCHITECTURES["cnn"](), nn.Softmax(1))
    network.train()
    with torch.no_grad():
        network(torch.randint(0, 256, (16, 32, 32, 3)).float())
    return network.eval()


def test_a_network_that_pools_before_it_normalises_answers_as_before_with_less_to_do(
    network: nn.Module,
) -> None:
    exported = to_onnx(network, IMAGE)
    assert operators(exported).count("BatchNormalization") == 3
    simple = simplified(exported)
    onnx.checker.check_model(onnx.load_model_from_string(simple), full_check=True)
    assert "BatchNormalization" not in operators(simple)
    assert len(operators(simple)) == len(operators(exported)) - 3
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    (right,) = TorchAnswers(network)([pixels])
    assert right.max(axis=1).std() > 1e-4, "answers that are all alike would prove nothing"
    np.testing.assert_allclose(answer(simple, pixels), right, atol=1e-5)
    assert simplified(simple) == simple


def pooled(*, factor: float = 1.0, is_read_twice: bool = False) -> bytes:
    """A convolution, the maximum of each four places, and a normalisation, one of whose factors is given."""
    generator = np.random.default_rng(1)
    constants = {
        "weights": generator.standard_normal((8, 4, 3, 3)),
        "scale": np.append(generator.random(7) + 0.5, factor),
        "shift": generator.standard_normal(8),
        "mean": generator.standard_normal(8),
        "variance": generator.random(8) + 0.5,
    }
    nodes = [
        helper.make_node("Conv", ["picture", "weights"], ["convolved"]),
        helper.make_node("MaxPool", ["convolved"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("BatchNormalization", ["pooled", "scale", "shift", "mean", "variance"], ["normal"]),
        helper.make_node("Add", ["normal", "pooled"] if is_read_twice else ["normal", "normal"], ["sum"]),
    ]
    graph = helper.make_graph(
        nodes,
        "pooled",
        [helper.make_tensor_value_info("picture", TensorProto.FLOAT, ["n", 4, 10, 10])],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["n", 8, 4, 4])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def test_a_normalisation_behind_a_maximum_goes_before_it() -> None:
    network = pooled()
    simple = simplified(network)
    assert operators(simple) == ["Conv", "MaxPool", "Add"]
    picture = np.random.default_rng(2).standard_normal((3, 4, 10, 10)).astype(np.float32)
    np.testing.assert_allclose(answer(simple, picture), answer(network, picture), atol=1e-4)


@pytest.mark.parametrize(
    "network",
    [
        # The greatest number would become the least.
        pytest.param(pooled(factor=-1.0), id="turns-the-order-round"),
        pytest.param(pooled(factor=0.0), id="makes-all-alike"),
        pytest.param(pooled(is_read_twice=True), id="others-read-what-it-takes"),
    ],
)
def test_a_normalisation_that_cannot_move_stays(network: bytes) -> None:
    assert simplified(network) is network


def centred(
    row: list[float], shape: list[int | str], *, datatype: int = TensorProto.FLOAT, operator: str = "Sub"
) -> bytes:
    """An input less a constant."""
    constant = helper.make_tensor("row", datatype, [len(row)], row)
    graph = helper.make_graph(
        [helper.make_node(operator, ["pixels", "row"], ["centred"])],
        "centred",
        [helper.make_tensor_value_info("pixels", datatype, shape)],
        [helper.make_tensor_value_info("centred", datatype, shape)],
        [constant],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("operator", ["Add", "Div", "Mul", "Sub"])
def test_a_short_constant_is_repeated_to_long_rows(operator: str) -> None:
    network = centred([3.0, 5.0, 7.0], ["n", 6, 32, 3], operator=operator)
    simple = simplified(network)
    (constant,) = onnx.load_model_from_string(simple).graph.initializer
    assert list(constant.dims) == [32, 3]
    pixels = np.random.default_rng(4).standard_normal((2, 6, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(answer(simple, pixels), answer(network, pixels))


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(centred([3.0] * 17, ["n", 32, 17]), id="long-enough"),
        pytest.param(centred([3.0], ["n", 32, 3]), id="one-number"),
        pytest.param(centred([3.0, 4.0, 5.0], ["n", 3]), id="rows-are-the-batch"),
        pytest.param(centred([3.0, 4.0, 5.0], ["n", "w", 3]), id="rows-of-any-number"),
        pytest.param(centred([3.0, 4.0, 5.0], ["n", 2000, 3]), id="would-be-too-long"),
        pytest.param(centred([3, 4, 5], ["n", 32, 3], datatype=TensorProto.INT64), id="whole-numbers"),
    ],
)
def test_other_constants_stay(network: bytes) -> None:
    assert simplified(network) is network


def test_what_is_no_constant_is_no_constant() -> None:
    network = centred([1.0, 2.0, 3.0], ["n", 32, 3])
    model = onnx.load_model_from_string(network)
    model.graph.input.append(helper.make_tensor_value_info("row", TensorProto.FLOAT, [3]))
    del model.graph.initializer[:]
    given = bytes(model.SerializeToString())
    assert simplified(given) is given
