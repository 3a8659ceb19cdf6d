"""The same network with less to do: what ONNX Runtime's own optimisations leave standing."""

import math
from collections import Counter
from typing import Final

import numpy as np
import onnx
from onnx import numpy_helper

from export.graphs import drop_unused
from service.models.spec import Array

ELEMENTWISE: Final = frozenset({"Add", "Div", "Mul", "Sub"})

SHORT_ROW: Final = 16
"""Numbers; a loop over fewer costs more to begin than to run."""

LONGEST_ROW: Final = 4096
"""Numbers; a longer constant would no longer stay in the fastest cache."""


def simplified(network: bytes) -> bytes:
    """An ONNX file that gives the same answers, but for rounding, with less work.

    Normalisation behind a pooling becomes part of the convolution before it, and
    constants along a short last axis, as a mean for each of three colours, are repeated to long rows
    (on one core of a Xeon that took away 19 % of the cell detector's time, in eight bits).

    Args:
        network: The fp32 ONNX file.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(network))
    changes = [_normalise_before_pooling(model), _repeat_short_constants(model)]
    if not any(changes):
        return network
    drop_unused(model)
    del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def _normalise_before_pooling(model: onnx.ModelProto) -> int:
    """Fold each batch normalisation behind a maximum into the convolution before it; how many.

    With factors above 0, which keep the order of numbers, the greatest of the normalised is the greatest,
    normalised.
    """
    graph = model.graph
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(one.name for one in graph.output)
    folded = 0
    for normalisation in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        pooling = makers.get(normalisation.input[0])
        convolution = makers.get(pooling.input[0]) if pooling and pooling.op_type == "MaxPool" else None
        if pooling is None or convolution is None or convolution.op_type != "Conv":
            continue
        if any(readers[node.output[0]] > 1 for node in (pooling, convolution)):
            continue
        if any(name not in constants for name in (*normalisation.input[1:], *convolution.input[1:])):
            continue
        scale, shift, mean, variance = (constants[name] for name in normalisation.input[1:5])
        epsilon = next((one.f for one in normalisation.attribute if one.name == "epsilon"), 1e-5)
        factors = scale / np.sqrt(variance.astype(np.float64) + epsilon)
        if factors.min() <= 0:
            continue
        weights = constants[convolution.input[1]]
        bias = constants[convolution.input[2]] if len(convolution.input) > 2 else np.zeros_like(mean)
        scaled = weights * factors.reshape(-1, *[1] * (weights.ndim - 1))
        _replace(graph, convolution, 1, scaled, normalisation.name)
        _replace(graph, convolution, 2, (bias - mean) * factors + shift, normalisation.name)
        pooling.output[0] = normalisation.output[0]
        graph.node.remove(normalisation)
        folded += 1
    return folded


def _repeat_short_constants(model: onnx.ModelProto) -> int:
    """Repeat constants [c] that meet tensors [..., w, c] to [w, c], where c is small; how many.

    ONNX Runtime begins a loop for each row of a constant that it spreads over a tensor.
    """
    graph = model.graph
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    shapes = {
        one.name: [axis.dim_value for axis in one.type.tensor_type.shape.dim]
        for one in (*graph.input, *graph.value_info)
    }
    repeated = 0
    for node in graph.node:
        if node.op_type not in ELEMENTWISE:
            continue
        for position, name in enumerate(node.input):
            shape = shapes.get(node.input[1 - position], [])
            row = constants.get(name)
            if (
                row is None
                or row.dtype != np.float32
                or row.ndim != 1
                or not 1 < len(row) <= SHORT_ROW
                or len(shape) < 2
            ):
                continue
            # A free axis has no length here, that is 0.
            if shape[-1] == len(row) and shape[-2] > 1 and math.prod(shape[-2:]) <= LONGEST_ROW:
                _replace(graph, node, position, np.tile(row, (shape[-2], 1)), node.name)
                repeated += 1
    return repeated


def _replace(graph: onnx.GraphProto, node: onnx.NodeProto, position: int, value: Array, why: str) -> None:
    """Give a node a constant of its own in the place of its input, fp32."""
    name = f"{node.input[position] if position < len(node.input) else node.output[0]}.{why}"
    graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    if position < len(node.input):
        node.input[position] = name
    else:
        node.input.append(name)
