"""A torch network becomes a graph that takes and gives what the room says, and nothing else."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from export.proof import prove
from export.to_onnx import OPSET, TorchAnswers, to_onnx
from service.models.digit import DIGIT
from training.calibration import Probabilities
from training.digit import ARCHITECTURES
from training.exam import Exam


@pytest.fixture(scope="module")
def model(graph: bytes) -> onnx.ModelProto:
    return onnx.load_model_from_string(graph)


def test_the_graph_takes_and_gives_the_tensors_of_the_room(graph: bytes) -> None:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    assert [(one.name, one.type, one.shape) for one in session.get_inputs()] == [
        ("pixels", "tensor(uint8)", ["batch", 28, 28])
    ]
    assert [(one.name, one.type, one.shape) for one in session.get_outputs()] == [
        ("probabilities", "tensor(float)", ["batch", 10])
    ]


@pytest.mark.parametrize("size", [1, 3, 64])
def test_any_batch_size_gives_that_many_rows_of_probabilities(graph: bytes, size: int) -> None:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).integers(0, 256, (size, 28, 28), np.uint8)
    (probabilities,) = session.run(["probabilities"], {"pixels": pixels})
    assert probabilities.shape == (size, 10)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


def test_constants_and_batch_normalisation_are_folded(model: onnx.ModelProto) -> None:
    operators = {node.op_type for node in model.graph.node}
    assert "Conv" in operators
    assert not operators & {"BatchNormalization", "Dropout", "Identity", "Constant", "ConstantOfShape"}


def test_the_operator_set_is_the_chosen_one_and_no_other(model: onnx.ModelProto) -> None:
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]


def test_the_file_says_what_it_is(model: onnx.ModelProto) -> None:
    assert (model.graph.name, model.doc_string) == (DIGIT.name, DIGIT.task)
    assert model.producer_name == "pytorch"


def test_the_file_says_nothing_of_the_machine_or_the_source(graph: bytes, model: onnx.ModelProto) -> None:
    assert not [node.name for node in model.graph.node if node.metadata_props or node.doc_string]
    for word in (
        b".py",
        b"stack_trace",
        b"site-packages",
        str(Path.cwd()).encode(),
        str(Path.home()).encode(),
    ):
        assert word not in graph


def test_the_same_network_gives_the_same_bytes(network: nn.Module, graph: bytes) -> None:
    assert to_onnx(network, DIGIT) == graph


def test_the_perceptron_is_exported_and_proven_like_the_default(exam: Exam) -> None:
    torch.manual_seed(1)
    perceptron = Probabilities(ARCHITECTURES["mlp"]())
    exported = to_onnx(perceptron, DIGIT)
    assert prove(DIGIT, exported, TorchAnswers(perceptron), exam).largest_difference < 1e-5
    operators = {node.op_type for node in onnx.load_model_from_string(exported).graph.node}
    assert "BatchNormalization" not in operators
