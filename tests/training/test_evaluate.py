"""`python -m training.evaluate`: what ships, scored again, beside what its card says."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from export.to_onnx import TorchAnswers, to_onnx
from service.models.digit import DIGIT
from training import digit
from training.data import sha256_of
from training.evaluate import main

from .conftest import Digits


@pytest.fixture(scope="module")
def shipped(
    digits: tuple[Digits, Digits], data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A repository with a version of two files, and a card that tells the truth about them."""
    torch.manual_seed(0)
    network = digit.head(digit.ARCHITECTURES["mlp"](), {"temperature": 0.5})
    graph = to_onnx(network, DIGIT)
    images, _ = digit.load_mnist(data_folder, "test", verify=False)
    card: dict[str, Any] = {
        "model": "digit",
        "version": "2",
        "labels": list(DIGIT.labels),
        "data": {"name": "own digits", "split": "test", "sha256": sha256_of(images.tobytes())},
    }
    exam = digit.exam(data_folder, card)
    scores = exam.score(TorchAnswers(network)(exam.inputs), exam.truth)
    facts = {"bytes": len(graph), "sha256": hashlib.sha256(graph).hexdigest()}
    card["files"] = {"fp32": {"path": "model.onnx", **facts}, "int8": {"path": "model.int8.onnx", **facts}}
    card["scores"] = {"fp32": scores, "int8": scores}
    folder = tmp_path_factory.mktemp("models") / "digit" / "2"
    folder.mkdir(parents=True)
    for file in card["files"].values():
        (folder / file["path"]).write_bytes(graph)
    (folder / "card.json").write_text(json.dumps(card))
    return folder.parents[1]


def change(shipped: Path, copy: Path, **facts: object) -> Path:
    """The repository, with other facts on its card."""
    shutil.copytree(shipped, copy)
    path = copy / "digit" / "2" / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    return copy


def evaluated(models: Path, data: Path, *more: str) -> int:
    return main(["digit", "--models", str(models), "--data", str(data), *more])


def test_every_file_is_scored_beside_its_card(
    shipped: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(shipped, data_folder) == 0
    printed = capsys.readouterr().out
    assert "digit/2 on own digits test, 200 examples" in printed
    for word in ("fp32", "int8", "accuracy", "expected_calibration_error", "card", "measured"):
        assert word in printed
    assert "differs" not in printed


def test_a_card_that_claims_more_than_its_file_does_is_found_out(
    shipped: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {"fp32": {"accuracy": 0.99}, "int8": {"kindness": 1.0}}
    models = change(shipped, tmp_path / "models", scores=scores)
    assert evaluated(models, data_folder, "--version", "2") == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "differs" in line]
    assert [("accuracy" in line, "kindness" in line) for line in lines] == [(True, False), (False, True)]


def test_what_must_be_mended_first_is_said_in_one_sentence(
    shipped: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    altered = change(shipped, tmp_path / "altered")
    graph = altered / "digit" / "2" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"!")
    other = {"name": "own digits", "split": "test", "sha256": "0" * 64}
    for models, data, options, says in (
        (shipped, tmp_path / "empty", (), "There is no t10k-images"),
        (
            change(shipped, tmp_path / "other", data=other),
            data_folder,
            (),
            "name the folder of the same data",
        ),
        (shipped, data_folder, ("--version", "7"), "digit has no version 7; it has 2"),
        (tmp_path / "nowhere", data_folder, (), "There is no model repository at"),
        (altered, data_folder, (), "the file was altered"),
    ):
        assert evaluated(models, data, *options) == 2, says
        sentence = capsys.readouterr().err
        assert says in sentence
        assert sentence.count("\n") == 1, "one sentence, no stack"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param([], "required", id="no-model"),
        pytest.param(["numeral"], "'numeral'", id="unknown-model"),
        pytest.param(["--all", "--version", "1"], "--version is about one model", id="a-version-of-all"),
        pytest.param(["digit", "--all"], "not allowed with", id="one-and-all"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_all_models_are_scored_and_one_that_cannot_be_is_no_excuse_for_the_others(
    shipped: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = main(["--all", "--models", str(shipped), "--data", str(data_folder)])
    output = capsys.readouterr()
    assert "digit/2 on own digits" in output.out
    missing = [line for line in output.err.splitlines() if "There is no model" in line]
    assert outcome == (2 if missing else 0)
