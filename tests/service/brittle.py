"""A digit model that fails where the first pixel is white: what no good network does on demand."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.models.digit import DIGIT

WHITE = 255


def write_brittle_model(models: Path) -> None:
    """A model repository with this model as version 1: `models/digit/1`."""
    chance = np.random.default_rng(0)
    constants = {
        "corner_start": np.array([0, 0], np.int64),
        "corner_end": np.array([1, 1], np.int64),
        "last_axes": np.array([1, 2], np.int64),
        "rows": np.array([2], np.int64),
        "weights": (chance.normal(size=(28, 10)) / 20).astype(np.float32),
        # One row too short for white: looking it up is an error when the network runs, not before.
        "table": np.zeros((WHITE, 10), np.float32),
    }
    nodes = [
        helper.make_node("Slice", ["pixels", "corner_start", "corner_end", "last_axes"], ["corner"]),
        helper.make_node("Cast", ["corner"], ["corner_numbers"], to=TensorProto.INT64),
        helper.make_node("Squeeze", ["corner_numbers", "last_axes"], ["indices"]),
        helper.make_node("Gather", ["table", "indices"], ["nothing"]),
        helper.make_node("Cast", ["pixels"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["numbers", "rows"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weights"], ["scores"]),
        helper.make_node("Add", ["scores", "nothing"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "brittle",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 28, 28])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    network = model.SerializeToString()
    folder = models / "digit" / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(network)
    entry = {"path": "model.onnx", "bytes": len(network), "sha256": hashlib.sha256(network).hexdigest()}
    card = {"model": "digit", "version": "1", "labels": list(DIGIT.labels), "files": {"fp32": entry}}
    (folder / "card.json").write_text(json.dumps(card))
