"""A file is there whole, or it is as it was; and where the disk takes no more, a sentence says so."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training.card import CARD, WEIGHTS, read_checkpoint, write_checkpoint
from training.digit import ARCHITECTURES
from training.errors import TrainingError
from training.files import appearing

from .conftest import ROOT


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with appearing(path) as file:
        file.write(b"some")
        file.flush()
        assert not path.exists()
        file.write(b" words")
    assert path.read_bytes() == b"some words"
    assert [one.name for one in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, RuntimeError])
def test_what_was_there_stays_where_the_writing_fails(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail() -> None:
        with appearing(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == b"before"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_bytes(b"a file where a folder should be")
    with (
        pytest.raises(TrainingError, match=r"runs/one/file cannot be written: Not a directory"),
        appearing(tmp_path / "runs" / "one" / "file"),
    ):
        pass


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    network = ARCHITECTURES["mlp"]()
    write_checkpoint(tmp_path, network, {"model": "digit", "arch": "mlp"})
    weights, card = (tmp_path / WEIGHTS).read_bytes(), (tmp_path / CARD).read_bytes()
    # A folder that has the temporary file's name: it cannot be opened for writing.
    (tmp_path / f"{WEIGHTS}.tmp").mkdir()
    with torch.no_grad():
        next(network.parameters()).zero_()
    with pytest.raises(TrainingError, match="cannot be written"):
        write_checkpoint(tmp_path, network, {"model": "digit", "arch": "mlp"})
    assert (tmp_path / WEIGHTS).read_bytes() == weights
    assert (tmp_path / CARD).read_bytes() == card
    assert read_checkpoint(tmp_path)[1] == json.loads(card)


def no_file_larger_than(size: int) -> Callable[[], None]:
    """What a full disk does, without filling one."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("size", "file"),
    [pytest.param(300_000, "last.pt", id="resume-point"), pytest.param(0, "", id="anything-at-all")],
)
def test_a_run_on_a_full_disk_ends_with_a_sentence(
    environment: dict[str, str], tmp_path: Path, size: int, file: str
) -> None:
    options = ["--own-data", "--arch", "mlp", "--epochs", "1", "--batch-size", "350", "--out", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, "-m", "training", "digit", *options],
        cwd=ROOT,
        env=environment,
        preexec_fn=no_file_larger_than(size),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2, run.stderr
    assert f"{file} cannot be written" in run.stderr
    assert "File too large" in run.stderr
    assert "Traceback" not in run.stderr
    assert not [path.name for path in tmp_path.iterdir() if path.is_file() and path.stat().st_size]
