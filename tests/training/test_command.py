"""What can be mended is said in one sentence, with exit code 2."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from training.__main__ import main

from .conftest import ROOT

SMALL = ["digit", "--own-data", "--arch", "mlp", "--epochs", "1", "--batch-size", "350"]


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says where it must end with 2."""
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    assert code == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1, "one sentence, no stack"
    return sentence


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(["diget"], "invalid choice: 'diget'", id="unknown-model"),
        pytest.param([], "required: model", id="no-model"),
        pytest.param(["digit", "--arch", "vgg"], "choose from cnn, lean, mlp", id="unknown-architecture"),
        pytest.param(["digit", "--epochs", "0"], "whole number of at least 1", id="no-epochs"),
        pytest.param(
            ["digit", "--batch-size", "many"], "whole number of at least 1", id="batch-size-in-words"
        ),
        pytest.param(["digit", "--seed", "-1"], "expected one argument|whole number", id="negative-seed"),
        pytest.param(["digit", "--seed", "1", "--seeds", "1", "2"], "not allowed with", id="seed-and-seeds"),
        pytest.param(["digit", "--device", "tpu"], "invalid choice: 'tpu'", id="unknown-device"),
    ],
)
def test_a_wrong_command_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert any(part in said(arguments, capsys) for part in expected.split("|"))


def test_data_that_are_not_mnist(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = said(["digit", "--data", str(data_folder), "--out", str(tmp_path / "run")], capsys)
    assert "not the published file" in sentence
    assert not (tmp_path / "run").exists()


def test_a_holdout_that_leaves_nothing(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(data_folder), "--holdout", "700", "--out", str(tmp_path)]
    assert "leaves nothing" in said([*SMALL, *options], capsys)


def test_a_resume_point_that_is_damaged_or_of_another_run(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--data", str(data_folder)]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*options, "--out", str(first), "--resume"]) == 0
    assert "Nothing to resume" in capsys.readouterr().out
    shutil.copytree(first, second)
    sentence = said([*options, "--seed", "5", "--out", str(first), "--resume"], capsys)
    assert "other settings (seed)" in sentence
    another = [option.replace("mlp", "cnn") for option in options]
    sentence = said([*another, "--out", str(first), "--resume"], capsys)
    assert "other settings (arch" in sentence
    resume_point = second / "last.pt"
    resume_point.write_bytes(resume_point.read_bytes()[:2000])
    assert "damaged" in said([*options, "--out", str(second), "--resume"], capsys)


def test_a_wrong_word_costs_no_import_of_torch() -> None:
    code = (
        "import sys\nfrom training.__main__ import parser\n"
        "try: parser().parse_args(['diget'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60
    )
    assert run.stdout == "False\n"
