"""Score what ships, the way its card says it was scored: `python -m training.evaluate digit`.

Every file of a version is run in ONNX Runtime, as the service runs it, on all the
examples of the story's `exam`, and the scores stand beside the card's.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from service.errors import NotFound
from service.models import MODELS
from service.models.spec import Array, Room, Sample
from service.repository import Repository, RepositoryError
from service.runtime import Network, NetworkMismatch
from training.__main__ import OneSentence, whole
from training.errors import TrainingError
from training.exam import Exam, is_same_score

PRECISIONS = ("fp32", "fp16", "int8")
"""Any of them will do to read the card."""

BATCH_SIZE = 32


@dataclass(frozen=True)
class Score:
    """One number of one file: what its card claims, and what it is here."""

    variant: str
    name: str
    claimed: float
    measured: float
    examples: int

    @property
    def holds(self) -> bool:
        """Whether the two are one, but for rounding."""
        return is_same_score(self.claimed, self.measured, self.examples)


def evaluate(
    room: Room, repository: Repository, data: Path | None, version: int | None, progress: Progress
) -> tuple[str, list[Score]]:
    """Score every file of one version.

    Args:
        room: The model.
        repository: Where it ships.
        data: The data folder; None for the usual one.
        version: Which version; None for the highest.
        progress: Shows how far it is.

    Returns:
        What was scored on what, for people, and every score on the card.

    Raises:
        TrainingError: the data cannot be had, or are not those of the card.
        NotFound, RepositoryError, NetworkMismatch: the version is not there, or not as it should be.
    """
    files = repository.open(room.name, version, PRECISIONS)
    exam: Exam = importlib.import_module(f"training.{room.name}").exam(data, files.card)
    scores = []
    for variant in files.card["files"]:
        network = Network(room, repository.open(room.name, files.version, (variant,)).network)
        outputs = _answers(network, exam, progress, f"{room.name} {variant}")
        measured = exam.score(outputs, exam.truth)
        for name, claimed in files.card["scores"][variant].items():
            scores.append(Score(variant, name, claimed, measured.get(name, float("nan")), len(exam)))
    return f"{room.name}/{files.version} on {exam.name}, {len(exam):,} examples", scores


def _answers(network: Network, exam: Exam, progress: Progress, name: str) -> list[Array]:
    """The network's outputs for every example, each [examples, ...]."""
    rows: list[tuple[Array, ...]] = []
    for start in progress.track(range(0, len(exam), BATCH_SIZE), description=name):
        inputs = exam.batch(slice(start, start + BATCH_SIZE))
        rows += network.run([Sample(tensors) for tensors in zip(*inputs, strict=True)])
    return [np.stack(column) for column in zip(*rows, strict=True)]


def _report(title: str, scores: Sequence[Score]) -> Table:
    """Card and measurement, side by side."""
    table = Table("file", "score", "card", "measured", "", title=title, title_justify="left")
    for score in scores:
        mark = "" if score.holds else "differs"
        table.add_row(score.variant, score.name, f"{score.claimed:.6g}", f"{score.measured:.6g}", mark)
    return table


def parser() -> argparse.ArgumentParser:
    """All that can be said on the command line."""
    options = OneSentence(prog="python -m training.evaluate", description=__doc__)
    which = options.add_mutually_exclusive_group(required=True)
    which.add_argument("model", nargs="?", choices=list(MODELS), help="the model to score")
    which.add_argument("--all", action="store_true", help="score every model")
    options.add_argument("--version", type=whole, metavar="N", help="default: the highest")
    options.add_argument(
        "--models",
        type=Path,
        default=Path("models"),
        metavar="DIR",
        help="the model repository; default: models",
    )
    options.add_argument(
        "--data", type=Path, metavar="DIR", help="data sets; default: $QUINTET_DATA or ~/.cache/quintet/data"
    )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Score; 0 when every score is its card's, 1 when one is not, 2 when something must be mended first."""
    options = parser()
    chosen = options.parse_args(arguments)
    if chosen.all and chosen.version is not None:
        options.error("--version is about one model; leave it out, or name the model")
    outcome = 0
    for model in MODELS if chosen.all else [chosen.model]:
        try:
            outcome = max(outcome, _evaluate_one(MODELS[model], chosen))
        except (TrainingError, NotFound, RepositoryError, NetworkMismatch) as error:
            print(error, file=sys.stderr)
            outcome = 2
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
            return 130
    return outcome


def _evaluate_one(room: Room, chosen: argparse.Namespace) -> int:
    """Score one model and print it; 0 where every score is its card's, else 1."""
    console = Console(soft_wrap=True)
    with Progress(console=console, transient=True) as progress:
        title, scores = evaluate(room, Repository(chosen.models), chosen.data, chosen.version, progress)
    console.print(_report(title, scores))
    return 0 if all(score.holds for score in scores) else 1


if __name__ == "__main__":
    sys.exit(main())
