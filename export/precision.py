"""A proven fp32 graph to smaller numbers: fp16 for GPUs, int8 for CPUs.

Both start from the fp32 ONNX file, and both leave alone what lies outside of the weights:
the input's normalisation and the answer's softmax hold few numbers and decide much.
Neither is believed: `proof.py` compares what comes out with what went in.
"""

import contextlib
import io
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from onnxruntime.transformers.optimizer import optimize_model

from export.errors import ExportRefused
from export.graphs import (
    drop_unused,
    first_and_last,
    in_floats,
    named,
    ordered,
    outside_the_weights,
    quiet_session,
    types_of,
    with_all_outputs,
)
from export.placement import has_kernel
from service.models.spec import Array, Room

LARGEST_HALF: Final = 65504.0
"""The largest number that sixteen bits hold."""

MEANT_AS_INFINITY: Final = 1e30
"""Larger numbers are no quantities: attention masks use them for minus infinity."""

LARGE_TABLE: Final = 2**20
"""A table of vectors with fewer numbers than this is not worth making smaller."""

CALIBRATION_BYTES: Final = 2**30
"""How much memory the activations may take that a range is chosen from."""

CALIBRATIONS: Final[tuple[tuple[str, CalibrationMethod, dict[str, float]], ...]] = (
    ("smallest and largest", CalibrationMethod.MinMax, {}),
    ("99.999 %", CalibrationMethod.Percentile, {"CalibPercentile": 99.999}),
    ("99.99 %", CalibrationMethod.Percentile, {"CalibPercentile": 99.99}),
    ("entropy", CalibrationMethod.Entropy, {}),
)
"""Ways to choose what range of an activation the 256 levels cover."""

QUANTISED: Final = (
    "Add",
    "AveragePool",
    "Clip",
    "Concat",
    "Conv",
    "Gemm",
    "GlobalAveragePool",
    "LeakyRelu",
    "MatMul",
    "MaxPool",
    "Mul",
    "Relu",
    "Resize",
    "Sigmoid",
    "Split",
)
"""What ONNX Runtime has eight-bit kernels for on the CPU, less softmax: an answer in 256 levels."""


@dataclass(frozen=True)
class Converted:
    """One graph in another precision.

    Attributes:
        network: The ONNX file.
        facts: How it was made, for the card.
        rounded: For fp16, the graph that computes in fp32 on the CPU what a GPU computes in
            fp16: every number rounded to sixteen bits as soon as it is there. None elsewhere.
    """

    network: bytes
    facts: dict[str, Any] = field(default_factory=dict)
    rounded: bytes | None = None


# ---------------------------------------------------------------- fp16


def fp16(network: bytes) -> Converted:
    """Store weights and compute in sixteen bits; what goes in and comes out keeps its type.

    Args:
        network: The fp32 ONNX file.

    Returns:
        The file, and in its facts the operators that stay in fp32, each with the reason.

    Raises:
        ExportRefused: a weight is too large for sixteen bits.
    """
    model = named(onnx.shape_inference.infer_shapes(onnx.load_model_from_string(network)))
    fused = _fused(model)
    for one in model.graph.initializer:
        if one.data_type == TensorProto.FLOAT:
            _refuse_overflow(one)
    before, after = outside_the_weights(model)
    blocked = _without_half_kernels(model)
    constants = {one.name for one in model.graph.initializer}
    for described in list(model.graph.value_info):
        # The converter would take a constant of the nodes that stay for one that turns.
        if described.name in constants:
            model.graph.value_info.remove(described)
    converted = convert_float_to_float16(
        model,
        keep_io_types=True,
        disable_shape_infer=True,
        op_block_list=list(blocked),
        node_block_list=sorted(before | after),
    )
    _drop_roundtrips(converted)
    ordered(converted)
    del converted.graph.value_info[:]
    onnx.checker.check_model(converted)
    reasons = {
        "no CUDA kernel takes them in fp16": blocked,
        "before the first weights": {node.op_type for node in model.graph.node if node.name in before},
        "after the last weights": {node.op_type for node in model.graph.node if node.name in after},
    }
    stays = {reason: sorted(operators) for reason, operators in reasons.items() if operators}
    facts: dict[str, Any] = {"kept_in_fp32": stays, **({"fused": fused} if fused else {})}
    return Converted(bytes(converted.SerializeToString(deterministic=True)), facts, rounded(converted))


