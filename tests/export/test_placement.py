"""Each node is compared with the CUDA kernels there are; what falls back is named, with the reason."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.errors import ProofFailed
from export.placement import Placement, has_kernel, place, refuse_fallbacks
from export.precision import fp16
from service.models.digit import DIGIT

HALF = TensorProto.FLOAT16
FLOAT = TensorProto.FLOAT


def network(*nodes: onnx.NodeProto, datatype: int = FLOAT, opset: int = 20, **constants: np.ndarray) -> bytes:
    """A graph from `x` [batch, 4, 8] to `y`."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", datatype, ["batch", 4, 8])],
        [helper.make_tensor_value_info("y", datatype, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def test_the_digit_network_runs_wholly_on_cuda(graph: bytes) -> None:
    for one in (graph, fp16(graph).network):
        placement = place(one)
        assert placement.nodes == placement.on_cuda > 20
        assert placement.fallbacks == {}
        refuse_fallbacks(DIGIT, "fp16", placement)


def test_an_operator_without_a_cuda_kernel_is_refused_by_name() -> None:
    placement = place(network(helper.make_node("Acosh", ["x"], ["y"], name="curve")))
    assert placement == Placement(1, 0, 0, {"curve": "Acosh: there is no CUDA kernel"})
    with pytest.raises(
        ProofFailed,
        match=r"digit: 1 of 1 nodes of the fp16 graph would fall back to the CPU; the first is curve \(Acosh",
    ):
        refuse_fallbacks(DIGIT, "fp16", placement)


def test_a_datatype_without_a_kernel_is_named() -> None:
    counting = helper.make_node("Mod", ["x", "two"], ["y"], name="rest", fmod=1)
    assert place(network(counting, two=np.float32([2]))).fallbacks == {}
    small = network(
        helper.make_node("Cast", ["x"], ["small"], to=TensorProto.INT8),
        helper.make_node("ReduceMax", ["small", "axes"], ["most"], name="most"),
        helper.make_node("BitwiseNot", ["most"], ["turned"], name="turned"),
        helper.make_node("Cast", ["turned"], ["y"], to=FLOAT),
        axes=np.array([1]),
    )
    assert set(place(small).fallbacks) >= {"turned"}


def test_what_the_provider_leaves_to_the_cpu_by_rule_is_named() -> None:
    weights = np.ones((1, 9, 8), np.float32), np.ones((1, 9, 3), np.float32)
    for before, reasons in ((0, ["GRU: cuDNN resets after the linear layer, not before"]), (1, [])):
        recurrent = network(
            helper.make_node(
                "GRU", ["x", "w", "r"], ["y"], name="gru", hidden_size=3, linear_before_reset=before
            ),
            w=weights[0],
            r=weights[1],
        )
        assert list(place(recurrent).fallbacks.values()) == reasons
    slanted = network(
        helper.make_node("ConvTranspose", ["x", "w"], ["y"], name="up", pads=[0, 1]),
        w=np.ones((4, 4, 3), np.float32),
    )
    assert "the same at both ends" in place(slanted).fallbacks["up"]


def test_shape_arithmetic_stays_on_the_cpu_and_is_counted_apart() -> None:
    zeros = network(
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("Mul", ["shape", "two"], ["wanted"], name="twice"),
        helper.make_node("ConstantOfShape", ["wanted"], ["y"], name="zeros"),
        two=np.array([2]),
    )
    placement = place(zeros)
    assert placement.shape_arithmetic == 2
    assert (placement.nodes, placement.on_cuda) == (1, 1)


def test_casts_to_and_from_fp16_are_looked_at_too() -> None:
    there_and_back = network(
        helper.make_node("Cast", ["x"], ["half"], name="down", to=HALF),
        helper.make_node("Relu", ["half"], ["positive"], name="relu"),
        helper.make_node("Cast", ["positive"], ["y"], name="up", to=FLOAT),
    )
    assert place(there_and_back) == Placement(3, 3, 0, {})


def test_the_table_knows_datatypes_and_opsets() -> None:
    assert has_kernel("", "Conv", 20, "tensor(float16)")
    assert has_kernel("com.microsoft", "SkipLayerNormalization", 1, "tensor(float16)")
    assert not has_kernel("", "Acosh", 20, "tensor(float)")
    assert not has_kernel("", "Conv", 20, "tensor(int8)")
