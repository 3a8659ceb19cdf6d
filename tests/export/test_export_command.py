"""`python -m export`: a checkpoint to a version that the service opens, or one sentence and no change."""

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from export.__main__ import main
from service.models import MODELS
from service.models.digit import DIGIT
from service.repository import Repository, RepositoryError
from training.card import read_checkpoint, write_checkpoint
from training.exam import Exam

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported") / "models"


@pytest.fixture(scope="module")
def command(checkpoint: Path, digits: Path, repository: Path) -> subprocess.CompletedProcess[str]:
    """The command, finished."""
    options = ["--checkpoint", checkpoint, "--data", digits, "--to", repository]
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "export", "digit", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def exported(command: subprocess.CompletedProcess[str], repository: Path) -> Path:
    """A repository with one exported version."""
    assert (command.returncode, command.stderr) == (0, "")
    return repository


def export(checkpoint: Path, digits: Path, repository: Path) -> int:
    return main(["digit", "--checkpoint", str(checkpoint), "--data", str(digits), "--to", str(repository)])


def refusal(arguments: list[str]) -> int:
    """The exit code, whether the command line was refused or the work."""
    try:
        return main(arguments)
    except SystemExit as refused:
        return int(refused.code or 0)


def test_every_model_that_can_be_trained_can_be_examined() -> None:
    for model in MODELS:
        story = importlib.import_module(f"training.{model}")
        assert callable(story.head)
        assert callable(story.exam)


def test_the_service_opens_what_was_exported_and_it_answers_like_torch(
    exported: Path, network: torch.nn.Module, exam: Exam
) -> None:
    files = Repository(exported).open("digit")
    assert (files.model, files.version, files.labels) == ("digit", 1, DIGIT.labels)
    session = onnxruntime.InferenceSession(files.network, providers=["CPUExecutionProvider"])
    (found,) = session.run(["probabilities"], {"pixels": exam.inputs[0]})
    with torch.inference_mode():
        right = network(torch.tensor(exam.inputs[0])).numpy()
    np.testing.assert_allclose(found, right, atol=1e-4)


def test_the_card_says_what_the_contract_asks_for(exported: Path, checkpoint: Path) -> None:
    card = json.loads((exported / "digit" / "1" / "card.json").read_text())
    file = (exported / "digit" / "1" / "model.onnx").read_bytes()
    trained = json.loads((checkpoint / "card.json").read_text())
    assert (card["model"], card["version"], card["task"]) == ("digit", "1", DIGIT.task)
    assert card["labels"] == list(DIGIT.labels)
    assert card["files"]["fp32"] == {
        "path": "model.onnx",
        "bytes": len(file),
        "sha256": hashlib.sha256(file).hexdigest(),
    }
    assert list(card["files"]) == list(card["scores"]) == ["fp32", "fp16", "int8"]
    assert card["scores"]["fp32"].items() >= trained["scores"].items()
    assert 0 < card["scores"]["fp32"]["expected_calibration_error"] < 1
    assert card["training"] == {**trained["training"], "checkpoint_sha256": trained["weights"]["sha256"]}
    assert card["export"]["opset"] == 20
    assert card["export"]["onnxruntime"] == onnxruntime.__version__
    assert card["export"]["examples"] == 300
    assert 0 < card["export"]["mean_difference"] <= card["export"]["largest_difference"] < 1e-5
    assert card["export"]["made_from"] == {"network": "torch", "sha256": trained["weights"]["sha256"]}
    for variant in ("fp32", "fp16"):
        placement = card["export"]["gpu_placement"][variant]
        assert placement["nodes"] == placement["on_cuda"] > 20
    assert card["export"]["variants"]["int8"]["same_decisions"] >= 0.97
    assert card["export"]["variants"]["fp16"]["kept_in_fp32"]["after the last weights"] == ["Softmax"]
    cpu = card["export"]["cpu"]
    assert cpu["fastest"] in {"fp32", "int8"}
    assert set(cpu["best"]) == {"fp32", "int8"}
    for kept in ("arch", "data", "seeds", "licence", "intended_use", "limits"):
        assert card[kept] == trained[kept]
    assert "weights" not in card