def _fused(model: onnx.ModelProto) -> dict[str, int]:
    """Fuse a transformer's attention and normalisation, in place; how many of each operator that made.

    Other networks are left as they are: ONNX Runtime fuses those itself when it loads them.
    """
    if not any(node.op_type == "LayerNormalization" for node in model.graph.node):
        return {}
    with tempfile.TemporaryDirectory() as folder, _silence():
        path = Path(folder) / "transformer.onnx"
        onnx.save(model, path)
        optimized = optimize_model(str(path), "bert", opt_level=0, only_onnxruntime=False)
    kept = (model.graph.name, model.doc_string)
    model.CopyFrom(named(optimized.model))
    model.graph.name, model.doc_string = kept
    if all(one.domain != "com.microsoft" for one in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return dict(
        sorted(Counter(node.op_type for node in model.graph.node if node.domain == "com.microsoft").items())
    )


def _refuse_overflow(weights: TensorProto) -> None:
    """Refuse weights that sixteen bits cannot hold; the converter would clip them and say nothing."""
    largest = float(np.abs(numpy_helper.to_array(weights)).max(initial=0))
    if LARGEST_HALF < largest < MEANT_AS_INFINITY:
        raise ExportRefused(
            f"The weights {weights.name} reach {largest:g} and fp16 ends at {LARGEST_HALF:g}; "
            "leave fp16 out with --variants, or train with weights that stay smaller."
        )


def _without_half_kernels(model: onnx.ModelProto) -> set[str]:
    """The operators in a graph that CUDA has no fp16 kernel for."""
    operators = {(node.domain, node.op_type) for node in model.graph.node}
    opset = next(one.version for one in model.opset_import if one.domain == "")
    return {
        operator
        for domain, operator in operators
        if operator in DEFAULT_OP_BLOCK_LIST and not has_kernel(domain, operator, opset, "tensor(float16)")
    }


def _drop_roundtrips(model: onnx.ModelProto) -> None:
    """Take out casts to fp16 whose only readers cast back: two nodes at the edge of what stays in fp32."""
    makers = {name: node for node in model.graph.node for name in node.output}
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        source = makers.get(node.input[0]) if node.op_type == "Cast" else None
        is_back = source is not None and source.op_type == "Cast" and _casts_to(node, TensorProto.FLOAT)
        if is_back and source is not None and _casts_to(source, TensorProto.FLOAT16):
            # What went in was fp32: the converter casts nothing else before a node that stays.
            renamed[node.output[0]] = source.input[0]
    given = {output.name for output in model.graph.output}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
    for name, source_name in renamed.items():
        if name in given:
            # The graph's own output: whoever makes its number makes it under its name.
            maker = makers[source_name]
            for position, output in enumerate(maker.output):
                if output == source_name:
                    maker.output[position] = name
            for node in model.graph.node:
                for position, taken in enumerate(node.input):
                    if taken == source_name:
                        node.input[position] = name
            for node in list(model.graph.node):
                if node.op_type == "Cast" and name in node.output and node is not maker:
                    model.graph.node.remove(node)
    while True:
        used = {name for node in model.graph.node for name in node.input} | given
        idle = [node for node in model.graph.node if not used.intersection(node.output)]
        if not idle:
            return
        for node in idle:
            model.graph.node.remove(node)


def _casts_to(node: onnx.NodeProto, datatype: int) -> bool:
    return any(attribute.name == "to" and attribute.i == datatype for attribute in node.attribute)


def rounded(model: onnx.ModelProto) -> bytes:
    """What a GPU computes in fp16, in fp32 for the CPU: each number is rounded as soon as it is made.

    ONNX Runtime's CPU has hardly any fp16 kernels; it casts up, computes in fp32 and drops
    the casts between, so an fp16 file that overflows on a GPU answers well on a CPU. Here a pair
    of casts after every node brings the rounding and the overflow back. Inside a kernel, sums
    are fp32, as they are on CUDA.
    """
    types = types_of(model)
    twin = in_floats(model)
    nodes = list(twin.graph.node)
    del twin.graph.node[:]
    for node in nodes:
        after = []
        for position, name in enumerate(node.output):
            if types.get(name) == "tensor(float16)":
                node.output[position] = f"{name}.exact"
                after += [
                    helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], to=TensorProto.FLOAT16),
                    helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT),
                ]
        twin.graph.node.extend([node, *after])
    return bytes(twin.SerializeToString())


# ---------------------------------------------------------------- fp32, stored small


