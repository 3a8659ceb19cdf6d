"""A version appears whole or not at all, whoever else is writing and whatever stops it."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from export.errors import ExportRefused
from export.publish import publish
from service.repository import Repository

ROOT = Path(__file__).parents[2]
NETWORK = b"not a network, and nobody here asks"


def card(version: int) -> dict[str, Any]:
    entry = {"path": "model.onnx", "bytes": len(NETWORK), "sha256": sha256(NETWORK).hexdigest()}
    return {"model": "digit", "version": str(version), "labels": ["0", "1"], "files": {"fp32": entry}}


def published(repository: Path, version: int | None = None) -> Path:
    return publish(repository, "digit", {"model.onnx": NETWORK}, card, version)


def test_versions_count_up_and_each_is_what_the_service_opens(tmp_path: Path) -> None:
    repository = tmp_path / "deep" / "models"
    assert [published(repository).name for _ in range(3)] == ["1", "2", "3"]
    for version in (1, 2, 3):
        assert Repository(repository).open("digit", version).network == NETWORK
    assert sorted(entry.name for entry in (repository / "digit").iterdir()) == ["1", "2", "3"]


def test_the_next_version_follows_the_highest_and_passes_over_what_is_no_version(tmp_path: Path) -> None:
    for name in ("4", "07", "-9", "latest", ".staging-1", "1.5"):
        (tmp_path / "digit" / name).mkdir(parents=True)
    (tmp_path / "digit" / "5").write_text("a file where the next version would go")
    assert published(tmp_path).name == "6"


def test_a_chosen_version_is_written_once_and_never_over_another(tmp_path: Path) -> None:
    assert published(tmp_path, 7).name == "7"
    before = (tmp_path / "digit" / "7" / "card.json").stat()
    with pytest.raises(ExportRefused, match="Version 7 of digit exists"):
        published(tmp_path, 7)
    assert (tmp_path / "digit" / "7" / "card.json").stat() == before
    (tmp_path / "digit" / "8").mkdir()
    with pytest.raises(ExportRefused, match="Version 8 of digit exists"):
        published(tmp_path, 8)
    assert sorted(os.listdir(tmp_path / "digit")) == ["7", "8"]


def test_exports_at_the_same_time_get_versions_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(lambda _: published(tmp_path), range(24)))
    assert sorted(int(folder.name) for folder in folders) == list(range(1, 25))
    repository = Repository(tmp_path)
    assert repository.versions("digit") == list(range(1, 25))
    for version in range(1, 25):
        assert repository.open("digit", version).card["version"] == str(version)


@pytest.mark.parametrize("holds", [[], ["model.onnx"]], ids=["empty-folder", "whole-version"])
def test_a_number_taken_meanwhile_is_left_alone(tmp_path: Path, holds: list[str]) -> None:
    def late(version: int) -> dict[str, Any]:
        rival = tmp_path / "digit" / str(version)
        if version in (1, 5):
            rival.mkdir()
            for name in holds:
                (rival / name).write_text("the rival's")
        return card(version)

    assert publish(tmp_path, "digit", {"model.onnx": NETWORK}, late).name == "2"
    with pytest.raises(ExportRefused, match="Version 5 of digit exists"):
        publish(tmp_path, "digit", {"model.onnx": NETWORK}, late, 5)
    assert sorted(os.listdir(tmp_path / "digit")) == ["1", "2", "5"]
    assert Repository(tmp_path).open("digit", 2).card["version"] == "2"
    for version in ("1", "5"):
        assert os.listdir(tmp_path / "digit" / version) == holds


def test_a_reader_never_sees_a_version_in_the_making(tmp_path: Path) -> None:
    published(tmp_path)
    repository = Repository(tmp_path)
    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(lambda: [published(tmp_path) for _ in range(60)])
        while not writing.done():
            assert repository.open("digit").network == NETWORK
        assert writing.result()[-1].name == "61"


def test_a_failure_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    def broken(version: int) -> dict[str, Any]:
        raise RuntimeError("no card today")

    published(tmp_path)
    with pytest.raises(RuntimeError, match="no card today"):
        publish(tmp_path, "digit", {"model.onnx": NETWORK}, broken)
    assert os.listdir(tmp_path / "digit") == ["1"]


def test_a_kill_half_way_leaves_no_version_that_anyone_sees(tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from export.publish import publish

def card(version):
    print("writing", flush=True)
    time.sleep(600)

publish(Path(sys.argv[1]), "digit", {"model.onnx": b"half"}, card)
"""
    command = [sys.executable, "-c", program, tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    (staging,) = (tmp_path / "digit").iterdir()
    assert staging.name.startswith(".staging-")
    assert Repository(tmp_path).versions("digit") == []
    assert published(tmp_path).name == "1"
    assert Repository(tmp_path).versions("digit") == [1]


def test_a_repository_that_cannot_be_written_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(ExportRefused, match=r"Nothing can be written to .*models/digit: "):
        published(tmp_path / "models")


def test_others_may_read_what_was_published(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = published(tmp_path)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}
