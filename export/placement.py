"""Proof, without a GPU, that a graph runs wholly on one: each node against the CUDA kernels there are.

ONNX Runtime decides where a node runs after its basic optimisations and before the extended
ones, which only fuse nodes that one provider has into a kernel of that same provider. So the
graph that is examined is the one after the basic optimisations, as the installed ONNX
Runtime makes it. What it is compared with is the table of kernels that onnxruntime-gpu
registers, read out of its library (`kernels/`), and the rules in its CUDA provider that
refuse a node although there is a kernel.

What this cannot see: whether a kernel finds enough memory, and how fast it is. `pytest -m
gpu` asks a real one.
"""

import functools
import json
import lzma
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state

from export.errors import ProofFailed
from export.graphs import ELEMENT_TYPES, in_floats, types_of
from service.models.spec import Room

KERNELS: Final = Path(__file__).parent / "kernels" / "onnxruntime-gpu-1.31.1.json.xz"
"""The CUDA kernels of that version: `[domain, operator, first and last opset, datatypes by parameter]`."""

DISGUISE: Final = "Softsign"
"""An operator that no optimisation looks for, and that no network of ours has."""

Types = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Placement:
    """Where the nodes of one graph would run.

    Attributes:
        nodes: How many compute; shape arithmetic, which ONNX Runtime keeps on the CPU, is none of them.
        on_cuda: How many of these have a CUDA kernel.
        shape_arithmetic: How many nodes deal with lengths alone.
        fallbacks: The others, each with the reason.
    """

    nodes: int
    on_cuda: int
    shape_arithmetic: int
    fallbacks: dict[str, str]

    def facts(self) -> dict[str, Any]:
        """What the card says."""
        return {
            "nodes": self.nodes,
            "on_cuda": self.on_cuda,
            "shape_arithmetic": self.shape_arithmetic,
            "fallbacks": self.fallbacks,
            "kernels": f"onnxruntime-gpu {_table()[0]}",
        }


def place(network: bytes) -> Placement:
    """Find for each node of a graph whether CUDA runs it."""
    model, types = _as_placed(network)
    opsets = {one.domain: one.version for one in model.opset_import}
    lengths = _shape_arithmetic(model)
    fallbacks = {}
    for node in model.graph.node:
        reason = None if node.name in lengths else _reason_to_fall_back(node, types, opsets)
        if reason is not None:
            fallbacks[node.name] = f"{node.op_type}: {reason}"
    nodes = len(model.graph.node) - len(lengths)
    return Placement(nodes, nodes - len(fallbacks), len(lengths), fallbacks)


def refuse_fallbacks(room: Room, precision: str, placement: Placement) -> None:
    """A graph that would leave the GPU half-way is none for GPUs.

    Raises:
        ProofFailed: a node that computes has no CUDA kernel.
    """
    if placement.fallbacks:
        name, reason = next(iter(placement.fallbacks.items()))
        raise ProofFailed(
            f"{room}: {len(placement.fallbacks)} of {placement.nodes} nodes of the {precision} graph would "
            f"fall back to the CPU; the first is {name} ({reason}). Only shape arithmetic may."
        )


def has_kernel(domain: str, operator: str, opset: int, datatype: str) -> bool:
    """Whether a CUDA kernel for the operator takes or gives this datatype: `tensor(float16)`."""
    since = _since_version(domain, operator, opset)
    return any(
        _covers(first, last, since) and any(datatype in accepted for accepted in types.values())
        for first, last, types in _table()[1].get((domain, operator), ())
    )


@functools.cache
def _table() -> tuple[str, dict[tuple[str, str], list[tuple[int, int | None, Types]]]]:
    """The version of onnxruntime-gpu, and its CUDA kernels by domain and operator."""
    content = json.loads(lzma.decompress(KERNELS.read_bytes()))
    kernels: dict[tuple[str, str], list[tuple[int, int | None, Types]]] = {}
    for domain, operator, first, last, types in content["kernels"]:
        spelt = {
            parameter: tuple(name if "(" in name else f"tensor({name})" for name in names)
            for parameter, names in types.items()
        }
        kernels.setdefault((domain, operator), []).append((first, last, spelt))
    return content["onnxruntime_gpu"], kernels


