"""One export from end to end: a network, its graphs, their proofs, one published version."""

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from export import precision, speed
from export.card import Exported, card
from export.errors import ExportRefused
from export.placement import place, refuse_fallbacks
from export.proof import Answers, RuntimeAnswers, prove
from export.publish import VARIANTS, publish, refuse_taken
from export.simplify import simplified
from export.to_onnx import OPSET, TorchAnswers, opset_of, to_onnx
from service.errors import NotFound
from service.models.spec import Array, Room
from service.repository import Repository, RepositoryError
from training.card import read_assets, read_checkpoint
from training.exam import Exam, is_same_score

FACTS: Final = ("scores", "data", "training", "licence", "intended_use", "limits")
"""What a version's card takes over from the checkpoint's."""

LARGEST_FILE_BYTES: Final = 48_000_000
"""What may lie in git; a larger fp32 file keeps its weights as fp16."""

CALIBRATION_BATCH: Final = 16


@dataclass(frozen=True)
class Source:
    """What a version is made from.

    Attributes:
        name: What it is, for messages and the card: `torch`, `version 1`.
        facts: Its card.
        network: Its fp32 graph.
        reference: Its answers, which the new files must give.
        scores: What its card says that it scores.
        path: Where it was found, for messages.
        sha256: Of its weights or its file.
        assets: The other files that its card names, by name.
    """

    name: str
    facts: Mapping[str, Any]
    network: bytes
    reference: Answers
    scores: Mapping[str, float]
    path: Path
    sha256: str
    assets: dict[str, bytes]


def export(
    room: Room,
    *,
    checkpoint: Path | None,
    from_version: int | None = None,
    temperature: float | None = None,
    variants: Sequence[str] | None,
    repository: Path,
    data: Path | None,
    version: int | None,
) -> Path:
    """Export one model and report it on the terminal.

    Args:
        room: The model.
        checkpoint: A training run's folder; None for `runs/<model>-<its first architecture>-seed0`.
        from_version: Start from the fp32 file of this version instead.
        temperature: Divide the logits of that file by this.
        variants: Keys of `VARIANTS`; None for all that the model's story has inputs to calibrate for.
        repository: The folder that holds `<model>/<version>/`.
        data: The data folder; None for the usual one.
        version: The version to write; None for the next one.

    Returns:
        The new version's folder.

    Raises:
        ExportRefused: the checkpoint, the data or the repository is not as it should be.
        ProofFailed: an exported file does not answer like the network.
        TrainingError: the checkpoint or the data cannot be read.
    """
    refuse_taken(repository, room.name, version)
    story = importlib.import_module(f"training.{room.name}")
    console = Console(soft_wrap=True)
    with console.status("Reading the network"):
        if from_version is None:
            source = _trained(room, checkpoint or first_run(room), story)
        else:
            source = _shipped(room, repository, from_version, temperature)
    with console.status("Reading the evaluation data"):
        exam = story.exam(data, source.facts)
    chosen = _chosen(room, story, variants)
    reference = _Remembered(source.reference)
    exported = {}
    for variant in ("fp32", *(variant for variant in chosen if variant != "fp32")):
        with console.status(f"{variant}: converting"):
            converted, tolerance = _convert(variant, source, story, data, exam)
        with console.status(f"{variant}: comparing with {source.name} on {len(exam)} examples"):
            proof = prove(
                room,
                converted.network,
                reference,
                exam,
                tolerance,
                rounded=converted.rounded,
                beside=source.name,
            )
        if variant == "fp32":
            _refuse_other_scores(source, proof.scores, len(exam))
        placement = None
        if variant != "int8":
            placement = place(converted.network)
            refuse_fallbacks(room, variant, placement)
        exported[variant] = Exported(VARIANTS[variant], converted.network, proof, converted.facts, placement)
    cpu = None
    on_cpu = {name: one.network for name, one in exported.items() if name != "fp16"}
    if len(on_cpu) > 1:
        with console.status("Measuring how fast they are"):
            cpu = speed.measure(on_cpu, {size: exam.batch(slice(0, size)) for size in speed.BATCHES})
    exported = {variant: exported[variant] for variant in chosen}
    made_from = {"network": source.name, "sha256": source.sha256}
    published = publish(
        repository,
        room.name,
        {one.path: one.network for one in exported.values()} | source.assets,
        lambda number: card(room, number, source.facts, exported, made_from=made_from, cpu=cpu),
        version,
    )
    console.print(_report(published, exam.name, source.name, exported))
    if cpu is not None:
        console.print(_speeds(cpu))
    return published


