"""The client's README keeps its word: its blocks run as they stand, and its names are there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import quintet_client
from quintet_client import Client

from tests.conftest import ROOT
from tests.test_readme import moved

README = (ROOT / "clients" / "python" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=["first", "stream", "async", "errors"])
def test_the_blocks_run(code: str, quintet_server: Any, tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "seven.png", tmp_path)
    command = [sys.executable, "-c", moved(code, quintet_server)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(("7", "1 "))


def test_every_public_name_is_told() -> None:
    assert [name for name in quintet_client.__all__ if name not in README and name != "Object"] == []


def test_every_option_is_told() -> None:
    import inspect

    (told,) = re.findall(r"`Client\((url, .*)\)`", README)
    parameters = list(inspect.signature(Client).parameters.values())
    assert [one.split("=")[0] for one in told.split(", ")] == [one.name for one in parameters]
    said = {one.split("=")[0]: one.split("=")[1] for one in told.split(", ")[1:]}
    assert {
        one.name: f"{one.default:g}" if one.default else str(one.default) for one in parameters[1:]
    } == said
