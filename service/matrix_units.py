"""Eight-bit convolutions in the form that this processor multiplies fastest.

ONNX Runtime convolves bytes in one of two ways. Weights whose zero point is 0 go to kernels that walk
over the picture, which VNNI makes fast. Any others are multiplied as one matrix, the picture's
pixels copied beside one another first; its matrix product uses the tiles of AMX (Intel,
*Intrinsics Guide*, TDPBUSD), the walking kernels do not. So where there are such tiles, weights
and zero point are moved up by one level together: the differences that are multiplied stay what
they were, whole numbers, and so does every answer, to the bit. On two cores of a Xeon with
both, a layer of 256 channels took 48 us in the place of 99, and 28 % longer where the tiles were
taken away: that is why no file is shipped so.
"""

import math
from collections import Counter
from typing import Final

import numpy as np
from google.protobuf.message import DecodeError

from service.proto import onnx_weights_pb2 as onnx
from service.providers import Profile, eight_bit_instructions

INT8: Final = 3
"""ONNX's number of the datatype (`TensorProto.DataType`)."""

EIGHT_BIT_LAYER: Final = "DequantizeLinear"
"""The operator that an eight-bit layer's weights go through (ONNX's QDQ format)."""

LEAST_CHANNELS: Final = 64
"""Each pixel's channels are copied in one piece, and shorter pieces cost more than the product saves."""

LEAST_PRODUCTS: Final = 256
"""For each number that a layer makes; of fewer the copying is the larger part."""


def suited(network: bytes, profile: Profile) -> bytes:
    """An ONNX file in the form that runs fastest where the profile says; itself, where it is that already.

    It answers exactly as before.
    """
    has_tiles = not profile.is_gpu and "amx_int8" in eight_bit_instructions()
    return for_matrix_units(network) if has_tiles else network


def for_matrix_units(network: bytes) -> bytes:
    """An ONNX file whose larger eight-bit convolutions are left to the matrix product.

    Args:
        network: The file. One without such convolutions comes back as it is, and so does
            what is no ONNX file at all: ONNX Runtime says better what is wrong with it.

    Returns:
        A file that gives the same answers.
    """
    if EIGHT_BIT_LAYER.encode() not in network:
        # Nothing to read a file of many megabytes for.
        return network
    try:
        model = onnx.Model.FromString(network)
    except DecodeError:
        return network
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = Counter(name for node in model.graph.node for name in node.input)
    convolved = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    changed = False
    for node in model.graph.node:
        if node.op_type != EIGHT_BIT_LAYER or len(node.input) < 3 or node.output[0] not in convolved:
            continue
        weights, zero_point = constants.get(node.input[0]), constants.get(node.input[2])
        # A zero point for this layer alone is made below; weights that others read, too, are left alone.
        if weights is None or zero_point is None or readers[weights.name] > 1 or not _gains(weights):
            continue
        levels = np.frombuffer(weights.raw_data, np.int8)
        # There may be no level left above.
        if _is_another_than_zero(zero_point) or not levels.size or levels.max() == np.iinfo(np.int8).max:
            continue
        weights.raw_data = (levels + np.int8(1)).tobytes()
        lifted = model.graph.initializer.add()
        lifted.name = node.input[2] = f"{zero_point.name}.of.{weights.name}"
        lifted.dims.extend(zero_point.dims)
        lifted.data_type = INT8
        lifted.raw_data = b"\x01" * math.prod(zero_point.dims)
        changed = True
    return bytes(model.SerializeToString()) if changed else network


def _gains(weights: onnx.Tensor) -> bool:
    """Whether a layer with these weights [out, in, height, width] is faster as one matrix product."""
    return (
        weights.data_type == INT8
        and len(weights.dims) == 4
        and weights.dims[1] >= LEAST_CHANNELS
        and math.prod(weights.dims[1:]) >= LEAST_PRODUCTS
    )


def _is_another_than_zero(zero_point: onnx.Tensor) -> bool:
    """Whether a constant, kept in either of ONNX's two ways, has a number that is not 0."""
    return any(zero_point.raw_data) or any(zero_point.int32_data)
