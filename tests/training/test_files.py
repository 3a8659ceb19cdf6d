"""A file is there whole, or it is as it was; and where the disk takes no more, a sentence says so."""

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from training.__main__ import main
from training.card import CARD, WEIGHTS, read_checkpoint, write_checkpoint
from training.digit import ARCHITECTURES
from training.errors import TrainingError
from training.files import appearing


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


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """What a full disk does, without filling one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_run_on_a_full_disk_ends_with_a_sentence(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--own-data", "--arch", "mlp", "--epochs", "1", "--batch-size", "350", "--out", str(tmp_path)]
    with no_file_larger_than(300_000):
        assert main(["digit", "--data", str(data_folder), *options]) == 2
    sentence = capsys.readouterr().err
    assert f"{tmp_path / 'last.pt'} cannot be written: File too large; make room for it." in sentence
    assert sentence.count("\n") == 1, "one sentence, no stack"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []
