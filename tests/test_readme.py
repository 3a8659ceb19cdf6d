"""The README keeps its word: its blocks are run as they stand, against the real service."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import QuintetServer

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def lines_starting_with(word: str) -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith(f"{word} ")]


def moved(text: str, server: QuintetServer) -> str:
    """The same text for a server on other ports than the standard ones."""
    rest = server.http_url.removeprefix("http://")
    return text.replace("localhost:3000", rest).replace("localhost:3001", server.grpc_address)


def test_every_line_of_every_shell_block_is_tested() -> None:
    tested = lines_starting_with("make") + lines_starting_with("curl") + lines_starting_with("quintet")
    every = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(every) >= 8
    assert sorted(every) == sorted(tested)


@pytest.mark.parametrize("command", lines_starting_with("make"))
def test_make_knows_the_target(command: str) -> None:
    words = shlex.split(command, comments=True)
    ran = subprocess.run([words[0], "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


@pytest.mark.parametrize("command", lines_starting_with("curl"))
def test_curl_gets_an_answer(command: str, quintet_server: QuintetServer) -> None:
    words = shlex.split(moved(command, quintet_server))
    ran = subprocess.run([words[0], "--fail-with-body", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    answer = json.loads(ran.stdout)
    if "predictions" in answer:
        assert {prediction["label"] for prediction in answer["predictions"]} == {"7"}


@pytest.mark.parametrize("command", lines_starting_with("quintet"))
def test_the_command_reads_the_picture(command: str, quintet_server: QuintetServer) -> None:
    words = shlex.split(command)
    ran = subprocess.run(
        [str(Path(sys.executable).with_name(words[0])), *words[1:]],
        cwd=ROOT,
        env={**os.environ, "QUINTET_URL": quintet_server.http_url},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "7" in ran.stdout.split(":")[-1]


@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_blocks_run(code: str, quintet_server: QuintetServer) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", moved(code, quintet_server)], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "7" in ran.stdout


def test_every_file_that_is_linked_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_setting_in_the_table_exists() -> None:
    from service.settings import Settings

    named = re.findall(r"^\| `QUINTET_(\w+)` \|", README, re.MULTILINE)
    assert len(named) >= 4
    # One says where the others may be written.
    assert {name.lower() for name in named} <= {*Settings.model_fields, "settings"}
