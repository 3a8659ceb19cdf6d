"""What a run leaves behind: weights, the card that says what they are, and two pictures.

The card names the checksum of its weights and is written after them, so a checkpoint
is either whole or recognised as broken.
"""

import hashlib
import importlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import nn

from training.errors import TrainingError
from training.files import appearing
from training.fit import RESUME_POINT, Run, Settings, Story

matplotlib.use("Agg")
from matplotlib import pyplot

WEIGHTS = "checkpoint.safetensors"
CARD = "card.json"


def training_facts(run: Run, settings: Settings, story: Story, network: nn.Module) -> dict[str, Any]:
    """The card's `training` part."""
    return {
        "command": run.command(settings),
        "seed": settings.seed,
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "minutes": round(story.minutes, 1),
        "device": settings.device,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "commit": commit(),
        "torch": torch.__version__,
    }


def commit() -> str:
    """The commit of this code, `unknown` where there is none, with `+` where files differ from it."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()


def write_checkpoint(
    folder: Path, network: nn.Module, facts: Mapping[str, Any], assets: Mapping[str, bytes] | None = None
) -> None:
    """Write `checkpoint.safetensors` and the room's assets, then `card.json` with their checksums.

    Each file appears whole.
    """
    listed = {}
    for name, content in (assets or {}).items():
        write(folder / name, content)
        listed[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if listed:
        facts = {**facts, "assets": listed}
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    packed = safetensors.torch.save(weights)
    write(folder / WEIGHTS, packed)
    _write_card(folder, {**facts, "weights": {"path": WEIGHTS, "sha256": hashlib.sha256(packed).hexdigest()}})


def read_checkpoint(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Read a trained network and its card.

    Args:
        folder: A run's folder, as `python -m training` leaves it.

    Returns:
        The network, in evaluation mode on the CPU, and the card.

    Raises:
        TrainingError: there is no checkpoint, or it is unfinished, damaged or of an
            architecture that we do not know.
    """
    facts = _read_card(folder)
    model, arch = facts.get("model"), facts.get("arch")
    architectures = _architectures(str(model))
    if arch not in architectures:
        known = ", ".join(architectures) or "none"
        raise TrainingError(f"{folder} holds a {model} network of architecture {arch!r}; known are: {known}.")
    try:
        packed = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise TrainingError(f"{folder} has a card but no {WEIGHTS}; train again.") from error
    if hashlib.sha256(packed).hexdigest() != facts.get("weights", {}).get("sha256"):
        raise TrainingError(f"{folder / WEIGHTS} is not the file that its card describes; train again.")
    network = architectures[arch]()
    try:
        network.load_state_dict(safetensors.torch.load(packed))
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise TrainingError(
            f"{folder / WEIGHTS} does not fit the architecture {arch}; train again."
        ) from error
    return network.eval(), facts


def read_assets(folder: Path, facts: Mapping[str, Any]) -> dict[str, bytes]:
    """The files that a run's card names beside its weights, by name: what the room needs of them.

    Raises:
        TrainingError: one is missing, or not the one that the card describes.
    """
    assets = {}
    for name, entry in facts.get("assets", {}).items():
        try:
            assets[name] = (folder / name).read_bytes()
        except OSError as error:
            raise TrainingError(f"{folder} has a card but no {name}; train again.") from error
        if hashlib.sha256(assets[name]).hexdigest() != entry["sha256"]:
            raise TrainingError(f"{folder / name} is not the file that its card describes; train again.")
    return assets


def note_seeds(folders: Sequence[Path]) -> dict[str, Any]:
    """Write into the cards of runs that differ in their seed alone how they fared together.

    Args:
        folders: Of the finished runs.

    Returns:
        `{"numbers": seeds, "score": its name, "values": …, "mean": …, "spread": …}` of the main
        score, which a card names first; the spread is the standard deviation between seeds.
    """
    cards = [_read_card(folder) for folder in folders]
    score = next(iter(cards[0]["scores"]))
    values = [float(facts["scores"][score]) for facts in cards]
    seeds = {
        "numbers": [facts["training"]["seed"] for facts in cards],
        "score": score,
        "values": values,
        "mean": float(np.mean(values)),
        "spread": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
    }
    for folder, facts in zip(folders, cards, strict=True):
        _write_card(folder, {**facts, "seeds": seeds})
    return seeds


def draw_confusion(counts: npt.NDArray[np.int64], labels: Sequence[str], path: Path) -> None:
    """Draw how often each label (row) was read as each (column), int64 [n, n], the diagonal unshaded."""
    mistakes = counts * (1 - np.eye(len(labels), dtype=np.int64))
    figure, axes = pyplot.subplots(figsize=(6, 6), layout="constrained")
    axes.imshow(mistakes, cmap="Reds")
    for row, column in np.ndindex(*counts.shape):
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(labels)), labels, rotation=0 if max(map(len, labels)) < 4 else 45)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("read as")
    axes.set_ylabel("is")
    axes.set_title(f"{mistakes.sum()} mistakes in {counts.sum()}")
    _save(figure, path)


def draw_curve(epochs: Sequence[Mapping[str, float]], score: str, path: Path) -> None:
    """Draw the losses and one score over the epochs."""
    figure, (upper, lower) = pyplot.subplots(2, sharex=True, figsize=(7, 6), layout="constrained")
    numbers = [row["epoch"] for row in epochs]
    for name in (name for name in epochs[0] if name.endswith("/loss")):
        upper.plot(numbers, [row[name] for row in epochs], label=name)
    upper.set_ylabel("training loss")
    upper.legend()
    lower.plot(numbers, [row[score] for row in epochs], color="tab:green")
    lower.set_ylabel(score)
    lower.set_xlabel("epoch")
    lower.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Write a picture under its name once it is whole."""
    with appearing(path) as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)


def write(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    with appearing(path) as file:
        file.write(content)


def _write_card(folder: Path, facts: Mapping[str, Any]) -> None:
    write(folder / CARD, json.dumps(facts, indent=2, ensure_ascii=False).encode() + b"\n")


def _read_card(folder: Path) -> dict[str, Any]:
    """The card in a run's folder."""
    try:
        facts = json.loads((folder / CARD).read_bytes())
    except FileNotFoundError as error:
        if (folder / RESUME_POINT).exists():
            raise TrainingError(f"The run in {folder} has not finished; go on with --resume.") from error
        raise TrainingError(f"There is no checkpoint in {folder}; train one first.") from error
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder / CARD} cannot be read; train again.") from error
    if not isinstance(facts, dict):
        raise TrainingError(f"{folder / CARD} is not a card; train again.")
    return facts


def _architectures(model: str) -> dict[str, Any]:
    """The architectures of a model's story; none where there is no such story."""
    if not (Path(__file__).parent / f"{model}.py").exists() or not model.isidentifier():
        return {}
    found: dict[str, Any] = getattr(importlib.import_module(f"training.{model}"), "ARCHITECTURES", {})
    return found