def first_run(room: Room) -> Path:
    """Where `python -m training <model>` leaves its checkpoint."""
    arch = next(iter(importlib.import_module(f"training.{room.name}").ARCHITECTURES))
    return Path("runs") / f"{room.name}-{arch}-seed0"


def highest_version(room: Room, repository: Path) -> int:
    """The highest version of a model that a repository holds.

    Raises:
        ExportRefused: it holds none.
    """
    try:
        return Repository(repository).latest(room.name)
    except (RepositoryError, NotFound) as error:
        raise ExportRefused(f"There is no run and no version of {room} to export. {error}") from error


def _chosen(room: Room, story: Any, variants: Sequence[str] | None) -> list[str]:
    """The variants to export, in the order of `VARIANTS`."""
    can_calibrate = hasattr(story, "calibration")
    if variants is None:
        return [variant for variant in VARIANTS if variant != "int8" or can_calibrate]
    if "int8" in variants and not can_calibrate:
        raise ExportRefused(
            f"The story of {room} has no `calibration`, the training inputs that int8's scales are chosen "
            "from; leave int8 out of --variants."
        )
    return [variant for variant in VARIANTS if variant in variants]


def _trained(room: Room, folder: Path, story: Any) -> Source:
    """A training run's checkpoint as a source."""
    trained, facts = read_checkpoint(folder)
    _refuse_another_model(room, folder, facts)
    network = story.head(trained, facts)
    return Source(
        "torch",
        facts,
        simplified(to_onnx(network, room)),
        TorchAnswers(network),
        facts["scores"],
        folder,
        facts["weights"]["sha256"],
        read_assets(folder, facts),
    )


def _shipped(room: Room, repository: Path, version: int, temperature: float | None) -> Source:
    """The fp32 file of an older version as a source."""
    try:
        files = Repository(repository).open(room.name, version, ("fp32",))
    except (RepositoryError, NotFound) as error:
        raise ExportRefused(str(error)) from error
    facts = files.card
    _refuse_another_model(room, files.path.parent, facts)
    if opset_of(files.network) > OPSET:
        raise ExportRefused(
            f"{files.path} has the operator set {opset_of(files.network)}, and {OPSET} is the newest that "
            "this export and its GPU kernels are for; export it anew from its checkpoint."
        )
    network = simplified(precision.unfolded(files.network))
    reference: Answers = RuntimeAnswers(room, files.network)
    scores = facts["scores"]["fp32"]
    if temperature is not None:
        network = precision.tempered(room, network, temperature)
        reference = _Tempered(reference, temperature)
        # What the card claims of the probabilities was about others; labels stay, and so does accuracy.
        scores = {name: value for name, value in scores.items() if name == "accuracy"}
        facts = {**facts, "temperature": facts.get("temperature", 1.0) * temperature}
    sha256 = hashlib.sha256(files.network).hexdigest()
    return Source(
        f"version {version}", facts, network, reference, scores, files.path.parent, sha256, files.assets
    )


class _Remembered:
    """Answers that are asked for once for each precision, and worked out once."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._known: dict[bytes, list[Array]] = {}

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        """The network's outputs [n, ...] for its inputs [n, ...]."""
        digest = hashlib.sha256()
        for array in inputs:
            digest.update(str(array.shape).encode() + array.tobytes())
        known = self._known.get(digest.digest())
        if known is None:
            known = self._known[digest.digest()] = self._answers(inputs)
        return known


