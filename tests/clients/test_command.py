"""The command `quintet`, run as people run it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .stand_in import GOOD, STARTING, HttpStandIn, Reply


def run(*arguments: str, url: str = "", text: str | None = None, folder: Path | None = None) -> Any:
    command = [sys.executable, "-m", "quintet_client.command", *arguments]
    environment = os.environ | {"QUINTET_URL": url, "PYTHONUTF8": "1"}
    return subprocess.run(
        command, env=environment, input=text, cwd=folder, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.fixture
def digit_path(digit_png: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "seven.png"
    path.write_bytes(digit_png)
    return path


def test_a_digit_is_printed_in_a_line(quintet_server: Any, digit_path: Path) -> None:
    done = run("digit", "seven.png", "seven.png", url=quintet_server.http_url, folder=digit_path.parent)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("seven.png: ")
    assert lines[0].endswith(" %)")


def test_json_tells_all_there_is(url: str, digit_path: Path) -> None:
    done = run("digit", str(digit_path), "--json", "--url", url)
    answer = json.loads(done.stdout)
    assert answer["input"] == str(digit_path)
    assert answer["model"] == "digit"
    assert set(answer["probabilities"]) == set("0123456789")


@pytest.mark.room("sentiment")
def test_texts_are_read_from_standard_input(url: str) -> None:
    done = run("sentiment", "loved it", "-", url=url, text="a dull, awful waste of time\n\nwonderful\n")
    assert [line.split(" (")[0] for line in done.stdout.splitlines()] == [
        "loved it: positive",
        "a dull, awful waste of time: negative",
        "wonderful: positive",
    ]


@pytest.mark.room("generator")
def test_drawn_digits_are_saved(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    done = run("generator", "3", "1", "--seed", "7", "--out", str(folder), url=url)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["1-7.png", "3-7.png"]


@pytest.mark.room("detection")
def test_found_objects_are_counted(url: str, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "black.png")
    done = run("detection", "black.png", "--min-confidence", "1", url=url, folder=tmp_path)
    assert done.stdout == "black.png: nothing found\n"


def test_a_bad_picture_is_named(url: str, digit_path: Path) -> None:
    (digit_path.parent / "notes.txt").write_text("These bytes are not a picture." * 8)
    done = run("digit", "seven.png", "notes.txt", url=url, folder=digit_path.parent)
    assert done.returncode == 2
    assert done.stderr.startswith("quintet: notes.txt: ")
    assert done.stderr.count("\n") == 1


def test_ready(url: str) -> None:
    done = run("ready", url=url)
    assert (done.returncode, done.stdout) == (0, "ready\n")


def test_not_ready() -> None:
    with HttpStandIn([STARTING]) as server:
        done = run("ready", url=server.url)
    assert (done.returncode, done.stdout) == (1, "not ready\n")


def test_a_services_failure_is_one_line_on_standard_error() -> None:
    with HttpStandIn([STARTING, Reply(500, detail="Something broke; its id is 7.")]) as server:
        done = run("sentiment", "loved it", url=server.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "quintet: Something broke; its id is 7.\n"


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="no-verb"),
        pytest.param(["digit"], id="no-picture"),
        pytest.param(["digit", "missing.png"], id="missing-file"),
        pytest.param(["generator", "three"], id="digit-in-letters"),
        pytest.param(["ready", "--url", "localhost"], id="address-without-scheme"),
    ],
)
def test_misuse_is_told_without_a_traceback(arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("quintet")


def test_a_long_text_is_shortened_in_its_line() -> None:
    with HttpStandIn([GOOD]) as server:
        done = run("sentiment", "long " * 100, url=server.url)
    assert done.stdout.endswith("…: positive (75.0 %)\n")
    assert len(done.stdout) < 120