def stored_small(network: bytes) -> bytes:
    """The same graph with its weights stored as fp16 and cast to fp32 where they are used.

    The casts are constants, which ONNX Runtime computes once, when it loads the file.
    """
    model = onnx.load_model_from_string(network)
    casts = []
    for one in model.graph.initializer:
        if one.data_type == TensorProto.FLOAT and len(one.dims) >= 2:
            _refuse_overflow(one)
            halves = numpy_helper.to_array(one).astype(np.float16)
            casts.append(
                helper.make_node(
                    "Cast", [f"{one.name}.half"], [one.name], f"{one.name}.cast", to=TensorProto.FLOAT
                )
            )
            one.CopyFrom(numpy_helper.from_array(halves, f"{one.name}.half"))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def unfolded(network: bytes) -> bytes:
    """The graph with weights that are stored as fp16 cast to fp32: nearly what it was before."""
    model = onnx.load_model_from_string(network)
    halves = {one.name: one for one in model.graph.initializer if one.data_type == TensorProto.FLOAT16}
    for node in list(model.graph.node):
        if node.op_type == "Cast" and node.input[0] in halves and _casts_to(node, TensorProto.FLOAT):
            weights = numpy_helper.to_array(halves[node.input[0]]).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(weights, node.output[0]))
            model.graph.node.remove(node)
    drop_unused(model)
    return bytes(model.SerializeToString(deterministic=True))


def tempered(room: Room, network: bytes, temperature: float) -> bytes:
    """A classifier's graph with its logits divided by a temperature, which its last layer takes in.

    Raises:
        ExportRefused: the graph does not end in one linear layer and a softmax.
    """
    model = onnx.load_model_from_string(network)
    makers = {name: node for node in model.graph.node for name in node.output}
    last = makers[model.graph.output[0].name]
    linear = makers.get(last.input[0]) if last.op_type == "Softmax" else None
    if len(model.graph.output) != 1 or linear is None or linear.op_type != "Gemm":
        raise ExportRefused(
            f"The graph of {room} does not end in a linear layer and a softmax; leave out --temperature."
        )
    for one in model.graph.initializer:
        if one.name in linear.input[1:]:
            scaled = (numpy_helper.to_array(one) / temperature).astype(np.float32)
            one.CopyFrom(numpy_helper.from_array(scaled, one.name))
    return bytes(model.SerializeToString(deterministic=True))


# ---------------------------------------------------------------- int8


def int8(network: bytes, calibration: Sequence[Sequence[Array]]) -> Converted:
    """Weights and activations in eight bits, in a form in which no answer depends on its neighbours.

    What a graph multiplies by decides which: convolutions (and plain layers) get scales fixed
    beforehand, transformers a scale for each row as it comes.

    Args:
        network: The fp32 ONNX file.
        calibration: Batches of real inputs, at least two; none may come from the exam.

    Returns:
        The file, and in its facts how it was made.
    """
    model = named(onnx.shape_inference.infer_shapes(onnx.load_model_from_string(network)))
    constants = {one.name for one in model.graph.initializer}
    operators = {
        node.op_type for node in model.graph.node if len(node.input) > 1 and node.input[1] in constants
    }
    if "MatMul" in operators and "Conv" not in operators:
        return _by_rows(model)
    return _static(network, model, calibration)


def _static(network: bytes, model: onnx.ModelProto, calibration: Sequence[Sequence[Array]]) -> Converted:
    """Scales fixed beforehand (static QDQ).

    A scale is chosen once, from real inputs, and never from the batch at hand. Weights are
    signed, with a scale for each output channel; activations unsigned, the form that x86
    multiplies fastest. Weights keep to seven bits, so that processors without VNNI, which add
    pairs of products in sixteen bits, get the same answers (ONNX Runtime, *Quantize ONNX
    models*). The first convolution and the last weights stay in fp32: they cost little and
    decide much.

    Several calibrations are tried; half of the inputs calibrate, the other half choose the one
    whose answers are nearest to fp32's.
    """
    before, after = outside_the_weights(model)
    learned, judged = calibration[::2], calibration[1::2]
    names = [one.name for one in model.graph.input]
    right = list(_answers(network, names, judged))
    excluded = sorted(before | after | first_and_last(model))
    tried: dict[str, tuple[float, bytes]] = {}
    for name, method, options in CALIBRATIONS:
        # Histograms are made of all activations at once.
        few = learned if method == CalibrationMethod.MinMax else _within_memory(model, learned)
        candidate = _quantised(model, names, few, method, options, excluded)
        tried[name] = _distance(right, _answers(candidate, names, judged)), candidate
    best = min(tried, key=lambda name: tried[name][0])
    return Converted(
        tried[best][1],
        {
            "scheme": "static QDQ, uint8 activations, int8 weights in 7 bits per channel",
            "calibration": best,
            "calibration_inputs": sum(len(batch[0]) for batch in calibration),
            "mean_difference_by_calibration": {name: distance for name, (distance, _) in tried.items()},
        },
    )