class _Tempered:
    """Another network's probabilities, as they are when its logits are divided by a temperature."""

    def __init__(self, answers: Answers, temperature: float) -> None:
        self._answers = answers
        self._temperature = temperature

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        """Probabilities [n, labels]: those of the other network to the power 1/temperature, scaled to 1."""
        (probabilities,) = self._answers(inputs)
        powers = probabilities.astype(np.float64) ** (1 / self._temperature)
        return [(powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)]


def _convert(
    variant: str, source: Source, story: Any, data: Path | None, exam: Exam
) -> tuple[precision.Converted, str]:
    """The source's graph in one precision, and which tolerance is asked of it."""
    if variant == "fp16":
        return precision.fp16(source.network), "fp16"
    if variant == "int8":
        inputs = story.calibration(data, source.facts)
        starts = range(0, len(inputs[0]), CALIBRATION_BATCH)
        batches = [[array[start : start + CALIBRATION_BATCH] for array in inputs] for start in starts]
        return precision.int8(
            source.network, [exam.trim(one) if exam.trim else one for one in batches]
        ), "int8"
    if len(source.network) > LARGEST_FILE_BYTES:
        small = precision.stored_small(source.network)
        return precision.Converted(small, {"weights_stored_as": "fp16"}), "fp32 stored as fp16"
    return precision.Converted(source.network), "fp32"


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


def _refuse_other_scores(source: Source, scores: Mapping[str, float], examples: int) -> None:
    """The source must do what its card says it did, give or take an example."""
    for name, claimed in source.scores.items():
        measured = scores.get(name)
        if measured is None or not is_same_score(claimed, measured, examples):
            raise ExportRefused(
                f"The card in {source.path} claims {name} {claimed}; measured here is {measured}, so card "
                "and weights do not belong together. Train it anew."
            )


def _report(version: Path, data: str, beside: str, exported: Mapping[str, Exported]) -> Table:
    """What was exported, as a table."""
    table = Table("", *exported, title=f"{version}, proven on {data}", title_justify="left")
    proofs = [one.proof for one in exported.values()]
    placements = [one.placement for one in exported.values()]
    table.add_row("file", *(one.path for one in exported.values()))
    table.add_row("bytes", *(f"{len(one.network):,}" for one in exported.values()))
    for name in proofs[0].scores:
        table.add_row(name, *(f"{proof.scores[name]:.4f}" for proof in proofs))
    table.add_row("examples", *(f"{proof.examples:,}" for proof in proofs))
    table.add_row(f"decisions as in {beside}", *(f"{proof.same_decisions:.2%}" for proof in proofs))
    table.add_row(
        f"largest difference from {beside}", *(f"{proof.largest_difference:.1e}" for proof in proofs)
    )
    table.add_row(f"mean difference from {beside}", *(f"{proof.mean_difference:.1e}" for proof in proofs))
    table.add_row(
        "largest difference, alone or in company",
        *(f"{proof.largest_neighbour_difference:.1e}" for proof in proofs),
    )
    table.add_row("nodes, opset", *(f"{proof.nodes}, {proof.opset}" for proof in proofs))
    table.add_row("nodes on CUDA", *(f"{one.on_cuda} of {one.nodes}" if one else "-" for one in placements))
    return table


def _speeds(cpu: Mapping[str, Any]) -> Table:
    """How fast the precisions are on this processor, as a table."""
    title = f"{cpu['processor']}, {cpu['cores']} cores: {cpu['fastest']} is what `auto` takes"
    table = Table("", *cpu["best"], title=title, title_justify="left")
    for name in ("items_per_second", "batch", "lanes", "threads"):
        table.add_row(name.replace("_", " "), *(f"{best[name]:,}" for best in cpu["best"].values()))
    return table
