"""The tour for learners: its cells run top to bottom, as a notebook would run them."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "tour.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]

LIMIT_SECONDS = 600
"""Several times what it takes: the machine may be busy with something else."""


def test_the_tour_can_be_read_by_notebooks() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    assert [cell["cell_type"] for cell in CELLS].count("markdown") >= 8
    for cell in CODE:
        ast.parse(cell)  # plain Python, no magic: the cells are its own


def test_the_tour_runs_top_to_bottom(tmp_path: Path) -> None:
    script = tmp_path / "tour.py"
    # What a notebook does with a cell's last value, for a reader of this test's output.
    script.write_text("\n\n".join(map(_shown, CODE)), encoding="utf-8")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, str(script)],
        cwd=NOTEBOOK.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    right = re.search(r"(\d+) of 300 are right", ran.stdout)
    assert right, ran.stdout
    assert int(right[1]) > 200
    assert "<quintet" in ran.stdout
    assert ran.stdout.count("read ") == 5


def _shown(cell: str) -> str:
    tree = ast.parse(cell)
    last = tree.body[-1]
    if isinstance(last, ast.Expr):
        lines = cell.splitlines()
        start = last.lineno - 1
        return "\n".join([*lines[:start], f"print(repr(({ast.unparse(last.value)})))"])
    return cell


@pytest.mark.parametrize("cell", CODE, ids=range(len(CODE)))
def test_no_line_is_too_long_to_read(cell: str) -> None:
    assert max(map(len, cell.splitlines())) <= 110