def _by_rows(model: onnx.ModelProto) -> Converted:
    """Scales for each column of the weights beforehand, and for each row of the activations as it comes.

    A transformer's activations have outliers that one fixed scale cannot hold (static QDQ moved
    MiniLM's answers by four tenths of how much they vary, this form by one tenth), and a scale
    for the batch at hand would let an answer depend on its neighbours; a row's own scale does
    neither. It is the scheme of LLM.int8() (Dettmers et al., 2022) without its exceptions, in
    ONNX's own operators: ONNX Runtime's dynamic quantisation has one scale a batch, and its
    MatMulNBits, which has rows' scales too, was no faster than fp32 here. Weights keep to seven
    bits, as in `_static`. Large tables of vectors keep a scale for each vector.
    """
    tables = _small_tables(model)
    weights = {one.name: one for one in model.graph.initializer if len(one.dims) == 2}
    nodes, levels_of, multiplied = [], {}, 0
    for name, value in (
        ("int8.axis", np.array([-1])),
        ("int8.step", np.float32(1 / 127)),
        ("int8.least", np.float32(1e-10)),
        # Half a level more, so that cutting off rounds.
        ("int8.middle", np.float32(128.5)),
        ("int8.zero", np.uint8(128)),
    ):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights:
            nodes.append(node)
            continue
        rows, name = node.input[0], node.name
        if rows not in levels_of:
            levels_of[rows] = name
            nodes += _levels(rows, name)
        nodes += _product(model, weights[node.input[1]], levels_of[rows], name, node.output[0])
        multiplied += 1
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    drop_unused(model)
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    return Converted(
        bytes(model.SerializeToString(deterministic=True)),
        {
            "scheme": "int8 weights in 7 bits per channel, uint8 activations with a scale for each row",
            "products_in_8_bits": multiplied,
            "tables_in_8_bits": tables,
        },
    )


def _levels(rows: str, name: str) -> list[onnx.NodeProto]:
    """Nodes that bring rows of numbers to levels uint8 around 128: `<name>.levels` and `<name>.scale`."""
    steps = (
        ("Abs", [rows], "size"),
        ("ReduceMax", [f"{name}.size", "int8.axis"], "largest"),
        ("Mul", [f"{name}.largest", "int8.step"], "exact"),
        ("Add", [f"{name}.exact", "int8.least"], "scale"),
        ("Div", [rows, f"{name}.scale"], "whole"),
        ("Add", [f"{name}.whole", "int8.middle"], "lifted"),
    )
    cast = helper.make_node(
        "Cast", [f"{name}.lifted"], [f"{name}.levels"], f"{name}.levels", to=TensorProto.UINT8
    )
    return [
        *(
            helper.make_node(operator, inputs, [f"{name}.{output}"], f"{name}.{output}")
            for operator, inputs, output in steps
        ),
        cast,
    ]


def _product(
    model: onnx.ModelProto, weights: TensorProto, levels: str, name: str, output: str
) -> list[onnx.NodeProto]:
    """Nodes that multiply levels by weights in eight bits, back to fp32."""
    columns = numpy_helper.to_array(weights)
    scales = np.maximum(np.abs(columns).max(axis=0) / 63, 1e-12).astype(np.float32)
    for constant, value in (("weights", np.rint(columns / scales).astype(np.int8)), ("columns", scales)):
        model.graph.initializer.append(numpy_helper.from_array(value, f"{name}.{constant}"))
    return [
        helper.make_node(
            "MatMulInteger",
            [f"{levels}.levels", f"{name}.weights", "int8.zero"],
            [f"{name}.sums"],
            f"{name}.sums",
        ),
        helper.make_node(
            "Cast", [f"{name}.sums"], [f"{name}.floats"], f"{name}.floats", to=TensorProto.FLOAT
        ),
        helper.make_node("Mul", [f"{name}.floats", f"{levels}.scale"], [f"{name}.rows"], f"{name}.rows"),
        helper.make_node("Mul", [f"{name}.rows", f"{name}.columns"], [output], f"{name}.back"),
    ]


