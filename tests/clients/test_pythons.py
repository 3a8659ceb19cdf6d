"""The client runs where people are: on every Python that it declares."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

CLIENT = ROOT / "clients" / "python"
PROJECT = (CLIENT / "pyproject.toml").read_text(encoding="utf-8")
DECLARED = re.findall(r"Python :: 3\.(\d+)", PROJECT)


def test_the_declared_range_is_one() -> None:
    assert DECLARED == ["10", "11", "12", "13", "14"]
    assert 'requires-python = ">=3.10"' in PROJECT


@pytest.mark.parametrize("path", sorted((CLIENT / "src").rglob("*.py")), ids=lambda path: path.name)
def test_every_file_is_of_the_oldest_pythons_language(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


@pytest.mark.parametrize("version", [DECLARED[0], DECLARED[-1]])
def test_every_name_is_in_the_library_of_that_python(version: str) -> None:
    command = [sys.executable, "-m", "mypy", "--python-version", f"3.{version}", "clients/python/src"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
