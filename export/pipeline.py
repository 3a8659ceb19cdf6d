"""One export from end to end: checkpoint, graph, proof, published version."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from export.card import Exported, card
from export.errors import ExportRefused
from export.proof import prove
from export.publish import VARIANTS, publish, refuse_taken
from export.to_onnx import TorchAnswers, to_onnx
from service.models.spec import Room
from training.card import read_assets, read_checkpoint
from training.exam import is_same_score

FACTS: Final = ("scores", "data", "training", "licence", "intended_use", "limits")
"""What a version's card takes over from the checkpoint's."""


def export(
    room: Room,
    *,
    checkpoint: Path | None,
    variants: Sequence[str],
    repository: Path,
    data: Path | None,
    version: int | None,
) -> Path:
    """Export one model and report it on the terminal.

    Args:
        room: The model.
        checkpoint: A training run's folder; None for `runs/<model>-<its first architecture>-seed0`.
        variants: Keys of `VARIANTS`.
        repository: The folder that holds `<model>/<version>/`.
        data: The data folder; None for the usual one.
        version: The version to write; None for the next one.

    Returns:
        The new version's folder.

    Raises:
        ExportRefused: the checkpoint, the data or the repository is not as it should be.
        ProofFailed: the exported file does not answer like the network.
        TrainingError: the checkpoint or the data cannot be read.
    """
    refuse_taken(repository, room.name, version)
    folder = checkpoint or _first_run(room)
    trained, facts = read_checkpoint(folder)
    assets = read_assets(folder, facts)
    _refuse_another_model(room, folder, facts)
    story = importlib.import_module(f"training.{room.name}")
    network = story.head(trained, facts)
    console = Console(soft_wrap=True)
    with console.status("Reading the evaluation data"):
        exam = story.exam(data, facts)
    exported = {}
    for variant in variants:
        with console.status(f"{variant}: converting"):
            graph = to_onnx(network, room)
        with console.status(f"{variant}: comparing with torch on {len(exam)} examples"):
            proof = prove(room, graph, TorchAnswers(network), exam)
        _refuse_other_scores(folder, facts, proof.scores, len(exam))
        exported[variant] = Exported(VARIANTS[variant], graph, proof)
    published = publish(
        repository,
        room.name,
        {one.path: one.network for one in exported.values()} | assets,
        lambda number: card(room, number, facts, exported),
        version,
    )
    console.print(_report(published, exam.name, exported))
    return published


def _first_run(room: Room) -> Path:
    """Where `python -m training <model>` leaves its checkpoint."""
    arch = next(iter(importlib.import_module(f"training.{room.name}").ARCHITECTURES))
    return Path("runs") / f"{room.name}-{arch}-seed0"


def _refuse_another_model(room: Room, folder: Path, facts: Mapping[str, Any]) -> None:
    """The checkpoint must be this room's, mean the same by its outputs, and say what the card must say."""
    missing = [name for name in FACTS if name not in facts]
    if missing:
        raise ExportRefused(
            f"The card in {folder} does not say its {', '.join(missing)}; train the model anew."
        )
    if facts.get("model") != room.name:
        raise ExportRefused(
            f"{folder} holds a {facts.get('model')} network; name one of {room} with --checkpoint."
        )
    if facts.get("labels") != list(room.labels):
        raise ExportRefused(
            f"The network in {folder} was trained for the labels {facts.get('labels')}; the room of {room} "
            f"has {list(room.labels)}. Train it anew."
        )


def _refuse_other_scores(
    folder: Path, facts: Mapping[str, Any], scores: Mapping[str, float], examples: int
) -> None:
    """The checkpoint must do what its card says it did, give or take an example."""
    for name, claimed in facts["scores"].items():
        measured = scores.get(name)
        if measured is None or not is_same_score(claimed, measured, examples):
            raise ExportRefused(
                f"The card in {folder} claims {name} {claimed}; measured here is {measured}, so card and "
                "weights do not belong together. Train it anew."
            )


def _report(version: Path, data: str, exported: Mapping[str, Exported]) -> Table:
    """What was exported, as a table."""
    table = Table("", *exported, title=f"{version}, proven on {data}", title_justify="left")
    proofs = [one.proof for one in exported.values()]
    table.add_row("file", *(one.path for one in exported.values()))
    table.add_row("bytes", *(f"{len(one.network):,}" for one in exported.values()))
    for name in proofs[0].scores:
        table.add_row(name, *(f"{proof.scores[name]:.4f}" for proof in proofs))
    table.add_row("examples, every decision as in torch", *(f"{proof.examples:,}" for proof in proofs))
    table.add_row("largest difference from torch", *(f"{proof.largest_difference:.1e}" for proof in proofs))
    table.add_row("mean difference from torch", *(f"{proof.mean_difference:.1e}" for proof in proofs))
    table.add_row(
        "largest difference, alone or in company",
        *(f"{proof.largest_neighbour_difference:.1e}" for proof in proofs),
    )
    table.add_row("nodes, opset", *(f"{proof.nodes}, {proof.opset}" for proof in proofs))
    return table