def _small_tables(model: onnx.ModelProto) -> int:
    """Keep large tables of vectors in eight bits, with a scale for each vector; how many there were."""
    tables = {
        one.name: one
        for one in model.graph.initializer
        if one.data_type == TensorProto.FLOAT
        and len(one.dims) == 2
        and one.dims[0] * one.dims[1] >= LARGE_TABLE
    }
    readers = [node for node in model.graph.node if node.op_type == "Gather" and node.input[0] in tables]
    for node in readers:
        table = numpy_helper.to_array(tables[node.input[0]])
        scales = np.maximum(np.abs(table).max(axis=1, keepdims=True) / 127, 1e-12).astype(np.float32)
        name = node.name
        model.graph.initializer.append(
            numpy_helper.from_array(np.rint(table / scales).astype(np.int8), f"{name}.levels")
        )
        model.graph.initializer.append(numpy_helper.from_array(scales, f"{name}.scales"))
        made = [
            helper.make_node("Gather", [f"{name}.levels", node.input[1]], [f"{name}.level"], f"{name}.level"),
            helper.make_node(
                "Cast", [f"{name}.level"], [f"{name}.float"], f"{name}.float", to=TensorProto.FLOAT
            ),
            helper.make_node("Gather", [f"{name}.scales", node.input[1]], [f"{name}.scale"], f"{name}.scale"),
            helper.make_node("Mul", [f"{name}.float", f"{name}.scale"], [node.output[0]], f"{name}.back"),
        ]
        position = list(model.graph.node).index(node)
        model.graph.node.remove(node)
        for one in reversed(made):
            model.graph.node.insert(position, one)
    drop_unused(model)
    return len(readers)


def _within_memory(model: onnx.ModelProto, batches: Sequence[Sequence[Array]]) -> Sequence[Sequence[Array]]:
    """As many of the batches as `CALIBRATION_BYTES` hold the activations of, at least one."""
    session = quiet_session(with_all_outputs(model).SerializeToString(), "DISABLE_ALL")
    names = [one.name for one in session.get_inputs()]
    activations = session.run(None, dict(zip(names, batches[0], strict=True)))
    return batches[: max(1, CALIBRATION_BYTES // sum(one.nbytes for one in activations))]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands batches to ONNX Runtime's calibration."""

    def __init__(self, names: Sequence[str], batches: Sequence[Sequence[Array]]) -> None:
        self._feeds = [dict(zip(names, batch, strict=True)) for batch in batches]
        self._left: Iterator[Mapping[str, Array]] = iter(self._feeds)

    def get_next(self) -> Mapping[str, Array] | None:
        """The next batch, or None after the last."""
        return next(self._left, None)

    def rewind(self) -> None:
        """Begin again."""
        self._left = iter(self._feeds)


def _quantised(
    model: onnx.ModelProto,
    names: Sequence[str],
    batches: Sequence[Sequence[Array]],
    method: CalibrationMethod,
    options: Mapping[str, Any],
    excluded: Sequence[str],
) -> bytes:
    """The graph with the scales that one method finds."""
    with tempfile.TemporaryDirectory() as folder, _silence():
        path = Path(folder) / "int8.onnx"
        quantize_static(
            named(model),
            path,
            _Reader(names, batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED),
            nodes_to_exclude=list(excluded),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
            extra_options=dict(options),
        )
        model = onnx.load(path)
    del model.graph.value_info[:]
    del model.metadata_props[:]
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep ONNX Runtime's tools off the terminal, and the way this process logs as it is."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
        root.handlers[:] = handlers
        root.setLevel(level)


def _answers(
    network: bytes, names: Sequence[str], batches: Sequence[Sequence[Array]]
) -> Iterator[list[Array]]:
    session = quiet_session(network)
    for batch in batches:
        yield list(session.run(None, dict(zip(names, batch, strict=True))))


def _distance(right: Sequence[Sequence[Array]], found: Iterator[Sequence[Array]]) -> float:
    """The mean absolute difference of all outputs."""
    differences = [
        np.abs(np.subtract(one, other, dtype=np.float64)).ravel()
        for wanted, given in zip(right, found, strict=True)
        for one, other in zip(wanted, given, strict=True)
    ]
    return float(np.mean(np.concatenate(differences)))