@functools.cache
def _schemas() -> dict[tuple[str, str], list[Any]]:
    """ONNX Runtime's own account of every operator, fused ones included, newest first."""
    found: dict[tuple[str, str], list[Any]] = {}
    for schema in onnxruntime_pybind11_state.get_all_operator_schema():
        found.setdefault((schema.domain, schema.name), []).append(schema)
    for versions in found.values():
        versions.sort(key=lambda schema: schema.since_version, reverse=True)
    return found


def _schema(domain: str, operator: str, opset: int) -> Any:
    """The operator as it is in that opset; None where there is no such operator."""
    return next(
        (one for one in _schemas().get((domain, operator), ()) if one.since_version <= opset),
        None,
    )


def _since_version(domain: str, operator: str, opset: int) -> int:
    schema = _schema(domain, operator, opset)
    return 0 if schema is None else int(schema.since_version)


def _covers(first: int, last: int | None, since: int) -> bool:
    """Whether a kernel registered for these opsets is for the operator as it is since that one."""
    # As ONNX Runtime compares: a kernel without an end is for its own version alone.
    return first == since or (last is not None and first < since <= last)


def _as_placed(network: bytes) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The graph at the moment when ONNX Runtime decides where each node runs, and its tensors' datatypes.

    The CPU has few fp16 kernels; ONNX Runtime would wrap each node in casts and drop ours. So
    it is shown the same graph in fp32, its casts to and from fp16 under a name that no
    optimisation looks for, and the datatypes are put back afterwards.
    """
    model = onnx.load_model_from_string(network)
    types = types_of(model)
    disguised = _disguise_casts(model, types)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "placed.onnx"
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(
            in_floats(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        placed = onnx.load(path)
    for number, node in enumerate(placed.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
        if node.op_type == DISGUISE:
            node.op_type = "Cast"
            node.attribute.append(onnx.helper.make_attribute("to", disguised[node.output[0]]))
    return placed, _with_new_names(placed, types)


def _disguise_casts(model: onnx.ModelProto, types: Mapping[str, str]) -> dict[str, int]:
    """Call casts between fp16 and fp32 something else; what they cast to, by the name of their output."""
    disguised = {}
    for node in model.graph.node:
        if node.op_type == "Cast" and {types.get(node.input[0]), types.get(node.output[0])} == {
            "tensor(float16)",
            "tensor(float)",
        }:
            disguised[node.output[0]] = next(one.i for one in node.attribute if one.name == "to")
            node.op_type = DISGUISE
            del node.attribute[:]
    return disguised


def _with_new_names(model: onnx.ModelProto, types: Mapping[str, str]) -> dict[str, str]:
    """The datatypes, with those of tensors that the optimisation made: a type parameter is one type."""
    found = dict(types)
    opsets = {one.domain: one.version for one in model.opset_import}
    given = {one.name: one.data_type for one in model.graph.initializer}
    for one, number in given.items():
        if one not in found and number != onnx.TensorProto.FLOAT:
            found[one] = next(name for name, known in ELEMENT_TYPES.items() if known == number)
    for node in model.graph.node:
        schema = _schema(node.domain, node.op_type, opsets.get(node.domain, 1))
        if schema is None:
            continue
        shared: dict[str, str] = {}
        for name, parameter in _parameters(node, schema):
            if name in found:
                shared.setdefault(parameter.typeStr, found[name])
        for name, parameter in _parameters(node, schema):
            found.setdefault(name, shared.get(parameter.typeStr, "tensor(float)"))
    return found


def _parameters(node: onnx.NodeProto, schema: Any) -> Iterator[tuple[str, Any]]:
    """The node's tensors, each with the formal parameter that it stands for."""
    for formal, actual in ((schema.inputs, node.input), (schema.outputs, node.output)):
        for position, name in enumerate(actual):
            if name and formal:
                # The last formal parameter stands for all that follow, where it is variadic.
                yield name, formal[min(position, len(formal) - 1)]