def test_one_flipped_bit_in_the_file_is_seen(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "digit" / "1" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RepositoryError, match=r"model\.onnx has the sha256 .*: the file was altered"):
        Repository(tmp_path).open("digit")


def test_the_command_reports_a_table(command: subprocess.CompletedProcess[str]) -> None:
    for words in (
        "proven on own digits test",
        "fp32",
        "model.onnx",
        "accuracy",
        "nodes on CUDA",
        "items per second",
    ):
        assert words in command.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["numeral"], "'numeral'", id="unknown-model"),
        pytest.param([], "model", id="no-model"),
        pytest.param(["digit", "--variants", "fp64"], "no variant 'fp64'; choose from fp32", id="variant"),
        pytest.param(["digit", "--variants", ""], "no variant ''; choose from fp32", id="empty-variant"),
        pytest.param(["digit", "--version", "01"], "'01' is not a version", id="version-01"),
        pytest.param(["digit", "--version", "-1"], "--version", id="version-minus-one"),
        pytest.param(["digit", "--version", "latest"], "'latest' is not a version", id="version-latest"),
        pytest.param(["digit", "--version", "1"], "Version 1 of digit exists", id="version-that-exists"),
        pytest.param(["digit", "--checkpoint", "nowhere"], "no checkpoint in nowhere", id="checkpoint"),
        pytest.param(["digit"], "no checkpoint in runs/digit-cnn-seed0", id="default-checkpoint"),
    ],
)
def test_a_wrong_command_is_refused_in_one_sentence(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(exported)
    assert refusal([*arguments, "--to", str(exported)]) == 2
    output = capsys.readouterr()
    assert says in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert contents(exported) == before
    assert os.listdir(tmp_path) == []


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed_run(folder: Path, checkpoint: Path, **facts: object) -> Path:
    """A copy of the checkpoint with other facts on its card."""
    network, true_facts = read_checkpoint(checkpoint)
    write_checkpoint(folder, network, {**true_facts, **facts})
    return folder


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        pytest.param({"scores": {"accuracy": 0.9999}}, "claims accuracy 0.9999; measured here", id="score"),
        pytest.param({"labels": list("9876543210")}, "was trained for the labels ['9'", id="labels"),
    ],
)
def test_a_checkpoint_that_is_not_what_its_card_says_is_refused(
    checkpoint: Path,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    facts: dict[str, object],
    says: str,
) -> None:
    run = changed_run(tmp_path / "run", checkpoint, **facts)
    assert export(run, digits, tmp_path / "models") == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_a_card_without_its_facts_is_refused(
    checkpoint: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, facts = read_checkpoint(checkpoint)
    write_checkpoint(tmp_path / "run", network, {key: facts[key] for key in facts if key != "licence"})
    assert export(tmp_path / "run", digits, tmp_path / "models") == 2
    assert "does not say its licence" in capsys.readouterr().err


def test_a_failed_proof_leaves_the_repository_as_it_was(
    exported: Path, checkpoint: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, facts = read_checkpoint(checkpoint)
    with torch.no_grad():
        list(network.parameters())[-1].fill_(float("nan"))
    write_checkpoint(tmp_path / "run", network, facts)
    before = contents(exported)
    assert export(tmp_path / "run", digits, exported) == 1
    assert "Nothing was exported. digit: between torch and ONNX Runtime" in capsys.readouterr().err
    assert contents(exported) == before
    assert os.listdir(exported / "digit") == ["1"]


def test_other_data_than_the_card_names_are_refused(
    checkpoint: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "mnist"
    other.mkdir()
    for file in (digits / "mnist").glob("train-*"):
        shutil.copy(file, other / file.name.replace("train", "t10k"))
    assert export(checkpoint, tmp_path, tmp_path / "models") == 2
    assert "name the folder of the same data with --data" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()
