"""What can be asked of an ONNX graph: its datatypes, and where its weights begin and end."""

import math
from typing import Final

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper

HEAVY_OPERATORS: Final = frozenset(
    {
        "Attention",
        "Conv",
        "ConvTranspose",
        "EmbedLayerNormalization",
        "FusedMatMul",
        "GRU",
        "Gather",
        "Gemm",
        "LSTM",
        "MatMul",
        "RNN",
    }
)
"""What multiplies by weights, or looks them up."""

MANY_NUMBERS: Final = 64
"""A constant of more numbers than this, along two axes or more, is a weight."""

ELEMENT_TYPES: Final = {
    "tensor(bool)": TensorProto.BOOL,
    "tensor(uint8)": TensorProto.UINT8,
    "tensor(int8)": TensorProto.INT8,
    "tensor(int32)": TensorProto.INT32,
    "tensor(int64)": TensorProto.INT64,
    "tensor(float16)": TensorProto.FLOAT16,
    "tensor(float)": TensorProto.FLOAT,
    "tensor(double)": TensorProto.DOUBLE,
}


def quiet_session(network: bytes, level: str = "ALL", *, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session on the CPU.

    Args:
        network: The ONNX file.
        level: How far the graph is optimised: `DISABLE_ALL`, `BASIC`, `EXTENDED` or `ALL`.
        threads: Threads inside a run.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel,
        f"ORT_{level}" if level == "DISABLE_ALL" else f"ORT_ENABLE_{level}",
    )
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])


def with_all_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that gives out every tensor that a node makes; ONNX Runtime finds out their types."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    given = {output.name for output in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in given:
                opened.graph.output.add().name = name
    return opened


def types_of(model: onnx.ModelProto) -> dict[str, str]:
    """Every tensor's datatype, as ONNX Runtime calls it, by the tensor's name: `tensor(float16)`.

    ONNX Runtime is asked rather than ONNX's own inference, which knows none of its fused operators.
    """
    session = quiet_session(with_all_outputs(model).SerializeToString(), "DISABLE_ALL")
    names: dict[int, str] = {number: name for name, number in ELEMENT_TYPES.items()}
    constants = {one.name: names.get(one.data_type, "other") for one in model.graph.initializer}
    return constants | {one.name: one.type for one in (*session.get_inputs(), *session.get_outputs())}


def in_floats(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which all that is fp16 is fp32."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for one in copy.graph.initializer:
        if one.data_type == TensorProto.FLOAT16:
            one.CopyFrom(_as_floats(one))
    for node in copy.graph.node:
        for attribute in node.attribute:
            if attribute.name in {"to", "dtype"} and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT16:
                attribute.t.CopyFrom(_as_floats(attribute.t))
    return copy


def _as_floats(tensor: TensorProto) -> TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def outside_the_weights(model: onnx.ModelProto) -> tuple[set[str], set[str]]:
    """The nodes before the first weights and those after the last, by name.

    The first bring the input to where the network wants it, the last make the answer of what
    the network found: few numbers, on whose precision everything depends.
    """
    nodes = model.graph.node
    heavy = _heavy(model)
    makers = {name: node.name for node in nodes for name in node.output}
    behind: set[str] = set()
    for node in nodes:
        if node.name in heavy or any(makers.get(name) in behind for name in node.input):
            behind.add(node.name)
    ahead = _ahead(model)
    after = {node.name for node in nodes} - ahead - heavy.keys()
    return {node.name for node in nodes} - behind - after, after


def first_and_last(model: onnx.ModelProto) -> set[str]:
    """Names of the convolutions that see the raw input, and of the last nodes with weights.

    A convolution sees the raw input where no weights come before it and it has up to four
    channels: too few for eight-bit instructions, which take four products at a time.
    """
    before, _ = outside_the_weights(model)
    makers = {name: node.name for node in model.graph.node for name in node.output}
    heavy = _heavy(model)
    raw = {
        node.name
        for node in model.graph.node
        if node.op_type == "Conv"
        and makers.get(node.input[0], "") in {*before, ""}
        and heavy[node.name][1] <= 4
    }
    return raw | (heavy.keys() - _ahead(model))


def ordered(model: onnx.ModelProto) -> None:
    """Put the nodes in an order in which each comes after those it takes from, in place."""
    waiting = list(model.graph.node)
    there = {"", *(one.name for one in model.graph.input), *(one.name for one in model.graph.initializer)}
    done: list[onnx.NodeProto] = []
    while waiting:
        ready = [node for node in waiting if needed(node) <= there]
        assert ready, "the graph takes a tensor that nothing makes"
        # One pass may free the next node of the same pass: keep to the order that there was.
        for node in list(waiting):
            if needed(node) <= there:
                done.append(node)
                there.update(node.output)
                waiting.remove(node)
    del model.graph.node[:]
    model.graph.node.extend(done)


def needed(node: onnx.NodeProto) -> set[str]:
    """What a node takes from outside of itself, its inner graphs included."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            made = {name for inner in graph.node for name in inner.output}
            made.update(one.name for one in graph.input)
            made.update(one.name for one in graph.initializer)
            names |= {name for inner in graph.node for name in needed(inner)} - made
    return names


def drop_unused(model: onnx.ModelProto) -> None:
    """Take out constants that no node takes, in place."""
    used = {name for node in model.graph.node for name in node.input}
    for one in list(model.graph.initializer):
        if one.name not in used:
            model.graph.initializer.remove(one)


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every node has a name of its own."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    taken: set[str] = set()
    for number, node in enumerate(copy.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{number}"
        taken.add(node.name)
    return copy


def _heavy(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The nodes that bring weights of their own, by name, with the weights' shape."""
    weights = {
        one.name: tuple(one.dims)
        for one in model.graph.initializer
        if len(one.dims) >= 2 and math.prod(one.dims) > MANY_NUMBERS
    }
    return {
        node.name: weights[name]
        for node in model.graph.node
        if node.op_type in HEAVY_OPERATORS
        for name in node.input
        if name in weights
    }


def _ahead(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes after which more weights come."""
    heavy = _heavy(model)
    users: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, set()).add(node.name)
    ahead: set[str] = set()
    for node in list(model.graph.node)[::-1]:
        later = {user for name in node.output for user in users.get(name, ())}
        if later & (ahead | heavy.keys()):
            ahead.add(node.name)
    return ahead
