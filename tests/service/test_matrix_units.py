"""Eight-bit convolutions for processors with matrix units: other weights, the same answers to the bit."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.matrix_units import for_matrix_units, suited
from service.models import MODELS
from service.models.spec import Array
from service.providers import Profile, eight_bit_instructions
from service.repository import Repository
from service.runtime import CPU
from tests.conftest import MODELS_FOLDER


def answers(network: bytes, feed: dict[str, Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


def layer(
    *,
    channels: int = 64,
    kernel: int = 3,
    zero_point: int = 0,
    is_raw: bool = True,
    largest: int = 63,
    operator: str = "Conv",
    readers: int = 1,
) -> bytes:
    """One eight-bit layer as export writes it, with `channels` in and out and weights up to `largest`."""
    generator = np.random.default_rng(0)
    weights = generator.integers(-63, 64, (channels, channels, kernel, kernel)).astype(np.int8)
    weights.flat[0] = largest
    constants = {
        "weights": weights,
        "scales": generator.random(channels).astype(np.float32) / 1000,
        "zero_points": np.full(channels, zero_point, np.int8),
        "scale": np.float32(0.02),
        "middle": np.uint8(128),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["picture", "scale", "middle"], ["levels"]),
        helper.make_node("DequantizeLinear", ["levels", "scale", "middle"], ["rounded"]),
    ]
    for number in range(readers):
        nodes += [
            helper.make_node(
                "DequantizeLinear", ["weights", "scales", "zero_points"], [f"filters{number}"], axis=0
            ),
            helper.make_node(
                operator, ["rounded", f"filters{number}"], [f"found{number}"], pads=[kernel // 2] * 4
            ),
            helper.make_node("QuantizeLinear", [f"found{number}", "scale", "middle"], [f"bytes{number}"]),
            helper.make_node("DequantizeLinear", [f"bytes{number}", "scale", "middle"], [f"out{number}"]),
        ]
    shape = ["n", channels, 7, 7]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("picture", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info(f"out{number}", TensorProto.FLOAT, shape)
            for number in range(readers)
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    if not is_raw:
        # ONNX's other way to keep small numbers: in words.
        words = helper.make_tensor("zero_points", TensorProto.INT8, [channels], [zero_point] * channels)
        next(one for one in graph.initializer if one.name == "zero_points").CopyFrom(words)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("name", ["digit", "image", "detection", "generator"])
def test_shipped_networks_answer_to_the_bit_as_before(name: str) -> None:
    room = MODELS[name]
    files = Repository(MODELS_FOLDER).open(name, None, ("int8",))
    room = files.furnish(room)
    changed = for_matrix_units(files.network)
    assert changed != files.network
    onnx.checker.check_model(onnx.load_model_from_string(changed), full_check=True)
    generator = np.random.default_rng(7)
    sample = room.to_tensor(room.example)
    for size in (1, 3):
        feed = {}
        for tensor, value in zip(room.network_inputs, sample.tensors, strict=True):
            batch = np.stack([value] * size)
            if batch.dtype == np.uint8:
                batch[1:] = generator.integers(0, 256, batch[1:].shape)
            feed[tensor.name] = batch
        for before, after in zip(answers(files.network, feed), answers(changed, feed), strict=True):
            np.testing.assert_array_equal(before, after)


def test_a_text_network_has_nothing_to_change() -> None:
    network = Repository(MODELS_FOLDER).open("sentiment", None, ("int8",)).network
    assert for_matrix_units(network) is network


@pytest.mark.parametrize("is_raw", [True, False])
def test_weights_and_zero_point_move_up_together(is_raw: bool) -> None:
    before = layer(is_raw=is_raw)
    after = onnx.load_model_from_string(for_matrix_units(before))
    constants = {one.name: numpy_helper.to_array(one) for one in after.graph.initializer}
    original = {
        one.name: numpy_helper.to_array(one) for one in onnx.load_model_from_string(before).graph.initializer
    }
    np.testing.assert_array_equal(constants["weights"], original["weights"] + 1)
    reader = next(node for node in after.graph.node if node.input[0] == "weights")
    assert constants[reader.input[2]].tolist() == [1] * 64
    picture = np.random.default_rng(1).standard_normal((2, 64, 7, 7)).astype(np.float32)
    (was,) = answers(before, {"picture": picture})
    (now,) = answers(after.SerializeToString(), {"picture": picture})
    assert len(np.unique(was)) > 20
    np.testing.assert_array_equal(was, now)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"channels": 48}, id="few-channels"),
        pytest.param({"kernel": 1}, id="few-products"),
        pytest.param({"zero_point": 3}, id="another-zero-point"),
        pytest.param({"zero_point": 3, "is_raw": False}, id="another-zero-point-in-words"),
        pytest.param({"largest": 127}, id="no-level-left"),
        pytest.param({"operator": "ConvTranspose"}, id="another-operator"),
        pytest.param({"readers": 2}, id="shared-weights"),
    ],
)
def test_what_gains_nothing_or_cannot_be_moved_is_left_alone(shape: dict[str, Any]) -> None:
    network = layer(**shape)
    assert for_matrix_units(network) is network


@pytest.mark.parametrize("content", [b"", b"no ONNX file", b"\xff" * 100 + b"DequantizeLinear"])
def test_what_is_no_onnx_file_is_left_to_onnx_runtime(content: bytes) -> None:
    assert for_matrix_units(content) is content


def test_only_processors_with_matrix_units_get_the_other_form() -> None:
    network = layer()
    assert (suited(network, CPU) != network) == ("amx_int8" in eight_bit_instructions())
    assert suited(network, Profile("cuda")) is network
