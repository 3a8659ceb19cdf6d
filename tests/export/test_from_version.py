"""An export that starts from what ships, and what cannot be started from: one sentence, and no change."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx.external_data_helper import set_external_data

from export.__main__ import main
from tests.conftest import MODELS_FOLDER

VERSION = max((folder.name for folder in (MODELS_FOLDER / "digit").iterdir()), key=int)

Change = Callable[[onnx.ModelProto], None]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of the shipped digit model."""
    shutil.copytree(MODELS_FOLDER / "digit" / VERSION, tmp_path / "digit" / VERSION)
    return tmp_path


def rewritten(repository: Path, change: Change) -> None:
    """Change the fp32 file, and its card so that they belong together."""
    folder = repository / "digit" / VERSION
    model = onnx.load(folder / "model.onnx")
    change(model)
    content = model.SerializeToString()
    (folder / "model.onnx").write_bytes(content)
    card = json.loads((folder / "card.json").read_text())
    card["files"]["fp32"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "card.json").write_text(json.dumps(card))


def newer(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def elsewhere(model: onnx.ModelProto) -> None:
    weights = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    set_external_data(weights, location="weights.bin")
    weights.ClearField("raw_data")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(newer, "has the operator set 99, and 20 is the newest", id="newer-operator-set"),
        pytest.param(elsewhere, "keeps tensors in other files", id="external-data"),
    ],
)
def test_a_file_that_cannot_be_started_from_is_refused(
    repository: Path, capsys: pytest.CaptureFixture[str], change: Change, says: str
) -> None:
    rewritten(repository, change)
    before = contents(repository)
    assert main(["digit", "--from-version", VERSION, "--to", str(repository)]) == 2
    output = capsys.readouterr()
    assert says in output.err
    assert output.err.count("\n") == 1
    assert contents(repository) == before


def test_a_card_without_its_file_is_refused(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "digit" / VERSION / "model.onnx").unlink()
    assert main(["digit", "--from-version", VERSION, "--to", str(repository)]) == 2
    assert "model.onnx is missing; restore it, or export the model anew" in capsys.readouterr().err


def test_one_flipped_bit_in_any_precision_is_seen_by_the_report(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = repository / "digit" / VERSION / "model.int8.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main(["--report", "--to", str(repository)]) == 2
    assert "model.int8.onnx has the sha256" in capsys.readouterr().err


def test_the_report_shows_every_precision(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--report", "--to", str(repository)]) == 0
    shown = capsys.readouterr().out
    for words in ("fp32", "fp16", "int8", "accuracy 0.997", "21 of 21", "none yet", "bytes in all"):
        assert words in shown


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="nothing"),
        pytest.param(["digit", "--all"], id="one-and-all"),
        pytest.param(["--all", "--report"], id="two-wishes"),
        pytest.param(["digit", "--temperature", "2"], id="temperature-without-version"),
        pytest.param(["digit", "--from-version", "1", "--temperature", "0"], id="temperature-zero"),
        pytest.param(["--all", "--version", "3"], id="one-version-for-all"),
    ],
)
def test_wishes_that_do_not_go_together_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
