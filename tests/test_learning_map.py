"""Every link of the learning map leads to a file that holds the piece of code it names."""

import re
from pathlib import Path

import pytest

from service.models import MODELS

from .conftest import ROOT

MAP = ROOT / "docs" / "learning-map.md"
LINKS = re.findall(r"\[`([^`]+)`\]\(([^)]+)\)", MAP.read_text(encoding="utf-8"))

IDEAS = (
    "neuron", "layer", "relu", "sigmoid", "softmax", "mean squared error", "cross-entropy",
    "back-propagation", "sgd", "adam", "l2", "dropout", "augmentation",
    "feed-forward", "convolutional", "recurrent", "adversarial", "transformer",
)  # fmt: skip


@pytest.mark.parametrize(("text", "link"), LINKS, ids=[text for text, _ in LINKS])
def test_a_link_holds_what_it_names(text: str, link: str) -> None:
    path = (MAP.parent / link).resolve()
    assert path.is_relative_to(ROOT)
    if not path.exists() and path.parent.name == "training" and path.stem not in MODELS:
        pytest.skip(f"{path.stem} has no room yet")
    assert text in path.read_text(encoding="utf-8") or text == str(path.relative_to(ROOT))


@pytest.mark.parametrize("idea", IDEAS)
def test_each_idea_of_the_field_has_its_row(idea: str) -> None:
    rows = [row for row in MAP.read_text(encoding="utf-8").splitlines() if row.startswith("| ")]
    found = [row for row in rows if idea in row.split("|")[1].lower()]
    assert found, idea
    assert "](../training/" in found[0]


def test_each_trial_that_the_map_names_can_be_run() -> None:
    known = set(re.findall(r'Trial\("([^"]+)"', (ROOT / "training" / "ablations.py").read_text("utf-8")))
    text = MAP.read_text(encoding="utf-8")
    assert len(known) == 10
    assert [name for name in known if name != "all of it" and f'"{name}"' not in text] == []


def test_the_map_is_about_files_of_ours() -> None:
    assert {Path(link).parts[1] for _, link in LINKS} == {"training"}
