"""The command `quintet`, run as people run it."""

import base64
import contextlib
import io
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
        pytest.param(["digit", "."], id="a-folder"),
        pytest.param(["generator", "--save", "grid.txt"], id="a-format-that-is-none"),
        pytest.param(["sentiment"], id="no-text-at-all"),
        pytest.param(["ready", "--ca-file", "missing.pem"], id="missing-certificates"),
        pytest.param(["generator", "three"], id="digit-in-letters"),
        pytest.param(["ready", "--url", "localhost"], id="address-without-scheme"),
    ],
)
def test_misuse_is_told_without_a_traceback(arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("quintet")


def test_one_bad_picture_spoils_no_other(url: str, digit_path: Path) -> None:
    (digit_path.parent / "notes.txt").write_text("These bytes are not a picture." * 8)
    names = ["notes.txt", "seven.png", "missing.png", ".", "seven.png"]
    done = run("digit", *names, url=url, folder=digit_path.parent)
    assert done.returncode == 2
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["seven.png", "seven.png"]
    notes, missing, folder = done.stderr.splitlines()
    assert notes.startswith("quintet: notes.txt: ")
    assert missing == "quintet: missing.png: there is no such file"
    assert folder.startswith("quintet: .: this is a folder; name the pictures in it")


def test_a_service_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = run("sentiment", "loved it", url="http://127.0.0.1:9")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "quintet: No service answers at http://127.0.0.1:9: nothing listens there; "
        "start one, or mend the address.\n"
    )


def test_texts_in_a_pipe_need_no_dash() -> None:
    with HttpStandIn([GOOD]) as server:
        done = run("sentiment", url=server.url, text="loved it\n\nadored it\n")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["loved it", "adored it"]


def test_the_status_tells_what_is_served(url: str) -> None:
    done = run("status", url=url)
    assert done.returncode == 0
    first, *models = done.stdout.splitlines()
    assert first.startswith(f"{url}: quintet ")
    assert ", ready, " in first
    assert any(line.startswith("  digit      version 2") for line in models)
    told = json.loads(run("status", "--json", url=url).stdout)
    assert told["ready"] is True
    assert "2" in told["models"]["digit"]


def test_found_objects_are_drawn(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), "white").save(tmp_path / "cells.png")
    found = {"label": "WBC", "confidence": 0.9, "box": [4, 4, 40, 30]}
    predictions = [{"width": 64, "height": 48, "objects": [found]}]
    body = json.dumps({"model": "detection", "version": "1", "predictions": predictions}).encode()
    with HttpStandIn([GOOD], body=body) as server:
        done = run("detection", "cells.png", "--save", "out.png", url=server.url, folder=tmp_path)
        assert (done.returncode, done.stdout) == (0, "cells.png: 1 WBC\n"), done.stderr
        with Image.open(tmp_path / "out.png") as drawn:
            assert drawn.size == (64, 48)
            assert len(drawn.getcolors() or ()) > 1
        done = run("detection", "cells.png", "cells.png", "--save", "all", url=server.url, folder=tmp_path)
        assert [path.name for path in (tmp_path / "all").iterdir()] == ["cells.png"]


def test_drawn_digits_are_saved_in_one_grid(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("L", (28, 28)).save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    predictions = [{"digit": digit, "seed": 7, "image": image} for digit in (3, 1, 4)]
    body = json.dumps({"model": "generator", "version": "1", "predictions": predictions}).encode()
    with HttpStandIn([GOOD], body=body) as server:
        done = run("generator", "3", "1", "4", "--save", "grid.png", url=server.url, folder=tmp_path)
    assert done.stdout.splitlines()[0] == "grid.png: a 3, seed 7"
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (84, 28)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such terminals")
def test_a_terminal_gets_a_table(digit_path: Path, quintet_server: Any) -> None:
    import pty

    ours, its = pty.openpty()
    command = [sys.executable, "-m", "quintet_client.command", "digit", "seven.png", "seven.png"]
    environment = os.environ | {"QUINTET_URL": quintet_server.http_url, "COLUMNS": "100", "TERM": "xterm"}
    with subprocess.Popen(
        command, env=environment, cwd=digit_path.parent, stdout=its, stderr=its, stdin=its
    ) as process:
        os.close(its)
        seen = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while chunk := os.read(ours, 4096):
                seen += chunk
        os.close(ours)
        assert process.wait() == 0
    text = seen.decode()
    assert "answer" in text
    assert text.count("seven.png") == 2
    assert "━" in text


def test_a_long_text_is_shortened_in_its_line() -> None:
    with HttpStandIn([GOOD]) as server:
        done = run("sentiment", "long " * 100, url=server.url)
    assert done.stdout.endswith("…: positive (75.0 %)\n")
    assert len(done.stdout) < 120
