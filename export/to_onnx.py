"""A torch network to one ONNX file that takes and gives exactly what its room says."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import torch
from torch import nn

from service.models.spec import Array, Room

OPSET = 20
"""What torch's exporter recommends, the first with Gelu; ONNX Runtime has CPU and CUDA kernels for it."""

BATCH_AXIS = "batch"

EXAMPLE_LENGTH = 7
"""Of a free axis while the network is traced; any would do but 0 and 1, which are taken for constants."""


class TorchAnswers:
    """Runs a torch network on numpy arrays: what the exported graph is compared with."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval()

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        """The network's outputs [n, ...] for its inputs [n, ...], in order."""
        with torch.inference_mode():
            outputs = self.network(*(torch.tensor(array) for array in inputs))
        return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def to_onnx(network: nn.Module, room: Room) -> bytes:
    """Convert a network whose inputs and outputs are the room's `network_inputs` and `network_outputs`.

    The graph has a free axis `batch`, the first of every tensor, and one wherever the room
    says -1. Constants are folded, batch normalisation is part of the convolution before it,
    and all weights are inside.

    Args:
        network: Takes the room's tensors [n, ...] by position; used in eval mode, on the CPU.
        room: Gives names, datatypes and shapes.

    Returns:
        The ONNX file, checked by ONNX's own checker with full shape inference. The same
        network gives the same bytes.
    """
    # Two rows: torch's tracer would take a batch of one for a constant.
    examples = tuple(
        torch.zeros(
            (2, *(EXAMPLE_LENGTH if size < 0 else size for size in tensor.shape)),
            dtype=torch.from_numpy(tensor.dtype.type(0).reshape(1)).dtype,
        )
        for tensor in room.network_inputs
    )
    batch = torch.export.Dim(BATCH_AXIS)
    # Not named: a network may have a longest input, and a named axis would have to say which.
    axes = tuple(
        {0: batch} | {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(tensor.shape, 1) if size < 0}
        for tensor in room.network_inputs
    )
    # It lists each operator of a torchvision that nobody asked for.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # torch 2.13 copies its own `LeafSpec`, which it has deprecated itself.
        warnings.filterwarnings("ignore", r".*LeafSpec", FutureWarning)
        # Two inputs share the batch axis, as they should.
        warnings.filterwarnings("ignore", r".*The axis name: batch will not be used", UserWarning)
        program = torch.onnx.export(
            network.eval(),
            examples,
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in room.network_inputs],
            output_names=[tensor.name for tensor in room.network_outputs],
            dynamic_shapes=axes,
            external_data=False,
            optimize=True,
            verbose=False,
        )
    assert program is not None, "only torch's older exporter gives nothing back"
    model = program.model_proto
    _forget_origins(model)
    model.graph.name = room.name
    model.doc_string = room.task
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def opset_of(network: bytes) -> int:
    """The version of ONNX's own operator set that a file uses."""
    opsets = onnx.load_model_from_string(network).opset_import
    return next(int(opset.version) for opset in opsets if opset.domain == "")


def _forget_origins(model: onnx.ModelProto) -> None:
    """Take out what the exporter says of source files, stacks and modules, at every depth."""
    for message in (model, *model.functions, *_parts(model.graph)):
        message.ClearField("metadata_props")
        message.ClearField("doc_string")


def _parts(graph: onnx.GraphProto) -> Iterator[Any]:
    """Everything in a graph, and in the graphs inside it, that may carry metadata."""
    yield graph
    yield from (*graph.input, *graph.output, *graph.value_info, *graph.initializer, *graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _parts(inner)