def _shape_arithmetic(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes that work out lengths from lengths: ONNX Runtime leaves them on the CPU."""
    constants = {one.name for one in model.graph.initializer} | {""}
    lengths: set[str] = set()
    found: set[str] = set()
    for node in model.graph.node:
        taken = [name for name in node.input if name not in constants]
        if node.op_type in {"Shape", "Size"} or (taken and lengths.issuperset(taken)):
            # What is made of a length alone is a length, until it is laid out as numbers to compute with.
            if node.op_type in {"ConstantOfShape", "Range", "Expand"}:
                continue
            found.add(node.name)
            lengths.update(node.output)
    return found


def _reason_to_fall_back(
    node: onnx.NodeProto, types: Mapping[str, str], opsets: Mapping[str, int]
) -> str | None:
    """Why CUDA does not run this node; None where it does."""
    kernels = _table()[1].get((node.domain, node.op_type))
    if not kernels:
        return "there is no CUDA kernel"
    schema = _schema(node.domain, node.op_type, opsets.get(node.domain, 1))
    if schema is None:
        return f"the installed ONNX Runtime does not know it in opset {opsets.get(node.domain, 1)}"
    fitting = [kernel for kernel in kernels if _covers(kernel[0], kernel[1], schema.since_version)]
    if not fitting:
        return f"no CUDA kernel for its form of opset {schema.since_version}"
    wanted = _datatypes(node, schema, types)
    if not any(
        all(wanted.get(name, accepted[0]) in accepted for name, accepted in kernel_types.items() if accepted)
        for _, _, kernel_types in fitting
    ):
        listed = ", ".join(
            sorted({f"{one.typeStr} {types[name]}" for name, one in _parameters(node, schema)})
        )
        return f"no CUDA kernel for {listed}"
    return _refused_by_rule(node)


def _datatypes(node: onnx.NodeProto, schema: Any, types: Mapping[str, str]) -> dict[str, str]:
    """The node's datatypes by the schema's type parameters, and by its inputs' and outputs' own names."""
    found: dict[str, str] = {}
    for name, parameter in _parameters(node, schema):
        found.setdefault(parameter.typeStr, types[name])
        found.setdefault(parameter.name, types[name])
    return found


def _refused_by_rule(node: onnx.NodeProto) -> str | None:
    """What the CUDA provider leaves to the CPU although it has a kernel (its `GetCapability`)."""
    said = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    if node.op_type in {"GRU", "LSTM", "RNN"}:
        if said.keys() & {"activation_alpha", "activation_beta", "clip"}:
            return "cuDNN has no clipping and no parameters of activations"
        usual = {"GRU": [b"Sigmoid", b"Tanh"], "LSTM": [b"Sigmoid", b"Tanh", b"Tanh"], "RNN": [b"Tanh"]}
        spoken = list(said.get("activations", []))
        if spoken and spoken != usual[node.op_type] * (len(spoken) // len(usual[node.op_type])):
            return "cuDNN has the usual activations only"
        if node.op_type == "GRU" and said.get("linear_before_reset", 0) != 1:
            return "cuDNN resets after the linear layer, not before"
        if node.op_type == "LSTM" and (said.get("input_forget", 0) or len(node.input) == 8):
            return "cuDNN has neither peepholes nor coupled gates"
        if said.get("layout", 0) != 0:
            return "cuDNN wants the sequence axis first"
    if node.op_type == "ConvTranspose":
        pads = list(said.get("pads", []))
        if pads[: len(pads) // 2] != pads[len(pads) // 2 :]:
            return "CUDA pads a transposed convolution by the same at both ends"
    if node.op_type in {"ArgMax", "ArgMin"} and said.get("select_last_index", 0):
        return "CUDA takes the first of equals"
    return None
